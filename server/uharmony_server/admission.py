"""Before any averaging: is this update what was asked for, from whom, and is it harmless?

One bad site never stops a round: every refusal is a value with one reason and is recorded.
Denormal numbers are accepted as they are; flushing them would change what a site has signed off.
A norm limit bounds how far one site can pull; it does not recognise a wrong direction.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, field_validator
from torch import Tensor

from uharmony_model.errors import PayloadError
from uharmony_model.exchange.payload import (
    CodecName,
    Kind,
    Manifest,
    Value,
    decode_body,
    max_payload_bytes,
    open_payload,
)
from uharmony_model.exchange.published import (
    DELTA,
    EPSILON,
    KINDS,
    PublicationForm,
    patients_of,
)
from uharmony_model.exchange.schema import Schema, unflatten
from uharmony_model.exchange_settings import Publication, Publishable
from uharmony_model.frozen import Frozen
from uharmony_model.prototypes import noise_deviation

CASES = "cases"  # the manifest value with the number of training cases
STARTED_FROM = "started_from"  # the round whose outcome the site's own parameters come from
LEAST_TAUGHT = 1e-6
TAUGHT = "taught"  # a factor of the weight in [0, 1]: how much taught it something, and may by now
EQUAL = "equal"  # in place of the number of cases, where a site does not tell how many it has
_BLOCK = 1 << 16
_MAX_DETAIL = 300


class RefusalReason(StrEnum):
    """Why an answer does not count. Codes are stable: reports and records hold them."""

    NOT_AGREED = "not_agreed"  # another study, exchange format or version at hello
    DAMAGED = "damaged"
    WRONG_KIND = "wrong_kind"
    WRONG_STUDY = "wrong_study"
    WRONG_ROUND = "wrong_round"
    WRONG_BASE = "wrong_base"
    WRONG_SITE = "wrong_site"
    WRONG_SCHEMA = "wrong_schema"
    WRONG_CODEC = "wrong_codec"
    NOT_FINITE = "not_finite"
    NORM_TOO_LARGE = "norm_too_large"
    BAD_CASE_COUNT = "bad_case_count"
    WRONG_BUDGET = "wrong_budget"  # of privacy: another epsilon or delta than the study's
    DUPLICATE = "duplicate"  # a second answer of a site in one round; found by the round
    SITE_ERROR = "site_error"  # the site itself says that it failed; reported by the round
    OVERSIZED = "oversized"
    LATE = "late"  # came after its round was closed; reported by the round


class Refusal(Frozen):
    """An answer that does not count. `detail` is one printable line, whatever was received."""

    site: str
    round: NonNegativeInt
    reason: RefusalReason
    detail: Annotated[str, Field(max_length=_MAX_DETAIL)]

    @field_validator("site", "detail", mode="before")
    @classmethod
    def _printable(cls, text: object) -> object:
        # Foreign text ends in logs and reports: no line breaks, escapes or direction marks.
        if not isinstance(text, str):
            return text
        return "".join(c if " " <= c <= "~" else "?" for c in text[:_MAX_DETAIL])


@dataclass(frozen=True)
class Expected:
    """What an update has to be; `site` is who the connection proves it is."""

    site: str
    study: str
    round: int
    base: str
    schema: Schema | None
    codec: CodecName
    max_cases: int
    norm_limit: float | None

    def refuse(self, reason: RefusalReason, detail: str) -> Refusal:
        """This answer does not count, for this reason."""
        return Refusal(site=self.site, round=self.round, reason=reason, detail=detail)


@dataclass(frozen=True, eq=False)
class Admitted:
    """An update that counts: its delta `(n,)`, read-only, and the weight it asks for.

    `cases` is None where the site does not tell it. `started_from` is the round whose outcome the
    site's own parameters come from, 0 for none. `taught` is a factor of the weight, in [0, 1]; a
    site with labels (`labelled`) sends none.
    """

    site: str
    cases: int | None
    flat: Tensor
    norm: float
    bytes: int
    started_from: int = 0
    taught: float = 1.0
    labelled: bool = True


@dataclass(frozen=True)
class AdmittedMetrics:
    """A site's means over cases, named `split/site/domain/class/metric`."""

    site: str
    values: Mapping[str, Value]


