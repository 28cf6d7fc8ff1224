"""The style losses by their formulas, what each one's gradient reaches, and that they teach."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from uharmony_model.alignment.style_autoencoder import (
    AutoencoderSettings,
    StyleAutoencoder,
    build_autoencoder,
)
from uharmony_model.alignment.style_losses import (
    DiscriminatorSettings,
    ImageDiscriminator,
    StylePasses,
    StyleWeights,
    build_discriminator,
    fake_term,
    fooling_term,
    random_contrast,
    real_term,
    reconstruction_losses,
    restyling_loss,
    weighted_sum,
)
from uharmony_model.errors import NetworkError, TrainingError
from uharmony_model.randomness import numpy_generator, torch_generator

TINY = AutoencoderSettings(features=2, blocks=1)


def normal(*shape: int, purpose: str = "test") -> Tensor:
    return torch.randn(shape, generator=torch_generator(0, purpose, *shape))


@pytest.fixture
def autoencoder() -> StyleAutoencoder:
    return build_autoencoder(TINY, seed=0)


@pytest.fixture
def discriminator() -> ImageDiscriminator:
    return build_discriminator(DiscriminatorSettings(features=2), seed=0, domain="b")


def reached(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_reconstruction_terms_by_their_formulas(autoencoder: StyleAutoencoder):
    x, t = normal(3, 1, 12, 10), normal(8, purpose="code")
    c, s = autoencoder.encode_content(x), autoencoder.encode_style(x)
    y = autoencoder.decode(c, t, (12, 10))
    again = autoencoder.encode_content(y)
    expected = {
        "self_reconstruction": (x - autoencoder.decode(c, s, (12, 10))).abs().mean(),
        "cycle": (x - autoencoder.decode(again, s, (12, 10))).abs().mean(),
        "content_code": (c - again).abs().mean(),
        "style_code": (t - autoencoder.encode_style(y)).abs().mean(),
    }
    found = reconstruction_losses(autoencoder, x, t)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_weights_are_the_sources():
    ones = {name: torch.tensor(1.0) for name in StyleWeights().model_dump()}
    sums = {name: weighted_sum({name: value}).item() for name, value in ones.items()}
    restyling = sums.pop("restyling")
    assert sums == {
        "self_reconstruction": 10,
        "cycle": 10,
        "content_code": 1,
        "style_code": 1,
        "fooling": 1,
    }
    assert weighted_sum(ones).item() == pytest.approx(sum(sums.values()) + restyling)
    assert weighted_sum(ones, StyleWeights(cycle=0, restyling=0)).item() == pytest.approx(13)
    for wrong in ({}, {"identity": torch.tensor(1.0)}):
        with pytest.raises(TrainingError, match="expected some of"):
            weighted_sum(wrong)


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("self_reconstruction", "content style decoder"),
        ("cycle", "content style decoder"),
        ("content_code", "content decoder"),  # by the foreign code: the own style has no part
        ("style_code", "content style decoder"),
        ("restyling", "content style decoder"),
    ],
)
def test_which_parts_a_terms_gradient_reaches(autoencoder: StyleAutoencoder, term: str, parts: str):
    x, t = normal(2, 1, 16, 16), normal(8, purpose="code").requires_grad_()
    terms = reconstruction_losses(autoencoder, x, t)
    terms["restyling"] = restyling_loss(autoencoder, x, numpy_generator(0, "test"))
    terms[term].backward()
    modules = {
        "content": autoencoder.content_encoder,
        "style": autoencoder.style_encoder,
        "decoder": autoencoder.decoder,
    }
    assert {name for name, module in modules.items() if reached(module)} == set(parts.split())
    assert t.grad is None  # received from another site: nothing goes back to it


def test_gradients_of_sites_add_up_to_those_of_all_slices():
    autoencoder = build_autoencoder(TINY, seed=0).double()
    t = normal(8, purpose="code").double()
    first, second = normal(1, 1, 8, 8).double(), normal(3, 1, 8, 8).double()

    def gradients(x: Tensor) -> list[Tensor]:
        loss = weighted_sum(reconstruction_losses(autoencoder, x, t))
        return list(torch.autograd.grad(loss, list(autoencoder.parameters())))

    pooled = gradients(torch.cat((first, second)))
    for one, other, both in zip(gradients(first), gradients(second), pooled, strict=True):
        assert torch.allclose((one + 3 * other) / 4, both, atol=1e-10)


def test_a_random_contrast_by_its_formula():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 6.0]).view(1, 1, 2, 3)
    drawn = numpy_generator(0, "curve").uniform(size=(1, 4))[0]
    expected = 6 * np.interp(np.array([0, 1, 2, 3, 4, 6]) / 2, np.arange(4), drawn)
    made = random_contrast(x, numpy_generator(0, "curve"))
    assert made.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_random_contrasts_invert_differ_by_slice_and_stay_in_the_range():
    x = torch.linspace(-2, 1, 64).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    made = random_contrast(x, numpy_generator(0, "test"))
    assert made.min() >= -2
    assert made.max() <= 1
    falls = made[:, 0, -1, -1] < made[:, 0, 0, 0]
    assert 0.3 < falls.float().mean() < 0.7
    assert len({m.sum().item() for m in made}) == 200
    flat = torch.full((2, 1, 4, 4), -1.0)
    assert torch.equal(random_contrast(flat, numpy_generator(0, "test")), flat)
    with pytest.raises(TrainingError, match="1 knots"):
        random_contrast(x, numpy_generator(0, "test"), knots=1)


def test_the_discriminators_halves_by_their_formulas(discriminator: ImageDiscriminator):
    x = normal(2, 1, 20, 18)
    fine, coarse = discriminator(x)
    assert (fine.shape, coarse.shape) == ((2, 1, 3, 3), (2, 1, 2, 2))
    one = ((fine - 1) ** 2).mean() + ((coarse - 1) ** 2).mean()
    zero = (fine**2).mean() + (coarse**2).mean()
    assert real_term(discriminator, x).item() == pytest.approx(one.item(), rel=1e-5)
    assert fooling_term(discriminator, x).item() == pytest.approx(one.item(), rel=1e-5)
    assert fake_term(discriminator, x).item() == pytest.approx(zero.item(), rel=1e-5)
    assert discriminator(normal(1, 1, 1, 5))[-1].isfinite().all()
    with pytest.raises(NetworkError, match="expected \\(B, 1, H, W\\)"):
        discriminator(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("term", "to_image", "to_discriminator"),
    [(real_term, False, True), (fake_term, False, True), (fooling_term, True, False)],
)
def test_either_the_slices_or_the_discriminator_learn(
    discriminator: ImageDiscriminator,
    term: Callable[[ImageDiscriminator, Tensor], Tensor],
    to_image: bool,
    to_discriminator: bool,
):
    x = normal(2, 1, 16, 16).requires_grad_()
    term(discriminator, x).backward()
    assert (x.grad is not None and bool(x.grad.any())) == to_image
    assert reached(discriminator) == to_discriminator


def test_halves_computed_at_two_sites_each_are_the_pooled_discriminators_gradient():
    discriminator = build_discriminator(DiscriminatorSettings(features=2), seed=0, domain="b")
    discriminator = discriminator.double()
    real = [normal(n, 1, 16, 16, purpose="real").double() for n in (1, 3)]
    fake = [normal(n, 1, 16, 16, purpose="fake").double() for n in (2, 5)]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(discriminator.parameters())))

    pooled = gradients(
        real_term(discriminator, torch.cat(real)) + fake_term(discriminator, torch.cat(fake))
    )
    by_site = [gradients(len(x) / 4 * real_term(discriminator, x)) for x in real]
    by_site += [gradients(len(x) / 7 * fake_term(discriminator, x)) for x in fake]
    for parts, whole in zip(zip(*by_site, strict=True), pooled, strict=True):
        assert torch.allclose(torch.stack(parts).sum(0), whole, atol=1e-10)


def test_first_values_of_a_discriminator_are_its_domains():
    settings = DiscriminatorSettings(features=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (build_discriminator(settings, seed=0, domain=d) for d in "aab")
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(m.parameters()) for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def discs(count: int, sign: float, *where: str) -> tuple[Tensor, Tensor]:
    """Discs of `sign` 0.8 on -0.8 `sign` with noise, (n, 1, 32, 32), and their masks."""
    draw = numpy_generator(0, "discs", *where)
    rows, columns = np.mgrid[:32, :32]
    images, masks = [], []
    for _ in range(count):
        row, column, radius = *draw.uniform(11, 21, 2), draw.uniform(5, 9)
        mask = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        images.append(sign * np.where(mask, 0.8, -0.8) + draw.normal(0, 0.05, mask.shape))
        masks.append(mask)
    return torch.tensor(np.array(images), dtype=torch.float32)[:, None], torch.tensor(
        np.array(masks)
    )[:, None]


def contrast(x: Tensor, mask: Tensor) -> float:
    """Mean of the discs less mean of what is around them."""
    return float(x[mask].mean() - x[~mask].mean())


@pytest.mark.slow
def test_two_sites_learn_to_show_each_others_contrast():
    """Each step is the sum of what either site computes on its own slices and a foreign code."""
    autoencoder = build_autoencoder(AutoencoderSettings(features=4, blocks=1), seed=0)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=5e-3, betas=(0.5, 0.9))
    sites = [discs(2, 1, "a")[0], discs(2, -1, "b")[0]]

    def codes() -> list[Tensor]:
        with torch.no_grad():
            return [autoencoder.encode_style(x).mean(0) for x in sites]

    first: list[float] = []
    last: list[float] = []
    for step in range(30):
        foreign = codes()[::-1]
        optimizer.zero_grad()
        for index, (x, code) in enumerate(zip(sites, foreign, strict=True)):
            passes = StylePasses.of(autoencoder, x, code)
            draw = numpy_generator(0, index, step, "contrast")
            terms = {**passes.losses(), "restyling": restyling_loss(autoencoder, x, draw)}
            weighted_sum(terms).backward()
            if step in (0, 29):
                (last if step else first).append(terms["self_reconstruction"].item())
        optimizer.step()
    assert max(last) < 0.5 * min(first)
    bright, mask = discs(8, 1, "unseen")
    with torch.no_grad():
        own, foreign_code = codes()
        rebuilt = contrast(autoencoder.translate(bright, own), mask)
        translated = contrast(autoencoder.translate(bright, foreign_code), mask)
    assert contrast(bright, mask) > 1.5
    assert rebuilt > 0.5
    # Half of the way to the other site's -1.6 is 0.
    assert translated < 0
