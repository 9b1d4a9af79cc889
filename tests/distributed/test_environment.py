"""What a launcher sets, half of it, or a place where the ranks cannot meet: one message, before anything waits."""

from __future__ import annotations

import os
import socket

import pytest
import torch.distributed as dist

from colm_ds.distributed.agreement import meet, single_process_environment
from colm_ds.errors import ConfigError

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NAMES = [*WHOLE, "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "x")  # so that it is put back afterwards, whoever changes it
        monkeypatch.delenv(name)


def set_up(values: dict[str, str]) -> None:
    os.environ.update(values)
    single_process_environment()


def test_a_whole_environment_stays() -> None:
    set_up(WHOLE)
    assert {name: os.environ[name] for name in WHOLE} == WHOLE


def test_no_environment_is_a_single_process() -> None:
    set_up({})
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_a_rank_alone_names_all_that_is_missing() -> None:
    with pytest.raises(ConfigError) as error:
        set_up({"RANK": "0"})
    for name in ("WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        assert f"{name} = None: missing. Start with deepspeed, torchrun, mpirun or srun, or unset RANK" in str(
            error.value
        )


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "2"},
        {"RANK": "-1"},
        {"RANK": ""},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "9" * 5000},
        {"LOCAL_RANK": "1.5"},
        {"MASTER_PORT": "65536"},
        {"MASTER_PORT": "²"},
    ],
)
def test_numbers_that_are_none(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        set_up({**WHOLE, **change})


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        set_up({**WHOLE, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port})
        with pytest.raises(
            ConfigError, match=f"MASTER_PORT = {port}: .* another process has that port. Choose another"
        ):
            meet(lambda: dist.init_process_group("gloo"))
    assert not dist.is_initialized()


def test_an_address_that_nobody_knows() -> None:
    def join() -> None:
        raise RuntimeError("The client socket has failed to connect\nmore")

    set_up(WHOLE)
    with pytest.raises(ConfigError, match=r"cannot meet there: The client socket has failed to connect\. Check both"):
        meet(join)
