"""Which causal LMs the probe reads: `python -m tests.models.table` measures every type and writes docs/MODELS.md.

With `--packing` only the part about packed rows is measured and written anew.

For every type a tiny model is built from its configuration, and `exact`, `spsa` and forward replay are compared with
plain autograd in float64, of one unpadded example at a time.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from colm_ds.batching.micro_batch import make_micro_batch
from colm_ds.errors import ConfigError, ProbeError
from colm_ds.models.architecture import Architecture, find_architecture
from colm_ds.models.example_loss import example_loss_sums, find_loss_head
from colm_ds.models.packing import check_packing
from colm_ds.models.patch import eval_mode
from colm_ds.models.values import is_conv1d
from colm_ds.probe.directions import Directions
from colm_ds.probe.factors import gradient_factors
from colm_ds.probe.replay import ReplayStore, why_not_replay
from colm_ds.probe.self_check import check_architecture
from colm_ds.probe.spsa import spsa_coefficients
from colm_ds.probe.tail import run_trunk
from colm_ds.types import Example
from tests.every_model import causal_types, num_parameters, tiny_causal_lm
from tests.probe.oracles import make_examples, relative_error

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "MODELS.md"

ADAPTERS = "## Adapters and quantized weights"
"""The part of the page that is written by hand."""

EXACT, SPSA, REPLAY = 1e-5, 1e-3, 1e-5
"""Largest relative errors: of a gradient, of a coefficient at eps 1e-5, and of a replayed gradient."""

EPSILON = 1e-5
"""Small, so that no expert is chosen at one end only."""

MOST_PARAMETERS = 20_000_000
"""Types whose parts outside the text model cannot be made small by name are left out."""

SECONDS = 120

PACKING = "## Packed rows"
"""Heading of the last part of the page."""


@dataclass(frozen=True)
class Row:
    """What is measured of a type.

    Attributes:
        model_type: the type.
        layout: of the values; empty if none were found.
        exact: relative error of the largest example, or None if not measured.
        spsa: likewise.
        replay: likewise.
        attention: implementation that transformers chooses.
        note: why something was not measured.
    """

    model_type: str
    layout: str = ""
    exact: float | None = None
    spsa: float | None = None
    replay: float | None = None
    attention: str = ""
    note: str = ""

    @property
    def is_probed(self) -> bool:
        """Whether the probe can be used."""
        return self.exact is not None and self.exact <= EXACT and self.spsa is not None and self.spsa <= SPSA


def autograd_gradients(model: Any, architecture: Architecture, examples: list[Example]) -> Tensor:
    """Gradients of every example's mean loss for the probed rows, `[n, out, in]`, by the model itself alone."""
    (target,) = architecture.targets
    weight: Any = target.module.weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    gradients = []
    for example in examples:
        logits = model(input_ids=example.input_ids[None], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits.double(), example.labels[1:], ignore_index=-100)
        (gradient,) = torch.autograd.grad(loss, [weight])
        gradients.append(target.rows_of(gradient if is_conv1d(target.module) else gradient.T))
    model.requires_grad_(True)
    return torch.stack(gradients).transpose(1, 2)


def exact_error(model: Any, examples: list[Example]) -> float:
    """Relative error of `exact`."""
    architecture, tail = _trunk(model, examples)
    ((delta, inputs),) = gradient_factors(architecture, tail)
    probed = torch.einsum("blo,bli->boi", delta.double(), inputs.double())
    return relative_error(probed, autograd_gradients(model, architecture, examples))


def spsa_error(model: Any, examples: list[Example]) -> float:
    """Relative error of two coefficients of `spsa` per example, against the gradient along the directions."""
    architecture, tail = _trunk(model, examples)
    directions = Directions(0, 1, 2, architecture.num_coordinates)
    coefficients = spsa_coefficients(architecture, tail, directions, EPSILON, torch.float64)
    gradients = autograd_gradients(model, architecture, examples).flatten(1)
    return relative_error(coefficients, gradients @ directions.chunk(0, architecture.num_coordinates).T.double())


