from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from uharmony_model.errors import ConfigError
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.amplitude import (
    amplitude_half_width,
    low_amplitude,
    mix_amplitude,
    mixing_ratio,
)

SIZE = (6, 8, 9)
NONE, HALF, FULL = (torch.tensor([value]) for value in (0.0, 0.5, 1.0))


def _noise(batch: int = 1, channels: int = 1, seed: int = 0) -> torch.Tensor:
    drawn = numpy_generator(seed).standard_normal((batch, channels, *SIZE), dtype=np.float32)
    return torch.from_numpy(drawn) + 0.4


def _cosine(frequency: tuple[int, int, int], phase: float = 0.0) -> torch.Tensor:
    """cos(2 pi k.n / N + phase) as an image (1, 1, D, H, W)."""
    places = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
    turns = sum(k * n / size for k, n, size in zip(frequency, places, SIZE, strict=True))
    return torch.from_numpy(np.cos(2 * np.pi * turns + phase)).float()[None, None]


def _bin(image: torch.Tensor, frequency: tuple[int, int, int]) -> complex:
    """One bin of the spectrum of (D, H, W), summed up voxel by voxel."""
    total = 0j
    for index in np.ndindex(*SIZE):
        turns = sum(k * n / size for k, n, size in zip(frequency, index, SIZE, strict=True))
        total += float(image[index]) * np.exp(-2j * np.pi * turns)
    return total / math.prod(SIZE)


def _mirrored(amplitude: torch.Tensor) -> torch.Tensor:
    return amplitude.flip(-1, -2, -3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((256, 256), 2),  # the source's own figures: 5 bins at 256 and 288, 7 at 384
        ((288, 300), 2),
        ((384, 384), 3),
        ((128, 200, 300), 1),
        ((32, 40, 96), 1),  # floor gives 0
        ((700, 900, 700), 7),  # 0.01 * 700 is above 7 in floating point, 0.01 * 2900 below 29
        ((2900, 2900, 2900), 29),
    ],
)
def test_the_half_width_is_a_hundredth_of_the_shortest_side_and_at_least_one(size, expected):
    assert amplitude_half_width(size) == expected


def test_every_bin_is_that_of_the_sum_over_all_voxels():
    image = _noise(2, 2)
    found = low_amplitude(image, 1)
    assert found.shape == (2, 2, 3, 3, 3)
    for index in np.ndindex(3, 3, 3):
        frequency = tuple(i - 1 for i in index)
        expected = abs(_bin(image[1, 0], frequency))
        assert float(found[1, 0][index]) == pytest.approx(expected, abs=1e-6)


def test_a_cosine_has_half_its_height_at_its_two_bins_and_nothing_elsewhere():
    image = 3.0 * _cosine((1, -2, 0), phase=0.7)
    expected = torch.zeros(1, 1, 5, 5, 5)
    expected[0, 0, 2 + 1, 2 - 2, 2] = expected[0, 0, 2 - 1, 2 + 2, 2] = 1.5
    assert torch.allclose(low_amplitude(image, 2), expected, atol=1e-6)


def test_the_middle_bin_is_the_distance_of_the_mean_from_the_floor():
    image = _noise() - 0.9
    mean = float(image.double().mean())
    assert mean < 0
    assert float(low_amplitude(image, 1)[0, 0, 1, 1, 1]) == pytest.approx(-mean, abs=1e-6)
    floored = low_amplitude(image, 1, floor=-1.0)
    assert float(floored[0, 0, 1, 1, 1]) == pytest.approx(mean + 1.0, abs=1e-6)
    floored[0, 0, 1, 1, 1] = low_amplitude(image, 1)[0, 0, 1, 1, 1]
    assert torch.equal(floored, low_amplitude(image, 1))


def test_amplitudes_do_not_depend_on_the_size_of_the_patch():
    image = _noise()
    tiled = image.repeat(1, 1, 2, 1, 1)  # twice the patch: frequency k of the part is 2k of both
    assert torch.allclose(
        low_amplitude(tiled, 2)[..., ::2, 1:4, 1:4], low_amplitude(image, 1), atol=1e-6
    )


def test_parseval_holds_when_the_box_is_the_whole_spectrum():
    image = _noise()[..., :5, :5, :5]
    energy = low_amplitude(image, 2).double().square().sum()
    assert float(energy) == pytest.approx(float(image.double().square().mean()), rel=1e-5)


