"""Three bad volumes of fifty: put into quarantine by `check`, and the run is that on the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.faults.federation import CLIENT, STUDY, Federation
from tests.faults.record import keep
from tests.support.tiny import write_folder, write_study
from uharmony_client.case_table import CaseTable
from uharmony_client.readers import read_cases
from uharmony_model.study import Study, load_study
from uharmony_simulation.arms import Arm, Machine, SiteOpener, run_arm
from uharmony_simulation.config import Simulation
from uharmony_simulation.sites import make_sites

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.faults]
COUNTS = {"alpha": 50, "beta": 4, "gamma": 4}
SOURCE = {"source": {"kind": "folder", "sites_from": "column"}}


def bad_cases(table: CaseTable, study: Study) -> list[str]:
    """Two training cases and one validation case of alpha."""
    split = table.with_splits(study.evaluation, study.split_seed).of(site="alpha")
    names = [[c.case for c in split.of(split=s).cases] for s in ("train", "validation")]
    return [names[0][3], names[0][17], names[1][1]]


def run_on_the_others(folder: Path, data: Path, study: Study, bad: list[str]) -> str:
    """The undisturbed run in one process on a table in which the bad cases never were."""
    folder.mkdir()
    make_sites(study, Simulation.model_validate(SOURCE), data, folder / "sites")
    path = folder / "sites" / "alpha" / "cases.csv"
    # Splits are drawn before cases are taken out, so those of the whole table are written down.
    table = read_cases(path).with_splits(study.evaluation, study.split_seed)
    CaseTable(cases=tuple(c for c in table.cases if c.case not in bad)).write_csv(path)
    sites = tuple(sorted(COUNTS))
    arm = Arm.of(study, study.method, study.seed, sites)
    machine = Machine(threads=1, device="cpu")
    SiteOpener(arm, folder / "sites", machine).open_all(lambda *_: None)
    run_arm(arm, folder / "sites", folder / "arm", machine)
    return str(json.loads((folder / "arm" / "done.json").read_bytes())["weights"])


def test_three_bad_volumes_of_fifty(tmp_path: Path):
    whole = write_folder(tmp_path / "whole", COUNTS)
    study, _ = load_study(write_study(tmp_path / "study.yaml", **STUDY))
    bad = bad_cases(read_cases(whole), study)
    wanted = run_on_the_others(tmp_path / "reference", whole, study, bad)

    broken = write_folder(tmp_path / "broken", COUNTS)
    for name in bad:
        image = broken / "images" / f"{name}.nii.gz"
        image.write_bytes(image.read_bytes()[:2000])
    sites = {}
    for name in COUNTS:
        folder = tmp_path / "sites" / name
        folder.mkdir(parents=True)
        content = {"name": name, "cases": str(broken), "store": "store", "volumes": "volumes",
                   "policy": {"min_cases": 1}}  # fmt: skip
        (folder / "site.yaml").write_text(yaml.safe_dump(content))
        sites[name] = folder / "site.yaml"
    made = Federation(tmp_path / "federation", study, sites)
    try:
        made.init()
        made.join_all()
        checked = subprocess.run(
            [sys.executable, "-m", CLIENT, "--site", str(made.site_yaml("alpha")), "check"],
            capture_output=True,
            text=True,
            check=False,
        )
        said = checked.stdout + checked.stderr
        assert "3" in said
        assert not any(name in said for name in bad), "the check names cases"
        made.start_all()
        assert made.end() == wanted
        board = json.loads((made.store("alpha") / "run" / "status.json").read_bytes())
        assert (board["cases"], board["quarantined"]) == (47, 3)
        assert made.counted() == [sorted(COUNTS)] * study.training.rounds
    finally:
        made.kill_everything()
    keep("three bad volumes of fifty at a site", "quarantined by `check`; the run on the other 47")
