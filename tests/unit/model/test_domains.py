from __future__ import annotations

import copy

import pytest
import torch

from uharmony_model.domains import UNSEEN, DomainSwitch, Selection
from uharmony_model.errors import NetworkError


@pytest.mark.parametrize(
    ("domain", "weights", "uniform"),
    [
        ([0, 0], [[1, 0, 0], [1, 0, 0]], True),
        ([2, 0], [[0, 0, 1], [1, 0, 0]], False),
        ([UNSEEN, 1], [[0, 0, 0], [0, 1, 0]], False),
        ([1], [[0, 1, 0]], True),
    ],
)
def test_rows_are_one_hot_or_zero(domain, weights, uniform):
    selection = Selection.of(torch.tensor(domain), 3)
    assert selection is not None
    assert selection.weights.tolist() == weights
    assert selection.uniform is uniform


def test_all_unseen_selects_nothing():
    assert Selection.of(torch.tensor([UNSEEN, UNSEEN]), 3) is None
    assert Selection.of(torch.tensor([UNSEEN]), 0) is None


@pytest.mark.parametrize("index", [-2, 3, 2**40])
def test_an_index_that_is_no_domain(index):
    with pytest.raises(NetworkError, match=f"domain index {index} with 3 domains; expected 0 to 2"):
        Selection.of(torch.tensor([0, index]), 3)


@pytest.mark.parametrize("domain", [torch.tensor(1), torch.tensor([[1]]), torch.tensor([1.0])])
def test_not_one_integer_a_sample(domain):
    with pytest.raises(NetworkError, match="one integer index for every sample"):
        Selection.of(domain, 3)


def test_a_copy_gets_one_new_empty_switch():
    switch = DomainSwitch()
    switch.selection = Selection.of(torch.tensor([0]), 1)
    first, second = copy.deepcopy([switch, switch])
    assert first is second
    assert first is not switch
    assert first.selection is None
