"""The gateway's way to SuperLink: kept connections over loopback, whole requests, whole answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

import h11

from uharmony_server.gateway_rules import Answer, Refused, returned
from uharmony_service.loopback import SECRET_HEADER

READ_BYTES = 1 << 18
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
# SuperLink closes a connection that was idle for five seconds.
IDLE_SECONDS = 4.0
MAX_KEPT = 32
MAX_OPEN = 128


class _Stale(Exception):  # noqa: N818 - a kept connection that has ended is no error
    """The connection ended before a byte of the answer came."""


@dataclass
class _Link:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    http: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT))
    used: float = 0.0

    async def close(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self.writer.wait_closed()


class Upstream:
    """SuperLink, at a port of this machine."""

    def __init__(self, port: int, max_bytes: int, secret: str) -> None:
        self._port = port
        self._secret = (SECRET_HEADER.encode(), secret.encode())
        self._max_bytes = max_bytes
        self._kept: list[_Link] = []
        self._open = asyncio.Semaphore(MAX_OPEN)

    async def send(self, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> Answer:
        """Send a request and wait for its whole answer.

        Raises:
            Refused: SuperLink cannot be reached (503), is too slow (504) or answers nonsense (502).
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._open:
                while (link := await self._take()) is not None:
                    try:
                        return await self._exchange(link, target, headers, body)
                    except _Stale:
                        continue
                try:
                    return await self._exchange(await self._connect(), target, headers, body)
                except (_Stale, OSError) as error:
                    raise Refused(503, "upstream-down", "not ready; try again") from error
        except TimeoutError:
            raise Refused(504, "upstream-slow", "no answer in time; try again") from None

    async def close(self) -> None:
        """Close the connections that are kept."""
        while self._kept:
            await self._kept.pop().close()

    async def _take(self) -> _Link | None:
        while self._kept:
            link = self._kept.pop()
            if time.monotonic() - link.used < IDLE_SECONDS and not link.reader.at_eof():
                return link
            await link.close()
        return None

    async def _connect(self) -> _Link:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self._port, limit=READ_BYTES
                )
        except TimeoutError:
            raise Refused(503, "upstream-down", "not ready; try again") from None
        return _Link(reader, writer)

    async def _exchange(
        self, link: _Link, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> Answer:
        kept = False
        try:
            size = (b"content-length", str(len(body)).encode())
            own = [(b"host", b"127.0.0.1"), size, self._secret]
            request = h11.Request(method=b"POST", target=target, headers=own + headers)
            head = link.http.send(request) or b""
            if body:
                link.http.send(h11.Data(data=body))
            link.http.send(h11.EndOfMessage())
            try:
                await _write(link.writer, head, body)
                answer = await self._answer(link)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise _Stale from error
            kept = self._keep(link)
        except h11.RemoteProtocolError:
            raise Refused(502, "upstream-nonsense", "try again") from None
        finally:
            if not kept:
                await link.close()
        return answer

    async def _answer(self, link: _Link) -> Answer:
        status, size = 0, 0
        headers: tuple[tuple[bytes, bytes], ...] = ()
        parts: list[bytes] = []
        while True:
            event = link.http.next_event()
            if event is h11.NEED_DATA:
                data = await link.reader.read(READ_BYTES)
                if not data and not status:
                    raise _Stale
                link.http.receive_data(data)
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, returned(event.headers)
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if size > self._max_bytes:
                    raise Refused(502, "upstream-too-large", "the answer is too large")
                parts.append(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, b"".join(parts), headers)
            elif isinstance(event, h11.ConnectionClosed):
                raise _Stale

    def _keep(self, link: _Link) -> bool:
        if link.http.our_state is not h11.DONE or link.http.their_state is not h11.DONE:
            return False
        if len(self._kept) >= MAX_KEPT:
            return False
        link.http.start_next_cycle()
        link.used = time.monotonic()
        self._kept.append(link)
        return True


async def _write(writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
    if len(body) <= READ_BYTES:
        writer.write(head + body)
    else:
        writer.write(head)
        writer.write(body)
    await writer.drain()
