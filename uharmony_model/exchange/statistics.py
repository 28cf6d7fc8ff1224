"""Statistics that sites share while they train: what they look like on the wire, up and down.

    up      amplitude    one tensor (C, 2b+1, 2b+1, 2b+1), the site's style; of no round
            prototypes   count (J',), mean and variance (J', C'), under the round's weights
            codes        mean and deviation (C, S) of style codes by channel; of no round
            values       patients: it is made of so many or more
    down    amplitude    (S, C, 2b+1, 2b+1, 2b+1), the styles of S sites, without names
            codes        (N, C, S) twice, of N sites, without names
            and the prototypes of all sites merged
            values       styles: S;  prototypes: 1 or 0;  codes: N, where a study learns codes

A site never says of how many patients a statistic is, only the least number it holds itself to:
the difference to another number that it tells could be of very few. Prototypes are made anew of
the same places of the same patients in every round; no privacy is claimed for them, nor for a
style, beyond that no statistic is of fewer patients than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from uharmony_model.alignment.class_prototypes import Prototypes, check_prototypes, prototype_schema
from uharmony_model.alignment.style_codes import (
    CENTROIDS,
    SPREAD,
    StyleCodes,
    check_codes,
    code_schema,
)
from uharmony_model.errors import PayloadError
from uharmony_model.exchange.payload import (
    Buffer,
    Kind,
    Manifest,
    Value,
    decode_body,
    encode,
    max_payload_bytes,
    open_payload,
)
from uharmony_model.exchange.schema import Schema, TensorSpec, flatten, unflatten
from uharmony_model.features import deepest_features
from uharmony_model.inference import evaluating
from uharmony_model.networks import build_network, patch_multiple
from uharmony_model.presence import input_channels
from uharmony_model.study import Study
from uharmony_model.unlabelled.study_style import STYLE_NUMBERS, half_width
from uharmony_model.unlabelled.style_average import AMPLITUDE, check_style, style_schema
from uharmony_model.unlabelled_settings import Statistic

PROTOTYPE_PATCHES = 4  # of each labelled case in each round, as its training patches lie
MAX_STYLES = 1024
LEAST_PATIENTS = 2
"""No study and no policy lets a statistic be of one patient."""

PATIENTS = "patients"
_STYLES, _PROTOTYPES, _CODES = "styles", "prototypes", "codes"


class Said(StrEnum):
    """Why a site gives a statistic or not. Codes are stable: checkpoints hold them."""

    GIVEN = "given"
    NOT_OPTED_IN = "not_opted_in"  # the site's policy does not name it
    TOO_FEW_PATIENTS = "too_few_patients"  # at all, or of every class
    NOT_USABLE = "not_usable"  # what came out is nothing that a receiver would take
    DAMAGED = "damaged"  # what was given before cannot be read, and is not made anew


@dataclass(frozen=True, eq=False)
class Combined:
    """What all sites gave: `styles` (C, 2b+1, 2b+1, 2b+1) or `codes` each, merged prototypes."""

    styles: tuple[Tensor, ...] = ()
    prototypes: Prototypes | None = None
    codes: tuple[StyleCodes, ...] = ()


@dataclass(frozen=True)
class StatisticsForm:
    """What a study's statistics look like; None for what it does not ask for.

    `style` is channels and half-width, `prototypes` classes J' and channels of the features,
    `codes` channels and numbers of a style code.
    """

    style: tuple[int, int] | None = None
    prototypes: tuple[int, int] | None = None
    codes: tuple[int, int] | None = None

    @classmethod
    def of(cls, study: Study, network: nn.Module | None = None) -> StatisticsForm:
        """The form of a study; its `network` says how many features there are, if it is at hand.

        Raises:
            NetworkError: the network does not say where its deepest level is.
        """
        due, task = study.statistics, study.task
        return cls(
            (task.channels, half_width(study)) if "amplitude" in due else None,
            (task.outputs, _feature_channels(study, network)) if "prototypes" in due else None,
            (task.channels, STYLE_NUMBERS) if "codes" in due else None,
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
        raise PayloadError(f"the study does not ask for {what}")

    def max_bytes(self, what: Statistic) -> int:
        """The longest payload of one site that can be honest.

        Raises:
            PayloadError: the study does not ask for it.
        """
        return max_payload_bytes(self.schema(what))

    def combined_schema(self, styles: int, *, prototypes: bool, codes: int = 0) -> Schema:
        """The tensors of what is handed out.

        Raises:
            PayloadError: the study does not ask for it.
        """
        specs: tuple[TensorSpec, ...] = ()
        if styles:
            (one,) = self.schema("amplitude").tensors
            specs = (TensorSpec(name=AMPLITUDE, shape=(styles, *one.shape)),)
        if prototypes:
            specs += self.schema("prototypes").tensors
        if codes:
            rows = self.schema("codes").tensors
            specs += tuple(TensorSpec(name=one.name, shape=(codes, *one.shape)) for one in rows)
        return Schema(tensors=tuple(sorted(specs, key=lambda spec: spec.name)))

    def style_of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A site's style, refused unless it can be one.

        Raises:
            ExchangeError: see `check_style`.
        """
        if self.style is None or set(tensors) != {AMPLITUDE}:
            raise PayloadError(f"a style of {', '.join(sorted(tensors))}; expected {AMPLITUDE}")
        check_style(tensors[AMPLITUDE], *self.style)
        return tensors[AMPLITUDE]

    def prototypes_of(self, tensors: Mapping[str, Tensor]) -> Prototypes:
        """Prototypes, refused unless they can be some.

        Raises:
            ExchangeError: see `check_prototypes`.
        """
        if self.prototypes is None:
            raise PayloadError("the study does not ask for prototypes")
        return check_prototypes(tensors, *self.prototypes)

    def codes_of(self, tensors: Mapping[str, Tensor]) -> StyleCodes:
        """Style codes of a site, a row for each channel, refused unless they can be some.

        Raises:
            ExchangeError: see `check_codes`.
        """
        if self.codes is None:
            raise PayloadError("the study does not ask for codes")
        return check_codes(tensors, *self.codes)


