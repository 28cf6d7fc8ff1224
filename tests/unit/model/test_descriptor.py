"""Descriptors against the statistics of a convolution that the test computes itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uharmony_model.descriptor import EPS, Moments, describe, raw_quantiles
from uharmony_model.errors import DataError, NetworkError
from uharmony_model.harmonize import HarmonizedNetwork, harmonize, stacked_keys
from uharmony_model.network_settings import Harmonization
from uharmony_model.networks import build_network
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study

FEATURES = {"unet": (4, 8), "dynunet": (4, 6, 8), "segresnet": (4, 8), "swinunetr": (12, 24)}
SLOW = pytest.mark.slow
EACH = pytest.mark.parametrize(
    "name", ["unet", "dynunet", "segresnet", pytest.param("swinunetr", marks=SLOW)]
)


def build(name: str, method: str = "uharmony", **harmonization) -> SegmentationNetwork:
    content = {
        "name": "test",
        "method": method,
        "task": {"classes": {"core": 1}, "intensity": {"mr": {"policy": "zscore"}}, "channels": 2},
        "network": {"name": name, "features": FEATURES[name], "harmonization": harmonization},
    }
    return build_network(Study.model_validate(content), ("a", "b"), seed=0)


def sequence(kernel: int, multiple: int | None = None) -> tuple[HarmonizedNetwork, nn.Conv3d]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Conv3d(2, 3, kernel, padding=kernel // 2)
        network = nn.Sequential(first, nn.InstanceNorm3d(3), nn.Conv3d(3, 2, 1))
    model = harmonize(
        network,
        domains=("a", "b"),
        settings=Harmonization(),
        stem=("0",),
        head=("2",),
        multiple=multiple,
    )
    return model, first


def draw(*size: int, channels: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 3 + 2 * torch.randn(channels, *size, generator=generator)


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in stacked_keys(model):
            parameter = model.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def statistics(output: Tensor) -> np.ndarray:
    flat = output.double().flatten(1)
    return torch.cat((flat.mean(1), 0.5 * (flat.var(1, correction=0) + EPS).log())).numpy()


def test_mean_and_log_deviation_of_the_first_convolution():
    model, first = sequence(3)
    image = draw(5, 6, 7)
    with torch.no_grad():
        output = F.conv3d(image, first.weight, first.bias, padding=1)
    np.testing.assert_allclose(describe(model, image), statistics(output), rtol=1e-5, atol=1e-6)


def test_residuals_and_an_earlier_selection_do_not_matter():
    model, _ = sequence(3)
    expected = describe(model, draw(5, 6, 7))
    randomise(model)
    model(draw(5, 6, 7)[None], torch.tensor([1]))
    np.testing.assert_array_equal(describe(model, draw(5, 6, 7)), expected)


def test_padding_to_the_network_s_strides_is_not_counted():
    model, first = sequence(1, multiple=4)  # a kernel of one voxel does not see the padding
    image = draw(5, 6, 9)
    with torch.no_grad():
        output = F.conv3d(image, first.weight, first.bias)
    for window in (None, (4, 4, 4)):
        found = describe(model, image, window=window)
        np.testing.assert_allclose(found, statistics(output), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [(4, 4, 4), (9, 6, 30), (1, 50, 8)])
@EACH
def test_windows_do_not_change_the_descriptor(name, window):
    model = build(name)
    size = (70, 33, 40) if name == "swinunetr" else (27, 9, 14)
    window = tuple(8 * edge for edge in window) if name == "swinunetr" else window
    whole, cut = describe(model, draw(*size)), describe(model, draw(*size), window=window)
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)


@EACH
def test_two_numbers_for_each_channel_of_the_first_convolution(name):
    found = describe(build(name), draw(8, 8, 8))
    assert found.shape == (2 * FEATURES[name][0],)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(("method", "layers"), [("uharmony", "decoder"), ("fedavg", "all")])
def test_the_first_norm_counts_whether_it_is_harmonised_or_not(method, layers):
    expected = describe(build("unet"), draw(8, 8, 8))
    other = build("unet", method, layers=layers)
    np.testing.assert_array_equal(describe(other, draw(8, 8, 8)), expected)


def test_the_rest_of_the_network_is_not_run_and_no_hook_stays():
    model, _ = sequence(3)
    calls: list[int] = []
    head = model.get_submodule("network.2")
    head.register_forward_hook(lambda *_: calls.append(1))
    describe(model, draw(4, 4, 4))
    assert not calls
    assert all(not module._forward_pre_hooks for module in model.modules())
    model(draw(4, 4, 4)[None])
    assert calls == [1]


def test_moments_of_parts_are_those_of_the_whole():
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).double() + 1e4
    parts = [Moments.of(part) for part in values.split([1, 60, 39], dim=1)]
    total = parts[0] + parts[1] + parts[2]
    assert total.count == 100
    np.testing.assert_allclose(total.mean, values.numpy().mean(1), rtol=1e-14)
    np.testing.assert_allclose(total.squares / 100, values.numpy().var(1), rtol=1e-9)


def test_raw_quantiles_are_appended():
    raw = np.stack([np.arange(101.0).reshape(1, 1, 101), np.full((1, 1, 101), -7.0)])
    expected = np.arcsinh([5, 25, 50, 75, 95, -7, -7, -7, -7, -7])
    np.testing.assert_allclose(raw_quantiles(raw), expected)
    model, _ = sequence(3)
    image = draw(4, 4, 4)
    found = describe(model, image, raw=raw)
    np.testing.assert_array_equal(found[:6], describe(model, image))
    np.testing.assert_allclose(found[6:], expected)


def test_what_cannot_be_described():
    model, _ = sequence(3)
    image = draw(4, 4, 4)
    image[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        describe(model, image)
    with pytest.raises(DataError, match="not finite"):
        raw_quantiles(image.numpy())
    with pytest.raises(NetworkError, match="no norm"):
        describe(SegmentationNetwork(nn.Conv3d(2, 2, 1)), draw(4, 4, 4))
