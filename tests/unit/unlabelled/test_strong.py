from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from uharmony_model import augment
from uharmony_model.errors import ConfigError
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled import strong
from uharmony_model.unlabelled.strong import strong_change

SIZE = (6, 9, 8)


def _image(batch: int = 1, channels: int = 2, seed: int = 0) -> torch.Tensor:
    """Smooth images that span [-1, 1]."""
    rng = numpy_generator(seed, "image")
    image = np.stack(
        [
            ndimage.gaussian_filter(rng.random(SIZE), 1.0, mode="wrap")
            for _ in range(batch * channels)
        ]
    )
    low, high = (f(image, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    scaled = 2 * (image - low) / (high - low) - 1
    return torch.from_numpy(scaled.astype(np.float32)).view(batch, channels, *SIZE)


def _generators(count: int, *purpose: int) -> list[np.random.Generator]:
    return [numpy_generator(0, "strong", *purpose, number) for number in range(count)]


@pytest.fixture
def only(monkeypatch):
    """Turn every kind of change off but one, whose ranges are set."""

    def choose(kind: str, **ranges: tuple[float, float]) -> None:
        for name in ("BLUR", "CONTRAST", "GAMMA", "NOISE"):
            monkeypatch.setattr(strong, f"{name}_CHANCE", float(name == kind))
        for name, value in ranges.items():
            monkeypatch.setattr(strong, name, value)

    return choose


def test_without_any_change_the_image_is_the_same(only):
    only("none")
    image = _image(2)
    changed = strong_change(image, _generators(2))
    assert torch.equal(changed, image)
    assert changed.data_ptr() != image.data_ptr()


def test_the_input_is_not_modified():
    image = _image(4)
    kept = image.clone()
    changed = strong_change(image, _generators(4))
    assert torch.equal(image, kept)
    assert changed.shape == image.shape
    assert changed.dtype == torch.float32
    assert not torch.equal(changed, image)


def test_blur_is_a_gaussian_of_sigma_voxels_with_the_border_repeated(only):
    sigma = 0.9
    only("BLUR", BLUR_SIGMA=(sigma, sigma))
    image = _image()
    radius = math.ceil(3 * sigma)
    expected = ndimage.gaussian_filter(
        image.numpy(), sigma, mode="nearest", radius=radius, axes=(2, 3, 4)
    )
    changed = strong_change(image, _generators(1))
    assert np.allclose(changed.numpy(), expected, atol=1e-5)


def test_a_blurred_point_spreads_alike_along_all_axes(only):
    only("BLUR", BLUR_SIGMA=(0.8, 0.8))
    image = torch.zeros(1, 1, 9, 9, 9)
    image[0, 0, 4, 4, 4] = 1.0
    blurred = strong_change(image, _generators(1))[0, 0]
    assert float(blurred.sum()) == pytest.approx(1.0, abs=1e-5)
    for step in (1, 2):  # exp(-d^2 / 2 sigma^2) of the middle
        share = math.exp(-(step**2) / (2 * 0.8**2)) * float(blurred[4, 4, 4])
        for place in ((4 + step, 4, 4), (4, 4 - step, 4), (4, 4, 4 + step)):
            assert float(blurred[place]) == pytest.approx(share, rel=1e-4)


def test_a_wide_blur_fits_into_a_thin_patch(only):
    only("BLUR", BLUR_SIGMA=(1.5, 1.5))
    image = _image()[..., :1, :, :]
    assert strong_change(image, _generators(1)).shape == image.shape


def test_contrast_turns_about_the_mean_and_brightness_moves_it(only):
    only("CONTRAST", CONTRAST=(1.5, 1.5), BRIGHTNESS=(-0.2, -0.2))
    image = _image()
    mean = image.double().mean((2, 3, 4), keepdim=True)
    expected = 1.5 * (image - mean) + mean - 0.2
    changed = strong_change(image, _generators(1)).double()
    assert torch.allclose(changed, expected, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gamma_keeps_both_ends(only, gamma):
    only("GAMMA", GAMMA=(gamma, gamma))
    image = _image(1, 1)
    image = 3 * image + 5  # spans [2, 8]
    expected = ((image.double() - 2) / 6) ** gamma * 6 + 2
    changed = strong_change(image, _generators(1)).double()
    assert torch.allclose(changed, expected, atol=1e-4)


def test_noise_has_its_deviation_and_no_mean(only):
    only("NOISE", NOISE_DEVIATION=(0.2, 0.2))
    image = torch.linspace(-1, 1, 4096).view(1, 1, 16, 16, 16)
    noise = strong_change(image, _generators(1)) - image
    assert float(noise.std()) == pytest.approx(0.2, rel=5 / math.sqrt(2 * 4096))
    assert float(noise.mean()) == pytest.approx(0.0, abs=5 * 0.2 / math.sqrt(4096))


def test_noise_comes_after_the_blur(monkeypatch):
    for name, chance in (("BLUR", 1.0), ("CONTRAST", 0.0), ("GAMMA", 0.0), ("NOISE", 1.0)):
        monkeypatch.setattr(strong, f"{name}_CHANCE", chance)
    monkeypatch.setattr(strong, "NOISE_DEVIATION", (0.2, 0.2))
    image = 1e-3 * torch.linspace(-1, 1, 4096).view(1, 1, 16, 16, 16)
    noise = strong_change(image, _generators(1))
    # Blurred noise of sigma 0.5 voxel would have less than 0.6 of its deviation.
    assert float(noise.std()) == pytest.approx(0.2, rel=5 / math.sqrt(2 * 4096))


def test_a_channel_of_one_value_stays_as_it_is():
    image = _image(20)
    image[:, 1] = -1.0
    changed = strong_change(image, _generators(20))
    assert torch.equal(changed[:, 1], image[:, 1])
    assert not torch.equal(changed[:, 0], image[:, 0])


def test_a_sample_depends_on_its_own_generator_alone():
    image, others = _image(3), _image(3, seed=1)
    others[1] = image[1]
    changed = strong_change(image, _generators(3))
    again = strong_change(
        others, [numpy_generator(9), numpy_generator(0, "strong", 1), numpy_generator(8)]
    )
    alone = strong_change(image[1:2], [numpy_generator(0, "strong", 1)])
    assert torch.equal(changed[1], again[1])
    assert torch.equal(changed[1:2], alone)
    assert not torch.equal(changed[0], again[0])


def test_the_global_generators_are_not_used():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    numpy_before = str(np.random.get_state())  # noqa: NPY002 - that it rests is the test
    strong_change(_image(4), _generators(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before  # noqa: NPY002


def test_the_strong_view_is_clearly_stronger_than_the_weak_one():
    image = _image(200, 1)
    weak = image.clone().numpy()
    for number, sample in enumerate(weak):
        augment.change_intensity(sample, numpy_generator(0, "weak", number))
    strongly = strong_change(image, _generators(200))

    def change(view: torch.Tensor) -> np.ndarray:
        """Root mean square change of each sample."""
        return (view - image).square().mean((1, 2, 3, 4)).sqrt().numpy()

    weakly = change(torch.from_numpy(weak))
    assert change(strongly).mean() > 3 * weakly.mean()
    assert (change(strongly) < 0.05).mean() < 0.1 < (weakly < 0.05).mean()


def test_every_range_is_wider_than_that_of_the_weak_view():
    assert strong.CONTRAST[0] < augment.GAIN[0] < augment.GAIN[1] < strong.CONTRAST[1]
    assert strong.BRIGHTNESS[0] < augment.SHIFT[0] < augment.SHIFT[1] < strong.BRIGHTNESS[1]
    assert strong.GAMMA[0] < augment.GAMMA[0] < augment.GAMMA[1] < strong.GAMMA[1]
    assert strong.NOISE_DEVIATION[1] > augment.NOISE_DEVIATION[1]
    assert min(strong.CONTRAST_CHANCE, strong.GAMMA_CHANCE) > augment.INTENSITY_CHANCE
    assert strong.NOISE_CHANCE > augment.NOISE_CHANCE


def test_every_change_stays_finite_and_near_the_range_of_images():
    changed = strong_change(_image(100), _generators(100))
    # 1.5 * 2 below or above the mean, brightness, and five deviations of noise.
    assert float(changed.abs().max()) < 1.0 + 1.5 * 2 + 0.3 + 5 * 0.25
    assert bool(torch.isfinite(changed).all())


def test_one_generator_a_sample_is_needed():
    with pytest.raises(ConfigError, match="3 generators"):
        strong_change(_image(2), _generators(3))
    with pytest.raises(ConfigError, match="expected"):
        strong_change(_image(2)[0], _generators(2))
