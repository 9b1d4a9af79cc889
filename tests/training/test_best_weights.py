"""The best weights of a pretraining run outlast a kill while better ones take their place."""

from __future__ import annotations

import json
import math
from pathlib import Path

from colm_ds.run_folder.contents import own_entries
from colm_ds.training.tasks.pretraining import _best_so_far


def write_best(folder: Path, loss: float) -> None:
    folder.mkdir(parents=True)
    (folder / "best.json").write_text(json.dumps({"heldout_loss": loss}), encoding="utf-8")


def test_nothing_yet(tmp_path: Path) -> None:
    assert _best_so_far(tmp_path) == math.inf


def test_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    write_best(tmp_path / ".best_model_before", 2.5)
    assert own_entries(tmp_path) == [tmp_path / ".best_model_before"]  # so that a new run removes it
    assert _best_so_far(tmp_path) == 2.5
    assert (tmp_path / "best_model" / "best.json").exists()


def test_a_kill_before_the_old_ones_were_removed(tmp_path: Path) -> None:
    write_best(tmp_path / "best_model", 2.0)
    write_best(tmp_path / ".best_model_before", 2.5)
    assert _best_so_far(tmp_path) == 2.0
