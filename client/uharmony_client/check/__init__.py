"""The doctor of a site: `run_check` looks, `render` and `Report` say what was found."""

from uharmony_client.check.machine import Connection, Reached
from uharmony_client.check.quarantine import load_quarantine, require_enough, without_quarantined
from uharmony_client.check.report import Report, render
from uharmony_client.check.run import run_check

__all__ = [
    "Connection",
    "Reached",
    "Report",
    "load_quarantine",
    "render",
    "require_enough",
    "run_check",
    "without_quarantined",
]
