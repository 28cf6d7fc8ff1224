"""What the running service of a site says of itself, in one small file: the source of `status`."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, ValidationError

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import StoreError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.frozen import Frozen

_MAX_BYTES = 1 << 16

State = Literal["starting", "preparing", "waiting", "training", "evaluating", "finished", "failed"]
_WORK: dict[str, State] = {"train": "training", "evaluate": "evaluating"}


class SiteBoard(Frozen):
    """run/status.json. Times are seconds since 1970; `asked` is the last instruction's."""

    state: State = "starting"
    round: NonNegativeInt = 0
    rounds: NonNegativeInt = 0
    step: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    loss: float | None = None
    cases: NonNegativeInt = 0
    quarantined: NonNegativeInt = 0
    asked: float = 0
    note: str = ""
    updated: float = 0


class SiteBoardWriter:
    """Keeps run/status.json up to date; steps reach the disk at most once a second."""

    def __init__(self, path: Path, first: SiteBoard) -> None:
        self._path, self._board, self._written = path, first, 0.0
        self.change()

    def change(self, **values: object) -> None:
        """Set some values and write at once."""
        self._board = self._board.model_copy(update=values)
        self._write()

    def instruction(self, order: Instruction) -> None:
        """Note what is being asked."""
        state = _WORK.get(order.action, "waiting")
        self.change(state=state, round=order.round, step=0, asked=time.time())

    def step(self, site: str, round_: int, step: int, loss: float) -> None:
        """Note a step of training."""
        update: dict[str, object] = {"state": "training", "step": step + 1, "loss": loss}
        self._board = self._board.model_copy(update=update)
        if time.time() - self._written > 1:
            self._write()

    def idle(self) -> None:
        """Note that nothing is asked now, and that this process is alive."""
        busy = self._board.state in ("training", "evaluating", "starting", "preparing")
        if busy or time.time() - self._written > 5:
            self.change(state="waiting")

    def _write(self) -> None:
        self._written = time.time()
        board = self._board.model_copy(update={"updated": self._written})
        with suppress(StoreError):  # a full disk must not end the work for the sake of `status`
            write_atomic(self._path, json.dumps(board.model_dump(mode="json")).encode())


def read_site_board(path: Path) -> SiteBoard | None:
    """What the service said last, or None when it never ran or its file is damaged."""
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        return SiteBoard.model_validate_json(path.read_bytes())
    except ValidationError:
        return None
