"""Each effect of a simulated scanner against a property that does not come from its own code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from uharmony_model.errors import ConfigError, DataError
from uharmony_simulation.scanners import (
    AIR,
    MAX_GIBBS,
    Scanner,
    apply_scanner,
    bias_field,
    draw_scanner,
)

SPACING = (1.0, 1.0, 1.0)
AMOUNTS = ("slice_mm", "blur_mm", "motion_mm", "noise")


def textured(shape=(24, 28, 20), seed=0):
    """White noise above air: every frequency and every grey value occurs."""
    return np.random.default_rng(seed).uniform(0.2, 1.0, shape).astype(np.float32)


def neighbours(image, axis):
    """Correlation of each voxel with the next one along an axis."""
    first = np.delete(image, -1, axis=axis).ravel()
    return np.corrcoef(first, np.delete(image, 0, axis=axis).ravel())[0, 1]


@given(
    st.integers(0, 2**40),
    st.text(max_size=8),
    st.sampled_from(["inverted", "plain"]),
    st.integers(0, 2**32 - 1),
)
def test_strength_zero_is_the_bit_exact_identity(seed, domain, contrast, content):
    image = textured((5, 6, 7), content) * 1000 - 300
    scanner = draw_scanner(seed, domain, 0.0, invert=contrast == "inverted", motion=True)
    out = apply_scanner(scanner, image, (3.0, 1.0, 1.0), seed)
    assert scanner.is_identity
    np.testing.assert_array_equal(out, image)
    assert out is not image


@given(
    st.integers(0, 2**40),
    st.sampled_from(["a", "b", "c"]),
    st.floats(0.01, 4),
    st.floats(1, 2.5),
)
def test_parameters_are_the_strength_times_one_direction(seed, domain, strength, factor):
    weak = draw_scanner(seed, domain, strength, motion=True)
    strong = draw_scanner(seed, domain, strength * factor, motion=True)
    for name in AMOUNTS:
        assert getattr(weak, name) > 0
        assert getattr(strong, name) == pytest.approx(factor * getattr(weak, name))
    np.testing.assert_allclose(strong.bias, factor * np.array(weak.bias))
    np.testing.assert_allclose(strong.log_slopes, factor * np.array(weak.log_slopes))
    assert weak.gibbs <= strong.gibbs <= MAX_GIBBS
    assert strong.slice_axis == weak.slice_axis
    assert strong.inverted >= weak.inverted


def test_contrast_turns_over_by_itself_only_above_strength_one():
    flipped = {s: sum(draw_scanner(0, f"d{i}", s).inverted for i in range(40)) for s in (1, 2, 10)}
    assert flipped[1] == 0
    assert 10 <= flipped[2] <= 30  # the tendency is uniform in [0, 1], so half of them
    assert flipped[10] >= 32


def test_domains_and_seeds_differ_and_a_scanner_survives_its_record():
    scanner = draw_scanner(7, "site-a", 1.0, motion=True)
    assert scanner == draw_scanner(7, "site-a", 1.0, motion=True)
    assert scanner != draw_scanner(8, "site-a", 1.0, motion=True)
    assert scanner.bias != draw_scanner(7, "site-b", 1.0, motion=True).bias
    assert Scanner.model_validate_json(scanner.model_dump_json()) == scanner


@pytest.mark.parametrize(
    "scanner", [Scanner(domain="x", noise=0.05), Scanner(domain="x", motion_mm=3.0)]
)
def test_noise_and_motion_differ_by_case_and_repeat_for_the_same_case(scanner):
    image = textured()
    once = apply_scanner(scanner, image, SPACING, 3, "case-1")
    np.testing.assert_array_equal(once, apply_scanner(scanner, image, SPACING, 3, "case-1"))
    for other in (
        apply_scanner(scanner, image, SPACING, 3, "case-2"),
        apply_scanner(scanner, image, SPACING, 4, "case-1"),
    ):
        assert np.abs(once - other).max() > 0.01


def test_the_other_effects_are_the_same_for_every_case():
    drawn = draw_scanner(0, "x", 1.0, invert=True)
    scanner, image = drawn.model_copy(update={"noise": 0.0}), textured()
    np.testing.assert_array_equal(
        apply_scanner(scanner, image, SPACING, 3, "case-1"),
        apply_scanner(scanner, image, SPACING, 4, "case-2"),
    )


@pytest.mark.parametrize("seed", range(5))
def test_contrast_curve_keeps_the_order_and_inversion_reverses_it(seed):
    image = textured(seed=seed)
    curve = draw_scanner(seed, "x", 2.0).log_slopes
    kept = apply_scanner(Scanner(domain="x", log_slopes=curve), image, SPACING, 0)
    turned = apply_scanner(Scanner(domain="x", log_slopes=curve, inverted=True), image, SPACING, 0)
    # The lowest twentieth counts as air and stays as it is.
    tissue = image > image.min() + 1.01 * AIR * (image.max() - image.min())
    assert np.abs(kept - image).max() > 0.02
    assert spearmanr(kept[tissue], image[tissue]).statistic > 0.9999
    assert spearmanr(turned[tissue], image[tissue]).statistic < -0.999


def test_contrast_curve_follows_its_slopes():
    image = np.linspace(0, 1, 4000, dtype=np.float32).reshape(10, 20, 20)
    slopes = (1.0, 0.0, 0.0, 0.0, -1.0)
    out = apply_scanner(Scanner(domain="x", log_slopes=slopes), image, SPACING, 0).ravel()
    slope = np.diff(out) / np.diff(image.ravel())
    first, third, last = (
        float(np.median(slope[int(4000 * a) : int(4000 * b)]))
        for a, b in ((0.07, 0.2), (0.45, 0.6), (0.85, 0.98))
    )
    assert first / third == pytest.approx(math.e, rel=0.02)
    assert third / last == pytest.approx(math.e, rel=0.02)


def test_air_stays_dark_under_inversion_and_in_hounsfield_units():
    image = np.full((16, 16, 16), -1000.0, dtype=np.float32)
    image[4:12, 4:12, 4:12] = np.linspace(0, 100, 512).reshape(8, 8, 8)
    air = image == -1000
    out = apply_scanner(Scanner(domain="x", inverted=True), image, SPACING, 0)
    np.testing.assert_array_equal(out[air], -1000)
    assert spearmanr(out[~air], image[~air]).statistic < -0.99
    noisy = apply_scanner(draw_scanner(0, "x", 1.0, invert=True), image, SPACING, 0)
    corner = noisy[:2, :2, :2]
    assert corner.mean() < np.median(noisy[~air]) - 50
    assert noisy.min() >= -1000


def test_bias_field_is_smooth_positive_and_multiplies():
    coefficients = draw_scanner(1, "x", 1.0).bias
    field = bias_field(coefficients, (20, 24, 22))
    assert field.min() > 0
    assert field.max() / field.min() > 1.1
    # A cubic over 20 voxels: fourth differences vanish along every axis of its logarithm.
    for axis in range(3):
        np.testing.assert_allclose(np.diff(np.log(field), n=4, axis=axis), 0, atol=1e-10)
    image = textured((20, 24, 22))
    image[0, 0, 0] = 0  # the darkest value is what the field multiplies from
    out = apply_scanner(Scanner(domain="x", bias=coefficients), image, SPACING, 0)
    np.testing.assert_allclose(out, image * field, rtol=1e-5)


def test_bias_coefficient_is_the_legendre_polynomial_of_its_axis():
    # Order of the coefficients: (0,0,1) (0,0,2) (0,0,3) (0,1,0) ...; P2(t) = (3 t^2 - 1) / 2.
    field = bias_field((0.0, 0.3, *[0.0] * 17), (2, 3, 5))
    t = np.linspace(-1, 1, 5)
    expected = np.exp(0.3 * (3 * t**2 - 1) / 2)
    np.testing.assert_allclose(field, np.broadcast_to(expected, (2, 3, 5)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_correlate_neighbours_along_their_axis_only(axis):
    image = textured()
    out = apply_scanner(Scanner(domain="x", slice_axis=axis, slice_mm=2.0), image, SPACING, 0)
    assert out.shape == image.shape
    for direction in range(3):
        correlation = neighbours(out, direction)
        assert (correlation > 0.5) if direction == axis else (abs(correlation) < 0.1)


def test_thick_slices_are_means_placed_where_they_were_taken():
    image = np.zeros((2, 2, 9), dtype=np.float32)
    image[..., 3:6] = 6.0
    scanner = Scanner(domain="x", slice_axis=2, slice_mm=4.0)
    # 2 mm voxels and 6 mm slices: three slices of three voxels, centred on voxels 1, 4 and 7.
    out = apply_scanner(scanner, image, (1.0, 1.0, 2.0), 0)[0, 0]
    np.testing.assert_allclose(out, [0, 0, 2, 4, 6, 4, 2, 0, 0], atol=1e-6)


def test_a_slice_thicker_than_the_volume_is_its_mean():
    image = textured((4, 5, 6))
    out = apply_scanner(Scanner(domain="x", slice_axis=0, slice_mm=50.0), image, SPACING, 0)
    np.testing.assert_allclose(out, np.broadcast_to(image.mean(axis=0), (4, 5, 6)), rtol=1e-5)


def test_blur_lowers_high_frequencies_within_the_slice_and_keeps_the_mean():
    image = textured()
    out = apply_scanner(Scanner(domain="x", slice_axis=2, blur_mm=2.0), image, SPACING, 0)
    before, after = (np.abs(np.fft.fftn(volume)) ** 2 for volume in (image, out))
    high = (slice(8, 17), slice(10, 19))
    assert after[high].sum() < 0.2 * before[high].sum()
    assert out.mean() == pytest.approx(image.mean(), rel=0.01)
    assert abs(neighbours(out, 2)) < 0.1
    flat = textured()
    flat[:, :, 1:] = 0.7  # a crop without air: its border must not darken
    assert apply_scanner(Scanner(domain="x", blur_mm=3.0), flat, SPACING, 0)[
        0, 0, 5
    ] == pytest.approx(0.7, rel=1e-3)


def test_blur_has_the_declared_width_in_mm():
    image = np.zeros((41, 5, 5), dtype=np.float32)
    image[20] = 1.0
    out = apply_scanner(Scanner(domain="x", slice_axis=2, blur_mm=8.0), image, (2.0, 1.0, 1.0), 0)
    profile = out[:, 2, 2] / out[20, 2, 2]
    assert profile[18] == pytest.approx(0.5, abs=0.02)  # 2 voxels of 2 mm are half of 8 mm


def test_gibbs_rings_beside_an_edge_and_leaves_flat_parts():
    image = np.zeros((32, 32, 32), dtype=np.float32)
    image[8:24, 8:24, 8:24] = 1.0
    out = apply_scanner(Scanner(domain="x", gibbs=0.6), image, SPACING, 0)
    assert out.max() > 1.05  # the overshoot of a truncated Fourier series
    energy = np.abs(np.fft.fftn(out - out.mean())) ** 2
    assert energy[16, 16, 16] < 1e-3 * energy.max()


def test_rician_noise_has_the_declared_deviation_and_lifts_air():
    image = np.zeros((40, 40, 40), dtype=np.float32)
    image[20:] = 1.0
    noisy = apply_scanner(Scanner(domain="x", noise=0.05), image, SPACING, 0)
    assert noisy[20:].std() == pytest.approx(0.05, rel=0.03)
    # Rayleigh where there is no signal: mean sigma * sqrt(pi / 2).
    assert noisy[:20].mean() == pytest.approx(0.05 * math.sqrt(math.pi / 2), rel=0.03)
    assert noisy.min() >= 0


def test_motion_ghosts_along_one_axis_and_keeps_the_energy():
    image = np.zeros((24, 24, 24), dtype=np.float32)
    image[9:15, 9:15, 9:15] = 1.0
    moved = apply_scanner(Scanner(domain="x", slice_axis=2, motion_mm=4.0), image, SPACING, 1)
    changed = np.abs(moved - image) > 1e-6
    assert changed.any()
    assert not changed[:, :9].any()  # phase encoding runs along axis 0
    assert not changed[:, :, 15:].any()
    assert changed[:6].any()  # a ghost beyond the object
    # Parseval: phases alone change, so the sum of squares stays.
    assert (moved**2).sum() == pytest.approx((image**2).sum(), rel=1e-5)


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0, 10.0])
def test_all_effects_together_stay_finite_and_on_the_grid(strength):
    image = textured((9, 1, 6)) * 400 - 100
    scanner = draw_scanner(3, "x", strength, invert=True, motion=True)
    out = apply_scanner(scanner, image, (3.0, 1.0, 5.0), 0)
    assert out.shape == image.shape
    assert out.dtype == np.float32
    assert np.isfinite(out).all()


def test_a_constant_volume_stays_constant():
    image = np.full((4, 4, 4), 7.0, dtype=np.float32)
    out = apply_scanner(draw_scanner(0, "x", 2.0), image, SPACING, 0)
    np.testing.assert_array_equal(out, image)


@pytest.mark.parametrize("strength", [-0.1, 11.0, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ConfigError, match=r"domain 'x'.*expected 0 \(identity\) to 10"):
        draw_scanner(0, "x", strength)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4, 4), (0, 4, 4)])
def test_an_image_of_another_rank_is_refused(shape):
    with pytest.raises(DataError, match=r"\(D, H, W\)"):
        apply_scanner(draw_scanner(0, "x", 1.0), np.zeros(shape, np.float32), SPACING, 0)


def test_an_image_that_is_not_finite_is_refused():
    image = textured((3, 3, 3))
    image[1, 1, 1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        apply_scanner(draw_scanner(0, "x", 1.0), image, SPACING, 0)
