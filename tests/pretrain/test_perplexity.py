"""Held-out perplexity of a run: that of a plain loop over the held-out chunks, at any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.pretrain.runs import WEIGHTS, Prepared, read_metrics, read_summary, train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]

CHUNK = 64


@pytest.fixture(scope="module")
def runs(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on one and on two ranks, measured on every held-out chunk."""
    folder = tmp_path_factory.mktemp("perplexity")
    every_chunk = ("evaluation.chunks_per_source=null", "evaluation.max_tokens=300", "steps=2", "save_every=0")
    for ranks in (1, 2):
        done = train(ranks, str(prepared.recipe), *every_chunk, f"output_dir={folder / str(ranks)}")
        assert done.returncode == 0, done.stderr
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


def heldout_tokens(store: Path, source: str) -> np.ndarray:
    """Held-out tokens of a source, read from the files by what the manifest says of them."""
    manifest = json.loads((store / "manifest.json").read_text())
    pieces = []
    for part in manifest["parts"]:
        tokens = np.fromfile(store / "parts" / f"{part['name']}.bin", dtype=manifest["dtype"])
        for segment in part["segments"]:
            mine, tokens = np.split(tokens, [segment["tokens"]])
            if (segment["split"], segment["source"]) == ("heldout", source):
                pieces.append(mine)
    return np.concatenate(pieces).astype(np.int64)


def plain_losses(model: Any, store: Path) -> dict[str, float]:
    """Nats per predicted token by source, one chunk at a time."""
    found = {}
    for source in WEIGHTS:
        nats, count = 0.0, 0
        for chunk in torch.from_numpy(heldout_tokens(store, source)).split(CHUNK):
            if len(chunk) > 1:
                logits = model(chunk[None]).logits[0, :-1]
                nats += float(functional.cross_entropy(logits, chunk[1:], reduction="sum"))
                count += len(chunk) - 1
        found[source] = nats / count
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.slow
def test_a_plain_loop_finds_the_same(ranks: int, runs: dict[int, Path], prepared: Prepared) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs[ranks] / "model").eval()
    with torch.no_grad():
        plain = plain_losses(model, prepared.store)
    heldout = read_summary(runs[ranks])["heldout"]
    assert heldout["per_source"] == pytest.approx(plain, rel=1e-5)
    perplexity = {source: math.exp(loss) for source, loss in plain.items()}
    assert heldout["perplexity"]["per_source"] == pytest.approx(perplexity, rel=1e-4)
    overall = sum(plain[source] * share for source, share in WEIGHTS.items()) / sum(WEIGHTS.values())
    assert heldout["overall"] == pytest.approx(overall, rel=1e-3)  # shares are counted in whole chunks
    assert heldout["perplexity"]["overall"] == pytest.approx(math.exp(heldout["overall"]), rel=1e-9)


@pytest.mark.slow
def test_ranks_do_not_show(runs: dict[int, Path]) -> None:
    one, two = ([row["heldout"] for row in read_metrics(runs[ranks]) if "heldout" in row] for ranks in (1, 2))
    assert len(one) == len(two) == 2
    assert one[0]["perplexity"]["per_source"] == pytest.approx(two[0]["perplexity"]["per_source"], rel=1e-5)
    for before, after in zip(one, two, strict=True):
        assert before["overall"] == pytest.approx(after["overall"], rel=1e-4)
        assert before["per_source"] == pytest.approx(after["per_source"], rel=1e-4)
