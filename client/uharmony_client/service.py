"""`uharmony-client --site X`: the service of a site, one outbound connection and two processes.

The SuperNode speaks with the coordinator, the site process trains. If the site process dies, the
SuperNode is started again with it: the coordinator then sees at once that the work under way is
gone, asks again, and is answered from the store.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Mapping

from uharmony_client.home import Home
from uharmony_client.joining import renew
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_service.health import Health
from uharmony_service.loopback import listen, write_secret
from uharmony_service.supervision import QUIET, Program, Supervisor

_RENEWAL_SECONDS = 30.0


def serve(home: Home, *, health_port: int | None = None, say: Callable[[str], None] = print) -> int:
    """Run until the study is over or a signal ends it; the exit code.

    Raises:
        ConfigError: the site has not joined, or its service runs already.
    """
    membership = home.membership()
    home.study()
    with home.only_one():
        write_secret(home.run / "secret")
        due = time.monotonic() + _RENEWAL_SECONDS

        def tick(running: Mapping[str, bool]) -> None:
            nonlocal due
            health.say(running=all(running.values()))
            if time.monotonic() < due:
                return
            due = time.monotonic() + _RENEWAL_SECONDS
            try:
                if home.identity.needs_renewal():
                    renew(home.identity, membership.address)
                    say("the site's certificate was renewed")
            except (ExchangeError, StoreError) as error:  # a full disk passes; it is tried again
                say(f"the certificate was not renewed: {error}")

        with listen() as listener, Health(health_port) as health:
            supervisor = Supervisor(
                programs(home, membership.address, listener), home.log, on_tick=tick, say=say
            )
            return supervisor.run()


def programs(home: Home, address: str, listener: socket.socket) -> list[Program]:
    """The SuperNode, which serves the loopback socket, and the site process, which asks it."""
    port: int = listener.getsockname()[1]
    python = sys.executable
    environment = {**QUIET, "FLWR_HOME": str(home.run / "flower")}
    threads = home.config.resources.threads
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    node = (
        "--coordinator", address,
        "--identity", str(home.identity.folder),
        "--run", str(home.run),
        "--socket", str(listener.fileno()),
    )  # fmt: skip
    return [
        Program(
            "supernode",
            (python, "-m", "uharmony_client.supernode", *node),
            environment,
            keeps=(listener.fileno(),),
        ),
        Program(
            "site",
            (python, "-m", "uharmony_client.site_process", str(home.source), str(port)),
            environment,
            main=True,
            together=("supernode",),
        ),
    ]
