"""Cases by number: the row of the table and a short keyed hash, so that a list can be handed on.

The key stays in the site's store. Without it nobody can find out which name a hash belongs to by
trying names.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

from uharmony_client.case_table import CaseTable
from uharmony_client.check.findings import Detail
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import StoreError

_KEY_FILE = "check.key"
_KEY_BYTES = 32


def site_key(store: Path) -> bytes:
    """The store's key, made at first use; one for this run alone where it cannot be written."""
    path = store / _KEY_FILE
    try:
        if path.is_file() and path.stat().st_size == _KEY_BYTES:
            return path.read_bytes()
        key = secrets.token_bytes(_KEY_BYTES)
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, key)
    except (OSError, StoreError):
        return secrets.token_bytes(_KEY_BYTES)
    return key


class Pseudonyms:
    """`case 7 (a3f19c)` for every case of a table; rows count from 1, as the table has them."""

    def __init__(self, table: CaseTable, key: bytes, *, reveal: bool = False) -> None:
        self._reveal = reveal
        self._names: Mapping[str, str] = {
            case.case: f"case {row} ({_short(key, case.case)})"
            for row, case in enumerate(table.cases, 1)
        }

    def of(self, case: str) -> str:
        """The pseudonym of a case."""
        return self._names[case]

    def detail(self, case: str, text: str) -> Detail:
        """A place in a case; with the case's name only where it was asked for."""
        return Detail(self._names[case], text, case if self._reveal else None)


def _short(key: bytes, name: str) -> str:
    return hmac.new(key, name.encode(), hashlib.sha256).hexdigest()[:6]
