r"""Normalise LaTeX answers that mean the same (MATH), and compare them as numbers."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_EVEN, Decimal

TOLERANCE = Decimal("0.04")  # of the gold answer, where that is not a whole number
_MAX_DIGITS = 400

# A row break is matched first so that its second backslash is not taken for the start of "\ " or "\(".
_NO_MEANING = re.compile(
    r"(?P<row>\\\\)|\\[!,;: \[\]()]|\\(?:left|right|displaystyle)(?![A-Za-z])"
    r"|\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|°|\\?\$|\\?%|\s"
)
_UNITS = re.compile(r"\\(?:text|mbox)\s*\{\s[^{}]*(?:\}\s*(?:\^\s*(?:\d|\{\s*\d\s*\})\s*)?)?[.$\s]*\Z")
_SHORT_LEFT_SIDE = re.compile(r"(?:[A-Za-z]\w?)?=([^=]+)", re.ASCII)
_ARGUMENT = re.compile(r"[0-9A-Za-z]|\\[A-Za-z]+")
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(rf"-?{_PLAIN}", re.ASCII)
_FRACTION = re.compile(rf"(-?)\\frac\{{(-?{_PLAIN})\}}\{{(-?{_PLAIN})\}}", re.ASCII)


def normal_latex(text: str) -> str:
    r"""Return the normal form of a LaTeX answer; answers with the same form count as equal.

    Without spaces, `\left` and `\right`, `\!` and other spacing, degree, dollar and percent signs, units at the right
    (`5\text{ cm}`), a final full stop and a short left side (`x=5`); `\tfrac`, `\dfrac` and `\cfrac` become `\frac`,
    `.5` becomes `0.5`, `\sqrt3` becomes `\sqrt{3}`, `\frac12` becomes `\frac{1}{2}` and `a/b` becomes `\frac{a}{b}`.

    Args:
        text: a LaTeX expression, any text.

    Returns:
        The normal form; the normal form of a normal form is itself, unless removals nest deeper than ten times.
    """
    for _ in range(10):  # a removal may join the parts of the next one
        before, text = text, _normal_step(text)
        if text == before:
            break
    return text


def _normal_step(text: str) -> str:
    units = _UNITS.search(text)
    if units and text[: units.start()].strip():
        text = text[: units.start()]
    text = _NO_MEANING.sub(lambda match: match["row"] or "", text)
    text = re.sub(r"\\[tdc]frac(?![A-Za-z])", r"\\frac", text.removesuffix("."))
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    short = _SHORT_LEFT_SIDE.fullmatch(text)
    if short:
        text = short[1]
    text = re.sub(r"\\sqrt([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = _braced_fractions(text)
    return re.sub(r"\A(-?)(\d+)/(\d+)\Z", r"\1\\frac{\2}{\3}", text)


def _braced_fractions(text: str) -> str:
    r"""Put braces around both arguments of `\frac12`, `\frac{1}2` and `\frac1{2}`."""
    pieces = text.split("\\frac")
    done = pieces[-1]
    for piece in reversed(pieces[:-1]):
        arguments: list[str] = []
        rest = done
        while len(arguments) < 2:
            end = closing_brace(rest) if rest.startswith("{") else None
            match = _ARGUMENT.match(rest)
            if end is not None:
                arguments.append(rest[: end + 1])
                rest = rest[end + 1 :]
            elif match and not rest.startswith(("\\frac", "\\sqrt")):
                arguments.append(f"{{{match[0]}}}")
                rest = rest[match.end() :]
            else:
                break
        done = piece + "\\frac" + ("".join(arguments) + rest if len(arguments) == 2 else done)
    return done


def closing_brace(text: str) -> int | None:
    """Return the index of the brace that closes the one at the start of `text`, or None."""
    depth = 0
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    return None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, up to the end of its line if it is not closed, or None."""
    _, boxed, rest = text.rpartition("\\boxed")
    if not boxed:
        return None
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return re.split(r"[$\n]", rest, maxsplit=1)[0]
    end = closing_brace(rest)
    return rest[1:end] if end is not None else rest[1:].partition("\n")[0]


def equal_values(predicted: str, gold: str) -> bool:
    r"""Return whether two answers in normal form are numbers that agree: `12`, `1,250.5`, `1e-05`, `\frac{3}{4}`.

    A whole gold answer must equal the rounded prediction; for any other the tolerance is 4%. A prediction written as a
    fraction is exact and not rounded.

    Args:
        predicted: normal form of the prediction.
        gold: normal form of the gold answer.

    Returns:
        False also if one of them is not a number.
    """
    value, target = _value(predicted), _value(gold)
    if value is None or target is None:
        return False
    if target == target.to_integral_value() and "\\" not in gold:
        return target == (value if "\\" in predicted else value.to_integral_value(ROUND_HALF_EVEN))
    return abs(value - target) <= TOLERANCE * abs(target)


def _value(text: str) -> Decimal | None:
    if len(text) > _MAX_DIGITS:
        return None
    if _NUMBER.fullmatch(text):
        return Decimal(text.replace(",", ""))
    fraction = _FRACTION.fullmatch(text)
    if not fraction:
        return None
    top, bottom = (Decimal(part.replace(",", "")) for part in fraction.groups()[1:])
    if not bottom:
        return None
    return -top / bottom if fraction[1] else top / bottom
