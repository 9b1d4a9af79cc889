"""SQuAD: a short greedy answer, exact match and F1 against all reference answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from colm_ds.data.formats import Records
from colm_ds.data.records import text_of
from colm_ds.errors import DataError
from colm_ds.evaluation.backend import Backend
from colm_ds.evaluation.results import accuracy_summary
from colm_ds.evaluation.task import Answered, Row, WithTokenizer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """Normalise an answer as SQuAD does: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact(predicted: str, references: Sequence[str]) -> bool:
    """Return whether an answer equals one of the references in SQuAD's form."""
    return any(normalise(predicted) == normalise(reference) for reference in references)


def f1(predicted: str, references: Sequence[str]) -> float:
    """Return the best F1 of an answer's words against a reference's, between 0 and 1; 0 without references."""
    return max(
        (_f1(normalise(predicted).split(), normalise(reference).split()) for reference in references), default=0.0
    )


def _f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = (Counter(predicted) & Counter(reference)).total()
    return 2 * common / (len(predicted) + len(reference))


@dataclass(frozen=True)
class SquadQuestion:
    """A question on a text.

    Attributes:
        prompt: ends with "Answer:".
        references: correct answers, at least one.
    """

    prompt: str
    references: tuple[str, ...]


@dataclass
class SquadTask:
    """SQuAD with MeZO's prompt; the answer is the first line of at most 50 tokens."""

    name: str = "squad"
    subpaths: tuple[str, ...] = ("squad/validation", "squad")
    settings: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 50})

    def read(self, records: Records, words: WithTokenizer) -> list[SquadQuestion]:
        """See `EvaluationTask.read`."""
        return [write_question(where, record) for where, record in records]

    def size(self, question: SquadQuestion) -> int:
        """See `EvaluationTask.size`."""
        return len(question.prompt)

    def group(self, question: SquadQuestion) -> str:
        """See `EvaluationTask.group`."""
        return ""

    def answer(self, backend: Backend, questions: Sequence[SquadQuestion]) -> Answered:
        """See `EvaluationTask.answer`."""
        prompts = [question.prompt for question in questions]
        limit = self.settings["max_new_tokens"]
        for batch in backend.generate(prompts, max_new_tokens=limit, stop_strings=("\n",)):
            rows = []
            for place, written in batch:
                question, answer = questions[place], written.text.strip()
                row = {
                    "correct": exact(answer, question.references),
                    "f1": f1(answer, question.references),
                    "predicted": answer,
                    "gold": list(question.references),
                    "ended_by": written.reason,
                    "prompt_truncated": written.prompt_truncated,
                    "prompt": question.prompt,
                }
                rows.append((place, row))
            yield rows

    def summarise(self, rows: Sequence[Row]) -> dict[str, Any]:
        """See `EvaluationTask.summarise`."""
        summary = accuracy_summary(rows)
        return {**summary, "f1": sum(row["f1"] for row in rows) / len(rows) if rows else None}


def write_question(where: str, record: Mapping[str, Any]) -> SquadQuestion:
    """Write the question of a record in SQuAD's form, or with `all_answers`, a list of texts.

    Raises:
        DataError: if something is missing.
    """
    title = f"Title: {record['title']}\n" if record.get("title") else ""
    context, question = text_of(where, record, "context").strip(), text_of(where, record, "question").strip()
    prompt = f"{title}Context: {context}\nQuestion: {question}\nAnswer:"
    references = _texts(record.get("all_answers")) or _texts(record.get("answers"))
    if not references:
        raise DataError(f"{where}: no reference answer. Write 'answers': {{'text': [...]}} or 'all_answers': [...].")
    return SquadQuestion(prompt, tuple(references))


def _texts(answers: Any) -> list[str]:
    """Return the texts of answers in any of their forms: a text, a list of these, or objects with "text"."""
    if isinstance(answers, str):
        return [answers]
    if isinstance(answers, Mapping):
        return _texts(answers.get("text"))
    if isinstance(answers, Sequence):
        texts = [text for answer in answers for text in _texts(answer)]
        return list(dict.fromkeys(texts))
    return []
