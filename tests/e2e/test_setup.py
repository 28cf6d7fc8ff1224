"""What scripts/setup asks of pip, seen by a stand-in for Python that writes its calls down."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
(TORCH,) = re.findall(r"^# torch==([0-9.]+) ", (ROOT / "requirements.lock").read_text(), re.M)

PYTHON = """#!/usr/bin/env bash
case "$*" in
  *version_info*) echo "$VERSION" ;;
  *ensurepip*) [[ ! -e $STATE/no-venv ]] ;;
  --version) echo "Python $VERSION.0" ;;
  "-m venv "*) mkdir -p "$3/bin" "$3/lib" && cp "$0" "$3/bin/python" ;;
  "-m pip index "*) cat "$STATE/index" ;;
  "-m pip "*) echo "${@:3}" >>"$STATE/calls" && [[ ! -e $STATE/broken ]] ;;
esac
"""


class Clone:
    def __init__(self, folder):
        self.root, self.state = folder / "a clone", folder / "state"
        for name in ("scripts/environment.sh", "scripts/setup", "requirements.lock"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.state.mkdir()
        self.tool("python", PYTHON)
        self.tool("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def tool(self, name, text):
        (self.state / name).write_text(text)
        (self.state / name).chmod(0o755)

    def setup(self, version="3.12"):
        """Runs it; gives its exit status, its last line and the calls of pip."""
        (self.state / "calls").unlink(missing_ok=True)
        environment = os.environ | {
            "PATH": f"{self.state}:{os.environ['PATH']}",
            "PYTHON": str(self.state / "python"),
            "STATE": str(self.state),
            "VERSION": version,
        }
        done = subprocess.run(
            [self.root / "scripts" / "setup"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        calls = self.state / "calls"
        return (
            done.returncode,
            (done.stderr.splitlines() or [""])[-1],
            calls.read_text().splitlines() if calls.exists() else [],
        )


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


LOCKED = "install --no-deps --only-binary=:all: -r requirements.lock"
EDITABLE = "install --no-deps --no-build-isolation --editable ."


def test_without_a_gpu_only_the_cpu_build_is_asked_for(clone):
    status, _, calls = clone.setup()
    assert status == 0
    assert calls == [f"install --no-deps torch=={TORCH}+cpu", LOCKED, EDITABLE, "check"]


@pytest.mark.parametrize("offered", [TORCH, f"{TORCH}+cpu"])
def test_an_index_of_cpu_builds_is_preferred_whatever_they_are_called(clone, offered):
    (clone.state / "index").write_text(f"torch (9.9)\nAvailable versions: 9.9, {offered}\n")
    assert clone.setup()[2][0] == f"install --no-deps torch=={TORCH}"


def test_an_index_that_lacks_the_locked_version_is_passed_over(clone):
    (clone.state / "index").write_text(f"Available versions: 9.9, {TORCH}1\n")
    assert clone.setup()[2][0] == f"install --no-deps torch=={TORCH}+cpu"


def test_with_a_gpu_pip_may_bring_cuda(clone):
    clone.tool("nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert clone.setup()[2][0] == f"install --constraint requirements.lock torch=={TORCH}"


def test_cuda_packages_without_a_gpu_are_refused(clone):
    clone.tool("python", PYTHON.replace('"$3/lib"', '"$3/lib/p/site-packages/nvidia_x"'))
    status, line, _ = clone.setup()
    assert status == 1
    assert "without a GPU" in line


def test_a_second_run_does_nothing(clone):
    clone.setup()
    assert clone.setup() == (0, "", [])


def test_a_new_lock_or_python_or_place_begins_again_a_new_pyproject_only_the_clone(clone, tmp_path):
    whole = clone.setup()[2]
    with (clone.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert clone.setup()[2] == [EDITABLE, "check"]
    with (clone.root / "requirements.lock").open("a") as file:
        file.write("# changed\n")
    assert clone.setup()[2] == whole
    assert clone.setup("3.13")[2] == whole
    clone.root = clone.root.rename(tmp_path / "elsewhere")
    assert clone.setup("3.13")[2] == whole


def test_what_was_interrupted_is_repaired(clone):
    (clone.state / "broken").touch()
    assert clone.setup()[0] == 1
    (clone.state / "broken").unlink()
    status, _, calls = clone.setup()
    assert (status, len(calls)) == (0, 4)


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.14"])
def test_one_line_names_the_package_that_brings_python(clone, version):
    status, line, calls = clone.setup(version)
    assert (status, calls) == (1, [])
    assert f"is {version})" in line
    assert "install the packages python3.12 and python3.12-venv" in line
    assert not (clone.root / ".venv").exists()


def test_one_line_names_the_package_that_brings_venv(clone):
    (clone.state / "no-venv").touch()
    status, line, _ = clone.setup()
    assert status == 1
    assert line.endswith("Python 3.12 has no venv module: install the package python3.12-venv")


def test_one_line_says_that_no_build_of_torch_is_found(clone):
    (clone.state / "broken").touch()
    status, line, calls = clone.setup()
    assert status == 1
    assert f"no torch {TORCH}+cpu for Python 3.12" in line
    assert len(calls) == 1


def test_everything_stays_in_the_clone(clone, tmp_path):
    before = {file for file in tmp_path.rglob("*") if clone.root not in file.parents}
    leftovers = set(Path("/tmp").glob("uh.??????"))  # noqa: S108 - where setup's own scratch goes
    clone.setup()
    after = {file for file in tmp_path.rglob("*") if clone.root not in file.parents}
    assert after - before == {clone.state / "calls"}
    assert set(Path("/tmp").glob("uh.??????")) <= leftovers  # noqa: S108
