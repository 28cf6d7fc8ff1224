"""A bad line between a site and the coordinator: a TCP proxy on loopback that breaks on request.

`cut(after)` resets a connection in the middle of an upload. `partition()` holds every byte back,
in both directions, until `heal()`; connections stay open. `black_hole()` swallows, without an end
or a reset, everything on the connections that are open now; new ones work.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_READ = 1 << 14
_RESET = struct.pack("ii", 1, 0)  # closed at once, with an RST


class _Line:
    """One connection: bytes since the last answer, and whether it is lost or cut."""

    def __init__(self) -> None:
        self.lost = self.cut = False
        self.request = 0
        self.opened = time.monotonic()


class Chaos:
    """The proxy; it runs in a thread of its own."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[_Line] = set()
        self._passing = threading.Event()
        self._passing.set()
        self._cut_after = 0
        self._cuts_left = 0
        self.cuts: list[int] = []
        self.opened: list[float] = []
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        self._loop.close()
        self._listener.close()

    def cut(self, after: int, times: int) -> None:
        """Reset connections, `times` in all, after so many bytes of one request."""
        self._cut_after, self._cuts_left = after, times

    def partition(self) -> None:
        """Hold everything back."""
        self._passing.clear()

    def heal(self) -> None:
        """Let everything pass again, what was held back first."""
        self._passing.set()

    def black_hole(self) -> int:
        """Lose the connections that are open now, silently; how many there are."""
        for line in self._open:
            line.lost = True
        return len(self._open)

    # --- parts -----------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, sock=self._listener)
        await self._over.wait()
        server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.1)  # transports that were aborted are closed in the loop's next turn

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Line()
        self._open.add(line)
        self.opened.append(line.opened)
        ends = [writer]
        try:
            await self._pass()
            from_there, there = await asyncio.open_connection("127.0.0.1", self._target)
            ends.append(there)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(line, reader, there, up=True))
                pumps.create_task(self._pump(line, from_there, writer, up=False))
        except* OSError:
            pass
        finally:
            self._open.discard(line)
            for end in ends:
                if line.cut:
                    end.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, _RESET
                    )
                end.transport.abort()

    async def _pass(self) -> None:
        while not self._passing.is_set():
            await asyncio.sleep(0.02)

    async def _pump(
        self, line: _Line, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, up: bool
    ) -> None:
        while data := await source.read(_READ):
            await self._pass()
            if line.lost:
                continue
            line.request = line.request + len(data) if up else 0
            if self._cuts_left and line.request > self._cut_after:
                target.write(data[: len(data) - (line.request - self._cut_after)])
                self._cuts_left -= 1
                self.cuts.append(self._cut_after)
                line.cut = True
                raise ConnectionResetError
            target.write(data)
            await target.drain()
        if line.lost:
            await asyncio.Event().wait()
        await self._pass()
        if target.can_write_eof():
            target.write_eof()
