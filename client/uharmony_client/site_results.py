"""Did the federation serve this site? Its model against the site's own, case by case.

Both models are measured on the same test cases, so each case gives a paired difference. What is
said of them is one of four words, always with the number of cases behind it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from uharmony_client.alone import alone_model, alone_site
from uharmony_client.evaluate import CaseRow, evaluate_split, save_rows
from uharmony_client.site import Site
from uharmony_client.site_models import kept_round
from uharmony_model.bundle import Model, load_bundle
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.metrics import bootstrap_interval
from uharmony_model.randomness import numpy_generator

Word = Literal["above", "below", "not below", "undecided"]
MARGIN = 0.01  # one Dice point: what may be lost and still be called not below


@dataclass(frozen=True)
class Interval:
    """A mean over `n` cases and its 95 % bootstrap interval; None where no case has a value."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Dice of both models for one class, and of the paired differences (federated - own)."""

    name: str
    federated: Interval
    alone: Interval
    difference: Interval

    @property
    def word(self) -> Word:
        """What the differences say."""
        return verdict(self.difference)


@dataclass(frozen=True)
class PairedCase:
    """One test case: the mean Dice over its classes under both models."""

    case: str
    federated: float
    alone: float

    @property
    def difference(self) -> float:
        """What the federated model gains on this case."""
        return self.federated - self.alone


@dataclass(frozen=True)
class SiteResults:
    """The comparison at one site. `federated` and `alone` are the rows of every case and class.

    `overall` is the mean over classes; `cases` go from the worst under the federated model up.
    """

    round: int
    federated: tuple[CaseRow, ...]
    alone: tuple[CaseRow, ...]
    classes: tuple[Comparison, ...]
    overall: Comparison
    cases: tuple[PairedCase, ...]
    federated_model: Path
    alone_model: Path


def evaluate_site(site: Site, model_folder: Path) -> SiteResults:
    """Measure both models on the test split and keep the rows of every case as CSV.

    Raises:
        ConfigError: a model is missing, is of another study, or knows other domains; or the site
            has no test case.
        StoreError: a model is damaged.
    """
    own, round_ = alone_site(site), kept_round(model_folder)
    federated = load_for_site(site, model_folder)
    if not (alone_model(site) / "study.json").is_file():
        raise ConfigError(f"{alone_model(site)}: no local-only model yet; train it first")
    alone = load_for_site(own, alone_model(site))
    if not site.split("test"):
        raise ConfigError(
            f"site {site.name}: no test case to compare on; add labelled cases or, in the case "
            "table, cases of the split test"
        )
    rows: list[tuple[CaseRow, ...]] = []
    for where, model, number in (
        (site, federated, round_),
        (own, alone, kept_round(alone_model(site))),
    ):
        network = model.network.to(where.device)
        found = evaluate_split(network, where, "test", round_=number, slow=True)
        network.cpu()  # one model on the device at a time
        save_rows(found, where, "test", number)
        rows.append(tuple(found))
    return compare(site, rows[0], rows[1], round_=round_, federated_model=model_folder)


def load_for_site(site: Site, folder: Path) -> Model:
    """A model that must fit the site's study and its domains in their order.

    Raises:
        ConfigError: it does not, or there is none.
        StoreError: a file is damaged.
    """
    model = load_bundle(folder, site.name)
    if model.study.digest != site.study.digest:
        raise ConfigError(
            f"{folder}: a model of study {model.study.digest[:12]}, expected "
            f"{site.study.digest[:12]}; give the model of this study"
        )
    if model.domains != site.domains:
        raise ConfigError(
            f"{folder}: made with the domains {', '.join(model.domains)}, the case table has "
            f"{', '.join(site.domains)}; use the case table of the training"
        )
    return model


def compare(
    site: Site,
    federated: Sequence[CaseRow],
    alone: Sequence[CaseRow],
    *,
    round_: int,
    federated_model: Path,
) -> SiteResults:
    """Pair the rows of two models by case and class.

    Raises:
        StoreError: the rows are not of the same cases and classes.
    """
    ours, theirs = _dice(federated), _dice(alone)
    if ours.keys() != theirs.keys():
        raise StoreError(
            f"site {site.name}: the two models were measured on different cases; measure again"
        )
    names = list(dict.fromkeys(row.case for row in federated))
    classes = []
    for name in dict.fromkeys(row.class_name for row in federated):
        pairs = [(ours[case, name], theirs[case, name]) for case in names]
        classes.append(_comparison(site, name, pairs, round_))
    cases = []
    for case in names:
        keys = [k for k in ours if k[0] == case and ours[k] is not None and theirs[k] is not None]
        if keys:
            cases.append(
                PairedCase(
                    case=case,
                    federated=statistics.fmean([v for k in keys if (v := ours[k]) is not None]),
                    alone=statistics.fmean([v for k in keys if (v := theirs[k]) is not None]),
                )
            )
    overall = [(pair.federated, pair.alone) for pair in cases]
    return SiteResults(
        round=round_,
        federated=tuple(federated),
        alone=tuple(alone),
        classes=tuple(classes),
        overall=_comparison(site, "mean over classes", overall, round_),
        cases=tuple(sorted(cases, key=lambda pair: (pair.federated, pair.case))),
        federated_model=federated_model,
        alone_model=alone_model(site),
    )


def verdict(difference: Interval) -> Word:
    """One word for paired differences; one case alone decides nothing.

    `above` and `below`: the interval lies on one side of 0. `not below`: it lies above minus one
    Dice point. Else `undecided`.
    """
    low, high = difference.low, difference.high
    if low is None or high is None or difference.n < 2:
        return "undecided"
    if low > 0:
        return "above"
    if high < 0:
        return "below"
    return "not below" if low > -MARGIN else "undecided"


def _comparison(
    site: Site,
    name: str,
    pairs: Sequence[tuple[float | None, float | None]],
    round_: int,
) -> Comparison:
    both = [(a, b) for a, b in pairs if a is not None and b is not None]

    def interval(values: Sequence[float]) -> Interval:
        # One draw for all: the same cases are drawn for both models and every class.
        where = (site.name, round_, "bootstrap", "comparison")
        generator = numpy_generator(site.study.seed, *where)
        found = bootstrap_interval(values, site.study.evaluation.bootstrap, generator)
        return Interval(*found, n=len(values))

    return Comparison(
        name=name,
        federated=interval([a for a, _ in both]),
        alone=interval([b for _, b in both]),
        difference=interval([a - b for a, b in both]),
    )


def _dice(rows: Sequence[CaseRow]) -> dict[tuple[str, str], float | None]:
    return {(row.case, row.class_name): row.dice for row in rows}
