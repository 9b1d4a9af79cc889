"""What is known before training, from the table of public reports, and what the program says now, as a table.

    python -m tests.training.clear_errors [WORD ...]     # about 3 minutes; rows for docs/RELIABILITY.md
    python -m tests.training.clear_errors --write        # writes them into it

With words only the cases that are named with one of them. Each is rebuilt from scratch in a temporary folder, on a tiny
model and the real command line, which runs in a fork of this process; a script that uses `CoLMTrainer` or `initialize`
has an exit code of its own.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import colm_ds.training.run  # noqa: F401 (forks need not import it again)
from colm_ds import cli
from colm_ds.evaluation.math.answers import extract
from tests.tiny_models import tiny_model
from tests.training.situations import ROOT, Place
from tests.untrusted.forked import forked

DOCUMENT = ROOT / "docs" / "RELIABILITY.md"
HEAD = "| case | what it says |\n|---|---|\n"
_TELLING = re.compile(
    r"Error: |left out|trained on too|compared as Adam|steps done|no label|problem|usage: |made by|held out|peak"
)
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MOST_SHOWN = 420


def told(place: Place, work: Callable[[], int | str | None], telling: re.Pattern[str] = _TELLING) -> str:
    """Run something to its end; its exit code and what it said of it."""
    ended = forked(work, place.folder / "log.txt")
    lines = [line.rstrip() for line in ended.said.splitlines() if line.strip() and "real_accelerator" not in line]
    first = next((number for number, line in enumerate(lines) if telling.search(line)), max(0, len(lines) - 2))
    shown = [line.strip() for line in lines[first : first + 1]]
    shown += [line.strip() for line in itertools.takewhile(lambda line: line.startswith("  "), lines[first + 1 :])]
    trace = " TRACEBACK" if "Traceback" in ended.said else ""
    said = " ".join(shown).replace(str(place.folder), "DIR").replace("|", "\\|").replace(str(ROOT), ".")
    said = re.sub(r", took \d+ s", "", re.sub(r"^\[?test\]?: ", "", said))
    return f"exit code {ended.code}{trace}: {said[:MOST_SHOWN]}"


def train(place: Place, *overrides: str, telling: re.Pattern[str] = _TELLING, **changes: Any) -> str:
    """Run `colm-ds train` on the place's recipe with other keys."""
    place.recipe |= changes
    path = place.command(*overrides)[-1 - len(overrides)]
    return told(place, lambda: cli.main(["train", path, *overrides]), telling)


def command(place: Place, *words: str) -> str:
    """Run a subcommand."""
    return told(place, lambda: cli.main(list(words)))


def rows(place: Place, *records: dict[str, Any], name: str = "rows.jsonl") -> str:
    """Write rows; the file's path."""
    path = place.folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def many(number: int = 64, **changes: Any) -> list[dict[str, Any]]:
    """Rows of two sources."""
    plain = [
        {"source": "ab"[n % 2], "instruction": f"Add {n} and 1.", "output": f"{n + 1} is the sum"}
        for n in range(number)
    ]
    return [row | changes for row in plain]


def pretraining(place: Place, **changes: Any) -> Path:
    """Write documents and a recipe that pretrains on them."""
    text = ["river and stones money weather about green house walks", "table small birds windows seven people sing"]
    documents = [{"text": f"{text[n % 2]} {n} " * 12, "meta": {"pile_set_name": "AB"[n % 2]}} for n in range(120)]
    rows(place, *documents, name="docs.jsonl")
    recipe: dict[str, Any] = {
        "task": "pretraining",
        "name": "test",
        "output_dir": str(place.folder / "pre"),
        "steps": 3,
        "micro_batch_size": 4,
        "model": {"config": LLAMA},
        "data": {"store": str(place.folder / "store"), "chunk_tokens": 32},
        "prepare": {"vocabulary_size": 320, "holdout": 0.1, "sample_mb": 0.2},
        "colm": {"large_batch_size": 8, "coreset_size": 4},
        "deepspeed": str(ROOT / "ds_configs" / "zero0.json"),
    }
    path = place.folder / "pre.yaml"
    path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    return path


