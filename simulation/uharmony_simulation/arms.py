"""One arm: one method, one seed, the same sites, the same splits, an equal number of steps."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid

from uharmony_client.case_figures import draw_site_cases
from uharmony_client.flower_app import OnStep, make_client_app
from uharmony_client.predictor import undrawn_classes
from uharmony_client.site import Opened, Site
from uharmony_client.site_config import Labels, load_site
from uharmony_client.site_models import site_entry, site_network
from uharmony_client.workbench import carried_after
from uharmony_model.atomic import write_atomic
from uharmony_model.bundle import save_bundle
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.schema import Schema, unflatten
from uharmony_model.initial import initial_weights
from uharmony_model.participation import Participation
from uharmony_model.schedule import finale_round
from uharmony_model.study import Study
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.publication import hand_out
from uharmony_server.rounds import OnRound, run_rounds
from uharmony_simulation.division import POOLED
from uharmony_simulation.engine import InProcessGrid, site_of
from uharmony_simulation.participation import ParticipationGrid
from uharmony_simulation.ray_engine import run_with_ray


@dataclass(frozen=True)
class Machine:
    """What the sites of a simulation share: threads, a device, an engine."""

    threads: int
    device: str = "auto"
    engine: str = "inprocess"
    parallel: int = 1


@dataclass(frozen=True)
class Arm:
    """A method with a seed, as the study that its sites agree to."""

    name: str
    seed: int
    study: Study
    sites: tuple[str, ...]

    @classmethod
    def of(cls, study: Study, name: str, seed: int, sites: Sequence[str]) -> Arm:
        """The study under another method. Pooled training takes the sum of all sites' steps."""
        changed = study.model_copy(update={"seed": seed}).with_method(name)
        if not changed.plan.pooled:
            return cls(name, seed, changed, tuple(sites))
        steps = study.training.local_steps * len(sites)
        training = changed.training.model_copy(update={"local_steps": steps})
        finale = changed.finale.model_copy(update={"steps": changed.finale.steps * len(sites)})
        federation = changed.federation.model_copy(update={"min_sites": 1})
        changed = changed.model_copy(
            update={"training": training, "finale": finale, "federation": federation}
        )
        return cls(name, seed, changed, (POOLED,))


class SiteOpener:
    """Opens the site a node stands for; picklable, so that Ray's workers open theirs alike.

    `stores` holds what the sites keep, in the place of their own folders: one for each set of
    conditions under which the same arm of the same study is trained.
    """

    def __init__(self, arm: Arm, sites: Path, machine: Machine, stores: Path | None = None) -> None:
        self._arm, self._folder, self._machine, self._stores = arm, sites, machine, stores

    def __call__(self, context: Context) -> Site:
        """The opened site; its volumes stay open for the arms that follow."""
        if torch.get_num_threads() != self._machine.threads:
            torch.set_num_threads(self._machine.threads)
        name = site_of(context, dict(enumerate(sorted(self._arm.sites))))
        return self.named(name)

    def named(self, name: str, on_case: Opened | None = None) -> Site:
        """The opened site of this name."""
        study = self._arm.study
        decided = (study.evaluation, study.task)
        made_by = (study.split_seed, *(part.model_dump_json() for part in decided))
        made_by += ("unlabelled",) if study.takes_unlabelled else ()
        store = self._stores and self._stores / name
        key = (self._folder / name, store, self._machine.device, *made_by)
        if key not in _OPENED:
            config = load_site(self._folder / name / "site.yaml")
            resources = config.resources.model_copy(update={"device": self._machine.device})
            changes = {"resources": resources, "store": store or config.store}
            config = config.model_copy(update=changes)
            own = name != POOLED
            _OPENED[key] = Site.open(
                config,
                study,
                own_cases_only=own,
                labels=None if own else self._labels(),
                on_case=on_case,
            )
        return _OPENED[key].with_study(self._arm.study)

    def _labels(self) -> dict[str, Labels]:
        """Whose labels may be learned from, by site: where all cases lie together it holds too."""
        files = sorted(self._folder.glob("*/site.yaml"))
        sites = [load_site(path) for path in files if path.parent.name != POOLED]
        return {site.name: site.labels for site in sites}

    def open_all(self, on_case: Opened) -> None:
        """Open every site of the arm, which prepares volumes that are not prepared yet."""
        for name in self._arm.sites:
            self.named(name, on_case)


