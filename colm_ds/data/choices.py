"""Classification as multiple choice: SST-2, CB, MultiRC, WiC, COPA, RTE, BoolQ with MeZO's prompts (TASKS.md).

Training and evaluation take prompts and candidates from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colm_ds.data.formats import read_place
from colm_ds.data.records import label_of, text_of
from colm_ds.errors import DataError, Problems

YES_NO = (("entailment", 0), ("not_entailment", 1), ("0", 0), ("1", 1), (0, 0), (1, 1))


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt and its candidate continuations.

    Attributes:
        prompt: without a space at the end.
        candidates: each with the space that separates it from the prompt.
        gold: index of the correct one.
    """

    prompt: str
    candidates: tuple[str, ...]
    gold: int


def write_sst2(where: str, record: Mapping[str, Any]) -> ChoiceQuestion:
    """Write `{sentence} It was`, followed by terrible or great."""
    prompt = f"{text_of(where, record, 'sentence').strip()} It was"
    labels = {0: 0, 1: 1, "0": 0, "1": 1, "negative": 0, "positive": 1}
    return ChoiceQuestion(prompt, (" terrible", " great"), label_of(where, record, labels))


def write_cb(where: str, record: Mapping[str, Any]) -> ChoiceQuestion:
    """Ask whether the premise implies the hypothesis: Yes, No or Maybe."""
    premise, hypothesis = text_of(where, record, "premise"), text_of(where, record, "hypothesis")
    prompt = f'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
    labels = {"entailment": 0, "contradiction": 1, "neutral": 2, 0: 0, 1: 1, 2: 2}
    return ChoiceQuestion(prompt, ("Yes", "No", "Maybe"), label_of(where, record, labels))


def write_multirc(where: str, record: Mapping[str, Any]) -> ChoiceQuestion:
    """Ask whether an answer to a question on a paragraph is correct: No or Yes."""
    paragraph, question = text_of(where, record, "paragraph"), text_of(where, record, "question")
    answer = text_of(where, record, "answer")
    prompt = f'{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n'
    return ChoiceQuestion(prompt, ("No", "Yes"), label_of(where, record, {0: 0, 1: 1, "0": 0, "1": 1}))


def write_wic(where: str, record: Mapping[str, Any]) -> ChoiceQuestion:
    """Ask whether a word means the same in two sentences: No or Yes."""
    word = text_of(where, record, "word")
    first, second = text_of(where, record, "sentence1"), text_of(where, record, "sentence2")
    prompt = f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{first}\n{second}\n'
    return ChoiceQuestion(prompt, ("No", "Yes"), label_of(where, record, {False: 0, True: 1, "F": 0, "T": 1}))


def write_copa(where: str, record: Mapping[str, Any]) -> ChoiceQuestion:
    """Write the premise without its full stop, so or because, and one of two choices."""
    joins = {"effect": " so", "cause": " because"}
    kind = text_of(where, record, "question")
    if kind not in joins:
        raise DataError(f"{where}: 'question' is {kind!r}. Write 'cause' or 'effect'.")
    prompt = text_of(where, record, "premise").rstrip().removesuffix(".") + joins[kind]
    choices = tuple(f" {_lower_first(text_of(where, record, key))}" for key in ("choice1", "choice2"))
    return ChoiceQuestion(prompt, choices, label_of(where, record, {0: 0, 1: 1, "0": 0, "1": 1}))


def write_rte(where: str, record: Mapping[str, Any]) -> ChoiceQuestion:
    """Ask whether the hypothesis follows: Yes or No (MeZO's prompt; TASKS.md names none)."""
    premise, hypothesis = text_of(where, record, "premise"), text_of(where, record, "hypothesis")
    prompt = f'{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n'
    return ChoiceQuestion(prompt, ("Yes", "No"), label_of(where, record, dict(YES_NO)))


def write_boolq(where: str, record: Mapping[str, Any]) -> ChoiceQuestion:
    """Ask a question on a passage: No or Yes (MeZO's prompt; TASKS.md names none)."""
    question = text_of(where, record, "question").strip()
    question = question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
    prompt = f"{text_of(where, record, 'passage')} {question}\n"
    key = "label" if "label" in record else "answer"
    return ChoiceQuestion(prompt, ("No", "Yes"), label_of(where, record, {False: 0, True: 1}, key))


def _lower_first(choice: str) -> str:
    """Return a choice that continues a sentence: its first letter lower-case, unless its first word is "I"."""
    choice = choice.strip()
    first = choice.split(" ")[0].split("'")[0]
    return choice if first == "I" else choice[:1].lower() + choice[1:]


WRITERS = {
    "sst2": write_sst2,
    "cb": write_cb,
    "multirc": write_multirc,
    "wic": write_wic,
    "copa": write_copa,
    "rte": write_rte,
    "boolq": write_boolq,
}
"""Function that writes a record of each set as a question."""

MAX_PROBLEMS = 20
"""Problems that are shown of one place."""


def read_questions(task: str, place: Path | str, split: str) -> list[ChoiceQuestion]:
    """Read the questions of all records of a place.

    Args:
        task: one of `WRITERS`.
        place: a file or hub name from `find_places`.
        split: default split of a hub name.

    Raises:
        DataError: if it cannot be read, or with up to 20 problems of its records.
    """
    problems = Problems(str(place))
    questions = []
    for where, record in read_place(place, split):
        try:
            questions.append(WRITERS[task](where, record))
        except DataError as error:
            problems.messages.append(str(error))
            if len(problems.messages) == MAX_PROBLEMS:
                problems.where += f" (stopped reading after {MAX_PROBLEMS})"
                break
    problems.raise_if_any(DataError)
    return questions
