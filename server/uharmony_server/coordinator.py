"""The process that runs the rounds: it asks the sites, admits, aggregates and writes down.

It is a child of the service. Killed at any moment and started again, it goes on with the round
after the last checkpoint; sites answer what they have done already from their stores.
"""

from __future__ import annotations

import argparse
import base64
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from uharmony_model.errors import QuorumError, StoreError
from uharmony_model.initial import initial_weights
from uharmony_model.participation import Participation, dump
from uharmony_server.board import Board, CoordinatorBoard
from uharmony_server.checkpoint import Checkpoint, read_latest
from uharmony_server.link import LinkSession
from uharmony_server.link_grid import LinkGrid, Waiting
from uharmony_server.publish import publish
from uharmony_server.registry import Registry
from uharmony_server.rounds import Last, Patience, run_rounds
from uharmony_server.server_folder import ServerFolder
from uharmony_service.command_line import run_process
from uharmony_service.loopback import read_secret
from uharmony_service.runtime import require_flower
from uharmony_service.supervision import end_with_parent

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5
_ASK_AGAIN_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 300.0


class Members:
    """The enrolled sites that are not revoked, with their node keys; read again when changed."""

    def __init__(self, folder: ServerFolder) -> None:
        self._registry = Registry(folder.invites, folder.sites)
        self._seen: object = None
        self._looked = 0.0
        self._keys: dict[str, bytes] = {}

    def __call__(self) -> Mapping[str, bytes]:
        """Site to node key (PEM)."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            seen = self._registry.signature()
            if seen != self._seen:
                self._keys = {
                    site: base64.b64decode(found.node_key)
                    for site, found in self._registry.enrolments().items()
                    if found.revoked_at is None
                }
                self._seen = seen
        return self._keys


def coordinate(folder: ServerFolder, port: int) -> Checkpoint:
    """Run the folder's study to its end over the SuperLink at this loopback port.

    Raises:
        StoreError: a checkpoint cannot be written or read; the last one is untouched.
    """
    study, members = folder.study, Members(folder)
    board = CoordinatorBoard(
        folder.run / "status.json",
        Board(study=study.digest, rounds=study.training.rounds),
    )
    link = LinkSession(
        f"127.0.0.1:{port}",
        read_secret(folder.loopback_secret),
    )
    deadline = folder.config.deadline_minutes
    absent = folder.config.absent_minutes
    limits = Waiting(
        deadline=None if deadline is None else 60 * deadline,
        absent=None if absent is None else 60 * absent,
    )
    grid = LinkGrid(link, members, limits, board)
    needed = study.federation.min_sites

    pause = _ASK_AGAIN_SECONDS

    def before_round(round_: int) -> None:
        while (folder.run / "paused").exists() or len(members()) < needed:
            paused = (folder.run / "paused").exists()
            board.change(
                state="paused" if paused else "gathering",
                note="" if paused else f"{len(members())} of {needed} sites have joined",
            )
            grid.tend()
            time.sleep(_LOOK_SECONDS)
        board.change(state="running", note="", round_started=time.time())

    def before_last(what: Last) -> None:
        while (folder.run / "paused").exists():
            board.change(state="paused", note="")
            grid.tend()
            time.sleep(_LOOK_SECONDS)
        board.change(state=what, note="", round_started=time.time())

    def missed(round_: int, error: QuorumError) -> None:
        nonlocal pause
        log.warning("%s; asking again in %.0f s", error, pause)
        board.change(state="waiting", note=str(error)[:500])
        end = time.monotonic() + pause
        while time.monotonic() < end:
            grid.tend()
            time.sleep(_LOOK_SECONDS)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def counted(state: Checkpoint) -> None:
        nonlocal pause
        pause = _ASK_AGAIN_SECONDS
        _note(folder, board, state)
        _hand_out_early(folder, state)

    schema, initial = initial_weights(study)
    known = read_latest(folder.rounds, study.digest, schema)
    if known is not None:
        board.round_done(known)
        _hand_out_early(folder, known)
    board.change(state="gathering")
    link.open(members())
    state = run_rounds(
        study,
        schema,
        initial,
        grid,
        folder.rounds,
        on_round=counted,
        patience=Patience(
            certified=grid.site_of,
            online=grid.online,
            late=grid.take_late,
            before_round=before_round,
            missed=missed,
            before_last=before_last,
            # At its end a site may train alone what it trained with the others, and then some.
            finale_timeout=limits.deadline and limits.deadline * (study.training.rounds + 2),
        ),
    )
    _note(folder, board, state)
    publish(folder, state)
    board.change(state="finished", online=(), awaited={})
    link.close()
    return state


def _note(folder: ServerFolder, board: CoordinatorBoard, state: Checkpoint) -> None:
    board.round_done(state)
    dump(folder.path / "participation.json", participation_of(state))


def _hand_out_early(folder: ServerFolder, state: Checkpoint) -> None:
    """Report and model as soon as the last round is done: what follows may wait for sites."""
    if state.round < folder.study.training.rounds:
        return
    try:
        publish(folder, state)
    except StoreError as error:  # at the end it is written again, and then it must be
        log.warning("not handed out yet: %s", error)


def participation_of(state: Checkpoint) -> Participation:
    """Which sites counted and trained in each round: what repeats this run in one process."""
    found = Participation()
    for round_, counted in enumerate(state.counted, start=1):
        in_vain = [site for number, site in state.uncounted if number == round_]
        found = found.with_round(round_, counted, in_vain)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m uharmony_server.coordinator`: started by the service, not by hand."""
    end_with_parent()
    require_flower()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("port", type=int)
    given = parser.parse_args(arguments)
    # Sums of the same order on any number of threads; one leaves the machine to the others.
    torch.set_num_threads(1)
    coordinate(ServerFolder.open(given.folder), given.port)


if __name__ == "__main__":
    run_process(main)
