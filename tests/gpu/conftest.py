"""One process group for all tests of the folder, of this process alone: NCCL on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """Make this process the only rank."""
    import deepspeed

    from colm_ds.distributed.agreement import single_process_environment
    from colm_ds.engine.initialization import prepare_deepspeed

    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.setenv(name, "")
            environment.delenv(name)
        single_process_environment()
        prepare_deepspeed()
        deepspeed.init_distributed(verbose=False)
        yield
        dist.destroy_process_group()
