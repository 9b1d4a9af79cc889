"""Held-out questions of every schema: the prompt as it was trained on, the gold answer, and what ends an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.data import DataEntry
from colm_ds.data.chat import ChatEncoder
from colm_ds.errors import ConfigError, DataError
from colm_ds.evaluation.exact_match import Question, exact_match, final_answer, load_questions
from colm_ds.selection import SingleProcess
from tests.data.chats import as_chatml, chat_tokenizer
from tests.data.test_formats import write_rows
from tests.data.test_rows import expected, rows_of
from tests.tiny_models import tiny_model


def questions_of(rows: list[dict[str, Any]], path: Path) -> list[Question]:
    tokenizer = chat_tokenizer()
    entry = DataEntry(path=str(write_rows(rows, path)), name="held out")
    return load_questions([entry], tokenizer, ChatEncoder(tokenizer))


@pytest.mark.parametrize("schema", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_questions(schema: str, tmp_path: Path) -> None:
    """A prompt is everything before the last answer, token by token as in training."""
    tokenizer = chat_tokenizer()
    for number, question in enumerate(questions_of(rows_of(schema), tmp_path / "rows.jsonl")):
        ids, labels = expected(schema, tokenizer, number)
        starts = [place for place in range(1, len(ids)) if labels[place] != -100 and labels[place - 1] == -100]
        assert list(question.prompt) == ids[: starts[-1]]
        last = tokenizer.decode(labels[starts[-1] :], skip_special_tokens=True) if schema[0] in "ap" else f"e {number}"
        assert question.answer == final_answer(last)
        assert question.source == "held out"
        assert question.end in (None, tokenizer.convert_tokens_to_ids("<|im_end|>"))
        assert (question.end is None) == (schema in ("alpaca", "prompt_completion"))


def test_an_answer_and_a_source_of_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2", "completion": "4. The answer is 4.", "source": "sums"}]
    assert [(q.source, q.answer) for q in questions_of(rows, tmp_path / "a.jsonl")] == [("sums", "4")]
    rows = [row | {"answer": "four"} for row in rows]
    assert [q.answer for q in questions_of(rows, tmp_path / "b.jsonl")] == ["four"]
    rows = [row | {"answer": 0} for row in rows]
    assert [q.answer for q in questions_of(rows, tmp_path / "c.jsonl")] == ["0"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 40 + 2. The answer is: 42.", "42"),
        ("The answer is:\n42.\nDone.", "42"),
        ("The answer is 1. No. The answer is\n\n 7 ", "7"),
        ("yes.\nAnd more", "yes"),
        ("The answer is:\n", ""),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_an_empty_answer_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2", "completion": "The answer is:"}]
    with pytest.raises(DataError, match=r"a.jsonl:1: its answer is empty"):
        questions_of(rows, tmp_path / "a.jsonl")


def test_a_text_has_no_question(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.jsonl:1: a text has no question. Set evaluation.exact_match=false"):
        questions_of(rows_of("text"), tmp_path / "a.jsonl")


def ask(model: Any, tokenizer: Any, questions: list[Question], max_new_tokens: int) -> dict[str, Any]:
    return exact_match(
        model,
        tokenizer,
        questions,
        device=torch.device("cpu"),
        exchange=SingleProcess(),
        rank=0,
        max_new_tokens=max_new_tokens,
        max_tokens=99,
    )


def test_settings_of_generation_that_come_with_a_model_do_not_count() -> None:
    """Greedy is greedy: with a penalty of repetitions the model would say something else."""
    tokenizer, model = chat_tokenizer(), tiny_model("gpt2", vocab_size=300, max_position_embeddings=64).eval()
    prompt = list(range(60))
    ids = prompt[-56:]
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    answer = final_answer(tokenizer.decode(ids[56:], skip_special_tokens=True))
    questions = [Question("a", tuple(prompt), answer)]
    assert (
        ask(model, tokenizer, questions, 8)["overall"] == 1.0
    )  # 60 + 8 tokens do not fit 64 positions: cut on the left
    model.generation_config.repetition_penalty = 1.9
    assert ask(model, tokenizer, questions, 8)["overall"] == 1.0
    assert model.generation_config.repetition_penalty == 1.9
    with pytest.raises(ConfigError, match=r"max_new_tokens = 64: the model has 64 positions"):
        ask(model, tokenizer, questions, 64)


class Parrot(torch.nn.Module):
    """Answers with the first tokens that it was made with, until one of those that end an answer."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__()
        self.answer = answer
        self.config = None

    def generate(self, input_ids: torch.Tensor, eos_token_id: Any, pad_token_id: int, **_: Any) -> torch.Tensor:
        ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
        stop = next(place for place, token in enumerate(self.answer) if token in ends)
        answer = torch.tensor(self.answer[: stop + 1]).expand(len(input_ids), -1)
        return torch.cat([input_ids, answer], dim=1)


def test_an_answer_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """Which need not be eos."""
    tokenizer = chat_tokenizer(("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    assert tokenizer.eos_token == "<|endoftext|>"
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    entry = DataEntry(path=str(write_rows(rows, tmp_path / "a.jsonl")))
    questions = load_questions([entry], tokenizer, ChatEncoder(tokenizer))
    said = tokenizer("yes<|im_end|>no<|endoftext|>", add_special_tokens=False)["input_ids"]
    result = ask(Parrot(said), tokenizer, questions, 9)
    assert result == {"overall": 1.0, "per_source": {"a": 1.0}, "num_questions": 1}
    assert as_chatml(tokenizer, rows[0]["messages"], [1])[0][: len(questions[0].prompt)] == list(questions[0].prompt)
