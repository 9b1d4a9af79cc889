"""A DeepSpeed engine whose step selects a coreset before it accumulates gradients."""

from colm_ds.engine.coreset_selector import CoresetSelector
from colm_ds.engine.engine import CoLMEngine
from colm_ds.engine.initialization import initialize

__all__ = ["CoLMEngine", "CoresetSelector", "initialize"]
