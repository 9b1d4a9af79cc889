"""A checkpoint that somebody else made, or that a disk damaged: nothing in it is run, and what is wrong is said."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from colm_ds.checkpoints import atomic
from colm_ds.checkpoints.manifest import read_manifest, write_manifest
from colm_ds.checkpoints.tensors_only import load_tensors, pickle_stage_by_value, tensors_only, why_not_tensors
from colm_ds.errors import CheckpointError
from tests.engine.training import Case, start, step
from tests.ranks import Ranks


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def checkpoint(folder: Path) -> Path:
    """A checkpoint of one rank without DeepSpeed."""
    folder.mkdir(parents=True)
    torch.save({"client_state": {}, "history": torch.ones(3)}, folder / atomic.SHARED)
    torch.save({"random_state": {"torch": torch.get_rng_state()}}, folder / "colm_rank_00000.pt")
    torch.save({"module": {"weight": torch.ones(2, 2)}}, folder / "mp_rank_00_model_states.pt")
    fit_manifest(folder)
    return folder


def size_and_checksum(path: Path) -> tuple[int, int]:
    return path.stat().st_size, zlib.crc32(path.read_bytes())


def fit_manifest(folder: Path, **changes: Any) -> None:
    """Write a manifest that fits whatever is in the folder, as someone with bad intentions would."""
    files = {
        path.name: (path.stat().st_size, zlib.crc32(path.read_bytes()))
        for path in folder.iterdir()
        if path.suffix == ".pt"
    }
    facts = {"stage": 0, "trained": {"weight": [2, 2]}}
    write_manifest(folder, 0, **{"step": 4, "world_size": 1, "files": files, "facts": facts, **changes})


@pytest.mark.parametrize("name", [atomic.SHARED, "colm_rank_00000.pt", "mp_rank_00_model_states.pt"])
def test_a_pickle_in_a_checkpoint_is_not_run(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints" / "step_4")
    content = torch.load(path / name, weights_only=False)
    torch.save({**content, "more": Payload(tmp_path / "was_run")}, path / name)
    fit_manifest(path)
    checkpoint(tmp_path / "checkpoints" / "step_2")
    fit_manifest(tmp_path / "checkpoints" / "step_2", step=2)
    found = atomic.find(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 2
    assert f"step_4: {name}: asks for posix.mkdir, which is neither a tensor nor a plain value" in found.passed_over[0]
    with tensors_only(), pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path / name, weights_only=False)  # as DeepSpeed asks for it
    assert not (tmp_path / "was_run").exists()
    torch.load(path / name, weights_only=False)
    assert (tmp_path / "was_run").exists()  # or this test would show nothing


def test_a_file_that_no_manifest_names_is_not_loaded(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_4")
    torch.save(Payload(tmp_path / "was_run"), path / "zero_pp_rank_9_mp_rank_00_optim_states.pt")
    assert atomic.why_not_whole(path) == "zero_pp_rank_9_mp_rank_00_optim_states.pt is not in its manifest"


def test_what_is_allowed_ends_with_the_block(tmp_path: Path) -> None:
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"), set(torch.serialization.get_safe_globals())
    with pytest.raises(ZeroDivisionError), tensors_only():
        raise ZeroDivisionError
    assert (os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"), set(torch.serialization.get_safe_globals())) == before
    (tmp_path / "a.pt").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(ValueError, match=r"a.pt is no torch file"):
        load_tensors(tmp_path / "a.pt")


def test_every_flipped_bit_of_a_manifest_is_seen(tmp_path: Path) -> None:
    """Of one whose meaning changes; blanks between values have none."""
    path = checkpoint(tmp_path / "step_4")
    file, right = path / "manifest_00000.json", read_manifest(path, 0)
    content = file.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                found = read_manifest(path, 0)
            except ValueError:
                continue
            assert found == right, (place, bit)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world_size": 0}, "world_size is 0, not a whole number of at least 1"),
        ({"world_size": -1}, "world_size is -1"),
        ({"world_size": True}, "world_size is True"),
        ({"world_size": 1.0}, "world_size is 1.0"),
        ({"world_size": 1 << 40}, "world_size is 1099511627776"),
        ({"step": -1}, "step is -1"),
        ({"step": None}, "step is None"),
        ({"step": "4"}, "step is '4'"),
        ({"files": {}}, "colm.pt is not in its manifest"),
        ({"files": []}, "files is []"),
        ({"files": {"../../x": [1, 1]}}, "'../../x' is not the path of a file in the checkpoint"),
        ({"files": {"/etc/passwd": [1, 1]}}, "'/etc/passwd' is not the path"),
        ({"files": {"colm.pt": [-1, 0]}}, "size of colm.pt is -1"),
        ({"files": {"colm.pt": [1, 1 << 32]}}, "CRC-32 of colm.pt is 4294967296"),
        ({"files": {"colm.pt": 7}}, "colm.pt is 7, not [size, CRC-32]"),
        ({"facts": []}, "facts are missing"),
        ({"more": 1}, "the unknown key 'more'"),
    ],
)
def test_numbers_out_of_bounds(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """In a manifest without a checksum, as version 0.1.0 wrote it."""
    path = checkpoint(tmp_path / "step_4")
    content = json.loads((path / "manifest_00000.json").read_text())
    del content["checksum"]
    (path / "manifest_00000.json").write_text(json.dumps(content))
    assert atomic.why_not_whole(path) is None  # old ones still load
    (path / "manifest_00000.json").write_text(json.dumps(content | change))
    assert said in (atomic.why_not_whole(path) or "")
    assert atomic.find(tmp_path / "nothing") is None
    with pytest.raises(CheckpointError, match="none of its checkpoints can be loaded"):
        atomic.find(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 10_000, '{"a": ' * 10_000, "\xff", '{"step": 1e999}'])
def test_a_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "step_4")
    (path / "manifest_00000.json").write_bytes(text.encode("latin-1"))
    assert (atomic.why_not_whole(path) or "").startswith(("not readable: ", "manifest_00000.json"))
    with pytest.raises(CheckpointError):
        atomic.describe(path)


CASE = Case("untrusted", stage=1, colm={"selector": "random"})


def save_and_spoil(folder: str, change: str) -> str:
    """In a rank: a checkpoint whose own files were changed with their manifest; what loading it says."""
    engine = start(CASE)
    step(engine)
    if change == "client state":
        try:
            engine.save_checkpoint(folder, client_state={"mine": Path("x")})
        except CheckpointError as error:
            return str(error)
    engine.save_checkpoint(folder)
    path = Path(folder) / "step_1"
    shared = load_tensors(path / atomic.SHARED)
    if change == "nothing":
        del shared["client_state"]
    elif change == "other type":
        shared = [1, 2]
    torch.save(shared, path / atomic.SHARED)
    manifest = read_manifest(path, 0)
    files = {
        name: (file.stat().st_size, zlib.crc32(file.read_bytes())) for name in manifest.files if (file := path / name)
    }
    write_manifest(path, 0, step=1, world_size=1, files=files, facts=manifest.facts)
    try:
        engine.load_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("nothing", "step_1: its files do not make a state of this run: KeyError: 'client_state'. Move it away"),
        ("other type", "step_1: its files do not make a state of this run: TypeError"),
        ("client state", "could not be saved: rank 0: OSError: colm.pt: asks for pathlib.PosixPath, which is neither"),
        ("", ""),
    ],
)
def test_what_fits_its_manifest_but_is_no_state(
    change: str, said: str, pools: dict[int, Ranks], tmp_path: Path
) -> None:
    (message,) = pools[1].run(save_and_spoil, str(tmp_path / "c"), change)
    assert said in message
    assert said or not message
    shutil.rmtree(tmp_path / "c", ignore_errors=True)


def test_a_stage_is_pickled_without_a_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python 3.11.0 to 3.11.3 would write `getattr(ZeroStageEnum, name)`, which is refused where it is loaded."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda stage, _: (getattr, (ZeroStageEnum, stage.name)))
    path = tmp_path / "state.pt"
    torch.save({"zero_stage": ZeroStageEnum.weights}, path)
    assert "getattr" in str(why_not_tensors(path))
    pickle_stage_by_value()
    torch.save({"zero_stage": ZeroStageEnum.weights}, path)
    assert load_tensors(path) == {"zero_stage": ZeroStageEnum.weights}
