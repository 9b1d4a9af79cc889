"""Where memory goes: measured per phase of a step, and planned before a run."""

from colm_ds.memory.hooks import MemoryHooks
from colm_ds.memory.meter import Meter

__all__ = ["MemoryHooks", "Meter"]
