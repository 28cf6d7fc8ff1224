"""Bad input ends with one clear line and a documented exit code, and leaves nothing half-done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from tests.support.tiny import simulate, write_folder, write_study


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_folder(folder / "data")
    write_study(folder / "study.yaml")
    return folder


def _remove_data(folder: Path) -> None:
    shutil.rmtree(folder / "data")


def _remove_label(folder: Path) -> None:
    (folder / "data/labels/beta_1.nii.gz").unlink()


def _rewrite(folder: Path, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = folder / "data" / kind / "beta_1.nii.gz"
    image = nib.Nifti1Image.from_filename(path)
    array = change(np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(array, image.affine), path)


def _other_grid(folder: Path) -> None:
    _rewrite(folder, "labels", lambda a: a[:-1])


def _other_class(folder: Path) -> None:
    _rewrite(folder, "labels", lambda a: np.where(a == 1, 9, a).astype(np.uint8))


def _not_finite(folder: Path) -> None:
    def poke(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[3, 3, 3] = np.nan
        return array

    _rewrite(folder, "images", poke)


def _other_modality(folder: Path) -> None:
    table = folder / "data/cases.csv"
    table.write_text(table.read_text().replace("beta_1,beta_1,beta,MR", "beta_1,beta_1,beta,CT"))


def _unknown_key(folder: Path) -> None:
    study = folder / "study.yaml"
    content = yaml.safe_load(study.read_text())
    content["training"]["epochs"] = 3
    study.write_text(yaml.safe_dump(content))


def _patch_too_small(folder: Path) -> None:
    study = folder / "study.yaml"
    content = yaml.safe_load(study.read_text())
    content["training"]["patch"] = [16, 16, 15]
    study.write_text(yaml.safe_dump(content))


def _truncated(folder: Path) -> None:
    path = folder / "data/images/beta_1.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (_remove_data, 3, "data"),
        (_remove_label, 3, "beta_1"),
        (_other_grid, 3, "beta_1"),
        (_other_class, 3, "9"),
        (_other_modality, 3, "CT"),
        (_unknown_key, 2, "training.epochs"),
        (_patch_too_small, 2, "training.patch"),
        (_not_finite, 3, "beta_1"),
        (_truncated, 3, "beta_1"),
    ],
)
def test_one_line_an_exit_code_and_nothing_half_done(tmp_path, good, capsys, damage, code, words):
    folder = tmp_path / "study"
    shutil.copytree(good, folder)
    damage(folder)
    out = tmp_path / "out"
    got, said = simulate(
        capsys, "run", folder / "study.yaml", "--data", folder / "data", "--out", out,
        "--threads", "1", "--device", "cpu",
    )  # fmt: skip
    assert got == code
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not list(out.rglob("*.partial")) + list(out.rglob(".*"))
    assert not (out / "results.json").exists()
    assert not list(out.glob("arms/*/*/server/*"))


def _shifted_label(folder: Path) -> None:
    path = folder / "data/labels/beta_1.nii.gz"
    image = nib.Nifti1Image.from_filename(path)
    affine = image.affine.copy()
    affine[0, 3] += 20
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)


def _half_label(folder: Path) -> None:
    _rewrite(folder, "labels", lambda a: a.astype(np.float32) * 1.7)


@pytest.mark.parametrize("damage", [_shifted_label, _half_label, _other_class])
@pytest.mark.parametrize("scanner", [False, True])
def test_a_simulated_scanner_hides_no_bad_label(tmp_path, good, capsys, damage, scanner):
    folder = tmp_path / "study"
    shutil.copytree(good, folder)
    damage(folder)
    if scanner:
        content = yaml.safe_load((folder / "study.yaml").read_text())
        content["simulation"]["source"]["scanners"] = {"beta": {"strength": 0.5}}
        (folder / "study.yaml").write_text(yaml.safe_dump(content))
    options = ["--data", folder / "data", "--out", tmp_path / "out", "--threads", "1"]
    code, said = simulate(capsys, "run", folder / "study.yaml", *options, "--device", "cpu")
    assert code == 3
    assert "beta_1" in said


def test_options_that_cannot_be_followed(tmp_path, good, capsys):
    study, data = good / "study.yaml", good / "data"
    out = tmp_path / "out"
    assert simulate(capsys, "run", study, "--out", out)[0] == 2  # no --data
    assert simulate(capsys, "run", study, "--out", out, "--data", data, "--arm", "sgd")[0] == 2
    assert simulate(capsys, "run", tmp_path / "none.yaml", "--out", out)[0] == 2
    assert not list(out.glob("arms/*"))


def test_a_folder_in_use_is_not_touched(tmp_path, good, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.docx").write_text("mine")
    code, said = simulate(capsys, "run", good / "study.yaml", "--data", good / "data", "--out", out)
    assert (code, [p.name for p in out.iterdir()]) == (2, ["thesis.docx"])
    assert "give another --out" in said
