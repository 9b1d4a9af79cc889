"""CoLM in TRL's `SFTTrainer` (extra `[trl]`); its metrics, completion-only loss and PEFT work as usual.

On a command line, `python -m colm_ds.integrations.trl sft --config sft.yaml` takes the arguments and the file of `trl
sft`, with a `colm:` block in the file or `--colm` with JSON or a file. Several ranks:
`accelerate launch --num_processes 4 -m colm_ds.integrations.trl sft --config sft.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets

from colm_ds.errors import ConfigError, Problems
from colm_ds.integrations import transformers
from colm_ds.integrations.dataset_sources import (
    STREAM,
    check_block,
    dataset_names,
    exit_with_message,
    replaced,
    with_sources,
)
from colm_ds.integrations.transformers import CoLMArguments, CoLMMixin

try:
    import trl
    from trl import SFTTrainer
    from trl.scripts import sft
except ImportError as error:
    raise ImportError("colm_ds.integrations.trl needs TRL: pip install 'colm_ds[trl]'") from error

USAGE = "python -m colm_ds.integrations.trl sft --config sft.yaml"

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


def main(arguments: Sequence[str]) -> None:
    """Train as `trl sft` does, on coresets.

    Args:
        arguments: "sft" and the arguments of `trl sft` and `--colm`.

    Raises:
        ConfigError: listing everything that cannot work.
    """
    if not arguments or arguments[0] not in ("sft", "-h", "--help"):
        given = " ".join(arguments)
        raise ConfigError(f"arguments {given!r}: only sft trains on coresets. Write {USAGE}")
    kinds = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig, CoLMArguments)
    parser = trl.TrlParser(kinds, prog="python -m colm_ds.integrations.trl sft", description=__doc__)
    words = list(arguments[1:]) if arguments[0] == "sft" else list(arguments)
    script, training, model, mixture, colm, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    problems = Problems("the arguments of trl sft")
    column = check_block(colm.colm, "the arguments of trl sft", problems)
    if unknown:
        problems.messages.append(
            f"{' '.join(unknown)}: unknown to trl sft. Options of accelerate go to accelerate launch, in front of "
            "-m colm_ds.integrations.trl."
        )
    if script.dataset_streaming or mixture.streaming:
        problems.messages.append(f"streaming: {STREAM}. Remove it.")
    problems.raise_if_any()
    names = dataset_names([asdict(entry) for entry in mixture.datasets])

    def get_dataset(config: Any) -> Any:
        def concatenate(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
            named = zip(parts, names, strict=True)
            return concatenate_datasets([with_sources(part, name, column) for part, name in named])

        concatenate_datasets = datasets.concatenate_datasets
        with replaced(datasets, concatenate_datasets=concatenate):
            return original(config)

    def make_trainer(train_dataset: Any, **others: Any) -> CoLMSFTTrainer:
        sourced = train_dataset if names else with_sources(train_dataset, script.dataset_name, column)
        return CoLMSFTTrainer(train_dataset=sourced, colm=colm, **others)

    original = trl.get_dataset
    with replaced(trl, SFTTrainer=make_trainer, get_dataset=get_dataset):
        sft.main(script, training, model, mixture)


if __name__ == "__main__":
    exit_with_message(main)
