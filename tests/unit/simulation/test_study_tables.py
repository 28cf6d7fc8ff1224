"""The numbers of a study: families of tests, moments, costs, order, and how they are written."""

from __future__ import annotations

import pytest

from tests.support.study_scores import COST, SCORES, STRONG, SWAPS, WEAK, run
from uharmony_simulation.paired import Cost
from uharmony_simulation.study_order import shift_of
from uharmony_simulation.study_tables import study_tables
from uharmony_simulation.study_text import amount, signed, small_p


def known(p: float | None) -> float:
    assert p is not None
    return p


def test_holm_families_are_columns_and_blocks():
    tables = study_tables(SCORES, swaps=SWAPS)
    (block,) = tables.blocks
    by_arm = {row.arm: row for row in block.rows}
    family = sorted(known(c.p) for row in block.rows for c in row.gains.values())
    assert len(family) == 4
    north = by_arm["uharmony"].gains["north"]
    below = [(4 - i) * p for i, p in enumerate(family) if p <= known(north.p)]
    assert north.p_holm == pytest.approx(min(1.0, max(below)))
    pair = by_arm["uharmony"].against["local"], by_arm["fedavg"].against["local"]
    small, large = sorted(pair, key=lambda c: known(c.p))
    assert small.p_holm == pytest.approx(min(1.0, 2 * known(small.p)))
    assert large.p_holm == pytest.approx(min(1.0, max(2 * known(small.p), known(large.p))))
    # The column of fedavg has two arms of its own: training alone and uharmony.
    assert sorted(a for a, row in by_arm.items() if "fedavg" in row.against) == [
        "local",
        "uharmony",
    ]


def test_arms_at_home_are_compared_with_references_at_home():
    home = [*run("local", "north", [0.1] * 8, at_home=True)]
    home += run("uharmony", "north", [0.12] * 8, at_home=True)
    tables = study_tables([*SCORES, *home], [COST])
    last, after = tables.blocks
    assert (last.at_home, after.at_home) == (False, True)
    row = next(r for r in after.rows if r.arm == "uharmony")
    assert row.gains["north"].difference.mean == pytest.approx(0.02)
    assert row.cost is not None
    assert row.cost.kept == {"local": 1, "own": 1}


def test_costs_are_means_over_runs_and_kept_is_a_count():
    other = Cost("uharmony", STRONG, 1, 14.345, 2.5e6, 3.5e6, 14848, {"own": 2})
    elsewhere = Cost("uharmony", WEAK, 0, 99.0, 9e9, 9e9, 1, {})
    (block,) = study_tables(SCORES, [other, COST, elsewhere]).blocks
    cost = next(r for r in block.rows if r.arm == "uharmony").cost
    assert cost is not None
    assert cost.seconds_per_round == pytest.approx(13.345)
    assert (cost.bytes_up_per_round, cost.bytes_down_per_round) == (2e6, 3e6)
    assert cost.kept == {"local": 1, "own": 3}


def test_the_shift_is_read_from_the_name_of_a_condition():
    assert shift_of("invert 2.0, sites 4") == ("invert, sites 4", 2.0)
    assert shift_of("bias field 0.5") == ("bias field", 0.5)
    assert shift_of("gamma -1, sites 4, dropout 0.2") == ("gamma, sites 4, dropout 0.2", -1.0)
    for cell in ("sarcoma", "", "2.0", ", sites 4"):
        assert shift_of(cell) is None
    cells = [f"invert {s}" for s in ("10.0", "2.0", "1.5")]
    scores = [s for cell in cells for s in run("local", "north", [0.0] * 2, cell=cell)]
    assert study_tables(scores).cells == ("invert 1.5", "invert 2.0", "invert 10.0")


def test_amounts_and_small_p():
    found = [amount(v) for v in (0, 999, 1500, 123_456, 2_500_000, 3.2e9)]
    assert found == ["0 B", "999 B", "1.5 kB", "123 kB", "2.5 MB", "3.2 GB"]
    assert [small_p(p) for p in (0.0004, 0.001, 0.5, 1.0)] == ["< 0.001", "0.001", "0.500", "1.000"]


def test_signs_of_effects():
    found = [signed(v) for v in (0.004, -0.004, 0.5, -1.0, None)]
    assert found == ["0.00", "0.00", "+0.50", "\u22121.00", "\u2014"]
