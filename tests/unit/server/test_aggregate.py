from __future__ import annotations

import pytest
import torch

from uharmony_model.errors import ExchangeError, QuorumError
from uharmony_server.aggregate import WeightedSum

BASE = torch.tensor([10.0, 20.0, 30.0])
ONE, TWO = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([4.0, 1.0, 8.0])


def aggregate(base, deltas, weights):
    running = WeightedSum(base.numel())
    running.add(deltas, weights)
    return running.apply(base)


def test_the_formula():
    expected = [10 + (1 * 1 + 3 * 4) / 4, 20 + (-2 * 1 + 3 * 1) / 4, 30 + (0 * 1 + 3 * 8) / 4]
    assert aggregate(BASE, [ONE, TWO], [1, 3]).tolist() == expected
    running = WeightedSum(3)
    running.add([ONE], [1])
    running.add([], [])
    running.add([TWO], [3])
    assert running.apply(BASE).tolist() == expected


def test_inputs_are_not_changed_and_the_sum_is_used_up():
    copies = [tensor.clone() for tensor in (BASE, ONE, TWO)]
    running = WeightedSum(3)
    running.add([ONE, TWO], [1, 1])
    weights = running.apply(BASE)
    kept = weights.clone()
    with pytest.raises(QuorumError):
        running.apply(BASE)
    with pytest.raises(ExchangeError):
        running.add([ONE], [1])
    assert torch.equal(weights, kept)
    for tensor, copy in zip((BASE, ONE, TWO), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_a_site_without_weight_changes_nothing():
    assert torch.equal(aggregate(BASE, [ONE, TWO], [2, 0]), BASE + ONE)


@pytest.mark.parametrize(("deltas", "weights"), [([], []), ([ONE], [0]), ([ONE, TWO], [0, 0])])
def test_nothing_to_aggregate_is_a_missed_quorum(deltas, weights):
    with pytest.raises(QuorumError):
        aggregate(BASE, deltas, weights)


@pytest.mark.parametrize(
    ("deltas", "weights", "message"),
    [
        ([torch.zeros(1)], [1], r"got \(1,\)"),
        ([torch.zeros(3, 1)], [1], r"got \(3, 1\)"),
        ([torch.zeros(3).double()], [1], "float64"),
        ([ONE, TWO], [1], "2 updates, 1 weights"),
        ([ONE], [-9], "weight is -9"),
        ([ONE, TWO], [1, float("nan")], "weight is nan"),
        ([ONE], [float("inf")], "weight is inf"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_added(deltas, weights, message):
    running = WeightedSum(3)
    running.add([ONE], [1])
    with pytest.raises(ExchangeError, match=message):
        running.add(deltas, weights)
    assert torch.equal(running.apply(BASE), BASE + ONE)


def test_a_base_of_another_length_is_refused():
    running = WeightedSum(3)
    running.add([ONE], [1])
    with pytest.raises(ExchangeError, match=r"got \(1,\)"):
        running.apply(torch.zeros(1))


def test_an_empty_schema_is_aggregated():
    assert aggregate(torch.empty(0), [torch.empty(0)], [1]).shape == (0,)


def test_many_blocks_and_a_remainder_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(3)
    base, *deltas = (torch.randn(600_003, generator=generator) for _ in range(4))
    weights = [5.0, 11.0, 2.0]
    expected = base.double() + sum(
        w * d.double() for w, d in zip(weights, deltas, strict=True)
    ) / sum(weights)
    one = aggregate(base, deltas, weights)
    torch.testing.assert_close(one.double(), expected, rtol=1e-6, atol=1e-6)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = aggregate(base, deltas, weights)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)


def test_a_joined_sum_counts_with_a_factor():
    one, two = WeightedSum(3), WeightedSum(3)
    one.add([ONE], [2])
    two.add([TWO, ONE], [3, 1])
    one.join(two, 0.5)
    assert one.total == 2 + 0.5 * 4
    expected = (2 * ONE + 0.5 * (3 * TWO + ONE)) / 4
    assert torch.allclose(one.apply(BASE), BASE + expected)


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_a_sum_is_not_joined_with_a_factor_that_is_none(factor):
    one, two = WeightedSum(3), WeightedSum(3)
    two.add([TWO], [1])
    with pytest.raises(ExchangeError, match="weight is"):
        one.join(two, factor)
