"""What every test shares: one torch thread, hypothesis profiles, and where real volumes lie."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Bit-identity is claimed for equal thread counts, so the tests fix theirs.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _an_interrupt_interrupts():
    # A shell's background job ignores SIGINT, and so would the processes that tests start from it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_volumes() -> Path:
    """The folder with `hippocampus/` and `sarcoma/`; tests that need it are skipped without it."""
    folder = Path(os.environ.get("UHARMONY_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "hippocampus" / "dataset.json").is_file():
        pytest.skip(f"no real volumes at {folder}; set UHARMONY_DATA to their folder")
    return folder
