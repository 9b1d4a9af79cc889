"""Greedy generation: batched equals one by one, stop strings, and what stopped costs nothing more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colm_ds.data.prompt import encode_prompt, encode_text, format_prompt
from colm_ds.errors import ConfigError
from colm_ds.evaluation.backend import TransformersBackend
from colm_ds.evaluation.generate import Generation, StopStrings, greedy
from tests.evaluation.stubs import CPU, VOCABULARY_SIZE, make_backend, make_model
from tests.tiny_models import add_lora

FAMILIES = ("llama", "mistral", "phi", "phi3", "stablelm", "qwen2")
PROMPTS = [
    "Add 1 and 2.",
    "Which digit is the largest: 3, 9, 1, 4?",
    "Is 11 even or odd? " * 6,
    "x",
    "Sort the letters b a d c, then say how many there are and which of them comes last in the alphabet.",
]


def ask(backend: Any, prompts: list[str], max_new_tokens: int = 24, stop: tuple[str, ...] = ()) -> list[Generation]:
    found = [
        each for batch in backend.generate(prompts, max_new_tokens=max_new_tokens, stop_strings=stop) for each in batch
    ]
    assert sorted(place for place, _ in found) == list(range(len(prompts)))
    return [written for _, written in sorted(found, key=lambda each: each[0])]


def plain_greedy(model: Any, ids: list[int], count: int, eos: set[int]) -> list[int]:
    """The oracle: every token from a whole forward pass, without cache and padding."""
    produced: list[int] = []
    while len(produced) < count and not (produced and produced[-1] in eos):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + produced]), use_cache=False).logits
        produced.append(int(logits[0, -1].argmax()))
    return produced


@pytest.mark.filterwarnings("error:.*past_key_values")
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_one_by_one_and_the_plain_loop(family: str, tokenizer: Any) -> None:
    backend = make_backend(tokenizer, family)
    together = ask(backend, PROMPTS)
    alone = [ask(backend, [prompt])[0] for prompt in PROMPTS]
    assert together == alone
    for prompt, written in zip(PROMPTS, together, strict=True):
        expected = plain_greedy(backend.model, encode_text(tokenizer, prompt), 24, {1})
        assert written.text == StopStrings(tokenizer, ()).decode(expected)
        assert written.num_tokens == len(expected)


def test_sliding_window_attention_gives_the_plain_loop(tokenizer: Any) -> None:
    model = make_model("mistral", sliding_window=8)
    written = ask(TransformersBackend(model, tokenizer, CPU), PROMPTS)
    for prompt, each in zip(PROMPTS, written, strict=True):
        expected = plain_greedy(model, encode_text(tokenizer, prompt), 24, {1})
        assert each.text == StopStrings(tokenizer, ()).decode(expected)


@pytest.mark.filterwarnings("error:.*past_key_values")
def test_adapter_is_used(tokenizer: Any) -> None:
    plain = make_model()
    adapted = make_model(lora=True)
    written = ask(TransformersBackend(adapted, tokenizer, CPU), PROMPTS)
    assert written == [ask(TransformersBackend(adapted, tokenizer, CPU), [prompt])[0] for prompt in PROMPTS]
    assert written != ask(TransformersBackend(plain, tokenizer, CPU), PROMPTS)
    untrained = add_lora(make_model(), "llama")  # lora_B is zero: the base's answers
    assert ask(TransformersBackend(untrained, tokenizer, CPU), PROMPTS) == ask(
        TransformersBackend(plain, tokenizer, CPU), PROMPTS
    )


def count_batches(model: Any) -> list[int]:
    """How many sequences each call of the model has, from now on."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(len(named["input_ids"])), with_kwargs=True
    )
    return sizes


class ScriptedModel:
    """Writes a given text after each prompt, whose first token is its number + 2; forgets nothing, as a cache would."""

    def __init__(self, scripts: list[list[int]]) -> None:
        self._scripts = scripts
        self.batch_sizes: list[int] = []

    def __call__(self, *, input_ids: Any, past_key_values: Any, attention_mask: Any, **arguments: Any) -> Any:
        cache = past_key_values or ScriptedCache(
            [int(row[mask.bool()][0]) - 2 for row, mask in zip(input_ids, attention_mask, strict=True)]
        )
        self.batch_sizes.append(len(input_ids))
        logits = torch.zeros(len(input_ids), 1, VOCABULARY_SIZE)
        for row, number in enumerate(cache.numbers):
            logits[row, 0, self._scripts[number][cache.step]] = 1.0
        cache.step += 1
        return type("Output", (), {"logits": logits, "past_key_values": cache})()


