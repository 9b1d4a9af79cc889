"""`colm-ds check`: measure what selection is worth on a model and its data, before training or during it."""
