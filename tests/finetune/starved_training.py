"""`finetune/train.py` on a device that has no memory left in step 2, on some ranks: RECIPE RANKS PHASE."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from colm_ds.engine import accumulation, coreset_selector
from colm_ds.training.run import run

if __name__ == "__main__":
    recipe, ranks, phase = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    module, name = {"probe": (coreset_selector, "run_trunk"), "forward": (accumulation, "example_loss_sums")}[phase]
    own = getattr(module, name)
    calls = [0]

    def allocate(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > 1 and os.environ["RANK"] in ranks.split(","):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 4 GiB")
        return own(*args)

    setattr(module, name, allocate)
    run(recipe)
