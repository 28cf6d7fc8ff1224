"""What a style autoencoder learns from, each term computable at one site from its own slices.

    x own slice, c = E_c(x), s = E_s(x);  t a foreign style code;  y = G(c, t)
    self-reconstruction   mean |x - G(c, s)|                  weight 10
    cycle                 mean |x - G(E_c(y), s)|             weight 10
    content code          mean |c - E_c(y)|                   weight 1
    style code            mean |t - E_s(y)|                   weight 1
    restyling (ours)      mean |x - G(E_c(r(x)), s)|          weight 10, r a random contrast
    image GAN (LSGAN), summed over scales                     weight 1
        real    mean (D(x) - 1)^2   at the site whose style D knows
        fake    mean  D(y)^2        at the site that made y
        fooling mean (D(y) - 1)^2   at the site that made y, for E_c and G; D rests

For the global stage of a GLUA-style method, after the abstract of Su et al. 2022
(arXiv:2205.11888). Formulas and weights are those of DAR-UNet's public code (Yao et al. 2022),
where x and t come from two domains in one process and both directions are summed. Ours is the cut
by site: no term holds slices of two sites, only a code t, so the gradients of sites add up to those
of all slices together. There t is the code of a foreign slice and has a gradient; here it is
received, and has none. As there, the content c that E_c(y) is compared with is not detached. Left
out are its content GAN, and the norms of its discriminator.

The first four do not make the content free of contrast. On discs that are bright at one site and
dark at the other (those of this file's test, 40 to 56 steps, three seeds) neither they nor the GAN
beside them turned the contrast of y; with the restyling term it turned every time. It needs no
other site: a slice has to be rebuilt from the content of itself under another contrast, so the
contrast can only come from its style code. That is a toy; real modalities differ in more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from uharmony_model.alignment.style_autoencoder import StyleAutoencoder
from uharmony_model.errors import NetworkError, TrainingError
from uharmony_model.frozen import Frozen
from uharmony_model.randomness import seed_for

_SLOPE = 0.2


class StyleWeights(Frozen):
    """Weights of the losses; the defaults are DAR-UNet's, but for restyling, which is ours."""

    self_reconstruction: NonNegativeFloat = 10.0
    cycle: NonNegativeFloat = 10.0
    content_code: NonNegativeFloat = 1.0
    style_code: NonNegativeFloat = 1.0
    restyling: NonNegativeFloat = 10.0
    fooling: NonNegativeFloat = 1.0


@dataclass(frozen=True, eq=False)
class StylePasses:
    """Own slices `x (B, 1, H, W)` through the autoencoder: as they are, in a foreign style, back.

    `rebuilt`, `translated`, `back` (B, 1, H, W); `content`, `content_again` (B, 4f, h, w);
    `foreign`, `style_again` (B, S).
    """

    x: Tensor
    rebuilt: Tensor
    translated: Tensor
    back: Tensor
    content: Tensor
    content_again: Tensor
    foreign: Tensor
    style_again: Tensor

    @classmethod
    def of(cls, autoencoder: StyleAutoencoder, x: Tensor, foreign_code: Tensor) -> StylePasses:
        """The passes of `x (B, 1, H, W)` with a foreign code (S,) or one a slice (B, S).

        Raises:
            NetworkError: shapes do not fit.
        """
        size = (x.shape[-2], x.shape[-1])
        foreign = foreign_code.detach()
        content, style = autoencoder.encode_content(x), autoencoder.encode_style(x)
        translated = autoencoder.decode(content, foreign, size)
        content_again = autoencoder.encode_content(translated)
        return cls(
            x=x,
            rebuilt=autoencoder.decode(content, style, size),
            translated=translated,
            back=autoencoder.decode(content_again, style, size),
            content=content,
            content_again=content_again,
            foreign=foreign.expand(style.shape),
            style_again=autoencoder.encode_style(translated),
        )

    def losses(self) -> dict[str, Tensor]:
        """The four reconstruction terms, without their weights, by the names of `StyleWeights`."""
        return {
            "self_reconstruction": F.l1_loss(self.rebuilt, self.x),
            "cycle": F.l1_loss(self.back, self.x),
            "content_code": F.l1_loss(self.content_again, self.content),
            "style_code": F.l1_loss(self.style_again, self.foreign),
        }


def reconstruction_losses(
    autoencoder: StyleAutoencoder, x: Tensor, foreign_code: Tensor
) -> dict[str, Tensor]:
    """The four reconstruction terms of one site's `x (B, 1, H, W)` and a foreign code.

    Raises:
        NetworkError: shapes do not fit.
    """
    return StylePasses.of(autoencoder, x, foreign_code).losses()


