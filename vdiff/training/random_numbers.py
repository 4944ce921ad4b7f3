"""Random numbers of an update: functions of (seed, update, sample), so that each process draws only its samples' ones.

The bits are Philox 4×64 with ten rounds (Salmon et al. 2011, *Parallel Random Numbers: As Easy as 1, 2, 3*), with the
key (seed, 0) and the counter (block, update, purpose, 0). They become numbers by exact or correctly rounded
arithmetic, so no bit depends on the batch, the number of processes or the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

NOISE, TIMES, DROPPED, GUIDANCE, POSTERIOR, OFFSET, PERTURBATION = range(7)
"""Purposes, each with its own numbers."""
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
INCREMENTS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
ROUNDS, WORDS = 10, 4
LOW = 0xFFFFFFFF
FRACTION_BITS = 13
CHUNK = 2**18  # numbers made at once; temporary memory is a multiple of this


@dataclass(frozen=True)
class UpdateRandom:
    """The numbers of the samples `rows` of update `update`."""

    seed: int
    update: int
    rows: range
    device: torch.device

    def uniform(self, purpose: int) -> Tensor:
        """One number in [0, 1) for each sample, of 53 bits: (b,) float64 (float32 on GPUs without float64)."""
        words = philox(self.seed, self.update, purpose, self.rows, self.device)[:, 0]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return (words >> 11 & 2**53 - 1).to(dtype) * 2.0**-53

    def normal(self, shape: Sequence[int], purpose: int = NOISE) -> Tensor:
        """N(0, I): (b, *shape) float32. Sample k uses ⌈D/8⌉ blocks; each half of a word gives one normal number."""
        size = int(np.prod(shape))
        blocks = -(-size // (2 * WORDS))
        noise = torch.empty((len(self.rows), size), device=self.device)
        at_once = max(1, CHUNK // size)
        for first in range(0, len(self.rows), at_once):
            rows = self.rows[first : first + at_once]
            words = philox(self.seed, self.update, purpose, range(rows.start * blocks, rows.stop * blocks), self.device)
            halves = words.view(torch.int32).reshape(len(rows), -1)[:, :size]
            noise[first : first + len(rows)] = normal_of(halves)
        return noise.reshape(len(self.rows), *shape)


@dataclass(frozen=True)
class WholeBatchRandom:
    """The numbers of earlier versions, for runs that those began: every process draws the whole batch's.

    Call in the order noise, times, dropped conditions, guidance.
    """

    rows: range
    size: int
    device: torch.device

    def uniform(self, purpose: int) -> Tensor:
        """One number in [0, 1) for each sample: (b,)."""
        dtype = torch.float64 if purpose == TIMES and self.device.type != "mps" else torch.float32
        return torch.rand(self.size, dtype=dtype, device=self.device)[self.rows.start : self.rows.stop]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """N(0, I): (b, *shape)."""
        return torch.randn((self.size, *shape), device=self.device)[self.rows.start : self.rows.stop]


def philox(seed: int, update: int, purpose: int, blocks: range, device: torch.device) -> Tensor:
    """The words of consecutive blocks: (len(blocks), 4), unsigned numbers as int64 of the same bits."""
    if device.type != "cpu":
        return philox_on_device(seed, update, purpose, blocks, device)
    generator = np.random.Philox(key=[seed, 0], counter=[blocks.start, update, purpose, 0])  # NumPy counts first
    words = generator.random_raw(WORDS * len(blocks))
    return torch.from_numpy(words.view(np.int64)).reshape(-1, WORDS)


def philox_on_device(seed: int, update: int, purpose: int, blocks: range, device: torch.device) -> Tensor:
    """`philox` in torch: block b has the counter (b + 1, update, purpose, 0), as in NumPy."""
    c0 = torch.arange(blocks.start + 1, blocks.stop + 1, device=device)
    c1, c2, c3 = (torch.full_like(c0, value) for value in (update, purpose, 0))
    key = [seed, 0]
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, MULTIPLIERS[0]), _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(key[0]), low1, high0 ^ c3 ^ _signed(key[1]), low0
        key = [word + increment for word, increment in zip(key, INCREMENTS, strict=True)]
    return torch.stack([c0, c1, c2, c3], 1)


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low 64 bits of unsigned products, from products of 32-bit halves."""
    high, low = words >> 32 & LOW, words & LOW
    factor_high, factor_low = factor >> 32, factor & LOW
    middle = high * factor_low + (low * factor_low >> 32 & LOW)
    other = low * factor_high + (middle & LOW)
    return high * factor_high + (middle >> 32 & LOW) + (other >> 32 & LOW), words * _signed(factor)


def _signed(word: int) -> int:
    """The last 64 bits of `word`, read as a number in two's complement."""
    return (word + 2**63) % 2**64 - 2**63


def normal_of(words: Tensor) -> Tensor:
    """N(0, 1) from 32 random bits each, int32 → float32: ±Φ⁻¹((m + ½)/2³²) with m the last 31 bits; |x| ≤ 6.4.

    Φ⁻¹ is interpolated between tabulated values, 1024 in each octave of its argument, to within 6·10⁻⁷.
    """
    table, slopes = _quantiles(words.device)
    bits = ((words & 2**31 - 1).float() + 0.5).view(torch.int32)
    fraction = (bits & 2**FRACTION_BITS - 1).float() * 2.0**-FRACTION_BITS
    index = (bits >> FRACTION_BITS).sub_(_first_index()).flatten()
    size = table.index_select(0, index).add_(fraction.flatten() * slopes.index_select(0, index)).view_as(words)
    return (size.view(torch.int32) & 2**31 - 1 | words & -(2**31)).view(torch.float32)  # the sign is the first bit


def _first_index() -> int:
    """The index of ½, the smallest argument, in a table of all float32."""
    return int(np.float32(0.5).view(np.int32)) >> FRACTION_BITS


@cache
def _quantiles(device: torch.device) -> tuple[Tensor, Tensor]:
    """Φ⁻¹(f/2³²) at the nodes f = ½ … 2³¹ of the table, and the differences to the next nodes."""
    last = int(np.float32(2.0**31).view(np.int32)) >> FRACTION_BITS
    places = np.arange(_first_index(), last + 1, dtype=np.int32) << FRACTION_BITS
    table = torch.special.ndtri(torch.from_numpy(places.view(np.float32).astype(np.float64)) * 2.0**-32).float()
    slopes = torch.cat([table.diff(), torch.zeros(1)])
    return table.to(device), slopes.to(device)
