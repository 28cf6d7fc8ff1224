"""Step 7 of the data's way: what this site allows to leave, and what it does to an update first.

A study that asks for more than the policy allows is refused before the site joins. The limits
are the site's own: no study can widen them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, field_validator

from uharmony_model.errors import ConfigError, ExchangeError
from uharmony_model.evaluation_settings import METRICS, Metric
from uharmony_model.exchange_settings import Publishable
from uharmony_model.frozen import Frozen
from uharmony_model.methods import Part
from uharmony_model.schedule import publication_due
from uharmony_model.study import Study
from uharmony_model.training_settings import CANDIDATES
from uharmony_model.unlabelled_settings import Statistic

if TYPE_CHECKING:  # a command that only reads site.yaml need not load torch
    from torch import Tensor

    from uharmony_model.exchange.payload import Value

CASES, LOSS, TAUGHT, N_CASES = "cases", "loss", "taught", "n_cases"
# Beside what `metrics` names: the number of a round, which says nothing about patients, and which
# model a site kept at the end, which its validation patients decided. That is one of five words,
# and it leaves also where all their means are withheld.
STARTED_FROM, KEPT = "started_from", "kept"
# What an allowed metric brings with it: its interval.
_WITH = {"dice": ("dice_low", "dice_high")}

ValueName = Metric | Literal["cases", "loss", "taught"]
# Phi and the residuals describe the site's own scanner; no policy lets them leave in an update.
Shareable = Literal[
    Part.BACKBONE, Part.NORM_AFFINE, Part.NORM_STATISTICS, Part.POLYNOMIAL, Part.STYLE
]
SHAREABLE: tuple[Shareable, ...] = get_args(Shareable)
# A decoder that learns to rebuild images leaves only where it is named.
SHARED: tuple[Shareable, ...] = tuple(part for part in SHAREABLE if part is not Part.STYLE)


class Policy(Frozen):
    """The site's own limits.

    `clip_norm` bounds the L2 norm of an update (None leaves it). `share` names the parts of the
    model that may leave (where nothing is said, all but `style_autoencoder`), `metrics` the named
    values: metrics, `cases` (the number of training cases, as the weight of an update), `loss`,
    and `taught` (the share of voxels of cases without labels that taught something, growing with
    training: a factor of that weight; 0 where a site trained nothing). A mean that leaves always
    brings the number of cases it is over. Counts below `min_cases` leave as `<11`; 1 switches that
    off.
    `publish` names what may be published at the end, where a study asks for it: `experts` (the
    residuals of each domain) and `prototypes` (its mean descriptor with noise). A site that names
    nothing publishes nothing, and takes part all the same. `statistics` names in the same way what
    others may learn with: `amplitude` (the mean style of the training patients), `prototypes`
    (means and variances of features by class), `codes` (mean and deviation of style codes) and
    `discriminator` (the gradient of a network that tells whose features they are).
    `allow_rollback` lets the coordinator go back to a round that this site has passed.
    """

    clip_norm: PositiveFloat | None = None
    share: tuple[Shareable, ...] = SHARED
    metrics: tuple[ValueName, ...] = (*METRICS, "cases", "loss", "taught")
    min_cases: Annotated[int, Field(ge=1, le=9999)] = 11
    publish: tuple[Publishable, ...] = ()
    statistics: tuple[Statistic, ...] = ()
    allow_rollback: bool = False

    @field_validator("share", "metrics", "publish", "statistics")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a name stands twice")
        return names


def shared_parts(study: Study) -> tuple[Part, ...]:
    """The parts of the model that a study shares, in their declared order."""
    return tuple(p for p in Part if p in study.parts and p not in study.plan.local)


def differences(policy: Policy, study: Study) -> list[str]:
    """One line for each thing that the study asks for and the policy does not allow."""
    lines = [
        f"method {study.method} shares {part.value}, policy.share does not allow it"
        for part in shared_parts(study)
        if part not in policy.share
    ]
    for name in study.asks:
        if name not in policy.metrics:
            why = "federation.weighting: cases" if name == CASES else "the study"
            lines.append(f"{why} asks for the value {name}, policy.metrics does not allow it")
    return lines


def publication_view(policy: Policy, study: Study) -> str:
    """What would be published at the end: what the study asks for, and what this site allows."""
    asked = publication_due(study)
    if not asked:
        return "nothing, the study does not ask for it"
    said = []
    for what in asked:
        settings = study.publication
        least = max(settings.min_patients, policy.min_cases)
        how = (
            f"with noise, epsilon {settings.epsilon:g}, delta {settings.delta:g}"
            if what == "prototypes"
            else "without any privacy claim"
        )
        said.append(
            f"{what} of domains with {least} patients or more, {how}"
            if what in policy.publish
            else f"no {what}, policy.publish does not name them"
        )
    return "; ".join(said)


def least_patients(policy: Policy, study: Study) -> int:
    """Of fewer training patients this site gives no statistic."""
    return max(study.unlabelled.min_patients, policy.min_cases)


def statistics_view(policy: Policy, study: Study) -> str:
    """What would be given while training: what the study asks for, and what this site allows."""
    asked = study.statistics
    if not asked:
        return "nothing, the study does not ask for it"
    from uharmony_model.unlabelled.study_style import STYLE_NUMBERS, half_width  # loads torch

    how: dict[Statistic, str] = {
        "amplitude": "a mean style of {} training patients or more, "
        f"{study.task.channels * (2 * half_width(study) + 1) ** 3} numbers, once",
        "prototypes": (
            "prototypes of classes that {} labelled training patients or more have, in every round"
        ),
        "codes": "mean and deviation of style codes of {} training patients or more, "
        f"{2 * study.task.channels * STYLE_NUMBERS} numbers, once",
        "discriminator": (
            "a gradient over {} training patients or more of a network that tells whose features "
            "they are, in every round"
        ),
    }
    least = least_patients(policy, study)
    said = [
        f"{how[what].format(least)}, without any privacy claim"
        if what in policy.statistics
        else f"no {what}, policy.statistics does not name "
        + ("them" if what in ("prototypes", "codes") else "it")
        for what in asked
    ]
    return "; ".join(said)


def require_allowed(policy: Policy, study: Study) -> None:
    """Refuse a study that asks for more than the site's policy allows.

    Raises:
        ConfigError: every difference, and where to change the policy.
    """
    found = differences(policy, study)
    if found:
        raise ConfigError(
            f"study {study.name} asks for more than this site allows: {'; '.join(found)}; "
            "change policy in site.yaml if the site agrees, or ask for another study"
        )


def apply_policy(update: Tensor, policy: Policy) -> Tensor:
    """Scale the update (n,) down to the allowed norm; a smaller one passes unchanged."""
    if policy.clip_norm is None:
        return update
    norm = float(update.double().norm())
    return update if norm <= policy.clip_norm else update * (policy.clip_norm / norm)


def allowed_values(values: Mapping[str, Value], policy: Policy) -> Mapping[str, Value]:
    """The same values; a second look at the names, after everything that made them.

    A name is `cases`, `loss`, `taught`, `started_from` or `kept` (always allowed: the number of a
    round, the name of a candidate), or `split/site/domain/class/metric`.

    Raises:
        ExchangeError: a name is not on the policy's list; nothing is dropped silently.
    """
    single = {STARTED_FROM} | ({CASES, LOSS, TAUGHT} & set(policy.metrics))
    means = _mean_names(policy.metrics)
    for name, value in values.items():
        parts = name.split("/")
        if name in single or (name == CASES and value == "equal"):
            continue
        if name == LOSS and value is None:
            continue
        if name == TAUGHT and value == 0:  # nothing was trained: the update is nothing
            continue
        if name == KEPT and value in CANDIDATES:
            continue
        if len(parts) == 5 and parts[-1] in means:
            continue
        raise ExchangeError(
            f"value {ascii(name)[:120]} may not leave: policy.metrics does not name it; "
            "nothing was sent"
        )
    return values


def _mean_names(metrics: Collection[str]) -> set[str]:
    allowed = {name for name in metrics if name in METRICS}
    return allowed | {N_CASES} | {extra for name in allowed for extra in _WITH.get(name, ())}
