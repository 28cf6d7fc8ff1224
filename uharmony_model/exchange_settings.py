"""What of the exchange a study fixes: how updates count and travel, and what sites publish."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from uharmony_model.frozen import Frozen

Publishable = Literal["experts", "prototypes"]
PUBLISHABLE: tuple[Publishable, ...] = get_args(Publishable)


class Federation(Frozen):
    """When a round counts, how updates are weighed, and the server's own steps.

    `server_rate` is fedadam's; `momentum` is carried by the server of all other methods.
    """

    weighting: Literal["cases", "equal"] = "cases"
    min_sites: PositiveInt = 1
    min_cases: PositiveInt = 1
    norm_bound: PositiveFloat = 20.0
    max_cases: PositiveInt = 100_000
    server_rate: PositiveFloat = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Codec(Frozen):
    """How weights travel. Lossy codecs are applied in-process too, so all places agree."""

    up: Literal["fp32", "bf16"] = "fp32"
    down: Literal["fp32", "bf16"] = "fp32"


class Publication(Frozen):
    """What sites are asked to publish, once, at the end; a site does so only if it opts in too.

    `experts` are the residuals of each domain, `prototypes` its mean descriptor, made
    (epsilon, delta)-private by noise. Neither is made of fewer than `min_patients` training
    patients of a domain. A prototype has so many `coordinates`, in a frame of which `center` and
    `scale` are one number, or one for each number of a descriptor (see
    `uharmony_model.prototypes`). They come from public or phantom volumes: taken from patients,
    they would tell of them without any noise.
    """

    experts: bool = False
    prototypes: bool = False
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    min_patients: Annotated[int, Field(ge=10)] = 10
    coordinates: Annotated[int, Field(ge=1, le=16)] = 8
    center: Annotated[tuple[float, ...], Field(min_length=1, max_length=4096)] | None = None
    scale: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=4096)] | None = None

    @model_validator(mode="after")
    def _releasable(self) -> Publication:
        if self.prototypes and (self.center is None or self.scale is None):
            raise ValueError(
                "prototypes need center and scale of the descriptors, from public or phantom "
                "volumes; taken from patients they would tell of them"
            )
        if self.delta * self.min_patients >= 1:
            raise ValueError(f"delta must be below one in min_patients, 1/{self.min_patients}")
        return self

    @property
    def asked(self) -> tuple[Publishable, ...]:
        """What is asked for."""
        wanted: dict[Publishable, bool] = {
            "experts": self.experts,
            "prototypes": self.prototypes,
        }
        return tuple(name for name, asked in wanted.items() if asked)
