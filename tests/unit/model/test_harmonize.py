"""What harmonize() does to a network, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from uharmony_model.depthwise_residual import DepthwiseResidual
from uharmony_model.errors import NetworkError
from uharmony_model.harmonic_layer import HarmonicNorm
from uharmony_model.harmonize import CHANNEL_AXIS, HarmonizedNetwork, harmonize, stacked_keys
from uharmony_model.methods import Part
from uharmony_model.network_settings import RESIDUAL_NAMES, Harmonization
from uharmony_model.residual_conv import ResidualConv

DOMAINS = ("scanner-a", "scanner-b", "scanner-c")


def small(norm: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    """conv, norm, activation, conv; its affine parameters are not those at start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv3d(2, 4, 3, padding=1),
            norm or nn.InstanceNorm3d(4, affine=True),
            nn.LeakyReLU(inplace=True),
            nn.Conv3d(4, 3, 1),
        )
        for parameter in network[1].parameters():
            nn.init.normal_(parameter)
    return network


def harmonized(network: nn.Module | None = None, **settings) -> HarmonizedNetwork:
    return harmonize(
        network or small(),
        domains=DOMAINS,
        settings=Harmonization(**{"residuals": RESIDUAL_NAMES, **settings}),
        stem=("0",),
        head=("3",),
    )


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(stacked_keys(model)):
            named[name].copy_(0.2 * torch.randn(named[name].shape, generator=generator))


def draw(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, 5, 3, 4, generator=generator)


@pytest.mark.parametrize("domain", [None, torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])])
@pytest.mark.parametrize("stage2", ["free", "affine", "off"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_zero_residuals_are_the_plain_network(order, stage2, domain):
    model = harmonized(order=order, stage2=stage2)
    torch.testing.assert_close(model(draw(), domain), small()(draw()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "channel_axis"),
    [
        (nn.InstanceNorm1d(4, affine=True), 1),
        (nn.InstanceNorm2d(4, affine=True, eps=1e-3), 1),
        (nn.InstanceNorm3d(4), 1),
        (nn.BatchNorm3d(4), 1),
        (nn.GroupNorm(2, 4), 1),
        (nn.GroupNorm(2, 4, affine=False), 1),
        (nn.LayerNorm(4), -1),
        (nn.LayerNorm(4, bias=False), -1),
    ],
)
def test_every_known_norm_hands_over_its_affine_parameters(norm, channel_axis):
    plain = small(norm)[1]
    model = harmonized(small(norm), order=2)
    layer = model.network.get_submodule("1")
    assert type(layer) is HarmonicNorm
    assert layer.channel_axis == channel_axis == CHANNEL_AXIS[type(norm)]
    assert layer.eps == norm.eps
    weight, bias = getattr(plain, "weight", None), getattr(plain, "bias", None)
    one, zero = torch.ones(4), torch.zeros(4)
    assert torch.equal(layer.polynomial[1], one if weight is None else weight)
    assert torch.equal(layer.polynomial[0], zero if bias is None else bias)
    assert torch.equal(layer.polynomial[2], zero)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.LocalResponseNorm(2)]
)
def test_an_unknown_norm_is_named_with_its_path(norm):
    network = nn.Sequential(small(), nn.Sequential(norm))
    with pytest.raises(NetworkError, match=rf"Sequential: 1\.0 is a {type(norm).__name__}"):
        harmonize(network, domains=DOMAINS, settings=Harmonization())
    # Nothing was replaced before it was found.
    assert not any(isinstance(module, HarmonicNorm) for module in network.modules())


def test_rms_norm_is_unknown():
    with pytest.raises(NetworkError, match="1 is a RMSNorm, which harmonisation does not know"):
        harmonized(small(nn.RMSNorm(4)))


def test_a_subclass_of_a_known_norm_is_unknown():
    """It may compute something else."""

    class Special(nn.InstanceNorm3d):
        pass

    with pytest.raises(NetworkError, match="1 is a Special"):
        harmonized(small(Special(4)))


def test_a_layer_norm_over_space_is_refused():
    with pytest.raises(NetworkError, match="LayerNorm over 3 axes"):
        harmonized(small(nn.LayerNorm((5, 3, 4))))


def test_a_network_without_norms_is_refused():
    with pytest.raises(NetworkError, match="has no norm layer to harmonise"):
        harmonized(small(nn.Identity()))


