"""The `"colm"` section and the DeepSpeed configuration around it."""
