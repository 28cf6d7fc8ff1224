"""The mean of the sites' updates: `global' = base + sum_k w_k delta_k / sum_k w_k`.

Float32, in the order given (callers sort by site), block by block: a block of the sum stays in
the cache while the updates pass over it, so each update is read once and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from uharmony_model.errors import ExchangeError, QuorumError

# 2 MiB of the sum: it lies in the threads' caches while the updates pass over it, and the threads
# wait for each other seldom (32 KiB blocks measured twice as slow, 4 MiB a tenth).
_BLOCK = 1 << 19


class WeightedSum:
    """A running weighted sum of updates of `numel` numbers.

    For each number the additions happen in the order of the updates, so how they are grouped
    into calls of `add` does not change a bit of the result.
    """

    def __init__(self, numel: int) -> None:
        self._sum = torch.empty(numel)
        self._weights: list[float] = []

    def add(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> None:
        """Add updates `(n,)`, each times its weight.

        Raises:
            ExchangeError: an update is not of this length, or a weight is negative or not finite;
                nothing was added.
        """
        if len(deltas) != len(weights):
            raise ExchangeError(f"{len(deltas)} updates, {len(weights)} weights; give one each")
        for delta, weight in zip(deltas, weights, strict=True):
            self._check(delta)
            if not (math.isfinite(weight) and weight >= 0):
                raise ExchangeError(f"weight is {weight}, expected a finite number from 0 up")
        for block, *pieces in _blocks(self._sum, *deltas):
            first = not self._weights
            for piece, weight in zip(pieces, weights, strict=True):
                if first:  # the sum is not initialised: writing zeros would be a pass of its own
                    torch.mul(piece, weight, out=block)
                    first = False
                else:
                    block.add_(piece, alpha=weight)
        self._weights.extend(weights)

    @property
    def total(self) -> float:
        """The sum of the weights."""
        return math.fsum(self._weights)

    def join(self, other: WeightedSum, factor: float) -> None:
        """Add another sum, its weights times `factor`; it must not be used any more.

        Raises:
            ExchangeError: it is of another length, or the factor is negative or not finite.
        """
        self.add([other._sum], [factor])
        self._weights[-1:] = [factor * weight for weight in other._weights]

    def apply(self, base: Tensor) -> Tensor:
        """The new global weights `(n,)`, in the memory of the sum, which is used up by this.

        Raises:
            QuorumError: nothing was added, or only with weight 0.
            ExchangeError: `base` is not of this length.
        """
        total = self.total
        if total <= 0:
            raise QuorumError("no update with a weight above 0; there is nothing to aggregate")
        self._check(base)
        weights = torch.add(base, self._sum, alpha=1 / total, out=self._sum)
        self._sum, self._weights = torch.empty(0), []
        return weights

    def _check(self, flat: Tensor) -> None:
        if flat.shape != self._sum.shape or flat.dtype != torch.float32:
            raise ExchangeError(
                f"got {tuple(flat.shape)} {flat.dtype}, expected {tuple(self._sum.shape)} "
                "torch.float32; are all of the same study?"
            )


def _blocks(*flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(flat, _BLOCK) for flat in flats), strict=True)
