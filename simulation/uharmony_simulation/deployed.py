"""The same study as real processes on this machine: a coordinator and its sites, over TLS.

Everything goes through the commands that a coordinator and a hospital type, each in a process of
its own, so what is compared with the run in one process is what hospitals run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ExchangeError, UHarmonyError
from uharmony_model.study import Study
from uharmony_service.loopback import free_port

SERVER, CLIENT = "uharmony_server.app", "uharmony_client.app"
_STOP_SECONDS = 30.0


class Deployment:
    """A coordinator's folder, the sites' site.yaml files, and the processes that serve them."""

    def __init__(
        self, folder: Path, study: Study, sites: Mapping[str, Path], *, threads: int = 1
    ) -> None:
        """`sites` maps names to site.yaml files; their data are used, their stores are not."""
        self.folder, self.study, self.names = folder, study, sorted(sites)
        self.server = folder / "coordinator"
        self.port = self._known_port() or free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        for name, source in sites.items():
            self._copy_site(name, source, threads)

    def site_yaml(self, name: str) -> Path:
        """The deployed site's own file."""
        return self.folder / "sites" / name / "site.yaml"

    def store(self, name: str) -> Path:
        """The deployed site's own folder."""
        return self.folder / "sites" / name / "store"

    # --- what people do --------------------------------------------------------------------------

    def init(self, **settings: object) -> None:
        """Make the coordinator's folder; `settings` go into server.yaml."""
        text = self.folder / "study.yaml"
        write_atomic(text, self.study.canonical_json().encode())
        address = f"localhost:{self.port}"
        self.call(SERVER, "init", str(text), "--dir", str(self.server), "--address", address,
                  "--listen", "127.0.0.1")  # fmt: skip
        target = self.server / "server.yaml"
        content = {**yaml.safe_load(target.read_text()), **settings}
        write_atomic(target, yaml.safe_dump(content).encode())

    def invite(self, name: str) -> str:
        """The join code for a site."""
        return self.call(SERVER, "invite", name, "--dir", str(self.server)).strip()

    def join(self, name: str) -> None:
        """Join a site with a fresh code; the service must be running."""
        code = self.invite(name)
        site = str(self.site_yaml(name))
        self.call(CLIENT, "--site", site, "join", code, "--approve", self.study.digest)

    def start_server(self) -> None:
        """Start the coordinator's service."""
        self._start("server", SERVER, "start", "--dir", str(self.server))

    def start_site(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a site's service."""
        self._start(name, CLIENT, "--site", str(self.site_yaml(name)), more=environment)

    def start(self) -> None:
        """Start the coordinator, join every site that has not joined, start the sites.

        No round begins before all have joined.
        """
        self.call(SERVER, "pause", "--dir", str(self.server))
        self.start_server()
        self.await_gateway()
        for name in self.names:
            if not (self.store(name) / "identity" / "membership.json").is_file():
                self.join(name)
        self.call(SERVER, "resume", "--dir", str(self.server))
        for name in self.names:
            self.start_site(name)

    def status(self) -> dict[str, object]:
        """What `uharmony-server status --json` says."""
        found: dict[str, object] = json.loads(
            self.call(SERVER, "status", "--dir", str(self.server), "--json")
        )
        return found

    def finished(self) -> bool:
        """Whether the study has come to its end, in this or an earlier run."""
        board = self.server / "run" / "status.json"
        return board.is_file() and json.loads(board.read_bytes())["state"] == "finished"

    def await_sites(self, seconds: float = 30.0) -> None:
        """Wait until the sites' services have ended by themselves, as they do after the study."""
        end = time.monotonic() + seconds
        for name in self.names:
            process = self.processes.get(name)
            if process is not None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, end - time.monotonic()))

    # --- waiting and ending ----------------------------------------------------------------------

    def await_gateway(self, seconds: float = 60.0) -> None:
        """Wait until the public port takes connections."""

        def open_() -> bool:
            with socket.socket() as probe:
                probe.settimeout(1.0)
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        self.wait_for(open_, seconds, "the gateway")

    def round(self) -> int:
        """The last round whose checkpoint is on disk."""
        found = [int(p.name[6:]) for p in (self.server / "rounds").glob("round-*")]
        return max(found, default=0)

    def wait_for(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until `true()`.

        Raises:
            ExchangeError: it did not become true in time.
        """
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise ExchangeError(
                    f"{what} did not come within {seconds:.0f} s; see {self.folder}"
                )
            time.sleep(0.1)

    def finish(self, seconds: float, on_round: Callable[[int], None] | None = None) -> str:
        """Wait until the service ends by itself; the digest of the final weights.

        Raises:
            ExchangeError: it did not end in time, or ended with an error.
        """
        end, shown = time.monotonic() + seconds, 0
        while (code := self.processes["server"].poll()) is None:
            if time.monotonic() > end:
                raise ExchangeError(f"the service did not end; see {self.server / 'log'}")
            for name, process in self.processes.items():
                if name != "server" and process.poll():
                    raise ExchangeError(
                        f"the service of site {name} ended with {process.returncode}; see "
                        f"{self.folder / name}.log"
                    )
            if on_round is not None and self.round() > shown:
                shown = self.round()
                on_round(shown)
            time.sleep(0.1)
        if code:
            raise ExchangeError(f"the service ended with {code}; see {self.server / 'log'}")
        return self.weights()

    def weights(self) -> str:
        """The digest of the weights after the last round."""
        board = json.loads((self.server / "run" / "status.json").read_bytes())
        return str(board["weights"])

    def stop(self, names: Sequence[str] = ()) -> dict[str, int]:
        """Ask processes to end, all when none is named; their exit codes."""
        ended = {}
        for name in names or list(self.processes):
            process = self.processes.pop(name)
            if process.poll() is None:
                process.terminate()
            try:
                ended[name] = process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                ended[name] = process.wait()
        return ended

    def kill(self, name: str) -> None:
        """SIGKILL a service and all of its children at once, as a power cut would."""
        process = self.processes.pop(name)
        kill_tree(process.pid)
        process.wait()

    # --- parts -----------------------------------------------------------------------------------

    def call(self, module: str, *arguments: str) -> str:
        """Run a command to its end and give what it printed.

        Raises:
            UHarmonyError: it failed; with what it said.
        """
        done = subprocess.run(  # noqa: S603 - our own commands
            [sys.executable, "-m", module, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode:
            raise UHarmonyError(f"{module} {arguments[0]}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def _known_port(self) -> int:
        source = self.server / "server.yaml"
        if not source.is_file():
            return 0
        return int(str(yaml.safe_load(source.read_text())["address"]).rpartition(":")[2])

    def _start(
        self, name: str, module: str, *arguments: str, more: Mapping[str, str] | None = None
    ) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        with log:
            self.processes[name] = subprocess.Popen(  # noqa: S603 - our own commands
                [sys.executable, "-m", module, *arguments],
                env={**self._environment, **(more or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _copy_site(self, name: str, source: Path, threads: int) -> None:
        content = yaml.safe_load(source.read_text())
        base = source.resolve().parent
        old_store = base / content["store"]
        content["cases"] = str(base / content["cases"])
        content["volumes"] = str(base / content.get("volumes", old_store / "volumes"))
        content["store"] = "store"
        content["resources"] = {**content.get("resources", {}), "threads": threads, "device": "cpu"}
        target = self.site_yaml(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file():
            write_atomic(target, yaml.safe_dump(content).encode())


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants; parents first, so that none is started again."""
    doomed = [pid, *_descendants(pid)]
    for number in doomed:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, open_ = [], [pid]
    while open_:
        own = children.get(open_.pop(), [])
        found += own
        open_ += own
    return found
