"""`colm-ds check`: how much selection is worth on a model and its data, measured before training or along it."""
