"""What may leave a site as its style: a low-frequency amplitude averaged over patients.

    S = sum_p S_p / n,    S_p = mean of A over the patches of patient p

The patch is that of `uharmony_model.unlabelled.amplitude`. FedDG (Liu et al. 2021,
arXiv:2103.06030) shares the same kind of patch for every single image. Ours: only the mean over
at least `MIN_PATIENTS` patients is given out, each patient counts once however many patches it
gave, and what another site sent is bounded before it is used. The mean carries no differential
privacy: it hides a patient among the others, no more. Two means that differ by one patient give
that patient away, so a site keeps what it made once and sends the same again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uharmony_model.errors import ConfigError, DataError, ExchangeError
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.prototypes import MIN_PATIENTS as MIN_PATIENTS

AMPLITUDE = "amplitude"
"""The name of the one tensor of a style's payload."""

MAX_AMPLITUDE = 16.0
"""Largest amplitude taken from another site, in units of the normalised image.

No amplitude exceeds the mean distance of the image from its floor: 2 within [-1, 1]; the rest is
room for z-scored images.
"""

SYMMETRY_TOLERANCE = 1e-3
"""Largest difference of the bins k and -k, as a share of the style's largest amplitude."""


class StyleSum:
    """The amplitudes of a site's patients, as they come; nothing of a single one is given out.

    Sums are in float64 and added up in the order of the patients' names, so the order in which
    patients come does not change a bit.
    """

    def __init__(self, channels: int, half_width: int) -> None:
        """For patches of `channels` channels and boxes of half-width b.

        Raises:
            ConfigError: there is no channel, or the half-width is negative.
        """
        self._shape = _style_shape(channels, half_width)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def patients(self) -> int:
        """How many patients gave at least one patch."""
        return len(self._sums)

    def add(self, patient: str, amplitude: Tensor) -> None:
        """Add patches of one patient, `amplitude (n, C, 2b+1, 2b+1, 2b+1)`, at once or in parts.

        Raises:
            ConfigError: the patches are of another shape, or there is none.
            DataError: an amplitude is negative or not finite.
        """
        if tuple(amplitude.shape[1:]) != self._shape or len(amplitude) == 0:
            raise ConfigError(
                f"amplitudes {tuple(amplitude.shape)}, expected (n, *{self._shape}) with n > 0; "
                "take them from low_amplitude with the half-width of the sum"
            )
        exact = amplitude.detach().to("cpu", torch.float64)
        if not bool((torch.isfinite(exact) & (exact >= 0)).all()):
            raise DataError(
                "an amplitude is negative or not finite, expected finite numbers of at least 0; "
                "check the site's images with its doctor"
            )
        total = exact.sum(0)
        before = self._sums.get(patient)
        self._sums[patient] = total if before is None else before + total
        self._counts[patient] = self._counts.get(patient, 0) + len(exact)

    def mean(self, min_patients: int = MIN_PATIENTS) -> Tensor:
        """The mean over patients `(C, 2b+1, 2b+1, 2b+1)`, float32.

        Raises:
            ConfigError: there are fewer patients than `min_patients`.
        """
        if self.patients < max(1, min_patients):
            raise ConfigError(
                f"a style of {self.patients} patients, expected at least {max(1, min_patients)}; "
                "one of so few can tell of a single patient: add patients, or give no style"
            )
        total = torch.zeros(self._shape, dtype=torch.float64)
        for patient in sorted(self._sums):
            total += self._sums[patient] / self._counts[patient]
        return (total / self.patients).float()


def check_style(style: Tensor, channels: int, half_width: int) -> None:
    """Refuse what cannot be the mean amplitude of normalised images.

    Raises:
        ExchangeError: another type or shape, a number that is not finite, negative or above
            `MAX_AMPLITUDE`, or bins k and -k that differ.
    """
    expected = _style_shape(channels, half_width)
    if tuple(style.shape) != expected or style.dtype != torch.float32:
        raise ExchangeError(
            f"style is {tuple(style.shape)} {style.dtype}, expected {expected} torch.float32; "
            "it was made under another study"
        )
    if not bool(torch.isfinite(style).all()):
        raise ExchangeError("style holds numbers that are not finite; it is not used")
    low, high = float(style.min()), float(style.max())
    if low < 0 or high > MAX_AMPLITUDE:
        raise ExchangeError(
            f"style spans {low:.4g} to {high:.4g}, expected 0 to {MAX_AMPLITUDE:g}; it is not used"
        )
    apart = float((style - style.flip((-3, -2, -1))).abs().max())
    if apart > SYMMETRY_TOLERANCE * high:
        raise ExchangeError(
            f"style differs by {apart:.4g} between frequencies k and -k, expected at most "
            f"{SYMMETRY_TOLERANCE * high:.4g}: it is no amplitude of real images and is not used"
        )


def style_schema(channels: int, half_width: int) -> Schema:
    """The one tensor of a style's payload: its mean amplitude.

    Raises:
        ConfigError: there is no channel, or the half-width is negative.
    """
    shape = _style_shape(channels, half_width)
    return Schema(tensors=(TensorSpec(name=AMPLITUDE, shape=shape),))


def _style_shape(channels: int, half_width: int) -> tuple[int, int, int, int]:
    if channels < 1 or half_width < 0:
        raise ConfigError(
            f"style of {channels} channels and half-width {half_width}, expected at least 1 and 0; "
            "take both from the study's task and patch size"
        )
    side = 2 * half_width + 1
    return channels, side, side, side
