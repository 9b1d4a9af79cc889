"""The two passes over math questions: perfect and wrong programs and words, and what each case counts as."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from colm_ds.data.formats import read_records
from colm_ds.data.prompt import format_prompt
from colm_ds.errors import DataError
from colm_ds.evaluation import math_tasks
from colm_ds.evaluation.math_tasks import PROGRAM_SUFFIX, MathQuestion, MathTask, read_question
from colm_ds.evaluation.results import IN_DOMAIN, OUT_OF_DOMAIN
from tests.evaluation.stubs import StubBackend

SETS = IN_DOMAIN + OUT_OF_DOMAIN
NUM_QUESTIONS = {"gsm8k": 1319, "math": 5000, "numglue": 1042, "svamp": 1000, "mathematics": 1000, "simuleq": 514}


def ask(task: MathTask, write: Callable[[str], str], questions: Sequence[MathQuestion]) -> list[dict[str, Any]]:
    """Rows of all questions, in their order."""
    backend = StubBackend(write, batch_size=64)
    found = [each for batch in task.answer(backend, questions) for each in batch]
    assert sorted(place for place, _ in found) == list(range(len(questions)))
    return [row for _, row in sorted(found, key=lambda each: each[0])]


def load(name: str, shared_data: Path) -> list[MathQuestion]:
    return MathTask(name).read(read_records(shared_data / "math_eval" / f"{name}.jsonl.gz"), StubBackend())


def gold_by_prompt(questions: Sequence[MathQuestion], suffix: str) -> dict[str, str]:
    return {format_prompt(question.question + suffix): question.gold for question in questions}


def wrong_answer(gold: str) -> str:
    """A number that no set has as an answer."""
    return "-987654321"


def run_perfect_programs(name: str, questions: Sequence[MathQuestion], right: bool) -> list[dict[str, Any]]:
    gold = gold_by_prompt(questions, PROGRAM_SUFFIX)

    def write(prompt: str) -> str:
        answer = gold[prompt] if right else wrong_answer(gold[prompt])
        return f"```python\nanswer = {answer!r}\nprint(answer)\n```\n### Instruction:\nprint(0)"

    return ask(MathTask(name), write, questions)


@pytest.mark.parametrize("name", SETS)
def test_perfect_programs_score_everything_and_wrong_ones_nothing(name: str, shared_data: Path) -> None:
    questions = load(name, shared_data)[:25]
    rows = run_perfect_programs(name, questions, right=True)
    assert [row["question"] for row in rows if not row["correct"]] == []
    assert {row["answered_by"] for row in rows} == {"program"}
    assert not any(row["correct"] for row in run_perfect_programs(name, questions[:10], right=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_perfect_programs_score_every_question_of_every_set(name: str, shared_data: Path) -> None:
    questions = load(name, shared_data)
    assert [row["question"] for row in run_perfect_programs(name, questions, right=True) if not row["correct"]] == []


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("first_pass", ["words", "nothing"])
def test_perfect_words_score_everything_and_wrong_ones_nothing(name: str, first_pass: str, shared_data: Path) -> None:
    questions = load(name, shared_data)
    assert len(questions) == NUM_QUESTIONS[name]
    gold = gold_by_prompt(questions, "") | gold_by_prompt(questions, PROGRAM_SUFFIX)

    def write(prompt: str, right: bool = True) -> str:
        if first_pass == "nothing" and PROGRAM_SUFFIX in prompt:
            return " Sorry, words only."
        answer = gold[prompt] if right else wrong_answer(gold[prompt])
        return f" Let us think.\nThe answer is {answer}.\n\nQuestion: another one. The answer is 5."

    rows = ask(MathTask(name), write, questions)
    assert [row["question"] for row in rows if not row["correct"]] == []
    assert {row["answered_by"] for row in rows} == {"words"}
    assert {row["words_text"] is None for row in rows} == {first_pass == "words"}
    assert MathTask(name).summarise(rows)["accuracy"] == 1.0
    wrong = ask(MathTask(name), lambda prompt: write(prompt, right=False), questions)
    assert MathTask(name).summarise(wrong)["accuracy"] == 0.0


PROGRAMS = {
    "prints": ("print(6 * 7)", "ok", "program"),
    "prints words around it": ("print('it is', 42)", "ok", "program"),
    "fails": ("print(1 / 0)", "error", "words"),
    "prints, then fails": ("print(41)\nraise ValueError", "error", "words"),
    "prints nothing": ("print('')", "ok", "words"),
    "prints no number": ("print('none')", "ok", "words"),
    "is no program": ("42 =print(", "error", "words"),
}


@pytest.mark.parametrize("case", sorted(PROGRAMS))
def test_words_are_asked_where_a_program_gives_no_answer(case: str) -> None:
    program, status, answered_by = PROGRAMS[case]

    def write(prompt: str) -> str:
        return program if prompt == format_prompt("Q" + PROGRAM_SUFFIX) else "6 times 7 is 42"

    (row,) = ask(MathTask("gsm8k"), write, [MathQuestion("Q", "42")])
    assert (row["program_status"], row["answered_by"], row["correct"]) == (status, answered_by, True)
    assert (row["words_text"] is not None) == (answered_by == "words")


def test_words_of_the_first_pass_are_an_answer() -> None:
    backend = StubBackend(lambda prompt: "The answer is 42.")
    task = MathTask("svamp")
    (batch,) = [batch for batch in task.answer(backend, [MathQuestion("Q", "42")]) if batch]
    assert batch[0][1]["answered_by"] == "words"
    assert batch[0][1]["program_status"] is None
    assert backend.prompts == [format_prompt("Q" + PROGRAM_SUFFIX)]


def test_no_answer_anywhere_is_wrong_and_counted() -> None:
    rows = ask(MathTask("gsm8k"), lambda prompt: "no idea", [MathQuestion("Q", "42"), MathQuestion("R", "1")])
    summary = MathTask("gsm8k").summarise(rows)
    assert (summary["accuracy"], summary["without_answer"], summary["asked_for_words"]) == (0.0, 2, 2)
    assert [row["answered_by"] for row in rows] == [None, None]


def test_many_questions_come_in_parts_each_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_tasks, "QUESTIONS_AT_ONCE", 10)
    backend = StubBackend(lambda prompt: "" if PROGRAM_SUFFIX in prompt else "7")
    batches = MathTask("gsm8k").answer(backend, [MathQuestion("x" * count, "7") for count in range(25)])
    first = [each for batch in (next(batches) for _ in range(4)) for each in batch]
    assert len(first) == 10  # the first ten are written before the others are asked
    assert len(backend.prompts) == 20


def test_forms_of_records() -> None:
    assert read_question("f:1", {"question": "Q ", "answer": "a\n#### 18"}) == MathQuestion("Q", "18")
    assert read_question("f:1", {"Body": "B. ", "Question": "Q?", "Answer": 4.0}) == MathQuestion("B. Q?", "4.0")
    assert read_question("f:1", {"problem": "P", "solution": r"so $\boxed{\frac12}$"}).gold == r"\frac{1}{2}"
    question: dict[str, Any] = {"question": "Q"}
    for broken in (question, {"answer": "1"}, {**question, "answer": " "}, {"question": [], "answer": "1"}):
        with pytest.raises(DataError, match="f:3: "):
            read_question("f:3", broken)
