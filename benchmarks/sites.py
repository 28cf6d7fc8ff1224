"""Memory and time against the number of sites, 4 to 64, 20 MB each, no local work."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.rows import Row

COUNTS = (4, 16, 64)


def rows() -> list[Row]:
    """Memory must stay where it is; time must not grow faster than the sites."""
    found = {count: _measure(20, count) for count in COUNTS}
    peak, seconds = ({n: f[i] for n, f in found.items()} for i in (0, 1))
    out = [
        Row(f"peak memory with {n} sites", round(peak[n]), "MiB", round(peak[n] / peak[4], 2))
        for n in COUNTS
    ]
    flat = peak[64] / peak[4]
    name = "peak memory, 64 v. 4 sites"
    out.append(Row(name, round(peak[64]), "MiB", round(flat, 3), "<= 1.05x", flat <= 1.05))
    linear = (seconds[64] / seconds[16]) / (64 / 16)
    name = "seconds a round, 64 v. 16 sites, per site"
    out.append(Row(name, round(seconds[64], 2), "s", round(linear, 2), "<= 1.2x", linear <= 1.2))
    large, _ = _measure(120, 8)
    name = "peak memory of the 120 MB round with 8 sites"
    out.append(Row(name, round(large), "MiB", None, "<= 2048 MiB", large <= 2048))
    return out


def _measure(megabytes: int, sites: int) -> tuple[float, float]:
    """Peak MiB and seconds a round, in a process of its own with the commands' allocator."""
    line = f"from benchmarks.empty_round import peak_with; peak_with({megabytes}, {sites})"
    result = subprocess.run(
        [sys.executable, "-c", line], check=True, capture_output=True, text=True
    )
    found = result.stdout.split()
    return float(found[-2]), float(found[-1])
