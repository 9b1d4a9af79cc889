"""Models: their parts found by structure, patched forwards, and losses without full logits."""