def test_amplitudes_are_the_same_at_opposite_frequencies():
    amplitude = low_amplitude(_noise(2, 2), 2)
    assert torch.equal(amplitude, _mirrored(amplitude))


def test_ratio_zero_gives_the_image_back_and_nothing_is_changed_in_place():
    image, style = _noise(2, 2), low_amplitude(_noise(2, 2, seed=1), 1)
    kept = image.clone(), style.clone()
    assert torch.equal(mix_amplitude(image, style, torch.zeros(2)), image)
    mix_amplitude(image, style, torch.ones(2))
    assert torch.equal(image, kept[0])
    assert torch.equal(style, kept[1])


@pytest.mark.parametrize("floor", [0.0, -8.0])
def test_amplitudes_are_mixed_as_in_the_equation(floor):
    image, other = _noise(3, 2), 2 * _noise(3, 2, seed=1)
    own, style = low_amplitude(image, 2, floor=floor), low_amplitude(other, 2, floor=floor)
    ratio = torch.tensor([0.25, 0.5, 1.0])
    mixed = mix_amplitude(image, style, ratio, floor=floor)
    r = ratio.view(3, 1, 1, 1, 1)
    found = low_amplitude(mixed, 2, floor=floor)
    assert torch.allclose(found, (1 - r) * own + r * style, atol=1e-5)


def test_a_floor_lets_dark_take_the_mean_of_bright():
    dark, bright = _noise() - 0.9, _noise(seed=1)
    assert dark.mean() < 0 < bright.mean()
    style = low_amplitude(bright, 1, floor=-5.0)
    mixed = mix_amplitude(dark, style, FULL, floor=-5.0)
    assert float(mixed.mean()) == pytest.approx(float(bright.mean()), abs=1e-5)


