"""Ranks go to the GPUs that CUDA_VISIBLE_DEVICES leaves."""

from __future__ import annotations

import pytest

from colm_ds.errors import ConfigError
from colm_ds.process import launch


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with GPUs, of which none is hidden."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(launch, "accelerator_environment", dict)
    return monkeypatch


def test_all_of_them(gpus: pytest.MonkeyPatch) -> None:
    assert "--num_gpus" in launch.ranks_command(["train"], 2)


@pytest.mark.parametrize(("visible", "num_ranks", "taken"), [("2,3", 2, "2,3"), (" 5, 1,7", 2, "5,1")])
def test_those_that_are_visible(visible: str, num_ranks: int, taken: str, gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", visible)
    command = launch.ranks_command(["train"], num_ranks)
    assert command[command.index("--include") + 1] == f"localhost:{taken}"
    assert "--num_gpus" not in command
    assert "localhost:0" in launch.ranks_command(["train"], 1, devices="0")  # named ones come first


def test_names_of_all_that_there_are(gpus: pytest.MonkeyPatch) -> None:
    """As in a container, where the launcher's first ones are the right ones."""
    gpus.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2c,GPU-91aa")
    gpus.setattr(launch, "_num_gpus_of_machine", lambda: 2)
    assert "--num_gpus" in launch.ranks_command(["train"], 2)


@pytest.mark.parametrize(("visible", "said"), [("3", "1 GPUs for 2 ranks"), ("GPU-8f2c,GPU-91aa", "by their numbers")])
def test_what_the_launcher_cannot_take(visible: str, said: str, gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus.setattr(launch, "_num_gpus_of_machine", lambda: 8)
    with pytest.raises(ConfigError, match=said):
        launch.ranks_command(["train"], 2)
    launch.ranks_command(["train"], 1)  # without a launcher


def test_a_cpu_has_none_to_choose(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "0")
    gpus.setenv("DS_ACCELERATOR", "cpu")
    assert "--num_gpus" in launch.ranks_command(["train"], 2)
