"""A heterogeneity study from its file to its report: resumed, never trained twice, any order."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny import CASES, simulate, study_content, write_folder
from uharmony_service.command_line import run
from uharmony_simulation import lab as lab_module
from uharmony_simulation.app import app
from uharmony_simulation.lab_config import Cell, LabArm, load_lab
from uharmony_simulation.lab_task import Task, attendance, read_record, run_task

pytestmark = pytest.mark.slow
ARMS = ["fedavg", "uharmony", "local"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("lab") / "volumes", CASES)


def write_lab(folder: Path, sites: int = 2, **changes) -> Path:
    content = study_content(finale={"steps": 2}, training={"rounds": 2}) | {
        "simulation": {"source": {"kind": "folder", "sites_from": "random", "random_sites": sites}}
    }
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    lab = {"name": "tiny", "study": "base.yaml", "arms": ARMS, "seeds": [0, 1]} | changes
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(lab, sort_keys=False))
    return path


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        str(path.relative_to(folder)): json.loads(path.read_bytes())
        for path in sorted(folder.rglob("*.json"))
    }


def results(folder: Path) -> dict[str, tuple[Any, ...]]:
    return {name: (r["weights"], r["cases"], r["swaps"]) for name, r in records(folder).items()}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    out: Path = tmp_path_factory.mktemp("whole") / "out"
    path = write_lab(out.parent / "study")
    with pytest.MonkeyPatch.context() as patch:
        words = ("x", "study", path, "--data", data, "--out", out)
        patch.setattr("sys.argv", list(map(str, words)))
        with pytest.raises(SystemExit) as ended:
            run(app)
    assert ended.value.code in (0, None)
    return out


def test_a_study_leaves_a_record_a_task_and_a_report(whole):
    found = records(whole / "records")
    assert sorted(found) == sorted(
        f"none/{arm}_seed-{seed}.json" for arm in ARMS for seed in (0, 1)
    )
    for record in found.values():
        moments = {row["at_home"] for row in record["cases"]}
        assert moments == {False, True}
        assert len(record["kept"]) == 2
    one = found["none/uharmony_seed-0.json"]
    assert {row["part"] for row in one["swaps"]} == {
        "all that is local",
        *("phi", "stem_residual", "depthwise_residual"),
    }
    assert {len(row) for row in one["matrix"].values()} == {2}
    page = (whole / "report.html").read_text()
    assert "is any site worse off than alone?" in page
    assert "uharmony" in page
    assert "<script" not in page
    assert "| uharmony" in (whole / "tables.md").read_text()
    assert json.loads((whole / "summary.json").read_text())
    assert not list((whole / "cells").rglob("server")), "only unfinished tasks keep checkpoints"


def test_done_tasks_are_not_trained_again_even_from_records_alone(
    whole, data, tmp_path, capsys, monkeypatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(lab_module, "run_task", never)
    path = write_lab(tmp_path / "study")
    kept = tmp_path / "kept"
    shutil.copytree(whole / "records", kept)
    code, error = simulate(
        capsys, "study", path, "--data", data, "--out", tmp_path / "out", "--records", kept
    )
    assert (code, error) == (0, "")
    assert (tmp_path / "out" / "tables.md").read_text() == (whole / "tables.md").read_text()


def test_another_order_two_processes_and_an_interruption_give_the_same(
    whole, data, tmp_path, capsys, monkeypatch
):
    path = write_lab(tmp_path / "study", arms=ARMS[::-1], seeds=[1, 0])
    words = ("study", path, "--data", data, "--out", tmp_path / "out")
    seen: list[str] = []

    def stop(task, *args, **kwargs):
        seen.append(task.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return run_task(task, *args, **kwargs)

    monkeypatch.setattr(lab_module, "run_task", stop)
    assert simulate(capsys, *words)[0] == 130
    assert len(records(tmp_path / "out" / "records")) == 1
    monkeypatch.setattr(lab_module, "run_task", run_task)
    assert simulate(capsys, *words, "--workers", "2")[0] == 0
    assert results(tmp_path / "out" / "records") == results(whole / "records")


def test_records_of_another_study_are_refused(whole, data, tmp_path, capsys):
    kept = tmp_path / "kept"
    shutil.copytree(whole / "records", kept)
    path = write_lab(tmp_path / "study", grid={"dropout": [0.0]}, arms=["fedavg"], folds=None)
    base = path.parent / "base.yaml"
    base.write_text(base.read_text().replace("rounds: 2", "rounds: 3"))
    code, error = simulate(
        capsys, "study", path, "--data", data, "--out", tmp_path / "out", "--records", kept
    )
    assert code != 0
    assert "another version of this study" in error


def test_a_dropped_site_misses_rounds_and_one_is_always_there(tmp_path, data, capsys):
    path = write_lab(tmp_path / "study", arms=["fedavg"], seeds=[0], grid={"dropout": [0.6]})
    declared, study, simulation = load_lab(path)
    study = study.model_copy(update={"training": study.training.model_copy(update={"rounds": 400})})
    arm = LabArm(name="fedavg", method="fedavg")
    task = Task(Cell(dropout=0.6), arm, 0, None, study, simulation)
    found = attendance(task, ["a", "b", "c"])
    there = [found.rounds[r].trained for r in range(1, 401)]
    assert all(there)
    # P(a site is there) = 0.4, and all absent (0.6^3) is replaced by one of three.
    expected = 0.4 + 0.6**3 / 3
    for site in "abc":
        share = sum(site in sites for sites in there) / 400
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5
    assert attendance(task, ["a", "b", "c"]) == found
    code, _ = simulate(capsys, "study", path, "--data", data, "--out", tmp_path / "out")
    assert code == 0
    groups = lab_module.plan(declared, load_lab(path)[1], simulation)
    assert read_record(tmp_path / "out" / "records", groups[0][0]) is not None


def test_a_site_that_was_left_out_is_served_step_by_step(tmp_path, data, capsys):
    path = write_lab(
        tmp_path / "study",
        sites=3,
        arms=[
            "uharmony",
            "fedavg",
            {
                "name": "none",
                "method": "uharmony",
                "set": {"network.harmonization.residuals": []},
            },
        ],
        seeds=[0],
        grid={"shift": ["mixed-invert"], "without": [None, "site-3"]},
        few_shot=[2],
    )
    code, error = simulate(capsys, "study", path, "--data", data, "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    found = records(tmp_path / "out" / "records")
    record = found["mixed-invert-1_without-site-3/uharmony_seed-0.json"]
    assert {row["site"] for row in record["cases"]} == {"site-1", "site-2"}
    unseen = record["unseen"]
    assert unseen["site"] == "site-3"
    assert set(unseen["dice"]) == {"U0", "U1", "U1 hard", "auto", "U2", "U3-2"}
    tested = [set(by_case) for by_case in unseen["dice"].values()]
    assert tested[0]
    assert all(cases == tested[0] for cases in tested)
    assert tested[0].isdisjoint(row["case"] for row in record["cases"])
    assert 0 <= unseen["U4"]["refused"] <= 1
    assert 0 <= unseen["U4"]["familiar at the sites that took part"] <= 1
    steps = unseen["dice"]
    assert all(d in (steps["U0"][c], steps["U1"][c]) for c, d in steps["auto"].items())
    assert set(unseen["known"]) == {"site-1", "site-2"}
    for arm in ("fedavg", "none"):  # nothing to mix and nothing to fit
        plain = found[f"mixed-invert-1_without-site-3/{arm}_seed-0.json"]["unseen"]
        assert set(plain["dice"]) == {"U0"}
        assert set(plain["dice"]["U0"]) == tested[0]
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "mixed-invert 1, left out" in tables
    assert "uharmony U3-2" in tables


def test_cells_of_the_same_sites_do_not_touch_each_other(data, tmp_path, capsys):
    """Without a site, with absences, and as they are: each as when it is the only one."""
    both = {"dropout": [0.0, 0.6], "without": [None, "site-2"]}
    path = write_lab(tmp_path / "study", arms=["local", "uharmony"], seeds=[0], grid=both)
    words = ("--data", data, "--workers", "2")
    assert simulate(capsys, "study", path, *words, "--out", tmp_path / "both")[0] == 0
    together = results(tmp_path / "both" / "records")
    assert len(together) == 8
    for number, grid in enumerate(
        [{}, {"dropout": [0.6]}, {"without": ["site-2"]}, {"dropout": [0.6], "without": ["site-2"]}]
    ):
        alone = write_lab(tmp_path / f"{number}", arms=["local", "uharmony"], seeds=[0], grid=grid)
        out = tmp_path / f"out-{number}"
        assert simulate(capsys, "study", alone, *words, "--out", out)[0] == 0
        found = results(out / "records")
        assert len(found) == 2
        assert {name: together[name] for name in found} == found


def test_a_record_that_was_removed_is_trained_again(whole, data, tmp_path, capsys):
    out = tmp_path / "out"
    path = write_lab(tmp_path / "study", arms=["fedavg"], seeds=[0])
    words = ("study", path, "--data", data, "--out", out)
    assert simulate(capsys, *words)[0] == 0
    wanted = results(out / "records")
    (out / "records/none/fedavg_seed-0.json").unlink()
    assert simulate(capsys, *words)[0] == 0
    assert results(out / "records") == wanted


def workers_of(parent: int) -> list[int]:
    """Processes that a process has started to work for it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except (OSError, ValueError, IndexError):
            continue
        if above == parent and "spawn_main" in command:
            found.append(int(folder.name))
    return found


