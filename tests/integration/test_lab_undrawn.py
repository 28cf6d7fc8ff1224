"""Sites that draw one class each, in the lab: every number is of what they would be served with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from tests.support.tiny import run_command, study_content, write_folder
from uharmony_simulation.app import app as simulation


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two sites; the upper half of each blob is another class."""
    folder = tmp_path_factory.mktemp("undrawn")
    data = write_folder(folder / "data", {"alpha": 8}, 16)
    for path in (data / "labels").iterdir():
        label = nib.Nifti1Image.from_filename(path)
        blob = np.asanyarray(label.dataobj).copy()
        blob[8:] *= 2
        nib.save(nib.Nifti1Image(blob, label.affine), path)
    task = {"classes": {"lower": 1, "upper": 2}}
    source = {"kind": "folder", "sites_from": "random", "random_sites": 2}
    content = study_content(task=task, training={"rounds": 2}, finale={"steps": 2})
    base = content | {"simulation": {"source": source}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    lab = {"name": "undrawn", "study": "base.yaml", "arms": ["uharmony"], "seeds": [0]}
    (folder / "lab.yaml").write_text(yaml.safe_dump(lab | {"grid": {"labels_lost": [1]}}))
    where: list[str | Path] = ["--data", data, "--out", folder / "out"]
    assert run_command(simulation, "study", folder / "lab.yaml", *where) == 0
    (path,) = Path(folder / "out/records").rglob("*.json")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def test_swaps_start_from_what_the_cases_were_measured_with(record):
    cases = {(r["site"], r["case"]): r["dice"] for r in record["cases"] if not r["at_home"]}
    swaps = [swap for swap in record["swaps"] if (swap["site"], swap["case"]) in cases]
    assert swaps
    for swap in swaps:
        assert swap["own"] == pytest.approx(cases[swap["site"], swap["case"]], abs=1e-6)


def test_classes_that_a_site_does_not_draw_are_measured_all_the_same(record):
    assert {site for row in record["cases"] for site in [row["site"]]} == {"site-1", "site-2"}
    for row in record["cases"]:
        assert set(row["by_class"]) == {"lower", "upper"}
