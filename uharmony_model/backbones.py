"""The backbones by name, each with its stages, its head and the sizes it can take.

All of them get the norm they are asked for, so that the arms of a comparison differ in what is
harmonised or local, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from uharmony_model.errors import NetworkError
from uharmony_model.network_settings import Network

NormName = tuple[str, dict[str, Any]]
Stages = tuple[tuple[str, ...], ...]

INSTANCE: NormName = ("INSTANCE", {"affine": True})
BATCH: NormName = ("BATCH", {})
LAYER: NormName = ("GROUP", {"num_groups": 1})


@dataclass(frozen=True)
class Backbone:
    """How a network is built, and where its parts lie.

    `stages` gives the paths of the encoder, finest resolution first. The convolutions of the first
    stage come before the first downsampling, or are it: the stem. The last convolution under
    `head` makes the logits. What is in no stage is the decoder.
    """

    build: Callable[[Network, int, int, NormName], nn.Module]
    stages: Callable[[int], Stages]
    head: str
    min_levels: int = 2
    max_levels: int = 7
    halvings: int | None = None  # None: one less than there are levels


def _unet(network: Network, channels: int, outputs: int, norm: NormName) -> nn.Module:
    return UNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=outputs,
        channels=network.features,
        strides=(2,) * (len(network.features) - 1),
        num_res_units=network.residual_units,
        norm=norm,
    )


def _unet_stages(levels: int) -> Stages:
    # Each level is (down, skip around the level below, up); the first one is strided.
    below = ".1.submodule"
    stages = [(f"model{below * level}.0",) for level in range(levels - 1)]
    return (*stages, (f"model{below * (levels - 1)}",))


def _dynunet(network: Network, channels: int, outputs: int, norm: NormName) -> nn.Module:
    strides = (1,) + (2,) * (len(network.features) - 1)
    return _FlatDynUNet(
        DynUNet(
            spatial_dims=3,
            in_channels=channels,
            out_channels=outputs,
            kernel_size=(3,) * len(strides),
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=network.features,
            norm_name=norm,
            deep_supervision=False,
            res_block=network.residual_units > 0,
        )
    )


def _dynunet_stages(levels: int) -> Stages:
    between = [(f"downsamples.{level}",) for level in range(levels - 2)]
    return (("input_block",), *between, ("bottleneck",))


def _segresnet(network: Network, channels: int, outputs: int, norm: NormName) -> nn.Module:
    _check_doubling(network)
    levels = len(network.features)
    return SegResNet(
        spatial_dims=3,
        init_filters=network.features[0],
        in_channels=channels,
        out_channels=outputs,
        norm=norm,
        blocks_down=(max(1, network.residual_units),) * levels,
        blocks_up=(1,) * (levels - 1),
    )


def _segresnet_stages(levels: int) -> Stages:
    deeper = [(f"down_layers.{level}",) for level in range(1, levels)]
    return (("convInit", "down_layers.0"), *deeper)


def _swinunetr(network: Network, channels: int, outputs: int, norm: NormName) -> nn.Module:
    _check_doubling(network)
    if network.features[0] % 12:
        raise NetworkError(
            f"network.features starts with {network.features[0]}, but swinunetr needs a multiple "
            "of 12 there, for its attention heads"
        )
    return SwinUNETR(
        in_channels=channels,
        out_channels=outputs,
        feature_size=network.features[0],
        depths=(2, 2, 2, 2),
        norm_name=norm,
    )


def _swinunetr_stages(levels: int) -> Stages:
    # Two ways lead in: the strided patch embedding and a block at full resolution.
    deeper = [(f"swinViT.layers{level}", f"encoder{level + 1}") for level in (1, 2, 3)]
    return (("swinViT.patch_embed", "encoder1"), *deeper, ("swinViT.layers4", "encoder10"))


BACKBONES: dict[str, Backbone] = {
    "unet": Backbone(_unet, _unet_stages, head="model.2"),
    "dynunet": Backbone(_dynunet, _dynunet_stages, head="output_block", min_levels=3),
    "segresnet": Backbone(_segresnet, _segresnet_stages, head="conv_final"),
    "swinunetr": Backbone(_swinunetr, _swinunetr_stages, head="out", max_levels=5, halvings=5),
}


class _FlatDynUNet(nn.Module):
    """MONAI's DynUNet, whose own class lists each block twice, and so each tensor's key too."""

    def __init__(self, whole: DynUNet) -> None:
        super().__init__()
        self.input_block: nn.Module = whole.input_block
        self.downsamples: nn.ModuleList = whole.downsamples
        self.bottleneck: nn.Module = whole.bottleneck
        self.upsamples: nn.ModuleList = whole.upsamples
        self.output_block: nn.Module = whole.output_block

    def forward(self, x: Tensor) -> Tensor:
        """The nested skip layers of the original, as a loop."""
        skips = []
        for block in (self.input_block, *self.downsamples):
            x = block(x)
            skips.append(x)
        x = self.bottleneck(x)
        for block, skip in zip(self.upsamples, reversed(skips), strict=True):
            x = block(x, skip)
        logits: Tensor = self.output_block(x)
        return logits


def _check_doubling(network: Network) -> None:
    first = network.features[0]
    expected = tuple(first * 2**level for level in range(len(network.features)))
    if network.features != expected:
        raise NetworkError(
            f"network.features is {list(network.features)}, but {network.name} doubles its "
            f"channels at every level; write {list(expected)}"
        )
