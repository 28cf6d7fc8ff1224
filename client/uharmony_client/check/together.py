"""The cases together: duplicates, splits, classes, modalities and small numbers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from uharmony_client.case_table import CaseTable
from uharmony_client.check.cases import CaseLook
from uharmony_client.check.findings import Detail
from uharmony_client.check.pseudonyms import Pseudonyms
from uharmony_client.site_config import SiteConfig
from uharmony_model.study import Study

Noted = tuple[str, Detail]


@dataclass(frozen=True)
class ClassCount:
    """A class at this site: the cases that show it, and its voxels in all of them."""

    cases: int
    voxels: int


def find_duplicates(looks: Sequence[CaseLook], table: CaseTable, names: Pseudonyms) -> list[Noted]:
    """Images with equal voxels; the table has its splits, where a study is known."""
    split = {case.case: case.split for case in table.cases}
    same: dict[str, list[CaseLook]] = defaultdict(list)
    for look in looks:
        if look.digest is not None:
            same[look.digest].append(look)
    noted: list[Noted] = []
    for group in same.values():
        first = group[0].case
        for other in (look.case for look in group[1:]):
            code = "U402" if other.patient != first.patient else "U401"
            if None not in (split[other.case], split[first.case]) and (
                split[other.case] != split[first.case]
            ):
                code = "U403"
            noted.append((code, names.detail(other.case, f"as {names.of(first.case)}")))
    return noted


def find_missing_patients(table: CaseTable) -> list[Noted]:
    """A table without the column patient; it cannot be told from one that repeats the names."""
    if len(table.cases) > 1 and all(case.patient == case.case for case in table.cases):
        return [("U004", Detail(None, f"{len(table.cases)} cases"))]
    return []


def count_classes(looks: Sequence[CaseLook], study: Study) -> dict[str, ClassCount]:
    """Cases and voxels of each of the study's classes; nothing where no label was read."""
    if all(look.counts is None for look in looks):
        return {}
    classes = {}
    for name, values in study.task.classes.items():
        voxels = [sum((look.counts or {}).get(value, 0) for value in values) for look in looks]
        classes[name] = ClassCount(cases=sum(v > 0 for v in voxels), voxels=sum(voxels))
    return classes


def find_absent(
    looks: Sequence[CaseLook], config: SiteConfig, study: Study, classes: Mapping[str, ClassCount]
) -> list[Noted]:
    """Classes and modalities of the study that do not occur; patches larger than a volume."""
    noted: list[Noted] = []
    if any(look.counts is not None for look in looks):
        drawn = config.annotates(study.task)
        for name, here in zip(study.task.class_names, drawn, strict=True):
            if here and not classes[name].cases:
                noted.append(("U406", Detail(None, name)))
    rename = config.modality_map
    named = {rename.get(m, m) for look in looks for m in look.case.modality}
    if named:
        known = named | config.lacks(study.task)
        absent = [name for name in study.task.intensity if name not in known]
        noted += [("U407", Detail(None, name)) for name in absent]
    return noted


def find_small(looks: Sequence[CaseLook], study: Study, names: Pseudonyms) -> list[Noted]:
    """Volumes that are smaller than a training patch, on the study's grid."""
    patch = study.training.patch
    return [
        (
            "U207",
            names.detail(
                look.case.case, f"{_times(look.stored)} voxels, the patch has {_times(patch)}"
            ),
        )
        for look in looks
        if look.refused is None and any(n < p for n, p in zip(look.stored, patch, strict=True))
    ]


def find_unlabelled(
    looks: Sequence[CaseLook], table: CaseTable, study: Study | None, names: Pseudonyms
) -> list[Noted]:
    """Cases without a label, and what becomes of them; the table is that of `training_table`."""
    split = {case.case: case.split for case in table.cases}
    noted: list[Noted] = []
    for look in looks:
        name = look.case.case
        if look.case.label is not None or look.refused is not None:
            continue
        code, text = "U404", "no label"
        if study is not None and study.rule == "none":
            text = "left out: the study learns from labels alone"
        elif study is not None and split[name] == "train":
            code, text = "U412", "no label"
        elif study is not None:
            text = "left out: its patient has a case in another split, or it is in one itself"
        noted.append((code, names.detail(name, text)))
    return noted


def training_table(table: CaseTable, study: Study) -> CaseTable:
    """The table as training takes it; it has its splits."""
    return table.with_unlabelled() if study.takes_unlabelled else table


def trains_on_labels(table: CaseTable, config: SiteConfig) -> bool:
    """Whether a label of a training case is there and may be used."""
    return config.labels != "none" and any(
        case.split == "train" and case.label is not None for case in table.cases
    )


def taken_without_label(table: CaseTable, config: SiteConfig) -> int:
    """Training cases that have no label, or whose label may not be used whoever is drawn."""
    return sum(
        case.split == "train" and (case.label is None or config.labels == "none")
        for case in table.cases
    )


def find_thin_splits(table: CaseTable, study: Study, config: SiteConfig) -> list[Noted]:
    """Splits with too few cases, labels that are not there or kept out of training.

    The table is that of `training_table`, without quarantined cases.
    """
    labelled = Counter(case.split for case in table.cases if case.label is not None)
    noted = [*_thin_training(table, study, config), *_kept_out(table, study, config)]
    if not labelled:
        noted += [("U414", Detail(None, "no label"))] if study.rule != "none" else []
    elif not labelled["test"]:
        noted.append(("U409", Detail(None, "no test case with a label")))
    if labelled and not labelled["validation"] and study.evaluation.validation > 0:
        noted.append(("U410", Detail(None, "no validation case with a label")))
    cells = Counter((case.split, case.domain) for case in table.cases if case.split is not None)
    for (split, domain), n in sorted(cells.items()):
        if n < config.policy.min_cases:
            least = config.policy.min_cases
            text = f"{n} {split} cases of domain {domain}; the threshold is {least}"
            noted.append(("U411", Detail(None, text)))
    return noted


def _thin_training(table: CaseTable, study: Study, config: SiteConfig) -> list[Noted]:
    """A study that learns from labels alone, at a site that has none for it, and no case at all."""
    cases = table.of(split="train").cases
    if not cases:
        none = all(case.label is None for case in table.cases)
        why = "no case has a label" if none and study.rule == "none" else "no case is left"
        return [("U408", Detail(None, f"{why} to train on"))]
    if study.rule != "none" or trains_on_labels(table, config):
        return []
    why = "labels: none" if config.labels == "none" else "no training case has a label"
    # A method that says so itself has sites that only receive.
    code = "U415" if study.plan.unlabelled == "none" else "U408"
    return [(code, Detail(None, f"{why}, and the study learns from labels alone"))]


def _kept_out(table: CaseTable, study: Study, config: SiteConfig) -> list[Noted]:
    labelled = [case for case in table.of(split="train").cases if case.label is not None]
    if config.labels == "all" or not labelled:
        return []
    patients = len({case.patient for case in labelled})
    taken = 0 if config.labels == "none" else min(config.labels, patients)
    then = "left out" if study.rule == "none" else "taken without them"
    text = f"labels: {config.labels}; {taken} of {patients} training patients, the others {then}"
    return [("U413", Detail(None, text))] if taken < patients else []


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
