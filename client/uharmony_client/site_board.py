"""What the running service of a site says of itself, in one small file: the source of `status`."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import NonNegativeInt

from uharmony_model.exchange.instruction import Instruction
from uharmony_service.board import BoardWriter, Said

State = Literal["starting", "preparing", "waiting", "training", "evaluating", "finished", "failed"]
_WORK: dict[str, State] = {
    "train": "training",
    "evaluate": "evaluating",
    "finale": "training",
    "publish": "evaluating",
}


class SiteBoard(Said):
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


class SiteBoardWriter(BoardWriter[SiteBoard]):
    """Keeps run/status.json up to date; steps reach the disk at most once a second."""

    def instruction(self, order: Instruction) -> None:
        """Note what is being asked."""
        state = _WORK.get(order.action, "waiting")
        self.change(state=state, round=order.round, step=0, asked=time.time())

    def step(self, site: str, round_: int, step: int, loss: float) -> None:
        """Note a step of training."""
        self.change(at_most_every=1.0, state="training", step=step + 1, loss=loss)

    def idle(self) -> None:
        """Note that nothing is asked now, and that this process is alive."""
        waiting = self.said.state == "waiting"
        self.change(at_most_every=5.0 if waiting else 0.0, state="waiting")
