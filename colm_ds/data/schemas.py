"""Turn rows into examples: conversations, prompts with a completion, or plain texts. A schema says how.

| schema | keys of a row |
|---|---|
| `messages` | `messages`: `role` and `content` of each; `tools` |
| `sharegpt` | `conversations`: `from` and `value` of each; `system`, `tools` |
| `alpaca` | `instruction`, `output`; `input`, `system`, `history` |
| `prompt_completion` | `prompt`, `completion`: texts, or lists of messages |
| `text` | `text` |
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from colm_ds.data.prompt import PROMPT_TEMPLATE, PROMPT_WITH_INPUT
from colm_ds.errors import ConfigError, DataError
from colm_ds.untrusted.json_text import parse_json

Schema = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
SCHEMAS: tuple[Schema, ...] = get_args(Schema)

NEEDED: dict[Schema, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Keys without which a row is not of a schema."""

UNITS: dict[Schema, str] = {
    "messages": "conversations",
    "sharegpt": "conversations",
    "alpaca": "instructions",
    "prompt_completion": "prompts with completions",
    "text": "texts",
}
"""Names of the rows of a schema."""

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FIELDS: dict[Schema, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "system"),
    "prompt_completion": ("prompt",),
}
"""Keys that a template of one's own may name."""


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat.

    Attributes:
        messages: `role`, `content` and, where there are any, `tool_calls` and further keys, as a chat template reads
            them.
        trained: whether each message is trained on; only an assistant's can be.
        tools: descriptions of functions for the template; None: none.
    """

    messages: tuple[dict[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt as text, and what is trained on behind it."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Text:
    """A text that is trained on from its beginning to its end."""

    text: str


Sample = Conversation | Completion | Text


class RowError(DataError):
    """Problems of one row, each a sentence that says what to write instead; without the row's name."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def schemas_of(row: Mapping[str, Any]) -> list[Schema]:
    """Return the schemas whose needed keys a row has."""
    return [name for name in SCHEMAS if all(row.get(key) is not None for key in NEEDED[name])]


def recognise(place: str, rows: Iterable[Mapping[str, Any]]) -> Schema:
    """Return the one schema that rows have.

    Args:
        place: the file, for messages.
        rows: the first rows of it.

    Raises:
        ConfigError: if none fits, or more than one.
    """
    fitting: list[Schema] = []
    keys: dict[str, None] = {}
    for row in rows:
        fitting += [name for name in schemas_of(row) if name not in fitting]
        keys.update(dict.fromkeys(row))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        named = " and ".join(f"{name} ({', '.join(NEEDED[name])})" for name in fitting)
        advice = " or ".join(f"`schema: {name}`" for name in fitting)
        raise ConfigError(f"{place}: its rows can be read as {named}. Say which: {advice}.")
    known = "; ".join(f"{name}: {', '.join(NEEDED[name])}" for name in SCHEMAS)
    raise ConfigError(
        f"{place}: its rows have the keys {', '.join(map(repr, keys)) or '(none)'}, which no schema has. Rename them: "
        f"{known}."
    )


def check_style(schema: Schema, prompt: str, rows: Iterable[Mapping[str, Any]] = ()) -> str:
    """Return how the rows of a schema become prompts: `alpaca`, `chat`, `plain`, or a template of its keys in braces.

    Args:
        schema: of the rows.
        prompt: `auto`, one of these, or a template.
        rows: the first rows, which say whether prompts are texts or messages.

    Raises:
        ConfigError: if the schema has no such style, or the template names other keys.
    """
    styles = {
        "messages": ["chat"],
        "sharegpt": ["chat"],
        "alpaca": ["alpaca", "chat"],
        "prompt_completion": ["plain", "chat"],
        "text": ["plain"],
    }[schema]
    if prompt == "auto":
        is_chat = schema == "prompt_completion" and any(_holds_messages(row.get("prompt")) for row in rows)
        return "chat" if is_chat else styles[0]
    if prompt in styles:
        return prompt
    fields = _FIELDS.get(schema, ())
    choices = " or ".join(map(repr, styles))
    if "{" not in prompt or not fields:
        may = f", or a template with {', '.join(f'{{{name}}}' for name in fields)}" if fields else ""
        raise ConfigError(f"prompt = {prompt!r}: no style of {schema}. Write {choices}{may}.")
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise ConfigError(f"prompt = {prompt!r}: {error}. Write {{{{ and }}}} for braces of the text.") from None
    if not named or not named <= set(fields) or fields[0] not in named:
        raise ConfigError(
            f"prompt = {prompt!r}: names {', '.join(sorted(named)) or 'no key'}. Name {fields[0]}"
            + (f", and {' or '.join(fields[1:])} where the rows have them" if fields[1:] else "")
            + "; write {{ and }} for braces of the text."
        )
    return prompt


