"""Peak memory, measured in a process of its own so that nothing else counts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


class _PeakInAChild:
    """Run a line of Python in a child and read the MiB its `measured()` block added at its peak."""

    def __call__(self, line: str) -> float:
        result = subprocess.run(
            [sys.executable, "-c", line], check=True, capture_output=True, text=True
        )
        return float(result.stdout.strip().splitlines()[-1])

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Print by how many MiB the resident set rose at most inside the block."""
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
        before = _status("VmRSS")
        yield
        print((_status("VmHWM") - before) / 1024)


peak_in_a_child = _PeakInAChild()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def peak_mib() -> float:
    """The largest resident set of this process so far, in MiB."""
    return _status("VmHWM") / 1024
