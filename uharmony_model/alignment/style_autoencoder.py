"""Content and style of a slice apart, so that one site's anatomy can be shown in another's style.

    c = E_c(x) (B, 4f, h/4, w/4)    s = E_s(x) (B, S)    x_hat = G(c, s)
    translation of a slice of a into the style of b: x_ab = G(E_c(x_a), s_b)
    AdaIN(z; gamma, beta) = (1 + gamma) (z - mean) / sqrt(var + eps) + beta;  gamma, beta = MLP(s)

The style transfer of a GLUA-style method, after the abstract of Su et al. 2022 (arXiv:2205.11888),
whose own network is not known to us. The layout follows what the public code of DAR-UNet (Yao et
al. 2022, by the same group) does: 2D slices, one content encoder for all domains (7x7, two 4x4 with
stride 2, residual blocks, instance norms), a style code of S = 8 numbers, one decoder whose
instance norms take weight and bias from the code, with 1 added to the weight.

Ours: one style encoder for all sites, where that code has one a domain (codes of private encoders
cannot be compared), without norms, which would take off the very mean and contrast that are style;
no tanh at the output, since a z-scored image is not bounded either; f = 16 features where that code
has 32; sizes that are no multiple of 4 (slices are continued by their least value, then cropped).

Contents and style codes of slices stay at the site: the decoder makes images of them.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from uharmony_model.errors import ConfigError, NetworkError
from uharmony_model.frozen import Frozen
from uharmony_model.instance_affine import affine
from uharmony_model.randomness import seed_for

EPS = 1e-5
_SLOPE = 0.2  # of the leaky rectifiers
_MULTIPLE = 4  # of two halvings
_LEAST = 8  # voxels: below, an instance norm of the content would see one value


class AutoencoderSettings(Frozen):
    """Width, style numbers and residual blocks (in the encoder, and again in the decoder)."""

    features: PositiveInt = 16
    style_dim: PositiveInt = 8
    blocks: PositiveInt = 4


class StyleAutoencoder(nn.Module):
    """Encoders of content and of style, and the decoder of both, for slices (B, 1, H, W).

    Its first values come from torch's global generator; `build_autoencoder` seeds them.
    """

    def __init__(self, settings: AutoencoderSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or AutoencoderSettings()
        self.content_encoder = _content_encoder(self.settings)
        self.style_encoder = _StyleEncoder(self.settings)
        self.decoder = _Decoder(self.settings)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=_SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode_content(self, x: Tensor) -> Tensor:
        """Content (B, 4f, h/4, w/4) of slices (B, 1, H, W), h and w being H and W padded.

        Raises:
            NetworkError: x is not (B, 1, H, W).
        """
        content: Tensor = self.content_encoder(_padded(_slices(x)))
        return content

    def encode_style(self, x: Tensor) -> Tensor:
        """Style codes (B, S) of slices (B, 1, H, W).

        Raises:
            NetworkError: x is not (B, 1, H, W).
        """
        code: Tensor = self.style_encoder(_slices(x))
        return code

    def decode(self, content: Tensor, code: Tensor, size: tuple[int, int]) -> Tensor:
        """Slices (B, 1, H, W) of `size` (H, W) from content and `code` (S,), (1, S) or (B, S).

        Raises:
            NetworkError: the code fits neither one style nor one for each slice.
        """
        batch, style_dim = len(content), self.settings.style_dim
        codes = code[None] if code.ndim == 1 else code
        if codes.ndim != 2 or codes.shape[1] != style_dim or len(codes) not in (1, batch):
            raise NetworkError(
                f"style code {tuple(code.shape)}, expected ({style_dim},) or one for each of "
                f"{batch} slices"
            )
        image: Tensor = self.decoder(content, codes.expand(batch, -1))
        return image[..., : size[0], : size[1]]

    def translate(self, x: Tensor, code: Tensor) -> Tensor:
        """Slices (B, 1, H, W) with the content of `x` in the style of `code` (S,) or (B, S).

        Raises:
            NetworkError: shapes do not fit.
        """
        return self.decode(self.encode_content(x), code, (x.shape[-2], x.shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """Slices (B, 1, H, W) rebuilt from their own content and style."""
        return self.translate(x, self.encode_style(x))


def build_autoencoder(
    settings: AutoencoderSettings | None = None, *, seed: int
) -> StyleAutoencoder:
    """The autoencoder with first values drawn from the study's `seed`, equal at every site."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            seed_for(seed, "style autoencoder")
        )  # leaves CUDA alone
        return StyleAutoencoder(settings)


