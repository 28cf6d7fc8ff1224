"""Undrawn classes from the shared model: its word on the rest, the site's on all else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from uharmony_model.inference import fits_whole
from uharmony_model.task import Task
from uharmony_model.undrawn import UndrawnFromShared

INTENSITY = {"t1": {"policy": "zscore"}}
CLASSES = {"liver": 4, "spleen": 2, "kidney": 7}
EXCLUSIVE = Task.model_validate({"classes": CLASSES, "intensity": INTENSITY})
OVERLAPPING = Task.model_validate({"classes": CLASSES, "intensity": INTENSITY, "overlapping": True})
X = torch.zeros(1, 1, 1, 1, 1)


class Says(nn.Module):
    """Always the same logits; remembers the domains it was asked for."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=torch.float64)
        self.domains: list[Tensor | None] = []

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        self.domains.append(domain)
        return self.logits[None, :, None, None, None]


def together(own, shared, undrawn, task=EXCLUSIVE) -> Tensor:
    found: Tensor = UndrawnFromShared(Says(own), Says(shared), undrawn, task)(X)
    return found.flatten()


def test_by_hand():
    """Own: background 1/2, liver 1/4, spleen 1/8, kidney 1/8; shared: 1/8, 1/2, 1/8, 1/4.

    The rest is background and kidney. The site gives it 1/2 + 1/8, the shared model divides it 1:2.
    """
    own = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64).log().tolist()
    shared = torch.tensor([1 / 8, 1 / 2, 1 / 8, 1 / 4], dtype=torch.float64).log().tolist()
    found = together(own, shared, ["kidney"]).softmax(0)
    assert found.tolist() == pytest.approx([5 / 24, 1 / 4, 1 / 8, 10 / 24])


_logits = st.lists(st.floats(-30, 30), min_size=4, max_size=4)


@given(_logits, _logits, st.sets(st.sampled_from(sorted(CLASSES)), min_size=1))
def test_drawn_classes_are_the_sites_and_the_rest_is_divided_as_the_shared_model_says(
    own, shared, undrawn
):
    p, q = (torch.tensor(x, dtype=torch.float64).softmax(0) for x in (own, shared))
    logits = together(own, shared, undrawn)
    found = logits.softmax(0)
    rest = [0] + [1 + j for j, name in enumerate(CLASSES) if name in undrawn]
    for channel in range(4):
        if channel in rest:
            wanted = p[rest].sum() * q[channel] / q[rest].sum()
            assert found[channel].item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-15)
        else:
            assert logits[channel] == own[channel]  # to the bit
            assert found[channel].item() == pytest.approx(p[channel].item(), rel=1e-9)


def test_overlapping_classes_are_taken_one_by_one():
    found = together([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], ["liver", "kidney"], OVERLAPPING)
    assert found.tolist() == [-1.0, 2.0, -3.0]


def test_only_the_sites_own_network_has_a_domain():
    own, shared = Says([0.0] * 4), Says([0.0] * 4)
    UndrawnFromShared(own, shared, ["liver"], EXCLUSIVE)(X, torch.tensor([2]))
    assert own.domains == [torch.tensor([2])]
    assert shared.domains == [None]


def test_of_its_two_passes_one_counts_against_the_memory():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Conv3d(1, 4, 1)

        def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
            found: Tensor = self.layers(x)
            return found

    own = Whole()
    both = UndrawnFromShared(own, Whole(), ["liver"], EXCLUSIVE)
    # 4 channels of 512 voxels in 4 bytes, twice for what lies between layers.
    for budget, fits in ((2.1 * 4 * 512 * 4, True), (1.9 * 4 * 512 * 4, False)):
        for network in (own, both):
            found = fits_whole(
                network, 1, patch=(4, 4, 4), whole=(8, 8, 8), memory_gib=budget / (1 << 30)
            )
            assert found is fits
