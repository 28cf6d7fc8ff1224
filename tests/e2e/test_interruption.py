"""The command as a real process, killed and stopped while it trains, then told to go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import write_folder, write_study

PROGRAM = "from uharmony_simulation.app import main; main()"
LONG = {"rounds": 8, "local_steps": 6}


def start(home: Path, out: str, *more: str) -> subprocess.Popen[str]:
    options = ["--data", "data", "--out", out, "--threads", "1", "--device", "cpu", *more]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "run", "study.yaml", *options],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(home: Path, out: str) -> str:
    outcome = json.loads((home / out / "arms/uharmony/seed-0/done.json").read_text())
    return str(outcome["weights"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    write_folder(folder / "data")
    write_study(folder / "study.yaml", training=LONG)
    with start(folder, "undisturbed") as run:
        said, complaints = run.communicate(timeout=120)
    assert run.returncode == 0, complaints
    last = json.loads(said.splitlines()[-1])
    assert last["event"] == "done"
    assert (folder / last["report"]).is_file()
    return folder


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stopped_while_training_it_goes_on_to_the_same_bits(home, how, code):
    # Foreign code can swallow the exception a signal raises; a person presses Ctrl-C again.
    for attempt in range(3):
        out = f"{how.name}-{attempt}"
        with start(home, out) as run:
            assert run.stdout is not None
            for line in run.stdout:
                if json.loads(line).get("round") == 2:
                    run.send_signal(how)
                    break
            _, complaints = run.communicate(timeout=60)
        if run.returncode != 0:
            break
    assert run.returncode == code
    assert not (home / out / "results.json").exists()
    if how is signal.SIGINT:
        assert complaints.strip().splitlines() == ["error: interrupted"]
    with start(home, out, "--resume") as again:
        said, complaints = again.communicate(timeout=120)
    assert again.returncode == 0, complaints
    rounds = [json.loads(line)["round"] for line in said.splitlines() if '"round"' in line]
    assert min(rounds) > 2
    assert weights(home, out) == weights(home, "undisturbed")
