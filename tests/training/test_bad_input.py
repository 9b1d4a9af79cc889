"""Bad input of every kind gets one error of ours that names file, line or key, what is wrong and what to write.

`python -m tests.training.test_bad_input` prints the table of docs/RELIABILITY.md.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from colm_ds.data.generated.mixture import write_mixture
from colm_ds.errors import CoLMError

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def recipe_of(folder: Path) -> dict[str, Any]:
    """A good recipe."""
    return {
        "output_dir": str(folder / "run"),
        "steps": 3,
        "model": {"config": TINY},
        "tokenizer": str(folder / "data" / "tokenizer"),
        "data": {"train": str(folder / "data" / "train.jsonl"), "max_length": 96, "cache_dir": None},
        "colm": {"large_batch_size": 16, "coreset_size": 8},
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
    }


def message_of(folder: Path, recipe: Any, *overrides: str) -> str:
    """Everything that a run reads and checks before it trains, in a run's order; the message, empty if all is well."""
    from colm_ds.batching.loader import source_counts
    from colm_ds.config.resolve import resolve_config
    from colm_ds.engine.coreset_selector import small_source_ids
    from colm_ds.models.architecture import find_architecture
    from colm_ds.recipes.model import load_model, load_tokenizer
    from colm_ds.recipes.recipe import load_recipe
    from colm_ds.run_folder.write import RunFolder
    from colm_ds.training.run import deepspeed_config
    from colm_ds.training.start_or_resume import may_restart, where_to_start
    from colm_ds.training.tasks.instructions import load_data

    path = folder / "recipe.yaml"
    if recipe is not None:
        path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
    try:
        loaded = load_recipe(path, overrides)
        config = resolve_config(deepspeed_config(loaded), 2, where=loaded.where)
        start = where_to_start(loaded)
        tokenizer = load_tokenizer(loaded.model, loaded.tokenizer_place)
        data, _ = load_data(loaded, tokenizer)
        small_source_ids(config.colm, source_counts(data))
        find_architecture(load_model(loaded.model, loaded.lora, tokenizer))
        restart = loaded.overwrite or (start is None and may_restart(loaded))
        RunFolder(loaded.output_dir, overwrite=restart, resumed_step=start.step if start else None).close()
    except CoLMError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def changed(**changes: Any) -> Callable[[Path], str]:
    """A recipe with other values; None leaves a key out."""

    def run(folder: Path) -> str:
        recipe = {key: value for key, value in (recipe_of(folder) | changes).items() if value is not None}
        return message_of(folder, recipe)

    return run


def override(*overrides: str) -> Callable[[Path], str]:
    """A good recipe with overrides."""
    return lambda folder: message_of(folder, recipe_of(folder), *overrides)


def deepspeed(**changes: Any) -> Callable[[Path], str]:
    """A DeepSpeed file with further keys."""

    def run(folder: Path) -> str:
        content = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | changes
        (folder / "ds.json").write_text(json.dumps(content))
        return message_of(folder, recipe_of(folder) | {"deepspeed": str(folder / "ds.json")})

    return run


def data(change: Callable[[list[str]], list[str]], name: str = "bad.jsonl") -> Callable[[Path], str]:
    """Training data with changed lines."""

    def run(folder: Path) -> str:
        lines = (folder / "data" / "train.jsonl").read_text().split("\n")
        content = "\n".join(change(lines)).encode("utf-8", errors="surrogateescape")
        if name.endswith(".gz"):
            content = gzip.compress(content)[:-20]
        (folder / name).write_bytes(content)
        return message_of(folder, recipe_of(folder), f"data.train={folder / name}")

    return run


def line(number: int, text: str) -> Callable[[list[str]], list[str]]:
    """Put a text in place of one line."""
    return lambda lines: [*lines[: number - 1], text, *lines[number:]]


def file(name: str, write: Callable[[Path], object]) -> Callable[[Path], str]:
    """Training data in a file of its own."""

    def run(folder: Path) -> str:
        write(folder / name)
        return message_of(folder, recipe_of(folder), f"data.train={folder / name}")

    return run


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "\n{{ m.content }}", "\n{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)


