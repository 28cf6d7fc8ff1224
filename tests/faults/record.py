"""What was seen when something was broken: one line a fault, in a JSON file.

`UHARMONY_FAULT_RECORD` names the file; without it the lines go to the temporary folder and are
forgotten. A fault that is tried several times has one line, with every recovery time.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from uharmony_model.atomic import write_atomic

VARIABLE = "UHARMONY_FAULT_RECORD"


@dataclass
class Line:
    """A fault, what came of it, the seconds until it went on (one number a try), and a note."""

    fault: str
    result: str
    seconds: list[float] = field(default_factory=list)
    note: str = ""


def place() -> Path:
    """The file."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"faults-{os.getuid()}.json"


def read(path: Path) -> list[Line]:
    """The lines that are there."""
    return [Line(**found) for found in json.loads(path.read_bytes())] if path.is_file() else []


def keep(fault: str, result: str, seconds: float | None = None, note: str = "") -> None:
    """Write down a fault, what came of it, and how long it took to go on."""
    path = place()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read(path)
    line = next((found for found in lines if found.fault == fault), None)
    if line is None:
        line = Line(fault=fault, result=result)
        lines.append(line)
    line.result, line.note = result, note
    line.seconds += [] if seconds is None else [round(seconds, 1)]
    write_atomic(path, json.dumps([asdict(found) for found in lines], indent=1).encode())
