"""The harmonisation layer: standardise, a shared polynomial, and a local restoration.

    stage 1  z = (x - mu) / sqrt(var + eps)     per instance and channel over space
    shared   h = sum_p a_p He_p(z)              He: probabilists' Hermite polynomials
    stage 2  y = s * h + m                      log s = g + rho * log(var + eps) / 2
                                                m     = b + lambda * mu
B samples, C channels, K domains, order P.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.errors import NetworkError
from uharmony_model.instance_affine import affine, affine_in_place, standardise
from uharmony_model.polynomial import monomials, polynomial

Stage2 = Literal["free", "affine", "revin", "restore", "off"]

_LOCAL: dict[Stage2, tuple[str, ...]] = {
    "free": ("gain", "shift", "rho", "lam"),
    "affine": ("gain", "shift"),
    "revin": ("gain", "shift"),
    "restore": (),
    "off": (),
}


class HarmonicNorm(nn.Module):
    """Takes the place of one normalisation layer: what is shared, and what stays at the site.

    After U-Harmony (arXiv:2601.14605), whose second stage is not public: that its parameters
    belong to domains, its form, and the Hermite basis are ours. `polynomial (P + 1, C)` is shared;
    `gain`, `shift`, `rho`, `lam`, each `(K, C)` and zero at start, are g, b, rho and lambda of the
    K domains. A sample without a domain has all of them zero.

    `stage2` chooses the reading: `free` learns all four; `affine` fixes rho = lambda = 0 (as
    FedBN, arXiv:2102.07623, on instance statistics); `revin` fixes rho = lambda = 1, at an unseen
    domain too; `restore` is that with g = b = 0, so that nothing is local; `off` has no local
    parameter. As in RevIN's code, no gradient passes through the statistics of stage 2.
    """

    polynomial: nn.Parameter
    gain: nn.Parameter  # not with "off"
    shift: nn.Parameter  # not with "off"
    rho: nn.Parameter  # with "free" alone
    lam: nn.Parameter  # with "free" alone

    def __init__(
        self,
        channels: int,
        *,
        domains: int,
        switch: DomainSwitch,
        order: int = 1,
        stage2: Stage2 = "free",
        eps: float = 1e-5,
        channel_axis: int = 1,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.order, self.stage2 = channels, order, stage2
        self.eps, self.channel_axis, self.compiled = eps, channel_axis, compiled
        self.switch = switch
        start = torch.zeros(order + 1, channels)
        start[1] = 1.0
        self.polynomial = nn.Parameter(start)
        for name in _LOCAL[stage2]:
            self.register_parameter(name, nn.Parameter(torch.zeros(domains, channels)))

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the parameters with a leading axis of domains."""
        return _LOCAL[self.stage2]

    def forward(self, x: Tensor) -> Tensor:
        """Harmonise x: (B, C, ...), or (B, ..., C) where `channel_axis` is the last.

        Raises:
            NetworkError: there is one voxel, so nothing to normalise over.
        """
        self._check(x)
        # Under autocast and for half precision, statistics and powers need float32.
        precise = x if x.dtype == torch.float64 else x.float()
        if self.channel_axis != 1:
            precise = precise.movedim(self.channel_axis, 1)
        with torch.autocast(x.device.type, enabled=False):
            y = self._harmonise(precise.contiguous(), self.switch.selection)
        if self.channel_axis != 1:
            y = y.movedim(1, self.channel_axis).contiguous()
        return y.to(x.dtype)

    def _harmonise(self, x: Tensor, selection: Selection | None) -> Tensor:
        coefficients = monomials(self.polynomial.to(x.dtype))  # (P + 1, C), then (P + 1, B, C)
        coefficients = coefficients.unsqueeze(1).expand(-1, x.shape[0], -1)
        local = {name: self._select(name, selection, x.dtype) for name in self.stacked}
        restores = self.stage2 in ("revin", "restore") or (
            self.stage2 == "free" and selection is not None
        )
        if self.order == 1 and not restores:
            shift, gain = _restored(coefficients, local, None)
            return affine(x, gain, shift, self.eps)
        z, mean, rstd = standardise(x, self.eps)
        coefficients = _restored(coefficients, local, (mean, rstd) if restores else None)
        if self.order == 1:
            return affine_in_place(x, z, mean, rstd, coefficients[1], coefficients[0])
        return polynomial(x, z, mean, rstd, coefficients, compiled=self.compiled)

    def _select(self, name: str, selection: Selection | None, dtype: torch.dtype) -> Tensor | None:
        if selection is None:
            return None  # not zeros: an untouched parameter must keep no gradient at all
        stacked: Tensor = getattr(self, name)
        return selection.weights.to(dtype) @ stacked.to(dtype)

    def _check(self, x: Tensor) -> None:
        if x.shape[self.channel_axis] != self.channels:
            raise NetworkError(
                f"a harmonisation layer got {tuple(x.shape)}, expected {self.channels} channels "
                f"at axis {self.channel_axis}; check the network around it"
            )
        if x.numel() <= x.shape[0] * self.channels:
            raise NetworkError(
                f"a harmonisation layer got {tuple(x.shape)}: one voxel per channel leaves nothing "
                "to normalise over; the patch is too small, it must be at least twice the product "
                "of the network's strides along one axis"
            )

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{self.channels}, order={self.order}, stage2={self.stage2}, eps={self.eps}"


def _restored(
    coefficients: Tensor, local: dict[str, Tensor | None], statistics: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Fold stage 2 into the coefficients (P + 1, B, C) of z^p: s scales all, m adds to the first.

    With `statistics` (mean, 1 / sqrt(var + eps)), each (B, C), a reading without rho and lam
    restores them whole (`revin`). A bound on rho or lambda would stand here.
    """
    log_s, m = local.get("gain"), local.get("shift")
    if statistics is not None:
        mean, log_sigma = statistics[0], -statistics[1].log()
        rho, lam = local.get("rho"), local.get("lam")
        log_s = _sum(log_s, log_sigma if rho is None else rho * log_sigma)
        m = _sum(m, mean if lam is None else lam * mean)
    if log_s is not None:
        coefficients = coefficients * log_s.exp()
    if m is not None:
        coefficients = torch.cat((coefficients[:1] + m, coefficients[1:]))
    return coefficients


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second
