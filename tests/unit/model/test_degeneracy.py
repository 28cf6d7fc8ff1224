"""No local parameter of the four networks is dead weight; and the check finds one that is."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn

from uharmony_model.backbones import BACKBONES
from uharmony_model.degeneracy import local_sensitivities
from uharmony_model.errors import NetworkError
from uharmony_model.harmonize import HarmonizedNetwork, harmonize, stacked_keys
from uharmony_model.network_settings import RESIDUAL_NAMES, Harmonization
from uharmony_model.networks import build_network
from uharmony_model.study import Study


def study(name: str, features: tuple[int, ...], units: int = 1) -> Study:
    return Study.model_validate(
        {
            "name": "test",
            "task": {"classes": {"core": 1}, "intensity": {"mr": {"policy": "zscore"}}},
            "network": {"name": name, "features": features, "residual_units": units},
        }
    )


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize(
    ("name", "units"),
    [("unet", 0), ("unet", 2), ("dynunet", 0), ("dynunet", 1), ("segresnet", 1)],
)
def test_every_local_tensor_matters(name, units):
    model = build_network(study(name, (4, 8, 16), units), ("a", "b"), seed=0)
    assert isinstance(model, HarmonizedNetwork)
    found = local_sensitivities(model, draw(2, 1, 12, 8, 4), domain=1)
    assert {each.name for each in found} == stacked_keys(model)
    assert all(each.change is not None for each in found)
    assert not [each for each in found if each.degenerate]


@pytest.mark.slow
def test_every_local_tensor_of_a_transformer_matters():
    """Windows of 2 in the place of 7 make it four times faster and change no layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        swin = SwinUNETR(1, 2, feature_size=12, window_size=2, norm_name="instance")
    table = BACKBONES["swinunetr"]
    model = harmonize(
        swin,
        domains=("a",),
        settings=Harmonization(residuals=RESIDUAL_NAMES),
        stem=("swinViT.patch_embed", "encoder1.layer.conv1"),
        head=(table.head,),
    )
    changed = [
        "network.swinViT.layers1.0.blocks.0.norm1.shift",
        "network.swinViT.layers4.0.downsample.norm.rho",
        "network.out.conv.conv.bias_residual",
    ]
    found = local_sensitivities(model, draw(1, 1, 96, 32, 32), changed=changed)
    assert {each.name for each in found} == stacked_keys(model)
    assert [each.name for each in found if each.change is not None] == changed
    assert not [each for each in found if each.degenerate]


class KeptNorm(nn.Module):
    """An instance norm that no registry sees, as a call."""

    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.instance_norm(x, eps=self.eps)


@pytest.mark.parametrize("between", [nn.Identity, nn.ReLU])
def test_a_second_stage_before_an_instance_norm_is_found(between):
    """The positive control: IN(s z + m) = IN(z), unless an activation stands between them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1),
            nn.InstanceNorm3d(4, affine=True),
            between(),
            KeptNorm(),
            nn.ReLU(),
            nn.Conv3d(4, 2, 1),
        )
    model = harmonize(network, domains=("a",), settings=Harmonization(), stem=("0",), head=("5",))
    found = local_sensitivities(model, draw(2, 1, 6, 5, 4))
    dead = {each.name for each in found if each.degenerate}
    phi = {f"network.1.{name}" for name in ("gain", "shift", "rho", "lam")}
    if between is nn.Identity:
        assert dead == phi
        # By both measures, so that neither hides behind the other.
        for each in found:
            assert each.change is not None
            assert (each.gradient < 1e-6) == (each.change < 1e-6) == (each.name in phi)
    else:
        assert dead == set()


def test_the_network_itself_is_left_as_it_was():
    model = build_network(study("unet", (2, 4)), ("a", "b"), seed=0)
    assert isinstance(model, HarmonizedNetwork)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    local_sensitivities(model, draw(1, 1, 8, 4, 4))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert tensor.dtype == before[key].dtype
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_local_is_refused():
    model = harmonize(
        nn.Sequential(nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2)),
        domains=("a",),
        settings=Harmonization(stage2="off"),
    )
    with pytest.raises(NetworkError, match="no local tensors to check"):
        local_sensitivities(model, draw(1, 1, 3, 3, 3))
