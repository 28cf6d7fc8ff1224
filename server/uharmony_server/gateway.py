"""The one public port of a study. `python -m uharmony_server.gateway DIR UPSTREAM_PORT` runs it.

TLS 1.3 only. A certificate is optional in the handshake, so that a hospital can join; without one
of an enrolled site only the paths for joining answer. SuperLink is reached over loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import signal
import socket
import ssl
import sys
import time
from pathlib import Path

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, StoreError, UHarmonyError
from uharmony_server.gateway_access import Access
from uharmony_server.gateway_connection import Connection, Shared
from uharmony_server.gateway_enrolment import OwnPaths
from uharmony_server.gateway_limits import Places, Rates, caller
from uharmony_server.gateway_rules import Refused, peer_of
from uharmony_server.gateway_upstream import READ_BYTES, Upstream
from uharmony_server.registry import Registry
from uharmony_server.server_folder import ServerFolder
from uharmony_service.loopback import read_secret
from uharmony_service.supervision import end_with_parent

TICK_SECONDS = 1.0
STOP_SECONDS = 10.0
BACKLOG = 256
_logger = logging.getLogger(__name__)


class Gateway:
    """Accepts connections, keeps them within their limits, and ends them."""

    def __init__(self, folder: ServerFolder, upstream_port: int) -> None:
        config = folder.config
        access = Access(Registry(folder.invites, folder.sites), folder.study.digest)
        self._folder = folder
        self._context = server_context(folder)
        self._certificate = self._certificate_time()
        self._places = Places(config.max_connections, config.max_connections_per_address)
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._written = ""
        self.shared = Shared(
            config,
            access,
            OwnPaths(folder, access),
            Upstream(
                upstream_port,
                config.max_body_bytes,
                read_secret(folder.loopback_secret),
            ),
            strangers=Rates(config.requests_per_second_before_authentication),
            sites=Rates(config.requests_per_second),
        )

    def listen(self) -> socket.socket:
        """Open the public port.

        Raises:
            ConfigError: it cannot be opened.
        """
        config = self._folder.config
        family = socket.AF_INET6 if ":" in config.listen else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((config.listen, config.listen_port))
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"{config.listen}:{config.listen_port} cannot be opened: {error.strerror}; "
                "see `listen` and `port` in server.yaml, and what else uses the port"
            ) from error
        return listener

    async def run(self, listener: socket.socket, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then finish the requests in progress and end."""
        self.shared.access.refresh()
        jobs = [asyncio.create_task(self._accept(listener)), asyncio.create_task(self._watch())]
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([*jobs, stopped], return_when=asyncio.FIRST_COMPLETED)
            for job in jobs:
                if job.done():
                    job.result()
        finally:
            for task in (*jobs, stopped):
                task.cancel()
            await asyncio.gather(*jobs, stopped, return_exceptions=True)
            listener.close()
            await self._finish()

    async def _finish(self) -> None:
        self.shared.stopping = True
        for connection in self._connections:
            if not connection.busy:
                connection.abort()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.shared.upstream.close()
        self._write_status()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors left, or gone before it was accepted
                _logger.warning("not accepted: %s", error.strerror)
                await asyncio.sleep(0.1)
                continue
            name = caller(address[0])
            # Before the handshake: it is what costs most.
            if not self._places.take(name):
                self.shared.refusals["too-many-connections"] += 1
                accepted.close()
                continue
            task = asyncio.create_task(self._serve(accepted, name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, accepted: socket.socket, address: str) -> None:
        try:
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            loop = asyncio.get_running_loop()
            reader = asyncio.StreamReader(limit=READ_BYTES, loop=loop)
            protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
            try:
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    accepted,
                    ssl=self._context,
                    ssl_handshake_timeout=self._folder.config.header_seconds,
                    ssl_shutdown_timeout=2.0,
                )
            except (OSError, EOFError):
                # TLS below 1.3, plain HTTP, a foreign or expired certificate, nothing at all.
                self.shared.refusals["handshake"] += 1
                accepted.close()
                return
            await self._converse(
                address, reader, asyncio.StreamWriter(transport, protocol, reader, loop)
            )
        except Exception:
            _logger.exception("a connection ended by a fault of the gateway")
            self.shared.refusals["fault"] += 1
        finally:
            self._places.give_back(address)

    async def _converse(
        self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer = peer_of(address, writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        connection = Connection(self.shared, peer, reader, writer)
        self._connections.add(connection)
        try:
            await connection.serve()
            writer.close()
        except (OSError, TimeoutError):
            pass  # the other side is gone, or too slow to take its answer
        finally:
            self._connections.discard(connection)
            if not writer.is_closing():
                writer.transport.abort()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(3):
                    await writer.wait_closed()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.shared.access.refresh()
            for connection in list(self._connections):
                self._shut_out(connection)
            self._reload_certificate()
            await asyncio.to_thread(self._write_status)

    def _shut_out(self, connection: Connection) -> None:
        if connection.peer.site is None or connection.answering_own:
            return
        try:
            self.shared.access.recognise(connection.peer)
        except Refused as refusal:
            self.shared.refuse(refusal.reason, connection.peer)
            connection.abort()

    def _certificate_time(self) -> int:
        try:
            return self._folder.tls_certificate.stat().st_mtime_ns
        except OSError:
            return 0

    def _reload_certificate(self) -> None:
        changed = self._certificate_time()
        if changed in (0, self._certificate):
            return
        self._certificate = changed
        try:
            self._context.load_cert_chain(self._folder.tls_certificate, self._folder.tls_key)
            _logger.info("the new server certificate is in use")
        except (OSError, ssl.SSLError):
            _logger.exception("the new server certificate cannot be used; the old one stays")

    def _write_status(self) -> None:
        now, wall = time.monotonic(), time.time()
        text = json.dumps(
            {
                "refusals": dict(sorted(self.shared.refusals.items())),
                "connections": self._places.taken,
                "last_seen": {
                    site: int(wall - (now - seen))
                    for site, seen in sorted(self.shared.seen.items())
                },
            }
        )
        if text == self._written:
            return
        try:
            write_atomic(self._folder.gateway_status, text.encode())
            self._written = text
        except StoreError as error:
            _logger.warning("%s", error)


def server_context(folder: ServerFolder) -> ssl.SSLContext:
    """TLS 1.3, our certificate, and the study's authority as the only one that vouches for sites.

    Raises:
        StoreError: a certificate or the key cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL
    # A resumed session would not be checked against the certificate's end again.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:
        context.load_cert_chain(folder.tls_certificate, folder.tls_key)
        context.load_verify_locations(folder.ca_certificate)
    except (OSError, ssl.SSLError) as error:
        raise StoreError(f"{folder.path}: its certificates cannot be used: {error}") from error
    return context


async def serve(folder: ServerFolder, upstream_port: int) -> None:
    """Run the gateway until SIGTERM or SIGINT.

    Raises:
        ConfigError: the port cannot be opened.
        StoreError: a certificate cannot be read.
    """
    gateway = Gateway(folder, upstream_port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await gateway.run(gateway.listen(), stop)


def main(arguments: list[str]) -> int:
    """Run as a process of its own."""
    end_with_parent()
    if len(arguments) != 2 or not arguments[1].isdecimal():
        print("error: expected the study's folder and SuperLink's port", file=sys.stderr)
        return ConfigError.exit_code
    logging.basicConfig(level=logging.INFO, format="%(asctime)s gateway %(levelname)s %(message)s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))
    try:
        asyncio.run(serve(ServerFolder.open(Path(arguments[0])), int(arguments[1])))
    except UHarmonyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
