"""In which order arms and conditions stand, and how the name of a condition is read."""

from __future__ import annotations

import re
from collections.abc import Iterable

from uharmony_model.methods import METHODS
from uharmony_server.records import AT_HOME

_SHIFT = re.compile(r"(?P<kind>[^,]*\S)\s+(?P<strength>-?\d+(?:\.\d+)?)(?P<rest>,.*)?")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def arms_in_order(arms: Iterable[str]) -> list[str]:
    """Arms in the order of the methods, then others by name."""
    known = {name: index for index, name in enumerate(METHODS)}
    return sorted(set(arms), key=lambda arm: (known.get(arm, len(known)), arm))


def shown(arm: str, *, at_home: bool) -> str:
    """An arm's name as tables of both moments have it."""
    return f"{arm}{AT_HOME}" if at_home else arm


def shift_of(cell: str) -> tuple[str, float] | None:
    """The kind of shift, with all other conditions, and its strength; None where none is named.

    "invert 2.0, sites 4" is 2.0 of "invert, sites 4".
    """
    found = _SHIFT.fullmatch(cell)
    if found is None:
        return None
    return found["kind"] + (found["rest"] or ""), float(found["strength"])


def in_order(names: Iterable[str]) -> list[str]:
    """Names each once, and numbers in them by size."""

    def key(name: str) -> list[tuple[float, str]]:
        parts = _NUMBER.split(name)
        return [(float(p), "") if i % 2 else (0.0, p) for i, p in enumerate(parts)]

    return sorted(set(names), key=lambda name: (key(name), name))
