"""Which errors end a site's process, and what is said of the others."""

from __future__ import annotations

import errno

import pytest
import torch

from uharmony_client.failures import no_room, speakable
from uharmony_model.errors import DataError, ExchangeError, StoreError, TrainingError


def full_disk():
    error = StoreError("the store is full")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (full_disk(), True),
        (RuntimeError("shapes differ"), False),
        (StoreError("made from another study"), False),
        (ExchangeError("cannot allocate memory"), False),
    ],
)
def test_only_a_lack_of_room_ends_the_process(error, expected):
    assert no_room(error) is expected


def test_errors_about_data_and_files_are_not_told():
    for error in (
        DataError("case Mueller_07"),
        StoreError("site-a/store"),
        ValueError("Mueller_07"),
    ):
        assert speakable(error).startswith(f"{type(error).__name__}; the reason stands in")
        assert str(error) not in speakable(error)


@pytest.mark.parametrize("kind", [ExchangeError, TrainingError])
def test_errors_about_the_exchange_are_told_at_a_bounded_length(kind):
    assert speakable(kind("round 3 " + "x" * 1000)) == "round 3 " + "x" * 292
