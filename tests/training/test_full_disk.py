"""The disk is full while the final weights are written: one message, exit code 1, and nothing half-written is left."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from safetensors import SafetensorError

from colm_ds.checkpoints.weights import save_trained
from colm_ds.training.run import crashes_explained
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "x"), SafetensorError("I/O error: No space left on device")],
)
def test_nothing_of_it_is_left(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    plain = type(model).save_pretrained

    def fails(self: Any, folder: Path, **options: Any) -> None:
        plain(self, folder, **options)
        raise error

    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    kept = save_trained(SimpleNamespace(module=model), tokenizer, tmp_path, is_main=True)
    before = (kept / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(model), "save_pretrained", fails)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(SystemExit) as end, crashes_explained():
        save_trained(SimpleNamespace(module=model), tokenizer, tmp_path, is_main=True)
    assert str(end.value.code).startswith("rank 0: ")
    assert "No space left on device" in str(end.value.code)
    assert str(end.value.code).endswith("Restarting resumes from the last checkpoint.")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (kept / "model.safetensors").read_bytes() == before
