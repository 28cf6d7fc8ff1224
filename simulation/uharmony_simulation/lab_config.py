"""A heterogeneity study as it is declared: arms under controlled conditions, several seeds.

    name: shift
    study: hippocampus.yaml       the study and its simulation: section, beside this file
    arms: [local, fedavg, uharmony, {name: affine, method: uharmony,
           set: {network.harmonization.stage2: affine}}]
    seeds: [0, 1, 2]
    folds: 5                      every patient is tested once; else the study's own test split
    grid: {shift: [mixed-invert], strength: [0.5, 1, 2], sites: [4], cases: [44]}
    set: {training.rounds: 40}    changes to the study itself, under all arms

Every combination of the grid is a cell: the same sites and splits for all arms and seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt, field_validator

from uharmony_model.errors import ConfigError
from uharmony_model.frozen import Frozen, parse, read_yaml
from uharmony_model.methods import METHODS
from uharmony_model.study import Study, load_study
from uharmony_model.task import Name
from uharmony_simulation.config import FolderSource, ScannerSettings, Simulation
from uharmony_simulation.scanners import EFFECTS, MAX_STRENGTH, Effect

Kind = Literal["none", "contrast", "bias", "resolution", "noise", "mixed", "invert", "mixed-invert"]
Strength = Annotated[float, Field(gt=0, le=MAX_STRENGTH)]
Share = Annotated[float, Field(ge=0, lt=1)]
WholeShare = Annotated[float, Field(ge=0, le=1)]
REFERENCE = "local"


class LabArm(Frozen):
    """One row of the tables: a method, with changes to the study by dotted keys."""

    name: Name
    method: str
    set: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"unknown method {name}; known: {', '.join(METHODS)}")
        return name


class Cell(Frozen):
    """The conditions of one comparison. `sites` and `cases` are None where the data decide.

    `labelled` is the number of training patients whose labels are learned from, all of them at the
    first site; None: everybody's.
    """

    shift: Kind = "none"
    strength: Strength = 1.0
    sites: PositiveInt | None = None
    cases: PositiveInt | None = None
    imbalance: Annotated[float, Field(ge=1)] = 1.0
    labels_lost: WholeShare = 0.0
    modalities_lost: WholeShare = 0.0
    labelled: PositiveInt | None = None
    dropout: Share = 0.0
    without: Name | None = None

    @property
    def place(self) -> Cell:
        """The cell whose sites these are: a site that is left out has its data all the same."""
        return self.model_copy(update={"without": None, "dropout": 0.0})

    @property
    def name(self) -> str:
        """A folder's name: the shift, then whatever is not at its default."""
        words: list[str] = [self.shift]
        if self.shift != "none":
            words = [f"{self.shift}-{self.strength:g}"]
        for field, default in _WORDS.items():
            if (value := getattr(self, field)) != default:
                words.append(f"{field.replace('_lost', '-lost')}-{value:g}")
        words += [f"without-{self.without}"] if self.without else []
        return "_".join(words)

    @property
    def title(self) -> str:
        """The same for people: the shift with its strength, then the rest."""
        words = [self._shift]
        for field, default in _WORDS.items():
            if (value := getattr(self, field)) != default:
                words.append(f"{field.replace('_', ' ')} {value:g}")
        return ", ".join(words + ([f"without {self.without}"] if self.without else []))

    @property
    def _shift(self) -> str:
        return self.shift if self.shift == "none" else f"{self.shift} {self.strength:g}"


# What seeds, folds and an arm's method say, so nobody may set it beside them.
_OF_A_TASK = {"method", "seed", "evaluation.fold", "evaluation.folds"}

# What a cell's name says after its shift, where it is not this.
_WORDS: dict[str, float | None] = {
    "sites": None,
    "cases": None,
    "imbalance": 1.0,
    "labels_lost": 0.0,
    "modalities_lost": 0.0,
    "labelled": None,
    "dropout": 0.0,
}


class Grid(Frozen):
    """The values of each axis; every combination is a cell."""

    shift: tuple[Kind, ...] = ("none",)
    strength: tuple[Strength, ...] = (1.0,)
    sites: tuple[PositiveInt | None, ...] = (None,)
    cases: tuple[PositiveInt | None, ...] = (None,)
    imbalance: tuple[Annotated[float, Field(ge=1)], ...] = (1.0,)
    labels_lost: tuple[WholeShare, ...] = (0.0,)
    modalities_lost: tuple[WholeShare, ...] = (0.0,)
    labelled: tuple[PositiveInt | None, ...] = (None,)
    dropout: tuple[Share, ...] = (0.0,)
    without: tuple[Name | None, ...] = (None,)

    def cells(self) -> tuple[Cell, ...]:
        """All of them, each once."""
        names = list(type(self).model_fields)
        axes = [getattr(self, name) for name in names]
        combined = (dict(zip(names, values, strict=True)) for values in itertools.product(*axes))
        made = [Cell(**values) for values in combined]
        return tuple({cell.name: cell for cell in made}.values())


class Lab(Frozen):
    """The file. `swap` measures every site's model at every other site as well.

    A cell `without` a site trains on the others and then serves that one, from nothing up to
    `few_shot` labelled cases.
    """

    name: Name
    study: Path
    arms: Annotated[tuple[LabArm, ...], Field(min_length=1)]
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    folds: Annotated[int, Field(ge=2, le=100)] | None = None
    grid: Grid = Grid()
    set: dict[str, JsonValue] = Field(default_factory=dict)
    swap: bool = True
    few_shot: tuple[Annotated[int, Field(ge=2)], ...] = (4,)

    @field_validator("arms", mode="before")
    @classmethod
    def _by_name(cls, arms: Any) -> Any:
        if not isinstance(arms, list | tuple):
            return arms
        return [{"name": a, "method": a} if isinstance(a, str) else a for a in arms]

    @field_validator("arms")
    @classmethod
    def _each_once(cls, arms: tuple[LabArm, ...]) -> tuple[LabArm, ...]:
        if len({arm.name for arm in arms}) != len(arms):
            raise ValueError("two arms have one name")
        # The reference goes first: others choose from what it leaves.
        return tuple(sorted(arms, key=lambda arm: arm.name != REFERENCE))


