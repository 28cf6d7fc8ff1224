"""The gateway's own paths: what a hospital needs before and after it is a site.

The authority's certificate and the time are public. The study is shown to whoever holds an
invite or is enrolled. Everything that needs the authority's key goes through the mailbox.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable

from uharmony_model.errors import PayloadError, StoreError, UHarmonyError
from uharmony_model.exchange.canonical import canonical_json, parse_canonical
from uharmony_model.exchange.joining import EnrolmentRequest, RenewalRequest
from uharmony_server.gateway_access import Access
from uharmony_server.gateway_rules import CA, ENROL, LEAVE, RENEW, STUDY, TIME, Answer, Refused
from uharmony_server.mailbox import Errand, Mailbox
from uharmony_server.registry import Enrolment
from uharmony_server.server_folder import ServerFolder

MAX_OWN_BODY = 64 << 10
MAX_WAITING = 32
WAIT_SECONDS = 20.0
_POLL_SECONDS = 0.05
_PEM = ((b"content-type", b"application/x-pem-file"),)


class OwnPaths:
    """Answers them."""

    def __init__(self, folder: ServerFolder, access: Access) -> None:
        self._access = access
        self._mailbox = Mailbox(folder.requests, folder.answers)
        self._ca = folder.ca_certificate.read_bytes()
        self._study = folder.study_json.read_bytes()
        self._waiting = 0

    async def answer(
        self,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes,
        record: Enrolment | None,
    ) -> Answer:
        """Answer a request to one of the own paths; `record` is that of an enrolled caller.

        Raises:
            Refused: the caller has no right to it, or the registrar refuses.
        """
        if target == CA:
            return Answer(200, self._ca, _PEM)
        if target == TIME:
            return Answer(200, json.dumps({"time": time.time()}).encode())
        if target == STUDY:
            if record is None and not self._invited(headers):
                raise Refused(401, "no-invite", "the join code is unknown or has expired")
            return Answer(200, self._study)
        try:
            return await self._ask(self._errand(target, body, record))
        except PayloadError as error:
            raise Refused(400, "malformed", str(error)) from None
        except StoreError:
            raise Refused(503, "mailbox", "the coordinator cannot take requests now") from None

    def _invited(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                try:
                    token = value[7:].decode("ascii")
                    return self._access.registry.reader(token) is not None
                except (UnicodeDecodeError, UHarmonyError):
                    return False
        return False

    def _errand(self, target: bytes, body: bytes, record: Enrolment | None) -> Errand:
        if target == ENROL:
            request = parse_canonical(
                EnrolmentRequest, body, what="enrolment", max_bytes=MAX_OWN_BODY
            )
            return Errand(kind="enrol", enrol=request)
        if record is None:
            raise Refused(401, "no-certificate", "a certificate of an enrolled site is needed")
        if target == LEAVE:
            return Errand(kind="leave", site=record.site, tls_key=record.tls_key)
        renewal = parse_canonical(RenewalRequest, body, what="renewal", max_bytes=MAX_OWN_BODY)
        return Errand(kind="renew", site=record.site, tls_key=record.tls_key, renew=renewal)

    async def _ask(self, errand: Errand) -> Answer:
        if self._waiting >= MAX_WAITING:
            raise Refused(503, "too-many-waiting", "too many requests wait; try again")
        self._waiting += 1
        name = self._mailbox.put(errand)
        try:
            ends = time.monotonic() + WAIT_SECONDS
            while (outcome := self._mailbox.take(name)) is None:
                if time.monotonic() > ends:
                    raise Refused(503, "no-registrar", "the coordinator does not answer; try again")
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            self._waiting -= 1
            self._mailbox.withdraw(name)
        if outcome.status != 200:
            reason = "refused-by-registrar" if outcome.status < 500 else "registrar-failed"
            raise Refused(outcome.status, reason, outcome.detail)
        if errand.kind in ("enrol", "renew"):
            self._access.refresh()
        return Answer(200, canonical_json(outcome.answer).encode() if outcome.answer else b"{}")


OWN = frozenset({CA, TIME, STUDY, ENROL, RENEW, LEAVE})
