"""Families of models: their parts, replaced forwards, and losses without logits."""
