from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from uharmony_model.errors import ConfigError, DataError, ExchangeError
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.style_average import (
    MAX_AMPLITUDE,
    MIN_PATIENTS,
    StyleSum,
    check_style,
    style_schema,
)

BOX = (2, 3, 3, 3)


def _amplitudes(count: int, seed: int = 0) -> torch.Tensor:
    image = numpy_generator(seed).standard_normal((count, 2, 4, 5, 6), dtype=np.float32)
    return low_amplitude(torch.from_numpy(image), 1)


def _full(value: float) -> torch.Tensor:
    return torch.full((1, *BOX), value)


def test_a_patient_counts_once_however_many_patches_it_gives():
    style = StyleSum(2, 1)
    style.add("a", torch.cat((_full(1.0), _full(2.0), _full(6.0))))  # mean 3
    style.add("b", _full(4.0))
    style.add("c", torch.cat((_full(5.0), _full(6.0))))  # with the next one: mean 8
    style.add("c", _full(13.0))
    assert style.patients == 3
    assert torch.equal(style.mean(3), torch.full(BOX, 5.0))


def test_the_mean_is_that_of_float64_in_numpy():
    style, rows = StyleSum(2, 1), []
    for number in range(12):
        amplitude = _amplitudes(1 + number % 3, seed=number)
        style.add(f"p{number}", amplitude)
        rows.append(amplitude.double().numpy().mean(0))
    found = style.mean()
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), np.mean(rows, axis=0).astype(np.float32))


def test_sums_do_not_lose_small_patients_beside_large_ones():
    style = StyleSum(1, 0)
    style.add("a", torch.full((1, 1, 1, 1, 1), 2.0**26))
    for number in range(15):
        style.add(f"b{number}", torch.ones(1, 1, 1, 1, 1))
    # In float32, 2^26 + 1 is 2^26, so the ones would all be lost; numbers near 2^22 are 0.5 apart.
    assert float(style.mean()) == round(2 * (2**26 + 15) / 16) / 2 == 2**22 + 1


def test_the_order_of_patients_does_not_change_a_bit():
    drawn = {name: _amplitudes(1, seed) * 10.0**seed for seed, name in enumerate("abcde")}
    means = []
    for order in itertools.permutations(drawn):
        style = StyleSum(2, 1)
        for name in order:
            style.add(name, drawn[name])
        means.append(style.mean(5))
    assert all(torch.equal(means[0], mean) for mean in means)


def test_too_few_patients_give_no_style():
    style = StyleSum(2, 1)
    for number in range(MIN_PATIENTS - 1):
        style.add(f"p{number}", torch.cat((_full(1.0), _full(1.0))))
    style.add("p0", _full(1.0))  # more patches of one patient do not help
    with pytest.raises(ConfigError, match=r"9 patients, expected at least 10.*\badd patients"):
        style.mean()
    style.add("another", _full(1.0))
    assert torch.equal(style.mean(), torch.ones(BOX))
    with pytest.raises(ConfigError, match="expected at least 11"):
        style.mean(11)


@pytest.mark.parametrize("least", [-1, 0, 1])
def test_no_patient_is_never_enough(least):
    with pytest.raises(ConfigError, match="0 patients, expected at least 1"):
        StyleSum(2, 1).mean(least)


def test_the_least_number_is_ten():
    assert MIN_PATIENTS == 10


@pytest.mark.parametrize("shape", [BOX, (0, *BOX), (1, 1, 3, 3, 3), (1, 2, 5, 5, 5), ()])
def test_amplitudes_of_another_shape_are_refused(shape):
    style = StyleSum(2, 1)
    with pytest.raises(ConfigError, match="amplitudes"):
        style.add("a", torch.ones(shape))
    assert style.patients == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1])
def test_an_amplitude_that_is_none_is_refused_and_not_counted(value):
    style, amplitude = StyleSum(2, 1), _full(1.0)
    amplitude[0, 1, 2, 0, 1] = value
    with pytest.raises(DataError):
        style.add("a", amplitude)
    assert style.patients == 0


def test_a_mean_of_real_patches_passes_and_survives_the_wire():
    style = StyleSum(2, 1)
    for number in range(10):
        style.add(f"p{number}", _amplitudes(2, seed=number))
    mean, schema = style.mean(), style_schema(2, 1)
    received = unflatten(flatten({"amplitude": mean}, schema), schema)["amplitude"]
    check_style(received, 2, 1)
    assert torch.equal(received, mean)


def test_the_schema_has_one_tensor():
    schema = style_schema(3, 2)
    assert [(spec.name, spec.shape) for spec in schema.tensors] == [("amplitude", (3, 5, 5, 5))]
    assert schema.numel == 375


@pytest.mark.parametrize(("channels", "half_width"), [(0, 1), (-1, 1), (1, -1)])
def test_a_style_of_no_channels_or_bins_is_refused(channels, half_width):
    for make in (style_schema, StyleSum):
        with pytest.raises(ConfigError, match="half-width"):
            make(channels, half_width)


@pytest.mark.parametrize("value", [0.0, 1.0, MAX_AMPLITUDE])
def test_styles_up_to_the_bound_pass(value):
    check_style(torch.full(BOX, value), 2, 1)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), float("-inf"), -1e-6, MAX_AMPLITUDE * 1.001, 3e38]
)
def test_numbers_that_are_no_amplitude_are_refused(value):
    style = torch.ones(BOX)
    style[1, 0, 1, 2] = style[1, 2, 1, 0] = value  # symmetric, so only the number is wrong
    with pytest.raises(ExchangeError, match=r"finite|spans"):
        check_style(style, 2, 1)


@pytest.mark.parametrize("shape", [(1, 3, 3, 3), (2, 5, 5, 5), (2, 3, 3), (1, *BOX), (54,), ()])
def test_another_shape_is_refused(shape):
    with pytest.raises(ExchangeError, match="expected"):
        check_style(torch.ones(shape), 2, 1)


def test_another_type_is_refused():
    for dtype in (torch.float64, torch.float16, torch.int32, torch.complex64):
        with pytest.raises(ExchangeError, match=r"torch\.float32"):
            check_style(torch.ones(BOX, dtype=dtype), 2, 1)


def test_a_lopsided_style_is_refused_but_not_for_rounding():
    style = torch.full(BOX, 2.0)
    style[0, 0, 0, 1] = 2.0 + 0.001  # below a thousandth of the largest
    check_style(style, 2, 1)
    style[0, 0, 0, 1] = 2.1
    with pytest.raises(ExchangeError, match=r"by 0\.1 between"):
        check_style(style, 2, 1)
