"""The engine: a DeepSpeed engine whose step selects a coreset between collecting and accumulating."""

from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.engine.engine import CoLMEngine, initialize

__all__ = ["CoLMEngine", "CoresetSelector", "initialize"]