def restyling_loss(
    autoencoder: StyleAutoencoder, x: Tensor, generator: np.random.Generator
) -> Tensor:
    """Own slices `x (B, 1, H, W)` rebuilt from their content under a random contrast. Ours.

    Raises:
        NetworkError: shapes do not fit.
    """
    style = autoencoder.encode_style(x)
    content = autoencoder.encode_content(random_contrast(x, generator))
    return F.l1_loss(autoencoder.decode(content, style, (x.shape[-2], x.shape[-1])), x)


def random_contrast(x: Tensor, generator: np.random.Generator, knots: int = 4) -> Tensor:
    """Slices `x (B, 1, H, W)`, each through a curve of its own within its own range.

    Piecewise linear through `knots` evenly spaced intensities with uniform values; it may rise and
    fall, so bright and dark change places and tissues can fall together. Geometry stays.

    Raises:
        TrainingError: there are fewer than two knots.
    """
    if knots < 2:
        raise TrainingError(f"a random contrast of {knots} knots, expected at least 2")
    least = x.amin((1, 2, 3), keepdim=True)
    width = x.amax((1, 2, 3), keepdim=True) - least
    drawn = torch.from_numpy(generator.uniform(size=(len(x), knots))).to(x)
    place = (x - least) / torch.where(width > 0, width, 1.0) * (knots - 1)
    segment = place.floor().clamp(0, knots - 2).long()
    low = drawn.gather(1, segment.flatten(1)).view_as(x)
    high = drawn.gather(1, segment.flatten(1) + 1).view_as(x)
    return least + width * torch.lerp(low, high, place - segment)


def weighted_sum(losses: Mapping[str, Tensor], weights: StyleWeights | None = None) -> Tensor:
    """The terms, by the names of `StyleWeights`, times their weights.

    Raises:
        TrainingError: there is no term, or one without a weight.
    """
    chosen = (weights or StyleWeights()).model_dump()
    unknown = sorted(set(losses) - set(chosen))
    if unknown or not losses:
        raise TrainingError(f"style losses {sorted(losses)}; expected some of {sorted(chosen)}")
    return torch.stack([chosen[name] * losses[name] for name in sorted(losses)]).sum()


class DiscriminatorSettings(Frozen):
    """Width, halvings and scales; DAR-UNet's code has 32, 5 and 3."""

    features: PositiveInt = 16
    halvings: PositiveInt = 3
    scales: PositiveInt = 2


class ImageDiscriminator(nn.Module):
    """Whether parts of a slice look like a site's: one map a scale, for slices (B, 1, H, W)."""

    def __init__(self, settings: DiscriminatorSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or DiscriminatorSettings()
        self.scales = nn.ModuleList(
            _judge(self.settings.features, self.settings.halvings)
            for _ in range(self.settings.scales)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps (B, 1, h, w), finest first; every scale halves the slice.

        Raises:
            NetworkError: x is not (B, 1, H, W).
        """
        if x.ndim != 4 or x.shape[1] != 1:
            raise NetworkError(f"slices {tuple(x.shape)}, expected (B, 1, H, W)")
        maps = []
        for index, judge in enumerate(self.scales):
            if index:
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            maps.append(judge(x))
        return maps


def build_discriminator(
    settings: DiscriminatorSettings | None = None, *, seed: int, domain: str
) -> ImageDiscriminator:
    """The discriminator of one domain's style, first values drawn from the study's `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, domain, "style discriminator"))
        return ImageDiscriminator(settings)


def real_term(discriminator: ImageDiscriminator, x: Tensor) -> Tensor:
    """The half of D's loss that the site of the style computes, on its own `x (B, 1, H, W)`."""
    return _distance(discriminator(x.detach()), 1.0)


def fake_term(discriminator: ImageDiscriminator, translated: Tensor) -> Tensor:
    """The half of D's loss that a site computes on what it `translated (B, 1, H, W)`.

    A site that steps on one half alone drives D to a constant: sum the gradients of both halves
    over the sites, then step.
    """
    return _distance(discriminator(translated.detach()), 0.0)


def fooling_term(discriminator: ImageDiscriminator, translated: Tensor) -> Tensor:
    """What the autoencoder pays for `translated (B, 1, H, W)` that D tells from real slices.

    The gradient reaches the slices and not D.
    """
    resting = {name: value.detach() for name, value in discriminator.named_parameters()}
    return _distance(functional_call(discriminator, resting, (translated,)), 1.0)


def _distance(maps: list[Tensor], goal: float) -> Tensor:
    return torch.stack([(m - goal).square().mean() for m in maps]).sum()


def _judge(features: int, halvings: int) -> nn.Sequential:
    widths = [1] + [features << min(level, 3) for level in range(halvings)]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1), nn.LeakyReLU(_SLOPE)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))