class ScriptedCache:
    """Which script each row follows, and how far."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.step = 0

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        self.numbers = [self.numbers[row] for row in rows.tolist()]


def test_sequences_that_stopped_leave_the_batch(tokenizer: Any) -> None:
    texts = ["12 Question: more", "The answer", "USER", "a" * 40]
    scripts = [[*tokenizer(text)["input_ids"], 1, *[5] * 60] for text in texts]
    model = ScriptedModel(scripts)
    written = greedy(
        model,
        tokenizer,
        [[2], [3, 9, 9], [4], [5, 9]],
        max_new_tokens=30,
        stop_strings=("Question", "USER"),
        device=CPU,
        eos_ids=frozenset({1}),
    )
    assert [each.text for each in written[:3]] == ["12 ", "The answer", ""]
    assert [each.reason for each in written[:3]] == ["stop", "eos", "stop"]
    assert model.batch_sizes[0] == 4
    assert sum(model.batch_sizes) == sum(each.num_tokens for each in written)  # a row for each token, and no other
    assert written[0].num_tokens < len(scripts[0]) - 61  # ended inside the text, where "Question" was complete
    assert len(model.batch_sizes) == max(each.num_tokens for each in written)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_stop_strings_cut_the_same_text_and_save_forwards(family: str, tokenizer: Any) -> None:
    backend = make_backend(tokenizer, family)
    free = ask(backend, PROMPTS, 40)
    stop = (free[0].text[5:8], free[2].text[20:22])
    assert all(string.strip() for string in stop)
    batch_sizes = count_batches(backend.model)
    stopped = ask(backend, PROMPTS, 40, stop)
    for before, after in zip(free, stopped, strict=True):
        cut = StopStrings(tokenizer, stop).first(before.text)
        assert after.text == before.text[:cut]
        assert (after.reason == "stop") == (cut is not None)
    assert sum(batch_sizes) == sum(each.num_tokens for each in stopped)
    assert sum(each.num_tokens for each in stopped) < sum(each.num_tokens for each in free)


def test_stop_string_over_several_tokens_and_inside_one(tokenizer: Any) -> None:
    stop = StopStrings(tokenizer, ("ponse:",))
    ids = tokenizer("Some words. ### Response: and more")["input_ids"]
    reached = [count for count in range(1, len(ids) + 1) if stop.reached(ids[:count])]
    first = reached[0]
    assert "ponse:" in tokenizer.decode(ids[:first])
    assert "ponse:" not in tokenizer.decode(ids[: first - 1])
    assert stop.cut(ids) == "Some words. ### Res"


def test_prompt_is_encoded_as_in_training(tokenizer: Any) -> None:
    for instruction in ("What is 2 + 2?", "a </s> in text", ""):
        assert encode_text(tokenizer, format_prompt(instruction)) == encode_prompt(tokenizer, instruction)


def test_long_prompt_is_cut_on_the_left_and_said(tokenizer: Any) -> None:
    backend = TransformersBackend(make_model(max_position_embeddings=64), tokenizer, CPU)
    long = "Is 11 even or odd? " * 30
    written = ask(backend, [long, "short"], 16)
    assert [each.prompt_truncated for each in written] == [True, False]
    ids = encode_text(tokenizer, long)[-48:]
    assert written[0].text == StopStrings(tokenizer, ()).decode(plain_greedy(backend.model, ids, 16, {1}))
    with pytest.raises(ConfigError, match="--max-new-tokens 64: the model has 64 positions"):
        ask(backend, ["short"], 64)


def test_broken_weights_are_an_error_not_an_answer(tokenizer: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        ask(TransformersBackend(model, tokenizer, CPU), ["x"])


@pytest.mark.parametrize("budget", [{"max_tokens": 1}, {"max_tokens": 200}, {"max_examples": 2}])
def test_batch_size_does_not_matter(budget: dict[str, int], tokenizer: Any) -> None:
    assert ask(make_backend(tokenizer, **budget), PROMPTS) == ask(make_backend(tokenizer), PROMPTS)
    assert ask(make_backend(tokenizer), []) == []
