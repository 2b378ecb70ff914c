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


# The counter-based generator of the C core (csrc/src/random.h): a hash of four numbers starts a SplitMix64 sequence.

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * _MIX[0] & _MASK
    z = (z ^ z >> 27) * _MIX[1] & _MASK
    return z ^ z >> 31


def start_sequence(seed: int, draw: int, call: int, row: int) -> int:
    state = 0
    for number in (seed, draw, call, row):
        state = _mix(state ^ (number + _GOLDEN & _MASK))
    return state


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Of the bits as an unsigned number."""
    return z >> bits & (1 << 64 - bits) - 1


def signed_units(start: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """2U - 1, float64, for the U of the positions from `position` on of a sequence."""
    z = torch.arange(position + 1, position + 1 + count, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    z = z + _signed(start)
    z = (z ^ _shift(z, 30)) * _signed(_MIX[0])
    z = (z ^ _shift(z, 27)) * _signed(_MIX[1])
    z = z ^ _shift(z, 31)
    return (_shift(z, 11) * 2 + 1 - 2**53).double() * 2.0**-53