def replay_error(model: Any, examples: list[Example]) -> float:
    """Relative error of all gradients of a replayed step against ordinary checkpointing."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    architecture = find_architecture(model)
    reason = why_not_replay(architecture)
    if reason is not None:
        raise ProbeError(reason)
    store = ReplayStore(architecture)
    store.begin(step=1)
    positions = list(range(len(examples)))
    with eval_mode(model), torch.no_grad(), store.recording(positions, [len(one.input_ids) for one in examples]):
        run_trunk(model, architecture, make_micro_batch(examples))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, replayed = (_training_gradients(model, examples, each) for each in (None, store))
    model.eval()
    return float((replayed - plain).norm() / plain.norm())


def _training_gradients(model: Any, examples: list[Example], store: ReplayStore | None) -> Tensor:
    model.zero_grad()
    batch = make_micro_batch(examples)
    with ExitStack() as stack:
        if store is not None:
            stack.enter_context(store.replaying(list(range(len(examples)))))
        (example_loss_sums(model, find_loss_head(model), batch) / batch.counts).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _trunk(model: Any, examples: list[Example]) -> tuple[Architecture, Any]:
    architecture = find_architecture(model)
    with eval_mode(model):
        return architecture, run_trunk(model, architecture, make_micro_batch(examples))


def measure(model_type: str) -> Row:
    """Measure one type."""
    examples = make_examples((7, 9, 5))
    try:
        count = num_parameters(model_type)
        if count > MOST_PARAMETERS:
            return Row(model_type, note="not measured: its parts beside the text model have sizes of their own")
        model = tiny_causal_lm(model_type, torch.float64)
        with torch.no_grad():
            model(input_ids=examples[0].input_ids[None], use_cache=False)
    except Exception as error:  # of transformers: another configuration is needed
        return Row(model_type, note=f"not measured: no tiny model ({type(error).__name__})")
    attention = str(getattr(model.config, "_attn_implementation", ""))
    try:
        architecture = find_architecture(model)
        check_architecture(model, architecture, torch.float64)
        single = tiny_causal_lm(model_type)
        check_architecture(single, find_architecture(single), torch.float64)
        row = Row(model_type, architecture.layout, exact_error(model, examples), spsa_error(model, examples))
    except ProbeError as error:
        return Row(model_type, attention=attention, note=f"refused: {_reason(error)}")
    try:
        replay, note = replay_error(model, examples), ""
    except Exception as error:
        replay, note = None, f"no replay: {_reason(error)}"
    if replay is not None and not replay <= REPLAY:
        note = f"replay differs by {replay:.0e}"
    return Row(model_type, row.layout, row.exact, row.spsa, replay, attention, note)


def why_not_packed(model_type: str) -> str | None:
    """Why the check at start refuses packed rows of a type in float32; None if it does not."""
    try:
        check_packing(tiny_causal_lm(model_type), "on", 24, 2)
    except ConfigError as error:
        difference = re.search(r"a relative difference of (\S+)", str(error))
        return difference[1] if difference else str(error).split("attention: ")[-1].split(". Packed documents")[0]
    return None


def packing_section(reasons: dict[str, str | None]) -> str:
    """The part about packed rows, from the reason of every type."""
    packed = [name for name, reason in reasons.items() if reason is None]
    refused = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
    lines = [
        f"{PACKING} ({len(packed)} of {len(reasons)})",
        "",
        "`colm.packing` needs a model that keeps the documents of a row apart by their `position_ids`. With the",
        "attention of the tables above these do:",
        "",
        ", ".join(packed) + ".",
        "",
        "These do not, and are refused at the start of a run (in brackets by how much a document's loss behind others",
        "in a row differs from that alone, relatively). Their layers carry a state on, look in both directions, take",
        "positions from a mask or the place in a row, or their code makes masks without positions (gpt_oss):",
        "",
        ", ".join(refused) + ".",
        "",
        "Tiny models in float32, rows of 24 tokens, by `python -m tests.models.table --packing`;",
        "`tests/models/test_packing.py` holds the verdicts against gradients in float64.",
        "",
    ]
    return "\n".join(lines)


def _reason(error: Exception) -> str:
    text = str(error).replace("\n", " ")
    for mark in ("self-check: ", "its last layer"):
        text = text[text.index(mark) :] if mark in text else text
    for mark in (". Choose", ". The probe", ". Give", ". Train"):
        text = text.split(mark)[0]
    return text[:160]


def page(rows: list[Row]) -> str:
    """docs/MODELS.md."""
    import transformers

    probed = [row for row in rows if row.is_probed]
    refused = [row for row in rows if not row.is_probed and row.note.startswith("refused")]
    others = [row for row in rows if row not in probed and row not in refused]
    lines = [
        "# Models",
        "",
        "The probe finds the parts of a causal LM by structure: the decoder's layers, the V projection of the last one",
        "(separate, fused in any of the layouts below, or latent) and the head; what the model does after its last",
        "layer (norms, scales, soft-caps) is its own code. At the start of a run a self-check on two short examples",
        "compares the probe's losses and V gradient with the model's own, and refuses a model where they differ: by",
        "more than 1e-5 in float32 or 2e-2 in 16 bits. `tokens`, `random`, `keep_random` and `full` need no probe and",
        "work with every model.",
        "",
        f"Measured with transformers {transformers.__version__} by `python -m tests.models.table`: a tiny model of a",
        "type, relative error against autograd in float64, one example at a time. `exact`: per-example gradients of",
        "the last V; `spsa`: coefficients at eps 1e-5 against <g, z>; replay: gradients of all weights against those",
        "of ordinary checkpointing. `tests/models/test_every_architecture.py` repeats it. All dropout is 0; a forward",
        "that draws masks itself, as OPT's does, is not replayed, and a run says so.",
        "",
        f"## Probed ({len(probed)})",
        "",
        "| type | values of the last layer | `exact` | `spsa` | replay | attention | note |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.model_type} | {row.layout} | {_shown(row.exact)} | {_shown(row.spsa)} | {_shown(row.replay)} "
            f"| {row.attention} | {row.note} |".replace("queries | keys | values", "queries, keys, values").replace(
                "keys | values", "keys, values"
            )
            for row in probed
        ),
        "",
        f"## Refused ({len(refused)})",
        "",
        "| type | why |",
        "|---|---|",
        *(f"| {row.model_type} | {row.note.removeprefix('refused: ')} |" for row in refused),
        "",
        f"## Not measured ({len(others)})",
        "",
        "Nothing is said of these: no tiny text model of the type can be built from its configuration alone. The",
        "self-check decides at start.",
        "",
        ", ".join(f"{row.model_type}" for row in others) + ".",
        "",
        ADAPTERS + PAGE.read_text(encoding="utf-8").partition(ADAPTERS)[2],
    ]
    return "\n".join(lines)


def _shown(error: float | None) -> str:
    return "no" if error is None else f"{error:.0e}"


def main() -> None:
    """Measure the named types, or all of them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="types to measure and print; default: all, written to docs/MODELS.md")
    parser.add_argument("--packing", action="store_true", help="only packed rows, of all types in the tables")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    if options.packing:
        text = PAGE.read_text(encoding="utf-8").split(f"\n{PACKING}")[0]
        types = re.findall(r"^\| ([a-z][\w.-]*) \|", text, re.MULTILINE)
        reasons = {name: why_not_packed(name) for name in dict.fromkeys(types) if name != "type"}
        PAGE.write_text(f"{text}\n{packing_section(reasons)}", encoding="utf-8")
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"takes more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    rows = []
    for model_type in options.types or causal_types():
        signal.alarm(SECONDS)
        try:
            rows.append(measure(model_type))
        except Exception as error:
            rows.append(Row(model_type, note=f"failed: {type(error).__name__}: {_reason(error)}"))
        signal.alarm(0)
        print(rows[-1], file=sys.stderr, flush=True)
    if not options.types:
        built = [row for row in rows if row.is_probed or row.note.startswith("refused")]
        packed = packing_section({row.model_type: why_not_packed(row.model_type) for row in built})
        PAGE.write_text(f"{page(rows)}\n{packed}", encoding="utf-8")


if __name__ == "__main__":
    main()