@dataclass(frozen=True, eq=False)
class AdmittedRelease:
    """Experts or prototypes that a site published: `flat (n,)` of a schema, patients by domain."""

    site: str
    patients: Mapping[str, int]
    schema: Schema
    flat: Tensor


def norm_limit(past_norms: Sequence[float], bound: float) -> float | None:
    """`bound` times the median norm of the updates admitted so far; None while there are none."""
    median = statistics.median(past_norms) if past_norms else 0.0
    return bound * median if median > 0 else None


def admit(buffer: object, expected: Expected) -> Admitted | Refusal:
    """Check an update; nothing that a sender can put into the bytes raises an error."""
    opened = open_expected(buffer, expected, Kind.UPDATE)
    if isinstance(opened, Refusal):
        return opened
    manifest, flat = opened
    refuse = expected.refuse
    cases = manifest.values.get(CASES)
    hidden = cases == EQUAL
    if not hidden and (type(cases) is not int or not 1 <= cases <= expected.max_cases):
        return refuse(
            RefusalReason.BAD_CASE_COUNT,
            f"{CASES} is {cases!r}, expected a whole number from 1 to {expected.max_cases}, "
            f"or {EQUAL!r}",
        )
    started = manifest.values.get(STARTED_FROM, 0)
    if type(started) is not int or not 0 <= started < max(expected.round, 1):
        return refuse(
            RefusalReason.WRONG_ROUND,
            f"{STARTED_FROM} is {started!r}, expected a round before {expected.round}",
        )
    taught = manifest.values.get(TAUGHT, 1.0)
    if isinstance(taught, str) or taught is None or not 0 <= taught <= 1:
        return refuse(
            RefusalReason.BAD_CASE_COUNT, f"{TAUGHT} is {taught!r:.40}, expected a number in [0, 1]"
        )
    norm = _norm(flat)
    if not math.isfinite(norm):
        return refuse(RefusalReason.NOT_FINITE, "the update holds NaN or infinite numbers")
    if expected.norm_limit is not None and norm > expected.norm_limit:
        return refuse(
            RefusalReason.NORM_TOO_LARGE,
            f"norm {norm:.4g} exceeds {expected.norm_limit:.4g}, set by the rounds before",
        )
    told = cases if type(cases) is int else None
    return Admitted(
        expected.site,
        told,
        flat,
        norm,
        _size(buffer),
        started,
        # Less would be lost in the sum, or divide by next to nothing where nobody has more.
        taught=float(taught) if taught >= LEAST_TAUGHT else 0.0,
        labelled=TAUGHT not in manifest.values,
    )


def admit_metrics(buffer: object, expected: Expected) -> AdmittedMetrics | Refusal:
    """Check a site's metrics: they carry named values and no tensor. Never raises."""
    opened = open_expected(buffer, replace(expected, schema=None, codec="fp32"), Kind.METRICS)
    if isinstance(opened, Refusal):
        return opened
    return AdmittedMetrics(expected.site, opened[0].values)