def load_lab(path: Path) -> tuple[Lab, Study, Simulation]:
    """Read a lab file and the study it builds on.

    Raises:
        ConfigError: a file is missing or says something that cannot be followed.
    """
    lab = parse(Lab, read_yaml(path), str(path))
    base = path.parent / lab.study
    study, section = load_study(base)
    study = parse(Study, _changed(study, lab.set, str(path)), str(path))
    if not section:
        raise ConfigError(f"{base}: no simulation: section; it says where the volumes come from")
    simulation = parse(Simulation, section, f"{base}: simulation")
    for cell in lab.grid.cells():
        conditions(simulation, study, cell)
        pooled = [arm.name for arm in lab.arms if METHODS[arm.method].pooled]
        if cell.without is not None and pooled:
            raise ConfigError(
                f"cell {cell.name}: {', '.join(pooled)} would hold the cases of the site that is "
                "left out; declare pooled arms in a study of their own"
            )
    for arm in lab.arms:
        changed_study(study, arm, seed=0, fold=None, folds=lab.folds)
    return lab, study, simulation


def changed_study(
    study: Study, arm: LabArm, *, seed: int, folds: int | None, fold: int | None
) -> Study:
    """The study of one task.

    Raises:
        ConfigError: the arm sets a key that the study does not have, or a wrong value.
    """
    content = _changed(study, arm.set, f"arm {arm.name}")
    content |= {"method": arm.method, "seed": seed}
    if folds is not None:
        content["evaluation"] |= {"folds": folds, "fold": fold or 0}
    return parse(Study, content, f"arm {arm.name}")


def _changed(study: Study, changes: Mapping[str, JsonValue], who: str) -> dict[str, Any]:
    """What the study says, with the values at dotted keys replaced."""
    content = study.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split(".")
        place: Any = content
        for step in path:
            place = place.get(step) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise ConfigError(f"{who} sets {key}, which a study does not have")
        if key in _OF_A_TASK:
            raise ConfigError(f"{who} sets {key}, which is every task's own; declare it instead")
        place[last] = value
    return content


def conditions(simulation: Simulation, study: Study, cell: Cell) -> Simulation:
    """The simulation section of a cell.

    Raises:
        ConfigError: the cell changes what the source of this study does not leave open.
    """
    source = simulation.source
    if not isinstance(source, FolderSource) or source.sites_from != "random":
        if cell.place != Cell():
            raise ConfigError(
                f"cell {cell.name}: needs simulation.source of kind folder with sites_from: random"
            )
        return simulation
    count = cell.sites or source.random_sites
    names = [f"site-{number + 1}" for number in range(count)]
    if cell.imbalance != 1 and cell.cases is None:
        raise ConfigError(f"cell {cell.name}: imbalance needs cases, those of the first site")
    for lost in (cell.labels_lost, cell.modalities_lost):
        if lost and not round(lost * count):
            raise ConfigError(f"cell {cell.name}: a share of {lost:g} of {count} sites is none")
    changes: dict[str, Any] = {"random_sites": count}
    if cell.cases is not None:
        changes["cases_per_site"] = dict(zip(names, _cases(cell, count), strict=True))
    if cell.shift != "none":
        changes["scanners"] = dict(_scanners(cell, names))
    changes |= _losses(study, cell, names)
    if cell.labelled is not None and cell.dropout:
        raise ConfigError(
            f"cell {cell.name}: the one site with labels would miss rounds, and a round without it "
            "teaches nobody; leave out labelled or dropout"
        )
    if cell.labelled is not None:
        first, *others = names
        changes["labels"] = {first: cell.labelled, **dict.fromkeys(others, "none")}
    content = {**source.model_dump(), **changes}
    return Simulation.model_validate({"source": content})


def _cases(cell: Cell, count: int) -> list[int]:
    """The first site has `cases`, the last 1 / imbalance of them, geometric in between."""
    most = cell.cases or 1
    shares = [cell.imbalance ** -(i / max(count - 1, 1)) for i in range(count)]
    return [max(2, round(most * share)) for share in shares]


def _scanners(cell: Cell, names: list[str]) -> Iterator[tuple[str, ScannerSettings]]:
    """The first site is as the data are; `invert` is the last one's."""
    effects: tuple[Effect, ...] = EFFECTS if cell.shift.startswith("mixed") else ()
    effects = tuple(e for e in EFFECTS if e in effects or e == cell.shift)
    for name in names[1:]:
        invert = cell.shift.endswith("invert") and name == names[-1]
        yield name, ScannerSettings(strength=cell.strength, effects=effects, invert=invert)


def _losses(study: Study, cell: Cell, names: list[str]) -> Mapping[str, Any]:
    """Sites that draw one class alone, or lack one channel; taken in turn from the last site on."""
    changes: dict[str, Any] = {}
    classes, channels = study.task.class_names, list(study.task.intensity)
    if cell.labels_lost:
        few = names[len(names) - round(cell.labels_lost * len(names)) :]
        changes["annotated"] = {n: (classes[i % len(classes)],) for i, n in enumerate(few)}
    if cell.modalities_lost:
        few = names[len(names) - round(cell.modalities_lost * len(names)) :]
        changes["missing"] = {n: (channels[i % len(channels)],) for i, n in enumerate(few)}
    return changes
