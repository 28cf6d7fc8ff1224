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
    """Cases and voxels of each of the study's classes."""
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


def find_thin_splits(table: CaseTable, study: Study, min_cases: int) -> list[Noted]:
    """Splits with too few cases; the table has its splits and no quarantined case."""
    count = Counter(case.split for case in table.cases)
    noted: list[Noted] = []
    if not count["train"]:
        noted.append(("U408", Detail(None, "no case is left to train on")))
    if not count["test"]:
        noted.append(("U409", Detail(None, "no test case")))
    if not count["validation"] and study.evaluation.validation > 0:
        noted.append(("U410", Detail(None, "no validation case")))
    cells = Counter((case.split, case.domain) for case in table.cases if case.split is not None)
    for (split, domain), n in sorted(cells.items()):
        if n < min_cases:
            text = f"{n} {split} cases of domain {domain}; the threshold is {min_cases}"
            noted.append(("U411", Detail(None, text)))
    return noted


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
