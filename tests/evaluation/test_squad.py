"""SQuAD: normalised exact match and F1 against all references, and the whole set through stubs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colm_ds.data.formats import read_records
from colm_ds.errors import DataError
from colm_ds.evaluation.squad import SquadTask, exact, f1, normalise, write_question
from tests.evaluation.stubs import StubBackend


@pytest.mark.parametrize(
    ("answer", "form"),
    [("The Norse, in  Iceland!", "norse in iceland"), ("an A.B.C.", "abc"), ("", ""), ("theatre", "theatre")],
)
def test_normal_form(answer: str, form: str) -> None:
    assert normalise(answer) == form


@pytest.mark.parametrize(
    ("answer", "references", "is_exact", "score"),
    [
        ("308", ["308"], True, 1.0),
        ("the 308 points.", ["308"], False, 2 / 3),
        ("Denver", ["Carolina", "denver"], True, 1.0),
        ("a b c", ["b c d", "b c"], True, 1.0),
        ("", ["x"], False, 0.0),
        ("x x y", ["x y y"], False, 2 / 3),
        ("the", ["a"], True, 1.0),
    ],
)
def test_scores_take_the_best_reference(answer: str, references: list[str], is_exact: bool, score: float) -> None:
    assert exact(answer, references) is is_exact
    assert f1(answer, references) == pytest.approx(score)


def test_prompt_and_the_forms_of_answers() -> None:
    record: dict[str, Any] = {"context": " C. ", "question": "Q? ", "answers": {"text": ["a", "b", "a"]}}
    question = write_question("file:1", record)
    assert question.prompt == "Context: C.\nQuestion: Q?\nAnswer:"
    assert question.references == ("a", "b")
    assert write_question("file:1", record | {"title": "T"}).prompt.startswith("Title: T\n")
    assert write_question("file:1", record | {"answers": [{"text": "x"}, {"text": "y"}]}).references == ("x", "y")
    assert write_question("file:1", record | {"all_answers": ["z", "a"]}).references == ("z", "a")
    for broken in ({"answers": []}, {"answers": {"text": []}}, {"answers": 3}):
        with pytest.raises(DataError, match="file:9: no reference answer"):
            write_question("file:9", record | broken)


@pytest.mark.parametrize("right", [True, False])
def test_knowing_backend_scores_everything_and_a_wrong_one_nothing(right: bool, shared_data: Path) -> None:
    task = SquadTask()
    questions = task.read(read_records(shared_data / "squad" / "validation.jsonl.gz"), StubBackend())
    gold: dict[str, list[str]] = {}
    for question in questions:  # four questions are there twice, with other references
        both = gold.get(question.prompt, question.references)
        gold[question.prompt] = [text for text in question.references if text in both]

    def write(prompt: str) -> str:
        return f" {gold[prompt][-1]}\nQuestion: what else?" if right else " zzz\n" + gold[prompt][0]

    rows = [row for batch in task.answer(StubBackend(write), questions) for _, row in batch]
    summary = task.summarise(rows)
    assert summary["n"] == len(questions) == 1190
    assert (summary["accuracy"], summary["f1"]) == ((1.0, 1.0) if right else (0.0, 0.0))
