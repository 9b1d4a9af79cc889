"""From a model's text to its answer, and from two answers to right or wrong: the rules of the MAmmoTH protocol.

Pure functions of text; none raises, whatever the text is. Three forms that the protocol's rules do not foresee are
read as well: numbers with an exponent, as Python prints them (`1e-05`), months and weekdays in NumGLUE (three gold
answers of 1,042), and "The answer is:" with a colon in MATH.
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
_NUMBER = re.compile(r"-?\d+/?\.?\d*", re.ASCII)
_WITH_EXPONENT = re.compile(r"(?<![\w.])(-?)(\d+)(?:\.(\d+))?[eE]([+-]?\d{1,3})(?![\w.]\d|\w)", re.ASCII)
_DECIMAL = re.compile(r"(-?)(\d+)(?:\.(\d*))?", re.ASCII)
_LETTER = re.compile(r"\b[A-E]\b")
_DAY_OR_MONTH = re.compile(
    r"\b(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|January|February|March|April|May|June|July|August|September"
    r"|October|November|December)\b"
)
_MATH_TRIGGER = re.compile(r"[Tt]he answer is(?:\s*:|(?=\s)|\Z)")
_LAST_NUMBER = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d*\.?\d+", re.ASCII)
_FENCE = re.compile(r"^[^\S\n]*```[^\n]*$", re.MULTILINE)


def extract(task: str, text: str) -> str:
    r"""The answer in a model's text.

    gsm8k, svamp, mathematics, simuleq: if a trigger ("####", "The answer is") occurs more than once, only the text
    before the first blank line counts. Of what follows the last trigger, and then the last "=", without commas: the
    first number, or the last one if there was no trigger. numglue: a stand-alone capital A to E first, then as above.
    math: what follows the last "The answer is", else the last `\boxed{...}`, else the last number, in normal form.

    Args:
        task: one of `TASKS`.
        text: what the model wrote, or `from_printed` of what its program printed.

    Returns:
        The answer; empty if there is none.

    Raises:
        ConfigError: for an unknown task.
    """
    _check_task(task)
    if task == "math":
        return _extract_math(text)
    text = text.strip("\n")
    if any(text.count(trigger) > 1 for trigger in TRIGGERS):
        text = _BLANK_LINE.split(text, maxsplit=1)[0]
    pieces = _ANY_TRIGGER.split(text)
    triggered, text = len(pieces) > 1, pieces[-1]
    found = _LETTER.findall(text) if task == "numglue" else []
    if not found:
        after = _WITH_EXPONENT.sub(_written_out, text.rpartition("=")[2].replace(",", ""))
        found = [_plain_number(number.removesuffix(".").removesuffix("/")) for number in _NUMBER.findall(after)]
    if not found and task == "numglue":
        found = _DAY_OR_MONTH.findall(text)
    return found[0 if triggered else -1] if found else ""


def is_correct(task: str, predicted: str, gold: str) -> bool:
    """Whether an extracted answer is the gold one; both are brought to the same form first.

    Equal as strings; for math also where both are numbers that agree (`equal_values`).

    Args:
        task: one of `TASKS`.
        predicted: what `extract` gave; an empty one is never right.
        gold: the data set's answer, in its own form.

    Returns:
        Whether they agree.

    Raises:
        ConfigError: for an unknown task.
    """
    predicted, gold = normal_answer(task, predicted), normal_answer(task, gold)
    if not predicted:
        return False
    return predicted == gold or (task == "math" and equal_values(predicted, gold))


def normal_answer(task: str, answer: str) -> str:
    """An answer in the form in which answers are compared: as if it had followed a trigger.

    Args:
        task: one of `TASKS`.
        answer: a gold answer, or an extracted one, which stays as it is.

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
    """The program in a model's output, None if it wrote none: text with a `print(` before any "### Instruction".

    Code fences are stripped: where the call of print stands in a fenced block, only fenced blocks up to that one are
    the program, since what stands around them is not Python.

    Args:
        text: what the model wrote.

    Returns:
        Python source, or what the model takes for it.
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
    return program if "print(" in program else None  # the call may have stood in the line of a fence


def from_printed(printed: str) -> str:
    """The answer text of a program: "The answer is " and what it printed."""
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
    """A decimal number without zeros that say nothing, whole numbers as integers; a fraction stays as it is."""
    number = _DECIMAL.fullmatch(text)
    if not number:
        return text
    whole, part = number[2].lstrip("0") or "0", (number[3] or "").rstrip("0")
    sign = number[1] if whole != "0" or part else ""
    return f"{sign}{whole}.{part}" if part else sign + whole


def _written_out(match: re.Match[str]) -> str:
    """`1.5e-05` as `0.000015`."""
    sign, whole, part, exponent = match[1], match[2], match[3] or "", int(match[4])
    digits = "0" * -exponent + whole + part + "0" * exponent
    point = max(0, -exponent) + len(whole) + exponent
    return f"{sign}{digits[:point] or '0'}.{digits[point:]}"