def test_harmonising_twice_is_refused():
    with pytest.raises(NetworkError, match="harmonised already"):
        harmonize(harmonized(), domains=DOMAINS, settings=Harmonization())


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"stem": ("9",)}, "has no module '9'"),
        ({"head": ("2",)}, "'2' holds no 3D convolution"),
        ({"stem": ("0",), "head": ("0",)}, "residuals of two kinds"),
    ],
)
def test_wrong_paths_are_refused(paths, message):
    settings = Harmonization(residuals=RESIDUAL_NAMES)
    with pytest.raises(NetworkError, match=message):
        harmonize(small(), domains=DOMAINS, settings=settings, **paths)


@pytest.mark.parametrize("domains", ["scanner", ("a", "b", "a")])
def test_domains_are_different_names(domains):
    with pytest.raises(NetworkError, match="give a sequence of different names"):
        harmonize(small(), domains=domains, settings=Harmonization())


@pytest.mark.parametrize("stem", [True, False])
@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_settings_choose_the_residual_convolutions(stem, depthwise, head):
    chosen = {"stem": stem, "depthwise": depthwise, "head": head}
    names = ["phi", *(name for name, there in chosen.items() if there)]
    network = nn.Sequential(*small(), nn.Conv3d(3, 3, 3, padding=1))
    model = harmonize(
        network,
        domains=DOMAINS,
        settings=Harmonization.model_validate({"residuals": names}),
        stem=("0",),
        head=("3",),
        depthwise=("4",),
    )
    kinds = (ResidualConv, DepthwiseResidual)
    parts = {path: m.part for path, m in model.named_modules() if isinstance(m, kinds)}
    expected = {"network.0": Part.STEM_RESIDUAL} if stem else {}
    expected |= {"network.3": Part.HEAD_RESIDUAL} if head else {}
    expected |= {"network.4": Part.DEPTHWISE_RESIDUAL} if depthwise else {}
    assert parts == expected


def test_without_phi_there_is_no_second_stage():
    names = {name.rpartition(".")[2] for name in stacked_keys(harmonized(residuals=("head",)))}
    assert names == {"weight_residual", "bias_residual"}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", "abcd"), ("encoder", "ab"), ("decoder", "cd"), (1, "a"), (3, "abc")],
)
def test_layers_choose_the_norms_that_harmonise(layers, expected):
    network = nn.ModuleDict({name: small() for name in "abcd"})
    model = harmonize(
        network, domains=DOMAINS, settings=Harmonization(layers=layers), encoder=("a", "b")
    )
    found = {p.split(".")[1] for p, m in model.named_modules() if isinstance(m, HarmonicNorm)}
    kept = {p.split(".")[1] for p, m in model.named_modules() if isinstance(m, nn.InstanceNorm3d)}
    assert (found, kept) == (set(expected), set("abcd") - set(expected))


@pytest.mark.parametrize(("layers", "encoder"), [(2, ()), ("encoder", ()), ("decoder", ("1",))])
def test_layers_that_are_not_there_are_refused(layers, encoder):
    with pytest.raises(NetworkError, match=f"layers is {layers}, but the network has 1 norm"):
        harmonize(small(), domains=DOMAINS, settings=Harmonization(layers=layers), encoder=encoder)


def test_stacked_keys_have_one_row_a_domain():
    model = harmonized()
    state = model.state_dict()
    assert stacked_keys(model) == {
        *("network.0.weight_residual", "network.3.weight_residual", "network.3.bias_residual"),
        *("network.1.gain", "network.1.shift", "network.1.rho", "network.1.lam"),
    }
    for key in stacked_keys(model):
        assert state[key].shape[0] == len(DOMAINS)
    assert stacked_keys(small()) == frozenset()


def test_mixed_batch_equals_each_sample_alone():
    model = harmonized()
    randomise(model)
    x, domain = draw(), torch.tensor([2, -1, 0])
    together = model(x, domain)
    for b in range(3):
        alone = model(x[b : b + 1], domain[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone)
    # Unseen among others, dropped, and without a domain: three ways to all residuals zero.
    unseen = model(x)[1]
    torch.testing.assert_close(together[1], unseen)
    assert torch.equal(model(x, domain, drop=True)[1], unseen)
    torch.testing.assert_close(unseen, small()(x)[1], rtol=1e-5, atol=1e-5)


def test_a_swapped_domain_changes_the_logits():
    model = harmonized()
    randomise(model)
    x = draw(1)
    difference = model(x, torch.tensor([0])) - model(x, torch.tensor([1]))
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize("how", [{}, {"domain": torch.tensor([0, 1, 0]), "drop": True}])
def test_dropped_residuals_keep_no_gradient(how):
    model = harmonized()
    randomise(model)
    model(draw(), **how).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in stacked_keys(model)), name


