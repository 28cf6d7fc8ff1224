"""The doctor of a site: looks at every case, the machine and the study, and contacts nobody.

Cases are looked at one after another. What training would refuse is quarantined, unless so much
is refused that the fault must be the site's as a whole.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from uharmony_client.case_table import CaseTable
from uharmony_client.check.cases import CaseLook, look_at
from uharmony_client.check.findings import Detail, number_findings
from uharmony_client.check.leaving import Leaving, carried_bytes, generation_bytes, what_leaves
from uharmony_client.check.machine import Connection, Need, look_at_machine
from uharmony_client.check.pseudonyms import Pseudonyms, site_key
from uharmony_client.check.quarantine import (
    QUARANTINE_FILE,
    require_enough,
    without_quarantined,
    write_quarantine,
)
from uharmony_client.check.report import CaseRow, Report
from uharmony_client.check.texts import file_names, looks_personal
from uharmony_client.check.together import (
    ClassCount,
    Noted,
    count_classes,
    find_absent,
    find_duplicates,
    find_missing_patients,
    find_small,
    find_thin_splits,
    find_unlabelled,
    taken_without_label,
    training_table,
    trains_on_labels,
)
from uharmony_client.readers import read_cases
from uharmony_client.site_config import SiteConfig
from uharmony_model.errors import ConfigError, DataError, StoreError
from uharmony_model.study import Study

OnCase = Callable[[str, int, int], None]
_FOREGROUND_BYTES = 20_000 * 16  # of one label value in the volume store


def run_check(
    config: SiteConfig,
    study: Study | None,
    *,
    on_case: OnCase | None = None,
    connection: Connection | None = None,
    reveal: bool = False,
) -> Report:
    """Look at a site. `on_case` is told site, number and count before each case.

    Names of cases are in the report only with `reveal`. With a study, the quarantine is written
    anew; without one it stays as it is.
    """
    begin = time.monotonic()
    noted: list[Noted] = []
    fits = study
    if study is not None:
        try:
            config.annotates(study.task)
            config.lacks(study.task)
        except ConfigError as error:
            noted.append(("U003", Detail(None, str(error))))
            fits = None
    whole, table = _tables(config, noted, reveal=reveal)
    names = Pseudonyms(whole, site_key(config.store), reveal=reveal)
    looks = []
    for number, case in enumerate(table.cases):
        if on_case is not None:
            on_case(config.name, number, len(table.cases))
        look = look_at(case, None if fits is None else fits.task, config)
        looks.append(look)
        noted += [(code, names.detail(case.case, text)) for code, text in look.found]
        noted += [
            (code, names.detail(case.case, text)) for code, text in _names_of(look, config.cases)
        ]
    quarantined: frozenset[str] = frozenset()
    classes: dict[str, ClassCount] = {}
    leaving: Leaving | None = None
    unlabelled = 0
    if fits is not None:
        table = training_table(_with_splits(table, fits, noted, reveal=reveal), fits)
        quarantined = _quarantine(config.store, fits, table, looks, noted)
        classes = count_classes(looks, fits)
        noted += find_absent(looks, config, fits, classes)
        noted += find_small(looks, fits, names)
        left = without_quarantined(table, quarantined)
        if table.cases:
            noted += find_thin_splits(left, fits, config)
        if fits.rule != "none":
            unlabelled = taken_without_label(left, config)
        domains, labelled = table.domains or (config.name,), trains_on_labels(left, config)
        leaving, wrong = what_leaves(config, fits, domains, labelled=labelled)
        noted += wrong
    noted += find_unlabelled(looks, table, fits, names)
    noted += find_missing_patients(table) + find_duplicates(looks, table, names)
    machine = look_at_machine(config, _need(looks, fits, leaving), connection)
    split = {case.case: case.split for case in table.cases}
    return Report(
        site=config.name,
        study=None if study is None else (study.name, study.digest),
        findings=number_findings([*noted, *machine.noted]),
        cases=tuple(
            CaseRow(
                case=names.of(look.case.case),
                split=split[look.case.case],
                refused=look.refused,
                shape=look.shape,
                spacing_mm=look.spacing_mm,
                counts=look.counts,
                name=look.case.case if reveal else None,
            )
            for look in looks
        ),
        splits=Counter(case.split for case in table.cases if case.split is not None),
        unlabelled=unlabelled,
        classes=classes,
        quarantined=len(quarantined),
        machine=machine.facts,
        leaving=leaving,
        seconds=time.monotonic() - begin,
    )


def _tables(config: SiteConfig, noted: list[Noted], *, reveal: bool) -> tuple[CaseTable, CaseTable]:
    """The whole table, whose rows number the cases, and this site's part of it."""
    try:
        whole = read_cases(config.cases, site=config.name)
    except DataError as error:
        noted.append(("U001", _told(error, reveal=reveal)))
        empty = CaseTable(cases=())
        return empty, empty
    own = whole.of(site=config.name)
    if not own.cases:
        noted.append(("U002", Detail(None, f"site {config.name}, {len(whole.cases)} rows")))
    return whole, own


def _with_splits(table: CaseTable, study: Study, noted: list[Noted], *, reveal: bool) -> CaseTable:
    try:
        return table.with_splits(study.evaluation, study.split_seed)
    except DataError as error:
        noted.append(("U005", _told(error, reveal=reveal)))
        return table


def _told(error: DataError, *, reveal: bool) -> Detail:
    """An error that may name a case or a file."""
    return Detail(None, "" if reveal else "the text names cases", str(error) if reveal else None)


def _names_of(look: CaseLook, cases: Path) -> Iterator[tuple[str, str]]:
    case = look.case
    root = cases if cases.is_dir() else cases.parent
    yield from file_names((*case.image, *([] if case.label is None else [case.label])), root)
    if looks_personal(case.case) or looks_personal(case.patient):
        yield "U506", "the name of the case or the patient in the table"


def _quarantine(
    store: Path,
    study: Study,
    table: CaseTable,
    looks: Sequence[CaseLook],
    noted: list[Noted],
) -> frozenset[str]:
    """Write down what training has to pass over, if that is few enough."""
    refused = {
        look.case.case: (look.case, look.refused) for look in looks if look.refused is not None
    }
    try:
        try:
            require_enough(table, refused.keys())
        except DataError as error:
            noted.append(("U190", Detail(None, str(error))))
            (store / QUARANTINE_FILE).unlink(missing_ok=True)
            return frozenset()
        write_quarantine(store, study.digest, refused)
    except (StoreError, OSError):
        noted.append(("U191", Detail(None, "not written")))
        return frozenset()
    return frozenset(refused)


def _need(looks: Sequence[CaseLook], study: Study | None, leaving: Leaving | None) -> Need:
    """Estimates: a prepared volume is float32 channels and a label, at work three times that.

    What learning without labels carries is in memory three times too: as it was before the round,
    in use, and as it is written.
    """
    values = 0 if study is None else sum(len(group) for group in study.task.classes.values())
    labels = sum(look.case.label is not None for look in looks)
    volumes = sum(map(_prepared, looks)) + labels * values * _FOREGROUND_BYTES
    largest = max(map(_prepared, looks), default=0)
    if study is None or leaving is None:
        return Need(volumes=volumes, generations=0, memory=3 * largest)
    return Need(
        volumes=volumes,
        generations=generation_bytes(leaving, study),
        memory=3 * largest,
        carried=3 * carried_bytes(leaving, study),
    )


def _prepared(look: CaseLook) -> int:
    """Bytes of a prepared volume, without its list of foreground."""
    return look.voxels * (4 * look.channels + (look.case.label is not None))
