"""Which domain each sample of a forward pass belongs to, and how its layers learn of it.

Layers hold a reference to one `DomainSwitch`; the network sets its selection before a pass, so
that MONAI's modules need no second argument. B samples, K domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uharmony_model.errors import NetworkError

UNSEEN = -1
"""The index of a sample whose domain is none of the network's: all its residuals are zero."""

_ROUNDING = 1e-2  # what a softmax in half precision may be off by


@dataclass(frozen=True, eq=False)
class Selection:
    """Residuals of sample b are `weights[b] @ residuals`, with `weights (B, K)`.

    A row is one-hot where the site knows its domain, zero at an unseen one, and a mixture where a
    gate chose it. `uniform` says that all rows are equal; it is decided here once, so that no layer
    has to ask the device.
    """

    weights: Tensor
    uniform: bool

    @classmethod
    def of(cls, domain: Tensor, domains: int) -> Selection | None:
        """The selection of `domain (B,)`; None when every sample is unseen.

        Raises:
            NetworkError: an index is neither a domain's nor `UNSEEN`.
        """
        if domain.ndim != 1 or domain.is_floating_point():
            raise NetworkError(
                f"domain is a {domain.dtype} tensor of shape {tuple(domain.shape)}; give one "
                "integer index for every sample, shape (B,)"
            )
        indices = [int(index) for index in domain.tolist()]
        wrong = [index for index in indices if not UNSEEN <= index < domains]
        if wrong:
            raise NetworkError(
                f"domain index {wrong[0]} with {domains} domains; expected 0 to {domains - 1}, "
                f"or {UNSEEN} for an unseen domain"
            )
        if all(index == UNSEEN for index in indices):
            return None
        weights = torch.zeros(len(indices), domains)
        for sample, index in enumerate(indices):
            if index != UNSEEN:
                weights[sample, index] = 1.0
        return cls(weights.to(domain.device), uniform=len(set(indices)) == 1)

    @classmethod
    def mixture(cls, weights: Tensor, domains: int) -> Selection | None:
        """The selection of given `weights (B, K)`; None when all are zero and need no gradient.

        A row may sum to less than one: what is missing is the share of the plain shared network.

        Raises:
            NetworkError: the shape is another, or a row is no mixture.
        """
        if weights.ndim != 2 or weights.shape[1] != domains or not weights.is_floating_point():
            raise NetworkError(
                f"a mixture is a {weights.dtype} tensor of shape {tuple(weights.shape)}; give "
                f"one floating-point weight for each sample and domain, shape (B, {domains})"
            )
        rows = weights.detach().to("cpu", torch.float64)
        sums = rows.sum(1)
        if not bool(torch.isfinite(rows).all() & (rows >= 0).all() & (sums <= 1 + _ROUNDING).all()):
            raise NetworkError(
                f"a mixture has weights from {float(rows.min()):.3g} and a row that sums to "
                f"{float(sums.max()):.3g}; expected weights >= 0 that sum to 1 at most"
            )
        if not weights.requires_grad and not bool(rows.any()):
            return None
        # With a gradient every row is to get its own, though all are equal.
        alike = len(rows) == 1 or not weights.requires_grad
        return cls(weights, uniform=alike and bool((rows == rows[:1]).all()))


class DomainSwitch:
    """One selection for all layers of one network; None means that all residuals are zero.

    It is no module and holds no state between passes, so a copy of the network gets one new,
    empty switch, shared by all layers of the copy.
    """

    def __init__(self) -> None:
        self.selection: Selection | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DomainSwitch:
        return DomainSwitch()
