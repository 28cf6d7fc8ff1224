"""A thin launcher around Flower's SuperLink: loopback, in memory, behind the service's secret.

SuperLink keeps nothing that is needed after its death: rounds have their own checkpoints, and the
coordinator registers the sites' keys again. In memory it is also several times faster.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import flwr.superlink.main as superlink_api
import uvicorn
from flwr.superlink.cli import flower_superlink

from uharmony_service.loopback import guarded, read_secret, serve_on
from uharmony_service.runtime import require_flower
from uharmony_service.supervision import end_with_parent


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m uharmony_server.superlink`: started by the service, not by hand."""
    end_with_parent()
    require_flower()
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True, help="a listening loopback socket")
    parser.add_argument(
        "--tls", type=Path, required=True, help="folder of a certificate that Flower wants to see"
    )
    parser.add_argument("--secret", type=Path, required=True)
    given = parser.parse_args(arguments)

    secret = read_secret(given.secret)
    create_app = superlink_api.create_app
    superlink_api.create_app = lambda *a: guarded(create_app(*a), secret)  # type: ignore[assignment]
    # The gateway has ended TLS. On loopback, behind the secret and on a socket that nobody else can
    # open, encrypting once more took a third of a large round. One line a request is no log.
    run = uvicorn.run
    plain = {"access_log": False, "ssl_certfile": None, "ssl_keyfile": None}
    uvicorn.run = lambda **settings: run(**{**settings, **plain})
    listener = socket.socket(fileno=given.socket)
    serve_on(listener)
    # Without a certificate Flower does not switch the authentication of nodes on.
    certificate = str(given.tls / "loopback.pem")
    sys.argv = [
        "flower-superlink", "--isolation", "process",
        "--host", "127.0.0.1", "--port", str(listener.getsockname()[1]),
        "--ssl-ca-certfile", certificate,
        "--ssl-certfile", certificate,
        "--ssl-keyfile", str(given.tls / "loopback.key"),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    flower_superlink()


if __name__ == "__main__":
    main()
