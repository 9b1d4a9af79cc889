"""What an evaluation set is to the code that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from colm_ds.data.records import Records
from colm_ds.evaluation.backend import Backend

Row = dict[str, Any]
"""What is kept of one question: `correct` or what else its set is about; `index` is added when it is written."""

Answered = Iterator[list[tuple[int, Row]]]
"""Rows as they come, each with its question's place among those asked."""


class EvaluationTask(Protocol):
    """One evaluation set.

    Attributes:
        name: of the set.
        settings: what else than model and questions decides the answers.
    """

    name: str
    settings: dict[str, Any]

    @property
    def subpaths(self) -> tuple[str, ...]:
        """Where it may lie in a data folder, without suffix."""
        ...

    def read(self, records: Records, backend: Backend) -> list[Any]:
        """The questions.

        Raises:
            DataError: naming file and line of a record that is none.
        """
        ...

    def size(self, question: Any) -> int:
        """Length of a question, for sharing them among ranks."""
        ...

    def group(self, question: Any) -> str:
        """Questions are drawn from each group for `--limit`: the source of a text, else all alike."""
        ...

    def answer(self, backend: Backend, questions: Sequence[Any]) -> Answered:
        """Ask the questions; a row is complete when it comes."""
        ...

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Numbers of the set, `n` among them."""
        ...
