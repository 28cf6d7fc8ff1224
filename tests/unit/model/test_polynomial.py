"""The compiled kernels, their fall-back, and Hermite polynomials by their defining property."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from uharmony_model import polynomial
from uharmony_model.instance_affine import standardise

# Torch's own compiler uses what torch itself calls deprecated; here warnings are errors.
TORCH_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def inputs(shape: tuple[int, ...], order: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(order)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    c = torch.randn(order + 1, *shape[:2], generator=generator, dtype=torch.float64)
    return x.requires_grad_(), c.requires_grad_()


def run(x: Tensor, c: Tensor, *, compiled: bool) -> tuple[Tensor, ...]:
    """The result and its gradients."""
    y = polynomial.polynomial(x, *standardise(x, 1e-5), c, compiled=compiled)
    direction = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), *torch.autograd.grad((y * direction).sum(), (x, c))


def said(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == polynomial.logger.name]


@pytest.fixture
def _fresh(monkeypatch):
    """Whether kernels can be compiled is remembered for the process; not by these tests."""
    monkeypatch.setattr(polynomial._Compiled, "unavailable", False)
    polynomial._kernels.cache_clear()
    yield
    polynomial._kernels.cache_clear()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_hermite_polynomials_are_orthogonal_with_norm_p_factorial(order):
    """E[He_p(z) He_q(z)] = p! (p = q) for normal z, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    values = []
    for p in range(order + 1):
        hermite = torch.zeros(order + 1, 1, dtype=torch.float64)
        hermite[p] = 1
        c = polynomial.monomials(hermite)[:, 0].numpy()
        values.append(np.polynomial.polynomial.polyval(nodes, c))
    gram = np.array([[(weights * a * b).sum() for a in values] for b in values])
    gram /= math.sqrt(2 * math.pi)
    expected = np.diag([math.factorial(p) for p in range(order + 1)])
    np.testing.assert_allclose(gram, expected, atol=1e-10)


@pytest.mark.parametrize("order", [2, 3])
def test_value_by_numpy(order):
    x, c = inputs((2, 3, 4, 3, 5), order)
    y, _, _ = run(x, c, compiled=False)
    for b in range(2):
        for k in range(3):
            v = x[b, k].detach().numpy()
            z = (v - v.mean()) / np.sqrt(v.var() + 1e-5)
            expected = np.polynomial.polynomial.polyval(z, c[:, b, k].detach().numpy())
            np.testing.assert_allclose(y[b, k].numpy(), expected, rtol=1e-10, atol=1e-10)


@TORCH_WARNS
@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("order", [2, 3])
def test_compiled_equals_plain_for_every_size_without_compiling_anew(order, caplog):
    seen = []
    # 96 rows and 700 voxels first: sizes of 1 and 2 would be compiled for themselves.
    for shape in [(4, 24, 7, 10, 10), (2, 8, 3, 5, 7), (1, 5, 4, 4, 4), (3, 6, 9)]:
        x, c = inputs(shape, order)
        for fast, slow in zip(run(x, c, compiled=True), run(x, c, compiled=False), strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not polynomial._Compiled.unavailable
    assert not said(caplog)
    assert seen[0] == seen[-1] > 0


@pytest.mark.usefixtures("_fresh")
def test_falls_back_and_says_so_once(monkeypatch, caplog):
    def broken(kernel, **_):
        def fail(*_):
            raise RuntimeError("no working C++ compiler\nfound")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING):
        for order in (2, 3):
            x, c = inputs((2, 3, 4, 3, 5), order)
            pairs = zip(run(x, c, compiled=True), run(x, c, compiled=False), strict=True)
            for compiled, plain in pairs:
                torch.testing.assert_close(compiled, plain, rtol=0, atol=0)
    assert said(caplog) == [
        "polynomial kernels are not compiled, only slower: no working C++ compiler found"
    ]


@TORCH_WARNS
@pytest.mark.slow
@pytest.mark.usefixtures("_fresh")
def test_falls_back_without_a_compiler(caplog):
    torch._dynamo.reset()
    settings = {"cpp.cxx": ("/nonexistent/c++",), "fx_graph_cache": False}
    x, c = inputs((2, 3, 4, 3, 5), 2)
    with torch._inductor.config.patch(settings):
        compiled = run(x, c, compiled=True)
    torch._dynamo.reset()
    assert polynomial._Compiled.unavailable
    assert len(said(caplog)) == 1
    for got, expected in zip(compiled, run(x, c, compiled=False), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("_fresh")
def test_memory_running_out_is_no_reason_to_fall_back(monkeypatch):
    def hungry(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda kernel, **_: hungry)
    with pytest.raises(torch.OutOfMemoryError):
        run(*inputs((2, 3, 4), 2), compiled=True)
    assert not polynomial._Compiled.unavailable
