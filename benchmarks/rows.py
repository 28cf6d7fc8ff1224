"""A measured figure, and the way to measure two things side by side."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """`ratio` is to the peer of the same run; `ok` says whether it meets `target`."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    target: str = ""
    ok: bool | None = None

    def json(self) -> str:
        """One line for machines."""
        return json.dumps(asdict(self))


def at_most(name: str, value: float, unit: str, ratio: float, limit: float) -> Row:
    """A row whose ratio must not exceed a limit."""
    return Row(name, round(value, 3), unit, round(ratio, 3), f"<= {limit}x", ratio <= limit)


def interleaved(works: Mapping[str, Work], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each, taken in turn so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + warmup):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}
