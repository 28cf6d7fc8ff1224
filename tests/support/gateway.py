"""A coordinator with a running gateway and registrar, and a SuperLink that only records."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from uharmony_client.identity import Identity
from uharmony_client.joining import enrol, fetch_ca, fetch_study
from uharmony_model.exchange.joining import JoinCode, Membership
from uharmony_server.gateway import Gateway
from uharmony_server.registrar import Registrar
from uharmony_server.registry import Registry
from uharmony_server.server_folder import ServerConfig, ServerFolder
from uharmony_service.keys import certificate_digest, load_certificate

ROOT = Path(__file__).resolve().parent.parent.parent
STUDY = ROOT / "examples" / "quick.yaml"
PULL, PUSH_OBJECT = "/v1/fleet/pull-messages", "/v1/fleet/push-object"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Seen:
    """One request as SuperLink got it."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes


class FakeSuperLink:
    """Answers every request with its own body and writes down what came."""

    def __init__(self, folder: ServerFolder, port: int) -> None:
        seen: list[Seen] = []
        callers: set[Any] = set()
        sockets: set[socket.socket] = set()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 5
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                sockets.add(self.connection)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                seen.append(Seen(self.command, self.path, list(self.headers.items()), body))
                callers.add(self.client_address)
                self.send_response(200)
                self.send_header("content-type", "application/protobuf")
                self.send_header("content-length", str(len(body)))
                self.send_header("flwr-answer", "yes")
                self.send_header("x-internal", "no")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            block_on_close = False
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # connections that the gateway drops

        self.seen, self.callers, self._sockets = seen, callers, sockets
        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self._server.server_close()


@dataclass
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Town:
    """The coordinator."""

    folder: ServerFolder
    upstream_port: int
    gateway: Gateway

    @property
    def registry(self) -> Registry:
        return Registry(self.folder.invites, self.folder.sites)

    @property
    def port(self) -> int:
        return self.folder.config.listen_port

    def code(self, site: str, hours: float = 1) -> JoinCode:
        token, expires = self.registry.invite(site, hours)
        fingerprint = certificate_digest(load_certificate(self.folder.ca_certificate))
        return JoinCode(
            address=self.folder.config.address, ca_sha256=fingerprint, token=token, expires=expires
        )

    def join(self, site: str, home: Path) -> Identity:
        """The whole way of a hospital."""
        identity = Identity(home / "identity")
        identity.make_keys()
        code = self.code(site)
        ca = fetch_ca(code)
        study = fetch_study(code, ca)
        answer = enrol(code, ca, identity.request(site, code, self.folder.study.digest))
        member = Membership(
            address=code.address,
            site=site,
            study=self.folder.study.digest,
            approved_at=int(time.time()),
        )
        identity.keep(answer, member, study)
        return identity

    def anonymous(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.folder.ca_certificate)
        return context

    def connect(self, context: ssl.SSLContext) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        try:
            return context.wrap_socket(raw, server_hostname="127.0.0.1")
        except BaseException:
            raw.close()
            raise

    def call(
        self,
        context: ssl.SSLContext,
        path: str,
        body: bytes | None = b"",
        headers: dict[str, str] | None = None,
        method: str = "POST",
    ) -> Reply:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=5)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.read(), dict(response.getheaders()))

    def raw(self, context: ssl.SSLContext, data: bytes, answers: int = 1) -> bytes:
        """Send bytes as they are and read until so many answers came or the gateway closes."""
        received = b""
        with self.connect(context) as connection:
            connection.settimeout(3)
            with contextlib.suppress(OSError):
                connection.sendall(data)
                while _complete(received) < answers and (part := connection.recv(1 << 16)):
                    received += part
        return received


def _complete(received: bytes) -> int:
    answers = 0
    while b"\r\n\r\n" in received:
        head, _, received = received.partition(b"\r\n\r\n")
        found = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        size = int(found[1]) if found else 0
        answers += len(received) >= size
        received = received[size:]
    return answers


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(OSError):
        while part := connection.recv(1 << 16):
            received += part
    return received


@contextlib.contextmanager
def town(path: Path, **config: Any) -> Iterator[Town]:
    """A new study with its gateway running; the fake SuperLink is the test's own affair."""
    port = free_port()
    settings = {
        "address": f"127.0.0.1:{port}",
        "listen": "127.0.0.1",
        "requests_per_second_before_authentication": 1000.0,
        **config,
    }
    folder = ServerFolder.create(STUDY, path / "server", ServerConfig(**settings))
    upstream = free_port()
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop, ended = asyncio.Event(), threading.Event()
    gateways: list[Gateway] = []

    async def serve() -> None:
        gateway = Gateway(folder, upstream)
        listener = gateway.listen()
        gateways.append(gateway)
        ready.set()
        await gateway.run(listener, stop)

    def registrar() -> None:
        desk = Registrar(folder)
        while not ended.wait(0.02):
            desk.handle_pending()

    threads = [
        threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True),
        threading.Thread(target=registrar, daemon=True),
    ]
    logging.getLogger("uharmony_server").setLevel(logging.ERROR)
    for thread in threads:
        thread.start()
    assert ready.wait(5)
    try:
        yield Town(folder, upstream, gateways[0])
    finally:
        ended.set()
        loop.call_soon_threadsafe(stop.set)
        for thread in threads:
            thread.join(15)
            assert not thread.is_alive()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        logging.getLogger("uharmony_server").setLevel(logging.NOTSET)
