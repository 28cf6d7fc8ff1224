"""The mixture of experts, chosen on one unlabelled volume (U2).

    minimise over theta (K,)     H(p_w) + c * mean (p_w(x) - F p_w(F(x + noise)))^2,
    w = softmax(log w_0 + theta)

H is the mean entropy of the voxels' probabilities, F a flip, w_0 the gate's weights. After IOP-FL
(Jiang et al., TMI 2023), whose test-time optimisation by entropy and consistency routes between
models. Ours: only the K weights move, and they mix parameters; all else is frozen; and the guard.
Entropy is least where nothing is found, so a small lesion is the first thing that it gives up: the
gate's weights stay when a class loses too much of its volume, or when entropy does not fall.
B windows, C channels, K domains, J logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from uharmony_model.errors import ConfigError
from uharmony_model.frozen import Frozen
from uharmony_model.harmonize import HarmonizedNetwork
from uharmony_model.inference import evaluating
from uharmony_model.randomness import torch_generator

_LEAST_WEIGHT = 1e-3  # a weight of nothing would have no gradient, and could not come back


class MixtureSearch(Frozen):
    """How the weights are searched for, and when they are not believed.

    `noise` is the deviation of what is added to the image, in units of normalised intensity.
    `kept_volume` is the share of its voxels under the gate's weights that each class must keep.
    `windows` bounds the work on a large volume: those with most foreground are used.
    """

    steps: PositiveInt = 20
    rate: PositiveFloat = 0.1
    consistency: NonNegativeFloat = 1.0
    noise: NonNegativeFloat = 0.1
    kept_volume: Annotated[float, Field(ge=0, le=1)] = 0.5
    windows: PositiveInt = 8


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the search came to: `weights (K,)` to use, which are the `start` where it was refused.

    `found` are the weights at its end, `entropy` (before, after), in [0, 1], and `voxels` of each
    foreground class (before, after), in the windows that were used.
    """

    weights: NDArray[np.float64]
    start: NDArray[np.float64]
    found: NDArray[np.float64]
    verdict: Literal["taken", "foreground lost", "entropy did not fall"]
    entropy: tuple[float, float]
    voxels: tuple[tuple[int, ...], tuple[int, ...]]


def search_mixture(
    network: HarmonizedNetwork,
    image: Tensor | NDArray[Any],
    start: ArrayLike,
    *,
    patch: Sequence[int],
    overlapping: bool,
    settings: MixtureSearch | None = None,
    seed: int = 0,
    volume: str = "",
) -> Outcome:
    """Weights for the K experts of `network` on one normalised `image (C, D, H, W)`.

    `start (K,)` are the gate's weights. `overlapping` is the study's: sigmoid or softmax. `seed`
    and the name `volume` seed flips and noise. The network is as before afterwards.

    Raises:
        ConfigError: the start is no mixture of the network's domains.
    """
    chosen = settings or MixtureSearch()
    first = np.asarray(start, np.float64)
    domains = len(network.domains)
    if first.shape != (domains,) or not (first >= 0).all() or not abs(first.sum() - 1) < 1e-3:
        raise ConfigError(
            f"start weights of shape {first.shape} with sum {first.sum():.3g}; expected one for "
            f"each of {domains} domains, with sum 1"
        )
    device = next(network.parameters()).device
    search = _Search(network, overlapping, chosen, device)
    whole = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    with evaluating(network), _frozen(network):
        begin = torch.tensor(first, dtype=torch.float32, device=device)
        windows, before = search.most_foreground(_windows(whole, patch), begin)
        log_start = begin.clamp_min(_LEAST_WEIGHT).log()
        theta = torch.zeros_like(log_start, requires_grad=True)
        optimizer = torch.optim.Adam([theta], lr=chosen.rate)
        for step in range(chosen.steps):
            generator = torch_generator(seed, volume, step, "mixture search")
            theta.grad = torch.zeros_like(theta)
            for window in windows:
                weights = (log_start + theta).softmax(0)
                loss = search.loss(window, weights, step, generator) / len(windows)
                theta.grad += torch.autograd.grad(loss, theta)[0]
            optimizer.step()
        found = (log_start + theta.detach()).softmax(0)
        after = [search.measure(window, found) for window in windows]
    return _judged(first, found.cpu().double().numpy(), before, after, chosen.kept_volume)


