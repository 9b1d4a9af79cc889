"""Render conversations by a chat template and find the tokens of the assistant's turns exactly.

The ids are those of `tokenizer.apply_chat_template`. A turn's labels run from where generation would start, which is
where the template's generation prompt ends, to the special token that ends the turn, included.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from colm_ds.data.schemas import HALF_PAIR, Conversation, RowError, is_unicode
from colm_ds.errors import ConfigError

TrainOn = Literal["all", "last"]

_BLANKS = re.compile(r"\s*")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FILE = "a template file that renders a turn the same wherever it stands (chat_template: FILE.jinja)"


class TemplateError(ConfigError):
    """A chat template with which the assistant's turns cannot be found, whatever the row."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens.

    Attributes:
        ids: token ids, int32 `[length]`.
        trained: whether each is trained on, bool `[length]`.
        holds_special: whether a message holds the text of a special token, which becomes that token.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    holds_special: bool


class ChatEncoder:
    """Encodes conversations by one chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        template: Jinja text; None: the tokenizer's own.
        train_on: `all` of the assistant's turns, or the `last`.
        variables: further variables of the template, such as `enable_thinking`.

    Raises:
        ConfigError: if there is no template, or the tokenizer cannot say where in the text a token comes from.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        train_on: TrainOn = "all",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if template is None:
            try:
                template = tokenizer.get_chat_template()
            except ValueError:
                raise ConfigError(
                    "the tokenizer has no chat template, by which conversations become text. Name a Jinja file with "
                    "data.chat_template, or a tokenizer of a chat model."
                ) from None
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"conversations need a tokenizer that knows where in the text a token comes from, which "
                f"{type(tokenizer).__name__} does not. Use one with a tokenizer.json."
            )
        self.template: str = template
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._variables = dict(variables or {})
        self._has_masks = _GENERATION.search(template) is not None

    def encode(self, conversation: Conversation) -> EncodedChat:
        """Encode a conversation, with the turns to train on.

        Raises:
            RowError: for a row that the template refuses or changes.
            TemplateError: if the template does not allow to find the turns.
        """
        messages, tools = list(conversation.messages), conversation.tools
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [number for number in turns if conversation.trained[number]]
        if self._train_on == "last":
            wanted = [number for number in wanted if number == turns[-1]]
        if not wanted:
            raise RowError(["its last turn is not to be trained on, and train_on is last. Remove the record."])
        holds_special = any(self._special.search(message["content"]) for message in messages)
        text = self.render(messages, tools)
        self._check_tools(messages, text)
        if self._has_masks:
            ids, trained = self._by_marks(messages, tools, turns, wanted)
        else:
            spans = [self._span(messages, tools, number, text) for number in wanted]
            ids, trained = self._tokens(text, spans)
        return EncodedChat(ids, trained, holds_special)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, prompt: bool = False
    ) -> str:
        """Return the text of messages, with the beginning of the assistant's next turn if `prompt`.

        Raises:
            RowError: with the reason of the template, if it refuses them, or if the text is not Unicode.
        """
        text: str = self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt)
        if not is_unicode(text):  # from calls or descriptions of functions; contents are looked at as they are read
            raise RowError([f"its text with tools and calls of them {HALF_PAIR}"])
        return text

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids of everything before the last turn, and of the beginning of that turn.

        Raises:
            RowError: as `render`.
        """
        text = self.render(conversation.messages[:-1], conversation.tools, prompt=True)
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def end_of_turn(self, chat: EncodedChat) -> int:
        """Return the id of the token that ends the last trained turn."""
        return int(chat.ids[np.flatnonzero(chat.trained)[-1]])

    def _apply(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, **options: Any
    ) -> Any:
        from jinja2 import TemplateError as JinjaError
        from jinja2 import TemplateSyntaxError

        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.template,
                **options,
                **self._variables,
            )
        except TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}.") from None
        except (JinjaError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            refused = f"the chat template refuses it: {reason.removesuffix('.')}. Change or remove the record."
            raise RowError([refused]) from None

    def _span(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None, number: int, text: str
    ) -> tuple[int, int]:
        """Return where in the text a turn begins and ends, its end tokens included."""
        is_last = number == len(messages) - 1
        advice = f"Name {_FILE}." if is_last else f"Train on the last turn alone (train_on: last), or name {_FILE}."
        head = self.render(messages[:number], tools, prompt=True)
        turn = f"message {number + 1}, of the assistant,"
        if not text.startswith(head):
            place = _common(head, text)
            raise TemplateError(
                f"{turn} is not rendered behind the prompt that generation would start from: there "
                f"{head[place : place + 60]!r}, in the conversation {text[place : place + 60]!r}. {advice}"
            )
        alone = text if is_last else self.render(messages[: number + 1], tools)
        match = self._turn_end.search(alone, len(head))
        if match is None:
            raise TemplateError(
                f"{turn} does not end with a special token, so that the model would not learn to stop; it ends "
                f"{alone[-40:]!r}. Write the end of a turn, or {{{{ eos_token }}}}, into the template."
            )
        content = messages[number]["content"].strip()
        if not alone[len(head) : match.start()].rstrip().endswith(content[-64:].lstrip()):
            problem = f"{turn} is not in the text of the chat template as written, or ends with a special token"
            raise RowError([f"{problem}. Change or remove the record."])
        place = _common(alone, text)
        ends = [end.end() for end in self._special.finditer(alone, match.start("end"), match.end("end"))]
        common = [end for end in ends if end <= place]
        if not common:
            raise TemplateError(
                f"{turn} is rendered otherwise once more messages follow: {alone[place : place + 60]!r} becomes "
                f"{text[place : place + 60]!r}. {advice}"
            )
        return len(head), common[-1]

    def _tokens(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Tokenise a text; tokens within the spans are trained, one across the beginning of a span is not.

        The last token of a span may hold blanks behind it, as special tokens with `rstrip`, such as Phi-3's, do.
        """
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        pairs = encoded["offset_mapping"]
        flat = itertools.chain.from_iterable(pairs)  # three times as fast as numpy.array, which looks at every pair
        places = np.fromiter(flat, dtype=np.int64, count=2 * len(pairs)).reshape(-1, 2)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        trained = np.zeros(len(places), dtype=bool)
        for start, end in spans:
            blanks = _BLANKS.match(text, end)
            assert blanks is not None
            inside = (places[:, 0] >= start) & (places[:, 0] < end) & (places[:, 1] <= blanks.end())
            inside &= places[:, 1] > places[:, 0]
            last = np.flatnonzero(inside)[-1:]
            if not len(last) or int(ids[last[0]]) not in self._special_ids:
                raise TemplateError(
                    f"the tokenizer has no token of its own for the end of a turn, {text[start:end][-20:]!r}, so that "
                    "the model would not learn to stop. Write one, or {{ eos_token }}, into the template."
                )
            trained |= inside
        return ids, trained

    def _by_marks(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        turns: Sequence[int],
        wanted: Sequence[int],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Take the turns from the template's `{% generation %}` blocks."""
        encoded = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids = np.array(encoded["input_ids"], dtype=np.int32)
        mask = np.concatenate([[0], np.array(encoded["assistant_masks"], dtype=np.int8), [0]])
        starts, ends = np.flatnonzero(np.diff(mask) == 1), np.flatnonzero(np.diff(mask) == -1)
        if len(starts) != len(turns):
            raise TemplateError(
                f"the template marks {len(starts)} parts as generated, but the assistant has {len(turns)} turns. Put "
                "{% generation %} and {% endgeneration %} around each of its turns and the token that ends it, or "
                "around none."
            )
        trained = np.zeros(len(ids), dtype=bool)
        for turn, start, end in zip(turns, starts, ends, strict=True):
            if turn not in wanted:
                continue
            trained[start:end] = True
            if not any(int(token) in self._special_ids for token in ids[start:end][-2:]):
                raise TemplateError(
                    f"message {turn + 1}: the template's {{% generation %}} block leaves out the special token that "
                    "ends the turn, so that the model would not learn to stop. Move {% endgeneration %} behind it."
                )
        return ids, trained

    def _check_tools(self, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """Raise a RowError if the template leaves out a call of a function or its result."""
        left_out = "which the chat template leaves out. Remove the record, or name one with tools (chat_template)."
        for number, message in enumerate(messages, start=1):
            for call in message.get("tool_calls") or ():
                name = (call.get("function") or call).get("name") if isinstance(call, dict) else None
                if not name or str(name) not in text:
                    raise RowError([f"message {number} calls the function {name!r}, {left_out}"])
            if message["role"] == "tool" and message["content"].strip() not in text:
                raise RowError([f"message {number} is of the tool, {left_out}"])

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset({*(number for number, token in added if token.special), *self._tokenizer.all_special_ids})

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Match the text of any special token."""
        added = self._tokenizer.added_tokens_decoder.values()
        texts = {*(token.content for token in added if token.special), *self._tokenizer.all_special_tokens}
        return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))) or r"(?!)")

    @cached_property
    def _turn_end(self) -> re.Pattern[str]:
        """Match what stands behind a turn's text: its end tokens, and blanks and further special tokens.

        No blanks before the end tokens: a search would look from each of many blanks in a text to the last of them.
        """
        special = self._special.pattern
        return re.compile(rf"(?P<end>(?:{special})+)(?:\s+(?:{special})+)*\s*\Z")


def writes_date(tokenizer: Any, variables: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer's chat template may write today's date."""
    return "strftime_now" in tokenizer.get_chat_template() and "date_string" not in variables


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
