"""Make a study's sites on disk, each looking like a hospital: site.yaml and a case table.

Simulated volumes are written as NIfTI and read back by the code a hospital runs. Real volumes
without a scanner are referenced where they lie; nothing is copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from uharmony_client.case_table import Case, CaseTable
from uharmony_client.grids import plan_grid, same_grid, to_stored_grid
from uharmony_client.nifti import load_volume
from uharmony_client.readers import read_cases
from uharmony_model.atomic import (
    remove_directory,
    replace_directory,
    temporary_directory,
    write_atomic,
)
from uharmony_model.errors import ConfigError, DataError, StoreError
from uharmony_model.study import Study
from uharmony_simulation.anatomy import ATTRIBUTION, Anatomy
from uharmony_simulation.config import AnatomySource, FolderSource, ScannerSettings, Simulation
from uharmony_simulation.division import POOLED, divide
from uharmony_simulation.scanners import Scanner, apply_scanner, draw_scanner
from uharmony_simulation.site_options import site_options

_POLICY = """\
# All sites of a simulation lie on one machine: figures over few cases are shown to nobody else,
# a run may be started again from an earlier round, and whatever statistics and parts of the model
# a study asks for are given.
policy:
  min_cases: 1
  share: [backbone, norm_affine, norm_statistics, polynomial, style_autoencoder]
  statistics: [amplitude, prototypes, codes, discriminator]
  allow_rollback: true
