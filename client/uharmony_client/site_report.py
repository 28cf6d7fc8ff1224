"""The site's own report: one HTML file that stays at the site, opened offline, readable on paper.

It says what the federation was worth here, case by case, and how much left the building. It holds
its own style, a chart (inline SVG) and pictures (data URIs), loads nothing and runs no script.
Every text is escaped. Equal inputs give equal bytes: no clock is read here.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from uharmony_client.alone import alone_site
from uharmony_client.case_table import Case
from uharmony_client.evaluate import CaseRow, predict_masks
from uharmony_client.finale_plan import stays_view
from uharmony_client.results_view import finale_lines, own_lines
from uharmony_client.site import Site
from uharmony_client.site_results import SiteResults, load_for_site
from uharmony_model.atomic import write_atomic
from uharmony_model.metrics import FEWEST_PATIENTS
from uharmony_model.targets import to_targets
from uharmony_service.page import number, pages_of

WIDTH, HEIGHT = 760.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 12.0, 12.0, 34.0
_ROWS = re.compile(r"^validation-round-(\d{6,})\.csv$")
_MAX_LINE = 16 << 20
DETAILS = (
    ("surface_dice", "surface Dice", 3),
    ("hd95_mm", "HD95, mm", 1),
    ("lesion_recall", "lesion recall", 2),
    ("fp_per_case", "false positives a case", 2),
)


@dataclass
class Sent:
    """What left under one study, by the ledger's own count."""

    messages: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0


@dataclass(frozen=True)
class Picture:
    """One case under one model."""

    model: str
    which: str
    case: str
    dice: float | None
    png: bytes


@dataclass(frozen=True)
class Line:
    """A model's validation Dice against the round, in SVG units."""

    model: str
    points: str
    marks: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Chart:
    """The lines on common axes; ticks are positions with their labels."""

    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def write_site_report(path: Path, site: Site, results: SiteResults) -> None:
    """Write the page whole or not at all, readable by the site's own user alone.

    Raises:
        ConfigError: a model is no longer there.
        StoreError: a model is damaged, or the file cannot be written.
    """
    data = site.training_data()
    environment = pages_of("uharmony_client")
    environment.filters["size"] = human_bytes
    html = environment.get_template("site_report.html.jinja").render(
        site=site.name,
        stays=stays_view(site.study),
        study=site.study,
        digest=site.study.digest,
        results=results,
        train=data.cases if site.study.rule != "none" else len(data.volumes),
        unlabelled=len(data.unlabelled) if site.study.rule != "none" else 0,
        patients=len({row.patient for row in results.federated}),
        few=FEWEST_PATIENTS,
        lines=[*own_lines(results), *finale_lines(results)],
        details=_details(results),
        domains={row.case: row.domain for row in results.federated},
        sent=read_sent(site.config.store / "ledger" / "ledger.jsonl", site.study.digest),
        chart=_chart(site, own=results.own),
        pictures=_pictures(site, results),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
    )
    write_atomic(path, html.encode("utf-8", "replace"))


def read_sent(ledger: Path, study: str) -> Sent | None:
    """Add up the ledger's entries of a study, line by line; None where no ledger is kept.

    This counts; whether the ledger is genuine is for `ledger verify` to say.
    """
    if not ledger.is_file():
        return None
    sent = Sent()
    with ledger.open("rb") as lines:
        while line := lines.readline(_MAX_LINE):
            try:
                entry = json.loads(line)
                size, kind, of = entry["bytes"], entry["kind"], entry["study"]
            except (ValueError, KeyError, TypeError, RecursionError):
                sent.unreadable += 1
                continue
            if type(size) is not int or not isinstance(kind, str):
                sent.unreadable += 1
            elif of == study:
                sent.messages += 1
                sent.bytes += size
                sent.kinds[kind] += 1
    return sent


