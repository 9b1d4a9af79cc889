"""A rank that has to end says why, once for all ranks; those that lose it end without another message."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_SAID = "colm_ds/last_words"


def end_all(message: str, code: int) -> NoReturn:
    """Print a message unless another rank has had its say already, and exit; the others lose this rank and end too.

    Args:
        message: why.
        code: exit code of this process.
    """
    store = _store()
    first = True
    with contextlib.suppress(RuntimeError):  # the store is gone with the rank that kept it, which had its say
        first = store is None or store.add(_SAID, 1) == 1
    if first:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def was_said() -> bool:
    """Whether another rank ended with a message; asked by a rank that lost the others, False if that was rank 0."""
    store = _store()
    with contextlib.suppress(RuntimeError):
        return store is not None and store.add(_SAID, 0) > 0
    return False


def _store() -> Any:
    return _get_default_store() if dist.is_initialized() and dist.get_world_size() > 1 else None
