"""The rounds of one study: ask, admit, aggregate, measure, write down; then the next.

A round is complete when its checkpoint is on disk; an interrupted one is asked again. Sites
answer what they have already done from their own store, so nothing is trained twice and the
result is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from torch import Tensor

from uharmony_model.exchange.schema import Schema
from uharmony_model.study import Study
from uharmony_server.checkpoint import Checkpoint, load_latest, save
from uharmony_server.strategy import HarmonyStrategy

OnRound = Callable[[Checkpoint], None]


def run_rounds(
    study: Study,
    schema: Schema,
    initial: Tensor,
    grid: Grid,
    folder: Path,
    *,
    timeout: float | None = None,
    on_round: OnRound | None = None,
) -> Checkpoint:
    """Run a study to its last round from wherever `folder` says it stands.

    Raises:
        QuorumError: too few sites joined, or too few answered in a round.
        StoreError: the folder holds another study.
    """
    state = load_latest(folder, study.digest, schema)
    if state is None:
        state = Checkpoint(round=0, global_=initial, schema=schema, study=study.digest)
    strategy = HarmonyStrategy(study, state)
    if strategy.state.round >= study.training.rounds:
        return strategy.state
    strategy.greet(grid, timeout=timeout)
    nothing = ConfigRecord()
    for round_ in range(strategy.state.round + 1, study.training.rounds + 1):
        asked = strategy.configure_train(round_, strategy.arrays(), nothing, grid)
        arrays, _ = strategy.aggregate_train(round_, grid.send_and_receive(asked, timeout=timeout))
        if arrays is not None and strategy.splits_due(round_):
            asked = strategy.configure_evaluate(round_, arrays, nothing, grid)
            strategy.aggregate_evaluate(round_, grid.send_and_receive(asked, timeout=timeout))
        save(folder, strategy.state)
        if on_round is not None:
            on_round(strategy.state)
    return strategy.state
