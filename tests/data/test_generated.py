"""The generated mixture: right answers, disjoint sides, very different sources, the same files every time."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colm_ds.data import MixtureSampler, encode_prompt, load_examples, pad_batch, read_records
from colm_ds.data.generated.mixture import TASKS, VOCABULARY_SIZE, generate_records, main, write_mixture
from colm_ds.errors import ConfigError
from colm_ds.types import Example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    write_mixture(folder)
    return folder


def solve(source: str, instruction: str) -> str:
    """The answer, worked out from the text alone."""
    numbers = [int(number) for number in re.findall(r"\d+", instruction)]
    tail = instruction.rstrip("?").split()
    task = source.removeprefix("generated/")
    if task == "sort":
        return " ".join(sorted(tail[3:]))
    if task == "count":
        return str(tail[5:].count("x"))
    if task == "parity":
        return ["even", "odd"][numbers[0] % 2]
    if task == "story":
        return str(numbers[0] + 1)
    return str({"largest": max(numbers), "add": sum(numbers)}[task])


def test_answers() -> None:
    train, heldout = generate_records()
    for record in train + heldout:
        assert record["answer"] == solve(record["source"], record["instruction"])
        assert record["output"].endswith(f"The answer is {record['answer']}.")
        assert record["output"].count("The answer is") == 1


def test_sizes_and_sides() -> None:
    train, heldout = generate_records()
    counts = Counter(record["source"] for record in train)
    assert counts == {task.name: task.num_train for task in TASKS}
    assert max(counts.values()) >= 100 * min(counts.values())
    small = [name for name, count in counts.items() if count < len(train) / len(counts)]
    assert len(small) >= 3
    assert len(counts) - len(small) >= 2
    assert Counter(record["source"] for record in heldout) == {task.name: 60 for task in TASKS}
    instructions = [record["instruction"] for record in train + heldout]
    assert len(set(instructions)) == len(instructions)


def test_scale_and_seed() -> None:
    train, heldout = generate_records(scale=0.01)
    assert Counter(record["source"] for record in train)["generated/sort"] == 60
    assert min(Counter(record["source"] for record in train).values()) == 2
    assert min(Counter(record["source"] for record in heldout).values()) == 2
    assert generate_records(1, 0.01) != generate_records(0, 0.01) == (train, heldout)
    with pytest.raises(ConfigError, match=r"scale = 3.0: generated/\w+ would need \d+ items .* Choose at most"):
        generate_records(scale=3.0)
    with pytest.raises(ConfigError, match="must be above 0"):
        generate_records(scale=0)


def test_same_files_every_time(folder: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time over the files of the first
        write_mixture(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {"train.jsonl", "heldout.jsonl", "tokenizer/tokenizer.json"} <= {file.as_posix() for file in files}
    again = tmp_path / "again"
    assert sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file()) == files
    for file in files:
        assert (folder / file).read_bytes() == (again / file).read_bytes()


def test_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("</s>", "<pad>", None)
    assert VOCABULARY_SIZE * 0.75 <= len(tokenizer) <= VOCABULARY_SIZE
    for text in ("Add 12 and 305.", "é 数 \U0001f600\n\t", "The answer is a b c."):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([token]) for token in tokenizer("1234")["input_ids"]] == list("1234")
    assert len(encode_prompt(tokenizer, "")) <= 32


def test_loads_as_instructions(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for name in ("train", "heldout"):
        dataset = load_examples(folder / f"{name}.jsonl", tokenizer, 96)
        assert len(dataset) == len(list(read_records(folder / f"{name}.jsonl")))
        assert dataset.num_dropped == {"no_labels_after_truncation": 0}
        assert dataset.lengths.max() < 96  # nothing is truncated
        assert list(dataset.source_names) == sorted(task.name for task in TASKS)


def test_command_line(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "a"), "--scale", "0.01", "--seed", "3"])
    assert "    60  generated/sort\n" in capsys.readouterr().out
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "colm_ds.data.generated", str(tmp_path / "b")]
    subprocess.run([*command, "--scale", "0.01", "--seed", "3"], check=True, capture_output=True, cwd=repo_root)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.slow
def test_tiny_llama_learns(folder: Path) -> None:
    """A Llama of half a million parameters, 150 steps of 32 (15 s): every source's held-out loss falls clearly."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    train, heldout = (load_examples(folder / f"{name}.jsonl", tokenizer, 96) for name in ("train", "heldout"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=2,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )

    def loss(examples: list[Example]) -> torch.Tensor:
        batch = pad_batch(examples, tokenizer.pad_token_id)
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def heldout_losses() -> dict[str, float]:
        with torch.no_grad():
            parts = [(heldout.source_ids == source).nonzero()[0] for source in range(len(heldout.source_names))]
            losses = [float(loss([heldout[index] for index in part])) for part in parts]
        return dict(zip(heldout.source_names, losses, strict=True))

    before = heldout_losses()
    sampler = MixtureSampler(len(train), 32, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(1, 151):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(step / 10, (151 - step) / 140)
        loss([train[index] for index in sampler.indices(step)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    after = heldout_losses()
    assert min(before.values()) > 5
    assert max(after.values()) < 1.5
    assert max(after["generated/sort"], after["generated/largest"], after["generated/count"]) < 0.25
