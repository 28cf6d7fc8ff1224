"""What a study's finale asks of a site, as it is known before the site takes part."""

from __future__ import annotations

from uharmony_client.policy import shared_parts
from uharmony_model.methods import EVERYTHING, Part, Place
from uharmony_model.study import Study
from uharmony_model.training_settings import Candidate

_NO_WEIGHTS = frozenset({Part.NORM_STATISTICS, Part.INDEX})  # nothing in them is trained


def finale_steps(study: Study) -> dict[Candidate, int]:
    """Steps of every model that a site trains for its choice; empty without a finale.

    Models that need no steps (`federated`, and `between`, which is made from `whole`) are left
    out. The local-only model takes the steps of all rounds and, where there are any, of its own
    finale.
    """
    count, names = study.finale.steps, set(study.finale.candidates)
    if not count:
        return {}
    whole = bool(names & {"whole", "between"})
    steps: dict[Candidate, int] = {}
    if "own" in names and _has_own_part(study):
        steps["own"] = count
    if whole:
        steps["whole"] = count
    if "local" in names and study.plan.local != EVERYTHING:
        rounds = study.training.rounds * study.training.local_steps
        steps["local"] = rounds + (count if whole else 0)
    return steps


def finale_view(study: Study) -> str:
    """The same in words, for who has to approve it."""
    if not study.finale.steps:
        return "nothing, there is no finale"
    steps = finale_steps(study)
    alone = steps.pop("local", None)
    said = [f"{name} {count} steps" for name, count in steps.items()]
    said += [] if alone is None else [f"and a model trained alone, local, {alone} steps"]
    what = ", ".join(said) or "no further training"
    return (
        f"after the last round: {what}; this site keeps one of "
        f"{', '.join(study.finale.candidates)} by its validation cases; "
        "the means leave once more, and which was kept"
    )


def values_asked(study: Study) -> tuple[str, ...]:
    """Named values that leave under a study; `kept`, the name of a candidate, after a finale."""
    return (*study.asks, "kept") if study.finale.steps else study.asks


def stays_view(study: Study) -> str:
    """What of the model stays at a site, of the parts that the study's network has."""
    has = study.parts
    parts = sorted(p for p in study.plan.local if isinstance(p, Place) or p in has)
    said: list[str] = [p.value for p in parts]
    if study.plan.training == "twin":
        said.append("a whole model of the site's own")
    return ", ".join(said) or "no part of the model"


def _has_own_part(study: Study) -> bool:
    """Whether there are weights that stay at the site while others are shared."""
    own = {p for p in study.plan.local if isinstance(p, Place) or p in study.parts}
    return bool(own - _NO_WEIGHTS) and bool(set(shared_parts(study)) - _NO_WEIGHTS)
