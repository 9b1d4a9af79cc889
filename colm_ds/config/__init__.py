"""The `"colm"` section and the DeepSpeed configuration around it."""

from colm_ds.config.colm import CoLMSection
from colm_ds.config.resolve import ResolvedConfig, load_config, resolve_config

ColmConfig = CoLMSection
"""The name of version 0.1.0."""

__all__ = ["CoLMSection", "ColmConfig", "ResolvedConfig", "load_config", "resolve_config"]
