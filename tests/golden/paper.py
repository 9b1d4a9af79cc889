"""Runs of the paper's recipe whose results are kept in files: tiny models of every family, and Llama-60M's shape.

`python -m tests.golden.make` writes the files anew. They were made before the code was rearranged; what reproduces the
paper must go on giving the same. A case is taken only if round-off decides nothing in it: with weights changed by their
last bit it has to choose the same examples, so that the files hold on any processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from colm_ds.randomness import private_generator
from tests.engine.training import Case, start, step
from tests.engine.training import parameters as trained_parameters

FOLDER = Path(__file__).resolve().parent

STEPS = 20
LARGE = 32
"""r; b is half of it."""

MOST_ENTRIES = 512
"""A parameter of more entries is kept as this many of them, evenly spaced."""

ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}

LLAMA_60M = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""Appendix F of the paper, with the vocabulary of the tests: 97 tokens instead of 32,000."""


def _case(name: str, large: int = LARGE, **settings: Any) -> Case:
    colm = {"preset": "paper", "large_batch_size": large, "coreset_size": large // 2, "seed": 0}
    optimizer = {"optimizer": {"type": "AdamW", "params": ADAM}, "train_micro_batch_size_per_gpu": 4}
    return Case(name, colm=colm, deepspeed=optimizer, steps=STEPS, **settings)


CASES = {
    **{family: _case(family, family=family, lora=True) for family in ("phi", "phi3", "stablelm", "mistral", "llama")},
    "llama60m": _case("llama60m", LARGE // 2, family="llama", model=LLAMA_60M),
}


@dataclass(frozen=True)
class Golden:
    """What a run gave.

    Attributes:
        indices: dataset indices of every step's large batch, `[steps, r]`.
        positions: chosen positions in it, in the order of the coreset, `[steps, b]`.
        weights: loss weight of each, `[steps, b]`.
        losses: of every step, in nats.
        parameters: trained parameters at the end, or entries of them (`sampled`), by name.
    """

    indices: list[list[int]]
    positions: list[list[int]]
    weights: list[list[float]]
    losses: list[float]
    parameters: dict[str, Tensor]

    def save(self, name: str) -> None:
        """Write the two files of a case."""
        rows = {"indices": self.indices, "positions": self.positions, "weights": self.weights, "losses": self.losses}
        lines = [f'  "{key}": [\n    ' + ",\n    ".join(map(json.dumps, row)) + "\n  ]" for key, row in rows.items()]
        (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        save_file(self.parameters, FOLDER / f"{name}.safetensors")


def load(name: str) -> Golden:
    """The files of a case."""
    kept = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Golden(**kept, parameters=load_file(FOLDER / f"{name}.safetensors"))


def sampled(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, the large ones as `MOST_ENTRIES` of their entries."""
    kept = {}
    for name, parameter in parameters.items():
        flat = parameter.flatten()
        spaced = torch.linspace(0, len(flat) - 1, MOST_ENTRIES).long()
        kept[name] = (flat[spaced] if len(flat) > MOST_ENTRIES else flat).contiguous()
    return kept


def run(case: Case, last_bit: int | None = None) -> Golden:
    """Train a case, in a rank.

    Args:
        case: what to train.
        last_bit: seed of changes to the weights by about their last bit; None leaves them.
    """
    model = case.build_model()
    if not case.lora:
        with torch.no_grad():  # from a standard deviation of 0.2 to 0.02, as pretraining starts
            for parameter in (one for one in model.parameters() if one.dim() > 1):
                parameter *= 0.1
    if last_bit is not None:
        generator = private_generator(last_bit, "last bit")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.0 + 2.0**-23 * torch.randn(parameter.shape, generator=generator)
    engine = start(case, model=model)
    try:
        seen = [step(engine) for _ in range(case.steps)]
        parameters = sampled(trained_parameters(engine))
    finally:
        engine.destroy()
    place = [{index: position for position, index in enumerate(one.large)} for one in seen]
    return Golden(
        [one.large for one in seen],
        [[place[number][index] for index in one.chosen] for number, one in enumerate(seen)],
        [one.weights for one in seen],
        [one.stats["loss"] for one in seen],
        parameters,
    )
