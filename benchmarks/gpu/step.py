"""Whole steps at the sizes of Phi-2 and Llama-3-8B: plain 64, 128, 256 against CoLM 64 of 128, and what switches cost.

    python -m benchmarks.gpu.step               # rows in the order of their worth, as many as fit into --seconds
    python -m benchmarks.gpu.step --profile     # a picture of one step of Phi-2 with CoLM 64 of 128, spsa
    python -m benchmarks.gpu.step --dry         # tiny, on the CPU

Random weights in bf16, built on the device; LoRA and its dropout as in the recipes, activation checkpointing; token ids
are random, lengths, labelled shares and sources those of the math mixture, at most 512 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.arms import Arm, Bench, plain, table_of
from benchmarks.gpu.beside import ChoosingBefore, ChoosingBeside
from benchmarks.gpu.picture import picture, profiled
from benchmarks.gpu.rows import PACK, ROOT, Part, estimators, parser_of, replaced
from benchmarks.step import REAL_DATA, make_records
from colm_ds.batching import micro_batch
from colm_ds.batching.loader import RecordDataset
from colm_ds.models import token_loss
from colm_ds.planner.job import known_model
from colm_ds.recipes.model import add_lora
from colm_ds.recipes.recipe import load_recipe

DATA = (PACK / "data" / "train.jsonl.gz", REAL_DATA)
"""Sources of the lengths; the first existing one is used."""

MORE_LOGITS = 1 << 26
"""Logits of one chunk in the rows with larger chunks; by default 2^23."""

CUT = "losses by cut cross-entropy"

CHECKED, TOLERANCE = 256, {"losses": 0.02, "gradients": 0.2}
"""Positions by which losses that stand in for ours are checked, and the relative error of each sum that is allowed.
Gradients without their targets' rows of the head, which outweigh the rest: with states and head in bfloat16 the
rounding of the whole is a tenth of that."""

MEAN_TOKENS = 180
"""Approximate tokens of a math example, only to estimate times."""


@dataclass(frozen=True)
class Shape:
    """A model's size.

    Attributes:
        model: name of a known shape.
        recipe: whose LoRA section is used.
        parameters: about how many, for guesses of time alone.
        micro_batch: examples of a training micro-batch.
    """

    model: str
    recipe: str
    parameters: float
    micro_batch: int


SHAPES = {
    "Phi-2": Shape("microsoft/phi-2", "phi2_math", 2.8e9, 32),
    "Llama-3-8B": Shape("meta-llama/Meta-Llama-3-8B", "llama3_8b_math", 8.0e9, 32),
}

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 48,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="which (all)")
    parser.add_argument("--arms", nargs="*", default=[], help="only arms whose name contains one of these")
    parser.add_argument("--profile", action="store_true", help="only the picture")
    options = parser.parse_args(arguments)
    from colm_ds.distributed.agreement import single_process_environment

    single_process_environment()
    part = Part("step", options)
    large, coreset = (8, 4) if part.dry else (128, 64)
    can_cut = part.device.type == "cuda" and importlib.util.find_spec("cut_cross_entropy") is not None
    if not can_cut:
        part.note(f"no package cut_cross_entropy here, or no GPU: no row with {CUT}")
    if "tokens" not in estimators():
        part.note("no estimator `tokens` in this version: its rows are left out")
    main_arms, switches = arms_of(large, coreset), switches_of(large, coreset)
    smaller = next(iter(SHAPES))
    for name, arms in [*((name, main_arms) for name in SHAPES), (smaller, switches)]:
        shape = SHAPES[name]
        wanted = [arm for arm in arms if not options.arms or any(word in arm.name for word in options.arms)]
        if name not in options.shapes or not wanted:
            continue
        bench = Bench(part, name, partial(build, shape, part), dataset(part), 4 if part.dry else shape.micro_batch)
        if options.profile:
            profile(part, bench, next(arm for arm in arms if "spsa" in arm.name), options.out)
            break
        for arm in wanted:
            if can_cut or CUT not in arm.name:
                size = arm.coreset if arm.colm.get("selector") == "full" else 1.4 * coreset
                bench.run(arm, 6 * shape.parameters * MEAN_TOKENS * size)
        bench.close()
    print(table_of(part.rows))
    return part.close()


def colm(large: int, coreset: int, estimator: str, name: str = "replay", **more: Any) -> Arm:
    """Return an arm with a coreset by an estimator, with replay by default."""
    section = {"probe": {"estimator": estimator}, "replay": "on", **more.pop("colm", {})}
    return Arm(f"CoLM {coreset} of {large}, {estimator}, {name}", large, coreset, section, **more)


def arms_of(large: int, coreset: int) -> list[Arm]:
    """Return the arms of every shape in the order of their worth."""
    sizes = large, coreset
    joint = {"per_source": False, "small_sources": "none", "weights": "matched"}
    arms = [
        plain(large),
        colm(*sizes, "spsa"),
        colm(*sizes, "exact"),
        colm(*sizes, "sketch"),
        plain(coreset),
        plain(2 * large),
        colm(*sizes, "exact", "replay, matched, joint", colm=joint),
    ]
    if "tokens" in estimators():
        section = {"probe": {"estimator": "tokens"}}
        arms.insert(2, Arm(f"tokens {coreset} of {large}", large, coreset, section))
        arms.insert(4, Arm(f"tokens {coreset} of {2 * large}", 2 * large, coreset, section))
    return arms


def switches_of(large: int, coreset: int) -> list[Arm]:
    """Return the arms that say what a switch costs; they are measured on the smaller shape."""
    sizes = large, coreset
    return [
        plain(large, f"plain {large}, chunks of 2^26 logits", around=larger_chunks),
        colm(*sizes, "spsa", "replay, no dropout", around=without_dropout),
        plain(large, f"plain {large}, no dropout", around=without_dropout),
        colm(*sizes, "spsa", "replay, copies neither pinned nor overlapped", around=waiting_copies),
        plain(large, f"plain {large}, copies neither pinned nor overlapped", around=waiting_copies),
        colm(*sizes, "spsa", "no replay", colm={"replay": "off"}),
        colm(*sizes, "spsa", "no replay, step t + 1 chosen before t", colm={"replay": "off"}, engine=ChoosingBefore),
        colm(*sizes, "spsa", "no replay, step t + 1 chosen beside t", colm={"replay": "off"}, engine=ChoosingBeside),
        colm(*sizes, "spsa", "replay from host memory", colm={"replay": "offload"}),
        plain(large, f"plain {large}, {CUT}", around=cut_cross_entropy),
        plain(large, f"plain {large}, once more"),
    ]


def build(shape: Shape, part: Part) -> nn.Module:
    """Make the model on the device, random weights, LoRA and checkpointing as in its recipe."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    values = known_model(shape.model)
    assert values is not None
    values |= TINY if part.dry else {}
    recipe = load_recipe(ROOT / "finetune" / "recipes" / f"{shape.recipe}.yaml", needs_files=False)
    assert recipe.lora is not None
    lora = recipe.lora.model_copy(update={"rank": 4}) if part.dry else recipe.lora
    set_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    dtype = torch.float32 if part.dry else torch.bfloat16
    with torch.device(part.device):
        model = add_lora(AutoModelForCausalLM.from_config(config, dtype=dtype), lora)
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def dataset(part: Part) -> RecordDataset:
    """Return random tokens with the lengths of the mixture."""
    data = next((path for path in DATA if path.exists()), Path("none"))
    size = {"vocabulary": 256, "max_length": 48} if part.dry else {"vocabulary": 32_000, "max_length": 512}
    records, _ = make_records(argparse.Namespace(pretraining=False, data=data, **size))
    return RecordDataset(records[:200] if part.dry else records)


