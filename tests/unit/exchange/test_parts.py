"""Every tensor is classified by the type of its module; names never matter."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR, UNet
from torch import nn

from uharmony_model.errors import PartitionError
from uharmony_model.exchange.parts import part_of
from uharmony_model.harmonize import harmonize
from uharmony_model.methods import Part
from uharmony_model.network_settings import RESIDUAL_NAMES, Harmonization

AFFINE = {"weight": Part.NORM_AFFINE, "bias": Part.NORM_AFFINE}
STATISTICS = dict.fromkeys(
    ("running_mean", "running_var", "num_batches_tracked"), Part.NORM_STATISTICS
)
WEIGHTS = {"weight": Part.BACKBONE, "bias": Part.BACKBONE}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv3d(1, 2, 1), WEIGHTS),
        (nn.Conv3d(1, 2, 1, bias=False), {"weight": Part.BACKBONE}),
        (nn.ConvTranspose3d(1, 2, 1), WEIGHTS),
        (nn.Linear(1, 2), WEIGHTS),
        (nn.PReLU(), {"weight": Part.BACKBONE}),
        (nn.InstanceNorm3d(2), {}),
        (nn.InstanceNorm3d(2, affine=True), AFFINE),
        (nn.InstanceNorm3d(2, affine=True, track_running_stats=True), AFFINE | STATISTICS),
        (nn.BatchNorm3d(2), AFFINE | STATISTICS),
        (nn.GroupNorm(1, 2), AFFINE),
        (nn.LayerNorm(2), AFFINE),
        (nn.Sequential(nn.ReLU(), nn.MaxPool3d(2)), {}),
    ],
)
def test_plain_layers(module, expected):
    assert part_of(module) == expected


def test_adversarial_names_change_nothing():
    model = nn.Module()
    for name in ("norm1", "bn", "instance_norm", "phi", "gain", "polynomial", "running_mean"):
        model.add_module(name, nn.Conv3d(1, 1, 1))
    for name in ("norm10", "conv", "weight_residual", "backbone"):
        model.add_module(name, nn.BatchNorm3d(1))
    parts = part_of(model)
    assert {parts[f"{name}.weight"] for name in ("norm1", "bn", "phi")} == {Part.BACKBONE}
    assert {parts[f"{name}.bias"] for name in ("norm10", "conv")} == {Part.NORM_AFFINE}
    assert parts["backbone.running_mean"] is Part.NORM_STATISTICS
    assert sum(part is Part.BACKBONE for part in parts.values()) == 7 * 2
    assert len(parts) == 7 * 2 + 4 * 5


def two_levels() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.PReLU(),
        nn.ConvTranspose3d(4, 2, 1),
    )


@pytest.mark.parametrize("stage2", ["free", "affine", "revin", "off"])
def test_a_harmonised_network(stage2):
    model = harmonize(
        two_levels(),
        domains=("ct", "mr"),
        settings=Harmonization(stage2=stage2, residuals=RESIDUAL_NAMES),
        stem=("0",),
        head=("3",),
    )
    expected = {
        "network.0.shared.weight": Part.BACKBONE,
        "network.0.shared.bias": Part.BACKBONE,
        "network.0.weight_residual": Part.STEM_RESIDUAL,
        "network.1.polynomial": Part.POLYNOMIAL,
        "network.2.weight": Part.BACKBONE,
        "network.3.shared.weight": Part.BACKBONE,
        "network.3.shared.bias": Part.BACKBONE,
        "network.3.weight_residual": Part.HEAD_RESIDUAL,
        "network.3.bias_residual": Part.HEAD_RESIDUAL,
    }
    local = {"free": ("gain", "shift", "rho", "lam"), "off": ()}.get(stage2, ("gain", "shift"))
    expected |= {f"network.1.{name}": Part.PHI for name in local}
    assert part_of(model) == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda: UNet(3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch"),
        lambda: DynUNet(3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 8, 8)),
        lambda: SegResNet(3, 8, in_channels=1, blocks_down=(1, 1), blocks_up=(1,)),
        lambda: SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1)),
    ],
    ids=["UNet", "DynUNet", "SegResNet", "SwinUNETR"],
)
def test_the_backbones_of_monai(build):
    """By an independent walk: the owner of each key, found by getattr, tells its part."""
    kinds = {
        "Conv3d": Part.BACKBONE,
        "ConvTranspose3d": Part.BACKBONE,
        "Linear": Part.BACKBONE,
        "PReLU": Part.BACKBONE,
        "BatchNorm3d": Part.NORM_AFFINE,
        "InstanceNorm3d": Part.NORM_AFFINE,
        "GroupNorm": Part.NORM_AFFINE,
        "LayerNorm": Part.NORM_AFFINE,
        "WindowAttention": Part.BACKBONE,
    }
    network = build()
    parts = part_of(network)
    assert parts.keys() == network.state_dict().keys()
    for key, part in parts.items():
        path, _, name = key.rpartition(".")
        if name == "relative_position_index":
            expected = Part.INDEX
        elif name in STATISTICS:
            expected = Part.NORM_STATISTICS
        else:
            expected = kinds[type(network.get_submodule(path)).__name__]
        assert part is expected, key
    assert Part.NORM_STATISTICS in parts.values() or not isinstance(network, UNet)
    assert Part.INDEX in parts.values() or not isinstance(network, SwinUNETR)


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Buffered(nn.Module):
    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=persistent)


class Odd(nn.Conv3d):
    def __init__(self) -> None:
        super().__init__(1, 1, 1)
        self.patient_mean = nn.Parameter(torch.zeros(1))


class WithExtraState(nn.ReLU):
    def get_extra_state(self):
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("module", "key", "owner"),
    [
        (Direct(), "1.weight", "Direct"),
        (Buffered(persistent=True), "1.seen", "Buffered"),
        (nn.Embedding(2, 2), "1.weight", "Embedding"),
        (Odd(), "1.patient_mean", "Odd"),
        (WithExtraState(), "1._extra_state", ""),
    ],
)
def test_a_tensor_that_nobody_classified_is_an_error(module, key, owner):
    with pytest.raises(PartitionError, match=f"^{key}: .*{owner}"):
        part_of(nn.Sequential(nn.ReLU(), module))


def test_a_buffer_that_is_not_saved_needs_no_part():
    assert part_of(Buffered(persistent=False)) == {}


def test_a_tied_module_is_classified_under_all_its_keys():
    norm = nn.InstanceNorm3d(1, affine=True)
    parts = part_of(nn.ModuleDict({"one": norm, "two": norm}))
    assert set(parts) == {"one.weight", "one.bias", "two.weight", "two.bias"}
    assert set(parts.values()) == {Part.NORM_AFFINE}
