"""Views of unknown scanners: other intensities, the same anatomy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_study
from uharmony_model.errors import ConfigError
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.strong import strong_change
from uharmony_model.unseen_view import INVERT_CHANCE, unseen_view, viewed

N = 400


def generators(count: int) -> list[np.random.Generator]:
    return [numpy_generator(0, "view", sample) for sample in range(count)]


def ramps(count: int) -> torch.Tensor:
    """Samples (count, 1, 4, 4, 4) that rise along W, from -1 to 1."""
    return torch.linspace(-1, 1, 4).expand(count, 1, 4, 4, 4).clone()


def rises(image: torch.Tensor) -> torch.Tensor:
    """Whether each sample is brighter at the end of W than at its start, (B,)."""
    return image[..., 2:].mean((1, 2, 3, 4)) > image[..., :2].mean((1, 2, 3, 4))


def test_without_inversion_it_is_the_strong_change():
    image = ramps(3)
    assert torch.equal(unseen_view(image, generators(3)), strong_change(image, generators(3)))
    assert torch.equal(image, ramps(3))  # the image itself stays


def test_no_contrast_turns_over_unless_asked():
    assert rises(unseen_view(ramps(N), generators(N))).all()


def test_a_third_turns_over():
    """Binomial: 400 draws at 1/3 lie within five deviations of 9.4 about 133."""
    turned = (~rises(unseen_view(ramps(N), generators(N), invert=True))).sum().item()
    assert abs(turned - N * INVERT_CHANCE) < 5 * (N * INVERT_CHANCE * (1 - INVERT_CHANCE)) ** 0.5


def test_channels_turn_over_by_themselves():
    found = unseen_view(ramps(N).expand(N, 2, 4, 4, 4), generators(N), invert=True)
    first, second = (rises(found[:, c : c + 1]) for c in (0, 1))
    assert (first != second).any()
    assert (first == second).any()


def test_plain_is_the_image_itself():
    image = ramps(2)
    assert viewed(image, tiny_study().task, "plain", generators(2)) is image


@pytest.mark.parametrize(("view", "invert"), [("strong", False), ("inverted", True)])
def test_all_of_a_batch_is_changed_as_by_itself(view, invert):
    found = viewed(ramps(5), tiny_study().task, view, generators(5))
    assert torch.equal(found, unseen_view(ramps(5), generators(5), invert=invert))


def test_a_share_is_changed_and_the_rest_is_as_it_was():
    """Binomial: 400 draws at 1/4 lie within five deviations of 8.7 about 100."""
    found = viewed(ramps(N), tiny_study().task, "strong", generators(N), share=0.25)
    changed = (found != ramps(N)).flatten(1).any(1).sum().item()
    # A strong change has no effect at all in one of 40: 0.5 * 0.2 * 0.5 * 0.5 is 0.025.
    expected = N * 0.25 * (1 - 0.5 * 0.2 * 0.5 * 0.5)
    assert abs(changed - expected) < 5 * (N * 0.25 * 0.75) ** 0.5


def test_masks_of_presence_are_not_changed():
    task = tiny_study(
        task={
            "intensity": {"CT": {"policy": "zscore"}, "MR": {"policy": "zscore"}},
            "presence": True,
            "channels": 2,
        }
    ).task
    image = torch.cat((ramps(N).expand(N, 2, 4, 4, 4), torch.ones(N, 2, 4, 4, 4)), 1)
    found = viewed(image, task, "inverted", generators(N))
    assert torch.equal(found[:, 2:], image[:, 2:])
    assert not torch.equal(found[:, :2], image[:, :2])


@pytest.mark.parametrize("count", [1, 3])
def test_each_sample_has_its_generator(count):
    with pytest.raises(ConfigError, match=f"{count} generators for an image"):
        unseen_view(ramps(2), generators(count), invert=True)
