"""Private random generators seeded from (seed, purpose, step, ...); the global RNG is never touched."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed for one purpose, for example `derive_seed(0, "direction", step, probe)`."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def private_generator(seed: int, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for one purpose on one device; same arguments, same numbers."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *parts))
