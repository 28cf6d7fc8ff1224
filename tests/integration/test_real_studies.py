"""The studies on real volumes, cut to a few cases and one step: every arm, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import pytest
import yaml

from tests.support.tiny import command, simulate
from uharmony_client.predict import app as predict

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# One of each kind of network, norm and training; every arm runs on tiny volumes in test_run.
ARMS = (
    *("local", "pooled", "fedavg", "fedbn", "gperxan", "fedrep", "ditto", "uharmony", "u2net"),
    "glua-fed",
)
SITES = {"hippocampus": {"f_200k", "f_500", "u8_range"}, "sarcoma": {"CT", "MRT1", "PET"}}


@pytest.mark.data
@pytest.mark.parametrize("name", SITES)
def test_every_kind_of_arm_runs_on_real_volumes(real_volumes, tmp_path, capsys, name):
    content = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    content["training"].update({"rounds": 1, "local_steps": 1, "batch_size": 2})
    content["network"]["features"] = [4, 8, 16]
    content["simulation"]["source"]["cases_per_site"] = 4
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    arms = [word for arm in ARMS for word in ("--arm", arm)]
    out, options = tmp_path / "out", ["--threads", "1", "--device", "cpu", *arms]
    data = real_volumes / name
    assert simulate(
        capsys, "run", tmp_path / "study.yaml", "--data", data, "--out", out, *options
    ) == (0, "")
    records = json.loads((out / "results.json").read_text())
    assert {(r["arm"], r["site"]) for r in records} == {(a, s) for a in ARMS for s in SITES[name]}
    # The model of a site with one modality needs no word about it.
    site = sorted(SITES[name])[0]
    table = (out / "sites" / site / "cases.csv").read_text().splitlines()
    header, first = table[0].split(","), table[1].split(",")
    image = (out / "sites" / site / first[header.index("image")]).resolve()
    model = out / "arms/uharmony/seed-0/model"
    words = [model, image, "--site", site, "--out", tmp_path, "--device", "cpu"]
    assert command(capsys, predict, *words) == (0, "")
    stem = image.name.removesuffix(".nii.gz")
    made = nib.Nifti1Image.from_filename(tmp_path / f"{stem}_seg.nii.gz")
    assert made.shape == nib.Nifti1Image.from_filename(image).shape
