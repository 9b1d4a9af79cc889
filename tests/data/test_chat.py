"""Labels of conversations: exactly the assistant's turns with what ends them, or a refusal that says why."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from colm_ds.data.chat import ChatEncoder, TemplateError, writes_date
from colm_ds.data.schemas import Conversation, RowError
from colm_ds.errors import ConfigError

from .chats import CHATML, TURNS, as_chatml, chat_tokenizer, special_texts
from .conftest import byte_tokenizer

THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TEXT = CHATML + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"


def conversation(messages: Any = TURNS, **changes: Any) -> Conversation:
    trained = tuple(message["role"] == "assistant" for message in messages)
    return Conversation(**({"messages": tuple(messages), "trained": trained} | changes))


def labels_of(encoder: ChatEncoder, chat: Conversation) -> tuple[list[int], list[int]]:
    encoded = encoder.encode(chat)
    pairs = zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True)
    return encoded.ids.tolist(), [token if trained else -100 for token, trained in pairs]


@pytest.mark.parametrize(("train_on", "trained"), [("all", [2, 4]), ("last", [4])])
def test_labels_are_the_turns_and_their_ends(train_on: Any, trained: list[int]) -> None:
    tokenizer = chat_tokenizer()
    assert labels_of(ChatEncoder(tokenizer, train_on=train_on), conversation()) == as_chatml(tokenizer, TURNS, trained)


@pytest.mark.parametrize(("train_on", "turns"), [("all", [2, 4]), ("last", [4])])
def test_an_end_of_turn_that_takes_the_blanks_behind_it(train_on: Any, turns: list[int]) -> None:
    """The same labels, whether the token of the end is one with the line break behind it or not."""
    ids, labels = labels_of(ChatEncoder(chat_tokenizer(rstrip=True), train_on=train_on), conversation())
    tokenizer = chat_tokenizer()
    assert ids != labels_of(ChatEncoder(tokenizer), conversation())[0]  # the line breaks are no tokens
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [id for turn in turns for id in (*tokenizer(TURNS[turn]["content"])["input_ids"], end)]
    assert [label for label in labels if label != -100] == expected


def test_ids_are_those_of_the_template() -> None:
    """Of any content: random conversations against pieces and against transformers."""
    tokenizer, draw = chat_tokenizer(), random.Random(0)
    encoder = ChatEncoder(tokenizer)
    for _ in range(60):
        turns = [
            {"role": role, "content": "".join(draw.choices("e|<>im_nd \n\té你", k=draw.randint(1, 90))).strip() or "x"}
            for role in ("user", "assistant") * draw.randint(1, 4)
        ]
        ids, labels = labels_of(encoder, conversation(turns))
        assert (ids, labels) == as_chatml(tokenizer, turns, range(1, len(turns), 2))
        assert ids == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]


def test_a_message_that_is_not_trained_on() -> None:
    tokenizer = chat_tokenizer()
    chat = conversation(trained=(False, False, False, False, True))
    assert labels_of(ChatEncoder(tokenizer), chat) == as_chatml(tokenizer, TURNS, [4])
    with pytest.raises(RowError, match="its last turn is not to be trained on"):
        ChatEncoder(tokenizer, train_on="last").encode(conversation(trained=(False, False, True, False, False)))


MARKED = CHATML.replace(
    "{{ message['content'] }}<|im_end|>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '' }}",
)


@pytest.mark.parametrize(("train_on", "trained"), [("all", [2, 4]), ("last", [4])])
def test_marks_of_the_template(train_on: Any, trained: list[int]) -> None:
    """Also where a turn depends on its place, as the template itself says what is generated."""
    tokenizer = chat_tokenizer()
    encoder = ChatEncoder(tokenizer, MARKED, train_on)
    assert labels_of(encoder, conversation()) == as_chatml(tokenizer, TURNS, trained)


def test_marks_that_leave_something_out() -> None:
    tokenizer = chat_tokenizer()
    early = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    with pytest.raises(TemplateError, match="leaves out the special token that ends the turn"):
        ChatEncoder(tokenizer, early).encode(conversation())
    once = MARKED.replace("{% if message['role'] == 'assistant' %}", "{% if loop.last %}")
    with pytest.raises(TemplateError, match="marks 1 parts as generated, but the assistant has 2 turns"):
        ChatEncoder(tokenizer, once).encode(conversation())


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (THINKING, ["message 3", "rendered otherwise once more messages follow", "'<think>", "train_on: last"]),
        (CHATML.replace("<|im_start|>assistant\n{% e", "<|im_start|>bot\n{% e"), ["not rendered behind the prompt"]),
        (CHATML.replace("<|im_end|>", ""), ["does not end with a special token", "{{ eos_token }}"]),
        ("{% for message in messages %}", ["no valid Jinja: line 1"]),
    ],
)
def test_templates_that_are_refused(template: str, parts: list[str]) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatEncoder(chat_tokenizer(), template).encode(conversation())
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_template_that_changes_earlier_turns_trains_on_the_last() -> None:
    tokenizer = chat_tokenizer()
    ids, labels = labels_of(ChatEncoder(tokenizer, THINKING, "last"), conversation())
    told = tokenizer.decode([label for label in labels if label != -100])
    assert told == "<think>\n\n</think>\n\ne<|im_end|>"
    assert len(ids) == len(labels)


def test_more_behind_the_last_turn() -> None:
    """An end of text that only the end of a conversation has (Phi-3), directly behind the turn or after a line end."""
    tokenizer = chat_tokenizer(("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    _, labels = labels_of(ChatEncoder(tokenizer, END_OF_TEXT), conversation())
    assert labels[: -len(tokenizer("\n<|endoftext|>")["input_ids"])] == as_chatml(tokenizer, TURNS, [2, 4])[1][:-1]
    joined = END_OF_TEXT.replace("<|im_end|>\n", "<|im_end|>")
    _, labels = labels_of(ChatEncoder(tokenizer, joined), conversation())
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert trained == "two words\nand a line<|im_end|>e<|im_end|><|endoftext|>"


def test_content_that_the_template_changes_or_that_ends_the_turn() -> None:
    upper = CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(RowError, match=r"message 3, of the assistant, is not in the text"):
        ChatEncoder(chat_tokenizer(), upper).encode(conversation())
    turns = (TURNS[1], {"role": "assistant", "content": "stop<|im_end|>"})
    with pytest.raises(RowError, match="ends with a special token"):
        ChatEncoder(chat_tokenizer()).encode(conversation(turns))
    turns = (TURNS[1], {"role": "assistant", "content": "write <|im_end|> to stop"})
    assert ChatEncoder(chat_tokenizer()).encode(conversation(turns)).holds_special
    assert not ChatEncoder(chat_tokenizer()).encode(conversation()).holds_special


def test_a_template_that_raises() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system prompts.') }}{% endif %}" + CHATML
    with pytest.raises(RowError, match="the chat template refuses it: No system prompts"):
        ChatEncoder(chat_tokenizer(), strict).encode(conversation())


def test_bos_is_not_doubled() -> None:
    """As it is the template that writes it, whatever the tokenizer adds to a text by itself."""
    plain = byte_tokenizer(bos=True)
    for template, expected in (("{{ bos_token }}" + END, 1), (END, 0)):
        ids = ChatEncoder(plain, template).encode(conversation(TURNS[1:3])).ids.tolist()
        assert ids.count(plain.bos_token_id) == expected
        assert ids[-1] == plain.eos_token_id


END = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_tools_are_rendered_or_refused() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = (
        TURNS[1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "it is 42"},
        {"role": "assistant", "content": "42"},
    )
    with pytest.raises(RowError, match=r"message 2 calls the function 'add', which the chat template leaves out"):
        ChatEncoder(chat_tokenizer()).encode(conversation(turns))
    with_tools = CHATML.replace(
        "{{ message['content'] }}<|im_end|>",
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}"
        "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>",
    )
    tokenizer = chat_tokenizer()
    ids, labels = labels_of(ChatEncoder(tokenizer, with_tools), conversation(turns))
    assert tokenizer.decode([label for label in labels if label != -100]) == (
        '<call>add{"a": 1}</call><|im_end|>42<|im_end|>'
    )
    assert "it is 42" in tokenizer.decode(ids)
    call["function"] = {"name": "add", "arguments": {"a": "\ud83d"}}
    with pytest.raises(RowError, match="its text with tools and calls of them holds half of a surrogate pair"):
        ChatEncoder(tokenizer, with_tools).encode(conversation(turns))
    call["function"] = {"name": "add", "arguments": {"a": 1}}
    without = with_tools.replace("{{ message['content'] }}{%", "{{ message['content'] if message.role != 'tool' }}{%")
    with pytest.raises(RowError, match="message 3 is of the tool, which the chat template leaves out"):
        ChatEncoder(tokenizer, without).encode(conversation(turns))


def test_many_blanks_take_no_longer_than_other_characters() -> None:
    """Where each is a place to begin a search that goes over all others, these are ten billion steps."""
    encoder = ChatEncoder(chat_tokenizer())
    answer = "table" + " " * 100_000 + "end"
    ids, labels = labels_of(encoder, conversation((TURNS[1], {"role": "assistant", "content": answer})))
    assert sum(label != -100 for label in labels) == len(answer) + 1
    assert len(ids) > len(answer)


def test_prompts_of_questions() -> None:
    """The ids before the last answer, as generation gets them."""
    tokenizer = chat_tokenizer()
    encoder = ChatEncoder(tokenizer)
    prompt, whole = encoder.encode_prompt(conversation()), encoder.encode(conversation())
    assert whole.ids.tolist()[: len(prompt)] == prompt
    assert whole.trained[len(prompt)]
    assert not whole.trained[len(prompt) - 1]
    assert tokenizer.decode([encoder.end_of_turn(whole)]) == "<|im_end|>"


def test_variables_of_the_template() -> None:
    tokenizer = chat_tokenizer()
    template = "{% if shout is defined and shout %}!{% endif %}" + CHATML
    loud = ChatEncoder(tokenizer, template, variables={"shout": True}).encode(conversation())
    quiet = ChatEncoder(tokenizer, template).encode(conversation())
    assert tokenizer.decode(loud.ids) == "!" + tokenizer.decode(quiet.ids)
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + CHATML
    assert writes_date(tokenizer, {})
    assert not writes_date(tokenizer, {"date_string": "1 May"})


def test_no_template_or_no_places() -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*data.chat_template"):
        ChatEncoder(chat_tokenizer(template=None))

    class Slow:
        is_fast = False

        def get_chat_template(self) -> str:
            return CHATML

    with pytest.raises(ConfigError, match="where in the text a token comes from"):
        ChatEncoder(Slow())


ALIKE = [
    *("cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5"),
    *("qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl"),
]
"""Templates that render a turn the same wherever it stands."""


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_real_templates_against_their_marked_copies(name: str, train_on: Any) -> None:
    """TRL has copies with the generated parts marked; these also mark line ends and an end of text around a turn."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    own, marked = ((folder / f"{stem}.jinja").read_text(encoding="utf-8") for stem in (name, f"{name}_training"))
    tokenizer = chat_tokenizer([*special_texts(own + marked), "</s>"], own)
    turns = TURNS[1:]
    ids, labels = labels_of(ChatEncoder(tokenizer, train_on=train_on), conversation(turns))
    theirs = tokenizer.apply_chat_template(
        list(turns), chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == theirs["input_ids"]
    runs = "".join("1" if label != -100 else "0" for label in labels)
    masks = theirs["assistant_masks"] if train_on == "all" else last_run(theirs["assistant_masks"])
    for place, (ours, mask) in enumerate(zip(runs, masks, strict=True)):
        if ours != str(mask):
            assert mask == 1, f"token {place} is trained, but not marked"
            assert tokenizer.decode([ids[place]]) in ("\n", "</s>")
    assert runs.count("01") == (2 if train_on == "all" else 1)


def last_run(mask: list[int]) -> list[int]:
    """Keep the last run of ones."""
    end = len(mask) - mask[::-1].index(1)
    start = max((place + 1 for place in range(end) if not mask[place]), default=0)
    return [int(start <= place < end) for place in range(len(mask))]


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "deepseekv3"])
def test_real_templates_that_change_earlier_turns(name: str) -> None:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = chat_tokenizer([*special_texts(template), "</s>"], template)
    with pytest.raises(TemplateError, match=r"message 2, of the assistant, is .*chat_template: FILE.jinja"):
        ChatEncoder(tokenizer).encode(conversation(TURNS[1:]))


def test_mistral(mistral: Any) -> None:
    """A real SentencePiece tokenizer, whose tokens begin with blanks: the labels are the turn, whole."""
    mistral.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    turns = TURNS[1:]
    ids, labels = labels_of(ChatEncoder(mistral), conversation(turns))
    assert ids == mistral.apply_chat_template(list(turns), tokenize=True, return_dict=True)["input_ids"]
    assert ids.count(mistral.bos_token_id) == 1
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    assert [mistral.decode(run).strip() for run in runs if run] == ["two words\nand a line</s>", "e</s>"]