def test_the_spectrum_is_that_of_the_equation_with_numpy():
    image, style = _noise(), low_amplitude(_noise(seed=1), 1)
    spectrum = np.fft.fftshift(np.fft.fftn(image[0, 0].double().numpy())) / math.prod(SIZE)
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    box = tuple(slice(size // 2 - 1, size // 2 + 2) for size in SIZE)
    amplitude[box] = 0.7 * amplitude[box] + 0.3 * style[0, 0].double().numpy()
    expected = np.fft.ifftn(np.fft.ifftshift(amplitude * np.exp(1j * phase))) * math.prod(SIZE)
    assert np.abs(expected.imag).max() < 1e-6
    mixed = mix_amplitude(image, style, torch.tensor([0.3]))
    assert np.allclose(mixed[0, 0].numpy(), expected.real, atol=1e-5)


def test_phases_and_all_that_is_not_in_the_box_are_kept():
    image, style = _noise(), 3 * low_amplitude(_noise(seed=1), 1)
    before = torch.fft.fftn(image, dim=(-3, -2, -1), norm="forward")
    after = torch.fft.fftn(mix_amplitude(image, style, HALF), dim=(-3, -2, -1), norm="forward")
    apart = after / before
    assert float(apart.imag.abs().max()) < 1e-3  # the ratio of two numbers of one phase is real
    assert float(apart.real.min()) > 0
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[np.ix_([0, 1, -1], [0, 1, -1], [0, 1, -1])] = True
    assert torch.allclose(after[0, 0][~inside], before[0, 0][~inside], atol=1e-6)
    assert float((after - before)[0, 0][inside].abs().max()) > 0.01


def test_a_cosine_takes_the_height_of_another_and_keeps_its_place():
    image, other = 2.0 * _cosine((0, 1, 1), phase=0.7), 6.0 * _cosine((0, 1, 1), phase=2.0)
    mixed = mix_amplitude(image, low_amplitude(other, 1), torch.tensor([0.25]))
    assert torch.allclose(mixed, 3.0 * _cosine((0, 1, 1), phase=0.7), atol=1e-5)


def test_a_frequency_the_image_has_not_comes_in_with_phase_zero():
    image, other = 2.0 * _cosine((1, -2, 1), phase=0.7), 4.0 * _cosine((0, 1, 1), phase=2.0)
    image += 1e-6 * _cosine((0, 1, 1), phase=2.0)  # as much as rounding could leave there
    assert 1e-7 < float(low_amplitude(image, 1)[0, 0, 1, 2, 2]) < 1e-6
    mixed = mix_amplitude(image, low_amplitude(other, 2), HALF)
    expected = 1.0 * _cosine((1, -2, 1), phase=0.7) + 2.0 * _cosine((0, 1, 1))
    assert torch.allclose(mixed, expected, atol=1e-5)


def test_a_lopsided_style_is_used_as_the_mean_of_both_sides():
    image = _noise()
    style = torch.from_numpy(numpy_generator(3).random((1, 1, 3, 3, 3), dtype=np.float32))
    even = (style + _mirrored(style)) / 2
    assert not torch.allclose(style, even, atol=0.1)
    mixed = mix_amplitude(image, style, FULL)
    assert torch.allclose(low_amplitude(mixed, 1), even, atol=1e-6)


def test_a_channel_of_one_value_stays_as_it_is():
    image = _noise(1, 2)
    image[:, 1] = -1.0
    mixed = mix_amplitude(image, torch.ones(1, 2, 3, 3, 3), FULL)
    assert torch.equal(mixed[:, 1], image[:, 1])
    assert not torch.allclose(mixed[:, 0], image[:, 0], atol=0.1)


def test_a_sample_does_not_depend_on_its_neighbours():
    image, style = _noise(3, 2), low_amplitude(_noise(3, 2, seed=1), 1)
    ratio = torch.tensor([0.2, 0.9, 0.5])
    others, other_styles = _noise(3, 2, seed=5), 2 * style
    others[1], other_styles[1] = image[1], style[1]
    mixed = mix_amplitude(image, style, ratio)
    again = mix_amplitude(others, other_styles, torch.tensor([1.0, 0.9, 0.0]))
    alone = mix_amplitude(image[1:2], style[1:2], ratio[1:2])
    assert torch.equal(mixed[1], again[1])
    assert torch.allclose(mixed[1:2], alone, atol=1e-6)


def test_one_style_serves_a_whole_batch():
    image, style = _noise(2, 2), low_amplitude(_noise(1, 2, seed=1), 1)
    ratio = torch.tensor([0.2, 0.9])
    both = mix_amplitude(image, style.expand(2, -1, -1, -1, -1), ratio)
    assert torch.equal(mix_amplitude(image, style, ratio), both)


def test_a_box_that_does_not_fit_is_refused():
    image = _noise()
    assert low_amplitude(image[..., :5, :, :], 2).shape[-3:] == (5, 5, 5)
    for bad, half_width in ((image[..., :4, :, :], 2), (image, 3), (image, -1), (image[0], 1)):
        with pytest.raises(ConfigError, match="half-width"):
            low_amplitude(bad, half_width)


@pytest.mark.parametrize(
    ("style", "ratio"),
    [
        ((2, 2, 3, 3, 3), (3,)),
        ((3, 1, 3, 3, 3), (3,)),
        ((3, 2, 3, 3, 5), (3,)),
        ((3, 2, 2, 2, 2), (3,)),
        ((2, 3, 3, 3), (3,)),
        ((), (3,)),
        ((3, 2, 3, 3, 3), (1,)),
        ((3, 2, 7, 7, 7), (3,)),  # seven bins into six voxels
    ],
)
def test_a_style_or_ratio_that_does_not_fit_is_refused(style, ratio):
    with pytest.raises(ConfigError):
        mix_amplitude(_noise(3, 2), torch.ones(style), torch.zeros(ratio))


def test_ratios_are_uniform_up_to_the_progress_of_training():
    ratio = mixing_ratio(numpy_generator(0), 0.4, 4000)
    assert ratio.shape == (4000,)
    assert ratio.dtype == torch.float32
    assert float(ratio.min()) >= 0
    assert float(ratio.max()) <= 0.4
    # Uniform on [0, a]: mean a/2, variance a^2/12; five standard errors.
    assert float(ratio.mean()) == pytest.approx(0.2, abs=5 * 0.4 / math.sqrt(12 * 4000))
    assert float(ratio.var()) == pytest.approx(0.4**2 / 12, rel=0.1)
    assert torch.equal(mixing_ratio(numpy_generator(0), 0.0, 3), torch.zeros(3))
    assert torch.equal(mixing_ratio(numpy_generator(0), 0.4, 4000), ratio)


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_of_the_training_is_refused(progress):
    with pytest.raises(ConfigError, match="progress"):
        mixing_ratio(numpy_generator(0), progress, 1)
