"""Did the federation serve this site? Its model against the site's own, case by case.

Both models are measured on the same test cases, so each case gives a paired difference. What is
said of them is one of four words, always with the number of cases behind it. After a finale the
site's model is what it chose, which may be its own: then the model of the federation as it was
after the last round is compared too, by the rows that were kept of it.

A site that trains on no label has no model of its own: there the federation's is measured alone.
Without any case that has a label and may be tested on, nothing can be measured.
"""

from __future__ import annotations

import csv
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from uharmony_client.alone import alone_model, alone_site
from uharmony_client.evaluate import CaseRow, evaluate_split, save_rows
from uharmony_client.site import Site
from uharmony_client.site_models import model_note
from uharmony_model.bundle import Model, load_bundle
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.metrics import Word, bootstrap_interval, paired_word
from uharmony_model.randomness import numpy_generator
from uharmony_model.training_settings import Candidate

log = logging.getLogger(__name__)
_TEXTS = ("case", "patient", "site", "domain", "split", "class_name")
_NUMBERS = ("dice", "surface_dice", "hd95_mm", "lesion_recall", "fp_per_case")


@dataclass(frozen=True)
class Interval:
    """A mean over `n` cases and its 95 % bootstrap interval over their patients.

    None where no case has a value.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    patients: int


@dataclass(frozen=True)
class Comparison:
    """Dice of both models for one class, and of the paired differences (federated - own).

    `federated` is the model that the site has from the study, whatever it chose at its finale.
    Without a model of the site's own `alone` and `difference` have no value.
    """

    name: str
    federated: Interval
    alone: Interval
    difference: Interval

    @property
    def n(self) -> int:
        """Cases that were compared, or measured where there is no model to compare with."""
        return self.difference.n or self.federated.n

    @property
    def patients(self) -> int:
        """Their patients."""
        return self.difference.patients or self.federated.patients

    @property
    def word(self) -> Word:
        """What the differences say."""
        found = self.difference
        return paired_word(found.low, found.high, found.patients)


@dataclass(frozen=True)
class PairedCase:
    """One test case: the mean Dice over its classes under both models, or the one there is."""

    case: str
    federated: float
    alone: float | None

    @property
    def difference(self) -> float | None:
        """What the federated model gains on this case."""
        return None if self.alone is None else self.federated - self.alone


@dataclass(frozen=True)
class SiteResults:
    """The comparison at one site. `federated` and `alone` are the rows of every case and class.

    `overall` is the mean over classes; `cases` go from the worst under the federated model up.
    After a finale `kept` is what the site chose, and `before` the federation's model after the
    last round against the same local-only model, where its rows are still there. `own` says
    whether there is a local-only model; at a site that trains on no label there is none.
    """

    round: int
    federated: tuple[CaseRow, ...]
    alone: tuple[CaseRow, ...]
    classes: tuple[Comparison, ...]
    overall: Comparison
    cases: tuple[PairedCase, ...]
    federated_model: Path
    alone_model: Path
    label: str = "federated"
    kept: Candidate | None = None
    before: Comparison | None = None
    own: bool = True


def evaluate_site(site: Site, model_folder: Path) -> SiteResults:
    """Measure both models on the test split and keep the rows of every case as CSV.

    At a site that trains on no label only the model from the study is measured.

    Raises:
        ConfigError: a model is missing, is of another study, or knows other domains; or the site
            has no test case with a label.
        StoreError: a model is damaged.
    """
    own, note = alone_site(site), model_note(model_folder)
    round_ = note.round
    federated = load_for_site(site, model_folder)
    require_measurable(site, model_folder)
    models = [(site, federated, round_)]
    if own.training_data().volumes:
        if not (alone_model(site) / "study.json").is_file():
            raise ConfigError(f"{alone_model(site)}: no local-only model yet; train it first")
        alone = load_for_site(own, alone_model(site))
        models.append((own, alone, model_note(alone_model(site)).round))
    rows: list[tuple[CaseRow, ...]] = []
    for where, model, number in models:
        network = model.predictor.to(where.device)
        found = evaluate_split(network, where, "test", round_=number, slow=True)
        network.cpu()  # one model on the device at a time
        save_rows(found, where, "test", number)
        rows.append(tuple(found))
    theirs = rows[1] if len(rows) > 1 else None
    results = compare(site, rows[0], theirs, round_=round_, federated_model=model_folder)
    if round_ <= site.study.training.rounds:
        return results
    before = None
    if theirs is not None and note.kept != "federated":
        before = _before(site, theirs, model_folder)
    return replace(results, label=label_of(note.kept), kept=note.kept, before=before)


def require_measurable(site: Site, model_folder: Path) -> None:
    """A prediction is measured against a label, so there has to be one that may be tested on.

    Raises:
        ConfigError: no test case has a label.
    """
    if any(case.label is not None for case in site.split("test")):
        return
    if any(case.label is not None for case in site.table.cases):
        raise ConfigError(
            f"site {site.name}: no test case to compare on; add labelled cases or, in the case "
            "table, cases of the split test"
        )
    raise ConfigError(
        f"site {site.name}: no case has a label, so nothing can be measured here; the model is in "
        f"{model_folder} and segments as it is (uharmony-predict); to measure it, add labelled "
        "patients that were not trained on, with test in the column split"
    )


def label_of(kept: Candidate | None) -> str:
    """How the model is called that a site has after its finale."""
    if kept is None:
        return "federated, then at home"
    if kept == "federated":
        return "federated"
    if kept == "local":
        return "kept: local-only"
    return f"federated, then at home: {kept}"


def _before(site: Site, alone: Sequence[CaseRow], folder: Path) -> Comparison | None:
    """The federation's model as it was after the last round; None where no rows fit."""
    last = site.study.training.rounds
    path = site.evaluations / f"test-round-{last:06d}.csv"
    try:
        rows = _kept_rows(path)
        return compare(site, rows, alone, round_=last, federated_model=folder).overall
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, csv.Error, StoreError) as error:
        log.warning("%s: not compared: %s", path, error)
        return None


