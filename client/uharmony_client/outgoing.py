"""The one gate of a site: nothing leaves that has not passed here, and it is written down first.

The gate is the last one to look. It trusts nobody before it: a payload is opened as its receiver
would, and what is in it is held against the site's policy once more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from uharmony_client.ledger import Ledger, tensor_facts
from uharmony_client.policy import KEPT, Policy, allowed_values
from uharmony_model.alignment.class_prototypes import check_prototypes
from uharmony_model.alignment.shared_discriminator import channels_of, check_discriminator
from uharmony_model.alignment.style_codes import CENTROIDS, check_codes
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.payload import (
    Kind,
    Manifest,
    Value,
    decode_body,
    max_payload_bytes,
    open_payload,
)
from uharmony_model.exchange.published import DELTA, EPSILON, KINDS, PROTOTYPE, patients_of
from uharmony_model.exchange.schema import Schema, unflatten
from uharmony_model.exchange.statistics import LEAST_PATIENTS, patients_told, statistic_of
from uharmony_model.prototypes import MAX_RELEASED, MIN_PATIENTS
from uharmony_model.unlabelled.style_average import AMPLITUDE, check_style

MAX_TEXT = 65536
_ROUNDING = 1.01  # bf16 rounds each number by up to 1/256 of it, after the norm was clipped


class Outgoing:
    """Checks what leaves and writes it down; without a ledger nothing leaves the building."""

    def __init__(self, ledger: Ledger | None, policy: Policy, *, to: str = "") -> None:
        """`to` is who receives, as the ledger names it: the coordinator's address."""
        self.ledger, self.policy, self._to = ledger, policy, to

    def payload(self, data: bytes, schema: Schema | None) -> bytes:
        """An update, a release, a statistic (of a schema) or metrics (of none), as it is sent.

        Raises:
            ExchangeError: it is damaged, of another kind, or holds what the policy keeps here.
            StoreError: it could not be written down, so it must not leave.
        """
        opened = open_payload(data, max_bytes=max_payload_bytes(schema))
        manifest = opened.manifest
        if manifest.kind is Kind.UPDATE and schema is not None:
            flat = decode_body(manifest, opened.body, schema)
            self._check_norm(flat)
            values = _checked(manifest.values, manifest.kind, self.policy)
        elif manifest.kind in KINDS.values() and schema is not None:
            flat = decode_body(manifest, opened.body, schema)
            values = _checked_release(manifest, flat, schema, self.policy)
        elif manifest.kind is Kind.STATISTICS and schema is not None:
            flat = decode_body(manifest, opened.body, schema)
            values = _checked_statistic(manifest, flat, schema, self.policy)
        elif manifest.kind is Kind.METRICS and schema is None:
            flat = decode_body(manifest, opened.body, None)
            values = _checked(manifest.values, manifest.kind, self.policy)
        else:
            raise ExchangeError(
                f"a payload of kind {manifest.kind.value} "
                f"{'without' if schema is None else 'with'} tensors may not leave; "
                "an update, a release or a statistic (with its schema) and metrics (without "
                "tensors) may"
            )
        if self.ledger is not None:
            self.ledger.append(
                kind=manifest.kind.value,
                study=manifest.study,
                round_=manifest.round,
                to=self._to,
                data=data,
                tensors=() if schema is None else tensor_facts(flat, schema),
                values=values,
            )
        return data

    def text(self, kind: str, study: str, round_: int, text: str) -> str:
        """A short message (who this site is, why it refuses), as it is sent.

        Raises:
            ExchangeError: it is longer than such a message can be, or is no Unicode text.
            StoreError: it could not be written down, so it must not leave.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError:
            raise ExchangeError(f"a {kind} that is not Unicode text may not leave") from None
        if len(data) > MAX_TEXT:
            raise ExchangeError(
                f"a {kind} of {len(data)} bytes may not leave, at most {MAX_TEXT} may"
            )
        if self.ledger is not None:
            self.ledger.append(
                kind=kind,
                study=study,
                round_=round_,
                to=self._to,
                data=data,
                text=text,
            )
        return text

    def _check_norm(self, flat: Tensor) -> None:
        limit = self.policy.clip_norm
        if limit is None:
            return
        norm = float(flat.double().norm())
        if not norm <= limit * _ROUNDING:
            raise ExchangeError(
                f"an update of norm {norm:.4g} may not leave, policy.clip_norm is {limit:.4g}"
            )


def _checked(values: Mapping[str, Value], kind: Kind, policy: Policy) -> Mapping[str, Value]:
    """An update has single names, metrics have paths and `kept`; neither may carry the other's."""
    for name in values:
        if ("/" in name or name == KEPT) != (kind is Kind.METRICS):
            raise ExchangeError(f"value {ascii(name)[:120]} may not leave with {kind.value}")
    return allowed_values(values, policy)


