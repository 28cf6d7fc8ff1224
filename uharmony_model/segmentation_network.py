"""One signature for every network, so that training and prediction do not ask which it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from uharmony_model.alignment.style_autoencoder import StyleAutoencoder
from uharmony_model.errors import NetworkError
from uharmony_model.methods import Place


class SegmentationNetwork(nn.Module):
    """A backbone as it is: it takes a domain like the harmonised one, and ignores it.

    `domains` are those of the site that uses it. `multiple` is the product of the backbone's
    strides, when it is known: a volume's edges must be multiples of it. `places` says by path where
    the first and the last block lie, for methods that keep one of them; `deepest` is the path of
    the module that ends the encoder, empty where there is none to be named. `style` is the
    autoencoder of a study that learns styles, while it is trained; no logit depends on it.
    """

    kept_norms: tuple[str, ...] = ()
    places: Mapping[str, Place] = MappingProxyType({})
    deepest: str = ""

    def __init__(
        self, network: nn.Module, *, domains: Sequence[str] = (), multiple: int | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.domains = tuple(domains)
        self.multiple = multiple
        self.style: StyleAutoencoder | None = None

    def forward(self, x: Tensor, domain: Tensor | None = None, *, drop: bool = False) -> Tensor:
        """Logits (B, J, D, H, W) of x (B, C, D, H, W).

        Raises:
            NetworkError: x is too small, or does not fit the backbone's strides.
        """
        self.check_size(tuple(x.shape[2:]))
        logits: Tensor = self.network(x)
        return logits

    def check_size(self, size: Sequence[int]) -> None:
        """Raise unless a volume of `size` (D, H, W) voxels can pass through."""
        if self.multiple is not None:
            wrong = wrong_size(size, self.multiple)
            if wrong is not None:
                raise NetworkError(f"a volume {wrong}")


def wrong_size(size: Sequence[int], multiple: int) -> str | None:
    """What is wrong with a patch or volume of `size` voxels, and what to do; None if it fits.

    The deepest level holds `size / multiple` voxels. One leaves instance statistics nothing to
    normalise over, and two become +1 and -1 whatever they hold, so that no gradient passes. So the
    least size is not the multiple.
    """
    got = " x ".join(str(edge) for edge in size)
    if any(edge % multiple for edge in size):
        return (
            f"of {got} voxels does not fit this network; make every edge a multiple of {multiple}"
        )
    deepest = math.prod(edge // multiple for edge in size)
    if deepest < 3:
        return (
            f"of {got} voxels is too small for this network: its deepest level would hold {deepest}"
            f" of them, at least 3 are needed; make two edges {2 * multiple} or more, in multiples "
            f"of {multiple}"
        )
    return None
