"""Which objective a site trains by, from the study's rule and from what the site has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from uharmony_client.alignment_objective import Alignment
from uharmony_client.objective import LocalData, Objective, Supervised
from uharmony_client.semi_supervised import (
    AdaptiveStatistics,
    EntropyMin,
    FixMatch,
    MeanTeacher,
    SemiSupervised,
)
from uharmony_client.ust_run import UstRun
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.study import Study
from uharmony_model.unlabelled_settings import Rule

_PLAIN: dict[Rule, type[SemiSupervised]] = {
    "mean-teacher": MeanTeacher,
    "fixmatch": FixMatch,
    "entropy-min": EntropyMin,
    "adabn": AdaptiveStatistics,
}


@dataclass(frozen=True, eq=False)
class Given:
    """What the federation gives for a round beside its weights: styles, class prototypes.

    `styles` are low amplitudes, `codes` those of a study whose styles are codes; `discriminator`
    the weights of one that sites train together, by parameter.
    """

    styles: tuple[Tensor, ...] = ()
    prototypes: Prototypes | None = None
    codes: tuple[StyleCodes, ...] = ()
    discriminator: Mapping[str, Tensor] | None = None


NOTHING = Given()


def cases_learned_from(data: LocalData, study: Study) -> int:
    """Training cases that the study learns from here; all of them where it learns from none."""
    return len(data.volumes) if study.rule == "none" and data.volumes else data.cases


def objective_of(data: LocalData, study: Study, given: Given = NOTHING) -> Objective | None:
    """The objective of a site's round; None where it has nothing that the study learns from."""
    rule = study.rule
    if rule == "none":
        return Supervised(data, study) if data.volumes else None
    if not data.cases:
        return None
    if rule == "ust-run":
        return UstRun(data, study, given.styles)
    if rule == "glua":
        return Alignment(
            data, study, given.styles, given.prototypes, given.codes, given.discriminator
        )
    return _PLAIN[rule](data, study)
