"""The four backbones: what is built, what is local in them, and which sizes they take."""

from __future__ import annotations

import warnings

import pytest
import torch
from monai.networks.nets.dynunet import DynUNet
from torch import Tensor, nn

from uharmony_model.backbones import BACKBONES
from uharmony_model.errors import ConfigError, NetworkError
from uharmony_model.harmonic_layer import HarmonicNorm
from uharmony_model.harmonize import HarmonizedNetwork, stacked_keys
from uharmony_model.methods import Part
from uharmony_model.network_settings import RESIDUAL_NAMES, Network
from uharmony_model.networks import (
    build_network,
    check_patch,
    patch_multiple,
)
from uharmony_model.residual_conv import ResidualConv
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study

FEATURES = {
    "unet": (4, 8, 12),
    "dynunet": (4, 6, 8),
    "segresnet": (4, 8, 16),
    "swinunetr": (12, 24),
}
# Smallest patch with at least three voxels at the deepest level.
SMALLEST = {
    "unet": (12, 4, 4),
    "dynunet": (12, 4, 4),
    "segresnet": (12, 4, 4),
    "swinunetr": (96, 32, 32),
}
EACH = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "swinunetr" else n for n in BACKBONES]
)


EVERY = {"residuals": RESIDUAL_NAMES}


def study(name: str, method: str = "uharmony", **network) -> Study:
    return Study.model_validate(
        {
            "name": "test",
            "method": method,
            "task": {
                "classes": {"core": 1, "edge": 2},
                "channels": 2,
                "intensity": {"mr": {"policy": "zscore"}},
            },
            "network": {"name": name, "features": FEATURES[name], **network},
        }
    )


def build(name: str, method: str = "uharmony", *, seed: int = 0, k: int = 2, **network):
    domains = [f"domain-{index}" for index in range(k)]
    return build_network(study(name, method, **network), domains, seed=seed)


def draw(*size: int) -> Tensor:
    return torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))


@EACH
@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_one_signature_and_one_logit_per_output_and_voxel(name, method):
    model = build(name, method)
    assert isinstance(model, SegmentationNetwork)
    assert isinstance(model, HarmonizedNetwork) == (method == "uharmony")
    assert model.domains == ("domain-0", "domain-1")
    domain = torch.tensor([1] if name == "swinunetr" else [0, 1])
    x = draw(*SMALLEST[name])[: len(domain)]
    with torch.no_grad():
        logits = [model(x), model(x, domain), model(x, domain, drop=True)]
    for each in logits:
        assert each.shape == (len(x), 3, *SMALLEST[name])  # background and two classes
        # Residuals start at zero, and a plain network ignores the domain.
        torch.testing.assert_close(each, logits[0], rtol=1e-4, atol=1e-4)


@EACH
def test_harmonised_starts_as_the_plain_network(name):
    """Equal seeds give equal shared weights, and a layer starts as an instance norm.

    Not swinunetr, whose LayerNorms become norms over space.
    """
    plain, model = build(name, "fedavg"), build(name)
    expected = plain.state_dict()
    for key, tensor in model.state_dict().items():
        origin = key.replace(".shared.", ".")
        if origin in expected:
            assert torch.equal(tensor, expected[origin]), key
    if name != "swinunetr":
        x = draw(*SMALLEST[name])
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet"])
def test_the_seed_alone_decides_the_shared_weights(name):
    first, same, more = build(name), build(name), build(name, k=5)
    other = build(name, seed=1)
    state, differing = first.state_dict(), 0
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[key])
        if key not in stacked_keys(first):
            assert torch.equal(tensor, more.state_dict()[key])
            differing += not torch.equal(tensor, other.state_dict()[key])
    assert differing > len([key for key in state if key.endswith("conv.weight")]) / 2


@EACH
@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_building_is_silent_and_leaves_the_global_generator_alone(name, method, capfd):
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(name, method)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


@EACH
@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_every_parameter_has_one_key(name, method):
    model = build(name, method)
    keys = {name for name, _ in model.named_parameters()}
    buffers = {name for name, _ in model.named_buffers()}
    assert set(model.state_dict()) == keys | buffers


STEMS = {
    ("unet", 0): {"model.0.conv"},
    ("unet", 1): {"model.0.conv.unit0.conv", "model.0.residual"},
    ("unet", 2): {"model.0.conv.unit0.conv", "model.0.conv.unit1.conv", "model.0.residual"},
    ("dynunet", 0): {"input_block.conv1.conv", "input_block.conv2.conv"},
    ("dynunet", 1): {f"input_block.conv{i}.conv" for i in (1, 2, 3)},
    ("segresnet", 1): {"convInit.conv", *(f"down_layers.0.1.conv{i}.conv" for i in (1, 2))},
    ("swinunetr", 1): {
        "swinViT.patch_embed.proj",
        *(f"encoder1.layer.conv{i}.conv" for i in (1, 2, 3)),
    },
}
HEADS = {
    ("unet", 0): "model.2.conv",
    ("unet", 1): "model.2.1.conv.unit0.conv",
    ("unet", 2): "model.2.1.conv.unit0.conv",
    ("dynunet", 0): "output_block.conv.conv",
    ("dynunet", 1): "output_block.conv.conv",
    ("segresnet", 1): "conv_final.2.conv",
    ("swinunetr", 1): "out.conv.conv",
}


