"""CoLM in other people's training loops: plain PyTorch, `transformers.Trainer`, TRL."""
