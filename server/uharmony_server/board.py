"""What the coordinator's processes say of themselves, in small files: the source of `status`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import StoreError
from uharmony_model.frozen import Frozen
from uharmony_server.admission import Refusal
from uharmony_server.checkpoint import Checkpoint

_MAX_BYTES = 1 << 22
_LAST_REFUSALS = 100

State = Literal["starting", "gathering", "running", "paused", "waiting", "finished"]


class Board(Frozen):
    """run/status.json. Times are seconds since 1970; `awaited` maps a site to since when.

    `heads` are the ledger heads that the sites have sent last, as `seq:sha256`.
    """

    state: State = "starting"
    study: str = ""
    round: NonNegativeInt = 0
    rounds: NonNegativeInt = 0
    round_started: float = 0
    weights: str = ""
    online: tuple[str, ...] = ()
    awaited: dict[str, float] = Field(default_factory=dict)
    refusals: Annotated[tuple[Refusal, ...], Field(max_length=_LAST_REFUSALS)] = ()
    counted: tuple[str, ...] = ()
    heads: dict[str, str] = Field(default_factory=dict)
    note: str = ""
    updated: float = 0


class BoardWriter:
    """Keeps run/status.json up to date; changes at most twice a second reach the disk."""

    def __init__(self, path: Path, first: Board) -> None:
        self._path, self._board, self._written = path, first, 0.0
        self._lock = threading.Lock()
        self.change()

    def change(self, **values: object) -> None:
        """Set some values and write at once."""
        with self._lock:
            self._board = self._board.model_copy(update=values)
            self._write()

    def round_done(self, state: Checkpoint) -> None:
        """Note what a round's checkpoint says."""
        self.change(
            round=state.round,
            round_started=time.time(),
            weights=state.digest,
            refusals=state.refusals[-_LAST_REFUSALS:],
            counted=state.counted[-1] if state.counted else (),
            heads={site: f"{head.seq}:{head.sha256}" for site, head in state.heads.items()},
        )

    def waiting(self, awaited: Mapping[str, float], online: Iterable[str]) -> None:
        """Note who is connected and whose answer is missing since when."""
        now = tuple(online), {site: round(since, 1) for site, since in awaited.items()}
        with self._lock:
            changed = now[0] != self._board.online or set(now[1]) != set(self._board.awaited)
            if changed or time.time() - self._written > 1.0:
                self._board = self._board.model_copy(update={"online": now[0], "awaited": now[1]})
                self._write()

    def _write(self) -> None:
        self._written = time.time()
        board = self._board.model_copy(update={"updated": self._written})
        with suppress(StoreError):  # a full disk must not end the work for the sake of `status`
            write_atomic(self._path, json.dumps(board.model_dump(mode="json")).encode())


def read_board(path: Path) -> Board | None:
    """What the coordinator said last, or None when it never ran or its file is damaged."""
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        return Board.model_validate_json(path.read_bytes())
    except ValidationError:
        return None
