"""Class by class: what an arm is worth on each class, and what becomes of classes nobody drew.

A mean over classes hides a class that was lost. Where sites do not annotate every class, each arm
is compared with itself in the condition that differs in nothing but that all labels are there:
does a site still find the class that it does not annotate, and is its own class the worse for it?
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from uharmony_simulation.paired import CaseScore, Comparison, Estimate, compare, estimate
from uharmony_simulation.study_order import arms_in_order, in_order, shown
from uharmony_simulation.study_regimes import Alone, Regimes, alone_of, several


@dataclass(frozen=True)
class LabelLoss:
    """A condition whose sites do not annotate every class, and its like with `all_labels`.

    `annotated` has the classes of each site that lacks one; a site that is missing has them all.
    """

    cell: str
    all_labels: str
    annotated: Mapping[str, tuple[str, ...]]

    def annotates(self, site: str, name: str) -> bool:
        """Whether the site has labels of this class."""
        return site not in self.annotated or name in self.annotated[site]


@dataclass(frozen=True)
class ClassDice:
    """Dice of one class, and its paired difference; None where there is nothing to compare with."""

    dice: Estimate
    against: Comparison | None


@dataclass(frozen=True)
class ClassRow:
    """One arm at one moment, by class: over the sites that annotate it, against training alone."""

    arm: str
    at_home: bool
    by_class: Mapping[str, ClassDice]
    alone: Alone | None

    @property
    def shown(self) -> str:
        """The arm's name, with what tells the moment."""
        return shown(self.arm, at_home=self.at_home)


@dataclass(frozen=True)
class ClassTable:
    """All arms under one condition, by class."""

    cell: str
    classes: tuple[str, ...]
    rows: tuple[ClassRow, ...]

    @property
    def several_alone(self) -> bool:
        """Whether the rows were compared with several arms that stand for training alone."""
        return several(row.alone for row in self.rows)


@dataclass(frozen=True)
class LossColumn:
    """One class at one site."""

    site: str
    name: str
    annotated: bool


@dataclass(frozen=True)
class LossRow:
    """One arm at one moment, by site and class, against itself with all labels."""

    arm: str
    at_home: bool
    cells: Mapping[LossColumn, ClassDice]

    @property
    def shown(self) -> str:
        """The arm's name, with what tells the moment."""
        return shown(self.arm, at_home=self.at_home)


@dataclass(frozen=True)
class LossTable:
    """All arms under a condition with labels lost, against the same arms with `all_labels`."""

    cell: str
    all_labels: str
    columns: tuple[LossColumn, ...]
    rows: tuple[LossRow, ...]

    @property
    def unmeasured(self) -> bool:
        """Whether no arm was measured on some class that a site does not annotate."""
        hidden = [column for column in self.columns if not column.annotated]
        return any(not any(column in row.cells for row in self.rows) for column in hidden)


def class_tables(
    scores: Sequence[CaseScore],
    regimes: Regimes,
    losses: Sequence[LabelLoss],
    resamples: int,
) -> Iterator[ClassTable]:
    """A table for each condition in which more than one class was measured.

    Raises:
        DataError: a case stands twice in a run, or a Dice is no number in [0, 1].
    """
    for cell in in_order(s.cell for s in scores):
        loss = next((loss for loss in losses if loss.cell == cell), None)
        groups = _groups(s for s in scores if s.cell == cell)
        classes = _classes(groups)
        if len(classes) < 2:
            continue
        rows = []
        for arm, at_home in _rows(groups):
            there = {name for name, home in groups if home == at_home}
            alone = alone_of(arm, there, regimes)
            other = [] if alone is None else groups[alone.arm, at_home]
            by_class = {}
            for name in classes:
                own = list(_of_class(groups[arm, at_home], name, loss))
                if own:
                    against = compare(own, _of_class(other, name, loss), resamples=resamples)
                    by_class[name] = _class_dice(own, against, resamples)
            if by_class:
                rows.append(ClassRow(arm, at_home, by_class, alone))
        yield ClassTable(cell, tuple(classes), tuple(rows))


def loss_tables(
    scores: Sequence[CaseScore], losses: Sequence[LabelLoss], resamples: int
) -> Iterator[LossTable]:
    """A table for each condition with labels lost; cases are paired by site, case and seed.

    Raises:
        DataError: a case stands twice in a run, or a Dice is no number in [0, 1].
    """
    by_name = {loss.cell: loss for loss in losses}
    for cell in in_order(s.cell for s in scores if s.cell in by_name):
        loss = by_name[cell]
        groups = _groups(s for s in scores if s.cell == cell)
        whole = _groups(s for s in scores if s.cell == loss.all_labels)
        drawn = {name for names in loss.annotated.values() for name in names}
        classes = in_order({*_classes(groups), *_classes(whole), *drawn})
        sites = in_order(s.site for found in groups.values() for s in found)
        columns = [LossColumn(s, c, loss.annotates(s, c)) for s in sites for c in classes]
        rows = []
        for arm, at_home in _rows(groups):
            cells = {}
            for column in columns:
                own = _at(groups[arm, at_home], column)
                if own:
                    full = _at(whole.get((arm, at_home), ()), column)
                    against = compare(own, full, resamples=resamples)
                    cells[column] = _class_dice(own, against, resamples)
            if cells:
                rows.append(LossRow(arm, at_home, cells))
        if rows:
            yield LossTable(cell, loss.all_labels, tuple(columns), tuple(rows))


_Groups = dict[tuple[str, bool], list[CaseScore]]


def _groups(scores: Iterable[CaseScore]) -> _Groups:
    groups: _Groups = {}
    for score in scores:
        groups.setdefault((score.arm, score.at_home), []).append(score)
    return groups


def _rows(groups: _Groups) -> list[tuple[str, bool]]:
    """Every arm, at both moments where it has both."""
    arms = arms_in_order(arm for arm, _ in groups)
    return [(arm, home) for arm in arms for home in (False, True) if (arm, home) in groups]


def _classes(groups: _Groups) -> list[str]:
    return in_order(name for found in groups.values() for s in found for name in s.by_class)


def _of_class(
    scores: Iterable[CaseScore], name: str, loss: LabelLoss | None
) -> Iterator[CaseScore]:
    """The scores on one class, of the sites that annotate it."""
    for score in scores:
        if name in score.by_class and (loss is None or loss.annotates(score.site, name)):
            yield replace(score, dice=score.by_class[name])


def _at(scores: Iterable[CaseScore], column: LossColumn) -> list[CaseScore]:
    """The scores on one class at one site, whoever annotates it."""
    return [s for s in _of_class(scores, column.name, None) if s.site == column.site]


def _class_dice(own: Sequence[CaseScore], against: Comparison, resamples: int) -> ClassDice:
    paired = against if against.difference.cases else None
    return ClassDice(estimate(own, resamples=resamples), paired)
