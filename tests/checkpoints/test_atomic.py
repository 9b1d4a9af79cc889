"""A checkpoint is whole or not there, whatever happens while it is written or afterwards."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from colm_ds.checkpoints import atomic
from colm_ds.checkpoints.manifest import write_manifest
from colm_ds.errors import CheckpointError
from tests.engine.training import Case, start, step
from tests.ranks import Ranks

CASE = Case("atomic", stage=2, colm={"selector": "random"})


def save_steps(folder: str, steps: list[int], keep_last: int | None = None) -> list[str]:
    """In a rank: a run with a checkpoint after each of the given steps; what is in the folder at the end."""
    engine = start(CASE)
    for number in range(1, max(steps) + 1):
        step(engine)
        if number in steps:
            engine.save_checkpoint(folder, keep_last=keep_last)
    engine.destroy()
    return sorted(os.listdir(folder))


def save_with_a_failing_write(folder: str, failing_rank: int, kind: str) -> tuple[str, list[str], int, list[str]]:
    """In a rank: two checkpoints, the second of which one rank cannot write, and a third; message, folder, step."""
    import torch.distributed as dist

    engine = start(CASE)
    step(engine)
    engine.save_checkpoint(folder)
    step(engine)
    writer = type(engine.deepspeed_engine.checkpoint_engine)
    plain = writer.save

    def fail(self: Any, state_dict: Any, path: str) -> None:
        if kind == "raises":
            raise OSError(errno.ENOSPC, "No space left on device", path)
        plain(self, state_dict, path)
        with open(path, "r+b") as file:
            middle = os.path.getsize(path) // 2
            if kind == "writes half":
                file.truncate(middle)
            else:
                file.seek(middle)
                byte = file.read(1)
                file.seek(middle)
                file.write(bytes([byte[0] ^ 1]))

    writer.save = fail if dist.get_rank() == failing_rank else plain
    message = ""
    try:
        engine.save_checkpoint(folder)
    except CheckpointError as error:
        message = str(error)
    writer.save = plain
    left = sorted(os.listdir(folder))
    step(engine)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = start(CASE)
    engine.load_checkpoint(folder)
    count = engine.step_count
    engine.destroy()
    return message, left, count, sorted(os.listdir(folder))


@pytest.mark.distributed
@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("kind", ["raises", "writes half", "writes a wrong byte"])
def test_a_rank_that_can_not_write(failing_rank: int, kind: str, pools: dict[int, Ranks], tmp_path: Path) -> None:
    """All ranks hear of it, nothing stays behind, training goes on and the next checkpoint is good."""
    answers = pools[2].run(save_with_a_failing_write, str(tmp_path), failing_rank, kind)
    for message, left, count, finally_there in answers:
        assert f"step_2: could not be saved: rank {failing_rank}: " in message
        assert " MiB are free there). " in message
        assert "Earlier checkpoints are untouched." in message
        assert left == ["latest", "step_1"]
        assert count == 3
        assert finally_there == ["latest", "step_1", "step_3"]
        if kind == "raises":
            assert "No space left on device" in message


def save_a_client_state(folder: str, kind: str) -> tuple[str, list[str]]:
    """In a rank: rank 0's client state cannot be written, then one that can; the message, and what is there."""
    import threading

    import torch.distributed as dist

    class Local:
        pass

    kinds: dict[str, Any] = {"lambda": lambda: 0, "lock": threading.Lock(), "local": Local()}
    engine = start(CASE)
    step(engine)
    message = ""
    try:
        engine.save_checkpoint(folder, client_state={"mine": kinds[kind]} if dist.get_rank() == 0 else None)
    except CheckpointError as error:
        message = str(error)
    engine.save_checkpoint(folder, client_state={"mine": 1})
    engine.destroy()
    return message, sorted(os.listdir(folder))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["lambda", "lock", "local"])
def test_a_client_state_that_cannot_be_written(kind: str, pools: dict[int, Ranks], tmp_path: Path) -> None:
    for message, left in pools[2].run(save_a_client_state, str(tmp_path), kind):
        assert "step_1: could not be saved: rank 0: ValueError: client_state cannot be written: " in message
        assert "Give tensors, numbers, texts, and lists and dictionaries of them (" in message
        assert left == ["latest", "step_1"]


