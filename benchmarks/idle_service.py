"""The service of a site with the idle process in the place of the training one."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace

from uharmony_client import service
from uharmony_client.home import Home
from uharmony_service.supervision import Program


def main() -> None:
    """`python -m benchmarks.idle_service SITE_YAML`."""
    home = Home.find(sys.argv[1])
    real = service.programs

    def idle(home: Home, address: str, listener: socket.socket) -> list[Program]:
        node, site = real(home, address, listener)
        command = (sys.executable, "-m", "benchmarks.idle_site", *site.command[3:])
        return [node, replace(site, command=command)]

    service.programs = idle
    sys.exit(service.serve(home))


if __name__ == "__main__":
    main()
