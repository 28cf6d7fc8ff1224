"""What a model is worth at this site, case by case; only means over enough cases leave.

Metrics are measured on the study's grid (RAS, the study's spacing), over the whole volume.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from uharmony_client.case_table import Case
from uharmony_client.site import Site
from uharmony_client.small_cells import shown_count, withheld
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import DataError
from uharmony_model.evaluation_settings import METRICS, Split
from uharmony_model.exchange.payload import Value
from uharmony_model.inference import predict_logits
from uharmony_model.metrics import CaseMetrics, bootstrap_interval, measure_case
from uharmony_model.patches import StoredVolume
from uharmony_model.presence import with_presence
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study
from uharmony_model.targets import to_masks, to_targets
from uharmony_model.task import Task

__all__ = ["METRICS", "CaseRow", "evaluate_split", "predict_masks", "save_rows", "summarise"]

MetricValues = dict[str, Value]


@dataclass(frozen=True)
class CaseRow:
    """One case and class. It stays at the site; simulation alone gathers it."""

    case: str
    patient: str
    site: str
    domain: str
    split: str
    round: int
    class_name: str
    dice: float | None
    surface_dice: float | None
    hd95_mm: float | None
    lesion_recall: float | None
    fp_per_case: float | None


def evaluate_split(
    network: nn.Module, site: Site, split: Split, *, round_: int, slow: bool
) -> list[CaseRow]:
    """Measure every case of a split that has a label; surfaces and lesions only when asked.

    A case without a label gives no row: there is nothing to hold a prediction against.
    """
    rows = []
    for case in site.split(split):
        if site.volumes[case.case].label is None:
            continue
        measured = measure_volume(
            network,
            site.volumes[case.case],
            site.study,
            domain=site.domains.index(case.domain),
            device=site.device,
            annotated=site.annotated,
            slow=slow,
        )
        for name, values in zip(site.study.task.class_names, measured, strict=True):
            rows.append(
                CaseRow(
                    case=case.case,
                    patient=case.patient,
                    site=case.site,
                    domain=case.domain,
                    split=split,
                    round=round_,
                    class_name=name,
                    **asdict(values),
                )
            )
    return rows


def measure_volume(
    network: nn.Module,
    volume: StoredVolume,
    study: Study,
    *,
    domain: int | Tensor | None,
    device: torch.device,
    annotated: Tensor,
    slow: bool = False,
) -> tuple[CaseMetrics, ...]:
    """The metrics of each class on one prepared volume; `domain` as in `predict_logits`.

    Raises:
        DataError: the volume has no label.
    """
    if volume.label is None:
        raise DataError("a case without a label cannot be measured; give one with a label")
    truth = to_targets(torch.from_numpy(np.array(volume.label))[None], study.task)[0]
    return measure_case(
        _masks(network, volume, study, domain, device),
        truth,
        volume.spacing_mm,
        study.evaluation.surface_tolerance_mm,
        slow=slow,
        annotated=annotated,
    )


def mean_dice(measured: Iterable[CaseMetrics]) -> float | None:
    """The mean over the classes in which Dice is defined."""
    known = [values.dice for values in measured if values.dice is not None]
    return statistics.fmean(known) if known else None


def dice_by_case(rows: Iterable[CaseRow]) -> dict[str, float]:
    """The same for every case that has a class in which Dice is defined."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        if row.dice is not None:
            cases.setdefault(row.case, []).append(row.dice)
    return {case: statistics.fmean(values) for case, values in cases.items()}


def network_input(volume: StoredVolume, task: Task) -> Tensor:
    """What the network gets of one prepared volume (C', D, H, W), presence masks included."""
    image = torch.from_numpy(np.array(volume.image))
    return with_presence(image[None], [list(volume.present)], task)[0]


def predict_masks(network: nn.Module, site: Site, case: Case) -> Tensor:
    """Predicted masks (J, D, H, W) of one case, under the case's own domain."""
    domain = site.domains.index(case.domain)
    return _masks(network, site.volumes[case.case], site.study, domain, site.device)


def _masks(
    network: nn.Module,
    volume: StoredVolume,
    study: Study,
    domain: int | Tensor | None,
    device: torch.device,
) -> Tensor:
    logits = predict_logits(
        network,
        network_input(volume, study.task),
        patch=study.training.patch,
        overlap=study.evaluation.overlap,
        domain=domain,
        device=device,
    )
    return to_masks(logits[None], study.task)[0]


def summarise(rows: Sequence[CaseRow], site: Site) -> MetricValues:
    """Means over cases as named scalars `split/site/domain/class/metric`: what may leave.

    `dice_low` and `dice_high` bound the mean Dice with 95 % (percentile bootstrap over cases).
    The metrics are those the study asks for. Where the site's policy withholds a domain's cases,
    its count leaves as `<11` and its means not at all; a mean over too few cases in which the
    metric is defined leaves as null.
    """
    asked, least = site.study.evaluation.metrics, site.config.policy.min_cases
    hidden = _withheld(rows, least)
    values: MetricValues = {}
    groups: dict[tuple[str, str, str, str], list[CaseRow]] = {}
    for row in rows:
        groups.setdefault((row.split, row.site, row.domain, row.class_name), []).append(row)
    for (split, name, domain, class_name), group in sorted(groups.items()):
        prefix = f"{split}/{name}/{domain}/{class_name}"
        if (split, name, domain) in hidden:
            values[f"{prefix}/n_cases"] = shown_count(len(group), least, hidden=True)
            continue
        values[f"{prefix}/n_cases"] = len(group)
        for metric in asked:
            values[f"{prefix}/{metric}"] = _mean([getattr(row, metric) for row in group], least)
        if "dice" not in asked:
            continue
        where = (site.name, group[0].round, "bootstrap", prefix)
        _, low, high = bootstrap_interval(
            [row.dice for row in group],
            site.study.evaluation.bootstrap,
            numpy_generator(site.study.seed, *where),
        )
        if values[f"{prefix}/dice"] is None:
            low = high = None
        values[f"{prefix}/dice_low"], values[f"{prefix}/dice_high"] = low, high
    return values


def save_rows(rows: Sequence[CaseRow], site: Site, split: str, round_: int) -> None:
    """Keep the per-case rows in the site's own folder, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text)
    names = list(CaseRow.__dataclass_fields__)
    writer.writerow(names)
    for row in rows:
        writer.writerow(["" if (v := getattr(row, n)) is None else v for n in names])
    site.evaluations.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = site.evaluations / f"{split}-round-{round_:06d}.csv"
    write_atomic(path, text.getvalue().encode())


def _withheld(rows: Sequence[CaseRow], least: int) -> set[tuple[str, str, str]]:
    """The cells (split, site, domain) whose numbers do not leave."""
    cells: dict[tuple[str, str], dict[str, set[str]]] = {}
    for row in rows:
        domains = cells.setdefault((row.split, row.site), {})
        domains.setdefault(row.domain, set()).add(row.case)
    return {
        (*where, domain)
        for where, domains in cells.items()
        for domain in withheld({name: len(cases) for name, cases in domains.items()}, least)
    }


def _mean(values: Sequence[float | None], least: int) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.fmean(defined) if defined and len(defined) >= least else None
