"""Write the model card of exported weights: model, data, settings, results, and how to load them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from colm_ds.recipes.sections import ModelConfig
from colm_ds.report.arms import BY_SIGNALS
from colm_ds.report.facts import Facts, group, run_facts
from colm_ds.report.tables import clean
from colm_ds.run_folder.contents import ADAPTER, MODEL
from colm_ds.run_folder.read import Run, load_run, lookup, names, number, numbers
from colm_ds.untrusted.printable import visible

MERGED = "merged"

_METHODS = {
    "colm": "mini-batch coresets (CoLM, arXiv 2407.19580)",
    "importance": "coresets drawn by importance, exchanged until they fit the large batch (in CoLM, arXiv 2407.19580)",
    "balanced": "coresets drawn to balance the large batch (in CoLM, arXiv 2407.19580)",
    "random": "a random part of every large batch",
    "keep_random": "the small sources of every large batch and a random part of the others",
    "full": "whole batches",
}
_SUBJECTS = {
    ADAPTER: "A LoRA adapter (PEFT) for {base}, trained",
    MODEL: "A language model that started from {base}, all parameters trained",
    MERGED: "A language model: {base} with a LoRA adapter merged into its weights, trained",
}


def write_model_card(
    folder: Path,
    run_folder: str | Path,
    *,
    kind: str,
    step: int | None = None,
    base: ModelConfig | None = None,
    dtype: str | None = None,
    tokenizer_class: str = "AutoTokenizer",
) -> Path:
    """Write `README.md` beside weights, from the files of their run.

    Args:
        folder: folder of the weights.
        run_folder: folder of the run.
        kind: "adapter", "model" or "merged".
        step: optimizer steps behind the weights, if they are not those of the run's end.
        base: the base model; default: the recipe's.
        dtype: dtype of the weights; default: the recipe's.
        tokenizer_class: class of transformers that loads the tokenizer.

    Raises:
        DataError: if the folder is not a run's.
    """
    run = load_run(run_folder)
    summary = run.summary if step is None or number(run.summary.get("steps")) == step else None
    text = model_card(
        run.config,
        summary,
        steps=run.steps,
        heldout=run.heldout,
        kind=kind,
        step=step,
        base=base,
        dtype=dtype,
        tokenizer_class=tokenizer_class,
    )
    path = folder / "README.md"
    path.write_text(visible(text), encoding="utf-8")
    return path


def model_card(
    config: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    *,
    steps: Sequence[dict[str, Any]] = (),
    heldout: Mapping[int, dict[str, Any]] | None = None,
    kind: str = ADAPTER,
    step: int | None = None,
    base: ModelConfig | None = None,
    dtype: str | None = None,
    tokenizer_class: str = "AutoTokenizer",
) -> str:
    """Return a model card in Markdown with YAML front matter; facts missing from the run's files are left out.

    Args:
        config: the run's config.json.
        summary: its summary.json, if the weights are those of the run's end.
        steps: objects of metrics.jsonl; those after `step` are ignored.
        heldout: held-out losses by step; those after `step` are ignored.
        kind: "adapter", "model" or "merged".
        step: optimizer steps behind the weights; default: the last known step.
        base: the base model; default: the recipe's.
        dtype: dtype of the weights; default: the recipe's.
    tokenizer_class: class of transformers that loads the tokenizer.
    """
    if step is not None:
        steps = [entry for entry in steps if entry["step"] <= step]
    losses = {at: loss for at, loss in (heldout or {}).items() if step is None or at <= step}
    run = Run(Path(), str(config.get("name", "run")), dict(config), list(steps), losses, dict(summary or {}))
    facts = run_facts(run, names(config.get("small_sources")))
    model = lookup(config, "recipe", "model")
    values = {"name_or_path": base.name_or_path, "gguf_file": base.gguf_file} if base else model
    path, gguf = lookup(values, "name_or_path"), lookup(values, "gguf_file")
    dtype = dtype or lookup(model, "dtype") or "float32"
    parts = [
        _front_matter(path, kind),
        f"# {clean(run.name)}",
        _opening(run, facts, kind, step, path, gguf),
        "## Load",
        _loading(kind, path, gguf, dtype, tokenizer_class, lookup(model, "quantization")),
        *_section("Data", [_data_text(config), _sources(run, facts)]),
        *_section("Recipe", [_bullets(_recipe_lines(run, facts, dtype))]),
        *_section("Numbers", [_numbers(run, facts)]),
        *_section("Made with", [_bullets(_origin(config))]),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str | None, kind: str) -> str:
    values: dict[str, Any] = {}
    if (
        base and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not os.path.exists(base)
    ):  # a hub name: others are refused
        values["base_model"] = base
    values["library_name"] = "peft" if kind == ADAPTER else "transformers"
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["colm", "deepspeed", *(["lora"] if kind != MODEL else [])]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _base_text(path: str | None, gguf: str | None) -> str:
    if path is None:
        return "a model of random weights"
    name = path if not os.path.isabs(path) else Path(path).name
    return f"`{gguf}` of `{name}`" if gguf else f"`{name}`"


def _opening(run: Run, facts: Facts, kind: str, step: int | None, path: str | None, gguf: str | None) -> str:
    method = _METHODS.get(str(lookup(run.config, "colm", "selector")))
    text = f"{_SUBJECTS[kind].format(base=_base_text(path, gguf))} by colm_ds" + (f" on {method}" if method else "")
    done, planned = step if step is not None else facts.num_steps, number(lookup(run.config, "recipe", "steps"))
    if done is not None:
        text += f", {done} optimizer steps"
        text += f" of {planned:.0f} planned" if planned is not None and planned != done else ""
    return text + "."


def _loading(
    kind: str, path: str | None, gguf: str | None, dtype: str, tokenizer_class: str, quantization: str | None = None
) -> str:
    start = "Run in this folder, or put its path or hub name where the dots are.\n\n"
    if kind != ADAPTER:
        lines = [
            f"from transformers import AutoModelForCausalLM, {tokenizer_class}",
            "",
            f'model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}")',
        ]
    elif path is None:
        return (
            "The base of this adapter has random weights that the recipe made from its seed. "
            "`colm-ds export RUN --merge` writes both together."
        )
    else:
        file = f', gguf_file="{gguf}"' if gguf else ""
        lines = [
            "from peft import PeftModel",
            f"from transformers import AutoModelForCausalLM, {tokenizer_class}",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{Path(path).as_posix()}"{file}, dtype="{dtype}")',
            'model = PeftModel.from_pretrained(base, ".")',
        ]
    lines.append(f'tokenizer = {tokenizer_class}.from_pretrained(".")')
    bits = {"4bit": 4, "8bit": 8}.get(str(quantization))
    if kind == ADAPTER and bits is not None:
        start += (
            f"The adapter was trained on a base of {bits}-bit weights: give `from_pretrained` the recipe's "
            "`quantization_config` too for the same outputs.\n\n"
        )
    return start + "\n".join(["```python", *lines, "```"])


def _section(title: str, parts: Iterable[str]) -> list[str]:
    kept = [part for part in parts if part]
    return [f"## {title}", *kept] if kept else []


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _data_text(config: Mapping[str, Any]) -> str:
    counts = numbers(config.get("sources"))
    if not counts:
        return ""
    text = f"{sum(counts.values()):,.0f} training examples from {len(counts)} source{'s' * (len(counts) != 1)}"
    heldout = number(config.get("num_heldout"))
    text += f"; {heldout:,.0f} examples held out" if heldout else ""
    dropped = sum(numbers(config.get("num_dropped")).values())
    text += f"; {dropped:,.0f} dropped while reading" if dropped else ""
    length = number(lookup(config, "recipe", "data", "max_length"))
    return text + (f". Examples are cut at {length:.0f} tokens." if length else ".")


def _sources(run: Run, facts: Facts) -> str:
    counts = numbers(run.config.get("sources"))
    if not counts:
        return ""
    small = set(names(run.config.get("small_sources")))
    columns: dict[str, dict[str, str]] = {
        "examples": {name: f"{count:,.0f}" for name, count in counts.items()},
        "small": {name: "yes" for name in counts if name in small},
        "share trained on": {name: f"{share:.1%}" for name, share in group(facts.values, "coreset_share").items()},
        f"held-out loss{_evaluated_at(run)}": {
            name: f"{loss:.4f}" for name, loss in group(facts.values, "heldout.per_source").items()
        },
        "exact match": {name: f"{share:.1%}" for name, share in group(facts.values, "exact_match.per_source").items()},
    }
    columns = {label: cells for label, cells in columns.items() if cells}
    rows = [["source", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[_code(name), *(cells.get(name, "") for cells in columns.values())] for name in counts]
    return _table(rows)


def _table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _code(name: str) -> str:
    """Format a name verbatim, also inside a table."""
    return f"`{clean(name).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _recipe_lines(run: Run, facts: Facts, dtype: str) -> list[str]:
    colm, recipe = run.config.get("colm"), run.config.get("recipe")
    pairs = [
        ("Selector", lookup(colm, "selector")),
        ("Large batch r, examples inspected in a step", lookup(colm, "large_batch_size")),
        ("Coreset b, examples trained on in a step", lookup(colm, "coreset_size")),
    ]
    if lookup(colm, "selector") in BY_SIGNALS:
        pairs.append(("Estimator", lookup(colm, "probe", "estimator")))
    if lookup(colm, "selector") == "colm":
        pairs += [
            ("Number of probes", lookup(colm, "probe", "num_probes")),
            ("Mask", _settings(lookup(colm, "mask"))),
            ("Distance", lookup(colm, "metric")),
            ("Loss weights", lookup(colm, "weights")),
        ]
    pairs += [
        ("Steps of the recipe", lookup(recipe, "steps")),
        ("Optimizer", f"AdamW, {_settings(lookup(recipe, 'optimizer'))}" if lookup(recipe, "optimizer") else None),
        ("Learning rate", _settings(lookup(recipe, "lr_schedule"))),
        ("LoRA", _settings(lookup(recipe, "lora")) or ("none: all parameters" if recipe else None)),
        ("Precision of training", lookup(recipe, "model", "dtype")),
        ("Precision of these weights", dtype),
        ("Seed", run.seed),
        ("Ranks", lookup(run.config, "world_size")),
        ("ZeRO stage", lookup(run.config, "deepspeed", "zero_optimization", "stage")),
    ]
    for key, label in (("num_trainable", "Trained parameters"), ("num_parameters", "Parameters")):
        count = number(run.config.get(key))
        pairs.append((label, f"{count:,.0f}" if count is not None else None))
    return [f"{label}: {value}" for label, value in pairs if value is not None and value != ""]


def _settings(values: Any) -> str:
    if not isinstance(values, Mapping):
        return ""
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _evaluated_at(run: Run) -> str:
    """Name the step of the held-out losses, if it is not the end of the run."""
    evaluated = [at for at in run.heldout if at > 0]
    at_end = lookup(run.summary, "heldout") is not None or not evaluated
    return "" if at_end else f" after step {max(evaluated)}"


def _numbers(run: Run, facts: Facts) -> str:
    """Return overall results and costs, each only if the run measured it."""
    scalars = facts.values
    after, start = _evaluated_at(run), run.heldout.get(0, {})
    shown = [
        (f"Held-out loss{after}, all examples", scalars.get("heldout.overall"), "{:.4f}"),
        (f"Held-out loss{after}, mean over sources", scalars.get("heldout.macro"), "{:.4f}"),
        (f"Held-out loss{after}, mean over small sources", scalars.get("heldout.small"), "{:.4f}"),
        ("Held-out loss before training, all examples", number(lookup(start, "overall")), "{:.4f}"),
        ("Held-out loss before training, mean over sources", number(lookup(start, "macro")), "{:.4f}"),
        ("Accuracy, held-out questions", scalars.get("heldout.accuracy"), "{:.1%}"),
        ("Accuracy before training", scalars.get("heldout_before.accuracy"), "{:.1%}"),
        ("Exact match, all questions", scalars.get("exact_match.overall"), "{:.1%}"),
        ("Questions of the exact match", scalars.get("exact_match.num_questions"), "{:,.0f}"),
        ("Step time, median, s", scalars.get("step_s.median"), "{:.3g}"),
        ("Peak memory of a rank, GiB", scalars.get("peak_memory_gib.peak"), "{:.3g}"),
        ("Examples trained on", scalars.get("examples_trained"), "{:,.0f}"),
        ("Tokens trained on", scalars.get("tokens_trained"), "{:,.0f}"),
        ("Wall time of the run, s", scalars.get("wall_s"), "{:,.0f}"),
    ]
    rows = [[label, form.format(value)] for label, value, form in shown if value is not None]
    return _table([["what", "value"], ["---", "---:"], *rows]) if rows else ""


def _origin(config: Mapping[str, Any]) -> list[str]:
    versions, machine = config.get("versions"), config.get("machine")
    pairs = [
        ("Git revision of colm_ds", config.get("git_revision")),
        ("Versions", _settings(versions)),
        ("Machine of the training", _settings(machine)),
        ("Date of the training", config.get("date")),
        ("Command", _code(str(config["command"])) if config.get("command") else None),
    ]
    return [f"{label}: {value}" for label, value in pairs if value]
