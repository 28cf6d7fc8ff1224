"""One task of a heterogeneity study: an arm with one seed (and fold) in one cell, as one record.

The record is a JSON file that holds everything the tables need, so a study goes on from records
alone: what has one is not trained again, on whatever machine it was made.
"""

from __future__ import annotations

import csv
import json
import resource
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from uharmony_client.flower_app import OnStep
from uharmony_client.personal import as_personal, local_parameters, personal_part
from uharmony_client.site import Site
from uharmony_client.workbench import carried_after
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_weights
from uharmony_model.methods import EVERYTHING
from uharmony_model.participation import Participation
from uharmony_model.randomness import numpy_generator
from uharmony_model.schedule import finale_round
from uharmony_model.study import Study
from uharmony_server.checkpoint import read_latest
from uharmony_simulation.arms import Arm, Machine, SiteOpener, run_arm
from uharmony_simulation.config import Simulation
from uharmony_simulation.division import POOLED
from uharmony_simulation.lab_config import REFERENCE, Cell, LabArm
from uharmony_simulation.lab_labels import add_unannotated
from uharmony_simulation.lab_swaps import measure_swaps
from uharmony_simulation.lab_unseen import measure_unseen

FORMAT = 1


@dataclass(frozen=True)
class Task:
    """What is trained: `study` is that of the arm, `simulation` that of the cell."""

    cell: Cell
    arm: LabArm
    seed: int
    fold: int | None
    study: Study
    simulation: Simulation

    @property
    def name(self) -> str:
        """The record's path without its suffix, below the folder of records."""
        fold = "" if self.fold is None else f"_fold-{self.fold}"
        return f"{self.cell.name}/{self.arm.name}_seed-{self.seed}{fold}"

    @property
    def declared(self) -> dict[str, Any]:
        """Everything that decides the result but the data and the code."""
        return {
            "study": self.study.model_dump(mode="json"),
            "simulation": self.simulation.model_dump(mode="json"),
            "cell": self.cell.model_dump(mode="json"),
        }

    def made(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this task; settings that are newer must be at their defaults.

        What the method does not read may be anything: it decided nothing.
        """
        declared = record.get("declared", {})
        plan = self.study.plan
        unread = tuple(plan.settings) if plan.harmonized else ("harmonization",)
        return all(
            _same(declared.get(name), model, unread)
            for name, model in (
                ("study", self.study),
                ("simulation", self.simulation),
                ("cell", self.cell),
            )
        )


def _same(recorded: object, current: BaseModel, unread: Sequence[str]) -> bool:
    """Whether a recorded model is the current one, but for fields that did not exist then."""
    fields = type(current).model_fields
    if not isinstance(recorded, dict) or not recorded.keys() <= fields.keys():
        return False
    dumped = current.model_dump(mode="json")
    for name, field in fields.items():
        value = getattr(current, name)
        if name in unread:
            continue
        if name not in recorded:
            if value != field.get_default(call_default_factory=True):
                return False
        elif isinstance(value, BaseModel):
            if not _same(recorded[name], value, unread):
                return False
        elif recorded[name] != dumped[name]:
            return False
    return True


def read_record(records: Path, task: Task) -> dict[str, Any] | None:
    """The record of a task that is done, or None.

    Raises:
        StoreError: there is one of another study under its name.
    """
    path = records / f"{task.name}.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        raise StoreError(f"{path}: not readable; remove it to train this task again") from None
    if record.get("format") != FORMAT or not task.made(record):
        raise StoreError(
            f"{path}: made by another version of this study; a changed study is a new study: "
            "give another --records folder, or remove the file to train this task again"
        )
    return record


def run_task(
    task: Task,
    cell_folder: Path,
    records: Path,
    machine: Machine,
    sites: Sequence[str],
    *,
    swap: bool,
    few_shot: Sequence[int] = (),
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Train, measure and write the record; an interrupted task goes on where it stood."""
    if task.cell.without is not None and task.cell.without not in sites:
        raise ConfigError(
            f"cell {task.cell.name}: no site {task.cell.without}; there are {', '.join(sites)}"
        )
    there = [site for site in sites if site != task.cell.without]
    arm = Arm.of(task.study, task.arm.method, task.seed, there)
    folder = cell_folder / "arms" / task.name.replace("/", "_")
    where, stores = cell_folder / "sites", cell_folder / "stores" / task.cell.name
    alone = arm.study.plan.local == EVERYTHING  # needs nobody, so nobody is missed
    if not _done(folder, arm.study):
        run_arm(
            arm,
            where,
            folder,
            machine,
            on_step=on_step,
            figures=False,
            participation=None if alone or not task.cell.dropout else attendance(task, there),
            stores=stores,
        )
    done = json.loads((folder / "done.json").read_bytes())
    opener = SiteOpener(arm, where, machine, stores)
    opened = [opener.named(name) for name in arm.sites]
    schema, _ = initial_weights(arm.study)
    state = read_latest(folder / "server", arm.study.digest, schema)
    record = {
        "format": FORMAT,
        "declared": task.declared,
        "cell": task.cell.name,
        "arm": task.arm.name,
        "method": task.arm.method,
        "seed": task.seed,
        "fold": task.fold,
        "weights": done["weights"],
        "threads": done["threads"],
        "seconds": done["seconds"],
        "seconds_per_round": done["seconds_per_round"],
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "rounds": arm.study.training.rounds,
        "bytes_up": round(statistics.fmean(done["bytes_up"])) if done["bytes_up"] else 0,
        "bytes_down": 4 * schema.numel * len(arm.sites),
        "shared_parameters": schema.numel,
        "local_parameters": _local_count(opened[0], arm.study),
        "refusals": [f"{r['site']}: {r['reason']}: {r['detail']}" for r in done["refusals"]],
        "kept": {
            r["site"]: r["kept"] for r in done["records"] if r.get("kept") and r["split"] == "test"
        },
        "cases": [],
        "matrix": {},
        "swaps": [],
        "unseen": None,
    }
    for site in opened:
        rows = _rows(site, arm.study)
        if state is not None and not bool(site.annotated.all()):
            whole = opener.named(POOLED)
            add_unannotated(rows, site, whole, unflatten(state.global_, schema))
        record["cases"] += rows
    if swap and state is not None and not arm.study.plan.pooled:
        shared = unflatten(state.global_, schema)
        record["matrix"], record["swaps"] = measure_swaps(arm.study, opened, shared, state.round)
    plan = arm.study.plan
    if task.cell.without is not None and plan.serves_unseen and not plan.pooled:
        left = opener.named(task.cell.without)
        record["unseen"] = measure_unseen(folder / "model", opened, left, few_shot)
    path = records / f"{task.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record).encode(), mode=0o644)
    _clear(folder, opened, keep=task.arm.method == REFERENCE)
    return record


def _done(folder: Path, study: Study) -> bool:
    """Whether the arm was trained to its end; what an older version of it left is removed."""
    path = folder / "done.json"
    if path.is_file() and json.loads(path.read_bytes()).get("study") == study.digest:
        return True
    if path.is_file():
        shutil.rmtree(folder)
    return False


def attendance(task: Task, sites: Sequence[str]) -> Participation:
    """Who trains in which round: each site misses each with probability `dropout`, never all."""
    found = Participation()
    for round_ in range(1, task.study.training.rounds + 1):
        draw = numpy_generator(task.seed, task.cell.name, "attendance", round_)
        missing = draw.random(len(sites)) < task.cell.dropout
        there = [site for site, misses in zip(sites, missing, strict=True) if not misses]
        there = there or [sites[int(draw.integers(len(sites)))]]
        found = found.with_round(round_, there)
    return found


def _rows(site: Site, study: Study) -> list[dict[str, Any]]:
    """A site's test cases after the last round and after the finale: mean Dice over classes."""
    rows = []
    rounds = [(study.training.rounds, False)]
    if study.finale.steps:
        rounds.append((finale_round(study), True))
    for round_, at_home in rounds:
        path = site.evaluations / f"test-round-{round_:06d}.csv"
        rows += [{"at_home": at_home, **row} for row in _mean_over_classes(path)]
    return rows


def _mean_over_classes(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    cases: dict[tuple[str, str, str], dict[str, float]] = {}
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["dice"]:
                key = (row["site"], row["patient"], row["case"])
                cases.setdefault(key, {})[row["class_name"]] = round(float(row["dice"]), 6)
    return [
        {
            "site": site,
            "patient": patient,
            "case": case,
            "dice": round(statistics.fmean(by_class.values()), 6),
            "by_class": by_class,
        }
        for (site, patient, case), by_class in cases.items()
    ]


def _local_count(site: Site, study: Study) -> int:
    """Numbers that stay at a site, in its first domain; a whole model of its own is among them."""
    after = carried_after(site, study.training.rounds)
    carried = {**local_parameters(after), **as_personal(local_parameters(personal_part(after)))}
    first = site.domains[0]
    return sum(t.numel() for k, t in carried.items() if "@" not in k or k.endswith(f"@{first}"))


def _clear(folder: Path, opened: Sequence[Site], *, keep: bool) -> None:
    """Remove what only an unfinished task needs; the reference's models are chosen from later."""
    shutil.rmtree(folder / "server", ignore_errors=True)
    (folder / "done.json").unlink(missing_ok=True)  # the record says it now
    if keep:
        return
    for site in opened:
        shutil.rmtree(site.store.folder, ignore_errors=True)
