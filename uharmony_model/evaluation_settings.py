"""How a study divides patients, and what it measures of them when."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from uharmony_model.frozen import Frozen

Split = Literal["train", "validation", "test"]
Metric = Literal["dice", "surface_dice", "hd95_mm", "lesion_recall", "fp_per_case"]
METRICS: tuple[Metric, ...] = get_args(Metric)


class Evaluation(Frozen):
    """Splits by patient, and what is measured when; `metrics` are the means a site is asked for.

    With `folds` the test split is fold number `fold` of so many, in the place of `test`: over all
    of them every patient is tested once.
    """

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.3
    folds: Annotated[int, Field(ge=2, le=100)] | None = None
    fold: NonNegativeInt = 0
    every: NonNegativeInt = 5
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    surface_tolerance_mm: PositiveFloat = 2.0
    bootstrap: PositiveInt = 1000
    metrics: tuple[Metric, ...] = METRICS

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if len(set(metrics)) != len(metrics):
            raise ValueError("a metric is named twice")
        return tuple(name for name in METRICS if name in metrics)  # one order, one digest

    @model_validator(mode="after")
    def _leaves_training(self) -> Evaluation:
        if self.validation + self.test_share >= 1:
            raise ValueError("validation + test must be below 1; nothing is left to train on")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold is {self.fold}, expected a number below folds ({self.folds})")
        return self

    @property
    def test_share(self) -> float:
        """The share of a site's patients that is tested."""
        return self.test if self.folds is None else 1 / self.folds
