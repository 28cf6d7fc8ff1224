from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from uharmony_model.allocator import keep_freed_pages

# Counts its own page faults. An aligned block of glibc before 2.38 may miss the hole that the last
# one left by a few bytes, seven times at most (its cache of small pieces is full then).
PROGRAM = """
import resource
import torch
from uharmony_model.allocator import keep_freed_pages

torch.set_num_threads(1)
kept = {call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(10 << 20)  # 40 MiB
    assert block.sum().item() == 10 << 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, min([faults() for _ in range(20)][-5:]))
"""

pytestmark = pytest.mark.alone


def _run(call: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(call=call)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.slow
def test_a_freed_block_is_used_again_without_page_faults():
    kept, faults = _run("keep_freed_pages() and keep_freed_pages()")
    assert kept == "True"
    _, without = _run("None")
    # 40 MiB are 10240 pages of 4 KiB, or 20 of 2 MiB where the kernel gives huge ones.
    assert faults < 8
    assert without >= 20


def test_no_glibc_is_no_error(monkeypatch):
    class OtherLibrary:
        """A C library without glibc's version function."""

    monkeypatch.setattr(ctypes, "CDLL", lambda name: OtherLibrary())
    assert keep_freed_pages() is False

    def refuse(name: object) -> None:
        raise TypeError("no default library")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert keep_freed_pages() is False
