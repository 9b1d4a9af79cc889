"""Prompt of a math question: Alpaca's, the model's chat template, the bare question, or a template of one's own."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colm_ds.data.chat import ChatEncoder, TemplateError
from colm_ds.data.prompt import format_prompt
from colm_ds.data.schemas import Conversation, RowError
from colm_ds.errors import ConfigError
from colm_ds.run_folder.contents import CONFIG
from colm_ds.run_folder.files import read_object

AUTO = "auto"
STYLES = ("alpaca", "chat", "plain")
_QUESTION = ("instruction", "prompt")
_EMPTY = ("input", "system")


@dataclass(frozen=True)
class QuestionPrompt:
    """Say how questions are asked.

    Attributes:
        style: `alpaca`, `chat`, `plain`, or a template with `{instruction}` or `{prompt}`.
        variables: further variables of the chat template.
    """

    style: str = "alpaca"
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that identify answers; none for Alpaca's prompt, which earlier evaluations did not name."""
        if self.style == "alpaca":
            return {}
        return {"prompt": self.style} | ({"chat_template_kwargs": dict(self.variables)} if self.variables else {})

    def write(self, questions: Sequence[str], tokenizer: Any) -> list[str]:
        """Write the prompts of questions, in order.

        Raises:
            ConfigError: if the tokenizer's chat template cannot be used, or refuses a question.
        """
        if self.style == "chat":
            encoder = _encoder(tokenizer, self.variables)
            return [_rendered(encoder, question) for question in questions]
        if self.style == "alpaca":
            return list(map(format_prompt, questions))
        if self.style == "plain":
            return list(questions)
        empty = dict.fromkeys(_EMPTY, "")
        return [self.style.format(**dict.fromkeys(_QUESTION, question), **empty) for question in questions]

    def turn_end(self, tokenizer: Any) -> int | None:
        """Return the id of the token that ends an answer under the chat template; None for other prompts.

        Raises:
            ConfigError: if there is no template, or an answer cannot be found in what it writes.
        """
        if self.style != "chat":
            return None
        encoder = _encoder(tokenizer, self.variables)
        turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        try:
            return encoder.end_of_turn(encoder.encode(Conversation(turns, (False, True))))
        except (TemplateError, RowError) as error:
            raise ConfigError(f"--prompt chat: the chat template cannot be used: {error}") from None


def read_prompt(text: str) -> str:
    r"""Return the style that a command line names, in which `\n` is a line break; raise as `check_prompt`."""
    return check_prompt(text.replace(r"\n", "\n"))


def check_prompt(style: str) -> str:
    """Return a style as it is.

    Raises:
        ConfigError: if it is neither a style nor a template of a question.
    """
    if style in STYLES:
        return style
    known = " or ".join(map(repr, STYLES))
    if "{" not in style:
        raise ConfigError(
            f"--prompt {style}: no such style. Write {known}, or a template with {{instruction}} or {{prompt}}."
        )
    try:
        named = [name for _, name, _, _ in string.Formatter().parse(style) if name is not None]
    except ValueError as error:
        raise ConfigError(f"--prompt {style!r}: {error}. Write {{{{ and }}}} for braces of the text.") from None
    if not set(named) & set(_QUESTION) or set(named) - {*_QUESTION, *_EMPTY}:
        raise ConfigError(
            f"--prompt {style!r}: names {', '.join(sorted(set(named))) or 'no key'}. Name instruction or prompt, which "
            "is the question; write {{ and }} for braces of the text."
        )
    return style


def prompt_of_run(run: Path) -> QuestionPrompt:
    """Return the prompt that a run was trained with.

    A run from before prompts were recorded tells it by its recipe's keys alone; where these leave it open, as rows then
    had to be looked at, it is Alpaca's.

    Args:
        run: folder of the run.

    Raises:
        ConfigError: if it was trained with several, or with one that no question can be written in.
    """
    described = read_object(run / CONFIG)
    recipe = described.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    data = data if isinstance(data, dict) else {}
    styles = described.get("prompts")
    if not isinstance(styles, list) or not all(isinstance(style, str) for style in styles):
        styles = _prompts_of_recipe(data)
    variables = data.get("chat_template_kwargs")
    if len(styles) > 1:
        raise ConfigError(
            f"{run}: was trained on prompts of several kinds: {', '.join(map(repr, styles))}. Say with which of them "
            f"to ask, as in --prompt {styles[0] if styles[0] in STYLES else repr(styles[0])}."
        )
    style = check_prompt(styles[0]) if styles else "alpaca"
    return QuestionPrompt(style, variables if style == "chat" and isinstance(variables, dict) else {})


def _encoder(tokenizer: Any, variables: Mapping[str, Any]) -> ChatEncoder:
    try:
        return ChatEncoder(tokenizer, variables=variables)
    except ConfigError:
        raise ConfigError(
            "--prompt chat: the tokenizer has no chat template, or is none that knows where in a text its tokens are. "
            "Write --prompt alpaca, or name the tokenizer of the chat model with --tokenizer."
        ) from None


def _rendered(encoder: ChatEncoder, question: str) -> str:
    try:
        return encoder.render([{"role": "user", "content": question}], None, prompt=True)
    except (TemplateError, RowError) as error:
        raise ConfigError(f"--prompt chat: the question {question[:60]!r} cannot be asked: {error}") from None


def _prompts_of_recipe(data: Mapping[str, Any]) -> list[str]:
    """Return the styles that a recipe's data section names, each once."""
    train = data.get("train")
    entries = train if isinstance(train, list) else [train]
    styles: list[str] = []
    for entry in entries:
        keys = entry if isinstance(entry, dict) else data
        style, schema = keys.get("prompt", AUTO), keys.get("schema", AUTO)
        if style == AUTO and schema != AUTO:
            style = {"messages": "chat", "sharegpt": "chat", "alpaca": "alpaca"}.get(str(schema), "plain")
        if isinstance(style, str) and style != AUTO and style not in styles:
            styles.append(style)
    return styles
