"""Reads mutated inputs in a process of bounded memory and time: `python -m benchmarks.fuzz_worker`.

Only the errors that the reader documents are allowed, and what is accepted must be what was
promised. A hang ends the process by a signal; the number of the input that was under way is in a
shared file, so that the parent knows it.
"""

from __future__ import annotations

import json
import mmap
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

GROWTH_BYTES = 256 << 20  # of resident memory, over what the process has before the first input
_ADDRESSES = 1 << 30  # of address space beyond that


def draws(seed: int, kind: str, index: int) -> random.Random:
    """The draws of one input: the same whatever ran before it."""
    return random.Random(f"{seed}/{kind}/{index}")  # noqa: S311 - nothing secret


def _read_function(kind: str, folder: Path) -> Callable[[random.Random], str]:
    if kind == "control":
        return _control()
    # Only here: the control needs none of the packages, and starts at once.
    from benchmarks.fuzz_readers import reader

    return reader(kind, folder)


def _control() -> Callable[[random.Random], str]:
    """Not a reader but a proof that this process sees what it looks for."""
    numbers = iter(range(1 << 30))

    def read(draw: random.Random) -> str:
        number = next(numbers)
        if number == 2:
            raise KeyError("a crash on purpose")
        if number == 4:
            time.sleep(60)
        return "read"

    return read


def work(
    kind: str, seed: int, start: int, stop: int, counter: Path, seconds: float
) -> dict[str, object]:
    """Read inputs `start` to `stop`; counts, and the numbers of those that crashed."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    outcomes: Counter[str] = Counter()
    crashes: list[tuple[int, str]] = []
    slowest, slow_index = 0.0, start
    with (
        counter.open("r+b") as file,
        mmap.mmap(file.fileno(), 8) as under_way,
        tempfile.TemporaryDirectory(dir=_fast_folder()) as name,
    ):
        read = _read_function(kind, Path(name))
        before = _memory("VmRSS")
        limit = _memory("VmSize") + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for index in range(start, stop):
            under_way[:8] = struct.pack("<q", index)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            began = time.perf_counter()
            try:
                outcomes[read(draws(seed, kind, index))] += 1
            except Exception:
                crashes.append((index, traceback.format_exc(limit=-3)))
            took = time.perf_counter() - began
            if took > slowest:
                slowest, slow_index = took, index
        signal.setitimer(signal.ITIMER_REAL, 0)
    growth = max(0, _memory("VmHWM") - before)
    if growth > GROWTH_BYTES:
        crashes.append((start, f"resident memory grew by {growth} bytes in this chunk"))
    return {"outcomes": outcomes, "crashes": crashes, "slowest": slowest, "slow_index": slow_index,
            "growth": growth}  # fmt: skip


def _memory(field: str) -> int:
    """A figure of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - a folder of its own in it


def main(arguments: Sequence[str]) -> int:
    """KIND SEED START STOP COUNTER SECONDS; one line of JSON."""
    kind, seed, start, stop, counter, seconds = arguments
    found = work(kind, int(seed), int(start), int(stop), Path(counter), float(seconds))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
