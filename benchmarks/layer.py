"""The harmonisation layer against InstanceNorm3d(affine=True), forward and backward."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import peak_in_a_child
from benchmarks.rows import Row, at_most, interleaved
from uharmony_model.depthwise_conv import depthwise_conv
from uharmony_model.harmonize import harmonize
from uharmony_model.network_settings import Harmonization

SHAPES = {"large": (2, 32, 64, 64, 64), "small": (2, 64, 32, 32, 32)}
DOMAINS = ("a", "b", "c")


def layer(channels: int, **settings: object) -> nn.Module:
    """One harmonisation layer behind the interface a network has."""
    plain = nn.Sequential(nn.InstanceNorm3d(channels, affine=True))
    chosen = Harmonization.model_validate({"residuals": ["phi"], **settings})
    return harmonize(plain, domains=DOMAINS, settings=chosen)


def step(module: nn.Module, x: Tensor, dy: Tensor, domain: Tensor | None) -> Callable[[], None]:
    """One forward and backward pass; gradients reach x and the parameters."""

    def work() -> None:
        x.grad = None
        y = module(x) if domain is None else module(x, domain)
        y.backward(dy)

    return work


def rows() -> list[Row]:
    """Order 1 in its readings, and the compiled higher order where a compiler is at hand."""
    found: list[Row] = []
    for size, shape in SHAPES.items():
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
        domain = torch.arange(shape[0]) % len(DOMAINS)
        plain = nn.InstanceNorm3d(shape[1], affine=True)
        works = {"InstanceNorm3d": step(plain, x, dy, None)}
        for reading in ("free", "affine", "revin", "off"):
            works[reading] = step(layer(shape[1], stage2=reading), x, dy, domain)
        if shutil.which("c++") or shutil.which("g++"):
            works["free, order 3, compiled"] = step(
                layer(shape[1], order=3, compiled=True), x, dy, domain
            )
        times = interleaved(works, repeats=9)
        for name, milliseconds in times.items():
            if name == "InstanceNorm3d":
                continue
            limit = 1.0 if "order 3" in name else 0.9
            label = f"layer {size}: {name} v. InstanceNorm3d"
            ratio = milliseconds / times["InstanceNorm3d"]
            found.append(at_most(label, milliseconds, "ms", ratio, limit))
    return [*found, *_depthwise(), *_memory()]


def _depthwise() -> list[Row]:
    # At the stem of a patch, where a depthwise residual or 3D U2-Net spends its time.
    x, weight = torch.randn(2, 16, 32, 48, 32), torch.randn(16, 1, 3, 3, 3)
    dy = torch.randn_like(x)
    x.requires_grad_()
    weight.requires_grad_()

    def passes(convolved: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(convolved(), (x, weight), dy)

    works = {
        "ours": passes(lambda: depthwise_conv(x, weight)),
        "torch's": passes(lambda: F.conv3d(x, weight, padding=1, groups=16)),
    }
    times = interleaved(works, repeats=9)
    ratio = times["ours"] / times["torch's"]
    return [at_most("depthwise convolution v. torch's own", times["ours"], "ms", ratio, 0.5)]


def one_pass(kind: str) -> None:
    """One forward and backward at the large shape: what the memory row runs in a child."""
    shape = SHAPES["large"]
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    module = layer(shape[1]) if kind == "free" else nn.InstanceNorm3d(shape[1], affine=True)
    domain = torch.zeros(shape[0], dtype=torch.long) if kind == "free" else None
    # What the first pass of any layer loads and starts is not the layer's own memory.
    small = torch.randn(2, shape[1], 16, 16, 16, requires_grad=True)
    for _ in range(2):
        step(module, small, torch.ones_like(small), domain)()
    with peak_in_a_child.measured():
        step(module, x, dy, domain)()


def _memory() -> list[Row]:
    tensor = torch.tensor(SHAPES["large"]).prod().item() * 4 / 2**20
    extra = {
        kind: peak_in_a_child(f"from benchmarks.layer import one_pass; one_pass('{kind}')") / tensor
        for kind in ("free", "InstanceNorm3d")
    }
    ok = extra["free"] <= 2.2
    ratio = round(extra["free"] / extra["InstanceNorm3d"], 3)
    return [
        Row("layer large: extra memory", round(extra["free"], 2), "tensors", ratio, "<= 2.2", ok)
    ]