def read_sample(row: Mapping[str, Any], schema: Schema, style: str) -> Sample:
    """Turn a row into an example.

    Args:
        row: keys and values.
        schema: of the row.
        style: from `check_style`.

    Raises:
        RowError: with every problem of the row.
    """
    problems: list[str] = []
    sample = _READERS[schema](row, style, problems)
    if problems or sample is None:
        raise RowError(problems)
    return sample


def text_problem(row: Mapping[str, Any], key: str) -> str | None:
    """Return the problem of a key that must hold text, or None."""
    value = row.get(key)
    if key not in row:
        return f"no key {key!r}. Add it; the record has {', '.join(map(repr, row)) or 'no keys'}."
    if not isinstance(value, str):
        return f"{key!r} is of type {type(value).__name__}, not text. Write a string."
    if not value.strip():
        return f"example with an empty {key}. Write one or remove the record."
    if not is_unicode(value):
        return f"{key!r} {HALF_PAIR}"
    return None


HALF_PAIR = "holds half of a surrogate pair (\\ud800 to \\udfff). Write whole characters."


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(row: Mapping[str, Any], key: str, problems: list[str]) -> str:
    problem = text_problem(row, key)
    if problem is not None:
        problems.append(problem)
        return ""
    return str(row[key])


def _optional(row: Mapping[str, Any], key: str, problems: list[str]) -> str:
    """Return the text under a key, empty if there is none."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return _text(row, key, problems)


def _list(row: Mapping[str, Any], key: str, problems: list[str]) -> list[Any] | None:
    """Return the list under a key, which may be written as JSON, as in a CSV file; None with a problem otherwise."""
    value = row.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError as error:
            problems.append(f"{key!r} is a text that is no JSON list: {error}. Write a list.")
            return None
    if key not in row:
        problems.append(f"no key {key!r}. Add it; the record has {', '.join(map(repr, row)) or 'no keys'}.")
        return None
    if not isinstance(value, list):
        problems.append(f"{key!r} is of type {type(value).__name__}, not a list. Write [{{...}}, {{...}}].")
        return None
    return value


def _holds_messages(value: Any) -> bool:
    """Return whether a value is a list, or the JSON of a list of messages, as in a CSV file; other texts are texts."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return False
        return bool(value) and all(isinstance(item, dict) and "role" in item for item in value)
    return isinstance(value, list)


def _tools(row: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, Any], ...] | None:
    if row.get("tools") in (None, "", []):
        return None
    tools = _list(row, "tools", problems)
    if tools is None:
        return None
    if not all(isinstance(tool, dict) for tool in tools):
        problems.append("'tools' holds something else than objects. Write the JSON schemas of functions.")
        return None
    return tuple(tools)


def _read_messages(row: Mapping[str, Any], style: str, problems: list[str]) -> Sample | None:
    given = _list(row, "messages", problems)
    tools = _tools(row, problems)
    if given is None:
        return None
    messages = [_message(item, number, problems) for number, item in enumerate(given, start=1)]
    return _conversation(messages, tools, problems)


