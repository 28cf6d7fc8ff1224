"""Statistics that a site shares while it trains: what each looks like on the wire.

    amplitude       one tensor (C, 2b+1, 2b+1, 2b+1), the site's style; of no round
    codes           mean and deviation (C, S) of style codes by channel; of no round
    prototypes      which classes exist (J',), mean and variance (J', C'), under the round's weights
    discriminator   the gradient of its term, by parameter, under the round's weights
    values          patients: it is made of so many or more;  target: 1 or 0, the gradient's side

A site never says of how many patients a statistic is, only the least number it holds itself to:
the difference to another number that it tells could be of very few. Those of a round's weights are
made anew of the same places of the same patients in every round; no privacy is claimed for any of
them beyond that none is of fewer patients than that. What is handed out is in `combined`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from uharmony_model.alignment.class_prototypes import Prototypes, check_prototypes, prototype_schema
from uharmony_model.alignment.shared_discriminator import (
    PREFIX,
    check_discriminator,
    discriminator_schema,
)
from uharmony_model.alignment.style_codes import (
    CENTROIDS,
    SPREAD,
    StyleCodes,
    check_codes,
    code_schema,
)
from uharmony_model.errors import PayloadError
from uharmony_model.exchange.payload import Value, max_payload_bytes
from uharmony_model.exchange.schema import Schema
from uharmony_model.features import deepest_features
from uharmony_model.inference import evaluating
from uharmony_model.networks import build_network, patch_multiple
from uharmony_model.presence import input_channels
from uharmony_model.study import Study
from uharmony_model.unlabelled.study_style import STYLE_NUMBERS, half_width
from uharmony_model.unlabelled.style_average import AMPLITUDE, check_style, style_schema
from uharmony_model.unlabelled_settings import Statistic

LEAST_PATIENTS = 2
"""No study and no policy lets a statistic be of one patient."""

ONCE: tuple[Statistic, ...] = ("amplitude", "codes")
"""Made once, of no round's weights; all others are made for each round."""

PATIENTS, TARGET = "patients", "target"


class Said(StrEnum):
    """Why a site gives a statistic or not. Codes are stable: checkpoints hold them."""

    GIVEN = "given"
    NOT_OPTED_IN = "not_opted_in"  # the site's policy does not name it
    TOO_FEW_PATIENTS = "too_few_patients"  # at all, or of every class
    NOT_USABLE = "not_usable"  # what came out is nothing that a receiver would take
    DAMAGED = "damaged"  # what was given before cannot be read, and is not made anew


@dataclass(frozen=True)
class StatisticsForm:
    """What a study's statistics look like; None for what it does not ask for.

    `style` is channels and half-width, `prototypes` classes J' and channels of the features,
    `codes` channels and numbers of a style code, `discriminator` channels of the features.
    """

    style: tuple[int, int] | None = None
    prototypes: tuple[int, int] | None = None
    codes: tuple[int, int] | None = None
    discriminator: int | None = None

    @classmethod
    def of(cls, study: Study, network: nn.Module | None = None) -> StatisticsForm:
        """The form of a study; its `network` says how many features there are, if it is at hand.

        Raises:
            NetworkError: the network does not say where its deepest level is.
        """
        due, task = study.statistics, study.task
        of_features = {"prototypes", "discriminator"} & set(due)
        features = _feature_channels(study, network) if of_features else 0
        return cls(
            (task.channels, half_width(study)) if "amplitude" in due else None,
            (task.outputs, features) if "prototypes" in due else None,
            (task.channels, STYLE_NUMBERS) if "codes" in due else None,
            features if "discriminator" in due else None,
        )

    def schema(self, what: Statistic) -> Schema:
        """The tensors of one site's payload.

        Raises:
            PayloadError: the study does not ask for it.
        """
        if what == "amplitude" and self.style is not None:
            return style_schema(*self.style)
        if what == "prototypes" and self.prototypes is not None:
            return prototype_schema(*self.prototypes)
        if what == "codes" and self.codes is not None:
            return code_schema(*self.codes)
        if what == "discriminator" and self.discriminator is not None:
            return discriminator_schema(self.discriminator)
        raise PayloadError(f"the study does not ask for {what}")

    def max_bytes(self, what: Statistic) -> int:
        """The longest payload of one site that can be honest.

        Raises:
            PayloadError: the study does not ask for it.
        """
        return max_payload_bytes(self.schema(what))

    def style_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A site's style, refused unless it can be one.

        Raises:
            ExchangeError: see `check_style`.
        """
        if self.style is None or set(tensors) != {AMPLITUDE}:
            raise PayloadError(f"a style of {', '.join(sorted(tensors))}; expected {AMPLITUDE}")
        check_style(tensors[AMPLITUDE], *self.style)
        return tensors[AMPLITUDE]

    def prototypes_of(self, tensors: Mapping[str, Tensor], *, together: bool = False) -> Prototypes:
        """Prototypes of a site, or of all sites `together`, refused unless they can be some.

        Raises:
            ExchangeError: see `check_prototypes`.
        """
        if self.prototypes is None:
            raise PayloadError("the study does not ask for prototypes")
        return check_prototypes(tensors, *self.prototypes, together=together)

    def codes_of(self, tensors: Mapping[str, Tensor]) -> StyleCodes:
        """Style codes of a site, a row for each channel, refused unless they can be some.

        Raises:
            ExchangeError: see `check_codes`.
        """
        if self.codes is None:
            raise PayloadError("the study does not ask for codes")
        return check_codes(tensors, *self.codes)

    def discriminator_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A gradient or weights of the discriminator by parameter, refused unless they can be.

        Raises:
            ExchangeError: see `check_discriminator`.
        """
        if self.discriminator is None:
            raise PayloadError("the study does not ask for a discriminator")
        return check_discriminator(tensors, self.discriminator)


def statistic_of(schema: Schema) -> Statistic | None:
    """Which statistic a site's payload holds, by the names of its tensors."""
    names = {spec.name for spec in schema.tensors}
    if names == {AMPLITUDE}:
        return "amplitude"
    if names == {CENTROIDS, SPREAD}:
        return "codes"
    if names and all(name.startswith(PREFIX) for name in names):
        return "discriminator"
    return "prototypes" if names == {s.name for s in prototype_schema(1, 1).tensors} else None


def patients_told(values: Mapping[str, Value], what: Statistic) -> int:
    """Of how many patients a site's statistic is at least.

    Raises:
        PayloadError: that is not said, is no whole number, or more is said than the statistic has.
    """
    count, side = values.get(PATIENTS), values.get(TARGET, 0)
    due = {PATIENTS, TARGET} if what == "discriminator" else {PATIENTS}
    if set(values) != due or type(count) is not int or type(side) is not int or side not in (0, 1):
        said = ", ".join(sorted(values))
        raise PayloadError(
            f"values {ascii(said)[:80]}; expected {', '.join(sorted(due))}: a whole number of "
            "patients, 1 or 0 for a target"
        )
    return count


def _feature_channels(study: Study, network: nn.Module | None) -> int:
    """Channels of the deepest level, from a pass of an empty volume."""
    if network is None:
        network = build_network(study, ("any",), seed=study.seed)
    edge = 2 * patch_multiple(study.network, study.plan.backbone)
    device = next(network.parameters()).device
    empty = torch.zeros(1, input_channels(study.task), edge, edge, edge, device=device)
    with evaluating(network), torch.no_grad(), deepest_features(network) as seen:
        network(empty, torch.zeros(1, dtype=torch.long, device=device))
    return int(seen.features.shape[1])
