"""Readers of the folder layouts that studies come in; all give a case table.

| layout | told by | what is read |
|---|---|---|
| table | a file, or `cases.csv` in the folder | see `case_table`; image and label default to `images/<case>.nii[.gz]` and `labels/<case>.nii[.gz]` |
| Decathlon | `dataset.json` with a list `training` | its `training` pairs |
| nnU-Net | `dataset.json` with `channel_names` | `imagesTr/<case>_0000.nii.gz`, ..., `labelsTr/` |

The two with a `dataset.json` take a `sites.csv` beside it: case, site and, if wanted, domain and
patient. Test images without labels are left out.
"""  # noqa: E501 - a table

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uharmony_client.case_table import COLUMNS, CaseTable, build_table, read_rows
from uharmony_model.errors import DataError

MAX_JSON_BYTES = 16 << 20
SUFFIXES = (".nii.gz", ".nii")
SITE_COLUMNS = ("case", "site", "domain", "patient")

Row = dict[str, str]


def read_cases(path: Path, *, site: str = "site") -> CaseTable:
    """Read a table or a folder in any known layout; `site` is the name where none is given.

    Raises:
        DataError: nothing known is there, or what is there is incomplete.
    """
    if path.is_file():
        return _finish(read_rows(path), path, site)
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or table of cases")
    if (path / "cases.csv").is_file():
        return read_folder(path, site=site)
    if (path / "dataset.json").is_file():
        if "channel_names" in _read_json(path):
            return read_nnunet(path, site=site)
        return read_decathlon(path, site=site)
    raise DataError(
        f"{path}: neither cases.csv nor dataset.json in it; write a cases.csv with the columns "
        f"{', '.join(COLUMNS)}"
    )


def read_folder(folder: Path, *, site: str = "site") -> CaseTable:
    """Read `images/`, `labels/` and `cases.csv`, whose only needed column then is `case`.

    A column `label` that is there but empty means that a case has no label.
    """
    rows = read_rows(folder / "cases.csv")
    for row in rows:
        for column in ("image", "label"):
            if not row.get(column) and (column == "image" or column not in row):
                row[column] = _find(folder, f"{column}s", row.get("case", ""))
    return _finish(rows, folder / "cases.csv", site)


def read_decathlon(folder: Path, *, site: str = "site") -> CaseTable:
    """Read the layout of the Medical Segmentation Decathlon (arXiv:1902.09063)."""
    dataset = _read_json(folder)
    modality = _channels(dataset.get("modality"), folder)
    pairs = dataset.get("training")
    if not isinstance(pairs, list) or not pairs:
        raise DataError(f"{folder / 'dataset.json'}: expected a list 'training' of image and label")
    rows = []
    for pair in pairs:
        image = pair.get("image") if isinstance(pair, dict) else None
        label = pair.get("label") if isinstance(pair, dict) else None
        if not isinstance(image, str) or not isinstance(label, str):
            raise DataError(f"{folder / 'dataset.json'}: expected image and label in 'training'")
        rows.append(
            {
                "case": stem(Path(image).name),
                "modality": "|".join(modality),
                "image": _inside(folder, image),
                "label": _inside(folder, label),
            }
        )
    return _finish(_with_sites(rows, folder), folder / "dataset.json", site)


def read_nnunet(folder: Path, *, site: str = "site") -> CaseTable:
    """Read the raw layout of nnU-Net: one file a channel, `<case>_0000` and so on."""
    dataset = _read_json(folder)
    modality = _channels(dataset.get("channel_names"), folder)
    ending = dataset.get("file_ending", ".nii.gz")
    if ending not in SUFFIXES:
        raise DataError(f"{folder / 'dataset.json'}: file_ending {ending!r:.40}; expected .nii.gz")
    names: set[str] = set()
    images = folder / "imagesTr"
    for file in sorted(images.iterdir()) if images.is_dir() else ():
        match = re.fullmatch(rf"(.+)_\d{{4}}{re.escape(ending)}", file.name)
        if match:
            names.add(match[1])
    if not names:
        raise DataError(f"{images}: no files named <case>_0000{ending}")
    rows = [
        {
            "case": name,
            "modality": "|".join(modality),
            "image": "|".join(
                f"imagesTr/{name}_{channel:04d}{ending}" for channel in range(len(modality))
            ),
            "label": f"labelsTr/{name}{ending}",
        }
        for name in sorted(names)
    ]
    return _finish(_with_sites(rows, folder), folder / "dataset.json", site)


def _finish(rows: Iterable[Mapping[str, str]], source: Path, site: str) -> CaseTable:
    """Build the table and see that every file it names is there."""
    table = build_table(rows, source, site=site)
    for case in table.cases:
        for image in case.image:
            if not image.is_file():
                raise DataError(f"{source}: case {case.case}: no image at {image}")
        if case.label is not None and not case.label.is_file():
            raise DataError(
                f"{source}: case {case.case}: no label at {case.label}; add it, leave the "
                "case out, or list the cases in a table with an empty column label"
            )
    return table


def _with_sites(rows: list[Row], folder: Path) -> list[Row]:
    path = folder / "sites.csv"
    if not path.is_file():
        return rows
    places = {row.get("case", ""): row for row in read_rows(path, SITE_COLUMNS)}
    named = {row["case"] for row in rows}
    strangers, missing = sorted(places.keys() - named), sorted(named - places.keys())
    if strangers or missing:
        what = "not in dataset.json" if strangers else "missing"
        raise DataError(
            f"{path}: case {(strangers or missing)[0]!r} is {what}, one of "
            f"{len(strangers) + len(missing)}; expected one row for every training case"
        )
    return [{**row, **places[row["case"]]} for row in rows]


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; is {folder} the folder that contains imagesTr?")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path}: not readable as JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _channels(names: Any, folder: Path) -> list[str]:
    """Channel names in the order of their numbers."""
    if not isinstance(names, dict) or not all(
        isinstance(key, str) and key.isascii() and key.isdigit() and isinstance(name, str)
        for key, name in names.items()
    ):
        raise DataError(f"{folder / 'dataset.json'}: expected modalities like {{'0': 'MRI'}}")
    if sorted(map(int, names)) != list(range(len(names))) or not names:
        raise DataError(f"{folder / 'dataset.json'}: channels must be numbered 0, 1, ...")
    return [names[key] for key in sorted(names, key=int)]


def _inside(folder: Path, relative: str) -> str:
    """A path of dataset.json, which came with the data and may not point out of its folder."""
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts or "|" in relative or "\0" in relative:
        raise DataError(f"{folder / 'dataset.json'}: {relative!r:.200} leaves the folder")
    return str(path)


def _find(folder: Path, place: str, name: str) -> str:
    if name and "/" not in name and "\\" not in name and "\0" not in name:
        for suffix in SUFFIXES:
            if (folder / place / f"{name}{suffix}").is_file():
                return f"{place}/{name}{suffix}"
    return f"{place}/{name}{SUFFIXES[0]}" if name else ""


def stem(name: str) -> str:
    """A volume's file name without its ending."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name
