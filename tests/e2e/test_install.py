"""The wheel in a clean environment: what it holds, where it is imported from, what its commands do.

A clean environment would take a gigabyte of other packages on every run. Here it borrows those
of the running one, through a path file; an editable install there stays invisible, because the
path files of a borrowed folder are not read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = sorted(PROJECT["project"]["scripts"])
PACKAGES = [
    PurePosixPath(p) for p in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]


def run(command, folder):
    # Nothing but the environment's own path files may say where modules are.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment | {"PYTHONNOUSERSITE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def files():
    """The clone's files, as a fresh clone would have them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: the files that belong to it are git's list")
    listed = run(["git", "ls-files", "-z", "-co", "--exclude-standard"], ROOT).split("\0")
    return [PurePosixPath(name) for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clone(files, tmp_path_factory):
    target = tmp_path_factory.mktemp("clone")
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, target / file)
    return target


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    """Built from the sdist, which `build` makes first."""
    dist = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, clone], dist)
    assert len(list(dist.glob("uharmony-*.tar.gz"))) == 1
    (built,) = dist.glob("uharmony-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    run([*PIP, "--python", folder / "bin" / "python", "install", *OFFLINE, wheel], folder)
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages(folder) / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return folder


def site_packages(environment):
    here = {"base": str(environment), "platbase": str(environment)}
    return Path(sysconfig.get_path("purelib", "venv", here))


def files_of_packages(files):
    """The tracked files of the five packages, by their names inside the wheel."""
    return {
        str(file.relative_to(package.parent))
        for package in PACKAGES
        for file in files
        if file.is_relative_to(package)
    }


def test_the_wheel_holds_the_five_packages_and_nothing_else(wheel, files):
    metadata = f"uharmony-{PROJECT['project']['version']}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(metadata)}
        assert f"{metadata}licenses/LICENSE" in archive.namelist()
    assert names == files_of_packages(files)
    assert {name.split("/")[0] for name in names} == {
        "uharmony_model",
        "uharmony_server",
        "uharmony_client",
        "uharmony_service",
        "uharmony_simulation",
    }


def test_pip_install_of_a_clone_gives_the_same_files(clone, files, tmp_path):
    run(
        [*PIP, "install", *OFFLINE, "--no-compile", "--target", tmp_path / "there", clone], tmp_path
    )
    installed = {
        file.relative_to(tmp_path / "there").as_posix()
        for package in PACKAGES
        for file in (tmp_path / "there" / package.name).rglob("*")
        if file.is_file()
    }
    assert installed == files_of_packages(files)


def test_the_packages_are_imported_from_the_wheel(environment, tmp_path):
    names = [package.name for package in PACKAGES]
    program = f"import importlib; [print(importlib.import_module(n).__file__) for n in {names}]"
    found = run([environment / "bin" / "python", "-c", program], tmp_path).splitlines()
    assert [Path(file).parent for file in found] == [site_packages(environment) / n for n in names]


def test_the_report_finds_its_template(environment, tmp_path):
    program = (
        "from importlib.resources import files;"
        "print(files('uharmony_server').joinpath('report.html.jinja').read_text())"
    )
    assert "<html" in run([environment / "bin" / "python", "-c", program], tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_leaves_nothing(command, environment, tmp_path):
    assert "Usage" in run([environment / "bin" / command, "--help"], tmp_path)
    assert list(tmp_path.iterdir()) == []
