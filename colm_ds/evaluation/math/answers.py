"""Extract the answer from a model's text and compare answers, by the rules of the MAmmoTH protocol.

Pure functions of text; none raises on any text. Three forms that the protocol's rules do not cover are read as well:
numbers with an exponent, as Python prints them (`1e-05`), months and weekdays in NumGLUE (three gold answers of 1,042),
and "The answer is:" with a colon in MATH.
"""

from __future__ import annotations

import re

from colm_ds.errors import ConfigError
from colm_ds.evaluation.math.answers_latex import equal_values, last_boxed, normal_latex

TASKS = ("gsm8k", "svamp", "mathematics", "simuleq", "numglue", "math")
TRIGGERS = ("####", "The answer is")
STOP_STRINGS: tuple[str, ...] = (
    *("Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT"),
    *("Instruction:", "Instruction", "Response:", "Response", "### Instruction"),
)

_ANY_TRIGGER = re.compile("|".join(map(re.escape, TRIGGERS)))
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_NUMBER = re.compile(r"-?\d+/?\.?\d*|-?(?<![\d.])\.\d+", re.ASCII)
_WITH_EXPONENT = re.compile(r"(?<![\w.])(-?)(\d+)(?:\.(\d+))?[eE]([+-]?\d{1,3})(?![\w.]\d|\w)", re.ASCII)
_DECIMAL = re.compile(r"(-?)(\d*)(?:\.(\d*))?", re.ASCII)
_MINUS = str.maketrans("\u2212\u2010\u2011\uff0d\ufe63", "-----")
"""Minus signs of typography, which count as the keyboard's."""
_LETTER = re.compile(r"\b[A-E]\b")
_DAY_OR_MONTH = re.compile(
    r"\b(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|January|February|March|April|May|June|July|August|September"
    r"|October|November|December)\b"
)
_MATH_TRIGGER = re.compile(r"[Tt]he answer is(?:\s*:|(?=\s)|\Z)")
_LAST_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d*\.?\d+", re.ASCII)
_FENCE = re.compile(r"^[^\S\n]*```[^\n]*$", re.MULTILINE)


def extract(task: str, text: str) -> str:
    r"""Extract the answer in a model's text.

    gsm8k, svamp, mathematics, simuleq: if a trigger ("####", "The answer is") occurs more than once, only the text
    before the first blank line counts. Of what follows the last trigger, and then the last "=", without commas: the
    first number, or the last one if there was no trigger. numglue: a stand-alone capital A to E first, then as above.
    math: what follows the last "The answer is", else the last `\boxed{...}`, else the last number, in normal form.

    Args:
        task: one of `TASKS`.
        text: the model's text, or `from_printed` of its program's output.

    Returns:
        The answer; empty if there is none.

    Raises:
        ConfigError: for an unknown task.
    """
    _check_task(task)
    text = text.translate(_MINUS)
    if task == "math":
        return _extract_math(text)
    text = text.strip("\n")
    if any(text.count(trigger) > 1 for trigger in TRIGGERS):
        text = _BLANK_LINE.split(text, maxsplit=1)[0]
    pieces = _ANY_TRIGGER.split(text)
    triggered, text = len(pieces) > 1, pieces[-1]
    matches = _LETTER.findall(text) if task == "numglue" else []
    if not matches:
        after = _WITH_EXPONENT.sub(_written_out, text.rpartition("=")[2].replace(",", ""))
        matches = [_plain_number(number.removesuffix(".").removesuffix("/")) for number in _NUMBER.findall(after)]
    if not matches and task == "numglue":
        matches = _DAY_OR_MONTH.findall(text)
    return matches[0 if triggered else -1] if matches else ""


def is_correct(task: str, predicted: str, gold: str) -> bool:
    """Return whether an extracted answer matches the gold one, after both are normalised.

    They match as equal strings; for math also as numbers that agree (`equal_values`).

    Args:
        task: one of `TASKS`.
        predicted: result of `extract`; an empty one is never correct.
        gold: the data set's answer, in its own form.

    Raises:
        ConfigError: for an unknown task.
    """
    predicted, gold = normal_answer(task, predicted), normal_answer(task, gold)
    if not predicted:
        return False
    return predicted == gold or (task == "math" and equal_values(predicted, gold))


def normal_answer(task: str, answer: str) -> str:
    """Normalise an answer for comparison, as if it had followed a trigger.

    Args:
        task: one of `TASKS`.
        answer: a gold answer, or an extracted one, which is left unchanged.

    Returns:
        The normal form. An answer in which the rules find nothing is only stripped.

    Raises:
        ConfigError: for an unknown task.
    """
    _check_task(task)
    if task == "math":
        return normal_latex(answer)
    return extract(task, f"{TRIGGERS[1]} {answer}") or answer.strip()


def program_of(text: str) -> str | None:
    """Return the program in a model's output, or None: text with a `print(` before any "### Instruction".

    Code fences are stripped: if the call of print is in a fenced block, the program is the fenced blocks up to that
    one, since the text around them is not Python.

    Args:
        text: the model's text.

    Returns:
        Python source, valid or not.
    """
    text = text.partition("### Instruction")[0]
    if "print(" not in text:
        return None
    pieces = _FENCE.split(text)  # outside, inside, outside, ...; a fence that is never closed ends with the text
    inside = pieces[1::2]
    for number, block in enumerate(inside):
        if "print(" in block:
            return "\n".join(piece.strip("\n") for piece in inside[: number + 1]) + "\n"
    program = "\n".join(piece.strip("\n") for piece in pieces if piece.strip()) + "\n"
    return program if "print(" in program else None  # the call may have been in the line of a fence


def from_printed(printed: str) -> str:
    """Return the answer text of a program: "The answer is " and its output."""
    return f"{TRIGGERS[1]} {printed.strip()}"


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ConfigError(f"task = {task!r}: no rules for its answers. Known: {', '.join(TASKS)}")


def _extract_math(text: str) -> str:
    triggers = list(_MATH_TRIGGER.finditer(text))
    if triggers:
        rest = text[triggers[-1].end() :].strip()
        boxed = last_boxed(rest)
        return _normal_math(boxed if boxed is not None else rest.partition("\n")[0])
    boxed = last_boxed(text)
    if boxed is not None:
        return _normal_math(boxed)
    numbers = _LAST_NUMBER.findall(text)
    return _normal_math(numbers[-1]) if numbers else ""


def _normal_math(answer: str) -> str:
    return normal_latex(answer.strip().removesuffix(".").removesuffix("/"))


def _plain_number(text: str) -> str:
    """Write a decimal number without redundant zeros, whole numbers as integers; leave fractions unchanged."""
    number = _DECIMAL.fullmatch(text)
    if not number:
        return text
    whole, part = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    sign = number[1] if whole != "0" or part else ""
    return f"{sign}{whole}.{part}" if part else sign + whole


def _written_out(match: re.Match[str]) -> str:
    """Write `1.5e-05` as `0.000015`."""
    sign, whole, part, exponent = match[1], match[2], match[3] or "", int(match[4])
    digits = "0" * -exponent + whole + part + "0" * exponent
    point = max(0, -exponent) + len(whole) + exponent
    return f"{sign}{digits[:point] or '0'}.{digits[point:]}"