def admit_release(
    buffer: object,
    expected: Expected,
    what: Publishable,
    settings: Publication,
    form: PublicationForm,
) -> AdmittedRelease | Refusal:
    """Check a site's release; it names its domains, all else is known here. Never raises.

    Without noise a prototype is at most one long. Noise of ten deviations does not occur, so what
    is longer than that is no release.
    """
    refuse, kind = expected.refuse, KINDS[what]
    limit = form.max_bytes(what)
    if not isinstance(buffer, bytes | bytearray | memoryview):
        return refuse(RefusalReason.DAMAGED, f"expected bytes, got {type(buffer).__name__}")
    if len(buffer) > limit:
        return refuse(RefusalReason.OVERSIZED, f"{len(buffer)} bytes, at most {limit} of {what}")
    try:
        values = open_payload(buffer, max_bytes=limit).manifest.values
    except PayloadError as error:
        return refuse(RefusalReason.DAMAGED, str(error))
    budget = (EPSILON, DELTA) if what == "prototypes" else ()
    try:
        patients = patients_of(values, also=budget)
    except PayloadError as error:
        return refuse(RefusalReason.WRONG_SCHEMA, str(error))
    schema = form.schema(what, patients)
    opened = open_expected(buffer, replace(expected, schema=schema, codec="fp32"), kind)
    if isinstance(opened, Refusal):
        return opened
    flat = opened[1]
    for domain, count in patients.items():
        if not settings.min_patients <= count <= expected.max_cases:
            return refuse(
                RefusalReason.BAD_CASE_COUNT,
                f"{domain}: {count} patients, expected {settings.min_patients} to "
                f"{expected.max_cases}",
            )
    if not math.isfinite(_norm(flat)):
        return refuse(RefusalReason.NOT_FINITE, f"the {what} hold NaN or infinite numbers")
    if budget:
        wanted = (settings.epsilon, settings.delta)
        if tuple(values[name] for name in budget) != wanted:
            return refuse(RefusalReason.WRONG_BUDGET, f"expected epsilon and delta {wanted}")
        for name, row in unflatten(flat, schema).items():
            noise = noise_deviation(
                patients[name.rpartition("@")[2]], epsilon=settings.epsilon, delta=settings.delta
            )
            longest = 1 + 10 * noise * math.sqrt(row.numel())
            if float(row.double().norm()) > longest:
                return refuse(RefusalReason.NORM_TOO_LARGE, f"{name}: longer than {longest:.3g}")
    return AdmittedRelease(expected.site, patients, schema, flat)


def open_expected(
    buffer: object, expected: Expected, kind: Kind
) -> tuple[Manifest, Tensor] | Refusal:
    """What all kinds share: bytes that are whole, of this size, and what was asked for."""
    if not isinstance(buffer, bytes | bytearray | memoryview):
        got = type(buffer).__name__
        return expected.refuse(RefusalReason.DAMAGED, f"expected bytes, got {got}")
    limit = max_payload_bytes(expected.schema)
    if len(buffer) > limit:
        return expected.refuse(
            RefusalReason.OVERSIZED, f"{len(buffer)} bytes, at most {limit} for this study"
        )
    try:
        manifest, body, _ = open_payload(buffer, max_bytes=limit)
        problem = _mismatch(manifest, expected, kind)
        if problem:
            return expected.refuse(*problem)
        return manifest, decode_body(manifest, body, expected.schema)
    except PayloadError as error:
        return expected.refuse(RefusalReason.DAMAGED, str(error))


def _size(buffer: object) -> int:
    return len(buffer) if isinstance(buffer, bytes | bytearray | memoryview) else 0


def _mismatch(
    manifest: Manifest, expected: Expected, kind: Kind
) -> tuple[RefusalReason, str] | None:
    schema = expected.schema
    checks: tuple[tuple[RefusalReason, object, object], ...] = (
        (RefusalReason.WRONG_KIND, manifest.kind.value, kind.value),
        (RefusalReason.WRONG_STUDY, manifest.study, expected.study),
        (RefusalReason.WRONG_SITE, manifest.site, expected.site),
        (RefusalReason.WRONG_ROUND, manifest.round, expected.round),
        (RefusalReason.WRONG_BASE, manifest.base, expected.base),
        (RefusalReason.WRONG_SCHEMA, manifest.schema_digest, schema.digest if schema else ""),
        (RefusalReason.WRONG_SCHEMA, manifest.numel, schema.numel if schema else 0),
        (RefusalReason.WRONG_CODEC, manifest.codec, expected.codec),
    )
    for reason, got, wanted in checks:
        if got != wanted:
            return reason, f"got {got!r:.80}, expected {wanted!r:.80}"
    return None


def _norm(flat: Tensor) -> float:
    """The Euclidean norm of `(n,)`; finite exactly when every element is."""
    total = 0.0
    for block in torch.split(flat, _BLOCK):
        square = torch.dot(block, block).item()
        if not math.isfinite(square):
            # Squares do not cancel, so a finite sum proves finite elements. Only a sum that is
            # not finite may have overflowed float32; in float64 finite elements cannot.
            wide = block.double()
            square = torch.dot(wide, wide).item()
        total += square
    return math.sqrt(total) if math.isfinite(total) else math.inf
