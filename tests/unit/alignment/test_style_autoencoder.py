"""The style autoencoder's shapes, its norm against torch's, and volumes slice by slice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from uharmony_model.alignment.style_autoencoder import (
    AutoencoderSettings,
    StyleAutoencoder,
    adain,
    build_autoencoder,
    slices_of,
    translate_volume,
    volume_styles,
)
from uharmony_model.errors import ConfigError, NetworkError
from uharmony_model.randomness import torch_generator

TINY = AutoencoderSettings(features=2, blocks=1)


def normal(*shape: int, purpose: str = "test") -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(0, purpose, *shape))


@pytest.fixture(scope="module")
def autoencoder() -> StyleAutoencoder:
    return build_autoencoder(TINY, seed=0)


def test_adain_without_a_style_is_instance_norm():
    z = 3 * normal(2, 5, 7, 6) + 2
    nothing = torch.zeros(2, 5)
    assert torch.allclose(adain(z, nothing, nothing), F.instance_norm(z, eps=1e-5), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adain_by_its_formula(dtype: torch.dtype):
    z, gamma, beta = (
        normal(*shape, purpose=name).to(dtype)
        for shape, name in (((2, 3, 4, 5), "z"), ((2, 3), "gamma"), ((2, 3), "beta"))
    )
    made = adain(z, gamma, beta)
    assert made.dtype == dtype
    for b in range(2):
        for c in range(3):
            plane = z[b, c]
            standard = (plane - plane.mean()) / (plane.var(unbiased=False) + 1e-5).sqrt()
            expected = (1 + gamma[b, c]) * standard + beta[b, c]
            assert torch.allclose(made[b, c], expected, atol=1e-5)


def test_the_variance_of_half_precision_is_taken_in_single():
    z = (600 + 100 * normal(1, 2, 8, 8)).half()  # squares are beyond half precision
    nothing = torch.zeros(1, 2).half()
    made = adain(z, nothing, nothing)
    assert made.dtype == torch.half
    assert torch.allclose(made.float(), F.instance_norm(z.float()), atol=2e-3)


def test_layout_of_the_source_at_its_own_width():
    wide = StyleAutoencoder(AutoencoderSettings(features=32))
    norms = 2 * (4 * 2 * 128 + 128 + 64 + 32)
    assert norms == 2496  # as counted in DAR-UNet's decoder
    assert wide.decoder.mlp(torch.zeros(1, 8)).shape == (1, norms)
    assert wide.encode_content(torch.zeros(1, 1, 16, 24)).shape == (1, 128, 4, 6)
    assert wide.encode_style(torch.zeros(3, 1, 16, 24)).shape == (3, 8)


@pytest.mark.parametrize("size", [(32, 32), (30, 33), (5, 9), (1, 3), (17, 8)])
def test_any_size_comes_back(autoencoder: StyleAutoencoder, size: tuple[int, int]):
    x = normal(2, 1, *size)
    made = autoencoder.translate(x, torch.zeros(8))
    assert made.shape == x.shape
    assert made.isfinite().all()
    assert autoencoder(x).shape == x.shape


def test_slices_are_continued_by_their_least_value(autoencoder: StyleAutoencoder):
    x = normal(2, 1, 14, 15)
    by_hand = x.amin((2, 3), keepdim=True).repeat(1, 1, 16, 16)
    by_hand[..., :14, :15] = x
    content = autoencoder.encode_content(x)
    assert torch.allclose(content, autoencoder.encode_content(by_hand), atol=1e-5)


def test_one_code_for_all_slices_is_that_code_for_each(autoencoder: StyleAutoencoder):
    x, code = normal(3, 1, 8, 8), normal(8, purpose="code")
    made = autoencoder.translate(x, code)
    assert torch.equal(made, autoencoder.translate(x, code[None]))
    assert torch.equal(made, autoencoder.translate(x, code.repeat(3, 1)))
    for one, slice_ in zip(made, x, strict=True):
        assert torch.allclose(one[None], autoencoder.translate(slice_[None], code), atol=1e-5)


def test_codes_of_slices_are_not_mixed_up(autoencoder: StyleAutoencoder):
    x, codes = normal(1, 1, 8, 8).repeat(2, 1, 1, 1), 3 * normal(2, 8, purpose="codes")
    made = autoencoder.translate(x, codes)
    assert torch.allclose(made[1:], autoencoder.translate(x[:1], codes[1]), atol=1e-5)
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_style_sees_the_contrast_that_content_does_not(autoencoder: StyleAutoencoder):
    x = normal(1, 1, 32, 32)
    # Without bias a slice of twice the contrast is twice as large behind the first convolution;
    # an instance norm takes that off, but for its epsilon.
    contents = autoencoder.encode_content(x), autoencoder.encode_content(2 * x)
    assert torch.allclose(*contents, atol=1e-2)
    styles = autoencoder.encode_style(x), autoencoder.encode_style(2 * x)
    assert torch.allclose(2 * styles[0], styles[1], atol=1e-4)
    assert (styles[0] - styles[1]).abs().max() > 0.01


def test_shapes_that_do_not_fit(autoencoder: StyleAutoencoder):
    for call in (autoencoder.encode_content, autoencoder.encode_style):
        with pytest.raises(NetworkError, match="expected \\(B, 1, H, W\\)"):
            call(torch.zeros(1, 2, 8, 8))
    for code in (torch.zeros(7), torch.zeros(2, 8), torch.zeros(1, 1, 8)):
        with pytest.raises(NetworkError, match="style code"):
            autoencoder.translate(torch.zeros(3, 1, 8, 8), code)


def test_first_values_are_the_seeds_and_torchs_generator_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (build_autoencoder(TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = [
        (a, b, c) for a, b, c in zip(*(m.parameters() for m in (first, same, other)), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_slices_lie_across_the_axis(axis: int):
    image = normal(2, 3, 4, 5)
    slices = slices_of(image, axis)
    n = image.shape[axis]
    assert len(slices) == 2 * n
    for c in range(2):
        for k in range(n):
            assert torch.equal(slices[c * n + k, 0], image[c].select(axis - 1, k))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_volume_is_translated_slice_by_slice(autoencoder: StyleAutoencoder, axis: int):
    image, code = normal(2, 5, 6, 9), normal(8, purpose="code")
    made = translate_volume(autoencoder, image, code, axis, batch=3)
    assert made.shape == image.shape
    assert not made.requires_grad
    for c in range(2):
        for k in range(image.shape[axis]):
            slice_ = image[c].select(axis - 1, k)[None, None]
            expected = autoencoder.translate(slice_, code)[0, 0]
            assert torch.allclose(made[c].select(axis - 1, k), expected, atol=1e-5)


def test_no_more_slices_pass_at_once_than_asked_for():
    seen: list[int] = []
    autoencoder = build_autoencoder(TINY, seed=0)
    autoencoder.content_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    translate_volume(autoencoder, torch.zeros(1, 8, 8, 7), torch.zeros(8), 3, batch=3)
    assert seen == [3, 3, 1]


def test_a_volumes_styles_are_those_of_its_middle_slices(autoencoder: StyleAutoencoder):
    channel = normal(1, 6, 6, 12)
    codes = volume_styles(autoencoder, channel, 3)
    expected = torch.cat([autoencoder.encode_style(channel[None, ..., k]) for k in range(2, 10)])
    assert torch.allclose(codes, expected, atol=1e-5)
    assert not codes.requires_grad
    assert len(volume_styles(autoencoder, channel, 3, middle=1.0)) == 12
    assert len(volume_styles(autoencoder, channel, 3, middle=0.01)) == 1


def test_volumes_that_cannot_be_translated(autoencoder: StyleAutoencoder):
    image, code = torch.zeros(1, 4, 4, 4), torch.zeros(8)
    for axis in (0, 4, -1):
        with pytest.raises(ConfigError, match="axis 1, 2 or 3"):
            translate_volume(autoencoder, image, code, axis)
    with pytest.raises(ConfigError, match="batch 0; expected"):
        translate_volume(autoencoder, image, code, 1, batch=0)
    with pytest.raises(ConfigError, match="expected one code for all slices"):
        translate_volume(autoencoder, image, torch.zeros(4, 8), 1)
    with pytest.raises(NetworkError, match="style code"):
        translate_volume(autoencoder, image, torch.zeros(7), 1)
    with pytest.raises(ConfigError, match="a share above 0"):
        volume_styles(autoencoder, torch.zeros(2, 4, 4, 4), 1)
    with pytest.raises(ConfigError, match="a share above 0"):
        volume_styles(autoencoder, image, 1, middle=0.0)
