"""A record: one site's mean metrics of one class, under one arm and seed, after one round.

Records are the only form in which results reach the coordinator, the report and `results.json`.
A metric that is undefined (no lesion in the truth, a class the site does not annotate, surfaces
not measured in that round) is None, never 0 or 1. A site that withholds numbers over few patients
sends `<11` in place of the count, and no metric.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import (
    AliasChoices,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import StoreError
from uharmony_model.evaluation_settings import METRICS, Split
from uharmony_model.frozen import Frozen
from uharmony_model.training_settings import Candidate

AT_HOME = " +home"  # after an arm's name: with the sites' own last steps
MAX_RESULTS_BYTES = 1 << 28

Label = Annotated[str, Field(max_length=200)]
Share = Annotated[float, Field(ge=0, le=1)]
Withheld = Annotated[str, Field(pattern=r"^<[1-9][0-9]{0,3}$")]


class Record(Frozen):
    """`dice_low` and `dice_high` bound the mean over cases with 95 % (bootstrap).

    `kept` says which model the site kept at its finale, where it is that one that was measured.
    """

    arm: Label
    seed: NonNegativeInt
    round: NonNegativeInt
    site: Label
    domain: Label
    split: Split
    class_: Label = Field(
        validation_alias=AliasChoices("class", "class_"), serialization_alias="class"
    )
    n_cases: NonNegativeInt | Withheld
    dice: Share | None = None
    dice_low: Share | None = None
    dice_high: Share | None = None
    surface_dice: Share | None = None
    hd95_mm: NonNegativeFloat | None = None
    lesion_recall: Share | None = None
    fp_per_case: NonNegativeFloat | None = None
    kept: Candidate | None = None

    @model_validator(mode="after")
    def _nothing_of_few(self) -> Record:
        named = (*METRICS, "dice_low", "dice_high")
        if self.withheld and any(getattr(self, name) is not None for name in named):
            raise ValueError(f"n_cases is {self.withheld}, so no metric may be given")
        return self

    @property
    def column(self) -> str:
        """The arm as tables show it: apart, what its sites made of it at home."""
        return self.arm if self.kept is None else f"{self.arm}{AT_HOME}"

    @property
    def withheld(self) -> str:
        """`<11` where the site withholds this record's numbers, else empty."""
        return self.n_cases if isinstance(self.n_cases, str) else ""


_RECORDS = TypeAdapter(list[Record])


def write_results(path: Path, records: Sequence[Record]) -> None:
    """Write records as a JSON list, one line each, whole or not at all.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    lines = [
        json.dumps(record.model_dump(mode="json", by_alias=True), allow_nan=False)
        for record in records
    ]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"
    write_atomic(path, text.encode(), mode=0o644)


def read_results(path: Path) -> list[Record]:
    """Read what `write_results` wrote.

    Raises:
        StoreError: the file is missing, too large or not a list of records.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such file; give a results.json of a finished run")
    if path.stat().st_size > MAX_RESULTS_BYTES:
        raise StoreError(f"{path}: larger than {MAX_RESULTS_BYTES} bytes; these are no results")
    try:
        return _RECORDS.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise StoreError(
            f"{path}: not a list of records: {where}: {first['msg']}; run the study again"
        ) from None
