"""Interface of evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from colm_ds.data.formats import Records
from colm_ds.evaluation.backend import Backend

Row = dict[str, Any]
"""Result of one question: `correct`, or another result of its set; `index` is added when it is written."""

Answered = Iterator[list[tuple[int, Row]]]
"""Rows as they arrive, each with its question's index among those asked."""


class WithTokenizer(Protocol):
    """A holder of the model's tokenizer: a backend, or something that loads the tokenizer alone."""

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        ...


class EvaluationTask(Protocol):
    """One evaluation set.

    Attributes:
        name: name of the set.
        settings: settings, besides model and questions, that affect the answers.
    """

    name: str
    settings: dict[str, Any]

    @property
    def subpaths(self) -> tuple[str, ...]:
        """Possible paths in a data folder, without suffix."""
        ...

    def read(self, records: Records, words: WithTokenizer) -> list[Any]:
        """Read the questions; only sets that cut texts into tokens ask for the tokenizer.

        Raises:
            DataError: naming file and line of an invalid record.
        """
        ...

    def size(self, question: Any) -> int:
        """Return the length of a question, for sharing questions among ranks."""
        ...

    def group(self, question: Any) -> str:
        """Return the group from which `--limit` draws: the source of a text, else the same for all."""
        ...

    def answer(self, backend: Backend, questions: Sequence[Any]) -> Answered:
        """Ask the questions; a row is complete when it is yielded."""
        ...

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the numbers of the set, including `n`."""
        ...