def _read_sharegpt(row: Mapping[str, Any], style: str, problems: list[str]) -> Sample | None:
    given = _list(row, "conversations", problems)
    tools = _tools(row, problems)
    system = _optional(row, "system", problems)
    if given is None:
        return None
    messages: list[dict[str, Any] | None] = [{"role": "system", "content": system}] if system else []
    for number, item in enumerate(given, start=1):
        if isinstance(item, dict) and "from" in item:
            role = _SHAREGPT_ROLES.get(str(item["from"]))
            if role is None:
                known = ", ".join(map(repr, _SHAREGPT_ROLES))
                problems.append(f"message {number}: from = {item['from']!r}. Write one of {known}.")
                messages.append(None)
                continue
            rest = {key: value for key, value in item.items() if key not in ("from", "value")}
            item = {"role": role, "content": item.get("value"), **rest}
        messages.append(_message(item, number, problems))
    return _conversation(messages, tools, problems)


def _read_alpaca(row: Mapping[str, Any], style: str, problems: list[str]) -> Sample | None:
    instruction, output = _text(row, "instruction", problems), _text(row, "output", problems)
    system = _optional(row, "system", problems)
    if isinstance(row.get("input"), list):
        problems.append("'input' is a list. Write one text, or a row for each entry.")
        context = ""
    else:
        context = _optional(row, "input", problems)
    history: list[Any] = []
    if row.get("history") not in (None, "", []):
        history = _list(row, "history", problems) or []
    if style == "chat":
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for number, turn in enumerate(history, start=1):
            whole = isinstance(turn, (list, tuple)) and len(turn) == 2
            if not whole or not all(isinstance(text, str) and text.strip() for text in turn):
                problems.append(f"entry {number} of 'history' is no pair of texts. Write [question, answer].")
                continue
            if not all(map(is_unicode, turn)):
                problems.append(f"entry {number} of 'history' {HALF_PAIR}")
                continue
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        question = f"{instruction}\n\n{context}" if context else instruction
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return _trained_on_answers(messages, None)
    if history:
        problems.append("'history' has no place in a prompt of one instruction. Write prompt: chat, or remove it.")
    if style == "alpaca":
        if system:
            problems.append(
                "'system' has no place in this prompt. Write prompt: chat, a template with {system}, or null."
            )
        template = PROMPT_WITH_INPUT if context else PROMPT_TEMPLATE
        return Completion(template.format(instruction=instruction, input=context), output)
    fields = {"instruction": instruction, "input": context, "system": system}
    for name in ("input", "system"):
        if fields[name] and f"{{{name}" not in style:
            problems.append(f"{name!r} has no place in the template of prompts. Add {{{name}}} to it.")
    return Completion(style.format(**fields), output)


def _read_prompt_completion(row: Mapping[str, Any], style: str, problems: list[str]) -> Sample | None:
    lists = [key for key in ("prompt", "completion") if _holds_messages(row.get(key))]
    texts = [key for key in ("prompt", "completion") if key not in lists and isinstance(row.get(key), str)]
    if lists and texts:
        given = f"{lists[0]!r} is a list of messages, {texts[0]!r} a text"
        problems.append(f"{given}. Write both as lists, or both as texts.")
        return None
    if lists:
        before, after = _list(row, "prompt", problems), _list(row, "completion", problems)
        tools = _tools(row, problems)
        if style != "chat":
            problems.append(f"'prompt' is a list of messages, which prompt: {style} is not for. Write prompt: chat.")
        if before is None or after is None:
            return None
        messages = [_message(item, number, problems) for number, item in enumerate([*before, *after], start=1)]
        return _conversation(messages, tools, problems, first_trained=len(before))
    prompt, completion = _text(row, "prompt", problems), _text(row, "completion", problems)
    if style == "chat":
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _trained_on_answers(turns, None)
    return Completion(prompt if style == "plain" else style.format(prompt=prompt), completion)


def _read_text(row: Mapping[str, Any], style: str, problems: list[str]) -> Sample | None:
    return Text(_text(row, "text", problems))


