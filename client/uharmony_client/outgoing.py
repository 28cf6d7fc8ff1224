"""The one gate of a site: nothing leaves that has not passed here, and it is written down first.

The gate is the last one to look. It trusts nobody before it: a payload is opened as its receiver
would, and what is in it is held against the site's policy once more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from uharmony_client.ledger import Ledger, tensor_facts
from uharmony_client.policy import KEPT, Policy, allowed_values
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.payload import (
    Kind,
    Value,
    decode_body,
    max_payload_bytes,
    open_payload,
)
from uharmony_model.exchange.schema import Schema

MAX_TEXT = 65536
_ROUNDING = 1.01  # bf16 rounds each number by up to 1/256 of it, after the norm was clipped


class Outgoing:
    """Checks what leaves and writes it down; without a ledger nothing leaves the building."""

    def __init__(self, ledger: Ledger | None, policy: Policy, *, to: str = "") -> None:
        """`to` is who receives, as the ledger names it: the coordinator's address."""
        self.ledger, self.policy, self._to = ledger, policy, to

    def payload(self, data: bytes, schema: Schema | None) -> bytes:
        """An update of this schema, or metrics (no schema), as it is sent.

        Raises:
            ExchangeError: it is damaged, of another kind, or holds what the policy keeps here.
            StoreError: it could not be written down, so it must not leave.
        """
        opened = open_payload(data, max_bytes=max_payload_bytes(schema))
        manifest = opened.manifest
        if manifest.kind is Kind.UPDATE and schema is not None:
            flat = decode_body(manifest, opened.body, schema)
            self._check_norm(flat)
        elif manifest.kind is Kind.METRICS and schema is None:
            flat = decode_body(manifest, opened.body, None)
        else:
            raise ExchangeError(
                f"a payload of kind {manifest.kind.value} "
                f"{'without' if schema is None else 'with'} tensors may not leave; "
                "an update (with its schema) and metrics (without tensors) may"
            )
        values = _checked(manifest.values, manifest.kind, self.policy)
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
