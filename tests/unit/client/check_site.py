"""A site on disk for the tests of the doctor: twelve sound cases, of which some are replaced."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console

from tests.support.nifti_files import nifti_bytes
from uharmony_client.check import Report, render
from uharmony_client.site_config import SiteConfig

COUNT = 12
SHAPE = (8, 9, 10)


def image_of(number: int) -> np.ndarray:
    """The image of a case, unlike all others."""
    return np.random.default_rng(number).normal(100, 20, SHAPE).astype("f4")


def label_of(number: int) -> np.ndarray:
    """Two voxels of value 1, three of value 2, one of value 3, in every case."""
    label = np.zeros(SHAPE, "u1")
    label[2, 2, 2:4], label[3, 3, 3:6], label[4, 4, 4] = 1, 2, 3
    return label


def write_site(
    config: SiteConfig,
    replace: Mapping[str, bytes] | None = None,
    *,
    count: int = COUNT,
    rows: Mapping[int, Mapping[str, str]] | None = None,
) -> Path:
    """Write the table and its volumes; `replace` gives files other bytes, `rows` other cells."""
    folder = config.cases.parent
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for number in range(count):
        files = {"image": f"i{number}.nii", "label": f"l{number}.nii"}
        (folder / files["image"]).write_bytes(nifti_bytes(image_of(number)))
        (folder / files["label"]).write_bytes(nifti_bytes(label_of(number)))
        row = {"case": f"c{number}", "patient": f"p{number}", "site": config.name, **files}
        table.append({**row, **(rows or {}).get(number, {})})
    for name, content in (replace or {}).items():
        (folder / name).write_bytes(content)
    with config.cases.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in table for key in row}), restval="")
        writer.writeheader()
        writer.writerows(table)
    return folder


def codes(report: Report) -> set[str]:
    """The codes of the findings."""
    return {finding.rule.code for finding in report.findings}


def page(report: Report) -> str:
    """The page as a terminal shows it."""
    console = Console(width=200, record=True, file=(Path("/dev/null")).open("w"))  # noqa: SIM115
    with console.file:
        console.print(render(report))
        return console.export_text()
