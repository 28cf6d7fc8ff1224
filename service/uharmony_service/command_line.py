"""Runs a typer app so that every ending is one line and a documented exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import NoReturn

import click
import typer

from uharmony_model.errors import ConfigError, UHarmonyError

INTERRUPTED = 130


def one_line(text: str, limit: int = 1000) -> str:
    """The text on one line, without control characters that a file name may have brought."""
    words = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in words)[:limit]


def run(app: typer.Typer) -> NoReturn:
    """Run the app and exit: 0, an error's own exit code with one line, or 130 after Ctrl-C."""
    # Typer's own tracebacks print local variables, which here are voxels and names of cases.
    app.pretty_exceptions_enable = False
    try:
        code = app(standalone_mode=False)
    except UHarmonyError as error:
        _end(str(error), error.exit_code)
    except click.ClickException as error:
        message = error.format_message()
        if "\n" in message:  # a whole help page, given when a command needs arguments
            error.show()
            sys.exit(ConfigError.exit_code)
        _end(f"{message} See --help.", ConfigError.exit_code)
    except MemoryError:
        _end("out of memory; use a smaller volume, patch or batch", UHarmonyError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _end("interrupted", INTERRUPTED)
    if code == INTERRUPTED:  # click turns a Ctrl-C inside a command into this code
        _end("interrupted", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def run_process(main: Callable[[], None]) -> NoReturn:
    """Run a service's child process; its ending is one line in its log and an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line a request
    try:
        main()
    except UHarmonyError as error:
        _end(str(error), error.exit_code)
    except MemoryError:
        _end("out of memory; use a smaller volume, patch or batch", UHarmonyError.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _end(message: str, code: int) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
