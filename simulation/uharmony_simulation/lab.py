"""Run a heterogeneity study: every arm, seed and fold in every cell, resumable at any time.

    DIR/cells/<cell>/sites/      simulated hospitals, the same for all arms of the cell
                     arms/       what a task needs until it is done, and its model
        records/<cell>/<arm>_seed-<n>.json     what is done; may be given from elsewhere
        report.html  summary.json  tables.md

A process takes one arm of a cell, seed and fold, with stores of its own study; what a site trains
alone comes first, as the other arms choose from it. Several processes share the machine within a
budget of memory.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uharmony_client.personal import METHOD_ALONE
from uharmony_model.allocator import keep_freed_pages
from uharmony_model.atomic import make_directory
from uharmony_model.errors import ConfigError
from uharmony_model.networks import check_patch
from uharmony_model.study import Study
from uharmony_service.supervision import end_with_parent
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.lab_config import Lab, changed_study, conditions
from uharmony_simulation.lab_task import Task, read_record, run_task
from uharmony_simulation.sites import make_sites

Say = Callable[[str], None]
Group = tuple[Task, ...]


@dataclass(frozen=True)
class Places:
    """Folders of a study: `out` for what is made on the way, `records` for what is done."""

    out: Path
    records: Path
    data: Path | None

    def cell(self, task: Task) -> Path:
        """The folder of a task's cell."""
        return self.out / "cells" / task.cell.place.name


def plan(lab: Lab, study: Study, simulation: Simulation) -> list[Group]:
    """All tasks, those of one cell, seed and fold together; the reference first in each.

    Raises:
        ConfigError: an arm cannot be followed, or two of them are one.
    """
    folds: list[int | None] = [None] if lab.folds is None else list(range(lab.folds))
    groups = []
    for cell in lab.grid.cells():
        there = conditions(simulation, study, cell)
        for seed in lab.seeds:
            for fold in folds:
                tasks = []
                for arm in lab.arms:
                    changed = changed_study(study, arm, seed=seed, folds=lab.folds, fold=fold)
                    check_patch(changed.network, changed.training.patch, changed.plan.backbone)
                    tasks.append(Task(cell, arm, seed, fold, changed, there))
                _check_different(tasks)
                groups.append(tuple(tasks))
    return groups


def _check_different(tasks: Sequence[Task]) -> None:
    names: dict[str, str] = {}
    for task in tasks:
        same = names.setdefault(_trained(task).digest, task.arm.name)
        if same != task.arm.name:
            raise ConfigError(
                f"arms {same} and {task.arm.name} are one study under two names; leave one out"
            )


def run_lab(
    lab: Lab,
    study: Study,
    simulation: Simulation,
    places: Places,
    machine: Machine,
    *,
    workers: int,
    memory_mib: int | None,
    say: Say,
) -> list[dict[str, Any]]:
    """Train what has no record yet and give all records.

    Raises:
        ConfigError: the study cannot be followed.
        StoreError: records of another study lie under the same names.
    """
    groups = plan(lab, study, simulation)
    tasks = [task for group in groups for task in group]
    kept = {task.name: read_record(places.records, task) for task in tasks}
    done = {name: record for name, record in kept.items() if record is not None}
    say(f"{len(tasks)} tasks, {len(done)} done")
    todo = [chain for group in groups for chain in _chains(group, done)]
    for group in {group[0].cell.name: group for group in todo}.values():
        _make_cell(group[0], places, machine, say)
    clock = _Clock(len(tasks) - len(done), say)
    found = dict(done)
    queue = list(todo)
    if queue:
        # The first task alone: it tells how much memory one takes.
        first, *rest = queue[0]
        record = _work((first,), places, machine, lab)[0]
        found[first.name] = record
        clock.tick(first, record)
        queue[:1] = _released(rest)
        budget = _Budget(workers, memory_mib, record["peak_mib"])
        found |= _run_groups(queue, places, machine, lab, budget, clock)
    return [found[task.name] for task in tasks]


