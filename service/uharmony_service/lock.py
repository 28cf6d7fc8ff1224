"""One process at a time for a folder, and who asks whether there is one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uharmony_model.atomic import make_directory
from uharmony_model.errors import ConfigError


@contextmanager
def only_one(run: Path, message: str) -> Iterator[None]:
    """Hold the lock in the folder `run`; the kernel drops it however this process ends.

    Raises:
        ConfigError: with this message; another process holds it.
    """
    make_directory(run)
    descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(message) from None
    else:
        yield
    finally:
        os.close(descriptor)


def is_held(run: Path) -> bool:
    """Whether a process holds the lock now."""
    try:
        descriptor = os.open(run / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
