"""A generated mixture of six small tasks with its tokenizer, for demos and tests without any download.

Run: python -m colm_ds.data.generated FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from colm_ds.data.formats import PathLike
from colm_ds.data.prompt import format_prompt
from colm_ds.errors import ConfigError

VOCABULARY_SIZE = 512
HELDOUT_PER_SOURCE = 60
_LETTERS = "abcdefghijkl"
_NAMES = ("Ann", "Ben", "Eva", "Max", "Zoe")
_THINGS = ("cups", "hats", "keys", "pens", "toys")

Item = tuple[int, ...]


@dataclass(frozen=True)
class GeneratedTask:
    """One source of the generated mixture.

    Attributes:
        name: source name.
        num_train: training examples at scale 1.
        choices: number of values of each part of an item; an item has one value for each part.
        write: instruction, steps and answer of an item.
    """

    name: str
    num_train: int
    choices: tuple[int, ...]
    write: Callable[[Item], tuple[str, str, str]]


def _sort(item: Item) -> tuple[str, str, str]:
    letters = list(_LETTERS)
    picked = [letters.pop(value) for value in item]
    ordered = sorted(picked)
    steps = f"First {ordered[0]}, last {ordered[-1]}."
    return f"Sort the letters {' '.join(picked)}", steps, " ".join(ordered)


def _largest(item: Item) -> tuple[str, str, str]:
    largest = max(item)
    steps = f"No digit is above {largest}."
    return f"Which digit is the largest: {', '.join(map(str, item))}?", steps, str(largest)


def _count(item: Item) -> tuple[str, str, str]:
    marks = ["xo"[value] for value in item]
    count = marks.count("x")
    return f"How many x are in {' '.join(marks)}?", f"Found:{' x' * count}.", str(count)


def _add(item: Item) -> tuple[str, str, str]:
    left, right = item
    return f"Add {left} and {right}.", f"{left} + {right} = {left + right}.", str(left + right)


def _parity(item: Item) -> tuple[str, str, str]:
    number = item[0]
    return f"Is {number} even or odd?", f"The last digit is {number % 10}.", "odd" if number % 2 else "even"


def _story(item: Item) -> tuple[str, str, str]:
    number, name, thing = item[0], _NAMES[item[1]], _THINGS[item[2]]
    return f"{name} has {number} {thing} and gets one more.", f"One more than {number}.", str(number + 1)


TASKS = (
    GeneratedTask("generated/sort", 6000, (12, 11, 10, 9), _sort),
    GeneratedTask("generated/largest", 3500, (10, 10, 10, 10), _largest),
    GeneratedTask("generated/count", 600, (2,) * 10, _count),
    GeneratedTask("generated/add", 250, (20, 20), _add),
    GeneratedTask("generated/parity", 120, (300,), _parity),
    GeneratedTask("generated/story", 50, (10, 5, 5), _story),
)


def generate_records(seed: int = 0, scale: float = 1.0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Generate training and held-out records of all tasks; no instruction occurs twice, nor on both sides.

    Args:
        seed: seed of the draw.
        scale: factor on the sizes of the sources; at least 2 training examples each are made. Below 1 it also scales
            the held-out examples (60 of each source).

    Returns:
        `(train, heldout)`: records `{"source", "instruction", "output", "answer"}`; train is shuffled.

    Raises:
        ConfigError: if `scale` is not positive, or a task has not enough different items.
    """
    if scale <= 0:
        raise ConfigError(f"scale = {scale}: must be above 0.")
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for task in TASKS:
        num_train = max(2, round(task.num_train * scale))
        num_heldout = max(2, round(HELDOUT_PER_SOURCE * min(scale, 1.0)))
        items = _draw(task, num_train + num_heldout, random.Random(f"{seed} {task.name}"), scale)
        heldout += [_record(task, item) for item in items[:num_heldout]]
        train += [_record(task, item) for item in items[num_heldout:]]
    random.Random(f"{seed} order").shuffle(train)
    return train, heldout


def _draw(task: GeneratedTask, count: int, rng: random.Random, scale: float) -> list[Item]:
    """Draw distinct items of a task in random order."""
    size = 1
    for choices in task.choices:
        size *= choices
    if count > size:
        most = (size - HELDOUT_PER_SOURCE) / task.num_train
        raise ConfigError(
            f"scale = {scale}: {task.name} would need {count} items and has {size}. Choose at most {most:.2g}."
        )
    items = []
    for code in rng.sample(range(size), count):
        parts = []
        for choices in task.choices:
            code, part = divmod(code, choices)
            parts.append(part)
        items.append(tuple(parts))
    return items


def _record(task: GeneratedTask, item: Item) -> dict[str, str]:
    instruction, steps, answer = task.write(item)
    output = f"{steps} The answer is {answer}."
    return {"source": task.name, "instruction": instruction, "output": output, "answer": answer}


def train_tokenizer(records: Sequence[dict[str, str]], folder: PathLike) -> None:
    """Train a byte-level BPE tokenizer on records and save it in Hugging Face format.

    Digits are single tokens, nothing is unknown, eos is `</s>`, pad `<pad>`, and there is no bos. The same records give
    the same files.

    Args:
        records: generated records; the prompt around each instruction is learned with them.
        folder: folder to write, made if missing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (format_prompt(record["instruction"]) + record["output"] for record in records)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(str(folder))


def write_mixture(folder: PathLike, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write `train.jsonl`, `heldout.jsonl` and the folder `tokenizer`.

    Args:
        folder: folder to write, made if missing; files of an earlier call are replaced.
        seed: seed of the draw.
        scale: factor on the sizes of the sources, see `generate_records`.

    Returns:
        Training examples of each source.

    Raises:
        ConfigError: for a `scale` that is not positive or too large.
    """
    folder = Path(folder)
    train, heldout = generate_records(seed, scale)
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:  # renamed one by one: ranks may write at the same time
        temporary = Path(name)
        for records, target in ((train, "train.jsonl"), (heldout, "heldout.jsonl")):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (temporary / target).write_text(lines, encoding="utf-8", newline="\n")
        train_tokenizer(train, temporary / "tokenizer")
        for file in [path for path in temporary.rglob("*") if path.is_file()]:
            os.replace(file, folder / file.relative_to(temporary))
    counts = {task.name: 0 for task in TASKS}
    for record in train:
        counts[record["source"]] += 1
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `write_mixture` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m colm_ds.data.generated", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (0)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the sizes of the sources (1.0)")
    options = parser.parse_args(arguments)
    for source, count in write_mixture(options.folder, options.seed, options.scale).items():
        print(f"{count:6d}  {source}")
