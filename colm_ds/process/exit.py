"""Exit a rank with one message for all ranks; ranks that lose it exit without another message."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from colm_ds.untrusted.printable import visible

_SAID, _CODE = "colm_ds/last_words", "colm_ds/exit_code"


def end_all(message: str, code: int) -> NoReturn:
    """Print a message, unless another rank already printed one, and exit with `code`; the other ranks then exit too."""
    store = _store()
    first = True
    with contextlib.suppress(RuntimeError):  # the store went with the rank that hosted it, which printed its message
        first = store is None or store.add(_SAID, 1) == 1
        if store is not None and first:
            store.set(_CODE, str(int(code)))
    if first:
        print(visible(message), file=sys.stderr, flush=True)
    sys.exit(code)


def said_code() -> int | None:
    """Return the exit code of the rank that exited with a message, for a rank that lost it; None if none did.

    None also if that was rank 0, which hosts the store that the ranks share.
    """
    store = _store()
    with contextlib.suppress(RuntimeError, ValueError):
        if store is not None and store.add(_SAID, 0) > 0:
            return int(store.get(_CODE))
    return None


def exit_process(code: int | str | None) -> NoReturn:
    """End this process as `sys.exit` does, but without shutting the interpreter down.

    DeepSpeed keeps its groups on the parameters, so gloo's threads outlive `destroy_process_group`. If one frees the
    last collective's tensors during interpreter shutdown, it is terminated when it asks for the GIL, which C++ treats
    as a fault: the process aborts after everything was written (torch 2.13).

    Args:
        code: as `sys.exit` takes it: None for 0, a text to print for 1.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # wait for threads that are not daemons
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if isinstance(code, str) else code or 0)


def _store() -> Any:
    return _get_default_store() if dist.is_initialized() and dist.get_world_size() > 1 else None
