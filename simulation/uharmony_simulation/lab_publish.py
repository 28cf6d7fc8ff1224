"""The tables, plots and report of a heterogeneity study, from its records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from uharmony_model.atomic import make_directory, write_atomic
from uharmony_model.study import Study
from uharmony_simulation.config import FolderSource, Simulation
from uharmony_simulation.lab import Places, plan
from uharmony_simulation.lab_config import REFERENCE, Lab
from uharmony_simulation.lab_task import Task, read_record
from uharmony_simulation.paired import CaseScore, Cost
from uharmony_simulation.sites import attribution
from uharmony_simulation.study_classes import LabelLoss
from uharmony_simulation.study_plots import SiteMatrix
from uharmony_simulation.study_recognition import Recognition, recognition, recognition_text
from uharmony_simulation.study_regimes import local_of_regime
from uharmony_simulation.study_report import write_study_report
from uharmony_simulation.study_summary import Failure, markdown_tables, summary_json
from uharmony_simulation.study_tables import Swap

Done = list[tuple[Task, dict[str, Any]]]


def publish(lab: Lab, study: Study, simulation: Simulation, places: Places) -> None:
    """Write report.html, summary.json and tables.md from what is done so far.

    Raises:
        StoreError: a record is damaged or of another study, or the folder cannot be written.
    """
    groups = plan(lab, study, simulation)
    tasks = [task for group in groups for task in group]
    found = [(task, read_record(places.records, task)) for task in tasks]
    done = [(task, record) for task, record in found if record is not None]
    missing = [task.name for task, record in found if record is None]
    matrices, failures = _matrices(done, lab), _failures(done, missing)
    make_directory(places.out)
    facts = _facts(lab, study, done, len(tasks))
    tables = write_study_report(
        places.out / "report.html",
        title=lab.name,
        scores=[*(s for task, record in done for s in _scores(task, record)), *_left_out(done)],
        costs=[_cost(task, record) for task, record in done],
        matrices=matrices,
        swaps=[swap for task, record in done for swap in _swaps(task, record)],
        facts=facts,
        attribution=attribution(simulation),
        failures=failures,
        regimes=local_of_regime({task.arm.name: task.study for task in groups[0]}),
        losses=_losses(tasks),
    )
    summary = summary_json(
        tables, title=lab.name, matrices=matrices, facts=facts, failures=failures
    )
    write_atomic(places.out / "summary.json", summary.encode(), mode=0o644)
    text = markdown_tables(tables)
    said = recognition_text([row for task, record in done if (row := _recognised(task, record))])
    text += f"\n{said}" if said else ""
    write_atomic(places.out / "tables.md", text.encode(), mode=0o644)


def _recognised(task: Task, record: dict[str, Any]) -> Recognition | None:
    return recognition(task.cell.place.title, task.arm.name, task.seed, record)


def _scores(task: Task, record: dict[str, Any]) -> list[CaseScore]:
    return recorded_scores(record, task.cell.title)


def recorded_scores(record: Mapping[str, Any], cell: str) -> list[CaseScore]:
    """The test cases of a record, under conditions that are called `cell`."""
    return [
        CaseScore(
            arm=record["arm"],
            at_home=row["at_home"],
            cell=cell,
            seed=record["seed"],
            site=row["site"],
            case=row["case"],
            patient=row["patient"],
            dice=row["dice"],
            by_class=row.get("by_class", {}),
        )
        for row in record["cases"]
    ]


def _losses(tasks: Sequence[Task]) -> list[LabelLoss]:
    """What the sites of each cell do not annotate, and the cell where they annotate it."""
    found = {}
    for task in tasks:
        source = task.simulation.source
        if task.cell.labels_lost and isinstance(source, FolderSource):
            whole = task.cell.model_copy(update={"labels_lost": 0.0})
            found[task.cell.title] = LabelLoss(task.cell.title, whole.title, source.annotated)
    return list(found.values())


def _left_out(done: Done) -> list[CaseScore]:
    """The ladder at sites that were left out, beside the same sites taking part and alone."""
    scores: list[CaseScore] = []
    there = {(t.cell.name, t.arm.name, t.seed, t.fold): (t, r) for t, r in done}
    for task, record in done:
        if record["unseen"] is None:
            continue
        site, cell = record["unseen"]["site"], f"{task.cell.place.title}, left out"
        beside = there.get((task.cell.place.name, task.arm.name, task.seed, task.fold))
        alone = there.get((task.cell.place.name, REFERENCE, task.seed, task.fold))
        patients: dict[str, str] = {}
        for found, name in ((beside, f"{task.arm.name} taking part"), (alone, REFERENCE)):
            if found is None:
                continue
            own = [s for s in _scores(*found) if s.site == site and not s.at_home]
            patients |= {s.case: s.patient for s in own}
            scores += [replace(s, arm=name, cell=cell, by_class={}) for s in own]
        for step, dice in record["unseen"]["dice"].items():
            scores += [
                CaseScore(
                    arm=f"{task.arm.name} {step}",
                    at_home=False,
                    cell=cell,
                    seed=task.seed,
                    site=site,
                    case=case,
                    patient=patients.get(case, case),
                    dice=value,
                )
                for case, value in dice.items()
            ]
    return list(dict.fromkeys(scores))  # the site alone stands beside every arm


def _cost(task: Task, record: dict[str, Any]) -> Cost:
    return Cost(
        arm=task.arm.name,
        cell=task.cell.title,
        seed=task.seed,
        seconds_per_round=record["seconds_per_round"] or record["seconds"] / record["rounds"],
        bytes_up_per_round=record["bytes_up"],
        bytes_down_per_round=record["bytes_down"],
        local_parameters=record["local_parameters"],
        kept=Counter(record["kept"].values()),
    )


def _swaps(task: Task, record: dict[str, Any]) -> list[Swap]:
    return [
        Swap(arm=task.arm.name, cell=task.cell.title, seed=task.seed, **row)
        for row in record["swaps"]
    ]


def _matrices(done: Done, lab: Lab) -> list[SiteMatrix]:
    """Those of the first seed and fold; one picture an arm is enough to see the pattern."""
    first = [
        (task, record["matrix"])
        for task, record in done
        if task.seed == lab.seeds[0] and task.fold in (None, 0) and record["matrix"]
    ]
    return [
        SiteMatrix(
            arm=task.arm.name,
            cell=task.cell.title,
            sites=(sites := tuple(sorted(matrix))),
            dice=tuple(tuple(matrix[a].get(b) for b in sites) for a in sites),
        )
        for task, matrix in first
    ]


def _failures(done: Done, missing: Sequence[str]) -> list[Failure]:
    found = [
        Failure(cell=task.cell.title, arm=task.arm.name, seed=task.seed, what=text)
        for task, record in done
        for text in record["refusals"]
    ]
    if missing:
        what = f"{len(missing)} tasks are not done: {', '.join(missing[:5])}"
        found.append(Failure(cell="", arm="", seed=None, what=what))
    return found


def _facts(lab: Lab, study: Study, done: Done, total: int) -> dict[str, object]:
    training, finale = study.training, study.finale
    return {
        "tasks": f"{len(done)} of {total}",
        "seeds": ", ".join(map(str, lab.seeds)),
        "folds": lab.folds or "none: the study's own test split",
        "network": f"{study.network.name} {list(study.network.features)}",
        "rounds": training.rounds,
        "steps a round at each site": training.local_steps,
        "steps at home": finale.steps,
        "batch, patch": f"{training.batch_size}, {list(training.patch)}",
        "threads": ", ".join(sorted({str(record["threads"]) for _, record in done})),
        "largest process (MiB)": max((record["peak_mib"] for _, record in done), default=None),
        "arms that change the study": {
            arm.name: ", ".join(f"{k} = {v}" for k, v in arm.set.items()) or arm.method
            for arm in lab.arms
            if arm.set or arm.name != arm.method
        },
    }
