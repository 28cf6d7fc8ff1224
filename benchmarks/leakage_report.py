"""The figures of `benchmarks.leakage` as Markdown, and its picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from uharmony_model.unlabelled_settings import STATISTICS
from uharmony_simulation.plot_style import SMALL, draw, figure_of

_RANGE = (-2.5, 2.5)  # of z-scored intensities, black to white


@dataclass(frozen=True, eq=False)
class Row:
    """One target: its true patches (K, C, D, H, W), and guesses (C, D, H, W) by name."""

    title: str
    truth: Tensor
    guesses: Mapping[str, Tensor]


def markdown(found: Mapping[str, Any]) -> str:
    """Three tables for each statistic, and whose data they are of."""
    parts = []
    for name in (name for name in STATISTICS if name in found):
        result = found[name]
        parts.append(f"## {name.capitalize()} ({result['numbers']} numbers)\n")
        parts.append(_reconstruction(result["reconstruction"]))
        parts.append(_others(result))
    parts.append(found["attribution"])
    return "\n".join(parts) + "\n"


def picture(rows: Sequence[Row], attribution: str) -> bytes:
    """Central slices: the true patch, every guess, and baselines, in one range of grey (PNG)."""
    names = ["true patch", *rows[0].guesses]
    figure = figure_of(1.9 * len(rows) + 0.8)
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for number, (line, row) in enumerate(zip(axes, rows, strict=True)):
        images = [row.truth[0], *row.guesses.values()]
        for axis, name, image in zip(line, names, images, strict=True):
            middle = image[0, :, :, image.shape[-1] // 2].T.numpy()
            axis.imshow(middle, cmap="gray", vmin=_RANGE[0], vmax=_RANGE[1], origin="lower")
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(textwrap.fill(name, 11), fontsize=SMALL)
        line[0].set_ylabel(textwrap.fill(row.title, 14), fontsize=SMALL)
    figure.supxlabel(textwrap.fill(attribution, 120), fontsize=7)
    return draw(figure, "png")


def _reconstruction(by_count: Mapping[int, Any]) -> str:
    counts = list(by_count)
    lines = [_head("correlation, PSNR, misfit", counts)]
    for name in by_count[counts[0]]["scores"]:
        cells = [
            _interval(by_count[n]["scores"][name]["correlation"])
            + f", {by_count[n]['scores'][name]['psnr']['value']:.1f} dB"
            + f", {by_count[n]['scores'][name]['misfit']:.2g}"
            for n in counts
        ]
        lines.append(_line(name, cells))
    for kind, digits in (("correlation", 3), ("psnr", 2)):
        gains = [by_count[n]["gain"][kind] for n in counts]
        cells = [f"{_interval(gain, digits, '+')} {gain['attack']}" for gain in gains]
        lines.append(_line(f"best attack over best baseline, {kind}", cells))
    lines.append(_line("targets", [str(by_count[n]["targets"]) for n in counts]))
    return "\n".join(lines) + "\n"


def _others(result: Mapping[str, Any]) -> str:
    membership, differencing = result["membership"], result["differencing"]
    counts = list(membership)
    lines = [_head("membership, AUC", counts)]
    for kind in membership[counts[0]]:
        lines.append(_line(kind, [_interval(membership[n][kind], 2) for n in counts]))
    lines += ["", _head("differencing, n + 1 less n; error in deviations", counts)]
    for kind in ("median", "largest"):
        lines.append(_line(kind, [f"{differencing[n][kind]:.1e}" for n in counts]))
    return "\n".join(lines) + "\n"


def _head(title: str, counts: Sequence[int]) -> str:
    return _line(title, [f"n = {n}" for n in counts]) + "\n" + _line("---", ["---"] * len(counts))


def _line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _interval(found: Mapping[str, Any], digits: int = 2, sign: str = "") -> str:
    low, high = (f"{found[key]:{sign}.{digits}f}" for key in ("low", "high"))
    return f"{found['value']:{sign}.{digits}f} ({low} to {high})"