def human_bytes(count: int) -> str:
    """A size in the largest unit that keeps it above one."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def _details(results: SiteResults) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """The other metrics: for each class the means over cases under each model, as text."""
    found, models = [], [(results.label, results.federated)]
    if results.own:
        models.append(("local-only", results.alone))
    for comparison in results.classes:
        rows = []
        for model, every in models:
            own = [row for row in every if row.class_name == comparison.name]
            rows.append((model, [number(_mean(own, m), digits) for m, _, digits in DETAILS]))
        found.append((comparison.name, rows))
    return found


def _mean(rows: Sequence[CaseRow], metric: str) -> float | None:
    defined = [value for row in rows if (value := getattr(row, metric)) is not None]
    return statistics.fmean(defined) if defined else None


def _chart(site: Site, *, own: bool) -> Chart | None:
    """Validation Dice over the rounds, where rows of it were kept; of both models, if `own`.

    What was chosen by the validation split at a finale is no point of a curve.
    """
    rounds = site.study.training.rounds
    curves = {"federated": _validation(site.evaluations, rounds)}
    if own:
        curves["local-only"] = _validation(alone_site(site).evaluations, rounds)
    values = [value for curve in curves.values() for value in curve.values()]
    if not values:
        return None
    last = rounds
    bottom, top = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    top = max(top, bottom + 0.1)

    def x(round_: float) -> float:
        return round(LEFT + round_ / last * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - bottom) / (top - bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    lines = tuple(
        Line(
            model=name,
            points=" ".join(f"{x(r)},{y(v)}" for r, v in sorted(curve.items())),
            marks=tuple(
                (x(r), y(v), f"{name}, round {r}: {v:.3f}") for r, v in sorted(curve.items())
            ),
        )
        for name, curve in curves.items()
        if curve
    )
    step = max(1, math.ceil(last / 10))
    return Chart(
        lines=lines,
        x_ticks=tuple((x(r), str(r)) for r in range(0, last + 1, step)),
        y_ticks=tuple((y(t / 10), f"{t / 10:.1f}") for t in _tenths(bottom, top)),
    )


def _tenths(bottom: float, top: float) -> range:
    return range(round(bottom * 10), round(top * 10) + 1, 2 if top - bottom > 0.55 else 1)


def _validation(folder: Path, rounds: int) -> dict[int, float]:
    """Mean Dice by round of the federation: over the cases of a class, then over the classes."""
    curve: dict[int, float] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not (named := _ROWS.match(path.name)) or int(named[1]) > rounds:
            continue
        classes: dict[str, list[float]] = {}
        with path.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row["dice"]:
                    classes.setdefault(row["class_name"], []).append(float(row["dice"]))
        if classes:
            curve[int(named[1])] = statistics.fmean(statistics.fmean(v) for v in classes.values())
    return curve


def _pictures(site: Site, results: SiteResults) -> list[Picture]:
    """The median and the worst case under the federated model, each under every model."""
    pairs = results.cases
    if not pairs:
        return []
    chosen = {"median": pairs[len(pairs) // 2], "lowest": pairs[0]}
    pictures = []
    models = [(results.label, results.federated_model, site)]
    if results.own:
        models.append(("local-only", results.alone_model, alone_site(site)))
    for model, folder, where in models:
        network = load_for_site(where, folder).predictor.to(site.device)
        for which, pair in chosen.items():
            case = next(c for c in site.split("test") if c.case == pair.case)
            dice = pair.alone if model == "local-only" else pair.federated
            png = _draw(network, where, case)
            pictures.append(Picture(model, which, pair.case, dice, png))
    return sorted(pictures, key=lambda p: (p.which != "median", p.model == "local-only"))


def _draw(network: nn.Module, site: Site, case: Case) -> bytes:
    from uharmony_client.pictures import draw_case  # matplotlib takes a second to import

    volume = site.volumes[case.case]
    return draw_case(
        np.asarray(volume.image[volume.present.index(True)]),
        to_targets(torch.from_numpy(np.array(volume.label))[None], site.study.task)[0].numpy(),
        predict_masks(network, site, case).cpu().numpy(),
        volume.spacing_mm,
        site.study.task.class_names,
    )
