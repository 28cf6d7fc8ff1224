"""Tables by class for programs (JSON) and for a repository's pages (GitHub's Markdown)."""

from __future__ import annotations

from dataclasses import asdict

from uharmony_service.page import UNDEFINED, number
from uharmony_simulation.study_classes import ClassDice, ClassTable, LossColumn, LossTable
from uharmony_simulation.study_text import alone_column, compared, dice, short_difference, table


def class_json(found: ClassTable) -> dict[str, object]:
    """A table by class as JSON takes it."""
    return {
        "cell": found.cell,
        "classes": found.classes,
        "rows": [
            {
                "arm": row.arm,
                "at_home": row.at_home,
                "alone": None if row.alone is None else asdict(row.alone),
                "by_class": {name: _class_dice(value) for name, value in row.by_class.items()},
            }
            for row in found.rows
        ],
    }


def loss_json(found: LossTable) -> dict[str, object]:
    """A table of lost labels as JSON takes it."""
    return {
        "cell": found.cell,
        "all_labels": found.all_labels,
        "rows": [
            {
                "arm": row.arm,
                "at_home": row.at_home,
                "at_sites": [
                    {
                        "site": c.site,
                        "class": c.name,
                        "annotated": c.annotated,
                        **_class_dice(value),
                    }
                    for c, value in row.cells.items()
                ],
            }
            for row in found.rows
        ],
    }


def class_markdown(found: ClassTable) -> str:
    """Arms by class: Dice, and the difference to training alone."""
    head = ["arm", *(["local-only model"] if found.several_alone else [])]
    for name in found.classes:
        head += [name, f"{name}, against training alone"]
    lines = []
    for row in found.rows:
        line = [row.shown, *alone_column(row.alone, several=found.several_alone)]
        for name in found.classes:
            value = row.by_class.get(name)
            line += (
                [UNDEFINED] * 2
                if value is None
                else [_counted(value), short_difference(value.against)]
            )
        lines.append(line)
    return table(head, lines)


def loss_markdown(found: LossTable) -> str:
    """Arms by site and class: Dice, and the difference to the same arm with all labels."""
    head = ["arm", *(_loss_head(column) for column in found.columns)]
    lines = [
        [row.shown, *(_loss_cell(row.cells.get(column)) for column in found.columns)]
        for row in found.rows
    ]
    return table(head, lines)


def _loss_head(column: LossColumn) -> str:
    return f"{column.site}: {column.name}{'' if column.annotated else ' (not annotated)'}"


def _loss_cell(found: ClassDice | None) -> str:
    if found is None:
        return UNDEFINED
    if found.against is None:
        return _counted(found)
    return f"{number(found.dice.mean, 3)}, {short_difference(found.against)}"


def _counted(found: ClassDice) -> str:
    return f"{dice(found.dice, found.dice.sites)}, n {found.dice.cases}"


def _class_dice(found: ClassDice) -> dict[str, object]:
    against = None if found.against is None else compared(found.against)
    return {"dice": asdict(found.dice), "against": against}