@dataclass(frozen=True)
class _Measure:
    """One window under some weights: mean entropy, and voxels of each foreground class."""

    entropy: float
    voxels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Search:
    network: HarmonizedNetwork
    overlapping: bool
    settings: MixtureSearch
    device: torch.device

    def probabilities(self, window: Tensor, weights: Tensor) -> Tensor:
        """(1, J, D, H, W) of a window (C, D, H, W) under weights (K,)."""
        logits = self.network(window[None].to(self.device), weights[None]).float()
        probabilities: Tensor = logits.sigmoid() if self.overlapping else logits.softmax(1)
        return probabilities

    def loss(
        self, window: Tensor, weights: Tensor, step: int, generator: torch.Generator
    ) -> Tensor:
        clear = self.probabilities(window, weights)
        loss = entropy_of(clear, overlapping=self.overlapping)
        if self.settings.consistency:
            axis = step % 3 + 1  # of (C, D, H, W)
            # A channel of one value is a mask, a missing modality or air, and stays as it is.
            varies = (window.amax((1, 2, 3)) > window.amin((1, 2, 3))).view(-1, 1, 1, 1)
            noise = torch.randn(window.shape, generator=generator) * self.settings.noise * varies
            other = self.probabilities((window + noise).flip(axis), weights).flip(axis + 1)
            loss = loss + self.settings.consistency * F.mse_loss(other, clear)
        return loss

    def measure(self, window: Tensor, weights: Tensor) -> _Measure:
        with torch.no_grad():
            p = self.probabilities(window, weights)
        return _Measure(
            float(entropy_of(p, overlapping=self.overlapping)),
            foreground_voxels(p[0], overlapping=self.overlapping),
        )

    def most_foreground(
        self, windows: Sequence[Tensor], weights: Tensor
    ) -> tuple[list[Tensor], list[_Measure]]:
        """The windows in which the start finds most; the others are sure that nothing is there."""
        measured = [(window, self.measure(window, weights)) for window in windows]
        measured.sort(key=lambda pair: -sum(pair[1].voxels))  # stable: earlier of equal ones first
        kept = measured[: self.settings.windows]
        return [window for window, _ in kept], [measure for _, measure in kept]


def entropy_of(probabilities: Tensor, *, overlapping: bool) -> Tensor:
    """Mean entropy of the voxels of `probabilities (B, J, ...)`, as a share of the largest."""
    p = probabilities.clamp(1e-7, 1 - 1e-7)
    if overlapping:
        return -(p * p.log() + (1 - p) * (1 - p).log()).mean() / math.log(2)
    return -(p * p.log()).sum(1).mean() / math.log(p.shape[1])


def foreground_voxels(probabilities: Tensor, *, overlapping: bool) -> tuple[int, ...]:
    """Predicted voxels of each foreground class, of `probabilities (J, D, H, W)`."""
    if overlapping:
        return tuple(int(n) for n in (probabilities > 0.5).flatten(1).sum(1))
    classes = probabilities.argmax(0)
    return tuple(int((classes == j).sum()) for j in range(1, len(probabilities)))


def _judged(
    start: NDArray[np.float64],
    found: NDArray[np.float64],
    before: Sequence[_Measure],
    after: Sequence[_Measure],
    kept_volume: float,
) -> Outcome:
    entropy = tuple(sum(m.entropy for m in side) / len(side) for side in (before, after))
    voxels = tuple(
        tuple(sum(m.voxels[j] for m in side) for j in range(len(side[0].voxels)))
        for side in (before, after)
    )
    verdict: Literal["taken", "foreground lost", "entropy did not fall"] = "taken"
    if any(new < kept_volume * old for old, new in zip(*voxels, strict=True)):
        verdict = "foreground lost"
    elif not entropy[1] < entropy[0]:
        verdict = "entropy did not fall"
    return Outcome(
        weights=found if verdict == "taken" else start,
        start=start,
        found=found,
        verdict=verdict,
        entropy=(entropy[0], entropy[1]),
        voxels=(voxels[0], voxels[1]),
    )


def _windows(image: Tensor, patch: Sequence[int]) -> list[Tensor]:
    """Windows of `patch` voxels that cover `image (C, D, H, W)`; the last ones overlap.

    Along an axis shorter than the patch, the volume is continued by each channel's least value.
    """
    volume = image.detach().to("cpu", torch.float32)
    extents = volume.shape[1:]
    padded = [max(extent, edge) for extent, edge in zip(extents, patch, strict=True)]
    filled = volume.amin(dim=(1, 2, 3), keepdim=True).repeat(1, *padded)
    filled[:, : extents[0], : extents[1], : extents[2]] = volume
    starts = [
        sorted({min(start, size - edge) for start in range(0, size, edge)})
        for size, edge in zip(padded, patch, strict=True)
    ]
    return [
        filled[(slice(None), *(slice(s, s + e) for s, e in zip(corner, patch, strict=True)))]
        for corner in itertools.product(*starts)
    ]


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient inside; after, those that did before."""
    needed = [p for p in network.parameters() if p.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