def chat(*roles: str, content: Any = "x", template: str = CHATML) -> Callable[[Path], str]:
    """Conversations, the second of which has these roles."""

    def run(folder: Path) -> str:
        good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rows = [good, [{"role": role, "content": content} for role in roles], *[good] * 20]
        path = folder / "bad.jsonl"
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        overrides = [f"data.train={path}"]
        if template:
            (folder / "chat.jinja").write_text(template)
            overrides.append(f"data.chat_template={folder / 'chat.jinja'}")
        return message_of(folder, recipe_of(folder), *overrides)

    return run


def model_folder(change: Callable[[Path], None]) -> Callable[[Path], str]:
    """A saved model whose folder was damaged."""

    def run(folder: Path) -> str:
        from transformers import AutoConfig, AutoModelForCausalLM

        target = folder / "model"
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=512))
        model.save_pretrained(target)
        shutil.copytree(folder / "data" / "tokenizer", target, dirs_exist_ok=True)
        change(target)
        return message_of(folder, recipe_of(folder) | {"model": {"name_or_path": str(target)}, "tokenizer": None})

    return run


def old_run(status: str, checkpoint: bool, *overrides: str, lr: float = 2e-5) -> Callable[[Path], str]:
    """A run that is there already."""

    def run(folder: Path) -> str:
        from colm_ds.recipes.recipe import load_recipe

        recipe = recipe_of(folder)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        before = load_recipe(folder / "recipe.yaml").model_dump()
        before["optimizer"]["lr"] = lr
        there = folder / "run"
        there.mkdir()
        (there / "config.json").write_text(json.dumps({"recipe": before}))
        (there / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
        (there / "summary.json").write_text(json.dumps({"status": status}))
        if checkpoint:
            target = there / "checkpoints" / "step_1"
            target.mkdir(parents=True)
            manifest = {"step": 1, "world_size": 1, "facts": {}, "files": {"colm.pt": [10, 0]}}
            (target / "manifest_00000.json").write_text(json.dumps(manifest))
            (target / "colm.pt").write_bytes(b"cut off")
        return message_of(folder, recipe, *overrides)

    return run


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


RECORD = '{"source": "a", "instruction": "x", "output": "y"}'

KINDS: dict[str, tuple[Callable[[Path], str], str]] = {
    "recipe: no such file": (lambda folder: message_of(folder, None), "recipe.yaml: no such recipe."),
    "recipe: not YAML": (lambda folder: message_of(folder, "steps: [1"), "recipe.yaml: not readable as YAML: line 1: "),
    "recipe: a list": (lambda folder: message_of(folder, "- 1"), "holds a list. Write keys and values."),
    "recipe: misspelled key": (changed(stepz=3), "stepz: unknown key. Did you mean 'steps'?"),
    "recipe: misspelled nested key": (override("colm.corset_size=4"), "Did you mean 'coreset_size'?"),
    "recipe: missing key": (changed(steps=None), "steps = 0: neither steps nor epochs. For example 200, or 3 epochs."),
    "recipe: wrong type": (override("steps=many"), "steps = 'many': must be a whole number"),
    "recipe: number out of range": (override("steps=0"), "steps = 0: neither steps nor epochs."),
    "recipe: override without =": (override("steps"), "override = 'steps': not of the form key=value."),
    "recipe: no model": (changed(model={}), "give either name_or_path or config"),
    "recipe: config without model_type": (changed(model={"config": {"hidden_size": 8}}), "has no model_type"),
    "recipe: no tokenizer": (changed(tokenizer=None), "a model built from its config brings none"),
    "recipe: package not installed": (
        changed(model={"name_or_path": "package:no_such"}),
        "that Python package is not installed. Name one that is, or a folder.",
    ),
    "recipe: nothing held out": (override("evaluation.every=2"), "nothing is held out. Set data.holdout_per_source."),
    "recipe: b more than r": (
        override("colm.coreset_size=32"),
        "recipe.yaml and " + str(ROOT / "ds_configs" / "zero2.json") + "\n  colm.coreset_size = 32: more than "
        "colm.large_batch_size = 16",
    ),
    "recipe: unknown selector": (override("colm.selector=best"), "colm.selector = 'best': unknown. Choose one of"),
    "recipe: exact with probes": (
        override("colm.probe.estimator=exact", "colm.probe.num_probes=4"),
        "the exact gradient has no probes. Remove it.",
    ),
    "recipe: unknown small source": (override("colm.small_sources=[nowhere]"), "['nowhere'] not in the dataset."),
    "DeepSpeed: no such file": (changed(deepspeed="zero9.json"), "zero9.json"),
    "DeepSpeed: not JSON": (
        lambda folder: (
            (folder / "ds.json").write_text("{"),
            message_of(folder, recipe_of(folder) | {"deepspeed": str(folder / "ds.json")}),
        )[1],
        "ds.json: not readable as JSON",
    ),
    "DeepSpeed: misspelled key": (deepspeed(gradient_cliping=1.0), "Did you mean 'gradient_clipping'?"),
    "DeepSpeed: optimizer of its own": (
        deepspeed(optimizer={"type": "AdamW"}),
        "'optimizer' is the recipe's to say. Remove it here.",
    ),
    "DeepSpeed: contradicting batch size": (
        deepspeed(train_batch_size=64),
        "train_batch_size = 64: must equal colm.coreset_size = 8",
    ),
    "DeepSpeed: amp": (deepspeed(amp={"enabled": True}), "amp: removed from DeepSpeed"),
    "DeepSpeed: overlap_comm at stage 1": (
        deepspeed(zero_optimization={"stage": 1, "overlap_comm": True}),
        "works with accumulation by colm_ds at stages 2 and 3 only",
    ),
    "data: no such file": (override("data.train=nowhere.jsonl"), "data.train = 'nowhere.jsonl': no such file"),
    "data: broken line": (data(line(5, '{"source": "a", ')), "bad.jsonl:5: not JSON"),
    "data: line that is no object": (data(line(3, "[1, 2]")), "bad.jsonl:3: "),
    "data: missing key": (data(line(4, '{"source": "a", "instruction": "x"}')), "bad.jsonl:4: no key 'output'"),
    "data: empty output": (data(line(7, RECORD.replace('"y"', '""'))), "bad.jsonl:7: "),
    "data: not UTF-8": (data(line(2, RECORD.replace("x", "\udcff"))), "bad.jsonl:2: not UTF-8"),
    "data: empty file": (data(lambda lines: []), "bad.jsonl: "),
    "data: truncated gzip": (data(lambda lines: lines, "bad.jsonl.gz"), "bad.jsonl.gz"),
    "data: rows of two schemas": (
        data(lambda lines: [line.replace('"output":', '"text": "x", "output":') for line in lines]),
        "can be read as alpaca (instruction, output) and text (text). Say which: `schema: alpaca` or `schema: text`.",
    ),
    "data: rows of no schema": (
        data(lambda lines: [line.replace('"output":', '"reply":') for line in lines]),
        "its rows have the keys 'source', 'instruction', 'reply', 'answer', which no schema has.",
    ),
    "data: some rows without a source": (
        data(line(2, '{"instruction": "x", "output": "y"}')),
        "bad.jsonl:2: no key 'source'. Add it, or name the right key in source_key",
    ),
    "data: CSV row with too many values": (
        file("bad.csv", lambda path: path.write_text("prompt,completion\n2+2=,4\nyes, no,4\n")),
        "bad.csv:3: 3 values, but the header names 2 columns.",
    ),
    "data: damaged Parquet": (
        file("bad.parquet", lambda path: path.write_bytes(b"PAR1 and nothing else")),
        "bad.parquet: not a whole Parquet file",
    ),
    "data: roles out of order": (chat("user", "user", "assistant"), "bad.jsonl:2: message 2 is of the user, after"),
    "data: no answer at the end": (chat("user", "assistant", "user"), "bad.jsonl:2: the last message is of the user."),
    "data: unknown role": (chat("user", "bot"), "bad.jsonl:2: message 2: role = 'bot'."),
    "data: empty turn": (chat("user", "assistant", content=""), "bad.jsonl:2: message 1, of the user, is empty."),
    "data: image": (
        chat("user", "assistant", content=[{"type": "image_url", "image_url": "x"}]),
        "bad.jsonl:2: message 1 has a part of type 'image_url'. Only text is trained on",
    ),
    "data: no chat template": (chat("user", "assistant", template=""), "the tokenizer has no chat template"),
    "data: template that changes earlier turns": (
        chat(*["user", "assistant"] * 2, template=THINKING),
        "bad.jsonl:2: message 2, of the assistant, is rendered otherwise once more messages follow",
    ),
    "data: trained on and held out": (
        lambda folder: message_of(folder, recipe_of(folder), f"data.heldout={folder / 'data' / 'train.jsonl'}"),
        "train.jsonl is trained on too. Name another file",
    ),
    "model: folder without config.json": (
        model_folder(lambda folder: (folder / "config.json").unlink()),
        "cannot be ",
    ),
    "model: truncated weights": (
        model_folder(lambda folder: truncate(folder / "model.safetensors")),
        "a file that was cut off must be fetched again.",
    ),
    "model: folder without tokenizer": (
        model_folder(lambda folder: [path.unlink() for path in folder.glob("token*")]),  # type: ignore[func-returns-value, arg-type, return-value]
        "tokenizer",
    ),
    "model: no attention": (
        changed(model={"config": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}}),
        "model of type 'mamba': its last layer, MambaBlock, has no attention with a V projection",
    ),
    "checkpoint: truncated": (old_run("stopped", True), "step_1: colm.pt has 7 bytes, not 10"),
    "checkpoint: of another recipe": (
        old_run("stopped", True, lr=1e-3),
        "holds an unfinished run of another recipe.\n  optimizer.lr: 0.001 there, 2e-05 here",
    ),
    "checkpoint: none of that name": (override("resume=/nowhere/step_3"), "step_3: no such checkpoint"),
    "output: a finished run": (old_run("finished", False), "holds a finished run. Choose another, or overwrite=true"),
    "output: a run, resume=never": (old_run("stopped", False, "resume=never"), "holds a run already."),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture with its tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    write_mixture(folder, seed=1, scale=0.02)
    return folder


def folder_of(parent: Path, mixture: Path) -> Path:
    """A fresh folder in which `data` is the mixture."""
    parent.mkdir(exist_ok=True)
    (parent / "data").symlink_to(mixture)
    return parent


def test_good_input_is_not_refused(mixture: Path, tmp_path: Path) -> None:
    """Or the tests below would mean nothing."""
    folder = folder_of(tmp_path, mixture)
    assert message_of(folder, recipe_of(folder)) == ""
    again = message_of(folder, recipe_of(folder))
    assert again == ""  # an unfinished run without a checkpoint starts anew


@pytest.mark.parametrize("kind", KINDS)
def test_message(kind: str, mixture: Path, tmp_path: Path) -> None:
    run, said = KINDS[kind]
    message = run(folder_of(tmp_path, mixture))
    assert said in message
    assert message.rstrip().endswith((".", "?")), message  # a sentence that says what to do


def test_a_finished_run_is_said_before_torch_is_imported(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from colm_ds.cli import main as colm_ds

    folder = folder_of(tmp_path, mixture)
    old_run("finished", False)(folder)
    monkeypatch.setitem(sys.modules, "colm_ds.training.run", None)  # whoever imports it fails
    assert colm_ds(["train", str(folder / "recipe.yaml")]) == 2
    assert "holds a finished run. Choose another, or overwrite=true" in capsys.readouterr().err


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        write_mixture(Path(scratch) / "mixture", seed=1, scale=0.02)
        print("| what is wrong | what it says |\n|---|---|")
        for number, (kind, (run, _)) in enumerate(KINDS.items()):
            folder = folder_of(Path(scratch) / str(number), Path(scratch) / "mixture")
            message = run(folder).replace(str(folder), "DIR").replace(str(ROOT), ".")
            print(f"| {kind} | {' '.join(message.split()).replace('|', chr(92) + '|')} |")


if __name__ == "__main__":
    main()