@pytest.fixture(scope="module")
def saved(pools: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of three steps, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    assert pools[2].run(save_steps, str(folder), [1, 2, 3])[0] == ["latest", "step_1", "step_2", "step_3"]
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.distributed
def test_only_the_last_stay(pools: dict[int, Ranks], tmp_path: Path) -> None:
    assert pools[2].run(save_steps, str(tmp_path), [1, 2, 3, 4], 2)[0] == ["latest", "step_3", "step_4"]
    assert (tmp_path / "latest").read_text() == "step_4"


def go_back_and_save(folder: str, tag: str | None, keep_last: int | None) -> tuple[list[str], str]:
    """In a rank: a checkpoint is loaded, and the step after it saved; the folder, and what the next resume takes."""
    engine = start(CASE)
    engine.load_checkpoint(folder, tag)
    step(engine)
    engine.save_checkpoint(folder, keep_last=keep_last)
    engine.destroy()
    taken = atomic.find(Path(folder))
    return sorted(os.listdir(folder)), taken.path.name if taken else ""


@pytest.mark.distributed
@pytest.mark.parametrize("keep_last", [None, 1, 2])
def test_going_back_leaves_the_later_ones(keep_last: int | None, copied: Path, pools: dict[int, Ranks]) -> None:
    """What was just written stays, and is what the next resume takes; a folder without a checkpoint is not touched."""
    (copied / "run_2024").mkdir()
    left, taken = pools[2].run(go_back_and_save, str(copied), "step_1", keep_last)[0]
    assert left == ["latest", "run_2024", *(["step_1"] if keep_last != 1 else []), "step_2"]
    assert taken == "step_2"
    assert (copied / "latest").read_text() == "step_2"


@pytest.mark.distributed
def test_a_damaged_newest_one_does_not_outlive_its_successor(copied: Path, pools: dict[int, Ranks]) -> None:
    """It is passed over at the resume, and of later steps than what is saved next."""
    shutil.copytree(copied / "step_3", copied / "step_9")
    (copied / "step_9" / "manifest_00000.json").write_text("{")
    model = next((copied / "step_3").glob("mp_rank*"))
    model.write_bytes(model.read_bytes()[:-7])
    assert pools[2].run(go_back_and_save, str(copied), None, 1)[0] == (["latest", "step_3"], "step_3")
    assert atomic.why_not_whole(copied / "step_3") is None


def checkpoint_of(folder: Path, name: str, step: int) -> Path:
    """The folder and the manifest of a checkpoint."""
    (folder / name).mkdir()
    write_manifest(folder / name, 0, step=step, world_size=1, files={}, facts={})
    return folder / name


def test_what_was_just_written_is_never_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where its name sorts before another of the same step."""
    for step_of in (1, 2, 3):
        checkpoint_of(tmp_path, f"step_{step_of}", step_of)
    target = checkpoint_of(tmp_path, "best", 2)
    atomic._remove_later(target, 2)
    assert [record.getMessage() for record in caplog.records] == [
        f"{target}: removed step_3: of later steps, which the run has left."
    ]
    atomic._prune(target, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_2"]
    atomic._prune(target, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.distributed
def test_every_file_is_in_a_manifest(saved: Path) -> None:
    found = atomic.find(saved)
    assert found is not None
    assert (found.path.name, found.step, found.world_size, found.passed_over) == ("step_3", 3, 2, ())
    assert found.facts["stage"] == 2
    names = {path.name for path in found.path.iterdir() if not path.name.startswith("manifest_")}
    assert {"colm.pt", "colm_rank_00000.pt", "colm_rank_00001.pt"} <= names
    assert sum("zero_pp_rank" in name for name in names) == 2
    for name in names:  # each of them is looked at
        damaged = found.path / name
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-1])
        assert name in (atomic.why_not_whole(found.path) or "")
        damaged.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        assert "is not what was written" in (atomic.why_not_whole(found.path) or "")
        damaged.unlink()
        assert atomic.why_not_whole(found.path) is not None
        damaged.write_bytes(content)
    assert atomic.why_not_whole(found.path) is None


@pytest.mark.distributed
def test_the_newest_whole_one_is_taken(copied: Path) -> None:
    """A truncated file, a missing manifest of rank 1: older ones are taken and the reasons told; at last an error."""
    model = next((copied / "step_3").glob("mp_rank*"))
    model.write_bytes(model.read_bytes()[:-7])
    found = atomic.find(copied)
    assert found is not None
    assert found.path.name == "step_2"
    assert len(found.passed_over) == 1
    assert found.passed_over[0].startswith(f"step_3: {model.name} has ")
    (copied / "step_2" / "manifest_00001.json").unlink()
    found = atomic.find(copied)
    assert found is not None
    assert found.path.name == "step_1"
    assert [reason.partition(":")[0] for reason in found.passed_over] == ["step_3", "step_2"]
    (copied / "step_1" / "manifest_00000.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of its checkpoints can be loaded") as error:
        atomic.find(copied)
    assert str(error.value).count("\n  step_") == 3
    with pytest.raises(CheckpointError, match="step_9: no such checkpoint"):
        atomic.find(copied, "step_9")


def test_ranks_share_out_the_same_files(tmp_path: Path) -> None:
    """Also while another rank writes its manifest: each file is checked by exactly one."""
    for name in ("a.pt", "colm.pt", "z/b.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = atomic._written(tmp_path)
    (tmp_path / ".manifest_00000.json.tmp").write_text("{")
    (tmp_path / "manifest_00001.json").write_text("{}")
    assert atomic._written(tmp_path) == before
    assert len(before) == 3


@pytest.mark.parametrize("tag", ["latest", ".mine", "epoch/1", "..", "/"])
def test_a_tag_that_names_no_folder(tag: str) -> None:
    with pytest.raises(CheckpointError, match=r"names no checkpoint\. Give the name of a folder"):
        atomic.check_tag(tag)


def test_folders_of_other_things_are_no_checkpoints(tmp_path: Path) -> None:
    """A run's own logs do not keep it from starting; what was a checkpoint by name or files is told."""
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.txt").write_text("")
    assert atomic.find(tmp_path) is None
    (tmp_path / "gone").symlink_to(tmp_path / "logs")
    assert atomic.find(tmp_path) is None
    (tmp_path / "global_step3").mkdir()
    with pytest.raises(CheckpointError, match="global_step3: holds no state of colm_ds"):
        atomic.find(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert atomic.find(tmp_path) is None
    assert atomic.find(tmp_path / "missing") is None


@pytest.mark.distributed
def test_half_written_folders_are_not_looked_at(copied: Path) -> None:
    (copied / "step_3").rename(copied / ".partial_step_3")
    found = atomic.find(copied)
    assert found is not None
    assert found.path.name == "step_2"
    assert found.passed_over == ()


@pytest.mark.distributed
@pytest.mark.parametrize("tag", [None, "step_3"])
def test_a_kill_between_the_two_renames_of_a_replacement(tag: str | None, copied: Path) -> None:
    """The one that was moved aside comes back where its successor did not arrive, also where it is named."""
    (copied / "step_3").rename(copied / ".trash_step_3")
    found = atomic.find(copied)
    assert found is not None
    assert found.path.name == "step_2"  # someone who only looks changes nothing
    found = atomic.find(copied, tag, repair=True)
    assert found is not None
    assert found.path.name == "step_3"


def load_with_another_model(folder: str, case: Case) -> str:
    """In a rank: what loading into another model says."""
    engine = start(case)
    try:
        engine.load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case("stage", stage=1, colm={"selector": "random"}), "was saved with stage 2, this engine has 1"),
        (Case("wider", stage=2, colm={"selector": "random"}, model={"intermediate_size": 40}), "has shape"),
        (Case("lora", stage=2, lora=True, colm={"selector": "random"}), "None: not trained"),
        (Case("r", stage=2, colm={"selector": "random", "large_batch_size": 20}), "saved with large_batch_size 29"),
        (Case("seed", stage=2, colm={"selector": "random", "seed": 9}), "saved with seed 3, this run has 9"),
        (Case("rows", stage=2, colm={"selector": "random"}, sources={"a": 90}), "saved with dataset 123, this run has"),
    ],
    ids=["stage", "shape", "lora", "r", "seed", "rows"],
)
def test_another_run(case: Case, said: str, saved: Path, pools: dict[int, Ranks]) -> None:
    advice = "Resume with the model, LoRA and ZeRO stage that it was saved with."
    if "saved with stage" not in said and "saved with" in said:
        advice = "Resume with the former, or take the weights alone (load_module_only=True)."
    for message in pools[2].run(load_with_another_model, str(saved), case):
        assert said in message
        assert advice in message