"""

OnCase = Callable[[str, int, int], None]


def make_sites(
    study: Study,
    simulation: Simulation,
    data: Path | None,
    folder: Path,
    *,
    on_case: OnCase | None = None,
) -> list[str]:
    """Write `folder/<site>/` for every site, whole or not at all, and return their names.

    A folder made earlier by the same study and section is used again. `folder/pooled/` holds
    the reference that no hospital can run: all cases of all sites, each site a domain. It has
    the labels and modalities too that its sites are left without.

    Raises:
        ConfigError: the section needs --data, or asks for sites the data do not have.
        DataError: the data cannot be read.
        StoreError: the folder was made from another study.
    """
    facts = {
        "split_seed": study.split_seed,
        "modalities": list(study.task.intensity),
        "simulation": simulation.model_dump(mode="json"),
        "data": str(data.resolve()) if data is not None else None,
    }
    record = folder / "sites.json"
    if record.is_file():
        found = json.loads(record.read_bytes())
        if found["made_from"] != facts:
            raise StoreError(
                f"{folder}: made from another study or other data; give another --out folder"
            )
        return list(found["sites"])
    temporary = temporary_directory(folder)
    try:
        tables, scanners = _tables(study, simulation, data, temporary, folder, on_case)
        options = site_options(study.task, simulation.source, tables)
        everything: list[Case] = []
        for site, cases in tables.items():
            _write_site(temporary / site, site, cases, options.get(site))
            everything += [c.model_copy(update={"domain": _pooled_domain(c)}) for c in cases]
        _write_site(temporary / POOLED, POOLED, everything)
        made = {
            "made_from": facts,
            "sites": sorted(tables),
            "scanners": {k: v.model_dump(mode="json") for k, v in scanners.items()},
        }
        write_atomic(temporary / "sites.json", json.dumps(made, indent=1).encode(), mode=0o644)
    except BaseException:
        remove_directory(temporary)
        raise
    replace_directory(temporary, folder)
    return sorted(tables)


def attribution(simulation: Simulation) -> str:
    """Whose images these are; shown wherever figures made from them are."""
    source = simulation.source
    return ATTRIBUTION if isinstance(source, AnatomySource) else source.attribution


def _pooled_domain(case: Case) -> str:
    return case.site if case.domain in (case.site, "") else f"{case.site}.{case.domain}"


Made = tuple[dict[str, list[Case]], dict[str, Scanner]]


def _tables(
    study: Study,
    simulation: Simulation,
    data: Path | None,
    temporary: Path,
    final: Path,
    on_case: OnCase | None,
) -> Made:
    if isinstance(simulation.source, AnatomySource):
        return _anatomy_sites(study, simulation.source, temporary, final, on_case)
    return _folder_sites(study, simulation.source, data, temporary, final, on_case)


def _anatomy_sites(
    study: Study, source: AnatomySource, temporary: Path, final: Path, on_case: OnCase | None
) -> Made:
    modality = next(iter(study.task.intensity))
    anatomy = Anatomy(spacing_mm=source.spacing_mm)
    spacing = (source.spacing_mm,) * 3
    tables: dict[str, list[Case]] = {}
    scanners: dict[str, Scanner] = {}
    index = 0
    for site, settings in source.sites.items():
        scanners[site] = _scanner(study, site, settings.scanner)
        tables[site] = []
        for number in range(settings.cases):
            if on_case is not None:
                on_case(site, number, settings.cases)
            name = f"{site}-{number:03d}"
            made = anatomy.case(study.split_seed, index)
            index += 1
            image = apply_scanner(scanners[site], made.image, spacing, study.split_seed, name)
            paths = _write_pair(temporary / site, name, image, made.label, made.affine)
            tables[site].append(_case(name, name, site, site, (modality,), final, *paths))
    return tables, scanners


def _folder_sites(
    study: Study,
    source: FolderSource,
    data: Path | None,
    temporary: Path,
    final: Path,
    on_case: OnCase | None,
) -> Made:
    if data is None:
        raise ConfigError("this study reads volumes from a folder; give it with --data DIR")
    cases = [c for c in read_cases(data.resolve(), site="site").cases if c.label is not None]
    tables = divide(study, source, cases)
    unknown = sorted(set(source.scanners) - set(tables))
    if unknown:
        raise ConfigError(
            f"simulation.source.scanners names {unknown}; the sites are {sorted(tables)}"
        )
    scanners: dict[str, Scanner] = {}
    for site, settings in source.scanners.items():
        scanners[site] = scanner = _scanner(study, site, settings)
        scanned: list[Case] = []
        for number, case in enumerate(tables[site]):
            if on_case is not None:
                on_case(site, number, len(tables[site]))
            scanned.append(_scan(case, scanner, study, temporary / site, final))
        tables[site] = scanned
    return tables, scanners


def _scan(case: Case, scanner: Scanner, study: Study, temporary: Path, final: Path) -> Case:
    """Put a case on a scanner: in RAS axes, so that a slice axis is the same one in every file."""
    if len(case.image) != 1 or case.label is None:
        raise DataError(f"case {case.case}: a simulated scanner takes one image with its label")
    volume, label = load_volume(case.image[0]), load_volume(case.label)
    if volume.header.channels != 1 or not same_grid(volume.header, label.header):
        raise DataError(
            f"case {case.case}: a simulated scanner takes one channel with a label on its grid; "
            f"see {case.image[0].name} and {case.label.name}"
        )
    values = label.array.astype(np.uint8)
    if not np.array_equal(values, label.array):
        raise DataError(f"{case.label}: labels must be whole numbers from 0 to 255")
    grid = plan_grid(volume.header, None, volume.array.size)
    image = apply_scanner(
        scanner,
        to_stored_grid(volume.array, grid),
        grid.spacing_mm,
        study.split_seed,
        case.case,
    )
    paths = _write_pair(temporary, case.case, image, to_stored_grid(values, grid), grid.affine)
    home = (final / case.site).resolve()
    return case.model_copy(update={"image": (home / paths[0],), "label": home / paths[1]})


def _scanner(study: Study, site: str, settings: ScannerSettings) -> Scanner:
    return draw_scanner(
        study.split_seed,
        site,
        settings.strength,
        invert=settings.invert,
        motion=settings.motion,
        effects=settings.effects,
    )


def _case(
    name: str,
    patient: str,
    site: str,
    domain: str,
    modality: tuple[str, ...],
    final: Path,
    image: str,
    label: str,
) -> Case:
    home = (final / site).resolve()
    return Case(
        case=name,
        patient=patient,
        site=site,
        domain=domain,
        modality=modality,
        image=(home / image,),
        label=home / label,
        split=None,
    )


def _write_pair(
    folder: Path, name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray
) -> tuple[str, str]:
    for kind, array in (("images", image.astype(np.float32)), ("labels", label.astype(np.uint8))):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), folder / kind / f"{name}.nii.gz")
    return f"images/{name}.nii.gz", f"labels/{name}.nii.gz"


def _write_site(
    folder: Path, site: str, cases: list[Case], options: Mapping[str, Any] | None = None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    CaseTable(cases=tuple(cases)).write_csv(folder / "cases.csv")
    content = {"name": site, "cases": "cases.csv", "store": "store", "volumes": "../../volumes"}
    content |= options or {}
    text = yaml.safe_dump(content, sort_keys=False) + _POLICY
    write_atomic(folder / "site.yaml", text.encode(), mode=0o644)
