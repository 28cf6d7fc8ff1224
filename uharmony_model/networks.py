"""The backbones by name, each with its stem, its head and the sizes it can take.

All of them get instance norms with learned weight and bias, so that the arms of a comparison
differ in what is harmonised or local, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from uharmony_model.errors import ConfigError, NetworkError
from uharmony_model.harmonize import harmonize
from uharmony_model.randomness import seed_for
from uharmony_model.segmentation_network import SegmentationNetwork, wrong_size
from uharmony_model.study import Network, Study

_INSTANCE = ("INSTANCE", {"affine": True})


@dataclass(frozen=True)
class Backbone:
    """How a network is built, and what of it can be a site's own.

    The convolutions under `stem` come before the first downsampling, or are it; the last one under
    `head` makes the logits.
    """

    build: Callable[[Network, int, int], nn.Module]
    stem: tuple[str, ...]
    head: str
    min_levels: int = 2
    max_levels: int = 7
    halvings: int | None = None  # None: one less than there are levels


def _unet(network: Network, channels: int, outputs: int) -> nn.Module:
    return UNet(
        spatial_dims=3,
        in_channels=channels,
        out_channels=outputs,
        channels=network.features,
        strides=(2,) * (len(network.features) - 1),
        num_res_units=network.residual_units,
        norm=_INSTANCE,
    )


def _dynunet(network: Network, channels: int, outputs: int) -> nn.Module:
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
            norm_name=_INSTANCE,
            deep_supervision=False,
            res_block=network.residual_units > 0,
        )
    )


def _segresnet(network: Network, channels: int, outputs: int) -> nn.Module:
    _check_doubling(network)
    levels = len(network.features)
    return SegResNet(
        spatial_dims=3,
        init_filters=network.features[0],
        in_channels=channels,
        out_channels=outputs,
        norm=_INSTANCE,
        blocks_down=(max(1, network.residual_units),) * levels,
        blocks_up=(1,) * (levels - 1),
    )


def _swinunetr(network: Network, channels: int, outputs: int) -> nn.Module:
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
        norm_name=_INSTANCE,
    )


BACKBONES: dict[str, Backbone] = {
    # Its first block is strided: that is the stem.
    "unet": Backbone(_unet, stem=("model.0",), head="model.2"),
    "dynunet": Backbone(_dynunet, stem=("input_block",), head="output_block", min_levels=3),
    "segresnet": Backbone(_segresnet, stem=("convInit", "down_layers.0"), head="conv_final"),
    # Two ways lead in: the strided patch embedding and a block at full resolution.
    "swinunetr": Backbone(
        _swinunetr, stem=("swinViT.patch_embed", "encoder1"), head="out", max_levels=5, halvings=5
    ),
}


def build_network(study: Study, domains: Sequence[str], *, seed: int) -> SegmentationNetwork:
    """The study's network for these domains; equal seeds give equal shared weights, whatever K.

    Raises:
        NetworkError: the backbone cannot be built from `study.network`.
    """
    network, task = study.network, study.task
    backbone = BACKBONES[network.name]
    levels = len(network.features)
    if not backbone.min_levels <= levels <= backbone.max_levels:
        raise NetworkError(
            f"network.features has {levels} levels, but {network.name} takes "
            f"{backbone.min_levels} to {backbone.max_levels}; change the list"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, "network"))  # leaves CUDA alone
        built = backbone.build(network, task.channels, task.outputs)
    multiple = patch_multiple(network)
    if not study.plan.harmonized:
        return SegmentationNetwork(built, domains=domains, multiple=multiple)
    return harmonize(
        built,
        domains=domains,
        settings=network.harmonization,
        stem=_stem(built, backbone),
        head=_convolutions(built, backbone.head)[-1:],
        multiple=multiple,
    )


def patch_multiple(network: Network) -> int:
    """Edges of a patch must be multiples of this many voxels."""
    halvings = BACKBONES[network.name].halvings
    return 1 << (len(network.features) - 1 if halvings is None else halvings)


def minimum_patch(network: Network) -> int:
    """The edge, in voxels, of the smallest cube that this network takes."""
    return 2 * patch_multiple(network)


def check_patch(network: Network, patch: Sequence[int]) -> None:
    """Make sure that `patch` (D, H, W), in voxels, can pass through the network.

    Raises:
        ConfigError: an edge is no multiple of the strides, or the deepest level is too small.
    """
    wrong = wrong_size(patch, patch_multiple(network))
    if wrong is not None:
        raise ConfigError(f"training.patch ({network.name}): a patch {wrong}")


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


def _stem(network: nn.Module, backbone: Backbone) -> list[str]:
    # A kernel of one weight only scales its input, and the norm behind it takes that out again.
    return [
        path
        for top in backbone.stem
        for path in _convolutions(network, top)
        if network.get_parameter(f"{path}.weight")[0].numel() > 1
    ]


def _convolutions(network: nn.Module, top: str) -> list[str]:
    return [
        f"{top}.{name}" if name else top
        for name, module in network.get_submodule(top).named_modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
    ]