def _checked_release(
    manifest: Manifest, flat: Tensor, schema: Schema, policy: Policy
) -> Mapping[str, Value]:
    """What is published: allowed by name, of enough patients, of the domains it names alone.

    Raises:
        ExchangeError: the policy does not name it, or it is not what it says.
    """
    what = next(name for name, kind in KINDS.items() if kind is manifest.kind)
    if what not in policy.publish:
        raise ExchangeError(f"{what} may not leave: policy.publish does not name them")
    noisy = manifest.kind is Kind.PROTOTYPE
    patients = patients_of(manifest.values, also=(EPSILON, DELTA) if noisy else ())
    least = max(MIN_PATIENTS, policy.min_cases)
    if min(patients.values()) < least:
        raise ExchangeError(
            f"{what} of {min(patients.values())} patients may not leave, expected {least} or more"
        )
    keys = [spec.name.rpartition("@") for spec in schema.tensors]
    if {domain for _, at, domain in keys if at} != set(patients) or not all(k[1] for k in keys):
        raise ExchangeError(f"{what} may not leave: tensors of other domains than are counted")
    if not bool(torch.isfinite(flat).all()):
        raise ExchangeError(f"{what} may not leave: they hold NaN or infinite numbers")
    if noisy:
        epsilon, delta = manifest.values[EPSILON], manifest.values[DELTA]
        covered = (
            isinstance(epsilon, float)
            and isinstance(delta, float)
            and 0 < epsilon <= 1
            and 0 < delta < 1 / max(patients.values())
        )
        sizes = [spec.numel for spec in schema.tensors]
        if not covered or {k[0] for k in keys} != {PROTOTYPE} or max(sizes) > MAX_RELEASED:
            raise ExchangeError(
                f"prototypes of {max(sizes)} numbers, epsilon {epsilon!r:.40}, delta "
                f"{delta!r:.40} may not leave; at most {MAX_RELEASED}, 1 and 1/patients may"
            )
    return manifest.values


def _checked_statistic(
    manifest: Manifest, flat: Tensor, schema: Schema, policy: Policy
) -> Mapping[str, Value]:
    """A statistic: allowed by name, of enough patients, and such as every receiver takes.

    Raises:
        ExchangeError: the policy does not name it, or it is not what it says.
    """
    what = statistic_of(schema)
    if what is None or what not in policy.statistics:
        raise ExchangeError(f"{what or 'this'} may not leave: policy.statistics does not name it")
    patients, least = patients_told(manifest.values, what), max(LEAST_PATIENTS, policy.min_cases)
    if patients < least:
        raise ExchangeError(
            f"{what} of {patients} patients may not leave, expected {least} or more"
        )
    tensors = unflatten(flat, schema)
    if what == "prototypes":
        classes, channels = tensors["mean"].shape
        check_prototypes(tensors, classes, channels)
    elif what == "codes":
        channels, numbers = tensors[CENTROIDS].shape
        check_codes(tensors, channels, numbers)
    elif what == "discriminator":
        check_discriminator(tensors, channels_of(tensors))
    else:
        channels, side = tensors[AMPLITUDE].shape[:2]
        check_style(tensors[AMPLITUDE], channels, side // 2)
    return manifest.values
