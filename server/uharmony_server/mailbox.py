"""Where the gateway, which faces the network, leaves requests for the registrar, which does not.

One file a request and one an answer, under a random name. The authority's key is only on the
registrar's side.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from uharmony_model.atomic import write_atomic
from uharmony_model.exchange.canonical import Digest, canonical_json
from uharmony_model.exchange.joining import EnrolmentAnswer, EnrolmentRequest, RenewalRequest
from uharmony_model.frozen import Frozen
from uharmony_model.task import Name

MAX_LETTER_BYTES = 1 << 17
STALE_SECONDS = 120.0
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_logger = logging.getLogger(__name__)


class Errand(Frozen):
    """One request; `site` and `tls_key` are who the gateway found the caller to be."""

    kind: Literal["enrol", "renew", "leave"]
    site: Name | None = None
    tls_key: Digest | None = None
    enrol: EnrolmentRequest | None = None
    renew: RenewalRequest | None = None


class Outcome(Frozen):
    """The registrar's answer: an HTTP status, with what was granted or why it was refused."""

    status: Annotated[int, Field(ge=200, le=599)]
    answer: EnrolmentAnswer | None = None
    detail: Annotated[str, Field(max_length=1000)] = ""


Letter = TypeVar("Letter", Errand, Outcome)


class Mailbox:
    """The two folders."""

    def __init__(self, requests: Path, answers: Path) -> None:
        self._requests = requests
        self._answers = answers

    def put(self, errand: Errand) -> str:
        """Leave a request; the name under which its answer will come.

        Raises:
            StoreError: the folder cannot be written.
        """
        name = secrets.token_hex(16)
        write_atomic(self._requests / f"{name}.json", canonical_json(errand).encode())
        return name

    def take(self, name: str) -> Outcome | None:
        """Take the answer to a request, if it is there."""
        path = self._answers / f"{name}.json"
        outcome = _read(path, Outcome)
        if outcome is not None:
            path.unlink(missing_ok=True)
        return outcome

    def withdraw(self, name: str) -> None:
        """Take back a request nobody waits for any more, with its answer."""
        for folder in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                (folder / f"{name}.json").unlink(missing_ok=True)

    def pending(self) -> Iterator[tuple[str, Errand]]:
        """The requests that wait; one that cannot be read is thrown away."""
        for path in sorted(self._requests.glob("[!.]*.json")):
            errand = _read(path, Errand) if _ID.fullmatch(path.stem) else None
            if errand is None:
                path.unlink(missing_ok=True)
            else:
                yield path.stem, errand

    def answer(self, name: str, outcome: Outcome) -> None:
        """Leave the answer and take the request away, in this order.

        Raises:
            StoreError: the folder cannot be written.
        """
        write_atomic(self._answers / f"{name}.json", canonical_json(outcome).encode())
        (self._requests / f"{name}.json").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Throw away what nobody waits for any more."""
        old = time.time() - STALE_SECONDS
        for folder in (self._requests, self._answers):
            for path in folder.iterdir():
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < old:
                        path.unlink()


def _read(path: Path, kind: type[Letter]) -> Letter | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_LETTER_BYTES + 1)
        if len(content) <= MAX_LETTER_BYTES:
            return kind.model_validate_json(content, strict=True)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        pass
    _logger.warning("a letter of the mailbox could not be read and is ignored")
    return None
