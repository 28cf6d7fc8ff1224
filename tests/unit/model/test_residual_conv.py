"""Residual convolutions against torch's functional ones, sample by sample."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.methods import Part
from uharmony_model.residual_conv import Convolution, ResidualConv

K = 3
CONVOLUTIONS: dict[str, Callable[[], Convolution]] = {
    "same": lambda: nn.Conv3d(2, 4, 3, padding=1),
    "strided": lambda: nn.Conv3d(2, 4, (3, 1, 2), stride=(2, 1, 2), padding=(1, 0, 0)),
    "no bias": lambda: nn.Conv3d(2, 4, 3, bias=False),
    "grouped, dilated": lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=2),
    "reflected": lambda: nn.Conv3d(2, 4, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose3d(2, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed, no bias": lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, bias=False),
}


def make(kind: str, part: Part = Part.HEAD_RESIDUAL) -> ResidualConv:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = ResidualConv(CONVOLUTIONS[kind](), domains=K, part=part, switch=DomainSwitch())
        layer = layer.double()
        with torch.no_grad():
            for name in layer.stacked:
                layer.get_parameter(name).normal_()
    return layer


def draw(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, 5, 6, 4, generator=generator, dtype=torch.float64)


def reference(layer: ResidualConv, x: Tensor, k: int) -> Tensor:
    """One sample: the convolution that has W + D_k and b + d_k as its own parameters."""
    alone = copy.deepcopy(layer.shared)
    if k >= 0:
        with torch.no_grad():
            alone.weight += layer.weight_residual[k]
            if layer.bias_residual is not None:
                assert alone.bias is not None
                alone.bias += layer.bias_residual[k]
    y: Tensor = alone(x)
    return y


@pytest.mark.parametrize("domain", [[1, 1], [2, 0], [-1, 1]])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_sample_has_its_own_kernel(kind, domain):
    layer, x = make(kind), draw(2)
    layer.switch.selection = Selection.of(torch.tensor(domain), K)
    y = layer(x)
    for b, k in enumerate(domain):
        torch.testing.assert_close(y[b : b + 1], reference(layer, x[b : b + 1], k))


@pytest.mark.parametrize("domain", [[1, 1], [2, 0]])
def test_gradients_reach_kernel_residual_and_input(domain):
    layer, x = make("same"), draw(2).requires_grad_()
    layer.switch.selection = Selection.of(torch.tensor(domain), K)
    direction = torch.linspace(-1, 1, 2 * 4 * 120, dtype=torch.float64).view(2, 4, 5, 6, 4)
    (layer(x) * direction).sum().backward()

    shared, bias = layer.shared.weight, layer.shared.bias
    residual, shift = layer.weight_residual, layer.bias_residual
    assert bias is not None
    assert shift is not None
    y = torch.cat(
        [
            F.conv3d(x[b : b + 1], shared + residual[k], bias + shift[k], padding=1)
            for b, k in enumerate(domain)
        ]
    )
    inputs = (x, shared, bias, residual, shift)
    expected = torch.autograd.grad((y * direction).sum(), inputs)
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_unselected_is_the_shared_convolution_and_keeps_no_gradient(kind):
    layer, x = make(kind), draw(2)
    y = layer(x)
    torch.testing.assert_close(y, layer.shared(x), rtol=0, atol=0)
    y.sum().backward()
    assert layer.shared.weight.grad is not None
    assert all(layer.get_parameter(name).grad is None for name in layer.stacked)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_starts_at_zero_with_one_kernel_a_domain(kind):
    shared = CONVOLUTIONS[kind]()
    layer = ResidualConv(shared, domains=K, part=Part.HEAD_RESIDUAL, switch=DomainSwitch())
    assert torch.equal(layer.weight_residual, torch.zeros(K, *shared.weight.shape))
    if shared.bias is None:
        assert layer.stacked == ("weight_residual",)
    else:
        assert layer.stacked == ("weight_residual", "bias_residual")
        assert torch.equal(layer.get_parameter("bias_residual"), torch.zeros(K, 4))


def test_the_stem_has_no_bias_of_its_own():
    layer = make("same", Part.STEM_RESIDUAL)
    assert set(layer.state_dict()) == {"shared.weight", "shared.bias", "weight_residual"}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_answers_like_the_convolution(kind):
    layer = make(kind)
    for name in (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding"),
        *("dilation", "groups", "padding_mode", "transposed", "weight", "bias"),
    ):
        assert getattr(layer, name) is getattr(layer.shared, name), name


def test_under_autocast_the_kernel_is_added_up_in_float32():
    """1 + (2^-12 - 1) = 2^-12; rounded to bfloat16 before the sum, the residual is -1."""
    layer = make("same").float()
    with torch.no_grad():
        layer.shared.weight.fill_(1.0)
        layer.weight_residual.fill_(2.0**-12 - 1)
        layer.get_parameter("bias_residual").copy_(-layer.get_parameter("shared.bias"))
    layer.switch.selection = Selection.of(torch.tensor([0, 1]), K)
    x = draw(2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    kernel = torch.full_like(layer.shared.weight, 2.0**-12)
    expected = F.conv3d(x, kernel, padding=1)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.02 * 2.0**-12)
