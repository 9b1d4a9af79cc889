"""The six math sets: a program first, then words if it gives no answer (MAmmoTH's protocol)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from colm_ds.data.formats import Records
from colm_ds.data.records import text_of
from colm_ds.errors import DataError
from colm_ds.evaluation.backend import Backend
from colm_ds.evaluation.generate import Generation
from colm_ds.evaluation.math import answers
from colm_ds.evaluation.question_prompt import QuestionPrompt
from colm_ds.evaluation.results import accuracy_summary
from colm_ds.evaluation.sandbox import sandbox
from colm_ds.evaluation.task import Answered, Row, WithTokenizer

PROGRAM_SUFFIX = " Let's write a program."

QUESTIONS_AT_ONCE = 256
"""Questions in one round of programs, then words; the most that a kill can lose."""


@dataclass(frozen=True)
class MathQuestion:
    """A question and its gold answer, as in the data."""

    question: str
    gold: str


@dataclass
class MathTask:
    """One math set.

    Attributes:
        workers: programs that run at the same time.
        minimum: the weakest isolation to accept; None: the sandbox's default.
        prompt: how questions are asked.
        settings: `max_new_tokens` of each pass, and the prompt.
    """

    name: str
    workers: int = 2
    minimum: str | None = None
    prompt: QuestionPrompt = field(default_factory=QuestionPrompt)
    settings: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 512})

    def __post_init__(self) -> None:
        """Record the prompt."""
        self.settings = {**self.settings, **self.prompt.settings}

    @property
    def subpaths(self) -> tuple[str, ...]:
        """See `EvaluationTask.subpaths`."""
        return tuple(f"{folder}{self.name}{end}" for end in ("/test", "") for folder in ("math_eval/", ""))

    def read(self, records: Records, words: WithTokenizer) -> list[MathQuestion]:
        """See `EvaluationTask.read`."""
        return [read_question(where, record) for where, record in records]

    def size(self, question: MathQuestion) -> int:
        """See `EvaluationTask.size`."""
        return len(question.question)

    def group(self, question: MathQuestion) -> str:
        """See `EvaluationTask.group`."""
        return ""

    def answer(self, backend: Backend, questions: Sequence[MathQuestion]) -> Answered:
        """See `EvaluationTask.answer`."""
        order = sorted(range(len(questions)), key=lambda place: (-len(questions[place].question), place))
        for start in range(0, len(order), QUESTIONS_AT_ONCE):
            yield from self._answer_some(backend, questions, order[start : start + QUESTIONS_AT_ONCE])

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the accuracy, the answers from programs and from words of either pass, and how programs ended."""
        statuses: dict[str, int] = {}
        for row in rows:
            if row["program_status"] is not None:
                statuses[row["program_status"]] = statuses.get(row["program_status"], 0) + 1
        return {
            **accuracy_summary(rows),
            "answered_by_program": sum(row["answered_by"] == "program" for row in rows),
            "asked_for_words": sum(row["words_text"] is not None for row in rows),
            "without_answer": sum(row["predicted"] == "" for row in rows),
            "program_status": dict(sorted(statuses.items())),
        }

    def _answer_some(self, backend: Backend, questions: Sequence[MathQuestion], places: Sequence[int]) -> Answered:
        """Run both passes over some questions."""
        without: list[tuple[int, Row]] = []
        for batch in self._generate(backend, [questions[place].question + PROGRAM_SUFFIX for place in places]):
            rows = self._program_rows([(places[at], questions[places[at]], written) for at, written in batch])
            without += [(place, row) for place, row in rows if row["predicted"] == ""]
            yield [(place, row) for place, row in rows if row["predicted"] != ""]
        for batch in self._generate(backend, [questions[place].question for place, _ in without]):
            for at, written in batch:
                place, row = without[at]
                predicted = answers.extract(self.name, written.text)
                row |= {
                    "words_text": written.text,
                    "words_ended_by": written.reason,
                    "predicted": predicted,
                    "answered_by": "words" if predicted else None,
                    "correct": answers.is_correct(self.name, predicted, questions[place].gold),
                }
            yield [without[at] for at, _ in batch]

    def _generate(self, backend: Backend, questions: Sequence[str]) -> Any:
        return backend.generate(
            self.prompt.write(questions, backend.tokenizer),
            max_new_tokens=self.settings["max_new_tokens"],
            stop_strings=answers.STOP_STRINGS,
            turn_end=self.prompt.turn_end(backend.tokenizer),
        )

    def _program_rows(self, written: Sequence[tuple[int, MathQuestion, Generation]]) -> list[tuple[int, Row]]:
        """Return the rows of a batch of the first pass; its programs run in parallel."""
        programs = [answers.program_of(generation.text) for _, _, generation in written]
        to_run = [program for program in programs if program is not None]
        results = sandbox.run_programs(to_run, workers=self.workers, minimum=self.minimum) if to_run else []
        ended = iter(results)
        rows = []
        for (place, question, generation), program in zip(written, programs, strict=True):
            result = next(ended) if program is not None else None
            if result is None:
                predicted = answers.extract(self.name, generation.text)
            elif result.status == "ok" and result.printed.strip():
                predicted = answers.extract(self.name, answers.from_printed(result.printed))
            else:
                predicted = ""
            source = "words" if result is None else "program"
            row: Row = {
                "correct": answers.is_correct(self.name, predicted, question.gold),
                "predicted": predicted,
                "gold": question.gold,
                "answered_by": source if predicted else None,
                "question": question.question,
                "program_text": generation.text,
                "program_ended_by": generation.reason,
                "program_status": None if result is None else str(result.status),
                "program_printed": None if result is None else result.printed[:2000],
                "program_message": None if result is None else result.message,
                "words_text": None,
                "words_ended_by": None,
                "prompt_truncated": generation.prompt_truncated,
            }
            rows.append((place, row))
        return rows


def read_question(where: str, record: Mapping[str, Any]) -> MathQuestion:
    """Read the question of a record: `question` and `answer`, or the sets' form on the hub.

    There GSM8K's answer is a solution with the number after "####", MATH's is boxed in its solution, and SVAMP keeps
    story and question in separate keys.

    Raises:
        DataError: if either is missing.
    """
    if "question" not in record and "Body" in record:
        question = f"{text_of(where, record, 'Body').rstrip()} {text_of(where, record, 'Question').strip()}"
    else:
        question = text_of(where, record, "question", "problem")
    if "answer" in record or "Answer" in record:
        gold = text_of(where, record, "answer", "Answer").rpartition("####")[2].strip()
    else:
        gold = answers.extract("math", text_of(where, record, "solution"))
    if not gold:
        raise DataError(f"{where}: no answer in {', '.join(map(repr, record))}. Write it under 'answer'.")
    return MathQuestion(question.strip(), gold)
