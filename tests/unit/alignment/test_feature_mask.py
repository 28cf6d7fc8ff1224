"""The local feature mask: its formulas, and that a trained discriminator finds where a gap is."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from uharmony_model.alignment.discriminator import FeatureDiscriminator, discriminator_term
from uharmony_model.alignment.feature_mask import Form, adversarial_mask, mask_ramp, masked
from uharmony_model.errors import ConfigError, TrainingError
from uharmony_model.randomness import torch_generator

EDGE, SQUARE = 16, slice(6, 10)


def scores_of(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def test_the_centred_form_spans_zero_to_one():
    mask = adversarial_mask(scores_of([-1.0, 0.0, 0.5, 0.75, 1.0, 3.0]))
    assert mask.shape == (1, 1, 1, 6)
    assert mask.flatten().tolist() == [0, 0, 0, 0.5, 1, 1]


def test_the_tanh_form_has_a_floor_at_undecided_places():
    values = [-1.0, 0.0, 0.5, 1.0]
    mask = adversarial_mask(scores_of(values), "tanh")
    assert mask.flatten().tolist() == pytest.approx([abs(math.tanh(v)) for v in values])
    assert mask.flatten()[2].item() == pytest.approx(0.46, abs=0.005)


@pytest.mark.parametrize("form", ["centred", "tanh"])
def test_no_gradient_passes_through_the_mask(form: Form):
    scores = scores_of([0.6, 0.8]).requires_grad_()
    mask = adversarial_mask(scores, form)
    assert not mask.requires_grad
    features = torch.full((1, 3, 1, 2), 2.0, requires_grad=True)
    masked(features, mask, 0.5).sum().backward()
    assert scores.grad is None
    assert features.grad is not None
    torch.testing.assert_close(features.grad, (1 + 0.5 * mask).expand(1, 3, 1, 2))


def test_masks_that_cannot_be():
    with pytest.raises(TrainingError, match="one a place"):
        adversarial_mask(torch.zeros(1, 2, 3, 3))
    with pytest.raises(TrainingError, match="one a place"):
        adversarial_mask(torch.zeros(1, 1))
    with pytest.raises(ConfigError, match="centred or tanh"):
        adversarial_mask(torch.zeros(1, 1, 2), "hard")  # type: ignore[arg-type]


def test_masked_features():
    features = torch.arange(1.0, 13.0).view(1, 3, 2, 2)
    mask = torch.tensor([[0.0, 0.5], [1.0, 0.25]]).view(1, 1, 2, 2)
    expected = [f * (1 + 2 * m) for f, m in zip(range(1, 13), [0, 0.5, 1, 0.25] * 3, strict=True)]
    assert masked(features, mask, 2).flatten().tolist() == expected
    assert torch.equal(masked(features, mask, 0), features)
    assert masked(features.half(), mask, 1).dtype == torch.float16
    for wrong in (mask[0], mask.expand(2, 1, 2, 2), mask.expand(1, 3, 2, 2), mask[..., :1]):
        with pytest.raises(TrainingError, match="one channel on the same grid"):
            masked(features, wrong, 1)


def test_the_ramp():
    assert [mask_ramp(p) for p in (0.0, 0.05, 0.1, 0.7, 1.0)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert mask_ramp(0.05, share=0.2) == pytest.approx(0.25)
    for progress, share in ((-0.1, 0.1), (1.1, 0.1), (math.nan, 0.1), (0.5, 0.0), (0.5, 1.5)):
        with pytest.raises(ConfigError, match="ramp"):
            mask_ramp(progress, share)


def _features(is_target: bool, generator: torch.Generator) -> Tensor:
    """64 channels of noise; at the target 16 of them are 1 higher within the square."""
    features = torch.randn(4, 64, EDGE, EDGE, generator=generator)
    if is_target:
        features[:, :16, SQUARE, SQUARE] += 1
    return features


@functools.cache
def _trained_scores(target_is_one: bool) -> Tensor:
    """Scores of fresh target features after 120 steps of a discriminator without norm layers."""
    generator = torch_generator(0, "toy gap")
    discriminator = FeatureDiscriminator(64, 2)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for _ in range(120):
        loss = sum(
            discriminator_term(discriminator(_features(side, generator)), side is target_is_one)
            for side in (True, False)
        )
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores: Tensor = discriminator(_features(True, generator))
    return scores


def _inside_and_outside(mask: Tensor) -> tuple[float, float]:
    inside = torch.zeros(EDGE, EDGE, dtype=torch.bool)
    inside[SQUARE, SQUARE] = True
    return mask[:, 0, inside].mean().item(), mask[:, 0, ~inside].mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["centred", "tanh"])
def test_the_mask_lies_where_the_gap_is(form: Form):
    inside, outside = _inside_and_outside(adversarial_mask(_trained_scores(True), form))
    assert inside > 1.5 * outside
    assert inside > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["centred", "tanh"])
def test_turned_round_labels_turn_the_mask_round(form: Form):
    inside, outside = _inside_and_outside(adversarial_mask(_trained_scores(False), form))
    assert outside > 1.5 * inside


@pytest.mark.slow
def test_the_centred_form_tells_more_than_tanh():
    ratios = {}
    for form in ("centred", "tanh"):
        inside, outside = _inside_and_outside(adversarial_mask(_trained_scores(True), form))
        ratios[form] = inside / outside
    assert ratios["centred"] > 1.5 * ratios["tanh"]
