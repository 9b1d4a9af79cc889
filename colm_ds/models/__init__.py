"""Model families: their parts, patched forwards, and losses without full logits."""
