"""What the coordinator's processes say of themselves, in small files: the source of `status`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from uharmony_server.admission import Refusal
from uharmony_server.checkpoint import Checkpoint
from uharmony_service.board import BoardWriter, Said

_LAST_REFUSALS = 100

State = Literal[
    "starting", "gathering", "running", "paused", "waiting", "finale", "publishing", "finished"
]


class Board(Said):
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


class CoordinatorBoard(BoardWriter[Board]):
    """Keeps run/status.json up to date."""

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
        there, missing = tuple(online), {site: round(t, 1) for site, t in awaited.items()}
        changed = there != self.said.online or missing.keys() != self.said.awaited.keys()
        self.change(at_most_every=0.0 if changed else 1.0, online=there, awaited=missing)
