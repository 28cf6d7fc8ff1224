"""Shared instance norm and local batch norm, mixed: the norm layer of gPerXAN.

    y = w_1 * (IN(x) * weight + bias) + w_2 * BN(x),    (w_1, w_2) = softmax(mix)

After gPerXAN (Le et al., CVPR 2024): the batch norm is a site's own, the rest is shared. Its
regularisation by the global head is left out. The published code sends the batch norms too and
averages them into the model it tests unseen sites with; here they stay, as the text says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerxanNorm(nn.Module):
    """Takes the place of one `InstanceNorm3d` of `channels`; both branches start alike."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mix = nn.Parameter(torch.zeros(2))
        self.batch = nn.BatchNorm3d(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, D, H, W) both ways and mix."""
        share = self.mix.softmax(0)
        instance = F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
        mixed: Tensor = share[0] * instance + share[1] * self.batch(x)
        return mixed


def with_perxan(network: nn.Module) -> nn.Module:
    """Replace every `InstanceNorm3d` of a network, in place."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.InstanceNorm3d):
                setattr(parent, name, PerxanNorm(child.num_features, eps=child.eps))
    return network
