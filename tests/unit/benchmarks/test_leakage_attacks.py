"""The attacks of `benchmarks.leakage` on synthetic volumes, where the outcome is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import leakage_attacks as attacks
from benchmarks.leakage_data import moments, shared_prototypes, soft_prototype_vector
from benchmarks.leakage_report import Row, markdown, picture
from uharmony_model.alignment.class_prototypes import PrototypeSum
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.style_average import StyleSum


def _normal(seed: int, *shape: int) -> np.ndarray:
    return numpy_generator(seed, "leakage").standard_normal(shape)


def _even(amplitude: np.ndarray) -> np.ndarray:
    """The signal of real, positive coefficients on frequencies -2..2, summed term by term."""
    steps = np.arange(5)
    signal = np.zeros((5, 5, 5))
    for place in np.ndindex(5, 5, 5):
        k = np.array(place) - 2
        phase = k[0] * steps[:, None, None] + k[1] * steps[:, None] + k[2] * steps
        signal += amplitude[place] * np.cos(2 * np.pi * phase / 5)
    return signal


def test_a_signal_without_phases_is_found_from_its_whole_amplitude():
    amplitude = 0.1 + np.abs(_normal(0, 5, 5, 5))
    amplitude = (amplitude + amplitude[::-1, ::-1, ::-1]) / 2
    truth = torch.from_numpy(_even(amplitude)).float()[None, None]
    wanted = torch.from_numpy(amplitude).float()
    start = torch.zeros(1, 1, 5, 5, 5)
    start[..., 0, 0, 0] = 125.0  # a pulse: every frequency alike, none with a phase

    def misfit(image: torch.Tensor) -> torch.Tensor:
        return (low_amplitude(image, 2)[:, 0] - wanted).square().mean((1, 2, 3))

    found, left = attacks.reconstruct(misfit, start, steps=250, rate=0.5)
    assert float(left) < 1e-6
    assert attacks.correlation(found[0], truth) > 0.999
    assert attacks.psnr(found[0], truth) > 40
    # Without the phases it is a matter of luck, however well the amplitudes fit.
    other = 10 * attacks.smooth_noise(numpy_generator(0, "start"), (1, 1, 5, 5, 5), 3)
    blind, left = attacks.reconstruct(misfit, other, steps=250, rate=0.5)
    assert float(left) < 1e-3
    assert attacks.correlation(blind[0], truth) < 0.9


def test_a_prior_and_smoothness_hold_the_image_back():
    start = torch.from_numpy(_normal(1, 1, 1, 4, 4, 4)).float()

    def to_three(image: torch.Tensor) -> torch.Tensor:
        return (image.mean((1, 2, 3, 4)) - 3).square()

    # min over the mean m of (m - 3)^2 + 3 (m - m0)^2 is at (3 + 3 m0) / 4, the rest stays.
    found, _ = attacks.reconstruct(to_three, start, prior=start, near=3.0, steps=300, rate=0.05)
    expected = start + (3 - float(start.mean())) / 4
    assert torch.allclose(found, expected, atol=1e-3)
    # What departs from the prior is to be smooth, and a departure by the same everywhere is.
    held, _ = attacks.reconstruct(
        to_three, start, prior=start, near=3.0, smooth=9.0, steps=300, rate=0.05
    )
    assert torch.allclose(held, expected, atol=1e-3)
    rough, _ = attacks.reconstruct(to_three, start, steps=100)
    flat, _ = attacks.reconstruct(to_three, start, smooth=1.0, steps=100)
    assert float(attacks.roughness(flat)) < 0.5 * float(attacks.roughness(rough))


def test_roughness_of_a_ramp_is_its_slope_squared():
    ramp = torch.arange(6.0).view(1, 1, 1, 6, 1) * 0.5 + torch.zeros(2, 1, 4, 6, 3)
    assert torch.allclose(attacks.roughness(ramp), torch.full((2,), 0.25))


def test_smooth_noise_is_smooth_and_of_deviation_one():
    noise = attacks.smooth_noise(numpy_generator(3, "n"), (2, 1, 12, 12, 12))
    assert torch.allclose(noise.std((1, 2, 3, 4)), torch.ones(2), atol=1e-5)
    assert float(attacks.roughness(noise).max()) < 1  # white noise of deviation 1 has 3 x 2


def test_auc_of_separated_scores_is_one_and_of_chance_about_a_half():
    draw = numpy_generator(0, "auc")
    member = np.stack([draw.permutation(40) < 10 for _ in range(50)])
    clear = attacks.area_under_curve(member + 0.1 * draw.random(member.shape), member, draw)
    assert (clear.value, clear.low, clear.high) == (1.0, 1.0, 1.0)
    chance = attacks.area_under_curve(draw.random(member.shape), member, draw)
    assert chance.value == pytest.approx(0.5, abs=0.02)
    assert chance.low < 0.5 < chance.high
    equal = attacks.area_under_curve(np.zeros(member.shape), member, draw)
    assert equal.value == 0.5


def test_auc_counts_pairs_within_a_release():
    scores = np.array([[3.0, 1.0, 2.0, 2.0], [9.0, 8.0, 7.0, 10.0]])
    member = np.array([[True, False, True, False], [False, False, True, True]])
    # First: 3 > 1, 3 > 2, 2 > 1, 2 = 2: 3.5 of 4. Second: 7 beats none, 10 beats both: 2 of 4.
    found = attacks.area_under_curve(scores, member, numpy_generator(0, "auc"))
    assert found.value == pytest.approx(5.5 / 8)


def test_the_likelihood_ratio_is_that_of_two_normal_densities():
    rows, of, shared = _normal(4, 60, 3), _normal(5, 7, 3), _normal(6, 3)
    within = np.diag([0.5, 1.0, 2.0])
    population, n = attacks.Population.of(rows * [1, 5, 0.1] + 2), 4
    of, shared = of * [1, 5, 0.1] + 2, 0.3 * shared * [1, 5, 0.1] + 2
    found = attacks.likelihood_ratio(shared, of, population, n, within)
    scale = population.deviation
    z = (shared - population.mean) / scale
    noise = attacks.ROUNDING**2 * np.eye(3)
    for k in range(7):
        a = (of[k] - population.mean) / scale
        inside = 3 / 16 * population.correlation + within / 16 + noise
        outside = population.correlation / 4 + noise
        expected = stats.multivariate_normal(a / 4, inside).logpdf(z)
        expected -= stats.multivariate_normal(np.zeros(3), outside).logpdf(z)
        assert found[k] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_covariance_is_shrunk_as_ledoit_and_wolf_say():
    rows = _normal(7, 12, 5) @ _normal(8, 5, 5)
    sample = sum(np.outer(row, row) for row in rows) / 12
    level = np.trace(sample) / 5
    apart = np.sum((sample - level * np.eye(5)) ** 2) / 5
    noise = sum(np.sum((np.outer(row, row) - sample) ** 2) for row in rows) / 12**2 / 5
    share = min(noise, apart) / apart
    assert 0 < share < 1
    expected = share * level * np.eye(5) + (1 - share) * sample
    assert np.allclose(attacks.shrunk_covariance(rows), expected)


@pytest.mark.parametrize("n", [1, 8])
def test_membership_in_a_mean_of_independent_numbers_is_found_as_theory_says(n):
    width, patients, draw = 16, 60, numpy_generator(n, "membership")
    population = attacks.Population(np.zeros(width), np.ones(width), np.eye(width))
    scores, members = [], []
    for _ in range(60):
        rows = draw.standard_normal((patients, width))
        chosen = np.arange(patients) < n
        shared = rows[chosen].mean(0)
        scores.append(attacks.likelihood_ratio(shared, rows, population, n))
        members.append(chosen)
    found = attacks.area_under_curve(np.stack(scores), np.stack(members), draw)
    # The scores of members and others are d/n apart, with a variance of d/n each.
    expected = 1.0 if n == 1 else stats.norm.cdf(math.sqrt(width / (2 * n)))
    assert found.value == pytest.approx(expected, abs=0.0 if n == 1 else 0.03)


def test_numbers_that_never_vary_are_left_out():
    rows = np.column_stack([_normal(9, 10), np.full(10, 7.0)])
    population = attacks.Population.of(rows)
    assert population.deviation[1] == 0
    assert population.standard(rows).shape == (10, 1)
    assert attacks.nearness(rows[2], rows, population).argmax() == 2


def test_two_styles_that_differ_by_a_patient_give_the_patient_away():
    images = torch.from_numpy(_normal(10, 10, 3, 1, 8, 9, 10)).float()
    larger, smaller = StyleSum(1, 1), StyleSum(1, 1)
    for number, patches in enumerate(images):
        larger.add(f"p{number}", low_amplitude(patches, 1, floor=-4.0))
        if number != 3:
            smaller.add(f"p{number}", low_amplitude(patches, 1, floor=-4.0))
    found = attacks.differenced(larger.mean(10), smaller.mean(9), 10)
    truth = low_amplitude(images[3], 1, floor=-4.0).double().mean(0)
    assert float((found - truth).abs().max()) < 1e-5


def test_a_decoder_learns_what_is_linear_and_keeps_to_the_average_else():
    rows, weights = _normal(11, 30, 4), _normal(12, 4, 50)
    decoder = attacks.Decoder.learned(rows, rows @ weights + 3)
    new = _normal(13, 5, 4)
    assert np.allclose(decoder(new), new @ weights + 3, atol=0.05)
    noise = _normal(14, 30, 50)
    unrelated = attacks.Decoder.learned(rows, noise)
    assert np.abs(unrelated(new) - noise.mean(0)).max() < 0.5 * noise.std()


def test_scores_of_a_patch_are_with_the_closest_true_one():
    truth = torch.from_numpy(_normal(15, 3, 1, 4, 4, 4)).float()
    assert attacks.correlation(2 * truth[1] + 5, truth) == pytest.approx(1.0, abs=1e-6)
    assert attacks.correlation(torch.full((1, 4, 4, 4), 2.0), truth) == 0
    span = float(truth[2].max() - truth[2].min())
    expected = 20 * math.log10(span / 0.1)  # an error of 0.1 everywhere
    assert attacks.psnr(truth[2] + 0.1, truth) == pytest.approx(expected, abs=1e-3)


def test_the_interval_of_a_mean_holds_it():
    values = _normal(16, 100) + 1
    found = attacks.mean_interval(values, numpy_generator(0, "mean"))
    half = 1.96 * values.std() / 10
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)


def test_prototypes_give_back_the_sums_they_are_made_of():
    features = torch.from_numpy(_normal(17, 2, 5, 2, 3, 4)).float()
    label = torch.from_numpy(numpy_generator(0, "label").integers(0, 3, (2, 2, 3, 4)))
    members = torch.nn.functional.one_hot(label, 3).movedim(-1, 1).bool()
    one = PrototypeSum.of_patient([(features, members)])
    found = moments(shared_prototypes([one, one]), 2)
    expected = [one.voxels, one.sums.flatten(), one.squares.flatten()]
    assert np.allclose(found, torch.cat(expected).numpy(), rtol=1e-5, atol=1e-4)
    # Hard members are a case of shares: one patch, then its class means and deviations.
    row = soft_prototype_vector(features[:1], members[:1].float())[0].view(3, 10)
    inside = features[0][:, label[0] == 1]
    assert torch.allclose(row[1, :5], inside.mean(1), atol=1e-4)
    assert torch.allclose(row[1, 5:], inside.std(1, correction=0), atol=1e-3)


def test_the_report_names_the_data():
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    score = {"correlation": interval, "psnr": interval, "misfit": 0.125}
    gain = {"attack": "a", "baseline": "b", **interval}
    result = {
        "numbers": 14,
        "reconstruction": {
            1: {"targets": 3, "scores": {"a": score}, "gain": {"correlation": gain, "psnr": gain}}
        },
        "membership": {1: {"distance": interval}},
        "differencing": {1: {"median": 1e-6, "largest": 2e-6}},
    }
    every = dict.fromkeys(("amplitude", "prototypes", "codes"), result)
    text = markdown({**every, "attribution": "Whose data."})
    assert "| a | 0.50 (0.25 to 0.75), 0.5 dB, 0.12 |" in text
    assert text.endswith("Whose data.\n")
    row = Row("one", torch.zeros(2, 1, 4, 4, 4), {"a": torch.ones(1, 4, 4, 4)})
    assert picture([row, row], "Whose data.").startswith(b"\x89PNG")
