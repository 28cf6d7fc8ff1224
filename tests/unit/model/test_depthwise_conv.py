"""The depthwise convolution against torch's own, whose gradients come by another path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from uharmony_model.depthwise_conv import depthwise_conv


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 4, 5, 6), (3, 2, 2, 7, 3)])
@pytest.mark.parametrize("edge", [1, 3, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_the_same_values_and_gradients(shape: tuple[int, ...], edge: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()

    x, weight = drawn(*shape), drawn(shape[1], 1, edge, edge, edge)
    bias = drawn(shape[1]) if biased else None
    given = (x, weight) if bias is None else (x, weight, bias)
    expected = F.conv3d(x, weight, bias, padding=edge // 2, groups=shape[1])
    y = depthwise_conv(x, weight, bias)
    dy = torch.randn(shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(y, expected)
    for ours, torchs in zip(
        torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, given, dy), strict=True
    ):
        torch.testing.assert_close(ours, torchs)


def test_in_single_precision_the_gradients_are_those_of_double() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 2, 64, 64, 64), generator=generator) + 1
    weight = torch.randn((2, 1, 3, 3, 3), generator=generator)
    dy = torch.randn(x.shape, generator=generator)
    found, exact = (
        torch.autograd.grad(depthwise_conv(*given), given, dy.to(given[0].dtype))
        for given in (
            tuple(t.to(dtype).requires_grad_() for t in (x, weight))
            for dtype in (torch.float32, torch.float64)
        )
    )
    for ours, wanted in zip(found, exact, strict=True):
        assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_batch_of_nothing() -> None:
    x, weight = torch.zeros(0, 2, 4, 4, 4, requires_grad=True), torch.randn(2, 1, 3, 3, 3)
    assert depthwise_conv(x, weight).shape == x.shape


def test_second_derivatives() -> None:
    x = torch.randn(2, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(depthwise_conv, (x, weight))


def test_gradients_nobody_asked_for_are_not_made() -> None:
    x, weight = torch.randn(1, 2, 3, 3, 3), torch.randn(2, 1, 3, 3, 3, requires_grad=True)
    depthwise_conv(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_under_autocast_it_rounds_as_torch_does() -> None:
    x, weight = torch.randn(1, 2, 4, 4, 4), torch.randn(2, 1, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise_conv(x, weight).dtype is F.conv3d(x, weight, groups=2).dtype
