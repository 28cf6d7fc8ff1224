"""What of the network a study chooses: the backbone, the harmonisation layer, the residuals."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from uharmony_model.frozen import Frozen
from uharmony_model.training_settings import View

Residual = Literal["phi", "stem", "depthwise", "head"]
RESIDUAL_NAMES: tuple[Residual, ...] = get_args(Residual)


class Harmonization(Frozen):
    """The harmonisation layer and the local residuals (see `uharmony_model.harmonize`).

    `layers` says which norms become harmonisation layers: all, those of the encoder or of the
    decoder, or the first n; the others stay as the backbone has them. `residuals` is the capacity
    of a domain: phi in every harmonisation layer, kernels of the stem, depthwise kernels in the
    first stages, the head. `domain_dropout` is the share of steps that train the state of a site
    nobody knows, with all of them at zero; `unseen_view` what these steps see: images as they are,
    with intensities strongly changed, or turned over too (see `uharmony_model.unseen_view`).
    """

    order: Annotated[int, Field(ge=1, le=3)] = 1
    stage2: Literal["free", "affine", "revin", "off"] = "free"
    layers: Literal["all", "encoder", "decoder"] | PositiveInt = "all"
    residuals: tuple[Residual, ...] = ("phi", "stem", "depthwise")
    domain_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    unseen_view: View = "plain"
    compiled: bool = False

    @field_validator("residuals")
    @classmethod
    def _in_one_order(cls, names: tuple[Residual, ...]) -> tuple[Residual, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a residual is named twice")
        return tuple(name for name in RESIDUAL_NAMES if name in names)  # one order, one digest

    @model_validator(mode="after")
    def _there_are_steps_that_see_it(self) -> Harmonization:
        if self.unseen_view != "plain" and not self.domain_dropout:
            raise ValueError(
                f"unseen_view: {self.unseen_view} is what steps with domain dropout see; give "
                "domain_dropout more than 0, such as 0.1"
            )
        return self

    @property
    def restoration(self) -> Literal["free", "affine", "revin", "restore", "off"]:
        """The second stage as it is built: without phi only RevIN's restores anything."""
        if "phi" in self.residuals:
            return self.stage2
        return "restore" if self.stage2 == "revin" else "off"


class Network(Frozen):
    """A MONAI backbone: `features` are the channels of its levels, finest first.

    `norm` is what methods that do not harmonise have; some bring their own. `layer` normalises over
    channels and space of a sample together.
    """

    name: Literal["unet", "dynunet", "segresnet", "swinunetr"] = "unet"
    features: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=7)] = (16, 32, 64)
    residual_units: NonNegativeInt = 1
    norm: Literal["instance", "batch", "layer"] = "instance"
    harmonization: Harmonization = Harmonization()
