"""Memory that runs out in an engine on any kind of data: where, which micro-batch, and three changes that help."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from colm_ds.data.pretraining.chunks import ChunkDataset
from colm_ds.data.pretraining.token_store import MANIFEST, PARTS, TRAIN, TokenStore, write_part
from colm_ds.engine.out_of_memory import ADVICE
from tests.choices import random_choices
from tests.engine.training import Case, start
from tests.ranks import Ranks
from tests.tiny_models import VOCABULARY_SIZE

pytestmark = pytest.mark.distributed


def chunks(folder: Path) -> ChunkDataset:
    """A store of random tokens, its chunks of 32."""
    tokens = np.random.default_rng(0).integers(3, VOCABULARY_SIZE, 40 * 32)
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    write_part(folder / PARTS, "0", {(TRAIN, "text"): tokens}, "<u2", {})
    meta = json.loads((folder / PARTS / "0.json").read_text())
    manifest = {"sources": {"text": {}}, "dtype": "<u2", "parts": [{"name": "0", **meta}]}
    manifest |= {"tokenizer": "", "vocabulary_size": VOCABULARY_SIZE}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return ChunkDataset(TokenStore(folder), TRAIN, 32)


def starve(dataset: Any, phase: str) -> tuple[Any, str, str]:
    """In a rank: where memory ran out in an engine's second step, what it says, and what a recipe's run says."""
    from colm_ds.engine import accumulation, probe_pass
    from colm_ds.errors import DeviceMemoryError
    from colm_ds.planner.advice import planned_advice

    module: Any = probe_pass if phase == "probe" else accumulation
    name = "run_trunk" if phase == "probe" else "example_loss_sums"
    own = getattr(module, name)

    def allocate(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 4 GiB")

    engine = start(Case("starved", colm={"small_sources": "none"}), training_data=dataset)
    try:
        engine.train_batch()
        setattr(module, name, allocate)
        try:
            engine.train_batch()
        except DeviceMemoryError as error:
            return (
                (error.phase, error.step, error.rank),
                str(error),
                str(error.with_advice(planned_advice(engine, error))),
            )
        finally:
            setattr(module, name, own)
    finally:
        engine.destroy()
    raise AssertionError("memory did not run out")


@pytest.mark.parametrize("phase", ["probe", "forward"])
@pytest.mark.parametrize("kind", ["choices", "pretraining"])
def test_advice(kind: str, phase: str, pools: dict[int, Ranks], tmp_path: Path) -> None:
    dataset = random_choices(60, kinds=((3, 2, 2), (1, 1))) if kind == "choices" else chunks(tmp_path)
    ((where, engine_said, said),) = pools[1].run(starve, dataset, phase)
    size = r"\d+ examples in \d+ rows x \d+ tokens" if kind == "choices" else r"\d+ examples x 32 tokens"
    assert where == (phase, 2, 0)
    for message in (engine_said, said):
        assert re.search(rf"^rank 0: out of memory in phase '{phase}' of step 2, micro-batch of {size}\.\n", message)
        assert message.endswith("PyTorch: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert ADVICE[phase] in engine_said
    assert ("colm.probe.max_tokens" if phase == "probe" else "train_micro_batch_size_per_gpu") in engine_said
    assert ADVICE[phase] not in said
    assert re.search(r"Planned for it: \d+\.\d\d MiB, most of it \w+ [\d.]+ MiB, \w+ [\d.]+ MiB", said), said
    found = re.findall(r"^ +(\S+)=\S+  \((\d+\.\d\d) MiB less\)$", said, flags=re.MULTILINE)
    keys, saved = [key for key, _ in found], [float(size) for _, size in found]
    assert len(set(keys)) == 3, said
    assert saved == sorted(saved, reverse=True)
    assert ("data.chunk_tokens" if kind == "choices" else "data.max_length") not in keys
    assert ("colm.probe.max_tokens" if phase == "probe" else "micro_batch_size") in keys
