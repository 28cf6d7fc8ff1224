"""The bare configuration beside the complete one: the same executors, no TLS, no gateway.

SuperLink without encryption, SuperNodes that register themselves, no client certificates, no node
authentication, no ledger. What the difference to the complete configuration is, safety costs.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supernode.fleet_http_client import FleetHttpClient

from benchmarks.idle_site import idle_app
from uharmony_client.executor import execute_tasks
from uharmony_client.supernode import adapt
from uharmony_model.allocator import keep_freed_pages
from uharmony_model.initial import initial_weights
from uharmony_model.study import Study, load_study
from uharmony_server.board import Board, CoordinatorBoard
from uharmony_server.link import LinkSession
from uharmony_server.link_grid import LinkGrid, Waiting
from uharmony_server.rounds import Patience, run_rounds
from uharmony_service.loopback import SecretInterceptor, free_port, guarded

SECRET = "bare"  # noqa: S105 - nothing is protected here


class BareLink(LinkSession):
    """A session without encryption; SuperNodes have registered themselves in this order."""

    def admit(self, members: Mapping[str, bytes]) -> None:
        """The nodes are known from their start."""
        self.nodes = self.numbers

    numbers: dict[str, int]

    def known(self) -> set[int]:
        """The nodes that have registered themselves."""
        return {node.node_id for node in self._control(ListNodesRequest()).nodes_info}

    def await_node(self, site: str) -> None:
        """Wait until one more node is there: it is the site's, for they start in turn."""
        before = set(self.numbers.values())
        while not (new := self._listed() - before):
            time.sleep(0.1)
        (self.numbers[site],) = new

    def _listed(self) -> set[int]:
        try:
            return self.known()
        except httpx.HTTPError:  # SuperLink is starting
            return set()


def seconds_a_round(study: Study, sites: tuple[str, ...], folder: Path) -> float:
    """Median seconds between checkpoints; the first round, which warms up, is left out."""
    text = folder / "study.json"
    text.write_text(study.canonical_json())
    port, started = free_port(), []
    log = (folder / "bare.log").open("wb")

    def start(*arguments: str) -> None:
        command = [sys.executable, "-m", "benchmarks.bare", *arguments]
        started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    try:
        start("superlink", str(port))
        link = BareLink(f"127.0.0.1:{port}", SECRET)
        link.numbers = {}
        for site in sites:
            own = free_port()
            start("supernode", str(port), str(own), str(folder / site))
            link.await_node(site)
            start("site", site, str(text), str(own))
        schema, initial = initial_weights(study)
        link.open(dict.fromkeys(sites, b""))
        grid = LinkGrid(
            link,
            lambda: dict.fromkeys(sites, b""),
            Waiting(),
            CoordinatorBoard(folder / "status.json", Board()),
        )
        stamps: list[float] = []
        run_rounds(
            study,
            schema,
            initial,
            grid,
            folder / "rounds",
            on_round=lambda _: stamps.append(time.perf_counter()),
            patience=Patience(certified=grid.site_of),
        )
        link.close()
    finally:
        for process in started:
            process.kill()
            process.wait()
        log.close()
    return statistics.median(b - a for a, b in itertools.pairwise(stamps))


def superlink(port: str) -> None:
    """Flower's SuperLink, without TLS."""
    import flwr.superlink.main as superlink_api
    from flwr.superlink.cli import flower_superlink

    create_app = superlink_api.create_app
    superlink_api.create_app = lambda *a: guarded(create_app(*a), SECRET)  # type: ignore[assignment]
    sys.argv = ["flower-superlink", "--isolation", "process", "--insecure", "--host", "127.0.0.1",
                "--port", port, "--disable-runtime-dependency-installation"]  # fmt: skip
    flower_superlink()


def supernode(superlink_port: str, port: str, folder: str) -> None:
    """Our launcher's parts in Flower's SuperNode, without TLS."""
    from flwr.supernode.cli.flower_supernode import flower_supernode

    adapt(SECRET, Path(folder + "-node"))
    # Behind the gateway the secret is added by it; here the SuperNode itself has to.
    secret = SecretInterceptor(SECRET)
    init = FleetHttpClient.__init__

    def with_secret(self: Any, *arguments: Any, interceptors: Any = (), **more: Any) -> None:
        init(self, *arguments, interceptors=[*interceptors, secret], **more)

    FleetHttpClient.__init__ = with_secret  # type: ignore[method-assign]
    sys.argv = ["flower-supernode", "--isolation", "process", "--insecure", "--superlink",
                f"127.0.0.1:{superlink_port}", "--host", "127.0.0.1", "--port", port]  # fmt: skip
    flower_supernode()


def site(name: str, study: str, port: str) -> None:
    """The idle executor, without a ledger."""
    keep_freed_pages()
    torch.set_num_threads(1)
    finished: list[bool] = []
    loaded, _ = load_study(Path(study))
    app = idle_app(loaded, name, None, finished)
    execute_tasks(app, f"127.0.0.1:{port}", SECRET, done=lambda: bool(finished))


PROGRAMS: dict[str, Callable[..., None]] = {
    "superlink": superlink,
    "supernode": supernode,
    "site": site,
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
