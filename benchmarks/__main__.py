"""Run the benchmarks and print a table, then one JSON line a row.

`hostile`, `fuzz`, `leakage` and `compare` are commands of their own, each with a `--help`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.rows import Row
from uharmony_model.allocator import keep_freed_pages
from uharmony_model.errors import UHarmonyError

PARTS = (
    "layer",
    "network",
    "aggregation",
    "empty_round",
    "sites",
    "local_rounds",
    "data",
    "deployed_round",
)
COMMANDS = ("hostile", "fuzz", "leakage", "compare")


def main() -> int:
    """0 when every goal is met, 1 when one is missed."""
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        try:
            found: int = importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])
        except UHarmonyError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
        return found
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="all when left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    keep_freed_pages()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    rows: list[Row] = []
    for part in options.parts or PARTS:
        console.print(f"measuring {part} ...")
        rows += importlib.import_module(f"benchmarks.{part}").rows()
    table = Table(title=f"{platform.processor() or platform.machine()}, {options.threads} threads")
    for column in ("what", "value", "unit", "ratio", "goal", "met"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:g}x"
        met = {True: "yes", False: "NO", None: ""}[row.ok]
        table.add_row(row.name, f"{row.value:g}", row.unit, ratio, row.target, met)
    Console().print(table)
    for row in rows:
        print(row.json())
    return int(any(row.ok is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
