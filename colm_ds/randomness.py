"""Private random generators seeded from (seed, purpose, step, ...), and the state of the global ones."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # imported where it is used: seeds alone do not need it


def derive_seed(seed: int, *parts: int | str) -> int:
    """Return a 63-bit seed for one purpose, for example `derive_seed(0, "direction", step, probe)`."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def private_generator(seed: int, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a private generator for one purpose on one device; same arguments, same numbers."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *parts))


def seed_global_generators(seed: int) -> None:
    """Seed this process's global generators: Python's, numpy's, torch's, and those of its GPUs.

    The numbers that follow are those after transformers' `set_seed`, which first imports its Trainer's tools, and with
    them peft and bitsandbytes where they are installed: seconds of a run's start.

    Args:
        seed: from 0 to 2^32 - 1.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of this process's global generators: Python's, numpy's, torch's, and that of its GPU."""
    import numpy as np
    import torch

    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators back to where `random_state` found them."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
