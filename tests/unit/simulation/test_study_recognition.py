"""The table of whom the gate knows, from what records say."""

from __future__ import annotations

from typing import Any

import pytest

from uharmony_simulation.study_recognition import recognition, recognition_text

TAKING = " at the sites that took part"


def record(**unseen: Any) -> dict[str, Any]:
    said = {"refused": 0.5, f"refused{TAKING}": 0.0, "familiar": 0.25, f"familiar{TAKING}": 1.0}
    cases = [
        {"at_home": False, "dice": 0.8},
        {"at_home": False, "dice": None},
        {"at_home": False, "dice": 0.6},
        {"at_home": True, "dice": 0.1},
    ]
    known = {"a": {"x": 0.7, "y": 0.5}, "b": {"z": 0.6}}
    return {"cases": cases, "unseen": {"site": "c", "U4": said, "known": known, **unseen}}


def test_a_row_has_the_shares_and_the_means():
    row = recognition("mixed 2", "uharmony", 0, record())
    assert row is not None
    assert (row.refused, row.refused_known, row.familiar, row.familiar_known) == (0.5, 0, 0.25, 1)
    assert row.auto == pytest.approx(0.6)
    assert row.own == pytest.approx(0.7)
    last = recognition_text([row]).splitlines()[-1]
    assert last == "| mixed 2 | uharmony | c | 50 % | 25 % | 0 % | 100 % | 0.600 | 0.700 |"


def test_what_an_older_record_lacks_has_a_dash():
    older = {"refused": 0.1, f"refused{TAKING}": 0.0}
    row = recognition("mixed 2", "uharmony", 0, record(U4=older, known={}))
    assert row is not None
    assert "| 10 % | — | 0 % | — | — | 0.700 |" in recognition_text([row])


def test_without_a_gate_there_is_nothing_to_say():
    assert recognition("mixed 2", "fedavg", 0, record(U4=None)) is None
    assert recognition("mixed 2", "fedavg", 0, {"cases": [], "unseen": None}) is None
    assert recognition_text([]) == ""
