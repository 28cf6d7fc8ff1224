from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from uharmony_server import aggregate
from uharmony_server.aggregate import WeightedSum

WEIGHTS = st.lists(st.integers(1, 1000).map(float), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32)
LENGTHS = st.integers(1, 300)


def drawn(seed: int, sites: int, length: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base, *deltas = torch.randn((sites + 1, length), generator=generator)
    return base, deltas


def mean(base: torch.Tensor, deltas: Sequence[torch.Tensor], weights: Sequence[float]):
    running = WeightedSum(base.numel())
    running.add(deltas, weights)
    return running.apply(base)


@given(WEIGHTS, SEEDS, LENGTHS)
def test_the_formula_in_float64(weights, seed, length):
    base, deltas = drawn(seed, len(weights), length)
    shares = np.array(weights) / np.sum(weights)
    expected = base.double().numpy() + shares @ torch.stack(deltas).double().numpy()
    np.testing.assert_allclose(mean(base, deltas, weights), expected, rtol=1e-5, atol=2e-6)


@given(WEIGHTS, SEEDS, LENGTHS, st.data())
def test_grouping_changes_no_bit(weights, seed, length, data):
    base, deltas = drawn(seed, len(weights), length)
    cuts = data.draw(st.lists(st.integers(0, len(weights)), max_size=4).map(sorted))
    running = WeightedSum(length)
    for start, stop in zip([0, *cuts], [*cuts, len(weights)], strict=True):
        running.add(deltas[start:stop], weights[start:stop])
    assert torch.equal(running.apply(base), mean(base, deltas, weights))


@given(WEIGHTS, SEEDS, st.integers(50, 300), st.integers(1, 49))
def test_the_size_of_a_block_changes_no_bit(weights, seed, length, block):
    base, deltas = drawn(seed, len(weights), length)
    whole = mean(base, deltas, weights)
    size = aggregate._BLOCK
    # Multiples of 16 numbers, as the real ones are: the remainder of a vector is rounded alike.
    aggregate._BLOCK = 16 * block
    try:
        assert torch.equal(mean(base, deltas, weights), whole)
    finally:
        aggregate._BLOCK = size


@given(WEIGHTS, SEEDS, LENGTHS, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_no_bit_once_sorted(weights, seed, length, random):
    base, deltas = drawn(seed, len(weights), length)
    sites = [(f"site-{i}", d, w) for i, (d, w) in enumerate(zip(deltas, weights, strict=True))]
    expected = mean(base, deltas, weights)
    random.shuffle(sites)
    sites.sort(key=lambda site: site[0])
    assert torch.equal(mean(base, [s[1] for s in sites], [s[2] for s in sites]), expected)


@given(WEIGHTS, SEEDS, LENGTHS)
def test_another_order_changes_rounding_only(weights, seed, length):
    base, deltas = drawn(seed, len(weights), length)
    torch.testing.assert_close(
        mean(base, deltas[::-1], weights[::-1]), mean(base, deltas, weights), rtol=1e-5, atol=2e-6
    )


@given(WEIGHTS, SEEDS, LENGTHS)
def test_equal_updates_give_that_update(weights, seed, length):
    base, (delta, *_) = drawn(seed, 1, length)
    got = mean(torch.zeros(length), [delta] * len(weights), weights)
    torch.testing.assert_close(got, delta, rtol=2e-6, atol=0)
    assert torch.equal(mean(base, [delta], [1.0]), base + delta)


@given(WEIGHTS, SEEDS, LENGTHS, st.floats(1e-3, 1e3))
def test_weights_matter_only_in_proportion(weights, seed, length, factor):
    _, deltas = drawn(seed, len(weights), length)
    base = torch.zeros(length)
    scaled = [factor * weight for weight in weights]
    # Against the largest number added up: where updates cancel, rounding is relative to them.
    scale = torch.stack(deltas).abs().amax(0)
    difference = (mean(base, deltas, scaled) - mean(base, deltas, weights)).abs()
    assert bool((difference <= 1e-6 * scale).all())


@given(WEIGHTS, SEEDS, LENGTHS)
def test_the_mean_lies_between_the_updates(weights, seed, length):
    _, deltas = drawn(seed, len(weights), length)
    got = mean(torch.zeros(length), deltas, weights)
    stacked = torch.stack(deltas)
    slack = 1e-6 * stacked.abs().amax(0)
    assert bool((got >= stacked.amin(0) - slack).all())
    assert bool((got <= stacked.amax(0) + slack).all())
