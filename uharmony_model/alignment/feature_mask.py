"""The local feature mask: more weight where the domains still differ.

    tanh        M = |tanh(D(f_t))|                  as in DAST's released code
    centred     M = min(relu(2 D(f_t) - 1), 1)      ours, the default
    masked      f_t <- (1 + strength * M) * f_t

D are the scores of `uharmony_model.alignment.discriminator`, near 1 where a place is surely of the
target, so poorly aligned. An undecided place, D = 1/2, has |tanh D| = 0.46: that mask never comes
near 0 on target features, and weighs a gap 1.76 against 1.46. The centred form spans 0 to 1, and is
0 where D takes the place for source-like.

The abstract of Global-Local Union Alignment (arXiv:2205.11888) names a local feature mask that
favours discriminative features with a larger domain gap; its formula is not known to us. That it is
DAST's discriminator attention (Yu et al. 2021, AAAI) is INFERRED. DAST lets the gradient pass
through the mask; detaching it, the centred form and the ramp are ours. Only features of the target
are masked. A mask is a map of a patient: it stays at its site, and in no record.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from uharmony_model.errors import ConfigError, TrainingError

RAMP = 0.1  # share of the training over which mask and adversarial weight grow

Form = Literal["centred", "tanh"]


def adversarial_mask(scores: Tensor, form: Form = "centred") -> Tensor:
    """The mask (B, 1, ...) in [0, 1] of the target's scores (B, 1, ...), detached.

    Raises:
        ConfigError: the form is not one of the two.
        TrainingError: there is more than one score a place.
    """
    if scores.ndim < 3 or scores.shape[1] != 1:
        raise TrainingError(
            f"scores of shape {tuple(scores.shape)}; expected (B, 1, ...), one a place"
        )
    values = scores.detach()
    if form == "tanh":
        return values.tanh().abs()
    if form == "centred":
        return (2 * values - 1).clamp(min=0, max=1)
    raise ConfigError(f"mask form {form!r}; expected centred or tanh")


def masked(features: Tensor, mask: Tensor, strength: float) -> Tensor:
    """Features (B, C, ...), each place multiplied by 1 + strength * mask (B, 1, ...).

    Raises:
        TrainingError: the mask is of another batch or grid.
    """
    if mask.shape != (features.shape[0], 1, *features.shape[2:]):
        raise TrainingError(
            f"a mask of shape {tuple(mask.shape)} on features of shape {tuple(features.shape)}; "
            "expected one channel on the same grid"
        )
    return features * (1 + strength * mask.to(features.dtype))


def mask_ramp(progress: float, share: float = RAMP) -> float:
    """Strength of the mask at `progress` t/T: from 0 straight to 1 over the first `share`.

    A discriminator that was just made knows nothing; until it does, its mask is noise. Ours; DAST
    has none.

    Raises:
        ConfigError: progress is outside [0, 1], or the share outside (0, 1].
    """
    if not 0 <= progress <= 1 or not 0 < share <= 1:
        raise ConfigError(
            f"progress {progress} and a ramp of {share}; expected [0, 1] and above 0 to 1"
        )
    return min(progress / share, 1.0)
