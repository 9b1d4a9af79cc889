"""`finetune/train.py` whose end goes wrong: python tests/training/ending_badly.py WHAT RANK RECIPE [key=value ...]

`evaluation`: measuring the held-out loss after the last step raises on a rank; `gradients`: none is ever finite;
`stop`: SIGTERM comes in the second step.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from colm_ds.engine.engine import CoLMEngine
from colm_ds.training.run import run
from colm_ds.training.tasks import InstructionTask

if __name__ == "__main__":
    what, rank, *arguments = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    measure, train = InstructionTask.heldout, CoLMEngine.train_batch

    def heldout(self: InstructionTask, run_: Any) -> Any:
        if what == "evaluation" and run_.engine.step_count > 0 and dist.get_rank() == int(rank):
            raise RuntimeError("the disk of the questions is gone")
        return measure(self, run_)

    def train_batch(self: CoLMEngine, *batch: Any) -> Any:
        if what == "gradients" and self.step_count == 0:
            parameter = [one for one in self.module.parameters() if one.requires_grad][-1]
            parameter.register_hook(lambda gradient: gradient * math.inf)
        if what == "stop" and self.step_count == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, *batch)

    InstructionTask.heldout = heldout  # type: ignore[method-assign]
    CoLMEngine.train_batch = train_batch  # type: ignore[method-assign]
    run(arguments[0], arguments[1:])
