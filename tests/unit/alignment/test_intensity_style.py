"""Intensity styles against formulas: monotone, exact on a linear change, closed to few patients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uharmony_model.alignment.intensity_style import (
    QUANTILES,
    QuantileSum,
    check_quantiles,
    outside_value,
    probabilities,
    quantile_function,
    quantile_schema,
    quantile_state,
    to_style,
)
from uharmony_model.errors import ConfigError, DataError, ExchangeError
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Percentile, Window, ZScore

KNOTS = 17


def volume(*where: str, air: float = -1.0) -> np.ndarray:
    """A bright ball with noise in constant air, (1, 12, 12, 12), tissue in 0.1 to 0.9."""
    draw = numpy_generator(0, "test", *where)
    axes = np.stack(np.meshgrid(*(np.arange(12),) * 3, indexing="ij")) - 5.5
    ball = np.square(axes).sum(0) < 25
    return np.where(ball, draw.uniform(0.1, 0.9, ball.shape), air).astype(np.float32)[None]


def increasing(seed: int, channels: int = 1) -> np.ndarray:
    steps = numpy_generator(seed, "increasing").uniform(0.01, 1, (channels, KNOTS))
    return steps.cumsum(1) / KNOTS - 1


def test_knots_are_the_air_and_the_quantiles_of_what_is_above_it():
    image = volume("a")
    tissue = image[image > -1].astype(np.float64)
    expected = [-1.0, *(np.quantile(tissue, p) for p in np.linspace(0.005, 0.995, KNOTS - 1))]
    assert quantile_function(image, KNOTS)[0] == pytest.approx(expected, abs=1e-12)
    assert quantile_function(np.concatenate((image, image + 1)), KNOTS).shape == (2, KNOTS)


def test_amount_of_air_does_not_change_the_foregrounds_quantiles():
    image = volume("a")
    wide = np.full((1, 20, 20, 20), -1.0, np.float32)
    wide[:, 3:15, 3:15, 3:15] = image
    assert np.array_equal(quantile_function(wide, KNOTS), quantile_function(image, KNOTS))


def test_noise_in_air_stays_air():
    image = volume("a")
    noisy = image.copy()
    noise = numpy_generator(0, "noise").uniform(0, 0.04, image.shape)
    noisy[image == -1] += noise[image == -1].astype(np.float32)
    assert quantile_function(noisy, KNOTS)[:, 1:] == pytest.approx(
        quantile_function(image, KNOTS)[:, 1:]
    )


def test_hardly_any_foreground_is_still_foreground():
    image = np.full((1, 10, 10, 10), -1.0, np.float32)
    image[0, 0, 0, :2] = 0.25, 0.75
    found = quantile_function(image, 3)
    assert found[0] == pytest.approx([-1, 0.25 + 0.005 * 0.5, 0.25 + 0.995 * 0.5])


def test_zeros_that_the_policy_puts_outside_are_no_foreground():
    assert outside_value(ZScore(policy="zscore", nonzero=True)) == 0
    assert outside_value(ZScore(policy="zscore")) is None
    assert outside_value(Percentile(policy="percentile")) is None
    assert outside_value(Window(policy="window")) is None
    draw = numpy_generator(0, "outside").standard_normal(900).astype(np.float32)
    image = np.concatenate((draw, np.zeros(100, np.float32))).reshape(1, 10, 10, 10)
    found = quantile_function(image, KNOTS, outside=0.0)
    assert found[0, 1:] == pytest.approx(np.quantile(draw.astype(np.float64), probabilities(KNOTS)))
    assert found[0, 0] == found[0, 1]
    mapped = to_style(torch.from_numpy(image), found, 2 * found + 5, 1.0, outside=0.0)
    assert (mapped[torch.from_numpy(image) == 0] == 0).all()
    assert mapped.flatten()[:900] == pytest.approx(2 * draw + 5, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_channel_of_one_value_has_no_style(value: float):
    with pytest.raises(DataError, match="channel 0 has one value only"):
        quantile_function(np.full((1, 4, 4, 4), value, np.float32), KNOTS, outside=0.0)
    with pytest.raises(DataError, match="channel 0 has one value only"):
        quantile_function(np.full((1, 4, 4, 4), value, np.float32), KNOTS)


def test_what_is_not_finite_or_too_few_is_refused():
    image = volume("a")
    image[0, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        quantile_function(image, KNOTS)
    with pytest.raises(ConfigError, match="2 knots"):
        quantile_function(volume("a"), 2)


@pytest.mark.parametrize(("gain", "offset"), [(0.5, 0.2), (3.0, -1.0)])
def test_the_map_is_exact_on_a_linear_change_of_intensities(gain: float, offset: float):
    image = volume("a")
    changed = np.float32(gain) * image + np.float32(offset)
    own, target = quantile_function(image, KNOTS), quantile_function(changed, KNOTS)
    source = torch.from_numpy(image)
    assert torch.allclose(to_style(source, own, target, 1.0), torch.from_numpy(changed), atol=1e-5)
    half = 0.5 * image + 0.5 * changed
    assert torch.allclose(to_style(source, own, target, 0.5), torch.from_numpy(half), atol=1e-5)
    assert torch.equal(to_style(source, own, target, 0.0), source)


def test_a_patch_is_mapped_like_its_volume():
    image = torch.from_numpy(volume("a"))
    own, target = quantile_function(image.numpy(), KNOTS), increasing(3)
    whole = to_style(image, own, target, 0.7)
    assert torch.equal(to_style(image[:, 2:9, :, 4:], own, target, 0.7), whole[:, 2:9, :, 4:])


def test_a_mapped_image_has_the_targets_quantiles():
    image, other = volume("a"), volume("b")
    other = np.where(other > -1, other**3, np.float32(-2)).astype(np.float32)
    own, target = quantile_function(image), quantile_function(other)
    found = quantile_function(to_style(torch.from_numpy(image), own, target, 1.0).numpy())
    assert np.abs(found - target).max() < 0.02
    assert np.abs(own - target).max() > 0.3


@given(seed=st.integers(0, 10_000), strength=st.floats(0, 1), ties=st.booleans())
def test_the_map_never_falls(seed: int, strength: float, ties: bool):
    own, target = increasing(seed), increasing(seed + 1)
    if ties:  # a clipped end, and a target of few values
        own[0, 10:] = own[0, 10]
        target = np.floor(4 * target) / 4
    values = torch.linspace(-3, 3, 2001)[None, :, None, None]
    mapped = to_style(values, own, target, strength).flatten()
    assert (mapped.diff() >= -1e-6).all()
    assert mapped.isfinite().all()


def test_tied_knots_meet_the_mean_of_their_targets():
    own = np.array([[-1.0, 0.0, 1.0, 1.0, 1.0]])
    target = np.array([[-1.0, 0.0, 3.0, 4.0, 8.0]])
    mapped = to_style(torch.tensor([-1.0, 0.0, 0.5, 1.0]).view(1, 4, 1, 1), own, target, 1.0)
    assert mapped.flatten().tolist() == pytest.approx([-1, 0, 2.5, 5])


def test_beyond_the_knots_the_foregrounds_slope_goes_on():
    own, target = np.array([[-1.0, 0.0, 0.9, 1.0]]), np.array([[-2.0, 0.0, 2.9, 3.0]])
    mapped = to_style(torch.tensor([-2.0, 1.5]).view(1, 2, 1, 1), own, target, 1.0)
    assert mapped.flatten().tolist() == pytest.approx([-2 - 3, 3 + 0.5 * 3])


def test_a_map_that_cannot_be_made():
    image, own = torch.zeros(1, 2, 2, 2), increasing(0)
    with pytest.raises(ConfigError, match=r"strength is 1\.5"):
        to_style(image, own, own, 1.5)
    with pytest.raises(ConfigError, match="expected"):
        to_style(torch.zeros(2, 2, 2, 2), own, own, 1.0)
    with pytest.raises(DataError, match="own quantiles: a quantile is below"):
        to_style(image, own[:, ::-1], own, 1.0)
    with pytest.raises(ExchangeError, match="target quantiles: a quantile is below"):
        to_style(image, own, own[:, ::-1], 1.0)


def test_each_patient_counts_once():
    total = QuantileSum()
    for name in "abcdefghij":
        total.add(name, np.array([[0.0, 1.0, 2.0]]))
    for _ in range(30):
        total.add("a", np.array([[10.0, 11.0, 12.0]]))
    assert total.patients == 10
    of_a = 30 / 31 * 10
    assert total.mean()[0] == pytest.approx(np.array([0, 1, 2]) + of_a / 10)


def test_a_mean_of_few_patients_is_refused():
    total = QuantileSum()
    for number in range(9):
        total.add(str(number), increasing(number))
        total.add(str(number), increasing(number))
    with pytest.raises(ConfigError, match="9 patients, expected at least 10"):
        total.mean()
    assert total.mean(min_patients=9).shape == (1, KNOTS)
    with pytest.raises(ConfigError, match="0 patients, expected at least 1"):
        QuantileSum().mean(min_patients=0)


def test_the_mean_does_not_depend_on_the_order_of_patients():
    first, second = QuantileSum(), QuantileSum()
    for number in range(10):
        first.add(str(number), increasing(number))
        second.add(str(9 - number), increasing(9 - number))
    assert np.array_equal(first.mean(), second.mean())


def test_what_is_no_style_is_not_added():
    total = QuantileSum()
    total.add("a", increasing(0))
    for wrong in (increasing(0)[:, ::-1], increasing(0)[0], increasing(0, channels=2)):
        with pytest.raises(DataError, match="expected non-decreasing"):
            total.add("b", wrong)
    assert total.patients == 1


def test_what_is_shared_has_no_axis_of_space():
    total = QuantileSum()
    for number in range(10):
        image = np.concatenate((volume(str(number)), volume(str(number), "second")))
        total.add(str(number), quantile_function(image, KNOTS))
    state = quantile_state(total.mean())
    assert quantile_schema(2, KNOTS).numel == 2 * KNOTS
    assert {name: tuple(t.shape) for name, t in state.items()} == {QUANTILES: (2, KNOTS)}
    assert check_quantiles(state, 2, KNOTS) == pytest.approx(total.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q[:, :-1], "expected intensity_quantiles"),
        (lambda q: q.flip(1), "below the one before"),
        (lambda q: q * 1000, "beyond 100"),
        (lambda q: q * torch.nan, "not finite"),
        (lambda q: q * torch.inf, "not finite"),
        (lambda q: q * 0, "are equal"),
    ],
)
def test_a_received_style_is_checked(change, words: str):
    state = quantile_state(increasing(0))
    with pytest.raises(ExchangeError, match=words):
        check_quantiles({QUANTILES: change(state[QUANTILES])}, 1, KNOTS)


def test_a_received_style_of_another_name_or_type_is_refused():
    state = quantile_state(increasing(0))
    with pytest.raises(ExchangeError, match="expected intensity_quantiles"):
        check_quantiles({"image": state[QUANTILES]}, 1, KNOTS)
    with pytest.raises(ExchangeError, match=r"only torch\.float32"):
        check_quantiles({QUANTILES: state[QUANTILES].double()}, 1, KNOTS)
