"""The case table: the one form that every reader maps a folder to.

    case, patient, site, domain, modality, image, label, split

`case` and `image` are needed. Several channels of a case are joined by `|`, in `image` and in
`modality`; where a case has no image of a modality, its place stays empty. Paths are relative to
the table. A missing patient makes each case a patient.
"""

from __future__ import annotations

import csv
import io
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from uharmony_client.splits import draw_splits
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.evaluation_settings import Evaluation, Split
from uharmony_model.frozen import Frozen, parse
from uharmony_model.task import Name

log = logging.getLogger(__name__)

COLUMNS = ("case", "patient", "site", "domain", "modality", "image", "label", "split")
MAX_TABLE_BYTES = 64 << 20


def _printable(text: str) -> str:
    if not text.isprintable() or text != text.strip() or set(text) & set("/\\|"):
        raise ValueError("expected printable text without / \\ | or outer spaces")
    return text


Label = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]


class Case(Frozen):
    """One examination: its channels, its label if there is one, and where it belongs.

    `modality` names the channels that are there, one after another over all files.
    """

    case: Label
    patient: Label
    site: Name
    domain: Name
    modality: tuple[Label, ...] = ()
    image: Annotated[tuple[Path, ...], Field(min_length=1)]
    label: Path | None = None
    split: Split | None = None


class CaseTable(Frozen):
    """All cases that a site (or, in a simulation, all sites together) has."""

    cases: tuple[Case, ...]

    @model_validator(mode="after")
    def _consistent(self) -> CaseTable:
        seen: set[str] = set()
        splits: dict[tuple[str, str], Split] = {}
        for case in self.cases:
            if case.case in seen:
                raise ValueError(f"case {case.case} occurs twice; give every case its own name")
            seen.add(case.case)
            if case.split is not None:
                first = splits.setdefault((case.site, case.patient), case.split)
                if first != case.split:
                    raise ValueError(
                        f"patient {case.patient} is in {first} and in {case.split}; "
                        "split by patient"
                    )
        return self

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites' names, sorted."""
        return tuple(sorted({case.site for case in self.cases}))

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains' names, sorted."""
        return tuple(sorted({case.domain for case in self.cases}))

    def of(self, *, split: Split | None = None, site: str | None = None) -> CaseTable:
        """The part of the table in a split, of a site, or both."""
        return CaseTable(
            cases=tuple(
                case
                for case in self.cases
                if (split is None or case.split == split) and (site is None or case.site == site)
            )
        )

    def with_splits(self, evaluation: Evaluation, split_seed: int) -> CaseTable:
        """Every labelled case in a split, by patient; splits that are written down stay.

        A site's draw depends on its own patients only. Cases without a label get no split.

        Raises:
            DataError: a patient is at two sites, or only some of a site's cases have a split.
        """
        _one_site_each(self.cases)
        chosen: dict[tuple[str, str], Split] = {}
        for site in self.sites:
            labelled = [c for c in self.cases if c.site == site and c.label is not None]
            declared = [c for c in labelled if c.split is not None]
            if declared and len(declared) < len(labelled):
                raise DataError(
                    f"site {site}: {len(declared)} of {len(labelled)} labelled cases have a split; "
                    "fill the column for all of them or for none"
                )
            if not declared:
                patients = {case.patient for case in labelled}
                for patient, split in draw_splits(patients, evaluation, split_seed, site).items():
                    chosen[site, patient] = split
        return CaseTable(
            cases=tuple(
                case
                if case.label is None or case.split is not None
                else case.model_copy(update={"split": chosen[case.site, case.patient]})
                for case in self.cases
            )
        )

    def with_unlabelled(self) -> CaseTable:
        """Cases without a label in the training split, where their patient is in no other one."""
        others = {
            (case.site, case.patient) for case in self.cases if case.split not in (None, "train")
        }
        return CaseTable(
            cases=tuple(
                case.model_copy(update={"split": "train"})
                if case.label is None
                and case.split is None
                and (case.site, case.patient) not in others
                else case
                for case in self.cases
            )
        )

    @classmethod
    def read_csv(cls, path: Path, *, site: str = "site") -> CaseTable:
        """Read a table; `site` is the default of its site column.

        Raises:
            DataError: one line that names the row and what is wrong with it.
        """
        return build_table(read_rows(path), path, site=site)

    def write_csv(self, path: Path) -> None:
        """Write the table; paths below its folder become relative to it."""
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for case in self.cases:
            images = "|".join(_relative(image, path.parent) for image in case.image)
            label = _relative(case.label, path.parent) if case.label else ""
            where = (case.case, case.patient, case.site, case.domain)
            writer.writerow((*where, "|".join(case.modality), images, label, case.split or ""))
        write_atomic(path, text.getvalue().encode())


