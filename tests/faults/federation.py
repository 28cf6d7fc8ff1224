"""A federation of real processes to break: coordinator and three sites, joined beforehand.

Joining takes longer than a round of the tiny study, so it is done once a session; every test
starts from a copy of the folders, under another port.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.faults.record import keep
from tests.support.tiny import write_folder, write_study
from uharmony_client.ledger_check import verify
from uharmony_client.ledger_entry import Entry, parse_line
from uharmony_client.local_store import UNFINISHED
from uharmony_client.site_board import SiteBoard
from uharmony_model.atomic import write_atomic
from uharmony_model.exchange.canonical import canonical_json
from uharmony_model.exchange.joining import Membership
from uharmony_model.participation import Participation, load
from uharmony_model.study import Study, load_study
from uharmony_service.board import read_board
from uharmony_service.keys import load_ledger_key
from uharmony_simulation.arms import Machine
from uharmony_simulation.deployed import CLIENT, SERVER, Deployment, kill_tree
from uharmony_simulation.progress import Progress
from uharmony_simulation.run import run_study

SITES = ("alpha", "beta", "gamma")
ROUNDS = 5
CHECKPOINT_STEPS = 20
PATIENCE = 180.0
PROGRAMS = {
    "superlink": "uharmony_server.superlink",
    "gateway": "uharmony_server.gateway",
    "rounds": "uharmony_server.coordinator",
    "supernode": "uharmony_client.supernode",
    "site": "uharmony_client.site_process",
}
STUDY = {
    "training": {"rounds": ROUNDS, "local_steps": 120},
    "federation": {"min_sites": 2},
    "evaluation": {"validation": 0.2, "test": 0.3, "every": 0, "bootstrap": 50},
}


@dataclass(frozen=True)
class Undisturbed:
    """The study run in one process: where, and the digest of its final weights."""

    folder: Path
    data: Path
    study_yaml: Path
    study: Study
    weights: str

    def sites(self) -> dict[str, Path]:
        """The site.yaml files."""
        return {name: self.folder / "sites" / name / "site.yaml" for name in SITES}

    def again(self, participation: Participation, out: Path) -> str:
        """The digest of a run in one process with who took part in another run."""
        return simulate(self.study_yaml, self.data, out, participation)


def simulate(
    study_yaml: Path, data: Path, out: Path, participation: Participation | None = None
) -> str:
    """Run a study in this process; the digest of its final weights."""
    machine = Machine(threads=1, device="cpu")
    run_study(
        study_yaml,
        out,
        data=data,
        arms=(),
        seeds=(),
        machine=machine,
        resume=False,
        progress=Progress(),
        participation=participation,
    )
    (done,) = (out / "arms").glob("*/seed-*/done.json")
    return str(json.loads(done.read_bytes())["weights"])


def undisturbed(folder: Path) -> Undisturbed:
    """Make data and study in `folder`, and run it."""
    data = write_folder(folder / "data")
    study_yaml = write_study(folder / "study.yaml", **STUDY)
    weights = simulate(study_yaml, data, folder / "simulated")
    study, _ = load_study(study_yaml)
    for site in SITES:
        path = folder / "simulated" / "sites" / site / "site.yaml"
        content = yaml.safe_load(path.read_text())
        content["resources"] = {"checkpoint_steps": CHECKPOINT_STEPS}
        path.write_text(yaml.safe_dump(content))
    return Undisturbed(folder / "simulated", data, study_yaml, study, weights)


class Federation(Deployment):
    """A deployment whose sites have joined, and what it takes to break it and to look at it."""

    def __init__(self, folder: Path, study: Study, sites: Mapping[str, Path]) -> None:
        super().__init__(folder, study, sites)
        self._seen: list[tuple[str, str, float, str]] = []

    def readdress(self) -> None:
        """After a copy: tell both sides the port of this one."""
        path = self.server / "server.yaml"
        content = yaml.safe_load(path.read_text())
        content["address"] = f"localhost:{self.port}"
        write_atomic(path, yaml.safe_dump(content).encode())
        for name in self.names:
            self.reach_through(name, self.port)

    def reach_through(self, name: str, port: int) -> None:
        """Let a site reach the coordinator at another port of this machine."""
        path = self.store(name) / "identity" / "membership.json"
        found = Membership.model_validate_json(path.read_bytes())
        changed = found.model_copy(update={"address": f"localhost:{port}"})
        write_atomic(path, canonical_json(changed).encode())

    def settings(self, **values: object) -> None:
        """Set values in server.yaml."""
        path = self.server / "server.yaml"
        write_atomic(path, yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}).encode())

    def join_all(self) -> None:
        """Invite and join every site; no round begins. The coordinator is stopped afterwards."""
        self.call(SERVER, "pause", "--dir", str(self.server))
        self.start_server()
        self.await_gateway()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.join, self.names))
        self.stop(["server"])
        (self.server / "run" / "paused").unlink()

    def start_all(self, sites: Sequence[str] = SITES) -> None:
        """Start the coordinator and sites that have joined."""
        self.start_server()
        for name in sites:
            self.start_site(name)

    def start_server_with(self, environment: Mapping[str, str]) -> None:
        """Start the coordinator with more in its environment."""
        self._start("server", SERVER, "start", "--dir", str(self.server), more=environment)

    # --- processes -------------------------------------------------------------------------------

    def pid(self, service: str, program: str) -> int | None:
        """The process of a program under a service, when it runs."""
        parent = self.processes[service].pid
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                ours = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
                if ours and PROGRAMS[program].encode() in (entry / "cmdline").read_bytes():
                    return int(entry.name)
            except OSError:
                continue
        return None

    def running(self, service: str, program: str) -> int:
        """The process of a program, waited for."""
        found: list[int] = []

        def there() -> bool:
            pid = self.pid(service, program)
            found.extend([] if pid is None else [pid])
            return pid is not None

        self.wait_for(there, PATIENCE, f"{program} of {service}")
        return found[-1]

    def signal(self, service: str, program: str, number: int = signal.SIGKILL) -> None:
        """Send one program of a service a signal."""
        os.kill(self.running(service, program), number)

    def kill_everything(self) -> None:
        """SIGKILL the coordinator and all sites."""
        for name in list(self.processes):
            kill_tree(self.processes[name].pid)
        for name in list(self.processes):
            self.processes.pop(name).wait()

    # --- where it stands -------------------------------------------------------------------------

    def state(self, name: str) -> str:
        """What a site's process says it is doing."""
        board = read_board(self.store(name) / "run" / "status.json", SiteBoard)
        return "" if board is None else board.state

    def generation(self, name: str, round_: int) -> Path:
        """Where a site's outcome of a round lies when it is there."""
        folder = self.store(name) / "generations" / self.study.digest
        return folder / f"round-{round_:06d}"

    def unfinished(self, name: str) -> tuple[int, int]:
        """Round and steps of a site's step checkpoint; (0, 0) without one."""
        path = self.store(name) / "generations" / self.study.digest / UNFINISHED
        try:
            facts = json.loads(path.read_bytes()[32:].partition(b"\n")[0])
        except (OSError, ValueError):
            return 0, 0
        return int(facts["round"]), int(facts["steps"])

    def updates(self, name: str) -> list[Entry]:
        """The updates in a site's ledger: written before they were sent."""
        path = self.store(name) / "ledger" / "ledger.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        entries = [parse_line(Entry, line) for line in lines]
        return [e for e in entries if e is not None and e.kind == "update"]

    def sent(self, name: str) -> int:
        """How many answers the SuperNode of a site has handed over."""
        path = self.store(name) / "log" / "supernode.log"
        return path.read_text(errors="replace").count("Sent successfully") if path.is_file() else 0

    def log(self, service: str, program: str) -> str:
        """What a program has logged."""
        folder = self.server if service == "server" else self.store(service)
        path = folder / "log" / f"{program}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def await_training(self, name: str, round_: int) -> None:
        """Wait until a site is in the middle of training a round."""
        self._await(lambda: self.unfinished(name)[0] == round_, f"{name} training round {round_}")

    def await_generation(self, name: str, round_: int) -> None:
        """Wait until a site has stored a round, looking as often as this machine can."""
        path = self.generation(name, round_)
        self._await(path.is_dir, f"round {round_} at {name}", pause=0.001)

    def await_round(self, round_: int) -> None:
        """Wait until a round's checkpoint is on the coordinator's disk."""
        self._await(lambda: self.round() >= round_, f"round {round_}", pause=0.01)

    def _await(
        self, true: Callable[[], bool], what: str, *, pause: float = 0.01, seconds: float = PATIENCE
    ) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"{what} did not come; see {self.folder}"
            if (server := self.processes.get("server")) is not None:
                assert server.poll() in (None, 0), f"the coordinator ended; see {self.server}/log"
            time.sleep(pause)

    # --- faults ----------------------------------------------------------------------------------

    def recovery(
        self, fault: str, since: float, progress: Callable[[], bool], *, to: str, note: str = ""
    ) -> float:
        """Wait for the progress after a fault; how long it took is written down at a good end."""
        self._await(progress, f"progress after: {fault}")
        seconds = time.monotonic() - since
        self._seen.append((fault, f"identical; seconds to {to}", seconds, note))
        return seconds

    def _keep(self) -> None:
        for fault, result, seconds, note in self._seen:
            keep(fault, result, seconds, note)
        self._seen.clear()

    def has_round(self, round_: int) -> Callable[[], bool]:
        """True when a round's checkpoint is on the coordinator's disk."""
        return lambda: self.round() >= round_

    def goes_on(self, name: str, round_: int) -> Callable[[], bool]:
        """True when a site has taken a further step in a round, or has finished it."""
        before = self.unfinished(name)
        return lambda: (
            self.generation(name, round_).is_dir()
            or (self.unfinished(name) != before and self.unfinished(name)[0] >= round_)
            or self.unfinished(name)[0] > round_
        )

    # --- the end ---------------------------------------------------------------------------------

    def end(self, seconds: float = PATIENCE) -> str:
        """Wait for the end; the digest of the final weights."""
        return self.finish(seconds)

    def counted(self) -> list[list[str]]:
        """The sites that counted in each round, from the last checkpoint."""
        path = self.server / "rounds" / f"round-{self.round():06d}" / "state.json"
        counted: list[list[str]] = json.loads(path.read_bytes())["state"]["counted"]
        return counted

    def refusals(self) -> list[dict[str, object]]:
        """What the coordinator refused, from the last checkpoint."""
        path = self.server / "rounds" / f"round-{self.round():06d}" / "state.json"
        refusals: list[dict[str, object]] = json.loads(path.read_bytes())["state"]["refusals"]
        return refusals

    def check_ledgers(
        self, participation: Participation, lost: Mapping[str, set[int]] | None = None
    ) -> None:
        """Every update that left is in one round: sent again it is the same, and counted once.

        `lost` are rounds of sites that were shut out while they trained.
        """
        for name in self.names:
            rounds = participation.rounds.items()
            in_rounds = {r for r, found in rounds if name in found.counted}
            entries = self.updates(name)
            digests: dict[int, set[str]] = {}
            for entry in entries:
                digests.setdefault(entry.round, set()).add(entry.sha256)
            assert all(len(found) == 1 for found in digests.values()), (name, digests)
            assert len({d for found in digests.values() for d in found}) == len(digests)
            assert in_rounds <= set(digests)
            in_vain = {r for r, found in rounds if name in found.trained} - in_rounds
            last = {max(participation.rounds)}  # too late in the last round, nobody hears of it
            assert set(digests) <= in_rounds | in_vain | last | (lost or {}).get(name, set())
            key = load_ledger_key(self.store(name) / "identity" / "ledger.key").public_key()
            assert verify(self.store(name) / "ledger", key).whole

    def check_undisturbed(self, wanted: Undisturbed, weights: str) -> None:
        """All sites counted in all rounds once, nothing was lost, and the bits are the same."""
        assert self.counted() == [list(SITES)] * self.study.training.rounds
        self.check_ledgers(load(self.server / "participation.json"))
        assert weights == wanted.weights
        self._keep()

    def check_participation(
        self,
        wanted: Undisturbed,
        weights: str,
        out: Path,
        lost: Mapping[str, set[int]] | None = None,
    ) -> Participation:
        """The bits of a run in one process in which the same sites took part."""
        participation = load(self.server / "participation.json")
        counted = [list(participation.rounds[r].counted) for r in sorted(participation.rounds)]
        assert counted == self.counted()
        self.check_ledgers(participation, lost)
        assert wanted.again(participation, out) == weights
        self._keep()
        return participation


def joined(folder: Path, wanted: Undisturbed, **settings: object) -> Federation:
    """A federation whose sites have joined and which has not begun."""
    made = Federation(folder, wanted.study, wanted.sites())
    made.init(**settings)
    made.join_all()
    return made


def copied(template: Federation, folder: Path, wanted: Undisturbed) -> Federation:
    """The same federation in another folder, at another port."""
    shutil.copytree(template.folder, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "coordinator" / "log", ignore_errors=True)
    made = Federation(folder, wanted.study, wanted.sites())
    made.readdress()
    return made


__all__ = [
    "CLIENT",
    "PATIENCE",
    "ROUNDS",
    "SERVER",
    "SITES",
    "Federation",
    "Undisturbed",
    "copied",
    "joined",
    "simulate",
    "undisturbed",
]
