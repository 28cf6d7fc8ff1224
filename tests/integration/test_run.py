"""A whole run as a user starts it: every arm, the files it leaves, going on, a refused site."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message

from tests.support.tiny import (
    ARMS,
    CASES,
    command,
    run_command,
    simulate,
    write_folder,
    write_study,
)
from uharmony_client.flower_app import make_client_app
from uharmony_client.predict import app as predict
from uharmony_simulation.app import app as simulation
from uharmony_simulation.engine import site_of

FIELDS = {
    "arm", "seed", "round", "site", "domain", "split", "class", "n_cases", "dice", "dice_low",
    "dice_high", "surface_dice", "hd95_mm", "lesion_recall", "fp_per_case",
    "kept",
}  # fmt: skip


def options(home: Path, out: str) -> list[str | Path]:
    folders: list[str | Path] = ["--data", home / "data", "--out", home / out]
    return [home / "study.yaml", *folders, "--threads", "1", "--device", "cpu"]


def start(capsys, home: Path, out: str, *more: str) -> tuple[int, str]:
    return simulate(capsys, "run", *options(home, out), *more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every arm has been run into `all`."""
    folder = tmp_path_factory.mktemp("run")
    write_folder(folder / "data")
    write_study(folder / "study.yaml", training={"rounds": 2})
    arms = [word for name in ARMS for word in ("--arm", name)]
    assert run_command(simulation, "run", *options(folder, "all"), *arms) == 0
    return folder


def test_all_arms_leave_what_the_readme_promises(home):
    out = home / "all"
    records = json.loads((out / "results.json").read_text())
    assert all(set(record) == FIELDS for record in records)
    test = [r for r in records if r["split"] == "test"]
    assert {r["round"] for r in test} == {2}
    assert {(r["arm"], r["site"]) for r in test} == {(a, s) for a in ARMS for s in CASES}
    with (out / "cases.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {"arm", "seed", "case", "patient", "site", "class", "dice"} <= set(rows[0])
    # Every arm is measured on the same patients, and a mean is the mean of its cases.
    tested = {arm: {r["patient"] for r in rows if r["arm"] == arm} for arm in ARMS}
    assert len({frozenset(found) for found in tested.values()}) == 1
    for record in test:
        dice = [
            float(r["dice"])
            for r in rows
            if (r["arm"], r["site"]) == (record["arm"], record["site"]) and r["dice"]
        ]
        assert record["dice"] == pytest.approx(np.mean(dice), abs=1e-6)
    page = (out / "report.html").read_text()
    assert all(name in page for name in (*ARMS, *CASES))
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_going_on_trains_nothing_twice(home, capsys, monkeypatch):
    before = (home / "all/results.json").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an arm that is done was run again")

    monkeypatch.setattr("uharmony_simulation.run.run_arm", fail)
    assert start(capsys, home, "all", "--arm", "uharmony", "--resume")[0] == 0
    assert (home / "all/results.json").read_bytes() == before
    code, said = start(capsys, home, "all", "--arm", "uharmony")
    assert code == 2
    assert "--resume" in said


def test_a_changed_study_is_not_mixed_with_the_old_one(home, capsys, tmp_path):
    write_study(home / "study.yaml", training={"rounds": 3})
    code, said = start(capsys, home, "all", "--resume")
    write_study(home / "study.yaml", training={"rounds": 2})
    assert code == 5
    assert "training" in said


def test_the_model_that_is_left_segments_in_the_inputs_own_grid(home, tmp_path, capsys):
    volume = home / "data/images/gamma_0.nii.gz"
    model = home / "all/arms/uharmony/seed-0/model"
    options = ["--site", "gamma", "--out", tmp_path, "--device", "cpu"]
    assert command(capsys, predict, model, volume, *options) == (0, "")
    made = nib.Nifti1Image.from_filename(tmp_path / "gamma_0_seg.nii.gz")
    source = nib.Nifti1Image.from_filename(volume)
    assert made.shape == source.shape
    assert np.allclose(made.affine, source.affine)


def test_the_report_names_a_refused_site_and_the_reason(home, capsys, monkeypatch):
    def damaged(*arguments, **options):
        inner = make_client_app(*arguments, **options)

        def app(message: Message, context: Context) -> Message:
            reply = inner(message, context)
            if site_of(context) == "beta" and message.metadata.message_type == "train":
                data = bytearray(reply.content.array_records["payload"]["payload"].data)
                data[-1] ^= 1
                array = Array("uint8", (len(data),), "uharmony.payload", bytes(data))
                reply.content["payload"] = ArrayRecord({"payload": array})
            return reply

        return app

    monkeypatch.setattr("uharmony_simulation.arms.make_client_app", damaged)
    assert start(capsys, home, "refused", "--arm", "uharmony")[0] == 0
    page = (home / "refused/report.html").read_text()
    assert "beta" in page
    assert "damaged" in page
    records = json.loads((home / "refused/results.json").read_text())
    assert {r["site"] for r in records if r["split"] == "test"} == set(CASES)
