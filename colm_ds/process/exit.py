"""A rank that has to end says why, once for all ranks; those that lose it end without another message."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_SAID, _CODE = "colm_ds/last_words", "colm_ds/exit_code"


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
        if store is not None and first:
            store.set(_CODE, str(int(code)))
    if first:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def said_code() -> int | None:
    """Return the exit code of the rank that ended with a message, asked by one that lost it; None if none did.

    None also if that was rank 0, which keeps what the ranks know of each other.
    """
    store = _store()
    with contextlib.suppress(RuntimeError, ValueError):
        if store is not None and store.add(_SAID, 0) > 0:
            return int(store.get(_CODE))
    return None


def leave(code: int | str | None) -> NoReturn:
    """End this process as `sys.exit` does, but without taking the interpreter apart.

    DeepSpeed keeps its groups on the parameters, so gloo's threads outlive `destroy_process_group`. One of them that
    lets go of the last collective's tensors while the interpreter is taken apart is ended by it when it asks for the
    interpreter's lock, which C++ takes for a fault: the process aborts after everything was written (torch 2.13).

    Args:
        code: as `sys.exit` takes it: None for 0, a text to print for 1.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def _store() -> Any:
    return _get_default_store() if dist.is_initialized() and dist.get_world_size() > 1 else None
