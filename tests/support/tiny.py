"""A tiny federation on disk: blobs in noise, three sites, trained in a second or two."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from typer import Typer

from uharmony_model.methods import METHODS
from uharmony_model.study import Study
from uharmony_service.command_line import run
from uharmony_simulation.app import app as simulation

CASES = {"alpha": 5, "beta": 4, "gamma": 4}
# The arms that learn from labels alone, and two of the others: each has tests of its own.
ARMS = [name for name, method in METHODS.items() if method.unlabelled in (None, "glua")]


def write_folder(folder: Path, cases: dict[str, int] | None = None, size: int = 16) -> Path:
    """A plain images/ labels/ cases.csv folder; the blob is bright, dark at site gamma."""
    rows = []
    rng = np.random.default_rng(7)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for site, count in (cases or CASES).items():
        for number in range(count):
            name = f"{site}_{number}"
            centre = rng.uniform(size * 0.3, size * 0.7, 3)[:, None, None, None]
            label = (((grid - centre) ** 2).sum(0) < (size * 0.22) ** 2).astype(np.uint8)
            contrast = -1.0 if site == "gamma" else 1.0
            image = (100 + 40 * contrast * label + rng.normal(0, 8, label.shape)).astype(np.float32)
            affine = np.diag([2.0, 2.0, 2.0, 1.0])
            nib.save(nib.Nifti1Image(image, affine), folder / "images" / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(label, affine), folder / "labels" / f"{name}.nii.gz")
            rows.append({"case": name, "patient": name, "site": site, "modality": "MR"})
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "patient", "site", "modality"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def study_content(**changes: Any) -> dict[str, Any]:
    """The content of a tiny study.yaml; `changes` replace keys of its sections."""
    content: dict[str, Any] = {
        "name": "tiny",
        "task": {
            "classes": {"blob": 1},
            "intensity": {"MR": {"policy": "zscore"}},
            "spacing_mm": [2, 2, 2],
        },
        "network": {"name": "unet", "features": [4, 8]},
        "training": {
            "rounds": 3,
            "local_steps": 2,
            "batch_size": 2,
            "patch": [16, 16, 16],
            "learning_rate": 0.01,
        },
        "evaluation": {"validation": 0.2, "test": 0.3, "every": 1, "bootstrap": 50},
    }
    for key, value in changes.items():
        if isinstance(value, dict):
            content[key] = {**content.get(key, {}), **value}
        else:
            content[key] = value
    return content


def tiny_study(**changes: Any) -> Study:
    """The tiny study as an object."""
    return Study.model_validate(study_content(**changes))


def write_study(path: Path, **changes: Any) -> Path:
    """The tiny study as a file, with its sites taken from the `site` column."""
    content = study_content(**changes)
    content["simulation"] = {"source": {"kind": "folder", "sites_from": "column"}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(capsys: pytest.CaptureFixture[str], app: Typer, *words: str | Path) -> tuple[int, str]:
    """Run a command as its console script does: the exit code and what stderr says."""
    return run_command(app, *words), capsys.readouterr().err


def run_command(app: Typer, *words: str | Path) -> int:
    """The exit code alone, where nobody captures what is said: in a fixture of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["uharmony", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run(app)
    code = ended.value.code
    return code if isinstance(code, int) else 0


def simulate(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """Run uharmony-simulate."""
    return command(capsys, simulation, *words)