# Memory maps and case tables only: a few kilobytes a case, the same for every arm of a run.
_OPENED: dict[tuple[object, ...], Site] = {}


def run_arm(
    arm: Arm,
    sites: Path,
    folder: Path,
    machine: Machine,
    *,
    on_round: OnRound | None = None,
    on_step: OnStep | None = None,
    participation: Participation | None = None,
    figures: bool = True,
    stores: Path | None = None,
) -> None:
    """Run an arm to its end in `folder`, from wherever it stands, and leave its outcome there.

    `server/` holds the checkpoints, `model/` what `uharmony-predict` reads, `figures/` (where asked
    for) two cases a site, and `done.json` is written last. Under a `participation` only the sites
    it names train and count. `stores` is where the sites keep what is theirs (see `SiteOpener`).

    Raises:
        ConfigError: a participation, and an engine that cannot follow it.
    """
    if participation is not None and machine.engine != "inprocess":
        raise ConfigError(f"--participation with engine {machine.engine}; use inprocess")
    started = time.monotonic()
    schema, initial = initial_weights(arm.study)
    opener = SiteOpener(arm, sites, machine, stores)

    ends: list[float] = []  # of the rounds that were done in this call

    def round_done(state: Checkpoint) -> None:
        if not state.at_home:
            ends.append(time.monotonic())
        if on_round is not None:
            on_round(state)

    def main(grid: Grid) -> Checkpoint:
        return run_rounds(arm.study, schema, initial, grid, folder / "server", on_round=round_done)

    if machine.engine == "ray":
        state = run_with_ray(
            main,
            make_client_app(opener),
            len(arm.sites),
            threads=machine.threads,
            parallel=machine.parallel,
        )
    else:
        app = make_client_app(opener, on_step=on_step)
        grid = InProcessGrid(app, arm.sites)
        state = main(grid if participation is None else ParticipationGrid(grid, participation))
    _keep_model(arm, schema, state, opener, folder, figures=figures)
    outcome = {
        "arm": arm.name,
        "seed": arm.seed,
        "study": arm.study.digest,
        "weights": state.digest,
        "threads": machine.threads,
        "engine": machine.engine,
        "seconds": round(time.monotonic() - started, 1),
        "seconds_per_round": round((ends[-1] - started) / len(ends), 2) if ends else None,
        "bytes_up": list(state.bytes_up),
        "records": [{**record, "arm": arm.name, "seed": arm.seed} for record in state.records],
        "refusals": [
            {"arm": arm.name, "seed": arm.seed, **r.model_dump(mode="json")} for r in state.refusals
        ],
    }
    write_atomic(folder / "done.json", json.dumps(outcome, indent=1).encode(), mode=0o644)


def _keep_model(
    arm: Arm,
    schema: Schema,
    state: Checkpoint,
    opener: SiteOpener,
    folder: Path,
    *,
    figures: bool,
) -> None:
    """The model to hand out, and two pictures a site."""
    opened = [opener.named(name) for name in arm.sites]
    shared, last = unflatten(state.global_, schema), state.round
    if arm.study.finale.steps:
        last = finale_round(arm.study)
    carried = {s.name: carried_after(s, last) for s in opened}
    entries = {s.name: site_entry(s, carried[s.name]) for s in opened}
    local = {name: tensors for name, (tensors, _) in entries.items()}
    own = {name: method for name, (_, method) in entries.items() if method is not None}
    domains = {s.name: s.domains for s in opened}
    modalities = {s.name: s.modalities for s in opened}
    undrawn = {s.name: undrawn_classes(s, local[s.name]) for s in opened}
    save_bundle(
        folder / "model", arm.study, shared, local, domains, modalities, own=own, undrawn=undrawn
    )
    hand_out(folder / "model", state.published, arm.study)
    for site in opened if figures else ():
        network = site_network(site, shared, carried[site.name])
        draw_site_cases(network, site, last, folder / "figures")
