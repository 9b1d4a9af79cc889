"""Measured memory: peaks per phase of a step, and their parts."""

from colm_ds.memory.hooks import MemoryHooks
from colm_ds.memory.meter import Meter

__all__ = ["MemoryHooks", "Meter"]