def without_pad_token(place: Place) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    recipe = pretraining(place)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train([str(place.folder / "docs.jsonl")], trainer)
    folder = place.folder / "no_pad"
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(folder)
    prepare = ["prepare", str(recipe), "--data", str(place.folder / "docs.jsonl"), f"prepare.tokenizer={folder}"]
    told(place, lambda: cli.main(prepare))
    return command(place, "train", str(recipe))


def many_characters(place: Place) -> str:
    """Documents of 900 different characters."""
    recipe = pretraining(place)
    text = "".join(chr(0x4E00 + n) for n in range(900))
    rows(place, *[{"text": f"{n}{text}", "meta": {"pile_set_name": "A"}} for n in range(99)], name="docs.jsonl")
    data = str(place.folder / "docs.jsonl")
    return command(place, "prepare", str(recipe), "--data", data, "prepare.vocabulary_size=400")


def trainer(place: Place, data: Any, model: Any = None, collator: Any = None, **arguments: Any) -> str:
    """Train two steps with `CoLMTrainer`."""

    def work() -> None:
        from transformers import TrainingArguments

        from colm_ds.errors import CoLMError
        from colm_ds.integrations.transformers import CoLMTrainer
        from tests.integrations.runs import pad

        logging.disable(logging.NOTSET)
        logging.basicConfig(format="%(message)s", force=True)
        held = arguments.pop("eval_dataset", None)
        given = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": [], "save_strategy": "no"} | arguments
        args = TrainingArguments(str(place.folder / "out"), use_cpu=True, disable_tqdm=True, **given)
        try:
            made = CoLMTrainer(
                model or tiny_model("llama").train(), args, collator or pad, data, held, colm={"large_batch_size": 8}
            )
            made.train()
        except CoLMError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        print("2 steps done")

    return told(place, work)


