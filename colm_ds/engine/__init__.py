"""The engine: a DeepSpeed engine whose step selects a coreset between collecting and accumulating."""
