"""Multiple choice by mean log-probability; the prompts are those of training (`colm_ds.data.choices`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from colm_ds.data.choices import ChoiceQuestion
from colm_ds.data.formats import Records
from colm_ds.evaluation.backend import Backend
from colm_ds.evaluation.results import accuracy_summary
from colm_ds.evaluation.task import Answered, Row, WithTokenizer


@dataclass
class CandidateTask:
    """A set whose answer is the candidate with the highest mean token log-probability; the first one at a tie.

    Attributes:
        write: turns a record, preceded by its name for messages, into a question.
    """

    name: str
    write: Callable[[str, Mapping[str, Any]], ChoiceQuestion]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def subpaths(self) -> tuple[str, ...]:
        """See `EvaluationTask.subpaths`."""
        return tuple(f"{folder}{self.name}{end}" for end in ("/validation", "") for folder in ("superglue/", ""))

    def read(self, records: Records, words: WithTokenizer) -> list[ChoiceQuestion]:
        """See `EvaluationTask.read`."""
        return [self.write(where, record) for where, record in records]

    def size(self, question: ChoiceQuestion) -> int:
        """See `EvaluationTask.size`."""
        return len(question.prompt) + sum(map(len, question.candidates))

    def group(self, question: ChoiceQuestion) -> str:
        """See `EvaluationTask.group`."""
        return ""

    def answer(self, backend: Backend, questions: Sequence[ChoiceQuestion]) -> Answered:
        """See `EvaluationTask.answer`."""
        for batch in backend.score([(question.prompt, question.candidates) for question in questions]):
            rows = []
            for place, scores in batch:
                question = questions[place]
                means = [score.mean for score in scores]
                predicted = means.index(max(means))
                row = {
                    "correct": predicted == question.gold,
                    "predicted": predicted,
                    "gold": question.gold,
                    "log_probabilities": [score.log_probability for score in scores],
                    "num_tokens": [score.num_tokens for score in scores],
                    "prompt": question.prompt,
                    "candidates": list(question.candidates),
                }
                rows.append((place, row))
            yield rows

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """See `EvaluationTask.summarise`."""
        return accuracy_summary(rows)
