"""What the coordinator does around the rounds: hands out early, pauses, says what goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor

from tests.support.tiny import write_study
from uharmony_model.errors import StoreError
from uharmony_model.exchange.schema import Schema
from uharmony_model.study import Study
from uharmony_server import coordinator, status
from uharmony_server.board import Board
from uharmony_server.checkpoint import Checkpoint, save
from uharmony_server.link_grid import LinkGrid
from uharmony_server.rounds import OnRound, Patience
from uharmony_server.server_folder import ServerConfig, ServerFolder
from uharmony_service.board import read_board

Rounds = Callable[[OnRound, Patience, Checkpoint], None]


class NoLink:
    """A SuperLink that nobody asks anything."""

    def __init__(self, *given: object) -> None:
        pass

    def open(self, members: object) -> None:
        """Nothing to open."""

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    study = write_study(tmp_path / "study.yaml", training={"rounds": 2})
    return ServerFolder.create(study, tmp_path / "d", ServerConfig(address="localhost:8443"))


@pytest.fixture
def coordinate(folder: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[[Rounds], object]:
    """The coordinator with these rounds in the place of real ones."""
    monkeypatch.setattr(coordinator, "LinkSession", NoLink)
    monkeypatch.setattr(coordinator, "read_secret", lambda path: "secret")
    monkeypatch.setattr(LinkGrid, "tend", lambda grid: [])

    def run(rounds: Rounds) -> object:
        def run_rounds(
            study: Study,
            schema: Schema,
            initial: Tensor,
            *given: object,
            on_round: OnRound,
            patience: Patience,
        ) -> Checkpoint:
            state = Checkpoint(round=2, global_=initial, schema=schema, study=study.digest)
            rounds(on_round, patience, state)
            return state

        monkeypatch.setattr(coordinator, "run_rounds", run_rounds)
        return coordinator.coordinate(folder, 1)

    return run


def board_of(folder: ServerFolder) -> Board:
    found = read_board(folder.run / "status.json", Board)
    assert found is not None
    return found


def out(folder: ServerFolder) -> bool:
    return (folder.model / "tiny" / "study.json").is_file() and (
        folder.path / "report.html"
    ).is_file()


def test_report_and_model_are_there_when_the_last_round_is(folder, coordinate):
    seen = []

    def rounds(on_round, patience, state):
        first = Checkpoint(round=1, global_=state.global_, schema=state.schema, study=state.study)
        on_round(first)
        seen.append(out(folder))
        on_round(state)
        seen.append(out(folder))

    coordinate(rounds)
    assert seen == [False, True]
    assert board_of(folder).state == "finished"


def test_after_a_restart_they_are_there_before_anybody_is_asked(folder, coordinate):
    def killed(on_round, patience, state):
        save(folder.rounds, state)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        coordinate(killed)
    assert not out(folder)
    seen: list[bool] = []
    coordinate(lambda on_round, patience, state: seen.append(out(folder)))
    assert seen == [True]


def test_a_full_disk_stops_the_end_and_not_what_comes_before(folder, coordinate, monkeypatch):
    tried = []

    def full(*given):
        tried.append(given)
        raise StoreError("disk full")

    monkeypatch.setattr(coordinator, "publish", full)
    with pytest.raises(StoreError, match="disk full"):
        coordinate(lambda on_round, patience, state: on_round(state))
    assert len(tried) == 2


@pytest.mark.parametrize("what", ["finale", "publishing"])
def test_a_pause_holds_it_and_status_says_what_goes_on(folder, coordinate, monkeypatch, what):
    (folder.run / "paused").touch()
    states = []

    def sleep(seconds: float) -> None:
        states.append(board_of(folder).state)
        if len(states) == 3:
            (folder.run / "paused").unlink()

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(status, "is_held", lambda run: True)

    def rounds(on_round, patience, state):
        patience.before_last(what)
        assert board_of(folder).state == what
        console = Console(width=120)
        with console.capture() as text:
            console.print(status.status_view(folder))
        assert "the next one runs" not in text.get()
        words = {"finale": "last steps at home since", "publishing": "what they publish since"}
        assert words[what] in text.get()

    coordinate(rounds)
    assert states == ["paused"] * 3