def profile(part: Part, bench: Bench, arm: Arm, out: Path) -> None:
    """Take a picture of one step of an arm."""
    key = f"{bench.key(arm)}: profile"

    def work() -> dict[str, Any]:
        engine = bench.engine_of(arm)
        for _ in range(2):
            engine.train_batch()
        taken = profiled(engine.train_batch, part.device)
        file = out / f"{'dry_' if part.dry else ''}profile.png"
        try:
            picture(taken, f"{bench.key(arm)} ({part.device_name})", file)
        except Exception as error:  # the numbers are there without it
            part.note(f"no picture: {error!r}")
        return {"picture": file.name, **taken.summary()}

    part.measure(key, work, 0.0 if part.dry else 45.0)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Run the block with a model without dropout."""
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in dropouts]
    try:
        for module in dropouts:
            module.p = 0.0
        yield
    finally:
        for module, p in zip(dropouts, before, strict=True):
            module.p = p


def larger_chunks(model: nn.Module) -> Any:
    """Run the block with larger chunks of logits."""
    return replaced(token_loss, "_CHUNK_LOGITS", MORE_LOGITS)


def waiting_copies(model: nn.Module) -> Any:
    """Run the block with micro-batches copied from pageable memory, each copy synchronised."""

    def moved(batch: Any, device: torch.device) -> Any:
        """Do the same as `micro_batch._move`, without pinned memory."""
        tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        return replace(batch, **{name: value.to(device) for name, value in tensors.items()})

    return replaced(micro_batch, "_move", moved)


def cut_cross_entropy(model: nn.Module) -> Any:
    """Run the block with losses that never form logits, by the package of that name.

    Raises:
        RuntimeError: if they or their gradients are not those of the chunked loss.
    """
    from cut_cross_entropy import linear_cross_entropy

    from colm_ds.models import example_loss

    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return nullcontext()
    bias = getattr(head, "bias", None)

    def losses(
        _: Callable[..., Any], hidden: torch.Tensor, targets: torch.Tensor, *others: Any, **more: Any
    ) -> torch.Tensor:
        """Do the same as `token_losses`; Phi's head has a bias, which an extra coordinate of 1 multiplies."""
        weight = head.weight
        if bias is not None:
            pad = hidden.new_zeros(len(hidden), 16)
            pad[:, 0] = 1.0
            columns = weight.new_zeros(len(weight), 16)
            columns[:, 0] = bias
            hidden, weight = torch.cat([hidden, pad], 1), torch.cat([weight, columns], 1)
        return linear_cross_entropy(hidden, weight, targets, reduction="none").float()

    check_losses(losses, head)
    return replaced(example_loss, "token_losses", losses)


