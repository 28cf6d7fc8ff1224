"""How a site trains: its rounds, and its last steps at home."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from uharmony_model.frozen import Frozen

Candidate = Literal["federated", "own", "whole", "between", "local"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)
ChoiceRule = Literal["best", "clear"]
View = Literal["plain", "strong", "inverted"]


class Training(Frozen):
    """One site's round, and how many rounds there are.

    `proximal` is the weight of the pull of methods that have one, `head_share` the share of a
    round's steps that those with a local last block spend on it alone. `modality_dropout` is the
    chance of each channel of a sample to be hidden; at least one stays. `views` is what
    `view_share` of the labelled patches show beyond `augment`: nothing, intensities strongly
    changed, or turned over too (see `uharmony_model.unseen_view`).
    """

    rounds: PositiveInt = 10
    local_steps: PositiveInt = 20
    batch_size: PositiveInt = 2
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 32, 32)
    foreground: Annotated[float, Field(ge=0, le=1)] = 0.5
    augment: bool = True
    views: View = "plain"
    view_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: NonNegativeFloat = 1e-4
    residual_decay: NonNegativeFloat = 1e-3
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_clip: PositiveFloat = 12.0
    keep_optimizer: bool = True
    proximal: NonNegativeFloat = 0.01
    head_share: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Finale(Frozen):
    """What a site does at home after the last round; 0 steps: nothing.

    It trains `steps` more on its own cases from the federation's weights. The learning rate goes
    on with the schedule, which then spans all steps; or, with a `rate`, it starts anew from this
    share of the learning rate and falls to a hundredth of that. Then the site keeps, by its own
    validation split, the best of the `candidates`: the federated model, the same with its own part
    trained further (`own`), with everything trained further (`whole`), half-way between
    (`between`), and the model that it trained alone with as many steps (`local`). With `choice:
    clear` the federated model stays unless another is better by more than chance would have it.
    """

    steps: NonNegativeInt = 0
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    candidates: tuple[Candidate, ...] = CANDIDATES
    choice: ChoiceRule = "best"

    @field_validator("candidates")
    @classmethod
    def _some_each_once(cls, names: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one candidate, and each once")
        return tuple(name for name in CANDIDATES if name in names)  # one order, one digest