def records(number: int = 40) -> list[dict[str, Any]]:
    """Tokenised rows of two sources."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 97, (12,), generator=draw).tolist() for _ in range(number)]
    return [{"input_ids": row, "labels": row, "source": "ab"[place % 2]} for place, row in enumerate(ids)]


def without_labels() -> list[dict[str, Any]]:
    return [row if place % 4 else row | {"labels": [-100] * 12} for place, row in enumerate(records())]


def initialize(place: Place, data: Any) -> str:
    """Train a step with `colm_ds.initialize`."""

    def work() -> None:
        import colm_ds
        from colm_ds.distributed.agreement import single_process_environment
        from colm_ds.errors import CoLMError

        logging.disable(logging.NOTSET)
        logging.basicConfig(format="%(message)s", force=True)
        single_process_environment()
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
        config = {"colm": {"large_batch_size": 8, "coreset_size": 4}, "optimizer": optimizer}
        try:
            engine = colm_ds.initialize(model=tiny_model("llama"), training_data=data, config=config)[0]
            engine.train_batch()
        except CoLMError as error:
            sys.exit(f"{type(error).__name__}: {error}")
        print("1 steps done")

    return told(place, work)


def small_embeddings(place: Place) -> str:
    """A model folder whose tokenizer knows more ids than it has embeddings."""
    tiny_model("llama", vocab_size=200).save_pretrained(place.folder / "small")
    for path in (place.folder / "data" / "tokenizer").iterdir():
        shutil.copy(path, place.folder / "small")
    return str(place.folder / "small")


def with_sources_left_out(place: Place) -> str:
    broken = [dict(row) for row in many()]
    del broken[9]["source"]
    broken[5]["source"] = None
    return train(place, f"data.train={rows(place, *broken)}")


def preview(place: Place, *overrides: str) -> str:
    path = place.command(*overrides)[-1 - len(overrides)]
    return command(place, "preview", path, *overrides)


def expanded(place: Place) -> str:
    os.environ.update(HOME=str(place.folder / "home"), RUNS=str(place.folder / "runs"))
    said = train(place, "output_dir=~/one")
    named = (place.folder / "home" / "one" / "metrics.jsonl").exists()
    other = train(place, "output_dir=$RUNS_OF_NOBODY/two")
    return f"{said} (in $HOME/one: {named}); {other}"


def saved_dataset(place: Place) -> str:
    import datasets

    datasets.Dataset.from_list(many()).save_to_disk(str(place.folder / "saved"))
    return train(place, f"data.train={place.folder / 'saved'}")


def copied_key(place: Place) -> str:
    first, second, *rest = (json.dumps(row) for row in many())
    doubled = second[:-1] + ', "output": "other"}'
    (place.folder / "rows.jsonl").write_text("\n".join([first, doubled, *rest, ""]))
    return train(place, f"data.train={place.folder / 'rows.jsonl'}")


def doubled_yaml(place: Place) -> str:
    path = Path(place.command()[-1])
    path.write_text(path.read_text() + "steps: 9\n")
    return command(place, "train", str(path))


def doubled_deepspeed(place: Place) -> str:
    path = place.folder / "ds.json"
    path.write_text('{\n "zero_optimization": {"stage": 0},\n "gradient_clipping": 1.0,\n "gradient_clipping": 2.0\n}')
    return train(place, deepspeed=str(path))


def example(name: str, *words: str) -> Callable[[Place], str]:
    """Run a script of finetune/examples."""

    def run(place: Place) -> str:
        def work() -> None:
            import runpy

            os.chdir(place.folder)
            sys.argv = [name, *words]
            sys.path.insert(0, str(ROOT / "finetune" / "examples"))
            runpy.run_path(str(ROOT / "finetune" / "examples" / name), run_name="__main__")

        return told(place, work, re.compile(r"usage: |train_runtime|Error"))

    return run


def answers(place: Place) -> str:
    texts = ("The answer is \u22127.", "The answer is \u2212.5", "The answer is .5")
    return ", ".join(f"{text!r} reads as {extract('gsm8k', text)}" for text in texts)


def deepspeed_of(place: Place, **zero: Any) -> str:
    return train(place, deepspeed={"zero_optimization": {"stage": 2, **zero}, "gradient_clipping": 1.0})


def model_config(**changes: Any) -> str:
    return f"model.config={json.dumps(LLAMA | changes)}"


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
BERT = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"} | {"model_type": "bert"}
T5 = {"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8}
RANDOM = {"large_batch_size": 8, "coreset_size": 4, "selector": "random"}
GEMMA2 = LLAMA | {"model_type": "gemma2", "head_dim": 8}

CASES: dict[str, Callable[[Place], str]] = {
    "pretraining with a tokenizer without a pad token": without_pad_token,
    "rows without labels, `CoLMTrainer`": lambda place: trainer(place, without_labels()),
    "rows without labels, `colm_ds.initialize`": lambda place: initialize(place, without_labels()),
    '`optim="adafactor"` in `CoLMTrainer`': lambda place: trainer(place, records(), optim="adafactor"),
    "source missing in some rows, recipe": with_sources_left_out,
    "source missing in some rows, `CoLMTrainer`": lambda place: trainer(
        place, [row | {"source": None} if n == 7 else row for n, row in enumerate(records())]
    ),
    "tokenizer larger than the embeddings": lambda place: train(
        place, "tokenizer=null", model={"name_or_path": small_embeddings(place)}
    ),
    "the same, `preview`": lambda place: preview(
        place, "tokenizer=null", "model.config=null", f"model.name_or_path={small_embeddings(place)}"
    ),
    "the same, `CoLMTrainer`": lambda place: trainer(place, records(), tiny_model("llama", vocab_size=50)),
    "the same, pretraining": lambda place: (
        command(place, "prepare", str(pretraining(place)), "--data", str(place.folder / "docs.jsonl"))[:0]
        + command(place, "train", str(place.folder / "pre.yaml"), model_config(vocab_size=200))
    ),
    "fewer learned positions than max_length": lambda place: train(place, model={"config": GPT2}),
    "nothing to hold out: one example per source": lambda place: train(
        place,
        f"data.train={rows(place, *[row | {'source': str(n)} for n, row in enumerate(many())])}",
        "data.holdout_per_source=4",
    ),
    "nothing to hold out: one prompt for all": lambda place: train(
        place, f"data.train={rows(place, *many(instruction='Add.'))}", "data.holdout_per_source=4"
    ),
    "a key twice in YAML": doubled_yaml,
    "a key twice in a JSON row": copied_key,
    "a key twice in the DeepSpeed file": doubled_deepspeed,
    "misspelled key of model.config": lambda place: train(place, model_config(num_hidden_layer=2)),
    "`5e8` in the DeepSpeed section": lambda place: deepspeed_of(place, reduce_bucket_size="5e8"),
    "a bucket of 15099494.4": lambda place: deepspeed_of(place, reduce_bucket_size=15099494.4),
    "a bucket of 0": lambda place: deepspeed_of(place, reduce_bucket_size=0),
    "betas [0.9, 1.5]": lambda place: train(place, "optimizer.betas=[0.9, 1.5]"),
    "heads that do not divide": lambda place: train(place, model_config(num_key_value_heads=3)),
    "`~` and `$VAR` in output_dir": expanded,
    "an encoder as model: bert": lambda place: train(place, model={"config": BERT}, colm=RANDOM),
    "T5 with `random`": lambda place: train(place, model={"config": T5}, colm=RANDOM),
    "`system` in Alpaca rows": lambda place: train(
        place, f"data.train={rows(place, *many(system='You are a pirate.'))}"
    ),
    "an `input` that is a list": lambda place: train(place, f"data.train={rows(place, *many(input=['a', 'b']))}"),
    "held-out data that is trained on: the same file": lambda place: train(
        place, f"data.heldout={place.folder / 'data' / 'train.jsonl'}"
    ),
    "held-out data that is trained on: common examples": lambda place: train(
        place,
        f"data.train={rows(place, *many())}",
        f"data.heldout={rows(place, *many(70)[60:], name='held.jsonl')}",
        telling=re.compile("trained on too|Error"),
    ),
    "held-out data that is trained on, `CoLMTrainer`": lambda place: trainer(
        place, records(), eval_dataset=records(), eval_strategy="no"
    ),
    "mixture weights {A: 1, B: -1}": lambda place: command(
        place, "train", str(pretraining(place)), "data.weights={A: 1, B: -1}"
    ),
    "vocabulary smaller than the characters": many_characters,
    "numbers with U+2212, and `.5`": answers,
    "`colm-ds plan` on demo.yaml before its data exists": lambda place: told(
        place, lambda: (os.chdir(place.folder), cli.main(["plan", str(ROOT / "finetune/recipes/demo.yaml")]))[1]
    ),
    "`plan` where b / ranks is less than the micro-batch": lambda place: told(
        place,
        lambda: cli.main(["plan", str(ROOT / "pretrain/recipes/cpu_pile5.yaml"), "--num-gpus", "4"]),
        re.compile("^colm 8 of 16 |Error"),
    ),
    "`hf_trainer.py --help`": example("hf_trainer.py", "--help"),
    "`hf_trainer.py` without arguments": example("hf_trainer.py"),
    "a `save_to_disk` folder as data": saved_dataset,
    "gemma2 without `attention: eager`": lambda place: train(place, model={"config": GEMMA2}),
}


def table(words: list[str]) -> Iterator[str]:
    """Yield the rows of the table."""
    for name, says in CASES.items():
        if words and not any(word in name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield f"| {name} | {' '.join(says(Place(Path(folder))).split())} |"


def written(document: str, lines: list[str]) -> str:
    """The document with these rows in the place of the table's."""
    start = document.index(HEAD) + len(HEAD)
    end = document.index("\n\n", start) + 1
    return document[:start] + "".join(f"{line}\n" for line in lines) + document[end:]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if sys.argv[1:] == ["--write"]:
        made = list(table([]))
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        for row in table(sys.argv[1:]):
            print(row, flush=True)
