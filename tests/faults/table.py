"""`python -m tests.faults.table`: what the fault suite saw last, as a table in Markdown.

`--write docs/reliability.md` puts it between the two marks in that file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.faults.record import VARIABLE, Line, place, read
from uharmony_model.atomic import write_atomic

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def table(lines: Sequence[Line]) -> str:
    """One row a fault, in the order in which they were tried, with every recovery time."""
    rows = ["| fault | what came of it | seconds | note |", "|---|---|---|---|"]
    for line in lines:
        seconds = ", ".join(f"{found:.1f}" for found in line.seconds)
        rows.append(f"| {line.fault} | {line.result} | {seconds} | {line.note} |")
    return "\n".join(rows)


def put(text: str, new: str) -> str:
    """The text with the part between the marks replaced.

    Raises:
        ValueError: the marks are not there.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{new}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it into a document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, nargs="?", default=None)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args(arguments)
    record = given.record or place()
    lines = read(record)
    if not lines:
        print(f"error: {record}: no record; run ./scripts/test --faults, or set {VARIABLE}",
              file=sys.stderr)  # fmt: skip
        return os.EX_NOINPUT
    if given.write is None:
        print(table(lines))
        return 0
    write_atomic(given.write, put(given.write.read_text(), table(lines)).encode(), mode=0o644)
    return 0


if __name__ == "__main__":
    sys.exit(main())
