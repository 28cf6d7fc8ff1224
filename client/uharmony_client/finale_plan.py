"""What a study asks of a site beside its rounds, as it is known before the site takes part.

`labelled` says whether the site has labels that it trains on. A site without any learns from its
cases by the study's rule, keeps the federation's model at the finale and has nothing to choose by.
"""

from __future__ import annotations

from uharmony_client.policy import TAUGHT, shared_parts
from uharmony_model.methods import EVERYTHING, Part, Place
from uharmony_model.study import Study
from uharmony_model.training_settings import Candidate
from uharmony_model.unlabelled_settings import Rule

_NO_WEIGHTS = frozenset({Part.NORM_STATISTICS, Part.INDEX})  # nothing in them is trained
_TEACHERS: frozenset[Rule] = frozenset({"mean-teacher", "ust-run"})

NOTHING_TO_LEARN_FROM = (
    "label patients or allow their labels in site.yaml, or ask the coordinator for a study that "
    "learns from cases without labels (method: ust-run-fed)"
)


def finale_steps(study: Study, *, labelled: bool = True) -> dict[Candidate, int]:
    """Steps of every model that a site trains for its choice; empty without a finale or labels.

    Models that need no steps (`federated`, and `between`, which is made from `whole`) are left
    out. The local-only model takes the steps of all rounds and, where there are any, of its own
    finale.
    """
    count, names = study.finale.steps, set(study.finale.candidates)
    if not count or not labelled:
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


def finale_view(study: Study, *, labelled: bool = True) -> str:
    """The same in words, for who has to approve it."""
    if not study.finale.steps:
        return "nothing, there is no finale"
    if not labelled:
        return (
            "after the last round nothing is trained: without labels this site keeps the model of "
            "the federation; what is measured leaves once more, and which was kept"
        )
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


def values_asked(study: Study, *, labelled: bool = True) -> tuple[str, ...]:
    """Named values that leave under a study; `kept`, the name of a candidate, after a finale.

    A site without labels says how much of what it saw `taught` it under every study.
    """
    taught = () if labelled or TAUGHT in study.asks else (TAUGHT,)
    return (*study.asks, *taught, *(("kept",) if study.finale.steps else ()))


def learning_view(study: Study, *, labelled: bool = True) -> str:
    """From which cases of this site the study learns, and how."""
    if study.rule == "none":
        if labelled:
            return "labels alone; cases without a label are left out"
        # A method that says so itself has sites that only receive.
        if study.plan.unlabelled == "none":
            return "labels alone; this site trains on none: it receives the model, nothing more"
        return f"labels alone, and this site trains on none; {NOTHING_TO_LEARN_FROM}"
    own = "cases with and without a label" if labelled else "cases without a label"
    late, learned = study.warm_up, study.style_rounds
    wait = f"; in {_first(late)} only sites with labels count" if late else ""
    if learned:
        wait = f"; in {_first(learned)} every site trains a style autoencoder, and counts" + (
            f"; then, up to round {late}, only sites with labels count" if late > learned else ""
        )
    return f"{own}, by {study.rule}{wait}"


def _first(rounds: int) -> str:
    return "the first round" if rounds == 1 else f"the first {rounds} rounds"


def has_teacher(study: Study) -> bool:
    """Whether a second network follows the first, which the site carries from round to round."""
    return study.rule in _TEACHERS


def carried_patches(study: Study) -> tuple[int, int]:
    """Patches of patients' images that a site carries, at the most: reliable ones, the hardest."""
    settings = study.unlabelled
    if study.rule != "ust-run" or not settings.copy_paste:
        return 0, 0
    queued = settings.queue and not study.task.overlapping
    return settings.queue_size * queued, int(settings.hardest)


def carried_view(study: Study, *, labelled: bool = True) -> str:
    """What learning without labels keeps in the site's store and never sends."""
    said = ["a teacher, which is a second model"] if has_teacher(study) else []
    if patches := sum(carried_patches(study)):
        said.append(f"up to {patches} patches of images, as confidential as the images")
    aligned = study.unlabelled.align
    if study.rule == "glua" and aligned == "prototypes" and labelled:
        said.append("running means of features by class")
    if study.rule == "glua" and aligned == "discriminator":
        said.append("a discriminator of features")
    if study.learns_styles:
        said.append("the moments of the style autoencoder while it learns")
    return "; ".join(said)


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