def adain(z: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Instance norm of `z (B, C, H, W)` with weight `1 + gamma` and bias `beta`, both (B, C).

    Huang and Belongie 2017, equation 8, with weight and bias from a code. Half precision is raised
    to float32 here: its variance is no variance.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    return affine(z.to(dtype).contiguous(), 1 + gamma.to(dtype), beta.to(dtype), EPS).to(z.dtype)


def slices_of(image: Tensor, axis: int) -> Tensor:
    """The slices (C * N, 1, h, w) of `image (C, D, H, W)` across `axis`: 1, 2 or 3 of its axes.

    Take the axis with the largest spacing: slices of stored RAS volumes are axial across 3.

    Raises:
        ConfigError: it is no axis of space, or the image has another number of axes.
    """
    if image.ndim != 4 or axis not in (1, 2, 3):
        raise ConfigError(
            f"image {tuple(image.shape)}, axis {axis}; expected (C, D, H, W) and axis 1, 2 or 3"
        )
    return image.movedim(axis, 1).flatten(0, 1)[:, None]


@torch.no_grad()
def translate_volume(
    autoencoder: StyleAutoencoder, image: Tensor, code: Tensor, axis: int, *, batch: int = 8
) -> Tensor:
    """`image (C, D, H, W)` in the style of one `code` (S,) for all its slices across `axis`.

    One code keeps neighbouring slices alike, as DAR-UNet's code does. `batch` slices pass at once.

    Raises:
        ConfigError: the axis is none of space, the batch is empty, or there is more than one code.
        NetworkError: the code has another number of numbers than S.
    """
    slices, device = slices_of(image, axis), next(autoencoder.parameters()).device
    if code.ndim != 1 or batch < 1:
        raise ConfigError(
            f"style code {tuple(code.shape)}, batch {batch}; expected one code for all slices and "
            "at least one slice at once"
        )
    made = [
        autoencoder.translate(piece.to(device), code.to(device)).to(image.device)
        for piece in slices.split(batch)
    ]
    moved = image.movedim(axis, 1)
    return torch.cat(made).view(moved.shape).movedim(1, axis).contiguous()


def middle_slices(channel: Tensor, axis: int, middle: float = 4 / 6) -> Tensor:
    """The middle slices (N', 1, h, w) of `channel (1, D, H, W)` across `axis`.

    DAR-UNet's code takes the middle four sixths, where there is something to see.

    Raises:
        ConfigError: there is more than one channel, `axis` is none of space, or the share is not
            in (0, 1].
    """
    slices = slices_of(channel, axis)
    if len(channel) != 1 or not 0 < middle <= 1:
        raise ConfigError(
            f"channel {tuple(channel.shape)}, middle {middle}; expected (1, D, H, W) and a share "
            "above 0, at most 1"
        )
    kept = max(1, round(middle * len(slices)))
    first = (len(slices) - kept) // 2
    return slices[first : first + kept]


@torch.no_grad()
def volume_styles(
    autoencoder: StyleAutoencoder, channel: Tensor, axis: int, *, middle: float = 4 / 6
) -> Tensor:
    """Style codes (N', S) of a volume's middle slices; `channel (1, D, H, W)`, across `axis`.

    Raises:
        ConfigError: see `middle_slices`.
    """
    device = next(autoencoder.parameters()).device
    pieces = middle_slices(channel, axis, middle).split(1)
    return torch.cat([autoencoder.encode_style(piece.to(device)).cpu() for piece in pieces])


class _ResidualBlock(nn.Module):
    """Norm, rectifier, convolution, twice; `out / sqrt 2`. Norms of content, or AdaIN."""

    def __init__(self, channels: int, *, styled: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            nn.Identity() if styled else nn.InstanceNorm2d(channels, eps=EPS, affine=True)
            for _ in range(2)
        )
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, styles: tuple[tuple[Tensor, Tensor], ...] = ()) -> Tensor:
        z = x
        for index, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            z = adain(z, *styles[index]) if styles else norm(z)
            z = conv(F.leaky_relu(z, _SLOPE))
        return (x + z) / math.sqrt(2)


