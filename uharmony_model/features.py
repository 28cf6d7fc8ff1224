"""Features of a network's deepest level, taken while it computes its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from uharmony_model.errors import NetworkError
from uharmony_model.segmentation_network import SegmentationNetwork


@dataclass
class Seen:
    """What the last pass had at the deepest level, (B, C, d, h, w)."""

    found: list[Tensor] = field(default_factory=list)

    @property
    def features(self) -> Tensor:
        """The features.

        Raises:
            NetworkError: no pass was made.
        """
        if not self.found:
            raise NetworkError("no features were seen; pass an image through the network first")
        return self.found[-1]


@contextmanager
def deepest_features(network: nn.Module) -> Iterator[Seen]:
    """Take the features of passes made inside, with their gradient.

    Raises:
        NetworkError: the network does not say where its deepest level is.
    """
    path = network.deepest if isinstance(network, SegmentationNetwork) else ""
    if not path:
        raise NetworkError(f"{type(network).__name__} does not say where its deepest level is")
    seen = Seen()

    def take(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.found[:] = [output]

    handle = network.get_submodule(path).register_forward_hook(take)
    try:
        yield seen
    finally:
        handle.remove()
