"""Two cases of a site's test split as pictures: the median and the worst by mean Dice.

They stay at the site; simulation alone puts the pictures of several sites into one report.
"""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import nn

from uharmony_client.evaluate import predict_masks
from uharmony_client.site import Site
from uharmony_model.atomic import write_atomic
from uharmony_model.targets import to_targets


def draw_site_cases(network: nn.Module, site: Site, round_: int, folder: Path) -> None:
    """Write `<site>-median` and `<site>-worst` as .png with a .json that says what is shown."""
    for name, ranked in _ranked_cases(site.evaluations / f"test-round-{round_:06d}.csv").items():
        _draw_two(network, site, name, ranked, folder)


def _draw_two(
    network: nn.Module, site: Site, name: str, ranked: list[tuple[str, float]], folder: Path
) -> None:
    from uharmony_client.pictures import draw_case  # matplotlib takes a second to import

    folder.mkdir(parents=True, exist_ok=True)
    for which, (case_name, dice) in (("median", ranked[len(ranked) // 2]), ("worst", ranked[0])):
        case = next(c for c in site.split("test") if c.case == case_name)
        volume = site.volumes[case_name]
        png = draw_case(
            np.asarray(volume.image[volume.present.index(True)]),
            to_targets(torch.from_numpy(np.array(volume.label))[None], site.study.task)[0].numpy(),
            predict_masks(network, site, case).cpu().numpy(),
            volume.spacing_mm,
            site.study.task.class_names,
        )
        facts = {"site": name, "which": which, "case": case_name, "dice": dice}
        stem = f"{name}-{which}"
        write_atomic(folder / f"{stem}.png", png, mode=0o644)
        write_atomic(folder / f"{stem}.json", json.dumps(facts).encode(), mode=0o644)


def _ranked_cases(rows: Path) -> dict[str, list[tuple[str, float]]]:
    """By site, cases with their mean Dice over classes, worst first; undefined ones left out."""
    if not rows.is_file():
        return {}
    dice: dict[str, dict[str, list[float]]] = {}
    with rows.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["dice"]:
                dice.setdefault(row["site"], {}).setdefault(row["case"], []).append(
                    float(row["dice"])
                )
    return {
        site: sorted(
            ((case, statistics.fmean(values)) for case, values in cases.items()),
            key=lambda item: (item[1], item[0]),
        )
        for site, cases in dice.items()
    }
