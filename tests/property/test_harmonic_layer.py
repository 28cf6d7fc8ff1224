"""Laws of the harmonisation layer for any size, order, reading and mixture of domains."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.harmonic_layer import HarmonicNorm

K = 3
readings = st.sampled_from(["free", "affine", "revin", "off"])
orders = st.integers(1, 3)
seeds = st.integers(0, 2**31)


@st.composite
def batches(draw) -> tuple[int, list[int], tuple[int, ...]]:
    """Channels, a domain or -1 for each sample, and the edges of the volume."""
    size = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    # Three voxels at least: two are +1 and -1 whatever they hold.
    assume(torch.Size(size).numel() > 2)
    domain = draw(st.lists(st.integers(-1, K - 1), min_size=1, max_size=4))
    return draw(st.integers(1, 4)), domain, size


def make(channels: int, order: int, stage2, seed: int) -> tuple[HarmonicNorm, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    layer = HarmonicNorm(
        channels, domains=K, switch=DomainSwitch(), order=order, stage2=stage2, eps=1e-12
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer, generator


def run(layer: HarmonicNorm, x: Tensor, domain: list[int]) -> Tensor:
    layer.switch.selection = Selection.of(torch.tensor(domain), K)
    y: Tensor = layer(x)
    return y


@given(batches(), orders, readings, seeds)
def test_every_sample_is_treated_alone(batch, order, stage2, seed):
    channels, domain, size = batch
    layer, generator = make(channels, order, stage2, seed)
    x = torch.randn(len(domain), channels, *size, generator=generator, dtype=torch.float64)
    together = run(layer, x, domain)
    for b, k in enumerate(domain):
        alone = run(layer, x[b : b + 1], [k])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-8, atol=1e-8)


@given(batches(), orders, readings, seeds)
def test_voxels_may_change_places(batch, order, stage2, seed):
    channels, domain, size = batch
    layer, generator = make(channels, order, stage2, seed)
    x = torch.randn(len(domain), channels, *size, generator=generator, dtype=torch.float64)
    axes = list(range(2, x.ndim))
    torch.testing.assert_close(
        run(layer, x.flip(axes), domain), run(layer, x, domain).flip(axes), rtol=1e-8, atol=1e-8
    )


@given(
    batches(),
    orders,
    st.sampled_from(["affine", "off"]),
    seeds,
    st.floats(0.1, 10),
    st.floats(-10, 10),
)
def test_without_statistics_in_stage_2_a_scanner_s_gain_and_offset_vanish(
    batch, order, stage2, seed, gain, offset
):
    channels, domain, size = batch
    layer, generator = make(channels, order, stage2, seed)
    x = torch.randn(len(domain), channels, *size, generator=generator, dtype=torch.float64)
    expected = run(layer, x, domain)
    torch.testing.assert_close(
        run(layer, gain * x + offset, domain), expected, rtol=1e-4, atol=1e-4
    )


@given(batches(), orders, seeds, st.floats(0.1, 10), st.floats(-10, 10))
def test_revin_passes_a_scanner_s_gain_and_offset_on(batch, order, seed, gain, offset):
    """sigma and mu come back whole: y(u x + v) = u y(x) + v, where b = 0 and g = 0."""
    channels, _, size = batch
    layer, generator = make(channels, order, "revin", seed)
    x = torch.randn(1, channels, *size, generator=generator, dtype=torch.float64)
    expected = gain * run(layer, x, [-1]) + offset
    torch.testing.assert_close(run(layer, gain * x + offset, [-1]), expected, rtol=1e-4, atol=1e-4)


@given(batches(), orders, seeds)
def test_free_contains_the_other_readings(batch, order, seed):
    """rho = lambda = 0 is affine, rho = lambda = 1 is revin."""
    channels, domain, size = batch
    domain = [max(k, 0) for k in domain]  # an unseen sample restores nothing with free
    free, generator = make(channels, order, "free", seed)
    x = torch.randn(len(domain), channels, *size, generator=generator, dtype=torch.float64)
    for value, stage2 in ((0.0, "affine"), (1.0, "revin")):
        other, _ = make(channels, order, stage2, seed)
        with torch.no_grad():
            free.rho.fill_(value)
            free.lam.fill_(value)
            for name, parameter in other.named_parameters():
                parameter.copy_(free.get_parameter(name))
        torch.testing.assert_close(
            run(free, x, domain), run(other, x, domain), rtol=1e-8, atol=1e-8
        )
