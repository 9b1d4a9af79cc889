"""CPU tensors over a backend that takes the device's alone: NCCL with one rank; and gloo beside it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from colm_ds.distributed.exchange import DeviceExchange, ProcessGroupExchange
from colm_ds.selection import Exchange
from tests.gpu.device import DEVICE, HAS_GPU, on_gpu

pytestmark = on_gpu


def exchanges() -> dict[str, Exchange]:
    """Exchanges of this process with itself, by name."""
    gloo = dist.new_group([0], backend="gloo")
    return {
        "through the device": DeviceExchange(ProcessGroupExchange(), DEVICE),
        "gloo": ProcessGroupExchange(gloo),
        "gloo, through the CPU": DeviceExchange(ProcessGroupExchange(gloo), torch.device("cpu")),
    }


def test_backend(one_process: None) -> None:
    assert "nccl" in dist.get_backend() if HAS_GPU else dist.get_backend() == "gloo"


@pytest.mark.parametrize("name", ["through the device", "gloo", "gloo, through the CPU"])
def test_cpu_tensors_come_back(name: str, one_process: None) -> None:
    exchange = exchanges()[name]
    given = torch.arange(6, dtype=torch.float64)
    with exchange.counting("sums") as count:
        found = exchange.sum(given)
    assert found is given
    assert found.device.type == "cpu"
    assert found.tolist() == [0, 1, 2, 3, 4, 5]
    assert count.num_bytes == 6 * 8
    rows = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    gathered = exchange.gather_rows(rows, torch.tensor([2, 0]), 3)
    wanted = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, float("nan")]])
    torch.testing.assert_close(gathered, wanted, rtol=0, atol=0, equal_nan=True)
    assert gathered.device.type == "cpu"
    integers = torch.arange(4)
    assert exchange.broadcast(integers) is integers
    assert integers.tolist() == [0, 1, 2, 3]


def test_tensors_of_the_device_stay_there(one_process: None) -> None:
    exchange = exchanges()["through the device"]
    given = torch.arange(3, device=DEVICE)
    assert exchange.sum(given) is given
    assert exchange.broadcast(given) is given
    rows = exchange.gather_rows(given[:, None].half(), torch.tensor([1, 0, 3], device=DEVICE), 4)
    assert rows.device.type == DEVICE.type
    assert rows.flatten().tolist() == [1, 0, 0, 2]
