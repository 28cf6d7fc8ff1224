"""One site of five cases of four patients, whose statistics are asked for."""

from __future__ import annotations

import csv
from pathlib import Path

from tests.support.tiny import tiny_study, write_folder
from uharmony_client.policy import Policy
from uharmony_client.site import Site
from uharmony_client.site_config import SiteConfig
from uharmony_model.study import Study

PATIENTS = ("a", "a", "b", "c", "d")  # of the five cases: one has two
SIZE = 16


def study_of(method: str = "glua-fed", **unlabelled) -> Study:
    """A study of one step a round in which averages are over three patients at least."""
    return tiny_study(
        method=method,
        network={"features": [4, 8]},
        training={"patch": [SIZE] * 3, "local_steps": 1, "batch_size": 1},
        evaluation={"validation": 0.0, "test": 0.0, "every": 0},
        unlabelled={"min_patients": 3, **unlabelled},
    )


def write_cases(folder: Path) -> Path:
    """The cases, in a folder that is not there yet."""
    write_folder(folder, {"alpha": len(PATIENTS)}, SIZE)
    path = folder / "cases.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, patient in zip(rows, PATIENTS, strict=True):
        row["patient"] = patient
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def open_site(data: Path, store: Path, policy: Policy, study: Study, **options) -> Site:
    """The site with its store in a folder of its own."""
    config = SiteConfig(name="alpha", cases=data, store=store, policy=policy, **options)
    return Site.open(config, study)
