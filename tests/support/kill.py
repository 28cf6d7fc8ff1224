"""A process that is killed, in the test's own process: from the n-th system call on, nothing works.

Clean-up code runs too, as it would not after a kill, but it cannot change a file any more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

CHANGES_FILES = (
    "open",
    "fdopen",
    "fchmod",
    "fsync",
    "rename",
    "replace",
    "mkdir",
    "unlink",
    "rmdir",
)


class Killed(BaseException):
    """No `except Exception` sees it."""


class Countdown:
    """Counts system calls that change files, and fails all of them from number `at` on."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def step(self) -> None:
        self.calls += 1
        if self.calls > self.at:
            raise Killed


@contextmanager
def killed_at(at: int) -> Iterator[Countdown]:
    """Within this block only the first `at` calls succeed; swallows the kill."""
    countdown = Countdown(at)

    def limited(call):
        def wrapper(*args, **kwargs):
            countdown.step()
            return call(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES_FILES:
            patch.setattr(os, name, limited(getattr(os, name)))
        with suppress(Killed):
            yield countdown