def read_rows(path: Path, known: Iterable[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of a CSV file (comma or semicolon), unknown columns refused.

    Raises:
        DataError: missing, too large, not text, or a column nobody knows.
    """
    known = tuple(known)
    if not path.is_file():
        raise DataError(f"{path}: no such table; expected a CSV with the columns {_list(known)}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise DataError(f"{path}: larger than {MAX_TABLE_BYTES} bytes; this is no case table")
    try:
        text = path.read_text(encoding="utf-8-sig")
        heading = text.partition("\n")[0]
        # Spreadsheets of half of Europe write semicolons.
        delimiter = ";" if ";" in heading and "," not in heading else ","
        rows = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        columns = [name.strip() for name in rows.fieldnames or ()]
        rows.fieldnames = columns
        content = list(rows)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path}: not readable as CSV in UTF-8: {error}") from None
    unknown = [name for name in columns if name not in known]
    if unknown or len(set(columns)) != len(columns):
        raise DataError(
            f"{path}: unknown or repeated columns {_list(unknown or columns)}; "
            f"known: {_list(known)}"
        )
    for number, row in enumerate(content, start=2):
        if None in row or None in row.values():
            raise DataError(f"{path}: row {number} has not as many cells as the heading")
    return [{key: value.strip() for key, value in row.items()} for row in content]


def build_table(
    rows: Iterable[Mapping[str, str]], source: Path, *, site: str = "site"
) -> CaseTable:
    """A table from cells of text; empty or missing optional cells take their defaults.

    Raises:
        DataError: one line that names the case and what is wrong with it.
    """
    cases, without_patient = [], 0
    for number, row in enumerate(rows, start=1):
        name = row.get("case", "")
        where = f"{source}: case {number} {name!r}"
        if not name or not row.get("image"):
            raise DataError(f"{where}: expected a name and an image in every row")
        if not all(cell.isprintable() for cell in row.values()):
            raise DataError(f"{where}: expected printable text in every cell")
        modalities, images = _present(
            _several(row.get("modality", "")), _several(row["image"]), where
        )
        at = row.get("site") or site
        without_patient += not row.get("patient")
        content = {
            "case": name,
            "patient": row.get("patient") or name,
            "site": at,
            "domain": row.get("domain") or at,
            "modality": modalities,
            "image": [source.parent / image for image in images],
            "label": source.parent / row["label"] if row.get("label") else None,
            "split": row.get("split") or None,
        }
        try:
            cases.append(parse(Case, content, where))
        except ConfigError as error:
            raise DataError(str(error)) from None
    if not cases:
        raise DataError(f"{source}: no cases; expected one row for each")
    if without_patient:
        log.warning(
            "%s: %d of %d cases name no patient; each of them counts as a patient of its own, so "
            "two examinations of one person may end up in different splits",
            source,
            without_patient,
            len(cases),
        )
    try:
        return parse(CaseTable, {"cases": cases}, str(source))
    except ConfigError as error:
        raise DataError(str(error)) from None


def _present(modalities: list[str], images: list[str], where: str) -> tuple[list[str], list[str]]:
    """Without the places that have no image."""
    if all(images):
        return modalities, images
    if len(modalities) != len(images) or not any(images):
        raise DataError(
            f"{where}: the place of an image is empty; expected at least one image, and a modality "
            f"for each of the {len(images)} places"
        )
    there = [place for place, image in enumerate(images) if image]
    return [modalities[place] for place in there], [images[place] for place in there]


def _one_site_each(cases: Iterable[Case]) -> None:
    sites: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        sites[case.patient].add(case.site)
        if len(sites[case.patient]) > 1:
            raise DataError(
                f"patient {case.patient} is at the sites {_list(sorted(sites[case.patient]))}; "
                "give each patient to one site, or make the names differ if they are two people"
            )


def _several(cell: str) -> list[str]:
    return [part.strip() for part in cell.split("|")] if cell else []


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