_READERS: dict[Schema, Callable[[Mapping[str, Any], str, list[str]], Sample | None]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_completion": _read_prompt_completion,
    "text": _read_text,
}


def _is_call(call: Any) -> bool:
    """Return whether a value is an object with a function's name, or with an object `function` that has it."""
    return isinstance(call, dict) and isinstance(call.get("function") or call, dict)


def _message(item: Any, number: int, problems: list[str]) -> dict[str, Any] | None:
    """Return a message as a template reads it, or None with a problem."""
    where = f"message {number}"
    if not isinstance(item, dict):
        problems.append(f"{where} is of type {type(item).__name__}. Write {{role: ..., content: ...}}.")
        return None
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        others = "" if "role" in item or "from" not in item else "; 'from' and 'value' belong in a list 'conversations'"
        problems.append(f"{where}: role = {role!r}. Write one of {', '.join(map(repr, ROLES))}{others}.")
        return None
    if isinstance(content, list):
        content = _joined(content, where, problems)
        if content is None:
            return None
    calls = item.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(map(_is_call, calls))):
        problems.append(f"{where}: 'tool_calls' is not a list of objects. Write [{{function: {{name: ...}}}}].")
        return None
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        problems.append(f"{where}: its content is of type {type(content).__name__}, not text. Write a string.")
        return None
    if not content.strip() and not calls and role != "tool":
        problems.append(f"{where}, of the {role}, is empty. Write a text, or remove the record.")
        return None
    if not is_unicode(content):
        problems.append(f"{where} {HALF_PAIR}")
        return None
    given = {key: value for key, value in item.items() if value is not None}  # templates ask whether a key is there
    return {**given, "role": role, "content": content}


def _joined(parts: list[Any], where: str, problems: list[str]) -> str | None:
    """Join the texts of a content that is a list of parts; None with a problem if it has others."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, str):
            texts.append(part)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "text" and isinstance(part, dict):
            kind = type(part.get("text")).__name__
            problems.append(f"{where} has a part whose 'text' is of type {kind}. Write a string.")
            return None
        else:
            problems.append(f"{where} has a part of type {kind!r}. Only text is trained on: remove the record.")
            return None
    return "".join(texts)


def _conversation(
    messages: Sequence[dict[str, Any] | None],
    tools: tuple[dict[str, Any], ...] | None,
    problems: list[str],
    first_trained: int = 0,
) -> Conversation | None:
    """Check the order of messages; those of the assistant from `first_trained` on are trained, unless weighted 0."""
    if not messages:
        problems.append("a conversation without messages. Remove the record.")
        return None
    if any(message is None for message in messages):
        return None
    turns = [message for message in messages if message is not None]
    before = ""
    for number, message in enumerate(turns, start=1):
        role = message["role"]
        may_follow = {
            "system": before == "",
            "user": before in ("", "system", "assistant"),
            "assistant": before in ("user", "tool"),
            "tool": before in ("assistant", "tool"),
        }[role]
        if not may_follow:
            after = f"after one of the {before}" if before else "at the beginning"
            problems.append(
                f"message {number} is of the {role}, {after}. Roles take turns: system (if any), then user and "
                "assistant."
            )
            return None
        if message.get("weight", 1) not in (0, 1):
            problems.append(f"message {number}: weight = {message['weight']!r}. Write 0 (not trained on) or 1.")
            return None
        before = role
    if before != "assistant":
        problems.append(f"the last message is of the {before}. End with the assistant's, or remove the record.")
        return None
    trained = tuple(
        number >= first_trained and message["role"] == "assistant" and message.pop("weight", 1) != 0
        for number, message in enumerate(turns)
    )
    if not any(trained):
        problems.append("no message of the assistant is trained on. Add one, or remove the record.")
        return None
    return Conversation(tuple(turns), trained, tools)


def _trained_on_answers(messages: Sequence[dict[str, Any]], tools: None) -> Conversation:
    return Conversation(tuple(messages), tuple(message["role"] == "assistant" for message in messages), tools)
