"""What a study segments, in which images, and how their intensities become the network's input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from uharmony_model.frozen import Frozen

Triple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Window(Frozen):
    """CT: clip to [low, high] HU and scale to [-1, 1]."""

    policy: Literal["window"]
    low: float = -160.0
    high: float = 240.0

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        return self


class ZScore(Frozen):
    """MR: subtract the mean, divide by the deviation, over all or over the non-zero voxels."""

    policy: Literal["zscore"]
    nonzero: bool = False


class Percentile(Frozen):
    """MR: clip to two percentiles of the volume and scale to [-1, 1]."""

    policy: Literal["percentile"]
    low: Annotated[float, Field(ge=0, lt=50)] = 0.5
    high: Annotated[float, Field(gt=50, le=100)] = 99.5


class Suv(Frozen):
    """PET: clip to [0, high] SUV and scale to [-1, 1]."""

    policy: Literal["suv"]
    high: PositiveFloat = 20.0


Intensity = Annotated[Window | ZScore | Percentile | Suv, Field(discriminator="policy")]


class Task(Frozen):
    """What is segmented, in which images.

    `classes` names the foreground classes and the label values each consists of. Exclusive
    classes (softmax) may not share a value; overlapping ones (sigmoid) may. Value 0 is background.
    `intensity` maps every modality that may occur to its policy. With `presence` each of them is
    one channel, in the order of their names, and a site may lack some (`uharmony_model.presence`).
    """

    classes: dict[Name, tuple[Annotated[int, Field(ge=1, le=255)], ...]]
    overlapping: bool = False
    channels: PositiveInt = 1
    presence: bool = False
    spacing_mm: Triple | None = None
    intensity: dict[Name, Intensity]

    @field_validator("classes", mode="before")
    @classmethod
    def _single_values(cls, classes: Any) -> Any:
        if isinstance(classes, dict):
            return {k: (v,) if isinstance(v, int) else v for k, v in classes.items()}
        return classes

    @field_validator("intensity")
    @classmethod
    def _ordered(cls, intensity: dict[str, Intensity]) -> dict[str, Intensity]:
        return dict(sorted(intensity.items()))

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if not self.classes:
            raise ValueError("at least one class is needed")
        if not self.intensity:
            raise ValueError("at least one modality is needed")
        values = [value for group in self.classes.values() for value in group]
        if not self.overlapping and len(set(values)) != len(values):
            raise ValueError("exclusive classes share a label value; set overlapping: true")
        if self.presence and self.channels != len(self.intensity):
            raise ValueError(
                f"with presence each modality is one channel: set channels: {len(self.intensity)}"
            )
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """The foreground classes in their order, the order of the network's outputs."""
        return tuple(self.classes)

    @property
    def outputs(self) -> int:
        """Channels of the logits: the classes, and background when they are exclusive."""
        return len(self.classes) + (0 if self.overlapping else 1)
