"""Random numbers that depend on the seed, the number of the step and the task alone: every rank and every resumed run
draws the same, and torch's own generators are not touched."""

from __future__ import annotations

import torch

_MASK = 2**64 - 1


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator seeded by the key (splitmix64 over its numbers)."""
    state = 0
    for number in key:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    made = torch.Generator(device)
    made.manual_seed(state >> 1)
    return made