def wait_for(what, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


STUDY_IN_TWO_PROCESSES = """
import sys
from pathlib import Path
from uharmony_simulation import lab
from uharmony_simulation.arms import Machine
from uharmony_simulation.lab_config import load_lab

if __name__ == "__main__":
    declared, study, simulation = load_lab(Path(sys.argv[1]))
    places = lab.Places(Path(sys.argv[3]), Path(sys.argv[3]) / "records", Path(sys.argv[2]))
    groups, machine = lab.plan(declared, study, simulation), Machine(1, "cpu")
    lab._make_cell(groups[0][0], places, machine, print)
    budget, clock = lab._Budget(2, None, 1), lab._Clock(9, print)
    lab._run_groups(groups, places, machine, declared, budget, clock)
"""


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_study_that_was_stopped(data, tmp_path, how):
    path = write_lab(tmp_path / "study", arms=["fedavg"], seeds=[0, 1, 2])
    base = path.parent / "base.yaml"
    base.write_text(base.read_text().replace("local_steps: 2", "local_steps: 4000"))
    script = tmp_path / "two.py"
    script.write_text(STUDY_IN_TWO_PROCESSES)
    study = subprocess.Popen(
        [sys.executable, script, path, data, tmp_path / "out"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(workers_of(study.pid)) == 2, 240)
        workers = workers_of(study.pid)
        time.sleep(5)  # in the middle of their tasks
        study.send_signal(how)
        wait_for(lambda: study.poll() is not None, 60)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 60)
    finally:
        study.kill()
