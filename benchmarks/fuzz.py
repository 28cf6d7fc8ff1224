"""Mutated inputs for everything that is read from outside: `python -m benchmarks fuzz`.

Payloads (with the texts of joining and instructions) and NIfTI volumes are read by child processes
of bounded memory; only documented errors may come. After each chunk the counts are written down:
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from uharmony_model.atomic import write_atomic

CHUNK = {"payloads": 20_000, "volumes": 5_000, "control": 8}
HANG_SECONDS = 5.0
_LONGEST_CHUNK = 3600.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when nothing crashed and nothing hung."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=__doc__)
    parser.add_argument("--payloads", type=int, default=1_000_000)
    parser.add_argument("--volumes", type=int, default=100_000)
    parser.add_argument("--control", type=int, default=0, help="inputs that crash and hang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-seconds", type=float, default=HANG_SECONDS)
    parser.add_argument("--state", type=Path, default=Path("runs/fuzz.json"))
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    state = _load(options.state, options.seed)
    wanted = {"payloads": options.payloads, "volumes": options.volumes, "control": options.control}
    for kind, count in wanted.items():
        own = state["kinds"].setdefault(kind, _nothing())
        while own["done"] < count:
            stop = min(own["done"] + CHUNK[kind], count)
            _chunk(own, kind, options.seed, stop, options.hang_seconds)
            options.state.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(options.state, json.dumps(state, indent=1).encode())
            console.print(f"{kind}: {own['done']:,} of {count:,}, {_found(own)}")
    print(table(state))
    return int(any(k["crashes"] or k["hangs"] for k in state["kinds"].values()))


def table(state: dict[str, Any]) -> str:
    """The counts as a Markdown table."""
    lines = [
        "| inputs | read | accepted | refused | crashes | hangs | slowest | memory | time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, own in state["kinds"].items():
        if not own["done"]:
            continue
        good = sum(n for name, n in own["outcomes"].items() if name.endswith(("read", "admitted")))
        refused = sum(own["outcomes"].values()) - good
        lines.append(
            f"| {kind} (seed {state['seed']}) | {own['done']:,} | {good:,} | {refused:,} "
            f"| {len(own['crashes'])} | {len(own['hangs'])} | {own['slowest'] * 1e3:.0f} ms "
            f"| +{own['growth'] >> 20} MiB | {own['seconds']:.0f} s |"
        )
    lines.append("")
    for kind, own in state["kinds"].items():
        counts = sorted(own["outcomes"].items(), key=lambda item: -item[1])
        if counts:
            lines.append(f"{kind}: " + ", ".join(f"{name} {n:,}" for name, n in counts))
        for index, text in own["crashes"][:5]:
            lines.append(f"crash at {kind} {index}: {text.strip().splitlines()[-1]}")
        lines.extend(f"hang at {kind} {index}" for index in own["hangs"][:5])
    return "\n".join(lines)


def _chunk(own: dict[str, Any], kind: str, seed: int, stop: int, hang_seconds: float) -> None:
    """Read inputs up to `stop`; a child that dies is replaced by one that goes on behind it."""
    began = time.monotonic()
    with tempfile.NamedTemporaryFile() as counter:
        counter.write(bytes(8))
        counter.flush()
        command = [sys.executable, "-m", "benchmarks.fuzz_worker", kind, str(seed),
                   str(own["done"]), str(stop), counter.name, str(hang_seconds)]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_LONGEST_CHUNK
        )
        (under_way,) = struct.unpack("<q", Path(counter.name).read_bytes())
    own["seconds"] += time.monotonic() - began
    if done.returncode == 0:
        found = json.loads(done.stdout)
        own["outcomes"] = dict(Counter(own["outcomes"]) + Counter(found["outcomes"]))
        own["crashes"] += found["crashes"]
        if found["slowest"] > own["slowest"]:
            own["slowest"], own["slow_index"] = found["slowest"], found["slow_index"]
        own["growth"] = max(own["growth"], found["growth"])
        own["done"] = stop
        return
    if done.returncode == -signal.SIGALRM:
        own["hangs"].append(under_way)
    else:
        own["crashes"].append((under_way, f"ended with {done.returncode}: {done.stderr[-500:]}"))
    # What came before it in this chunk is read again, up to it: nothing is left out.
    if under_way > own["done"]:
        _chunk(own, kind, seed, under_way, hang_seconds)
    own["done"] = under_way + 1


def _found(own: dict[str, Any]) -> str:
    return f"{len(own['crashes'])} crashes, {len(own['hangs'])} hangs, {own['seconds']:.0f} s"


def _nothing() -> dict[str, Any]:
    return {"done": 0, "outcomes": {}, "crashes": [], "hangs": [], "slowest": 0.0, "slow_index": 0,
            "growth": 0, "seconds": 0.0}  # fmt: skip


def _load(path: Path, seed: int) -> dict[str, Any]:
    """What an earlier run of the same seed has counted."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_bytes())
        if found["seed"] == seed:
            return found
    return {"seed": seed, "kinds": {}}


if __name__ == "__main__":
    sys.exit(main())
