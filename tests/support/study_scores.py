"""Scores of an invented study with figures that are known by hand."""

from __future__ import annotations

from collections.abc import Sequence

from uharmony_simulation.paired import CaseScore, Cost
from uharmony_simulation.study_plots import SiteMatrix
from uharmony_simulation.study_tables import Swap

STRONG, WEAK = "invert 2.0, sites 2", "invert 1.0, sites 2"
# Dice above training alone, case by case: eight patients a site, all of one sign but for one arm.
GAINS = {
    ("fedavg", "north"): [0.03, 0.04, 0.05, 0.02, 0.06, 0.03, 0.05, 0.04],  # mean 0.04
    ("fedavg", "south"): [-0.03, -0.04, -0.05, -0.02, -0.06, -0.03, -0.05, -0.04],
    ("uharmony", "north"): [0.05, 0.06, 0.07, 0.04, 0.08, 0.05, 0.07, 0.06],  # mean 0.06
    ("uharmony", "south"): [0.001, -0.001, 0.002, -0.002, 0.003, -0.003, 0.001, -0.001],
}


def run(
    arm: str,
    site: str,
    gains: Sequence[float],
    *,
    cell: str = STRONG,
    seed: int = 0,
    at_home: bool = False,
) -> list[CaseScore]:
    """Cases of one arm at one site: 0.50, 0.51, ... and these gains."""
    return [
        CaseScore(
            arm=arm,
            at_home=at_home,
            cell=cell,
            seed=seed,
            site=site,
            case=f"{site}-{i}",
            patient=f"{site}-{i}",
            dice=0.5 + 0.01 * i + gain,
        )
        for i, gain in enumerate(gains)
    ]


SCORES = [
    *run("local", "north", [0.0] * 8),
    *run("local", "south", [0.0] * 8),
    *(s for (arm, site), gains in GAINS.items() for s in run(arm, site, gains)),
]
COST = Cost("uharmony", STRONG, 0, 12.345, 1.5e6, 2.5e6, 14848, {"own": 1, "local": 1})


def swap(site: str, gains: Sequence[float], part: str = "stem") -> list[Swap]:
    """A swapped part that changes 0.7 by these gains."""
    return [
        Swap("uharmony", STRONG, part, 0, site, f"{site}-{i}", f"{site}-{i}", 0.7, 0.7 + gain)
        for i, gain in enumerate(gains)
    ]


SWAPS = [
    *swap("north", [-0.2, -0.3, -0.25, -0.21, -0.31, -0.26]),
    *swap("south", [0.0] * 6, "phi"),
]
MATRIX = SiteMatrix("uharmony", STRONG, ("north", "south"), ((0.8, 0.4), (None, 0.7)))


def everything(scale: float = 1.0) -> list[CaseScore]:
    """Two strengths, two seeds of which the second gained `scale` as much, and one arm at home."""
    weak = [s for (a, t), g in GAINS.items() for s in run(a, t, g, cell=WEAK)]
    again = [s for (a, t), g in GAINS.items() for s in run(a, t, [scale * x for x in g], seed=1)]
    home = run("local", "north", [0.0] * 8, at_home=True)
    return [*SCORES, *weak, *again, *home]
