"""Every random draw is seeded by what it is for; no generator state is ever carried.

A draw's seed is the SHA-256 of (study seed, site, round, step, purpose). So a round can be
repeated alone, in any order, in any process, with the same result. The global generators of
numpy and MONAI, and Python's `hash()`, are not used; torch's serves only to initialise a network,
whose layers draw from it, and is put back afterwards.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *where: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `seed_for(0, "site-a", round_, step, "patches")`."""
    text = json.dumps([seed, *where], separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *where: str | int) -> np.random.Generator:
    """A numpy generator for one purpose."""
    return np.random.Generator(np.random.PCG64(seed_for(seed, *where)))


def numpy_state(seed: int, *where: str | int) -> np.random.RandomState:
    """The older numpy generator, which MONAI's transforms take (`set_random_state(state=...)`)."""
    return np.random.RandomState(seed_for(seed, *where) % 2**32)


def torch_generator(seed: int, *where: str | int) -> torch.Generator:
    """A torch generator on the CPU for one purpose."""
    import torch  # a case table draws its splits too, and needs no torch

    return torch.Generator().manual_seed(seed_for(seed, *where))
