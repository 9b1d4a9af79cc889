"""Rows of every schema become the example that they say, and each fault is named with its cure."""

from __future__ import annotations

import json
from typing import Any

import pytest

from colm_ds.data.prompt import PROMPT_TEMPLATE
from colm_ds.data.schemas import (
    SCHEMAS,
    Completion,
    Conversation,
    RowError,
    Schema,
    Text,
    check_style,
    read_sample,
    recognise,
)
from colm_ds.errors import ConfigError

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Count."}

ROWS: dict[str, tuple[dict[str, Any], Conversation | Completion | Text]] = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, Conversation((SYSTEM, USER, ANSWER), (False, False, True))),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Count."},
        Conversation((SYSTEM, USER, ANSWER), (False, False, True)),
    ),
    "alpaca": ({"instruction": "2+2?", "output": "4"}, Completion(PROMPT_TEMPLATE.format(instruction="2+2?"), "4")),
    "prompt_completion": ({"prompt": "2+2=", "completion": "4"}, Completion("2+2=", "4")),
    "text": ({"text": "2+2=4"}, Text("2+2=4")),
}


def read(row: dict[str, Any], schema: Schema | None = None, prompt: str = "auto") -> Any:
    schema = schema or recognise("file", [row])
    return read_sample(row, schema, check_style(schema, prompt, [row]))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_schema_is_recognised_and_read(schema: Schema) -> None:
    row, expected = ROWS[schema]
    assert recognise("file", [row]) == schema
    assert read(row) == expected
    assert read({**row, "id": 7, "tools": None}) == expected


@pytest.mark.parametrize("one", SCHEMAS)
@pytest.mark.parametrize("other", SCHEMAS)
def test_two_schemas_are_asked_about(one: Schema, other: Schema) -> None:
    rows = ROWS[one][0], ROWS[other][0]
    if one == other:
        assert recognise("file", rows) == one
        return
    for both in ([rows[0] | rows[1]], list(rows)):
        with pytest.raises(ConfigError, match=r"file: its rows can be read as .* and .*`schema: ") as caught:
            recognise("file", both)
        assert f"schema: {one}" in str(caught.value)
        assert f"schema: {other}" in str(caught.value)
    empty = dict.fromkeys(rows[1])
    assert recognise("file", [empty | rows[0]]) == one  # as in a table with the columns of both


def test_no_schema() -> None:
    with pytest.raises(ConfigError, match=r"keys 'question', 'answer', which no schema has.*alpaca: instr"):
        recognise("file", [{"question": "a", "answer": "b"}])


def test_alpaca_with_all_of_its_keys() -> None:
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "Count.", "history": [["Hi", "Hello"]]}
    assert read(row, prompt="chat") == Conversation(
        (
            SYSTEM,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Add.\n\n2 and 2"},
            ANSWER,
        ),
        (False, False, True, False, True),
    )
    with pytest.raises(RowError, match=r"'history' has no place.*prompt: chat(.|\n)*'system' has no place"):
        read(row)
    short = {"instruction": "Add.", "input": "2 and 2", "output": "4", "system": "", "history": []}
    prompt = read(short).prompt
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:")
    own = "{system} Q: {instruction} ({input}) A: {{}}"
    assert read(row | {"history": None}, prompt=own).prompt == "Count. Q: Add. (2 and 2) A: {}"
    with pytest.raises(RowError, match="'input' has no place in the template of prompts"):
        read(short, prompt="Q: {instruction}")
    assert read({**short, "input": "{x}", "instruction": "{0}"}, prompt="{instruction}{input}").prompt == "{0}{x}"


def test_prompts_with_completions() -> None:
    row = ROWS["prompt_completion"][0]
    assert read(row, prompt="Q: {prompt}\nA:") == Completion("Q: 2+2=\nA:", "4")
    assert read(row, prompt="chat").messages == ({"role": "user", "content": "2+2="}, ANSWER)
    lists = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert read(lists) == Conversation((USER, ANSWER, USER, ANSWER), (False, False, False, True))
    with pytest.raises(RowError, match="'prompt' is a list of messages"):
        read(lists, prompt="plain")


