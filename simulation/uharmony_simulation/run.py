"""A whole run: the sites once, then every arm and seed on them, then records and the report."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import resource
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from uharmony_client.evaluate import CaseRow
from uharmony_client.site_config import load_site
from uharmony_model import __version__
from uharmony_model.atomic import recover, write_atomic
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.frozen import parse
from uharmony_model.methods import METHODS
from uharmony_model.networks import check_patch
from uharmony_model.participation import Participation
from uharmony_model.study import Study, load_study
from uharmony_server.records import Record, write_results
from uharmony_server.report import ArmRefusal, Figure, write_report
from uharmony_server.summary import LOCAL
from uharmony_simulation.arms import Arm, Machine, SiteOpener, run_arm
from uharmony_simulation.config import Simulation
from uharmony_simulation.participation import check_one_run, check_sites, claim
from uharmony_simulation.progress import Progress
from uharmony_simulation.sites import attribution, make_sites

PACKAGES = ("torch", "monai", "flwr", "numpy", "nibabel", "safetensors")


def run_study(
    path: Path,
    out: Path,
    *,
    data: Path | None,
    arms: Sequence[str],
    seeds: Sequence[int],
    machine: Machine,
    resume: bool,
    progress: Progress,
    participation: Participation | None = None,
) -> list[Record]:
    """Run the arms of a study file into `out` and return their records.

    With a `participation` one arm is run with the sites that took part in another run.

    Raises:
        ConfigError: the study cannot be followed, or `out` is in use and --resume is not given.
        StoreError: `out` was made by another study.
    """
    study, section = load_study(path)
    if not section:
        raise ConfigError(f"{path}: no simulation: section; it says where the volumes come from")
    simulation = parse(Simulation, section, f"{path}: simulation")
    check_patch(study.network, study.training.patch)
    arms, seeds = list(arms) or [study.method], list(seeds) or [study.seed]
    if participation is not None:
        check_one_run(participation, study, arms, seeds)
        if machine.engine != "inprocess":
            raise ConfigError(f"--participation with --engine {machine.engine}; use inprocess")
    _claim(out, study, resume)
    sites = make_sites(study, simulation, data, out / "sites", on_case=progress.making)
    # The sites' finale chooses from what the local arm leaves, so that one is first.
    ordered = sorted(arms, key=lambda name: name != LOCAL)
    planned = [Arm.of(study, name, seed, sites) for name in ordered for seed in seeds]
    for arm in planned:
        if participation is not None:
            check_sites(participation, arm.sites)
        # Volumes are prepared here, before any site is asked, so that a case that cannot be used
        # ends the command with its reason instead of a site's refusal.
        SiteOpener(arm, out / "sites", machine).open_all(progress.preparing)
    for arm in planned:
        folder = _folder(out, arm)
        claim(folder, participation)
        if not (folder / "done.json").is_file():
            progress.arm(arm)
            run_arm(
                arm,
                out / "sites",
                folder,
                machine,
                on_round=lambda state, arm=arm: progress.round(arm, state),  # type: ignore[misc]
                on_step=progress.step,
                participation=participation,
            )
        progress.arm_done(arm)
    return _publish(out, study, simulation, machine)


def _folder(out: Path, arm: Arm) -> Path:
    return out / "arms" / arm.name / f"seed-{arm.seed}"


def _claim(out: Path, study: Study, resume: bool) -> None:
    """Make `out` this study's folder, or see that it is already.

    A folder in which nothing was trained yet is taken over without --resume.
    """
    record = out / "study.json"
    if out.is_dir():
        recover(out)
    if not record.is_file():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out}: exists and is no run of this program; give another --out")
        out.mkdir(parents=True, exist_ok=True)
    elif (out / "arms").exists():
        found, wanted = json.loads(record.read_bytes()), json.loads(study.canonical_json())
        changed = sorted(k for k in wanted if found.get(k) != wanted[k])
        if changed:
            raise StoreError(
                f"{out}: made by another version of this study (differs in "
                f"{', '.join(changed)}); a changed study is a new study: give another --out"
            )
        if not resume:
            raise ConfigError(f"{out}: holds a run; add --resume to go on, or give another --out")
    else:
        shutil.rmtree(out / "sites", ignore_errors=True)
    write_atomic(record, study.canonical_json().encode(), mode=0o644)


def _publish(out: Path, study: Study, simulation: Simulation, machine: Machine) -> list[Record]:
    """results.json, cases.csv, run.json and report.html from every finished arm in the folder."""
    outcomes = [
        json.loads(done.read_bytes()) for done in sorted((out / "arms").glob("*/seed-*/done.json"))
    ]
    order = list(METHODS)
    outcomes.sort(key=lambda o: (order.index(o["arm"]), o["seed"]))
    records = [Record.model_validate(r) for o in outcomes for r in o["records"]]
    refusals = [ArmRefusal.model_validate(r) for o in outcomes for r in o["refusals"]]
    facts = _facts(study, outcomes, machine)
    write_results(out / "results.json", records)
    write_atomic(out / "cases.csv", _case_rows(out, outcomes).encode(), mode=0o644)
    write_atomic(out / "run.json", json.dumps(facts, indent=1).encode(), mode=0o644)
    write_report(
        out / "report.html",
        title=study.name,
        study=study,
        records=records,
        refusals=refusals,
        run_info=facts,
        figures=_figures(out, outcomes),
        attribution=attribution(simulation),
    )
    return records


def _case_rows(out: Path, outcomes: Sequence[dict[str, Any]]) -> str:
    """Per-case rows of every arm, gathered from the sites' own folders."""
    text = io.StringIO()
    names = list(CaseRow.__dataclass_fields__)
    writer = csv.writer(text)
    writer.writerow(["arm", "seed", *(n.replace("class_name", "class") for n in names)])
    for outcome in outcomes:
        for site in sorted((out / "sites").glob("*/site.yaml")):
            folder = load_site(site).store / "evaluations" / outcome["study"]
            for found in sorted(folder.glob("test-round-*.csv")):
                with found.open(newline="") as lines:
                    for row in csv.DictReader(lines):
                        writer.writerow([outcome["arm"], outcome["seed"], *(row[n] for n in names)])
    return text.getvalue()


def _figures(out: Path, outcomes: Sequence[dict[str, Any]]) -> list[Figure]:
    """The pictures of each arm's first seed."""
    figures, seen = [], set()
    for outcome in outcomes:
        if outcome["arm"] in seen:
            continue
        seen.add(outcome["arm"])
        folder = out / "arms" / outcome["arm"] / f"seed-{outcome['seed']}" / "figures"
        for facts in sorted(folder.glob("*.json")):
            about = json.loads(facts.read_bytes())
            png = facts.with_suffix(".png").read_bytes()
            figures.append(Figure(arm=outcome["arm"], png=png, **about))
    return figures


def _facts(study: Study, outcomes: Sequence[dict[str, Any]], machine: Machine) -> dict[str, Any]:
    """Under what the figures were made; bit-identity is claimed for equal facts only."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cuda = torch.cuda.is_available() and machine.device != "cpu"
    return {
        "uharmony": __version__,
        "study": study.name,
        "study_digest": study.digest,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None,
        "peak_rss_mib": round(peak / 1024),
        "arms": [
            {k: o[k] for k in ("arm", "seed", "study", "weights", "threads", "engine", "seconds")}
            for o in outcomes
        ],
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