def check_losses(losses: Callable[..., torch.Tensor], head: nn.Module) -> None:
    """Raise if losses that stand in for `token_losses`, or their gradients, are not the same on random states.

    Raises:
        RuntimeError: with how far off they are.
    """
    weight: Any = head.weight
    vocabulary, width = weight.shape
    generator = torch.Generator(weight.device).manual_seed(0)
    options: Any = {"generator": generator, "device": weight.device}
    states = torch.randn(CHECKED, width, **options).to(weight.dtype)
    targets = torch.randint(vocabulary, (CHECKED,), **options)
    scales = torch.rand(CHECKED, **options)

    def parts(of: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = states.clone().requires_grad_()
        values = of(head.forward, hidden, targets, vocabulary, frozen=True)
        (gradient,) = torch.autograd.grad((values * scales).sum(), hidden)
        of_targets = scales[:, None] * weight[targets].detach().float()
        return {"losses": values.detach().double(), "gradients": (gradient.float() + of_targets).double()}

    ours, theirs = parts(token_loss.token_losses), parts(losses)
    off = {name: float((theirs[name] - ours[name]).norm() / ours[name].norm()) for name in ours}
    if any(not off[name] <= TOLERANCE[name] for name in off):
        raise RuntimeError(
            f"losses are off by {off['losses']:.1e}, gradients by {off['gradients']:.1e} of the softmax's"
        )


if __name__ == "__main__":
    sys.exit(main())
