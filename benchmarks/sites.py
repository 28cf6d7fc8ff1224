"""Memory and time against the number of sites, 4 to 64, 20 MB each, no local work."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.rows import Row

COUNTS = (4, 16, 64)


def rows() -> list[Row]:
    """Memory must stay where it is; time must not grow faster than the sites."""
    peak, seconds = {}, {}
    for count in COUNTS:
        line = f"from benchmarks.empty_round import peak_with; peak_with({count})"
        result = subprocess.run(
            [sys.executable, "-c", line], check=True, capture_output=True, text=True
        )
        found = result.stdout.split()
        peak[count], seconds[count] = float(found[-2]), float(found[-1])
    out = [
        Row(f"peak memory with {n} sites", round(peak[n]), "MiB", round(peak[n] / peak[4], 2))
        for n in COUNTS
    ]
    # Up to eight admitted updates are held at once, so the step from 4 to 16 sites shows them.
    flat = peak[64] / peak[16]
    out.append(
        Row(
            "peak memory, 64 v. 16 sites",
            round(peak[64]),
            "MiB",
            round(flat, 3),
            "<= 1.1x",
            flat <= 1.1,
        )
    )
    linear = (seconds[64] / seconds[16]) / (64 / 16)
    out.append(
        Row(
            "seconds a round, 64 v. 16 sites, per site",
            round(seconds[64], 2),
            "s",
            round(linear, 2),
            "<= 1.2x",
            linear <= 1.2,
        )
    )
    return out
