"""3D U2-Net: one network for many domains, split into spatial and cross-channel correlations.

After Huang et al., MICCAI 2019 (arXiv:1909.06012), and its published code. Depthwise convolutions,
norms, stem and heads belong to a domain; pointwise convolutions and the strided ones are shared. A
domain is added by training new tensors of its own with everything shared frozen.

As in the source: two separable units at each level of the encoder, with their input added before
the last activation; nearest-neighbour upsampling, a separable unit, then two more on the
concatenation with the skip, without an addition; auxiliary heads at the levels of a half and a
quarter of the full resolution, each added to the coarser one's result, enlarged, and added to the
logits in the end. They are part of the output and have no losses of their own. Convolutions before
a norm have biases although the norm removes them. At `features` (16, 32, 64, 128, 256, 512), one
channel and two outputs, 5,853,840 parameters are shared and 144,590 a domain's own.

Ours, and not the source's:
- All domains have the study's channels and outputs; the source's tasks each have their own.
- Every axis is halved at every level; the source can leave an axis as it is.
- `features` need not double.
- A batch may mix domains, and rows of a selection may mix their parameters; the source takes the
  batch of one task at a time.
- All domains start from equal values; the source draws each task's.
- For a new domain all that is shared is to be frozen. The published code freezes the pointwise
  weights of its blocks alone; the convolutions that change the resolution start anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uharmony_model.domains import UNSEEN, DomainSwitch, Selection
from uharmony_model.errors import NetworkError
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.u2net_blocks import (
    DomainConv,
    DomainUnit,
    SeparableUnit,
    StridedUnit,
    activate,
)

AUXILIARY_LEVELS = (1, 2)  # halvings of the resolution where an auxiliary head stands
_ROUNDING = 1e-2  # what the weights of a mixture may be off by, as for `Selection.mixture`


class U2Net(SegmentationNetwork):
    """3D U2-Net under the signature of all networks; `domains` are those that it has tensors of."""

    def __init__(
        self, *, channels: int, outputs: int, features: Sequence[int], domains: Sequence[str]
    ) -> None:
        switch = DomainSwitch()
        super().__init__(
            UniversalUNet(channels, outputs, features, domains=len(domains), switch=switch),
            domains=domains,
            multiple=1 << (len(features) - 1),
        )
        self._switch = switch

    def forward(self, x: Tensor, domain: Tensor | None = None, *, drop: bool = False) -> Tensor:
        """Logits (B, J, D, H, W) of x (B, C, D, H, W); `domain (B,)` indexes `domains`.

        A floating-point `domain (B, K)` gives each sample its mixture of the domains' tensors.
        `drop` is ignored: there is no state without a domain.

        Raises:
            NetworkError: a sample's domain is not known, or x does not fit the strides.
        """
        # It stays set afterwards: activation checkpointing asks again during the backward pass.
        self._switch.selection = self._known(x, domain)
        return super().forward(x)

    def _known(self, x: Tensor, domain: Tensor | None) -> Selection:
        known = f"0 to {len(self.domains) - 1}"
        if domain is None:
            raise NetworkError(
                "3D U2-Net needs to know the domain, got none; give domain (B,), the index of each "
                f"sample's domain, {known}"
            )
        if domain.shape[: max(1, domain.ndim - 1)] != x.shape[:1]:
            raise NetworkError(
                f"domain has shape {tuple(domain.shape)} for {x.shape[0]} samples; give one index "
                "for each, or one row of weights"
            )
        count = len(self.domains)
        mixed = domain.ndim == 2 and domain.is_floating_point()
        selection = Selection.mixture(domain, count) if mixed else Selection.of(domain, count)
        # A share that no domain has would be a share of nothing here.
        if selection is None or bool((selection.weights.sum(1) < 1 - _ROUNDING).any()):
            got = "weights that sum to less than 1" if mixed else f"{UNSEEN} (unseen)"
            raise NetworkError(
                f"3D U2-Net needs to know the domain, got {got}, expected {known}; train tensors "
                "for a new domain first, or use a method that serves unseen ones"
            )
        return selection


class UniversalUNet(nn.Module):
    """The network itself; the switch says which domain each sample belongs to."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        features: Sequence[int],
        *,
        domains: int,
        switch: DomainSwitch,
    ) -> None:
        super().__init__()
        steps = list(itertools.pairwise(features))
        self.stem = DomainUnit(channels, features[0], edge=3, domains=domains, switch=switch)
        self.encoder = nn.ModuleList(
            EncoderLevel(width, domains=domains, switch=switch) for width in features
        )
        self.down = nn.ModuleList(
            StridedUnit(fine, coarse, domains=domains, switch=switch) for fine, coarse in steps
        )
        self.decoder = nn.ModuleList(
            DecoderLevel(fine, coarse, domains=domains, switch=switch) for fine, coarse in steps
        )
        self.auxiliary = nn.ModuleDict(
            {
                str(level): DomainUnit(
                    features[level], outputs, edge=1, domains=domains, switch=switch
                )
                for level in AUXILIARY_LEVELS
                if level < len(steps)
            }
        )
        self.head = DomainConv(features[0], outputs, edge=1, domains=domains, switch=switch)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, J, D, H, W) of x (B, C, D, H, W)."""
        skips = []
        x = self.stem(x)
        for level, down in zip(self.encoder, self.down, strict=False):
            x = level(x)
            skips.append(x)
            x = down(x)
        x = self.encoder[-1](x)
        deep: Tensor | None = None
        for number in reversed(range(len(skips))):
            x = self.decoder[number](x, skips[number])
            if str(number) in self.auxiliary:
                here = self.auxiliary[str(number)](x)
                deep = _doubled(here if deep is None else here + deep)
        logits: Tensor = self.head(x)
        return logits if deep is None else logits + deep


class EncoderLevel(nn.Module):
    """Two separable units; what came in is added before the last activation."""

    def __init__(self, width: int, *, domains: int, switch: DomainSwitch) -> None:
        super().__init__()
        self.first = SeparableUnit(width, width, domains=domains, switch=switch)
        self.second = SeparableUnit(width, width, domains=domains, switch=switch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to the same shape."""
        return activate(x + self.second(activate(self.first(x))))


class DecoderLevel(nn.Module):
    """Enlarge, narrow, put the skip behind, and two separable units."""

    def __init__(self, fine: int, coarse: int, *, domains: int, switch: DomainSwitch) -> None:
        super().__init__()
        self.narrow = SeparableUnit(coarse, fine, domains=domains, switch=switch)
        self.first = SeparableUnit(2 * fine, fine, domains=domains, switch=switch)
        self.second = SeparableUnit(fine, fine, domains=domains, switch=switch)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """X (B, coarse, D/2, H/2, W/2) and the skip (B, fine, D, H, W) to the skip's shape."""
        x = activate(self.narrow(_doubled(x)))
        x = activate(self.first(torch.cat((x, skip), dim=1)))
        return activate(self.second(x))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
