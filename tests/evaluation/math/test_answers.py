"""Every rule for answers on cases written by hand, properties for any text, and the gold answers of the real sets."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colm_ds.errors import ConfigError
from colm_ds.evaluation.math import answers
from colm_ds.evaluation.math.answers import extract, from_printed, is_correct, normal_answer, program_of
from colm_ds.evaluation.math.answers_latex import equal_values, normal_latex

NUMBER_TASKS = ("gsm8k", "svamp", "mathematics", "simuleq")
tasks = st.sampled_from(answers.TASKS)
# Any text, and text put together from what the rules look for.
parts = st.sampled_from(
    [
        *(
            "####",
            "The answer is",
            "the answer is ",
            "=",
            "\n\n",
            "\n",
            ",",
            ".",
            "/",
            "-",
            "1",
            "07",
            ".5",
            "1e-5",
            "A",
        ),
        *(
            "\\boxed{",
            "\\frac",
            "\\sqrt",
            "{",
            "}",
            "\\text{ cm}",
            "\\text{",
            "x=",
            "$",
            "%",
            " ",
            "\\!",
            "\\\\",
            "\\left",
        ),
        *("^\\circ", "May", "a", "print(", "```", "### Instruction", "٣", "\x00", "\ud800", "9" * 50),
    ]
)
texts = st.one_of(st.text(), st.lists(parts, max_size=12).map("".join))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # The last trigger, and what follows it.
        ("2 apples and 3 pears.\n#### 5", "5"),
        ("The answer is 7", "7"),
        ("The answer is 7.", "7"),
        ("#### 5 but no: The answer is 6", "6"),
        ("The answer is 6\n#### 5", "5"),
        # A trigger more than once: the text before the first blank line.
        ("The answer is 3.\n\nQuestion 2\nThe answer is 4.", "3"),
        ("The answer is 3.\n \t\nQuestion 2\nThe answer is 4.", "3"),
        ("\n\nThe answer is 3.\nThe answer is 4.\n\nThe answer is 5.", "4"),
        ("#### 3\n\n#### 4", "3"),
        # Once each: nothing is cut.
        ("#### 3\n\nThe answer is 4", "4"),
        ("one\n\ntwo\n\nThe answer is 4", "4"),
        # What follows the last "=".
        ("The answer is 2 + 3 = 5", "5"),
        ("The answer is x = 4 = 5 apples and 6 pears", "5"),
        ("so 10 - 4 = 6 and 6 + 1 = 7", "7"),
        ("The answer is 5 =", ""),
        # Commas.
        ("The answer is 1,234,567 dollars", "1234567"),
        ("The answer is $70,000.00", "70000"),
        # The first number after a trigger, else the last one.
        ("The answer is 5 apples and 6 pears", "5"),
        ("5 apples and 6 pears", "6"),
        # Numbers without trailing zeros, whole ones as integers.
        ("The answer is 12.50", "12.5"),
        ("The answer is 18.0", "18"),
        ("The answer is 18.", "18"),
        ("The answer is -0.0", "0"),
        ("The answer is 100", "100"),
        ("The answer is 007", "7"),
        ("The answer is -3.10", "-3.1"),
        ("The answer is 123456789012345678901234567890", "123456789012345678901234567890"),
        ("The answer is [3, 5]", "3"),
        ("The answer is 10-3", "10"),
        ("it is 10-3", "-3"),
        # Fractions stay; a trailing "." then "/" goes.
        ("The answer is 3/4", "3/4"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is 3/", "3"),
        ("The answer is 3/.", "3"),
        ("The answer is 3/x", "3"),
        # As Python prints very small and very large numbers.
        ("The answer is 1e-05", "0.00001"),
        ("The answer is -1.25e-07", "-0.000000125"),
        ("The answer is 1.5e+16", "15000000000000000"),
        # No answer.
        ("", ""),
        ("The answer is ", ""),
        ("The answer is None", ""),
        ("I do not know.", ""),
        # Triggers are written as they are written.
        ("the answer is 5, not 6", "6"),
    ],
)
@pytest.mark.parametrize("task", NUMBER_TASKS)
def test_numbers(task: str, text: str, answer: str) -> None:
    assert extract(task, text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is A", "A"),
        ("The answer is (B).", "B"),
        ("The answer is B) tree 3", "B"),
        ("Options A and B. The answer is D or E", "D"),
        ("Neither A nor B but C", "C"),
        ("The answer is a tree of 5 m", "5"),  # the English article
        ("a dog has 4 legs", "4"),
        ("The answer is F", ""),
        ("The answer is AB 5", "5"),
        ("The answer is 1,536.0", "1536"),
        ("The answer is x = 4.170", "4.17"),
        ("The answer is August", "August"),
        ("The answer is Friday.", "Friday"),
        ("The answer is August 5", "5"),
        ("The answer is blue", ""),
    ],
)
def test_numglue(text: str, answer: str) -> None:
    assert extract("numglue", text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5", "5"),
        ("So the answer is $5$.", "5"),
        ("The answer is 4. No, the answer is 5.", "5"),
        ("The answer is: 5", "5"),
        ("\\boxed{4} and The answer is 5", "5"),
        ("The answer is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("The answer is 5\n\nQuestion: what is 7?", "5"),
        ("The answer is\n\\[ 5 \\]", "5"),
        ("The answer is 3/", "3"),
        ("The answer is ", ""),
        ("thus \\boxed{\\sqrt{\\frac{1}{2}}} as {x}", "\\sqrt{\\frac{1}{2}}"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{3\nmore", "3"),
        ("$\\boxed 7$ here", "7"),
        ("we get 3, then -4.5 in all", "-4.5"),
        ("we get 15,000 in all", "15,000"),
        ("nothing", ""),
    ],
)
def test_math_extraction(text: str, answer: str) -> None:
    assert extract("math", text) == answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("( 1 ,\n 2 )", "(1,2)"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("\\leftarrow", "\\leftarrow"),
        ("\\$15,\\!000", "15,000"),
        ("90^\\circ", "90"),
        ("90^{\\circ}", "90"),
        ("$44\\%$", "44"),
        ("5\\text{ cm}", "5"),
        ("1599 \\text{ dollars}", "1599"),
        ("90\\text{ square\nunits}", "90"),
        ("864 \\mbox{ inches}^2", "864"),
        ("\\text{Navin}", "\\text{Navin}"),
        ("\\text{ red}", "\\text{red}"),
        ("3 \\text{ or } 4", "3\\text{or}4"),
        ("\\tfrac{10}{3}", "\\frac{10}{3}"),
        ("\\dfrac{3}{7}", "\\frac{3}{7}"),
        ("\\cfrac{25}{16}", "\\frac{25}{16}"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("x \\le .25", "x\\le0.25"),
        ("x = 4", "4"),
        ("x_1=4", "x_1=4"),
        ("y = 2x + 3", "2x+3"),
        ("4x-5y=-50", "4x-5y=-50"),
        ("a=b=c", "a=b=c"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("10\\sqrt 2", "10\\sqrt{2}"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\frac{1}2", "\\frac{1}{2}"),
        ("-\\frac1{2x}", "-\\frac{1}{2x}"),
        ("\\frac{\\sqrt6}3", "\\frac{\\sqrt{6}}{3}"),
        ("\\frac\\pi4", "\\frac{\\pi}{4}"),
        ("\\frac{\\frac12}3", "\\frac{\\frac{1}{2}}{3}"),
        ("3/4", "\\frac{3}{4}"),
        ("-3/4", "-\\frac{3}{4}"),
        ("a/b", "a/b"),
        ("\\begin{pmatrix} 11 \\\\ -36 \\end{pmatrix}", "\\begin{pmatrix}11\\\\-36\\end{pmatrix}"),
        ("5.", "5"),
    ],
)
def test_latex_normal_form(text: str, normal: str) -> None:
    assert normal_latex(text) == normal


@pytest.mark.parametrize(
    ("predicted", "gold", "right"),
    [
        ("\\frac{1}{2}", "\\dfrac12", True),
        ("12.3", "12", True),  # a whole gold answer: the rounded prediction
        ("11.5", "12", True),
        ("12.6", "12", False),
        ("2.5", "2", True),  # halves to even, as Python's round
        ("0.52", "0.5", True),  # else 4% of the gold answer
        ("0.521", "0.5", False),
        ("-0.5", "0.5", False),
        ("0.5", "\\frac{1}{2}", True),
        ("\\frac{-1}{2}", "-\\frac{1}{2}", True),
        ("\\frac{5}{3}", "2", False),  # a fraction is exact as it stands
        ("\\frac{4}{2}", "2", True),
        ("15000", "\\$15,\\!000", True),
        ("1e-05", ".00001", True),
        ("\\frac{1}{0}", "5", False),
        ("nan", "5", False),
        ("inf", "5", False),
        ("five", "5", False),
        ("", "5", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "5", False),
    ],
)
def test_math_comparison(predicted: str, gold: str, right: bool) -> None:
    assert is_correct("math", predicted, gold) is right


@pytest.mark.parametrize(
    ("task", "predicted", "gold", "right"),
    [
        ("gsm8k", "18", "18", True),
        ("gsm8k", "18", "18.0", True),
        ("gsm8k", "18.1", "18", False),
        ("gsm8k", "1234", "1,234", True),
        ("mathematics", "1363", "1363.0", True),
        ("mathematics", "3", "[3, 5]", True),  # the gold answer is read like a prediction: its first number
        ("simuleq", "583.3333", "583.3333", True),
        ("numglue", "B", "B", True),
        ("numglue", "b", "B", False),
        ("numglue", "", "Friday", False),
        ("numglue", "Friday", "Friday", True),
        ("svamp", "", "", False),
    ],
)
def test_comparison(task: str, predicted: str, gold: str, right: bool) -> None:
    assert is_correct(task, predicted, gold) is right


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1\nprint(x)", "x = 1\nprint(x)\n"),
        ("The answer is 5", None),
        ("print(1)\n\n### Instruction:\nprint(2)", "print(1)\n"),
        ("words\n### Instruction:\nprint(2)", None),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("Here:\n```python\nprint(1)\n```\nIt prints 1.", "print(1)\n"),
        ("```\nx = 1\n```\nthen\n```py\nprint(x)\n```\n```\nprint(9)\n```", "x = 1\nprint(x)\n"),
        ("```python\nprint(1)", "print(1)\n"),
        ("print(1)\n```", "print(1)\n"),
        ("```print(1)", None),
        ("x = 1\n```\n\n```\nprint(x)", "x = 1\nprint(x)\n"),
    ],
)
def test_program_of(text: str, program: str | None) -> None:
    assert program_of(text) == program


def test_stop_strings_and_printed_answers() -> None:
    for word in ("Question", "USER", "ASSISTANT", "Instruction", "Response"):
        assert {word, f"{word}:"} <= set(answers.STOP_STRINGS)
    assert "### Instruction" in answers.STOP_STRINGS
    assert from_printed("5\n") == "The answer is 5"
    assert extract("gsm8k", from_printed("")) == ""


def test_unknown_task() -> None:
    for call in (lambda: extract("gsm9k", "5"), lambda: is_correct("gsm9k", "5", "5")):
        with pytest.raises(ConfigError, match="gsm8k"):
            call()


@given(task=tasks, text=texts, other=texts)
def test_no_text_raises(task: str, text: str, other: str) -> None:
    found = extract(task, text)
    assert isinstance(found, str)
    assert isinstance(is_correct(task, found, other), bool)
    assert isinstance(is_correct(task, other, text), bool)
    program = program_of(text)
    assert program is None or "print(" in program


@given(task=tasks, text=texts)
@example(task="math", text="\\frac{")
@example(task="gsm8k", text="3/.5")
@example(task="gsm8k", text="00/")
def test_an_answer_equals_itself_and_stays_as_it_is(task: str, text: str) -> None:
    assert is_correct(task, text, text) is bool(normal_answer(task, text))
    found = extract(task, text)
    assert normal_answer(task, found) == found
    assert not found or is_correct(task, found, found)


@given(task=tasks, number=st.integers(-(10**30), 10**30))
def test_a_printed_whole_number_is_found(task: str, number: int) -> None:
    for text in (from_printed(f"{number}\n"), f"so we have 7 + {number}", from_printed(f"{number}.0")):
        found = extract(task, text)
        assert Decimal(found.rpartition("+")[2]) == number
        assert is_correct(task, found, str(number))


@given(task=tasks, number=st.floats(allow_nan=False, allow_infinity=False))
def test_a_printed_number_is_found(task: str, number: float) -> None:
    found = extract(task, from_printed(repr(number)))
    assert Decimal(found) == Decimal(repr(number))
    assert is_correct(task, found, repr(number))


@given(number=st.integers(-(10**6), 10**6), other=st.integers(-(10**6), 10**6))
def test_different_whole_numbers_differ(number: int, other: int) -> None:
    for task in answers.TASKS:
        assert is_correct(task, str(number), str(other)) is (number == other)


@given(gold=st.decimals(-1000, 1000, places=2), share=st.decimals(-1, 1, places=3))
def test_tolerance(gold: Decimal, share: Decimal) -> None:
    if gold != gold.to_integral_value() and abs(abs(share) - Decimal("0.04")) > Decimal("0.0005"):
        assert equal_values(f"{gold + gold * share:f}", f"{gold:f}") is (abs(share) < Decimal("0.04"))


@pytest.mark.parametrize("task", answers.TASKS)
def test_gold_answers_of_the_real_sets(task: str, shared_data: Path) -> None:
    """A model that writes the gold answer, or a program that prints it, is right on every question."""
    path = shared_data / "math_eval" / f"{task}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        golds = [json.loads(line)["answer"] for line in file]
    for gold in golds:
        normal = normal_answer(task, gold)
        assert normal
        assert normal_answer(task, normal) == normal
        assert is_correct(task, normal, gold)
        for text in (from_printed(gold), f"First 3 + 4 = 7.\nThe answer is {gold}.", f"#### {gold}"):
            if task != "math" or "####" not in text:
                assert is_correct(task, extract(task, text), gold), (gold, text)
        if task == "math":
            assert is_correct(task, extract(task, f"We find $\\boxed{{{gold}}}$ so."), gold)
    wrong = sum(is_correct(task, normal_answer(task, golds[index - 1]), gold) for index, gold in enumerate(golds))
    assert wrong < 0.35 * len(golds)  # neighbours agree by chance only (numglue: every second letter)