@pytest.mark.parametrize(
    ("schema", "prompt", "message"),
    [
        ("messages", "alpaca", "no style of messages. Write 'chat'"),
        ("text", "{text}", "no style of text. Write 'plain'"),
        ("alpaca", "plain", "no style of alpaca. Write 'alpaca' or 'chat', or a template with {instruction}, {input}"),
        ("alpaca", "{question}", "names question. Name instruction"),
        ("alpaca", "{input}", "names input. Name instruction"),
        ("alpaca", "{instruction.__class__}", "Name instruction"),
        ("alpaca", "{instruction", "Write {{ and }}"),
        ("prompt_completion", "{}", "Name prompt"),
    ],
)
def test_styles_that_do_not_fit(schema: Schema, prompt: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_style(schema, prompt)
    assert message in str(caught.value)


def test_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert read({"messages": [{"role": "user", "content": parts}, ANSWER]}) == read({"messages": [USER, ANSWER]})


def test_lists_as_json() -> None:
    """As a CSV file has them."""
    for schema, key in (("messages", "messages"), ("sharegpt", "conversations")):
        row, expected = ROWS[schema]
        assert read(row | {key: json.dumps(row[key])}) == expected
    row = {"instruction": "a", "output": "b", "history": '[["c", "d"]]', "input": "", "system": ""}
    assert len(read(row, prompt="chat").messages) == 4


def test_weights_and_columns_of_tables() -> None:
    silent = ANSWER | {"weight": 0, "tool_calls": None, "name": None}
    assert read({"messages": [USER, silent, USER, ANSWER | {"weight": 1}]}).trained == (False, False, False, True)
    assert read({"messages": [USER, ANSWER | {"tool_calls": None}]}).messages == (USER, ANSWER)


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": turns("user", "user", "assistant")}, "message 2 is of the user, after one of the user"),
        ({"messages": turns("assistant", "user")}, "message 1 is of the assistant, at the beginning"),
        ({"messages": turns("user", "system", "assistant")}, "message 2 is of the system, after one of the user"),
        ({"messages": turns("user", "assistant", "assistant")}, "message 3 is of the assistant"),
        ({"messages": turns("user", "tool", "assistant")}, "message 2 is of the tool, after one of the user"),
        ({"messages": turns("user", "assistant", "user")}, "the last message is of the user. End with the assistant's"),
        ({"messages": []}, "a conversation without messages"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2, of the assistant, is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: its content is of type NoneType"),
        ({"messages": [USER, {"role": "bot", "content": "4"}]}, "message 2: role = 'bot'. Write one of 'system'"),
        ({"messages": [USER, "4"]}, "message 2 is of type str. Write {role: ..., content: ...}"),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "message 2: weight = 0.5. Write 0"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "no message of the assistant is trained on"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "a part of type 'image_url'"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "message 2 holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "whose 'text' is of type NoneType"),
        ({"messages": [USER, ANSWER | {"tool_calls": "f(1)"}]}, "message 2: 'tool_calls' is not a list of objects"),
        ({"messages": [USER, ANSWER | {"tool_calls": ["f"]}]}, "message 2: 'tool_calls' is not a list of objects"),
        ({"messages": [{"from": "human", "value": "x"}]}, "'from' and 'value' belong in a list 'conversations'"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"function": "f"}]}]}, "'tool_calls' is not a list of objects"),
        ({"messages": "2+2?"}, "'messages' is of type str, not a list"),
        ({"messages": "[{]"}, "'messages' is a text that is no JSON list"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "'tools' holds something else than objects"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "message 1: from = 'robot'. Write one of 'human'"),
        (
            {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]},
            "message 1: its content is of type None",
        ),
        ({"instruction": "a", "output": ["b"]}, "'output' is of type list, not text"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "'input' is a list. Write one text"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input' is of type int, not text"),
        ({"prompt": [USER], "completion": "4"}, "'prompt' is a list of messages, 'completion' a text. Write both"),
        ({"prompt": "2+2?", "completion": [ANSWER]}, "'completion' is a list of messages, 'prompt' a text. Write both"),
        ({"prompt": " ", "completion": "4"}, "example with an empty prompt"),
        ({"text": ""}, "example with an empty text"),
    ],
)
def test_faults_of_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        read(row)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_faults_of_a_history() -> None:
    row = {"instruction": "a", "output": "b", "history": [["c"], ["d", "e"]]}
    with pytest.raises(RowError, match=r"entry 1 of 'history' is no pair of texts. Write \[question, answer\]"):
        read(row, prompt="chat")
    with pytest.raises(RowError, match="entry 1 of 'history' holds half of a surrogate pair"):
        read(row | {"history": [["c \ud83d", "d"]]}, prompt="chat")


def test_every_fault_of_a_row_is_named() -> None:
    with pytest.raises(RowError) as caught:
        read({"messages": [{"role": "x", "content": "a"}, {"role": "user", "content": ""}, ANSWER]})
    assert len(caught.value.problems) == 2
