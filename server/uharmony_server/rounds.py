"""The rounds of one study: ask, admit, aggregate, measure, write down; then the next.

A round is complete when its checkpoint is on disk; an interrupted one is asked again. Sites
answer what they have already done from their own store, so nothing is trained twice and the
result is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from uharmony_model.errors import QuorumError
from uharmony_model.exchange.published import PublicationForm
from uharmony_model.exchange.schema import Schema
from uharmony_model.schedule import publication_due, splits_due
from uharmony_model.study import Study
from uharmony_server.checkpoint import Checkpoint, load_latest, save
from uharmony_server.roster import SiteOf
from uharmony_server.strategy import HarmonyStrategy

OnRound = Callable[[Checkpoint], None]
Late = tuple[str, int]  # site, round
Last = Literal["finale", "publishing"]  # what is done after the last round

_FAREWELL_SECONDS = 30.0
_FINALE_CALLS = 3


def _nothing_late() -> Iterable[Late]:
    return ()


@dataclass(frozen=True)
class Patience:
    """What rounds among real institutions need beyond those in one process.

    `certified` tells whose certificate a node has, `online` which nodes are there; `late` gives
    the updates that came after their rounds, once each; `before_round` may wait (a pause, too few
    sites); `missed` is told why a round did not count and waits before it is asked again.
    `before_last` may wait (a pause) before each call of the finale and before sites are asked to
    publish. A finale may take `finale_timeout` seconds: a site may train its model without anybody
    in it.
    """

    certified: SiteOf
    online: Callable[[], Iterable[int]] | None = None
    late: Callable[[], Iterable[Late]] = _nothing_late
    before_round: Callable[[int], None] = lambda round_: None
    missed: Callable[[int, QuorumError], None] = lambda round_, error: None
    before_last: Callable[[Last], None] = lambda what: None
    finale_timeout: float | None = None


def run_rounds(
    study: Study,
    schema: Schema,
    initial: Tensor,
    grid: Grid,
    folder: Path,
    *,
    timeout: float | None = None,
    on_round: OnRound | None = None,
    patience: Patience | None = None,
) -> Checkpoint:
    """Run a study to its last round from wherever `folder` says it stands.

    With `patience` a round without quorum is asked again, and new sites are greeted before each
    round; without, in one process, nobody else will come.

    Raises:
        QuorumError: too few sites joined, or too few answered in a round.
        StoreError: the folder holds another study.
        ConfigError: the study asks for prototypes in a frame that does not fit its network.
        NetworkError: it asks for statistics of features that its network does not show.
    """
    # Made before the first round: a frame that does not fit is known before anybody has trained.
    form = PublicationForm.of(study) if publication_due(study) else None
    state = load_latest(folder, study.digest, schema)
    if state is None:
        state = Checkpoint(round=0, global_=initial, schema=schema, study=study.digest)
    # Among institutions a site that was away may come back; in one process none is.
    calls = 0 if not study.finale.steps else 1 if patience is None else _FINALE_CALLS
    if patience is None:
        strategy = HarmonyStrategy(study, state)
        owes = (calls and not state.at_home) or (form is not None and state.published is None)
        if state.round < study.training.rounds or owes:
            strategy.greet(grid, timeout=timeout)
    else:
        strategy = HarmonyStrategy(
            study, state, certified=patience.certified, online=patience.online
        )
    while strategy.state.round < study.training.rounds:
        round_ = strategy.state.round + 1
        if patience is not None:
            patience.before_round(round_)
        try:
            if patience is not None:
                strategy.greet(grid, timeout=timeout)
            _one_round(strategy, round_, grid, timeout)
        except QuorumError as error:
            if patience is None:
                raise
            patience.missed(round_, error)
            continue
        finally:
            for site, late_round in () if patience is None else patience.late():
                strategy.late(site, late_round)
        save(folder, strategy.state)
        if on_round is not None:
            on_round(strategy.state)
    for call in range(calls):
        if patience is not None:
            patience.before_last("finale")
            with suppress(QuorumError):  # the others are asked when they come
                strategy.greet(grid, timeout=_FAREWELL_SECONDS)
        # Each was waited for once; a second time only whoever is there is.
        away = strategy.away() if call else frozenset()
        if strategy.all_at_home(away=away):
            break
        limit = timeout if patience is None else patience.finale_timeout
        asked = strategy.configure_finale(strategy.arrays(), away=away)
        strategy.aggregate_finale(grid.send_and_receive(asked, timeout=limit))
        save(folder, strategy.state)
        if on_round is not None:
            on_round(strategy.state)
    if form is not None:
        _publication(strategy, form, grid, folder, timeout, patience)
    if patience is not None:
        # Also after a restart: a kill may have come between the last round and the farewell.
        with suppress(QuorumError):
            strategy.greet(grid, timeout=_FAREWELL_SECONDS)
        strategy.farewell(grid, timeout=_FAREWELL_SECONDS)
    return strategy.state


def _one_round(strategy: HarmonyStrategy, round_: int, grid: Grid, timeout: float | None) -> None:
    nothing = ConfigRecord()
    asked = strategy.configure_train(round_, strategy.arrays(), nothing, grid)
    arrays, _ = strategy.aggregate_train(round_, grid.send_and_receive(asked, timeout=timeout))
    if arrays is not None and splits_due(strategy.study, round_):
        asked = strategy.configure_evaluate(round_, arrays, nothing, grid)
        strategy.aggregate_evaluate(round_, grid.send_and_receive(asked, timeout=timeout))


def _publication(
    strategy: HarmonyStrategy,
    form: PublicationForm,
    grid: Grid,
    folder: Path,
    timeout: float | None,
    patience: Patience | None,
) -> None:
    """Ask for what sites publish; once any has answered, no more: it is an offer."""
    if strategy.state.published is not None:
        return
    if patience is not None:
        patience.before_last("publishing")
        with suppress(QuorumError):
            strategy.greet(grid, timeout=_FAREWELL_SECONDS)
    asked = strategy.configure_publish(strategy.arrays())
    strategy.aggregate_publish(grid.send_and_receive(asked, timeout=timeout), form)
    save(folder, strategy.state)
