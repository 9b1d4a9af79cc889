"""What the tests' ranks import, once: `tests.ranks` forks them from a process that has it."""

from __future__ import annotations

import gc

import deepspeed  # noqa: F401  (here and below: for later imports to be found)
import peft  # noqa: F401
import torch._dynamo
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

import colm_ds.engine.initialization  # noqa: F401
import tests.engine.training  # noqa: F401

torch.set_num_threads(1)  # before any operation: threads do not survive a fork
gc.collect()
gc.freeze()  # so that collections in a rank do not touch, and copy, what it shares with the others