def statistic_of(schema: Schema) -> Statistic | None:
    """Which statistic a site's payload holds, by the names of its tensors."""
    names = {spec.name for spec in schema.tensors}
    if names == {AMPLITUDE}:
        return "amplitude"
    if names == {CENTROIDS, SPREAD}:
        return "codes"
    return "prototypes" if names == {s.name for s in prototype_schema(1, 1).tensors} else None


def patients_told(values: Mapping[str, Value]) -> int:
    """Of how many patients a site's statistic is at least.

    Raises:
        PayloadError: that is not said, is no whole number, or more is said.
    """
    count = values.get(PATIENTS)
    if set(values) != {PATIENTS} or type(count) is not int:
        said = ", ".join(sorted(values))
        raise PayloadError(f"values {ascii(said)[:80]}; expected {PATIENTS}, a whole number")
    return count


def encode_combined(
    combined: Combined, form: StatisticsForm, *, study: str, round_: int, base: str
) -> bytes:
    """What the server hands out with the weights `base` of a round.

    Raises:
        PayloadError: there are too many styles, or the study asks for no such thing.
    """
    styles, prototypes, codes = combined.styles, combined.prototypes, combined.codes
    count = max(len(styles), len(codes))
    if count > MAX_STYLES:
        raise PayloadError(f"{count} styles, at most {MAX_STYLES} are handed out")
    schema = form.combined_schema(len(styles), prototypes=prototypes is not None, codes=len(codes))
    tensors = {AMPLITUDE: torch.stack(list(styles))} if styles else {}
    if codes:
        states = [one.state() for one in codes]
        tensors |= {name: torch.stack([s[name] for s in states]) for name in (CENTROIDS, SPREAD)}
    tensors |= {} if prototypes is None else prototypes.tensors()
    return encode(
        kind=Kind.STATISTICS,
        study=study,
        round=round_,
        site="server",
        base=base,
        schema=schema,
        values={
            _STYLES: len(styles),
            _PROTOTYPES: int(prototypes is not None),
            **({} if form.codes is None else {_CODES: len(codes)}),
        },
        flat=flatten(tensors, schema),
    )


def open_combined(buffer: Buffer, form: StatisticsForm) -> tuple[Manifest, Combined]:
    """What the server handed out; every number in it has been looked at.

    Raises:
        ExchangeError: it is damaged, of another form, or holds what no site can have given.
    """
    most = MAX_STYLES if form.style is not None else 0
    most_codes = MAX_STYLES if form.codes is not None else 0
    largest = form.combined_schema(most, prototypes=form.prototypes is not None, codes=most_codes)
    manifest, body, _ = open_payload(buffer, max_bytes=max_payload_bytes(largest))
    if manifest.kind is not Kind.STATISTICS or manifest.codec != "fp32":
        raise PayloadError(f"{manifest.kind.value} as {manifest.codec}; expected statistics, fp32")
    values = manifest.values
    styles, prototypes = values.get(_STYLES), values.get(_PROTOTYPES)
    codes = values.get(_CODES, 0)
    if (
        set(values) != {_STYLES, _PROTOTYPES} | (set() if form.codes is None else {_CODES})
        or type(codes) is not int
        or not 0 <= codes <= most_codes
        or type(styles) is not int
        or not 0 <= styles <= most
        or type(prototypes) is not int
        or prototypes not in (0, 1)
    ):
        raise PayloadError(
            f"{styles!r:.20} styles, {prototypes!r:.20} prototypes and {codes!r:.20} codes; "
            f"expected 0 to {most}, 0 or 1, 0 to {most_codes}, and no other value"
        )
    schema = form.combined_schema(styles, prototypes=bool(prototypes), codes=codes)
    tensors = unflatten(decode_body(manifest, body, schema).clone(), schema)
    stacked = tensors.pop(AMPLITUDE) if styles else ()
    tables = [tensors.pop(name) for name in (CENTROIDS, SPREAD)] if codes else [(), ()]
    return manifest, Combined(
        tuple(form.style_of({AMPLITUDE: style}) for style in stacked),
        form.prototypes_of(tensors) if prototypes else None,
        tuple(
            form.codes_of({CENTROIDS: centre, SPREAD: spread})
            for centre, spread in zip(*tables, strict=True)
        ),
    )


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
