"""Tells, place by place, features of the target from source-like ones; trained over sites.

    L_D = mean over source voxels of D(f')^2  +  mean over target voxels of (D(f_t) - 1)^2
    L_G = mean over target voxels of D(f_t)^2            the segmenter's term, at the target site

f' are features of source images in the target's style, f_t those of target images, both from the
segmenter's bottleneck; a voxel is one place of that grid. Least-squares losses after Mao et al.
2017 (arXiv:1611.04076), shape and polarity after DAST (Yu et al. 2021, AAAI): **target is 1**.
Turned round, the mask of `uharmony_model.alignment.feature_mask` is large where the sides agree.
Alignment is GLUA-style, after the abstract of Global-Local Union Alignment (arXiv:2205.11888): that
its mask comes from such a discriminator is INFERRED, the paper's own formulas are not known to us.

Without norm layers, for two reasons: behind an instance norm the scores no longer show where a gap
lies, and without a batch norm each term of L_D depends on one site's data alone. So every site
computes the gradient of its own term and only gradients travel; their sum is the gradient of the
pooled L_D (the federated form is ours). One step an exchange: a site knows one of the two wanted
values, and several steps alone turn its scores into that constant. A sum hides nobody where a side
has one site.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from uharmony_model.errors import ExchangeError, NetworkError, QuorumError
from uharmony_model.randomness import seed_for

SLOPE = 0.2  # of the leaky ReLU below zero, as in DAST
RATE = 1e-3  # ten times DAST's, which takes far more steps
BETAS = (0.9, 0.99)

_CONV: Mapping[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class FeatureDiscriminator(nn.Module):
    """Scores (B, 1, D, H, W) of features (B, C, D, H, W); two space axes where `dims` is 2.

    Convolutions of three voxels an axis, stride 1, padded by zeros, of C -> C/2 -> C/4 -> 1
    channels (halves rounded down), LeakyReLU between them: each score sees seven voxels an axis.
    DAST has four of them. The initial weights follow from `seed`, so that all sites start with the
    same ones, and torch's generator is left as it was.

    Raises:
        NetworkError: there are fewer than four channels, or other than two or three axes.
    """

    def __init__(self, channels: int, dims: int = 3, *, seed: int = 0) -> None:
        super().__init__()
        if channels < 4 or dims not in _CONV:
            raise NetworkError(
                f"a discriminator of {channels} channels over {dims} axes; expected at least 4 "
                "channels, since they are halved twice, and 2 or 3 axes"
            )
        conv = _CONV[dims]
        widths = (channels, channels // 2, channels // 4, 1)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_for(seed, "feature discriminator"))
            for before, after in itertools.pairwise(widths):
                layers += [conv(before, after, kernel_size=3, padding=1), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Tensor) -> Tensor:
        """One score a place, unbounded: near 1 for the target, near 0 for what is source-like."""
        scores: Tensor = self.layers(features)
        return scores


def discriminator_term(scores: Tensor, is_target: bool) -> Tensor:
    """The mean over voxels of (D - 1)^2 at the target, of D^2 for source-like features; a scalar.

    `scores (B, 1, ...)` are those of one side's features, detached by the caller, so that the
    discriminator's step leaves the segmenter alone.
    """
    return (_precise(scores) - float(is_target)).square().mean()


def gradients_of(discriminator: nn.Module, term: Tensor) -> dict[str, Tensor]:
    """Gradient of one site's `term` by the name of the parameter; what that site sends."""
    named = dict(discriminator.named_parameters())
    found = torch.autograd.grad(term, list(named.values()))
    return dict(zip(named, found, strict=True))


def site_shares(voxels: Sequence[int], is_target: Sequence[bool]) -> tuple[float, ...]:
    """What each site's term counts: its voxels over those of its side, n_k / N_side.

    A mean over all voxels of a side is the sum of its sites' means with these weights. They do not
    depend on the other side, so each side counts one in L_D however many voxels it has. One voxel
    each weighs all sites of a side the same.

    Raises:
        ExchangeError: there is not one flag for each count, or a count is not positive.
        QuorumError: a side has no site; a step on the other alone makes the scores constant.
    """
    if len(voxels) != len(is_target) or any(count <= 0 for count in voxels):
        raise ExchangeError(
            f"voxel counts {list(voxels)} and {len(is_target)} sides; expected a count above 0 "
            "and a side for each site that sent a gradient"
        )
    if set(is_target) != {False, True}:
        present = "no site" if not voxels else f"{len(voxels)} of one side"
        raise QuorumError(
            f"a step of the discriminator needs sites of both sides, got {present}; skip it"
        )
    pairs = list(zip(voxels, is_target, strict=True))
    total = {side: sum(n for n, own in pairs if own == side) for side in (False, True)}
    return tuple(n / total[own] for n, own in pairs)


def sum_gradients(
    gradients: Sequence[Mapping[str, Tensor]], shares: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The sites' gradients added up by name: the gradient of the pooled L_D.

    `shares` are those of `site_shares`; None where each side has one site. Summed in the order
    given, in float64, and rounded once, so that the caller's order of sites fixes the bits.

    Raises:
        ExchangeError: there is none, names or shapes differ between sites, a number is not finite,
            or there is not one share for each.
    """
    weights = [1.0] * len(gradients) if shares is None else list(shares)
    if not gradients or len(weights) != len(gradients):
        raise ExchangeError(
            f"{len(gradients)} gradients and {len(weights)} shares; expected at least one gradient "
            "and a share for each"
        )
    first = gradients[0]
    for place, gradient in enumerate(gradients):
        _check_alike(gradient, first, place)
    summed = {}
    for name, like in first.items():
        total = torch.zeros_like(like, dtype=torch.float64)
        for gradient, weight in zip(gradients, weights, strict=True):
            total += weight * gradient[name].to(total)
        summed[name] = total.to(like.dtype)
    return summed


def set_gradients(discriminator: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Put a sum of gradients where an optimiser looks for it; every site then takes one step.

    Raises:
        ExchangeError: names or shapes are not those of the parameters, or a number is not finite.
    """
    named = dict(discriminator.named_parameters())
    _check_alike(gradients, {name: p.detach() for name, p in named.items()}, 0)
    for name, parameter in named.items():
        parameter.grad = gradients[name].detach().clone().to(parameter)


def _check_alike(gradient: Mapping[str, Tensor], like: Mapping[str, Tensor], place: int) -> None:
    if set(gradient) != set(like):
        missing, extra = sorted(set(like) - set(gradient)), sorted(set(gradient) - set(like))
        raise ExchangeError(f"gradient {place}: missing {missing}, extra {extra}")
    for name, tensor in gradient.items():
        if tensor.shape != like[name].shape:
            raise ExchangeError(
                f"gradient {place}: {name} is {tuple(tensor.shape)}, "
                f"expected {tuple(like[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ExchangeError(f"gradient {place}: {name} is not finite; leave its site out")


def _precise(scores: Tensor) -> Tensor:
    """At least float32: squares of half-precision scores lose the differences they are made of."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
