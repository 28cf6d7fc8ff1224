"""Codes of patches and of sites, by their formulas; images made in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from uharmony_model.alignment.code_style import (
    codes_around,
    drawn_codes,
    in_codes,
    patch_codes,
    showing_slices,
    shows,
    site_codes,
)
from uharmony_model.alignment.style_autoencoder import (
    AutoencoderSettings,
    StyleAutoencoder,
    build_autoencoder,
)
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.errors import ConfigError
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Task
from uharmony_model.unlabelled.study_style import style_axis

SETTINGS = AutoencoderSettings(features=4, style_dim=3, blocks=1)


@pytest.fixture(scope="module")
def autoencoder() -> StyleAutoencoder:
    return build_autoencoder(SETTINGS, seed=3)


@pytest.fixture(scope="module")
def image() -> Tensor:
    draw = numpy_generator(0, "code style").normal(size=(2, 2, 6, 8, 10))
    found = torch.from_numpy(draw).float()
    found[1, 0] = 0.0  # an absent modality
    return found


def draw() -> np.random.Generator:
    return numpy_generator(0, "codes of a test")


def slices(channel: Tensor, axis: int) -> list[Tensor]:
    """The slices of (D, H, W) across an axis 1, 2 or 3, each (1, 1, h, w)."""
    return [channel.select(axis - 1, i)[None, None] for i in range(channel.shape[axis - 1])]


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_patchs_code_is_the_mean_over_its_middle_slices(autoencoder, image, axis):
    found = patch_codes(autoencoder, image, axis)
    assert found.shape == (2, 2, 3)
    assert not found.requires_grad
    for b in range(2):
        for c in range(2):
            own = slices(image[b, c], axis)
            kept = round(4 / 6 * len(own))
            first = (len(own) - kept) // 2
            codes = [autoencoder.encode_style(s)[0] for s in own[first : first + kept]]
            torch.testing.assert_close(found[b, c], torch.stack(codes).mean(0).detach())


def test_a_patch_in_codes_is_translated_slice_by_slice_and_an_empty_channel_stays(
    autoencoder, image
):
    codes = torch.arange(12.0).view(2, 2, 3) / 10
    found = in_codes(autoencoder, image, codes, 2)
    assert found.shape == image.shape
    assert not found.requires_grad
    for b, c in ((0, 0), (0, 1), (1, 1)):
        wanted = [autoencoder.translate(s, codes[b, c])[0, 0] for s in slices(image[b, c], 2)]
        torch.testing.assert_close(
            found[b, c], torch.stack(wanted, 1).detach(), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(found[1, 0], image[1, 0])
    assert shows(image).flatten().tolist() == [True, True, False, True]
    with pytest.raises(ConfigError, match="one for each channel"):
        in_codes(autoencoder, image, codes[:, :1], 2)


def test_slices_that_show_something_are_those_of_channels_that_do(image):
    blank = image.clone()
    blank[0, 0, 4] = 1.5  # one slice across the first axis
    found = showing_slices(blank, 1)
    assert found.shape == (6 - 1 + 6 + 6, 1, 8, 10)
    assert torch.equal(found[4, 0], blank[0, 0, 5])


def test_a_sites_codes_are_mean_and_deviation_with_each_patient_once():
    """Patient a has two slices, which weigh half: mean (1 + 3)/4 + 6/2 = 4 in channel 0."""
    codes = [[[1.0], [0.0]], [[3.0], [0.0]], [[6.0], [8.0]]]
    found = site_codes(codes, ["a", "a", "b"], draw(), min_patients=2)
    np.testing.assert_allclose(found.centroids, [[4.0], [4.0]])
    variance = (9 + 1) / 4 + 4 / 2
    np.testing.assert_allclose(found.spread, [[variance**0.5], [4.0]])
    with pytest.raises(ConfigError, match="2 patients has 3"):
        site_codes(codes, ["a", "a", "b"], draw(), min_patients=3)
    with pytest.raises(ConfigError, match=r"\(n, C, S\)"):
        site_codes([[1.0], [2.0]], ["a", "b"], draw(), min_patients=1)


def test_drawn_codes_lie_about_their_channel_at_most_two_deviations_away():
    style = StyleCodes(np.array([[10.0, -10.0], [0.0, 5.0]]), np.array([[1.0, 0.0], [2.0, 0.5]]))
    generator = draw()
    found = torch.stack([drawn_codes(style, generator) for _ in range(400)]).double()
    assert found.shape == (400, 2, 2)
    centre, spread = torch.from_numpy(style.centroids), torch.from_numpy(style.spread)
    assert bool(((found - centre).abs() <= 2 * spread + 1e-5).all())
    # The standard deviation of a normal one that is cut by moving what lies beyond 2 to 2: 0.96.
    torch.testing.assert_close(found.std(0), 0.96 * spread, rtol=0.1, atol=1e-5)
    assert bool((found[:, 0, 1] == -10).all())


def test_around_all_sites_is_wide_channel_by_channel():
    one = StyleCodes(np.array([[0.0], [1.0]]), np.array([[1.0], [0.0]]))
    other = StyleCodes(np.array([[4.0], [1.0]]), np.array([[3.0], [0.0]]))
    found = codes_around([one, other])
    np.testing.assert_allclose(found.centroids, [[2.0], [1.0]])
    np.testing.assert_allclose(found.spread, [[(((1 + 4) + (9 + 4)) / 2) ** 0.5], [0.0]])
    with pytest.raises(ConfigError, match="no site gave"):
        codes_around([])


@pytest.mark.parametrize(
    ("spacing", "axis"), [(None, 3), ((1, 1, 1), 3), ((1, 1, 5), 3), ((6, 1, 5), 1), ((1, 2, 1), 2)]
)
def test_slices_lie_across_the_largest_spacing(spacing, axis):
    content = {"classes": {"a": 1}, "intensity": {"MR": {"policy": "zscore"}}}
    assert style_axis(Task.model_validate({**content, "spacing_mm": spacing})) == axis
