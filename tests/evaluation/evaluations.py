"""Small data folders and evaluations of a tiny model, also as functions that ranks run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.data.sets import DataPlaces
from colm_ds.distributed.exchange import make_exchange
from colm_ds.evaluation.evaluate import Options, evaluate
from colm_ds.evaluation.question_log import EvaluationFolder
from tests.evaluation.stubs import CPU, make_backend

TASKS = ("gsm8k", "copa", "wic", "squad", "perplexity")


def write_data(folder: Path) -> Path:
    """A data folder with a few questions of five sets, laid out as shared/data."""
    rows: dict[str, list[dict[str, Any]]] = {
        "math_eval/gsm8k": [{"question": f"Add {n} and {n * n}.", "answer": str(n + n * n)} for n in range(11)],
        "superglue/copa/validation": [
            {"premise": f"He had {n} cups.", "choice1": "He ran.", "choice2": "It fell.", "question": q, "label": n % 2}
            for n, q in enumerate(["cause", "effect"] * 5)
        ],
        "superglue/wic/validation": [
            {"word": "cup", "sentence1": f"A cup {n}.", "sentence2": "The cup" + "s" * n, "label": n % 2 == 0}
            for n in range(9)
        ],
        "squad/validation": [
            {"context": f"Ann has {n} keys. " * n, "question": "How many?", "answers": {"text": [str(n)]}}
            for n in range(1, 8)
        ],
        "pile5/texts": [
            {"text": f"Is {n} even or odd? " * (n + 1), "meta": {"pile_set_name": ("a", "b")[n % 2]}} for n in range(9)
        ],
    }
    for name, records in rows.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def make_options(data: Path, tasks: tuple[str, ...] = TASKS, **changes: Any) -> Options:
    """Short answers and chunks."""
    values = {"places": DataPlaces(str(data)), "max_new_tokens": 12, "chunk_tokens": 16, **changes}
    return Options(tasks=tasks, **values)


def run_on_rank(tokenizer_folder: str, data: str, out: str, max_examples: int = 64) -> dict[str, Any] | None:
    """The evaluation of a tiny model on this rank of a process group, or alone; what it returns."""
    from transformers import AutoTokenizer

    backend = make_backend(AutoTokenizer.from_pretrained(tokenizer_folder), max_examples=max_examples)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return evaluate(
        backend,
        make_options(Path(data)),
        EvaluationFolder(out),
        title="tiny",
        model={"base": "tiny"},
        exchange=make_exchange(CPU),
        rank=rank,
        device=CPU,
    )


def read_answers(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a set."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


def assert_same_answers(folder: Path, other: Path, name: str) -> None:
    """Rows of a set in two folders agree; numbers that depend on the batch's padding do nearly."""
    rows, others = read_answers(folder, name), read_answers(other, name)
    for row in others:
        for key in ("log_probabilities", "nats"):
            if key in row:
                row[key] = pytest.approx(row[key], abs=1e-3)
    assert rows == others


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """The sets' numbers without times; losses rounded."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items() if key not in ("seconds", "taken_over")}
        return round(value, 4) if isinstance(value, float) else value

    found: dict[str, Any] = rounded(results["tasks"])
    return found
