"""A secret on every request to a port of this machine: other users of it are no friends.

SuperLink and SuperNode listen on loopback, where every local user can connect. Each request must
carry the secret that the service drew at its start; Flower's own checks stay on behind it.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uharmony_model.atomic import write_atomic

if TYPE_CHECKING:  # services that only draw the secret need no Flower
    import httpx
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

SECRET_HEADER = "x-uharmony-secret"  # noqa: S105 - the name of a header

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def write_secret(path: Path) -> None:
    """Draw a new secret into a file of this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(path, secrets.token_urlsafe(32).encode())


def read_secret(path: Path) -> str:
    """The secret that a service drew at its start."""
    return path.read_text(encoding="ascii").strip()


def listen() -> socket.socket:
    """A listening socket on a port that is ours as long as this process lives.

    Nobody else can open the port while the program that serves it is started again, so what is
    sent there, the secret too, meets nobody else.
    """
    return socket.create_server(("127.0.0.1", 0), backlog=256)


def serve_on(listener: socket.socket) -> None:
    """Let the web server of this process use a socket that its service has opened."""
    import uvicorn  # both launchers have loaded it already

    run = uvicorn.Server.run

    def on_listener(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        run(self, sockets=[listener])

    uvicorn.Server.run = on_listener  # type: ignore[method-assign]


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class SecretInterceptor:
    """Puts the secret on each request of a Flower client."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the header before sending."""
        context.request.headers[SECRET_HEADER] = self._secret
        return call_next(context)


def guarded(app: AsgiApp, secret: str) -> AsgiApp:
    """The ASGI app behind the secret; requests without it get 403 and no other word."""
    expected = secret.encode()

    async def check(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = [value for name, value in scope["headers"] if name == SECRET_HEADER.encode()]
            if len(given) != 1 or not hmac.compare_digest(given[0], expected):
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        await app(scope, receive, send)

    return check
