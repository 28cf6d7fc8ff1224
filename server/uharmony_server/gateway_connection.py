"""One connection to the gateway: whole requests in, checked, then forwarded or answered.

Who calls is decided before a body is read, so a stranger never makes the gateway hold one of more
than 64 KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import h11

from uharmony_server.gateway_access import Access
from uharmony_server.gateway_enrolment import MAX_OWN_BODY, OWN, OwnPaths
from uharmony_server.gateway_limits import Rates
from uharmony_server.gateway_rules import (
    LEAVE,
    PUSH_MESSAGES,
    Answer,
    Peer,
    Refused,
    body_size,
    check_headers,
    check_node_key,
    check_route,
    check_senders,
    forwarded,
)
from uharmony_server.gateway_upstream import READ_BYTES, Upstream
from uharmony_server.registry import Enrolment
from uharmony_server.server_folder import ServerConfig

# A body or an answer of the largest size over a line of 0.2 Mbit/s.
TRANSFER_SECONDS = 600.0
SITE_PATIENCE = 2.0
MAX_BODIES_PER_SITE = 16
_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 1 << 20
_SITE_DRAIN_SECONDS = 10.0
_logger = logging.getLogger(__name__)


@dataclass
class Shared:
    """What all connections of a gateway have in common."""

    config: ServerConfig
    access: Access
    own: OwnPaths
    upstream: Upstream
    strangers: Rates
    sites: Rates
    refusals: Counter[str] = field(default_factory=Counter)
    seen: dict[str, float] = field(default_factory=dict)
    bodies: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    stopping: bool = False

    def refuse(self, reason: str, peer: Peer) -> None:
        """Count a refusal; the log gets its code and nothing that the caller chose."""
        self.refusals[reason] += 1
        _logger.warning("refused: %s, from %s, site %s", reason, peer.address, peer.site or "-")


class Connection:
    """Serves one connection until either side ends it."""

    def __init__(
        self,
        shared: Shared,
        peer: Peer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.peer = peer
        self.busy = False
        self.answering_own = False
        self._shared = shared
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)
        self._last = False
        self._headless = False

    async def serve(self) -> None:
        """Answer requests one after the other."""
        first = True
        while not self._last and not self._shared.stopping:
            try:
                request = await self._request(first)
                if request is None:
                    return
                self.busy = True
                answer = await self._handle(request)
            except Refused as refusal:
                answer = self._refusal(refusal)
            except h11.RemoteProtocolError as error:
                self._shared.refuse("not-http", self.peer)
                answer = self._refusal(Refused(error.error_status_hint, "not-http"), count=False)
            await self._respond(answer)
            self.busy = self.answering_own = False
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                if self._http.their_state in (h11.SEND_BODY, h11.ERROR):
                    await self._drain()
                return
            self._http.start_next_cycle()
            first = False

    def abort(self) -> None:
        """End the connection at once."""
        self._writer.transport.abort()

    async def _request(self, first: bool) -> h11.Request | None:
        config = self._shared.config
        known = self.peer.site is not None and not first
        patience = config.idle_seconds if known else min(config.header_seconds, config.idle_seconds)
        if not self._http.trailing_data[0]:
            try:
                async with asyncio.timeout(patience):
                    data = await self._reader.read(READ_BYTES)
            except TimeoutError:
                return None
            if not data:
                return None
            self._http.receive_data(data)
        try:
            async with asyncio.timeout(config.header_seconds):
                event = await self._event()
        except TimeoutError:
            raise Refused(408, "slow-header", "the header took too long") from None
        if not isinstance(event, h11.Request):
            return None
        self._headless = event.method == b"HEAD"
        return event

    async def _handle(self, request: h11.Request) -> Answer:
        shared, headers = self._shared, list(request.headers)
        refusal, record = None, None
        try:
            record = shared.access.recognise(self.peer)
        except Refused as error:
            refusal = error
        await self._pace(record)
        check_headers(headers)
        check_route(request.method, request.target)
        if request.target in OWN:
            self.answering_own = True
            body = await self._body(
                body_size(headers, MAX_OWN_BODY), shared.config.header_seconds, MAX_OWN_BODY
            )
            answer = await shared.own.answer(request.target, headers, body, record)
            self._last = request.target == LEAVE
            return answer
        if record is None:
            raise refusal or Refused(401, "not-enrolled")
        check_node_key(headers, record)
        limit = shared.config.max_body_bytes
        size = body_size(headers, limit)
        async with self._place(record.site, size):
            body = await self._body(size, TRANSFER_SECONDS, limit)
            # Reading may have taken minutes in which the site was revoked.
            shared.access.recognise(self.peer)
            if request.target == PUSH_MESSAGES:
                check_senders(body)
            shared.seen[record.site] = asyncio.get_running_loop().time()
            return await shared.upstream.send(request.target, forwarded(headers), body)

    async def _pace(self, record: Enrolment | None) -> None:
        if record is None:
            wait = self._shared.strangers.wait(self.peer.address)
        else:
            wait = self._shared.sites.wait(record.site, SITE_PATIENCE)
        if wait is None:
            raise Refused(429, "too-many-requests", "slow down")
        if wait > 0:
            await asyncio.sleep(wait)

    @contextlib.asynccontextmanager
    async def _place(self, site: str, size: int) -> AsyncIterator[None]:
        if size <= MAX_OWN_BODY:
            yield
            return
        places = self._shared.bodies.setdefault(site, asyncio.Semaphore(MAX_BODIES_PER_SITE))
        try:
            async with asyncio.timeout(self._shared.config.idle_seconds):
                await places.acquire()
        except TimeoutError:
            raise Refused(503, "too-many-bodies", "too many uploads at once; try again") from None
        try:
            yield
        finally:
            places.release()

    async def _body(self, size: int, seconds: float, limit: int) -> bytes:
        parts: list[bytes] = []
        received = 0
        if self._http.they_are_waiting_for_100_continue:
            proceed = h11.InformationalResponse(status_code=100, headers=[])
            self._writer.write(self._http.send(proceed) or b"")
        try:
            async with asyncio.timeout(seconds):
                while True:
                    event = await self._event(self._shared.config.idle_seconds)
                    if isinstance(event, h11.Data):
                        received += len(event.data)
                        if received > min(size, limit):
                            raise Refused(413, "body-too-large")
                        parts.append(event.data)
                    elif isinstance(event, h11.EndOfMessage):
                        return b"".join(parts)
                    else:
                        raise ConnectionResetError
        except TimeoutError:
            raise Refused(408, "slow-body", "the body took too long") from None

    async def _event(self, idle: float | None = None) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event  # type: ignore[return-value]
            async with asyncio.timeout(idle):
                self._http.receive_data(await self._reader.read(READ_BYTES))

    def _refusal(self, refusal: Refused, *, count: bool = True) -> Answer:
        if count:
            self._shared.refuse(refusal.reason, self.peer)
        content = {"error": refusal.reason, "detail": refusal.detail}
        return Answer(refusal.status, json.dumps(content).encode())

    async def _respond(self, answer: Answer) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [*answer.headers, (b"content-length", str(len(answer.body)).encode())]
        if self._last or self._shared.stopping or self._http.their_state is not h11.DONE:
            headers.append((b"connection", b"close"))
        head = self._http.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        body = b"" if self._headless else answer.body
        self._http.send(h11.Data(data=body))
        self._http.send(h11.EndOfMessage())
        async with asyncio.timeout(TRANSFER_SECONDS):
            if len(body) <= READ_BYTES:
                self._writer.write(head + body)
            else:
                self._writer.write(head)
                self._writer.write(body)
            await self._writer.drain()

    async def _drain(self) -> None:
        # Closing on unread bytes resets the connection, and the caller would lose the answer.
        known = self.peer.site is not None
        left = self._shared.config.max_body_bytes * 2 if known else _DRAIN_BYTES
        with contextlib.suppress(TimeoutError, OSError, h11.RemoteProtocolError):
            async with asyncio.timeout(_SITE_DRAIN_SECONDS if known else _DRAIN_SECONDS):
                while left > 0 and self._http.their_state is h11.SEND_BODY:
                    event = await self._event()
                    left -= len(event.data) if isinstance(event, h11.Data) else 0
        if self._http.their_state is h11.ERROR:
            await self._drain_bytes(left)

    async def _drain_bytes(self, left: int) -> None:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while left > 0 and (data := await self._reader.read(READ_BYTES)):
                    left -= len(data)
