"""Load the files of a checkpoint without running what is in them: tensors, plain values, a short list of classes."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Let every `torch.load`, also inside DeepSpeed, refuse what is neither a tensor nor a plain value.

    Allowed besides are the few classes that DeepSpeed and numpy put into checkpoints, and what the caller's own program
    gave to `torch.serialization.add_safe_globals`. Processes started meanwhile inherit the demand, not the list: see
    `allow_known`.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_known()):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def allow_known() -> None:
    """Put the known classes on this process's list, for a program whose loads are all of checkpoints."""
    torch.serialization.add_safe_globals(_known())
    pickle_stage_by_value()


def pickle_stage_by_value() -> None:
    """Let DeepSpeed's enumeration of stages be pickled as a class and a value, as Python does from 3.11.4 on.

    Earlier 3.11 writes a call of `getattr`, which nothing that loads tensors only may ask for.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (ZeroStageEnum, (stage.value,))


def load_tensors(path: Path, *, mmap: bool = False) -> Any:
    """Return the content of a torch file on the CPU.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no torch file, or holds something else than tensors and plain values.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path.name} is no torch file")
    with tensors_only():
        try:
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
        except OSError:
            raise
        except Exception as error:  # what the reader makes of a damaged file is not documented
            raise ValueError(f"{path.name}: {_reason(error)}") from None


def why_not_tensors(path: Path) -> str | None:
    """Return why a torch file must not be loaded; None if it holds tensors and plain values. Reads little of it."""
    try:
        load_tensors(path, mmap=True)
    except ValueError as error:
        return str(error)
    return None


def _reason(error: Exception) -> str:
    """Name the forbidden global that a file asks for, or the first line of another error."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"(?:function|class) ([\w.]+)", str(error))
    if "Weights only" in str(error) and named is not None:
        return (
            f"asks for {named[1]}, which is neither a tensor nor a plain value, so it was not loaded (if it is your "
            "own: give it to torch.serialization.add_safe_globals first)"
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"cannot be loaded: {type(error).__name__}: {lines[0] if lines else 'no message'}"


def _known() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Return what checkpoints hold besides tensors and plain values: numpy's random state, DeepSpeed's own facts."""
    import numpy as np
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from numpy._core.multiarray import _reconstruct

    return [
        *(
            _reconstruct,
            np.ndarray,
            np.dtype,
            np.dtypes.UInt32DType,
            (_reconstruct, "numpy.core.multiarray._reconstruct"),
        ),
        *(LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address),
    ]
