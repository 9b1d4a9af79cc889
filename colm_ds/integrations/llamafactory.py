"""CoLM in LLaMA-Factory's fine-tuning: `python -m colm_ds.integrations.llamafactory train config.yaml`.

The file is LLaMA-Factory's own with a `colm:` block. Several ranks: `torchrun --nproc_per_node 4 -m
colm_ds.integrations.llamafactory train config.yaml`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from datasets import Dataset

from colm_ds.errors import ConfigError, Problems
from colm_ds.integrations.dataset_sources import (
    NO_LOSS,
    OWN_LOSS,
    PACKED,
    STREAM,
    add_refused,
    check_block,
    exit_with_message,
    replaced,
    row_sources,
)
from colm_ds.integrations.transformers import CoLMMixin

USAGE = "python -m colm_ds.integrations.llamafactory train config.yaml [key=value ...]"

REFUSED = {
    "packing": f"{PACKED}. Remove it",
    "neat_packing": f"{PACKED}. Remove it",
    "streaming": f"{STREAM}. Remove it",
    "use_dft_loss": OWN_LOSS,
    "use_eaft_loss": OWN_LOSS,
    "use_asft_loss": OWN_LOSS,
    "use_ray": "starts ranks that know nothing of coresets. Start with torchrun",
    "use_mca": "has a trainer of its own. Remove it",
    "use_hyper_parallel": "has a trainer of its own. Remove it",
    "use_unsloth": "has a forward and a loss of its own. Remove it",
    "use_kt": "has a forward and a loss of its own. Remove it",
    "enable_liger_kernel": "does not work with selection. Remove it",
}
"""Options of LLaMA-Factory, and why selection does not go along with them."""


def main(arguments: Sequence[str]) -> None:
    """Train as a file of LLaMA-Factory's and its `colm:` block say.

    Args:
        arguments: "train", the file, and `key=value` that replace its values (`colm.large_batch_size=64`, too).

    Raises:
        ConfigError: listing everything that cannot work.
    """
    if len(arguments) < 2 or arguments[0] != "train" or not arguments[1].endswith((".yaml", ".yml")):
        raise ConfigError(f"arguments {' '.join(arguments)!r}: not understood. Write {USAGE}; JSON is YAML, too.")
    try:
        from omegaconf import OmegaConf
    except ImportError as error:
        raise ConfigError("LLaMA-Factory is not installed here: pip install llamafactory==0.9.5") from error
    try:
        written = OmegaConf.merge(OmegaConf.load(arguments[1]), OmegaConf.from_cli(list(arguments[2:])))
    except OSError as error:
        raise ConfigError(f"{arguments[1]}: {error.strerror or error}.") from None
    train(OmegaConf.to_container(written), arguments[1])


def train(config: dict[str, Any], where: str = "config") -> None:
    """Train by LLaMA-Factory's own workflow with its trainer on coresets.

    Args:
        config: keys and values of LLaMA-Factory, and `colm`.
        where: the file they come from, for messages.

    Raises:
        ConfigError: listing everything that cannot work.
    """
    values = dict(config)
    block = values.pop("colm", None)
    column = check_config(values, block, where)
    try:
        from llamafactory.data import loader
        from llamafactory.train import tuner
        from llamafactory.train.sft import workflow
    except ImportError as error:
        raise ConfigError(f"LLaMA-Factory cannot be imported: {error}. pip install llamafactory==0.9.5") from error

    class CoLMSeq2SeqTrainer(CoLMMixin, workflow.CustomSeq2SeqTrainer):
        """LLaMA-Factory's trainer on coresets."""

    with ExitStack() as stack:
        stack.enter_context(
            replaced(
                loader,
                get_dataset_list=partial(named_datasets, loader.get_dataset_list),
                align_dataset=partial(align_with_sources, loader.align_dataset, column),
                _get_dataset_processor=partial(processor_with_sources, loader._get_dataset_processor, column),
            )
        )
        stack.enter_context(replaced(workflow, CustomSeq2SeqTrainer=partial(CoLMSeq2SeqTrainer, colm=block)))
        tuner.run_exp(values)


def check_config(values: Mapping[str, Any], block: Any, where: str) -> str:
    """Check the keys of both, and return the column of the sources."""
    problems = Problems(where)
    column = check_block(block, where, problems)
    if values.get("stage", "sft") != "sft":
        problems.add("stage", values["stage"], NO_LOSS, 'Write "sft".')
    add_refused(values, REFUSED, problems)
    problems.raise_if_any()
    return column


def named_datasets(original: Any, dataset_names: Sequence[str] | None, *args: Any, **kwargs: Any) -> Any:
    """Give each of LLaMA-Factory's datasets the name that `dataset:` has for it, in `colm_source`."""
    datasets = original(dataset_names, *args, **kwargs)
    for name, attributes in zip(dataset_names or (), datasets, strict=True):
        attributes.colm_source = name
    return datasets


def align_with_sources(
    original: Any, column: str, dataset: Dataset, dataset_attr: Any, *args: Any, **kwargs: Any
) -> Dataset:
    """Convert a dataset's rows into LLaMA-Factory's, one into one, and keep their sources."""
    sources = row_sources(dataset, dataset_attr.colm_source, column)
    aligned: Dataset = original(dataset, dataset_attr, *args, **kwargs)
    return aligned.add_column(column, sources)


def processor_with_sources(original: Any, column: str, *args: Any, **kwargs: Any) -> Any:
    """Make LLaMA-Factory's processor, which drops rows that it cannot use and keeps the others' sources."""
    processor = original(*args, **kwargs)
    preprocess = processor.preprocess_dataset

    def preprocess_dataset(examples: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        kept: dict[str, list[Any]] = defaultdict(list)
        for row, source in enumerate(examples[column]):
            made = preprocess({key: values[row : row + 1] for key, values in examples.items()})
            for key, values in made.items():
                kept[key].extend(values)
            kept[column].extend([source] * len(made["input_ids"]))
        return kept

    processor.preprocess_dataset = preprocess_dataset
    return processor


if __name__ == "__main__":
    from colm_ds.integrations import llamafactory  # so that functions are pickled by a name that workers can import

    exit_with_message(llamafactory.main)