def _kept_rows(path: Path) -> list[CaseRow]:
    """The rows as `save_rows` wrote them."""
    rows = []
    with path.open(newline="") as lines:
        for row in csv.DictReader(lines):
            values: dict[str, Any] = {name: row[name] for name in _TEXTS}
            values |= {name: float(row[name]) if row[name] else None for name in _NUMBERS}
            rows.append(CaseRow(**values, round=int(row["round"])))
    return rows


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
    alone: Sequence[CaseRow] | None,
    *,
    round_: int,
    federated_model: Path,
) -> SiteResults:
    """Pair the rows of two models by case and class; None where the site has no model of its own.

    Raises:
        StoreError: the rows are not of the same cases and classes.
    """
    own = alone is not None
    ours = _dice(federated)
    theirs = dict.fromkeys(ours) if alone is None else _dice(alone)
    if ours.keys() != theirs.keys():
        raise StoreError(
            f"site {site.name}: the two models were measured on different cases; measure again"
        )
    patients = {row.case: row.patient for row in federated}
    names = list(patients)
    classes = []
    for name in dict.fromkeys(row.class_name for row in federated):
        pairs = [(patients[case], ours[case, name], theirs[case, name]) for case in names]
        classes.append(_comparison(site, name, pairs, round_, own=own))
    cases = []
    for case in names:
        keys = [k for k in ours if k[0] == case and ours[k] is not None]
        keys = [k for k in keys if theirs[k] is not None] if own else keys
        if keys:
            values = [v for k in keys if (v := theirs[k]) is not None]
            cases.append(
                PairedCase(
                    case=case,
                    federated=statistics.fmean([v for k in keys if (v := ours[k]) is not None]),
                    alone=statistics.fmean(values) if values else None,
                )
            )
    overall = [(patients[pair.case], pair.federated, pair.alone) for pair in cases]
    return SiteResults(
        round=round_,
        federated=tuple(federated),
        alone=tuple(alone or ()),
        classes=tuple(classes),
        overall=_comparison(site, "mean over classes", overall, round_, own=own),
        cases=tuple(sorted(cases, key=lambda pair: (pair.federated, pair.case))),
        federated_model=federated_model,
        alone_model=alone_model(site),
        own=own,
    )


def _comparison(
    site: Site,
    name: str,
    pairs: Sequence[tuple[str, float | None, float | None]],
    round_: int,
    *,
    own: bool,
) -> Comparison:
    defined = [(p, a, b) for p, a, b in pairs if a is not None and (b is not None or not own)]
    both = [(a, b) for _, a, b in defined if b is not None]
    patients = [patient for patient, _, _ in defined]

    def interval(values: Sequence[float]) -> Interval:
        if not values:
            return Interval(None, None, None, 0, 0)
        # One draw for all: the same patients are drawn for both models and every class.
        where = (site.name, round_, "bootstrap", "comparison")
        generator = numpy_generator(site.study.seed, *where)
        resamples = site.study.evaluation.bootstrap
        found = bootstrap_interval(values, resamples, generator, patients=patients)
        return Interval(*found, n=len(values), patients=len(set(patients)))

    return Comparison(
        name=name,
        federated=interval([a for _, a, _ in defined]),
        alone=interval([b for _, b in both]),
        difference=interval([a - b for a, b in both]),
    )


def _dice(rows: Sequence[CaseRow]) -> dict[tuple[str, str], float | None]:
    return {(row.case, row.class_name): row.dice for row in rows}
