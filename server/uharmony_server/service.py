"""`uharmony-server start`: SuperLink, the gateway and the rounds, kept alive and ended together.

This parent is not on the network. It alone holds the authority's key: it signs what the gateway
puts into the folder, and renews certificates before they run out.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from uharmony_model.errors import StoreError
from uharmony_server.registrar import Registrar
from uharmony_server.server_folder import ServerFolder
from uharmony_service.health import Health
from uharmony_service.lock import only_one
from uharmony_service.loopback import listen, write_secret
from uharmony_service.supervision import QUIET, Program, Supervisor

_RENEWAL_SECONDS = 60.0


def serve(
    folder: ServerFolder, *, health_port: int | None = None, say: Callable[[str], None] = print
) -> int:
    """Run the study's service until its last round is done or a signal ends it.

    Raises:
        ConfigError: the study was changed, or another process serves this folder already.
    """
    folder.check_study()
    with only_one(folder.run, f"{folder.path}: is served by another process already"):
        write_secret(folder.loopback_secret)
        registrar = Registrar(folder)
        due = 0.0

        def tick(running: Mapping[str, bool]) -> None:
            nonlocal due
            health.say(running=all(running.values()))
            with suppress(StoreError):  # a full disk: the request stays and is answered later
                registrar.handle_pending()
            if time.monotonic() >= due:
                due = time.monotonic() + _RENEWAL_SECONDS
                with suppress(StoreError):  # a full disk: the old one is good for a while yet
                    if folder.renew_certificate():
                        say("the coordinator's certificate was renewed")

        with listen() as listener, Health(health_port) as health:
            supervisor = Supervisor(programs(folder, listener), folder.log, on_tick=tick, say=say)
            return supervisor.run()


def programs(folder: ServerFolder, listener: socket.socket) -> list[Program]:
    """SuperLink, which serves the loopback socket, the gateway, the rounds."""
    port: int = listener.getsockname()[1]
    python, where = sys.executable, str(folder.path)
    environment = {**QUIET, "OMP_NUM_THREADS": "1", "FLWR_HOME": str(folder.run / "flower")}
    superlink = (
        "--socket", str(listener.fileno()),
        "--tls", str(folder.loopback_key.parent),
        "--secret", str(folder.loopback_secret),
    )  # fmt: skip
    return [
        Program(
            "superlink",
            (python, "-m", "uharmony_server.superlink", *superlink),
            environment,
            keeps=(listener.fileno(),),
        ),
        Program(
            "gateway", (python, "-m", "uharmony_server.gateway", where, str(port)), environment
        ),
        Program(
            "rounds",
            (python, "-m", "uharmony_server.coordinator", where, str(port)),
            environment,
            main=True,
        ),
    ]
