"""What the server hands out of all sites' statistics, beside the weights of a round.

amplitude       (S, C, 2b+1, 2b+1, 2b+1), the styles of S sites, without names
codes           (N, C, S) twice, of N sites, without names
prototypes      those of all sites merged
discriminator   its weights after the sites' gradients
values          styles: S;  prototypes: 1 or 0;  codes: N and discriminator: 1 or 0, where a
study has them
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.alignment.shared_discriminator import travelling
from uharmony_model.alignment.style_codes import CENTROIDS, SPREAD, StyleCodes
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
from uharmony_model.exchange.statistics import StatisticsForm
from uharmony_model.unlabelled.style_average import AMPLITUDE

MAX_STYLES = 1024
_STYLES, _PROTOTYPES, _CODES, _DISCRIMINATOR = "styles", "prototypes", "codes", "discriminator"


@dataclass(frozen=True, eq=False)
class Combined:
    """What all sites gave: `styles` (C, 2b+1, 2b+1, 2b+1) or `codes` each, merged prototypes.

    `discriminator` is what their gradients made of it, weights by parameter.
    """

    styles: tuple[Tensor, ...] = ()
    prototypes: Prototypes | None = None
    codes: tuple[StyleCodes, ...] = ()
    discriminator: Mapping[str, Tensor] | None = None

    @property
    def empty(self) -> bool:
        """Whether nobody gave anything that could be handed out."""
        some = self.styles or self.codes or self.discriminator
        return not some and self.prototypes is None

    def counts(self, form: StatisticsForm) -> dict[str, Value]:
        """What is in it, as its manifest says."""
        found: dict[str, Value] = {
            _STYLES: len(self.styles),
            _PROTOTYPES: int(self.prototypes is not None),
        }
        if form.codes is not None:
            found[_CODES] = len(self.codes)
        if form.discriminator is not None:
            found[_DISCRIMINATOR] = int(self.discriminator is not None)
        return found


def combined_schema(
    form: StatisticsForm,
    styles: int,
    *,
    prototypes: bool,
    codes: int = 0,
    discriminator: bool = False,
) -> Schema:
    """The tensors of what is handed out.

    Raises:
        PayloadError: the study does not ask for it.
    """
    specs: tuple[TensorSpec, ...] = ()
    if styles:
        (one,) = form.schema("amplitude").tensors
        specs = (TensorSpec(name=AMPLITUDE, shape=(styles, *one.shape)),)
    if prototypes:
        specs += form.schema("prototypes").tensors
    if codes:
        rows = form.schema("codes").tensors
        specs += tuple(TensorSpec(name=one.name, shape=(codes, *one.shape)) for one in rows)
    if discriminator:
        specs += form.schema("discriminator").tensors
    return Schema(tensors=tuple(sorted(specs, key=lambda spec: spec.name)))


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
    schema = combined_schema(
        form,
        len(styles),
        prototypes=prototypes is not None,
        codes=len(codes),
        discriminator=combined.discriminator is not None,
    )
    tensors = {AMPLITUDE: torch.stack(list(styles))} if styles else {}
    if codes:
        states = [one.state() for one in codes]
        tensors |= {name: torch.stack([s[name] for s in states]) for name in (CENTROIDS, SPREAD)}
    tensors |= {} if prototypes is None else prototypes.tensors()
    tensors |= travelling(combined.discriminator or {})
    return encode(
        kind=Kind.STATISTICS,
        study=study,
        round=round_,
        site="server",
        base=base,
        schema=schema,
        values=combined.counts(form),
        flat=flatten(tensors, schema),
    )


def open_combined(buffer: Buffer, form: StatisticsForm) -> tuple[Manifest, Combined]:
    """What the server handed out; every number in it has been looked at.

    Raises:
        ExchangeError: it is damaged, of another form, or holds what no site can have given.
    """
    largest = combined_schema(
        form,
        MAX_STYLES if form.style is not None else 0,
        prototypes=form.prototypes is not None,
        codes=MAX_STYLES if form.codes is not None else 0,
        discriminator=form.discriminator is not None,
    )
    manifest, body, _ = open_payload(buffer, max_bytes=max_payload_bytes(largest))
    if manifest.kind is not Kind.STATISTICS or manifest.codec != "fp32":
        raise PayloadError(f"{manifest.kind.value} as {manifest.codec}; expected statistics, fp32")
    styles, prototypes, codes, discriminator = _counted(manifest.values, form)
    schema = combined_schema(
        form,
        styles,
        prototypes=bool(prototypes),
        codes=codes,
        discriminator=bool(discriminator),
    )
    tensors = unflatten(decode_body(manifest, body, schema).clone(), schema)
    stacked = tensors.pop(AMPLITUDE) if styles else ()
    tables = [tensors.pop(name) for name in (CENTROIDS, SPREAD)] if codes else [(), ()]
    named = {spec.name for spec in form.schema("discriminator").tensors} if discriminator else set()
    weights = {name: tensors.pop(name) for name in sorted(named)}
    return manifest, Combined(
        tuple(form.style_of({AMPLITUDE: style}) for style in stacked),
        form.prototypes_of(tensors, together=True) if prototypes else None,
        tuple(
            form.codes_of({CENTROIDS: centre, SPREAD: spread})
            for centre, spread in zip(*tables, strict=True)
        ),
        form.discriminator_of(weights) if discriminator else None,
    )


def _counted(values: Mapping[str, Value], form: StatisticsForm) -> tuple[int, int, int, int]:
    """How many styles, prototypes, codes and discriminators a manifest says it holds.

    Raises:
        PayloadError: one is not said, is no whole number or too many, or more is said.
    """
    most = {
        _STYLES: MAX_STYLES if form.style is not None else 0,
        _PROTOTYPES: 1,
        _CODES: MAX_STYLES if form.codes is not None else None,
        _DISCRIMINATOR: 1 if form.discriminator is not None else None,
    }
    due = {name: limit for name, limit in most.items() if limit is not None}
    found: dict[str, int] = dict.fromkeys(most, 0)
    for name, limit in due.items():
        value = values.get(name)
        if type(value) is not int or not 0 <= value <= limit:
            raise PayloadError(f"{value!r:.20} {name}; expected 0 to {limit}")
        found[name] = value
    if set(values) != set(due):
        more = ", ".join(sorted(set(values) - set(due)))
        raise PayloadError(f"values {ascii(more)[:80]}; expected {', '.join(due)} and no other")
    return found[_STYLES], found[_PROTOTYPES], found[_CODES], found[_DISCRIMINATOR]