def affordable(workers: int, peak_mib: int, memory_mib: int | None) -> int:
    """How many processes of this size fit into the budget; one always runs."""
    return workers if memory_mib is None else max(1, min(workers, memory_mib // max(peak_mib, 1)))


def _chains(group: Group, done: Container[str]) -> list[Group]:
    """The tasks that are left, split where nothing has to wait.

    The local-only model of a study is trained once, by its own arm; the others of a cell, seed and
    fold that choose from it at their end come after it, in any order and side by side.
    """
    chains: dict[str, list[Task]] = {}
    for task in group:
        chains.setdefault(task.study.with_method(METHOD_ALONE).digest, []).append(task)
    left: list[Group] = []
    for chain in chains.values():
        todo = [task for task in chain if task.name not in done]
        first = [task for task in todo if task.arm.method == METHOD_ALONE]
        rest = [task for task in todo if task.arm.method != METHOD_ALONE]
        left += [(*first, *rest)] if first else _released(rest)
    return left


def _trained(task: Task) -> Study:
    """The study as its arm trains it: what does not matter to a site alone is left out there."""
    return task.study.with_method(task.arm.method)


def _released(tasks: Sequence[Task]) -> list[Group]:
    return [(task,) for task in tasks]


def _run_groups(
    groups: Sequence[Group],
    places: Places,
    machine: Machine,
    lab: Lab,
    budget: _Budget,
    clock: _Clock,
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if budget.workers == 1:
        for group in groups:
            for task in group:
                found[task.name] = _work((task,), places, machine, lab)[0]
                clock.tick(task, found[task.name])
        return found
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    queue = list(groups)
    running: dict[Future[list[dict[str, Any]]], Group] = {}
    with (
        ProcessPoolExecutor(budget.workers, context, end_with_parent, (os.getpid(),)) as pool,
        _no_child_left(),
    ):
        while queue or running:
            while queue and len(running) < budget.affordable:
                group = queue.pop(0)
                # Task by task, so that what is done is told at once.
                running[_submit(pool, group, places, machine, lab)] = group
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                first, *rest = running.pop(future)
                found[first.name] = future.result()[0]
                budget.seen(found[first.name]["peak_mib"])
                clock.tick(first, found[first.name])
                queue[:0] = _released(rest)
    return found


@contextmanager
def _no_child_left() -> Iterator[None]:
    """An interruption ends the processes at once; their tasks go on from where they stood."""
    try:
        yield
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def _submit(
    pool: ProcessPoolExecutor, group: Group, places: Places, machine: Machine, lab: Lab
) -> Future[list[dict[str, Any]]]:
    return pool.submit(_work, group[:1], places, machine, lab)


def _work(
    tasks: Sequence[Task], places: Places, machine: Machine, lab: Lab
) -> list[dict[str, Any]]:
    """What a process does; also in this one."""
    keep_freed_pages()
    torch.set_num_threads(machine.threads)
    records = []
    for task in tasks:
        folder = places.cell(task)
        names = make_sites(task.study, task.simulation, places.data, folder / "sites")
        records.append(
            run_task(
                task,
                folder,
                places.records,
                machine,
                names,
                swap=lab.swap,
                few_shot=lab.few_shot,
            )
        )
    return records


def _make_cell(task: Task, places: Places, machine: Machine, say: Say) -> None:
    """Make the sites of a cell and prepare their volumes, before anybody trains."""
    folder = places.cell(task)
    make_directory(folder)
    say(f"cell {task.cell.name}: making its sites")
    names = make_sites(task.study, task.simulation, places.data, folder / "sites")
    if not names:
        raise ConfigError(f"cell {task.cell.name}: no site; check simulation.source")
    arm = Arm.of(task.study, task.arm.method, task.seed, names)
    SiteOpener(arm, folder / "sites", machine).open_all(lambda site, done, total: None)


class _Budget:
    """How many processes may run: as many as the largest one seen so far fits into the memory."""

    def __init__(self, workers: int, memory_mib: int | None, peak_mib: int) -> None:
        self._memory, self._peak = memory_mib, peak_mib
        self.workers = affordable(workers, peak_mib, memory_mib)

    def seen(self, peak_mib: int) -> None:
        """Note what a process needed."""
        self._peak = max(self._peak, peak_mib)

    @property
    def affordable(self) -> int:
        """Processes that may run at a time now; started ones end their task."""
        return affordable(self.workers, self._peak, self._memory)


class _Clock:
    """Says what is done and how long the rest will take at the pace so far."""

    def __init__(self, total: int, say: Say) -> None:
        self._total, self._say = total, say
        self._done, self._begin = 0, time.monotonic()

    def tick(self, task: Task, record: dict[str, Any]) -> None:
        """One more is done."""
        self._done += 1
        pace = (time.monotonic() - self._begin) / self._done
        left = round(pace * (self._total - self._done) / 60)
        self._say(
            f"{self._done} of {self._total}: {task.name}, {record['seconds']:.0f} s; "
            f"about {left // 60} h {left % 60:02d} min left"
        )
