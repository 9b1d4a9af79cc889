"""Pretraining Llama-60M at length 1,024: plain 128 against CoLM 128 of 256, everything trained, nothing recomputed.

    python -m benchmarks.gpu.pretrain          # about 60 s
    python -m benchmarks.gpu.pretrain --dry    # tiny, on the CPU

Random tokens in five sources with the shares of the paper's Pile mixture; the model of the recipes, in bf16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.gpu.arms import Arm, Bench, plain, table_of
from benchmarks.gpu.rows import ROOT, Part, parser_of
from benchmarks.gpu.step import TINY, larger_chunks
from benchmarks.step import FEWER_TOKENS, make_records
from colm_ds.batching.loader import RecordDataset

RECIPE = ROOT / "pretrain" / "recipes" / "llama60m_pile5_colm128.yaml"
VOCABULARY, TOKENS, MICRO_BATCH = 32_000, 1024, 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = parser_of(__doc__).parse_args(arguments)
    from colm_ds.distributed.agreement import single_process_environment

    single_process_environment()
    part = Part("pretrain", options)
    large, coreset = (8, 4) if part.dry else (256, 128)
    bench = Bench(part, "Llama-60M", partial(build, part), dataset(part), 4 if part.dry else MICRO_BATCH)
    for arm in arms_of(large, coreset):
        bench.run(arm, 6 * 58e6 * TOKENS * max(arm.coreset, large if "CoLM" in arm.name else 0))
    print(table_of(part.rows))
    return part.close()


def arms_of(large: int, coreset: int) -> list[Arm]:
    """Return the arms in the order of their worth."""
    of = f"{coreset} of {large}"

    def colm(estimator: str, name: str, **more: Any) -> Arm:
        return Arm(f"CoLM {of}, {name}", large, coreset, {"probe": {"estimator": estimator, **more}, "replay": "off"})

    return [
        plain(large),
        plain(coreset),
        colm("spsa", "spsa"),
        colm("exact", "exact"),
        colm("spsa", "spsa, a quarter of the tokens", token_sample=FEWER_TOKENS),
        colm("exact", "exact, a quarter of the tokens", token_sample=FEWER_TOKENS),
        plain(coreset, f"plain {coreset}, chunks of 2^26 logits", around=larger_chunks),
    ]


def build(part: Part) -> nn.Module:
    """Make the recipe's model on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    values = {**yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["model"]["config"], "vocab_size": VOCABULARY}
    values |= TINY if part.dry else {}
    set_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(part.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if part.dry else torch.bfloat16)


def dataset(part: Part) -> RecordDataset:
    """Return chunks of one length."""
    size = {"vocabulary": 256, "max_length": 48} if part.dry else {"vocabulary": VOCABULARY, "max_length": TOKENS}
    records, _ = make_records(argparse.Namespace(pretraining=True, **size))
    return RecordDataset(records[:200] if part.dry else records)


if __name__ == "__main__":
    sys.exit(main())