@pytest.mark.parametrize(("name", "units"), STEMS)
def test_stem_and_head(name, units):
    model = build(name, residual_units=units, harmonization=EVERY)
    parts: dict[Part, set[str]] = {Part.STEM_RESIDUAL: set(), Part.HEAD_RESIDUAL: set()}
    for path, module in model.network.named_modules():
        if isinstance(module, ResidualConv):
            parts[module.part].add(path)
    assert parts[Part.STEM_RESIDUAL] == STEMS[name, units]
    assert parts[Part.HEAD_RESIDUAL] == {HEADS[name, units]}


@EACH
def test_the_head_is_the_last_convolution_that_runs(name):
    model = build(name, harmonization=EVERY)
    order: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(lambda module, *_: order.append(module))
    model(draw(*SMALLEST[name])[:1])
    (head,) = (m for m in model.modules() if getattr(m, "part", None) is Part.HEAD_RESIDUAL)
    assert order[-1] is head.shared


def test_a_shortcut_that_only_scales_one_channel_is_no_stem():
    """With one input channel, the norm behind a 1x1x1 convolution undoes what it does."""
    one = study("dynunet", residual_units=1)
    one = one.model_copy(update={"task": one.task.model_copy(update={"channels": 1})})
    model = build_network(one, ("a",), seed=0)
    assert not isinstance(model.network.get_submodule("input_block.conv3.conv"), ResidualConv)


@pytest.mark.parametrize("units", [0, 1])
def test_dynunet_computes_what_monai_s_does(units):
    flat = build("dynunet", "fedavg", residual_units=units)
    with torch.random.fork_rng(devices=[]):
        original = DynUNet(
            *(3, 2, 3, (3, 3, 3), (1, 2, 2), (2, 2)), filters=(4, 6, 8), res_block=units > 0
        )
    state = flat.network.state_dict()
    original.load_state_dict(
        {
            # Its skip layers repeat the blocks under further names.
            key: state.get(key, tensor)
            for key, tensor in original.state_dict().items()
            if not key.startswith("skip_layers.")
        },
        strict=False,
    )
    x = draw(8, 4, 12)
    assert torch.equal(original(x), flat(x))


@EACH
def test_norms_have_learned_weights_in_plain_arms_and_none_are_left_in_harmonised_ones(name):
    kinds = (nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm3d)
    plain = [m for m in build(name, "fedavg").modules() if isinstance(m, kinds)]
    assert plain
    assert all(norm.weight is not None for norm in plain)
    assert not [m for m in build(name).modules() if isinstance(m, kinds)]
    layers = [m for m in build(name).modules() if isinstance(m, HarmonicNorm)]
    assert len(layers) == len(plain)


@pytest.mark.parametrize(
    ("name", "features", "multiple"),
    [
        ("unet", (4, 8), 2),
        ("unet", (4, 8, 16, 32), 8),
        ("dynunet", (4, 8, 16), 4),
        ("segresnet", (4, 8, 16, 32), 8),
        ("swinunetr", (12, 24), 32),
    ],
)
def test_sizes_a_network_takes(name, features, multiple):
    network = Network(name=name, features=features)
    assert patch_multiple(network) == multiple
    edge = 2 * multiple
    check_patch(network, (edge, edge, edge))
    check_patch(network, (3 * multiple, multiple, multiple))
    with pytest.raises(ConfigError, match=rf"make every edge a multiple of {multiple}"):
        check_patch(network, (edge, edge + 1, edge))
    for small in [(multiple,) * 3, (edge, multiple, multiple)]:
        with pytest.raises(ConfigError, match=rf"too small .* make two edges {edge} or more"):
            check_patch(network, small)


@EACH
@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_a_volume_that_does_not_fit_is_refused_before_it_runs(name, method):
    model, multiple = build(name, method), patch_multiple(study(name).network)
    with pytest.raises(NetworkError, match=f"multiple of {multiple}"):
        model(torch.zeros(1, 2, 2 * multiple, 2 * multiple, 2 * multiple + 1))
    with pytest.raises(NetworkError, match="too small for this network"):
        model(torch.zeros(1, 2, multiple, multiple, multiple))


@pytest.mark.parametrize(
    ("name", "features", "message"),
    [
        ("dynunet", (4, 8), "2 levels, but dynunet takes 3 to 7"),
        ("swinunetr", (12, 24, 48, 96, 192, 384), "6 levels, but swinunetr takes 2 to 5"),
        ("swinunetr", (16, 32), "starts with 16, but swinunetr needs a multiple of 12"),
        ("segresnet", (4, 8, 12), r"segresnet doubles .* write \[4, 8, 16\]"),
        ("swinunetr", (12, 12), r"swinunetr doubles .* write \[12, 24\]"),
    ],
)
def test_networks_that_cannot_be_built(name, features, message):
    with pytest.raises(NetworkError, match=message):
        build(name, features=features)
