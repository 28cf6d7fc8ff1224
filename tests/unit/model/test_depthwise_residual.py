"""Depthwise residuals against a convolution a channel and a sample, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.tiny import tiny_study
from uharmony_model.degeneracy import local_sensitivities
from uharmony_model.depthwise_residual import DepthwiseResidual
from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.harmonize import HarmonizedNetwork, stacked_keys
from uharmony_model.networks import build_network

K, C = 3, 2
CONVOLUTIONS: dict[str, Callable[[], nn.Conv3d]] = {
    "same": lambda: nn.Conv3d(C, 4, 3, padding=1),
    "strided": lambda: nn.Conv3d(C, 4, 3, stride=2, padding=1),
    "pointwise": lambda: nn.Conv3d(C, 5, 1),
    "no bias": lambda: nn.Conv3d(C, 4, 3, bias=False),
    "grouped": lambda: nn.Conv3d(C, 4, 3, groups=2),
}


def make(kind: str = "same") -> DepthwiseResidual:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = DepthwiseResidual(CONVOLUTIONS[kind](), domains=K, switch=DomainSwitch()).double()
        with torch.no_grad():
            layer.kernel_residual.normal_()
    return layer


def draw(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, C, 5, 6, 4, generator=generator, dtype=torch.float64)


def reference(layer: DepthwiseResidual, x: Tensor, rows: Tensor) -> Tensor:
    """conv(x + d * x): every channel of every sample is an image of its own."""
    samples = []
    for b in range(x.shape[0]):
        channels = []
        for c in range(C):
            kernel = sum(rows[b, k] * layer.kernel_residual[k, c, 0] for k in range(K))
            assert isinstance(kernel, Tensor)
            channels.append(F.conv3d(x[b : b + 1, c : c + 1], kernel[None, None], padding=1))
        samples.append(torch.cat(channels, 1))
    x = x + torch.cat(samples)
    shared = layer.shared
    options: dict[str, Any] = {
        "stride": shared.stride,
        "padding": shared.padding,
        "groups": shared.groups,
    }
    return F.conv3d(x, shared.weight, shared.bias, **options)


def one_hot(domain: list[int]) -> Tensor:
    rows = torch.zeros(len(domain), K, dtype=torch.float64)
    for b, k in enumerate(domain):
        if k >= 0:
            rows[b, k] = 1
    return rows


@pytest.mark.parametrize("domain", [[1, 1, 1], [2, 0, 2], [-1, 1, 0]])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_sample_passes_the_kernel_of_its_domain(kind, domain):
    layer, x = make(kind), draw(3)
    layer.switch.selection = Selection.of(torch.tensor(domain), K)
    torch.testing.assert_close(layer(x), reference(layer, x, one_hot(domain)))


@pytest.mark.parametrize("uniform", [True, False])
def test_a_mixture_of_domains_is_the_mixture_of_their_kernels(uniform):
    rows = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3]], dtype=torch.float64)
    if not uniform:
        rows[1] = torch.tensor([0.0, 0.1, 0.6])
    layer, x = make(), draw(2)
    layer.switch.selection = Selection(rows, uniform=uniform)
    torch.testing.assert_close(layer(x), reference(layer, x, rows))


@pytest.mark.parametrize("domain", [[1, 1], [2, 0]])
def test_gradients_reach_kernel_and_input(domain):
    layer, x = make(), draw(2).requires_grad_()
    layer.switch.selection = Selection.of(torch.tensor(domain), K)
    y = layer(x)
    direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    (y * direction).sum().backward()
    inputs = (x, layer.kernel_residual, layer.shared.weight)
    wanted = torch.autograd.grad((reference(layer, x, one_hot(domain)) * direction).sum(), inputs)
    for tensor, gradient in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
    others = [k for k in range(K) if k not in domain]
    assert layer.kernel_residual.grad is not None
    assert not layer.kernel_residual.grad[others].any()


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_zero_is_the_shared_convolution_to_the_bit(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = DepthwiseResidual(CONVOLUTIONS[kind](), domains=K, switch=DomainSwitch())
    assert torch.equal(layer.kernel_residual, torch.zeros(K, C, 1, 3, 3, 3))
    x = draw(2).float()
    for domain in ([0, 0], [0, 2]):
        layer.switch.selection = Selection.of(torch.tensor(domain), K)
        assert torch.equal(layer(x), layer.shared(x))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_unselected_is_the_shared_convolution_and_keeps_no_gradient(kind):
    layer, x = make(kind), draw(2)
    y = layer(x)
    assert torch.equal(y, layer.shared(x))
    y.sum().backward()
    assert layer.kernel_residual.grad is None


ALL = ("phi", "stem", "depthwise", "head")


def built(name: str, residuals: tuple[str, ...], units: int = 1) -> HarmonizedNetwork:
    study = tiny_study(
        network={
            "name": name,
            "features": [4, 8, 16],
            "residual_units": units,
            "harmonization": {"residuals": residuals},
        }
    )
    model = build_network(study, ("a", "b"), seed=0)
    assert isinstance(model, HarmonizedNetwork)
    return model


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet"])
def test_no_local_tensor_is_dead_beside_a_depthwise_residual(name):
    model = built(name, ALL)
    found = local_sensitivities(model, draw(2)[:, :1, :4, :4, :4].repeat(1, 1, 3, 2, 1) + 1)
    assert {each.name for each in found} == stacked_keys(model)
    assert [each for each in found if each.name.endswith("kernel_residual")]
    assert not [each for each in found if each.degenerate]


@pytest.mark.parametrize("name", ["unet", "dynunet", "segresnet"])
def test_they_stand_before_spatial_convolutions_below_the_stem(name):
    model = built(name, ALL)
    stem = {k for k in stacked_keys(built(name, ("stem",))) if k.endswith("weight_residual")}
    wrapped = [m for m in model.modules() if isinstance(m, DepthwiseResidual)]
    assert wrapped
    assert all(max(m.shared.kernel_size) > 1 for m in wrapped)
    depthwise = {k for k in stacked_keys(model) if k.endswith("kernel_residual")}
    assert len(depthwise) == len(wrapped)
    paths = {key.rpartition(".")[0] for key in depthwise}
    assert not paths & {key.rpartition(".")[0] for key in stem}
    assert not stacked_keys(built(name, ("phi",))) & depthwise
