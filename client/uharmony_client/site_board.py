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
_AFTER = {"finale": "finale", "publish": "publishing"}


class SiteBoard(Said):
    """run/status.json. Times are seconds since 1970; `asked` is the last instruction's.

    `round` is at most `rounds`: what comes after the last round is said by `what`. `steps` are
    those of a round, `finale_steps` those of each model that is trained in the finale.
    """

    state: State = "starting"
    round: NonNegativeInt = 0
    rounds: NonNegativeInt = 0
    step: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    what: str = ""
    finale_steps: NonNegativeInt = 0
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
        what = _AFTER.get(order.action, "")
        round_ = min(order.round, self.said.rounds)
        self.change(state=state, round=round_, step=0, what=what, asked=time.time())

    def step(self, site: str, round_: int, step: int, loss: float) -> None:
        """Note a step of training; in a finale, of the rounds of the local-only model too."""
        what = self.said.what
        if what:
            alone = round_ <= self.said.rounds
            what = f"finale: local-only model, round {round_}" if alone else _AFTER["finale"]
        self.change(at_most_every=1.0, state="training", step=step + 1, what=what, loss=loss)

    def idle(self) -> None:
        """Note that nothing is asked now, and that this process is alive."""
        waiting = self.said.state == "waiting"
        self.change(at_most_every=5.0 if waiting else 0.0, state="waiting")
