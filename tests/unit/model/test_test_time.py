"""The search for a mixture on networks whose experts are made by hand.

Logits are (-h, h) of the normalised intensity h: what is brighter than the mean is foreground.
Expert `sharp` makes them steeper, `nothing` calls everything background with great certainty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from uharmony_model.errors import ConfigError
from uharmony_model.harmonize import HarmonizedNetwork, harmonize
from uharmony_model.network_settings import Harmonization
from uharmony_model.test_time import (
    MixtureSearch,
    entropy_of,
    foreground_voxels,
    search_mixture,
)

LAYER = Harmonization(residuals=("phi", "head"))
FAST = MixtureSearch(steps=30, rate=0.3)


def network(*experts: str) -> HarmonizedNetwork:
    first, head = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        for parameter in (*first.parameters(), *head.parameters()):
            parameter.zero_()
        first.weight.fill_(1.0)
        head.weight[:, 0, 0, 0, 0] = torch.tensor([-1.0, 1.0])
    layers = nn.Sequential(first, nn.InstanceNorm3d(1), head)
    model = harmonize(layers, domains=experts, settings=LAYER, head=("2",))
    weight = model.get_parameter("network.2.weight_residual")
    bias = model.get_parameter("network.2.bias_residual")
    with torch.no_grad():
        for k, expert in enumerate(experts):
            if expert == "sharp":
                weight[k, :, 0, 0, 0, 0] = torch.tensor([-4.0, 4.0])
            if expert == "nothing":
                bias[k] = torch.tensor([9.0, -9.0])
    return model


def image(*size: int) -> Tensor:
    return torch.randn(1, *(size or (6, 6, 6)), generator=torch.Generator().manual_seed(2))


def run(model: HarmonizedNetwork, start: Sequence[float], settings=FAST, **changes):
    options = {"patch": (6, 6, 6), "overlapping": False, **changes}
    return search_mixture(model, image(), start, settings=settings, **options)


@pytest.mark.parametrize("overlapping", [False, True])
def test_it_moves_to_the_expert_that_is_sure_and_consistent(overlapping):
    outcome = run(network("plain", "sharp"), [0.7, 0.3], overlapping=overlapping)
    assert outcome.verdict == "taken"
    assert outcome.weights is outcome.found
    assert outcome.weights.sum() == pytest.approx(1)
    assert outcome.weights[1] > 0.6
    assert outcome.entropy[1] < outcome.entropy[0]
    assert outcome.voxels[0] == outcome.voxels[1]  # steeper, but the same boundary


def test_a_mixture_that_gives_the_foreground_up_is_refused():
    outcome = run(network("plain", "nothing"), [0.9, 0.1])
    assert outcome.verdict == "foreground lost"
    assert outcome.weights.tolist() == [0.9, 0.1]
    assert outcome.voxels[1][0] < 0.5 * outcome.voxels[0][0]


def test_without_the_guard_it_would_be_taken():
    """The positive control: the collapse is what entropy asks for."""
    outcome = run(
        network("plain", "nothing"),
        [0.9, 0.1],
        MixtureSearch(steps=30, rate=0.3, kept_volume=0.0),
    )
    assert outcome.verdict == "taken"
    assert outcome.weights[1] > 0.5
    assert outcome.entropy[1] < outcome.entropy[0]
    assert outcome.voxels[1] == (0,)


def test_entropy_has_to_fall():
    outcome = run(network("plain", "plain too"), [0.25, 0.75])
    assert outcome.verdict == "entropy did not fall"
    assert outcome.weights.tolist() == [0.25, 0.75]


def test_a_domain_without_weight_can_come_back():
    outcome = run(network("plain", "sharp"), [1.0, 0.0], MixtureSearch(steps=80, rate=0.5))
    assert outcome.verdict == "taken"
    assert outcome.weights[1] > 0.5


def test_the_network_is_as_before_and_the_same_seed_gives_the_same_weights():
    model = network("plain", "sharp").train()
    model.get_parameter("network.0.bias").requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = run(model, [0.5, 0.5], seed=3, volume="v")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["network.0.bias"]
    again = run(model, [0.5, 0.5], seed=3, volume="v")
    assert np.array_equal(first.weights, again.weights)
    assert not np.array_equal(run(model, [0.5, 0.5], seed=3, volume="w").weights, first.weights)


def test_windows_cover_the_volume_and_those_with_most_foreground_are_kept():
    """Each window is normalised alone, so its foreground is what is above its own mean."""
    volume = image(8, 4, 4)
    halves = [int((half > half.mean()).sum()) for half in volume.split(4, dim=1)]
    assert halves[0] != halves[1]
    for windows, expected in ((2, sum(halves)), (1, max(halves))):
        settings = MixtureSearch(steps=1, windows=windows)
        model = network("plain", "sharp")
        outcome = search_mixture(
            model, volume, [0.5, 0.5], patch=(4, 4, 4), overlapping=False, settings=settings
        )
        assert outcome.voxels[0] == (expected,)


def test_a_volume_smaller_than_the_patch_is_continued_by_its_least_value():
    volume = image(3, 4, 5)
    padded = torch.full((6, 6, 6), float(volume.min()))
    padded[:3, :4, :5] = volume[0]
    outcome = search_mixture(
        network("plain", "sharp"), volume.numpy(), [0.5, 0.5], patch=(6, 6, 6), overlapping=False
    )
    assert outcome.voxels[0] == (int((padded > padded.mean()).sum()),)


def test_entropy_and_voxels_by_hand():
    p = torch.tensor([[[0.5, 1.0], [0.25, 0.0], [0.25, 0.0]]])[..., None, None]  # J = 3, two voxels
    assert float(entropy_of(p, overlapping=False)) == pytest.approx(
        1.5 * math.log(2) / math.log(3) / 2, abs=1e-5
    )
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert float(entropy_of(p, overlapping=True)) == pytest.approx((1 + 2 * quarter) / 6, abs=1e-5)
    three = torch.tensor([[0.2, 0.6, 0.1], [0.5, 0.3, 0.1], [0.3, 0.1, 0.8]])[..., None, None]
    assert foreground_voxels(three, overlapping=False) == (1, 1)
    assert foreground_voxels(three, overlapping=True) == (1, 0, 1)


@pytest.mark.parametrize("start", [[1.0], [0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]])
def test_starts_that_are_no_mixture(start):
    with pytest.raises(ConfigError, match="expected one for each of 2 domains"):
        run(network("plain", "sharp"), start)


def test_settings_that_cannot_be():
    with pytest.raises(ValidationError):
        MixtureSearch(kept_volume=1.1)
