"""Exact match of greedy answers, per source, by the text after the last "The answer is" in output and gold."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from colm_ds.batching.assign import by_rank, home_ranks, micro_batches
from colm_ds.data.chat import ChatEncoder
from colm_ds.data.entries import DataEntry
from colm_ds.data.formats import read_records
from colm_ds.data.parts import find_parts
from colm_ds.data.prompt import encode_text, leading_special_ids
from colm_ds.data.schemas import Conversation, Text, read_sample
from colm_ds.errors import DataError, Problems
from colm_ds.evaluation.generate import most_positions
from colm_ds.models.architecture import unwrap
from colm_ds.models.patch import eval_mode
from colm_ds.selection import Exchange

TRIGGER = "The answer is"

_AROUND = " :\n\r\t"
"""Characters between the trigger and the answer, and around it."""


def final_answer(text: str) -> str:
    """Return the first line after the last "The answer is", or else of the text, without a full stop at its end."""
    answer = text.rpartition(TRIGGER)[2] if TRIGGER in text else text
    return answer.strip(_AROUND).split("\n")[0].strip().removesuffix(".").strip(_AROUND)


@dataclass(frozen=True)
class Question:
    """A held-out prompt with its answer.

    Attributes:
        source: of the row.
        prompt: token ids up to where the answer begins.
        answer: the gold one.
        end: id of a token that ends an answer, besides eos; None: eos alone does.
    """

    source: str
    prompt: tuple[int, ...]
    answer: str
    end: int | None = None


def load_questions(entries: Sequence[DataEntry], tokenizer: Any, chat: ChatEncoder | None = None) -> list[Question]:
    """Load the questions of held-out rows: everything before a row's last answer.

    The gold answer is the row's `answer`, or the end of that last answer.

    Args:
        entries: of the held-out data.
        tokenizer: the model's tokenizer.
        chat: encodes conversations, where there are any.

    Raises:
        DataError: for a row that cannot be read, whose answer is empty, or a text, which has no question.
    """
    questions = []
    leading = leading_special_ids(tokenizer)
    for part in find_parts(entries):
        for where, row in read_records(part.place, part.split):
            sample = read_sample(row, part.schema, part.style)
            source = str(row[part.source_key]) if part.source_key and row.get(part.source_key) else part.source
            answer = row.get("answer")
            if isinstance(sample, Text):
                raise DataError(f"{where}: a text has no question. Set evaluation.exact_match=false.")
            if isinstance(sample, Conversation):
                assert chat is not None
                prompt, gold = chat.encode_prompt(sample), str(sample.messages[-1]["content"])
                end = chat.end_of_turn(chat.encode(sample))
            else:
                prompt, gold, end = encode_text(tokenizer, sample.prompt, leading), sample.response, None
            wanted = final_answer(gold if answer in (None, "") else str(answer))
            if not wanted:
                why = "its answer is empty, and any empty output would match it"
                raise DataError(f"{where}: {why}. Write one under 'answer', or set evaluation.exact_match=false.")
            questions.append(Question(source, tuple(prompt), wanted, end))
    return questions


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    device: torch.device,
    exchange: Exchange,
    rank: int,
    max_new_tokens: int,
    max_tokens: int,
    synced: bool = False,
) -> dict[str, Any]:
    """Return the share of questions whose greedy answer equals the gold one; all ranks call it together.

    Prompts too long for the model's positions are cut on the left. Settings of generation that come with the model,
    such as a penalty of repetitions, do not count.

    Args:
        model: model with a `generate` method.
        tokenizer: the model's tokenizer.
        questions: from `load_questions`.
        device: where the model runs.
        exchange: the ranks.
        rank: this rank.
        max_new_tokens: maximum tokens of an answer.
        max_tokens: maximum padded tokens of a batch, answers included.
        synced: keep the ranks' forwards in lockstep (ZeRO-3).

    Returns:
        `overall`, `per_source` by name, `num_questions`.
    """
    room = room_for_prompts(model, max_new_tokens)
    prompts = [list(question.prompt)[-room:] for question in questions]
    ends = {tokenizer.eos_token_id, *(question.end for question in questions if question.end is not None)}
    lengths = torch.tensor([len(prompt) + max_new_tokens for prompt in prompts])
    home = home_ranks(lengths, exchange.num_processes)
    held = by_rank(range(len(home)), home.tolist(), exchange.num_processes)
    plan = micro_batches(held, lengths, max_tokens=max_tokens)[rank]
    names = sorted({question.source for question in questions})
    counts = torch.zeros(2, len(names), dtype=torch.float64)
    with eval_mode(model), torch.no_grad():
        for indices in plan:
            batch = [prompts[index] for index in indices] or [prompts[0]]
            texts = _generate(model, tokenizer, batch, device, max_new_tokens, synced, sorted(ends))
            for index, text in zip(indices, texts, strict=False):
                source = names.index(questions[index].source)
                counts[0, source] += final_answer(text) == questions[index].answer
                counts[1, source] += 1
    right, asked = exchange.sum(counts.to(device)).cpu()
    return {
        "overall": float(right.sum() / asked.sum()),
        "per_source": {name: float(right[source] / asked[source]) for source, name in enumerate(names)},
        "num_questions": int(asked.sum()),
    }


def room_for_prompts(model: Any, max_new_tokens: int) -> int:
    """Return the maximum tokens of a prompt: the model's positions that an answer leaves.

    Raises:
        ConfigError: if it leaves none.
    """
    positions = most_positions(model) if hasattr(model, "config") else None
    if positions is not None and max_new_tokens >= positions:
        problems = Problems("recipe")
        why = f"the model has {positions} positions for prompt and answer"
        problems.add("evaluation.max_new_tokens", max_new_tokens, why, f"Choose at most {positions // 2}.")
        problems.raise_if_any()
    return sys.maxsize if positions is None else positions - max_new_tokens


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    device: torch.device,
    max_new_tokens: int,
    synced: bool,
    ends: list[int],
) -> list[str]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with contextlib.ExitStack() as stack:
        config = getattr(model, "config", None)
        if config is not None and config.use_cache is False:
            stack.callback(setattr, config, "use_cache", False)
            config.use_cache = True
        base: Any = unwrap(model)
        if getattr(base, "generation_config", None) is not None:  # may hold a penalty of repetitions, for example
            stack.callback(setattr, base, "generation_config", base.generation_config)
            base.generation_config = GenerationConfig()
        output: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=ends if len(ends) > 1 else ends[0],
            synced_gpus=synced,
        )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
