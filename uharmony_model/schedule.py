"""What a study asks for in which round: both sides know it, so a site can refuse anything else."""

from __future__ import annotations

from uharmony_model.evaluation_settings import Split
from uharmony_model.exchange_settings import Publishable
from uharmony_model.study import Study


def splits_due(study: Study, round_: int) -> tuple[Split, ...]:
    """The splits that are measured after a round; the test split once, after the last."""
    every, last = study.evaluation.every, study.training.rounds
    shares = study.evaluation
    due: list[Split] = []
    if shares.validation > 0 and (round_ == last or (every and round_ % every == 0)):
        due.append("validation")
    if shares.test_share > 0 and round_ == last:
        due.append("test")
    return tuple(due)


def finale_round(study: Study) -> int:
    """The number under which the finale counts: that of the round after the last."""
    return study.training.rounds + 1


def publication_round(study: Study) -> int:
    """The number under which sites are asked to publish: that of the round after the finale."""
    return finale_round(study) + 1


def publication_due(study: Study) -> tuple[Publishable, ...]:
    """What sites are asked to publish; nothing where no residuals are kept at the sites."""
    return study.publication.asked if study.keeps_residuals else ()