def _content_encoder(settings: AutoencoderSettings) -> nn.Sequential:
    widths = [1] + [settings.features << level for level in range(3)]
    layers: list[nn.Module] = []
    for level, (before, after) in enumerate(pairwise(widths)):
        kernel, stride, padding = (4, 2, 1) if level else (7, 1, 3)
        layers += [
            nn.Conv2d(before, after, kernel, stride, padding),
            nn.InstanceNorm2d(after, eps=EPS, affine=True),
            nn.LeakyReLU(_SLOPE),
        ]
    blocks = [_ResidualBlock(widths[-1], styled=False) for _ in range(settings.blocks)]
    return nn.Sequential(*layers, *blocks)


class _StyleEncoder(nn.Module):
    """Strided convolutions without norms, mean over the slice, S numbers."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__()
        widths = [settings.features << level for level in (0, 1, 2, 2, 2)]
        layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 7, padding=3), nn.LeakyReLU(_SLOPE)]
        for before, after in pairwise(widths):
            # 3x3 halves any size down to one, where the source's 4x4 ends at small slices.
            layers += [nn.Conv2d(before, after, 3, 2, padding=1), nn.LeakyReLU(_SLOPE)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], settings.style_dim)

    def forward(self, x: Tensor) -> Tensor:
        code: Tensor = self.head(self.layers(x).mean((2, 3)))
        return code


class _Decoder(nn.Module):
    """Residual blocks and two upsamplings; every norm takes its weight and bias from the code."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__()
        f, deep = settings.features, 4 * settings.features
        self.widths = (*(deep,) * (2 * settings.blocks + 1), 2 * f, f)
        self.mlp = nn.Sequential(
            nn.Linear(settings.style_dim, deep),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(deep, 2 * deep),
            nn.LeakyReLU(_SLOPE),
            nn.Linear(2 * deep, 2 * sum(self.widths)),
        )
        self.blocks = nn.ModuleList(
            _ResidualBlock(deep, styled=True) for _ in range(settings.blocks)
        )
        self.ups = nn.ModuleList(
            nn.Conv2d(before, after, 5, padding=2) for before, after in ((deep, 2 * f), (2 * f, f))
        )
        self.out = nn.Conv2d(f, 1, 7, padding=3)

    def forward(self, content: Tensor, code: Tensor) -> Tensor:
        gammas, betas = self.mlp(code).chunk(2, dim=1)
        styles = tuple(zip(gammas.split(self.widths, 1), betas.split(self.widths, 1), strict=True))
        z = content
        for index, block in enumerate(self.blocks):
            z = block(z, styles[2 * index : 2 * index + 2])
        z = adain(z, *styles[2 * len(self.blocks)])
        for conv, style in zip(self.ups, styles[2 * len(self.blocks) + 1 :], strict=True):
            z = conv(F.interpolate(z, scale_factor=2.0, mode="nearest"))
            z = F.leaky_relu(adain(z, *style), _SLOPE)
        image: Tensor = self.out(z)
        return image


def _slices(x: Tensor) -> Tensor:
    if x.ndim != 4 or x.shape[1] != 1:
        raise NetworkError(f"slices {tuple(x.shape)}, expected (B, 1, H, W)")
    return x


def _padded(x: Tensor) -> Tensor:
    """Slices continued by their least value to multiples of 4, at least 8."""
    height, width = (
        max(_LEAST, math.ceil(edge / _MULTIPLE) * _MULTIPLE) - edge for edge in x.shape[2:]
    )
    if not (height or width):
        return x
    least = x.amin((2, 3), keepdim=True)
    return F.pad(x - least, (0, width, 0, height)) + least