def test_a_selected_domain_has_gradients_and_the_others_zeros():
    model = harmonized()
    randomise(model)
    model(draw(), torch.tensor([1, 1, 1])).square().sum().backward()
    named = dict(model.named_parameters())
    for name in stacked_keys(model):
        gradient = named[name].grad
        assert gradient is not None
        assert gradient[1].abs().max() > 0, name
        assert gradient[[0, 2]].abs().max() == 0, name


def test_the_selection_of_one_pass_is_not_that_of_the_next():
    model = harmonized()
    randomise(model)
    x = draw()
    first = model(x)
    model(x, torch.tensor([0, 1, 2]))
    assert torch.equal(model(x), first)


def test_a_deep_copy_is_independent():
    model = harmonized()
    randomise(model)
    x, domain = draw(), torch.tensor([0, 1, 2])
    before = model(x, domain)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x, domain), before)
    switches = {id(m.switch) for m in twin.modules() if isinstance(m, HarmonicNorm | ResidualConv)}
    assert switches == {id(twin._switch)}
    twin(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x, domain), before)


def test_state_dict_round_trip():
    model, other = harmonized(), harmonized(small(seed=1))
    randomise(model)
    other.load_state_dict(model.state_dict())
    x, domain = draw(), torch.tensor([0, 1, 2])
    assert torch.equal(other(x, domain), model(x, domain))


def test_the_domain_must_fit_the_batch():
    with pytest.raises(NetworkError, match=r"shape \(2,\) for 3 samples"):
        harmonized()(draw(), torch.tensor([0, 1]))
    with pytest.raises(NetworkError, match="domain index 3 with 3 domains"):
        harmonized()(draw(), torch.tensor([0, 1, 3]))


def test_no_domain_at_all():
    """A coordinator, or a hospital that was never in the federation."""
    model = harmonize(small(), domains=(), settings=Harmonization(), stem=("0",), head=("3",))
    torch.testing.assert_close(model(draw()), small()(draw()), rtol=1e-5, atol=1e-5)
    assert {model.state_dict()[key].shape[0] for key in stacked_keys(model)} == {0}


def test_training_mode_device_and_dtype_follow_the_network():
    model = harmonized(small().double().eval())
    assert not any(module.training for module in model.network.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    plain = small(nn.InstanceNorm3d(4)).double()  # without weights to take the type from
    assert {parameter.dtype for parameter in harmonized(plain).parameters()} == {torch.float64}


def test_modules_that_stand_in_several_places_stay_one():
    """MONAI's DynUNet lists every block twice."""
    with torch.random.fork_rng(devices=[]):
        network = DynUNet(3, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(2, 3, 4))
    model = harmonize(
        network,
        domains=DOMAINS,
        settings=Harmonization(),
        stem=("input_block",),
        head=("output_block",),
    )
    assert not [m for m in model.modules() if isinstance(m, nn.InstanceNorm3d)]
    at = model.network.get_submodule
    assert at("input_block.norm1") is at("skip_layers.downsample.norm1")
    assert at("input_block.conv1.conv") is at("skip_layers.downsample.conv1.conv")
    assert isinstance(at("input_block.conv1.conv"), ResidualConv)
    keys = stacked_keys(model)
    assert "network.input_block.norm1.gain" in keys
    assert "network.skip_layers.downsample.norm1.gain" in keys


def test_functional_norms_are_listed():
    with torch.random.fork_rng(devices=[]):
        swin = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), window_size=2)
        unet = UNet(3, 1, 2, (2, 4), (2,))
    model = harmonize(swin, domains=DOMAINS, settings=Harmonization())
    (kept,) = model.kept_norms
    assert kept.startswith("swinViT.proj_out: torch.nn.functional.layer_norm")
    assert harmonize(unet, domains=DOMAINS, settings=Harmonization()).kept_norms == ()
