"""`python -m benchmarks compare`: any two recorded arms, by the cases that both have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compare
from uharmony_model.errors import ConfigError


def write(folder: Path, arm: str, dice: dict[str, float]) -> None:
    """A record; what was measured at home, 0 here, must not count."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"site": case[0], "case": case, "patient": case, "dice": value, "at_home": at_home}
        for case, found in dice.items()
        for at_home, value in ((False, found), (True, 0.0))
    ]
    record = {"arm": arm, "seed": 0, "cases": rows}
    (folder / f"{arm}_seed-0.json").write_text(json.dumps(record))


def test_the_difference_is_of_common_cases_over_all_sites_and_at_each(tmp_path, capsys):
    write(tmp_path / "one/none", "a", {"n1": 0.8, "n2": 0.6, "s1": 0.5, "s2": 0.9})
    write(tmp_path / "two/none", "b", {"n1": 0.7, "n2": 0.5, "s1": 0.3})
    line = [str(tmp_path / "one"), "a", "b", "--other", str(tmp_path / "two")]
    assert compare.main(line) == 0
    both, north, south = capsys.readouterr().out.splitlines()
    assert both.startswith("a less b: +15.0")  # sites alike: (10 + 20) / 2
    assert "n 3" in both
    assert north.strip().startswith("n: +10.0")
    assert south.strip().startswith("s: +20.0")


def test_the_reference_may_be_of_another_condition(tmp_path, capsys):
    write(tmp_path / "few", "a", {"n1": 0.8, "n2": 0.6})
    write(tmp_path / "all", "a", {"n1": 0.9, "n2": 0.7})
    assert compare.main([str(tmp_path), "a", "a", "--cell", "few", "--other-cell", "all"]) == 0
    assert capsys.readouterr().out.startswith("a less a: \u221210.0")


def test_an_arm_without_a_record_is_named(tmp_path):
    write(tmp_path / "none", "a", {"n1": 0.8})
    with pytest.raises(ConfigError, match="no record of b"):
        compare.main([str(tmp_path), "a", "b"])
