"""Exact match of greedy answers, per source, by the text after the last "The answer is" in output and gold."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from colm_ds.batching.assign import home_ranks, micro_batches
from colm_ds.data.instructions import ONE_SOURCE
from colm_ds.data.prompt import encode_prompt
from colm_ds.data.records import find_places, read_place
from colm_ds.models.patch import eval_mode
from colm_ds.selection import Exchange

TRIGGER = "The answer is"


def final_answer(text: str) -> str:
    """Return the text after the last "The answer is" to the end of its line, without a full stop; else all the text."""
    answer = text.rpartition(TRIGGER)[2] if TRIGGER in text else text
    return answer.strip().split("\n")[0].strip().removesuffix(".").strip(" :")


def load_questions(paths: str | Sequence[str], source_key: str | None = "source") -> list[tuple[str, str, str]]:
    """Load (source, instruction, gold answer) of every record: its `answer`, or the end of its `output`."""
    questions = []
    for place in find_places(paths):
        for _, record in read_place(place):
            source = str(record[source_key]) if source_key else ONE_SOURCE
            answer = final_answer(str(record.get("answer") or record["output"]))
            questions.append((source, record["instruction"], answer))
    return questions


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[tuple[str, str, str]],
    *,
    device: torch.device,
    exchange: Exchange,
    rank: int,
    max_new_tokens: int,
    max_tokens: int,
    synced: bool = False,
) -> dict[str, Any]:
    """Return the share of questions whose greedy answer equals the gold one; all ranks call it together.

    Args:
        model: model with a `generate` method.
        tokenizer: the model's tokenizer.
        questions: (source, instruction, gold answer).
        device: where the model runs.
        exchange: the ranks.
        rank: this rank.
        max_new_tokens: maximum tokens of an answer.
        max_tokens: maximum padded tokens of a batch, answers included.
        synced: keep the ranks' forwards in lockstep (ZeRO-3).

    Returns:
        `overall`, `per_source` by name, `num_questions`.
    """
    prompts = [encode_prompt(tokenizer, instruction) for _, instruction, _ in questions]
    lengths = torch.tensor([len(prompt) + max_new_tokens for prompt in prompts])
    home = home_ranks(lengths, exchange.num_processes)
    by_rank = [(home == process).nonzero().flatten().tolist() for process in range(exchange.num_processes)]
    plan = micro_batches(by_rank, lengths, max_tokens=max_tokens)[rank]
    names = sorted({source for source, _, _ in questions})
    counts = torch.zeros(2, len(names), dtype=torch.float64)
    with eval_mode(model), torch.no_grad():
        for indices in plan:
            batch = [prompts[index] for index in indices] or [prompts[0]]
            texts = _generate(model, tokenizer, batch, device, max_new_tokens, synced)
            for index, text in zip(indices, texts, strict=False):
                source, _, gold = questions[index]
                counts[0, names.index(source)] += final_answer(text) == gold
                counts[1, names.index(source)] += 1
    right, asked = exchange.sum(counts.to(device)).cpu()
    return {
        "overall": float(right.sum() / asked.sum()),
        "per_source": {name: float(right[source] / asked[source]) for source, name in enumerate(names)},
        "num_questions": int(asked.sum()),
    }


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], device: torch.device, max_new_tokens: int, synced: bool
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
        output: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
            synced_gpus=synced,
        )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
