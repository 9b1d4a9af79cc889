"""Run DeepSpeed's conversion to its universal format on tensors and plain values alone; see `tensors_only`."""

from __future__ import annotations

import runpy

from colm_ds.checkpoints.tensors_only import allow_known, tensors_only

if __name__ == "__main__":
    allow_known()
    with tensors_only():
        runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__")
