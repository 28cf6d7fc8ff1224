"""Clocks that are wrong: a shim that is compiled here and loaded into a service's processes."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest


class WrongClock:
    """A clock that is off by as many seconds as were set last."""

    def __init__(self, folder: Path, seconds: int = 0) -> None:
        """Skips the test where there is no compiler."""
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler (cc) to make a wrong clock with")
        folder.mkdir(parents=True, exist_ok=True)
        self._library, self._file = folder / "skew.so", folder / "seconds"
        source = Path(__file__).with_name("skew.c")
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(self._library), "-ldl"],
            check=True,
        )
        self.set(seconds)

    def set(self, seconds: int) -> None:
        """Change it, also for processes that run."""
        descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, struct.pack("=q", seconds), 0)
        finally:
            os.close(descriptor)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to be told this time."""
        return {"LD_PRELOAD": str(self._library), "SKEW_FILE": str(self._file)}
