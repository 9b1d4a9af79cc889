"""CoLM in TRL's `SFTTrainer` (extra `[trl]`); its metrics, completion-only loss and PEFT work as usual."""

from __future__ import annotations

from dataclasses import dataclass, field

from colm_ds.integrations import transformers
from colm_ds.integrations.transformers import CoLMArguments, CoLMMixin

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError("colm_ds.integrations.trl needs TRL: pip install 'colm_ds[trl]'") from error

__all__ = ["CoLMArguments", "CoLMConfig", "CoLMSFTConfig", "CoLMSFTTrainer"]


@dataclass
class CoLMSFTConfig(transformers.CoLMConfig):
    """`CoLMConfig` without `packing`: SFTConfig has an option of that name."""

    packing: str = field(default="off", init=False)


CoLMConfig = CoLMSFTConfig
"""The name that scripts for TRL import."""


class CoLMSFTTrainer(CoLMMixin, SFTTrainer):
    """`trl.SFTTrainer` on coresets: `CoLMSFTTrainer(model, args, ..., colm=CoLMConfig(large_batch_size=128))`.

    The source column of the dataset survives TRL's tokenisation. An example is a row of the prepared dataset. TRL's own
    packing joins rows of several sources and drops the column, so it is refused; rows packed by source beforehand, with
    a source column, are examples like any other.
    """
