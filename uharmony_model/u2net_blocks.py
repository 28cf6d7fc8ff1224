"""Layers of 3D U2-Net: what a domain has for itself, and what it shares, in one unit.

Tensors of domains carry the K domains in front, `(K, ...)`. Sample b of a batch is computed with
`weights[b] @ tensors`, by the rows of the switch's selection, so one batch may hold several domains
or mixtures of them. Unlike a residual such a tensor has no zero state: without a domain there is
nothing to compute with, and a pass without one is an error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uharmony_model.depthwise_conv import depthwise_conv
from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.errors import NetworkError
from uharmony_model.instance_affine import affine

SLOPE = 0.01  # of the leaky ReLU
EPS = 1e-5


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, in place: what comes in is always a fresh result of a norm or a sum."""
    return F.leaky_relu(x, SLOPE, inplace=True)


class DomainConv(nn.Module):
    """A 3D convolution that is wholly a domain's own: stem, depthwise kernels and heads.

    `weight (K, O, C / groups, k, k, k)` and `bias (K, O)`; the size of the grid stays. All domains
    start alike, with the source's initialisation: normal after He et al. 2015, biases zero.
    """

    stacked = ("weight", "bias")

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        edge: int,
        domains: int,
        switch: DomainSwitch,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.outputs, self.groups, self.padding, self.switch = outputs, groups, edge // 2, switch
        one = nn.init.kaiming_normal_(torch.empty(outputs, channels // groups, edge, edge, edge))
        self.weight = nn.Parameter(one.repeat(domains, 1, 1, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(domains, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, D, H, W), every sample with the kernel of its domain."""
        selection = _known(self.switch)
        if selection.uniform:
            row = selection.weights[:1]
            weight, bias = _mixed(row, self.weight)[0], _mixed(row, self.bias)[0]
            return self._convolved(x, weight, bias, self.groups)
        # Samples become groups of one convolution; one by one they are slower.
        weights = _mixed(selection.weights, self.weight).flatten(0, 1)
        biases = _mixed(selection.weights, self.bias).flatten()
        wide = x.reshape(1, -1, *x.shape[2:])
        y = self._convolved(wide, weights, biases, self.groups * len(x))
        return y.reshape(len(x), self.outputs, *y.shape[2:])

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        if groups == x.shape[1] == len(weight):
            return depthwise_conv(x, weight, bias)
        return F.conv3d(x, weight, bias, padding=self.padding, groups=groups)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{tuple(self.weight.shape)}, groups={self.groups}"


class DomainNorm(nn.Module):
    """Instance norm whose `weight (K, C)` and `bias (K, C)` are a domain's own."""

    stacked = ("weight", "bias")

    def __init__(self, channels: int, *, domains: int, switch: DomainSwitch) -> None:
        super().__init__()
        self.switch = switch
        self.weight = nn.Parameter(torch.ones(domains, channels))
        self.bias = nn.Parameter(torch.zeros(domains, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, D, H, W) over space; scale and shift by each sample's domain."""
        rows = _known(self.switch).weights
        # Under autocast and for half precision, statistics need float32.
        precise = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):
            rows = rows.expand(len(x), -1)
            weight, bias = (_mixed(rows, t).to(precise.dtype) for t in (self.weight, self.bias))
            y = affine(precise.contiguous(), weight, bias, EPS)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """What torch prints between the brackets."""
        return f"{tuple(self.weight.shape)}"


class DomainUnit(nn.Module):
    """Convolution, norm and leaky ReLU, all of a domain: the stem and the auxiliary heads."""

    def __init__(
        self, channels: int, outputs: int, *, edge: int, domains: int, switch: DomainSwitch
    ) -> None:
        super().__init__()
        self.conv = DomainConv(channels, outputs, edge=edge, domains=domains, switch=switch)
        self.norm = DomainNorm(outputs, domains=domains, switch=switch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, O, D, H, W)."""
        return activate(self.norm(self.conv(x)))


class SeparableUnit(nn.Module):
    """A domain's depthwise 3x3x3 convolution, and the shared pointwise one behind it.

    Depthwise, norm, leaky ReLU, pointwise, norm; only the pointwise convolution is shared. The
    depthwise kernel is 3 voxels wide everywhere. No activation at the end: an encoder adds first.
    """

    def __init__(self, channels: int, outputs: int, *, domains: int, switch: DomainSwitch) -> None:
        super().__init__()
        self.depthwise = DomainConv(
            channels, channels, edge=3, groups=channels, domains=domains, switch=switch
        )
        self.inner = DomainNorm(channels, domains=domains, switch=switch)
        self.pointwise = _shared(channels, outputs, edge=1)
        self.outer = DomainNorm(outputs, domains=domains, switch=switch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, O, D, H, W)."""
        y: Tensor = self.outer(self.pointwise(activate(self.inner(self.depthwise(x)))))
        return y


class StridedUnit(nn.Module):
    """A whole shared 3x3x3 convolution of stride 2, then a norm of the domain and leaky ReLU.

    One plane of zeros stands behind the last voxel of each axis and none before the first: 'same'
    padding as TensorFlow has it, which the source follows.
    """

    def __init__(self, channels: int, outputs: int, *, domains: int, switch: DomainSwitch) -> None:
        super().__init__()
        self.conv = _shared(channels, outputs, edge=3, stride=2)
        self.norm = DomainNorm(outputs, domains=domains, switch=switch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, O, D / 2, H / 2, W / 2)."""
        return activate(self.norm(self.conv(F.pad(x, (0, 1) * 3))))


def _shared(channels: int, outputs: int, *, edge: int, stride: int = 1) -> nn.Conv3d:
    convolution = nn.Conv3d(channels, outputs, edge, stride=stride)
    nn.init.kaiming_normal_(convolution.weight)
    assert convolution.bias is not None  # noqa: S101 - Conv3d has one unless told otherwise
    nn.init.zeros_(convolution.bias)
    return convolution


def _known(switch: DomainSwitch) -> Selection:
    if switch.selection is None:
        raise NetworkError(
            "3D U2-Net needs to know the domain of every sample; give domain (B,), the index of "
            "each sample's domain"
        )
    return switch.selection


def _mixed(rows: Tensor, stacked: Tensor) -> Tensor:
    # As a sum of products: under autocast a matrix product would round parameters to half.
    weights = rows.to(stacked.dtype).view(*rows.shape, *(1,) * (stacked.ndim - 1))
    return (weights * stacked).sum(1)
