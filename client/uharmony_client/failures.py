"""What a site makes of its own errors: which end the process, and what is said of the others."""

from __future__ import annotations

import torch

from uharmony_model.errors import ExchangeError, StoreError, TrainingError


def no_room(error: Exception) -> bool:
    """A full disk or memory passes; the site starts again and is asked again."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):
        return True
    return isinstance(error, StoreError) and isinstance(error.__cause__, OSError)


def speakable(error: Exception) -> str:
    """What the coordinator is told. Errors about data and files name cases and folders."""
    if isinstance(error, ExchangeError | TrainingError):
        return str(error)[:300]
    return f"{type(error).__name__}; the reason stands in the site's own log"
