"""Precision of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


@contextmanager
def full_products() -> Iterator[None]:
    """Compute float32 matrix products in float32 even if the user allows TF32; then restore the settings."""
    backends = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    settings = [getattr(backend, "fp32_precision", None) for backend in backends]  # since torch 2.9
    precision = None
    with suppress(RuntimeError):  # torch refuses the older interface if the newer one is in use
        precision = torch.get_float32_matmul_precision()
    try:
        if precision is not None:
            torch.set_float32_matmul_precision("highest")
        for backend, setting in zip(backends, settings, strict=True):
            if setting is not None:
                backend.fp32_precision = "ieee"
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, setting in zip(backends, settings, strict=True):
            if setting is not None:
                backend.fp32_precision = setting
