"""The instruction prompt and its tokens: the same ids in training and evaluation, bos once, eos at the end."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from colm_ds.data import encode_example, encode_examples, encode_prompt, format_prompt
from colm_ds.data.prompt import leading_special_ids
from colm_ds.errors import ConfigError

from .conftest import byte_tokenizer

TEXTS = ["Add 3 and 4.", "braces {x} {instruction}", "\n leading and trailing \n", "é 数 \U0001f600", "x" * 50]


def test_prompt_text() -> None:
    assert format_prompt("Add {0} and 4.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {0} and 4.\n\n### Response:"
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("trailing_eos", [False, True])
def test_special_tokens_once(bos: bool, trailing_eos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos, trailing_eos=trailing_eos)
    assert leading_special_ids(tokenizer) == [1] * bos
    for text in TEXTS:
        ids, prompt_length = encode_example(tokenizer, text, "42", 1000)
        assert ids[:prompt_length] == encode_prompt(tokenizer, text)
        assert ids.count(1) == bos
        assert ids.count(2) == 1
        assert ids[-1] == 2
        assert tokenizer.decode(ids[bos:-1]) == format_prompt(text) + "42"
        assert tokenizer.decode(ids[prompt_length:-1]) == "42"


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_real_tokenizers(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    for text in TEXTS:
        ids, prompt_length = encode_example(tokenizer, text, "3 + 4 = 7\nThe answer is 7.", 1000)
        assert ids[:prompt_length] == tokenizer(format_prompt(text))["input_ids"] == encode_prompt(tokenizer, text)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[prompt_length:-1]).strip() == "3 + 4 = 7\nThe answer is 7."
    assert ids[0] == (tokenizer.bos_token_id if name == "mistral" else tokenizer("Below")["input_ids"][0])
    assert ids.count(tokenizer.eos_token_id) == 1


def test_mistral_ids_match_sentencepiece(mistral: PreTrainedTokenizerBase) -> None:
    assert mistral("### Response:")["input_ids"] == [1, 774, 12107, 28747]  # as its sentencepiece model gives, with bos


def test_response_directly_after_the_colon(gpt2: PreTrainedTokenizerBase) -> None:
    ids, _ = encode_example(gpt2, "Add.", "42", 1000)
    assert gpt2.decode(ids).endswith("### Response:42<|endoftext|>")


def test_literal_special_tokens_stay_text(tokenizer: PreTrainedTokenizerBase, gpt2: PreTrainedTokenizerBase) -> None:
    for each in (tokenizer, gpt2):
        eos = each.eos_token
        ids, prompt_length = encode_example(each, f"What is {eos}?", f"{eos} ends. {eos}", 1000)
        assert ids.count(each.eos_token_id) == 1
        assert each.decode(ids[prompt_length:-1]) == f"{eos} ends. {eos}"
        assert each(eos)["input_ids"] == [each.eos_token_id]  # the tokenizer itself is as before


def test_truncation_on_the_right(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, prompt_length = encode_example(tokenizer, "Add.", "forty-two", 1000)
    for max_length in range(1, len(whole) + 2):
        expected = (whole[:max_length], min(prompt_length, max_length))
        assert encode_example(tokenizer, "Add.", "forty-two", max_length) == expected


def test_batch_equals_singles(tokenizer: PreTrainedTokenizerBase) -> None:
    outputs = [f"{number}" * number for number in range(1, 6)]
    singles = [encode_example(tokenizer, text, out, 180) for text, out in zip(TEXTS, outputs, strict=True)]
    assert encode_examples(tokenizer, TEXTS, outputs, 180) == singles
    assert encode_examples(tokenizer, [], [], 180) == []


def test_long_text_gives_no_warning(gpt2: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture) -> None:
    ids, _ = encode_example(gpt2, "word " * 3000, "x", 512)
    assert len(ids) == 512
    assert caplog.records == []


def test_errors() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="max_length = 0: must be at least 1"):
        encode_example(tokenizer, "a", "b", 0)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        encode_example(tokenizer, "a", "b", 10)
