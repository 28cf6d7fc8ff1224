"""`uharmony-client --site X`: the service of a site, one outbound connection and two processes.

The SuperNode speaks with the coordinator, the site process trains. If the site process dies, the
SuperNode is started again with it: the coordinator then sees at once that the work under way is
gone, asks again, and is answered from the store.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from uharmony_client.home import Home
from uharmony_client.joining import renew
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_service.certificate_parts import renew_loopback_certificate
from uharmony_service.health import Health
from uharmony_service.loopback import free_port, write_secret
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
        renew_loopback_certificate(home.run / "loopback.key", home.run / "loopback.pem")
        due = time.monotonic() + _RENEWAL_SECONDS

        def tick(restarts: Mapping[str, int]) -> None:
            nonlocal due
            if time.monotonic() < due:
                return
            due = time.monotonic() + _RENEWAL_SECONDS
            try:
                if home.identity.needs_renewal():
                    renew(home.identity, membership.address)
                    say("the site's certificate was renewed")
            except (ExchangeError, StoreError) as error:  # a full disk passes; it is tried again
                say(f"the certificate was not renewed: {error}")

        port = free_port()
        supervisor = Supervisor(
            programs(home, membership.address, port), home.log, on_tick=tick, say=say
        )
        with Health(health_port):
            return supervisor.run()


def programs(home: Home, address: str, port: int) -> list[Program]:
    """The SuperNode and the site process, on this loopback port."""
    python = sys.executable
    environment = {**QUIET, "FLWR_HOME": str(home.run / "flower")}
    threads = home.config.resources.threads
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    node = (
        "--coordinator", address,
        "--identity", str(home.identity.folder),
        "--run", str(home.run),
        "--port", str(port),
    )  # fmt: skip
    return [
        Program("supernode", (python, "-m", "uharmony_client.supernode", *node), environment),
        Program(
            "site",
            (python, "-m", "uharmony_client.site_process", str(home.source), str(port)),
            environment,
            main=True,
            together=("supernode",),
        ),
    ]
