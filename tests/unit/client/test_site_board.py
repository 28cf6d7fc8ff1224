"""What `status` says after the last round."""

from __future__ import annotations

import json

import pytest

from uharmony_client import site_status
from uharmony_client.home import Home
from uharmony_client.site_board import SiteBoard, SiteBoardWriter
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.joining import Membership


@pytest.fixture
def home(config, tmp_path, monkeypatch) -> Home:
    member = Membership(address="localhost:1", site="north", study="0" * 64, approved_at=0)
    monkeypatch.setattr(Home, "joined", True)
    monkeypatch.setattr(Home, "membership", lambda self: member)
    return Home(config, tmp_path / "site.yaml")


@pytest.fixture
def board(home) -> SiteBoardWriter:
    """Of a study of 32 rounds of 6 steps and a finale of 48."""
    home.run.mkdir(parents=True)
    return SiteBoardWriter(home.run / "status.json", SiteBoard(rounds=32, steps=6, finale_steps=48))


def order(action: str, round_: int) -> Instruction:
    return Instruction.model_construct(action=action, round=round_)


def facts(home: Home, board: SiteBoardWriter) -> dict[str, object]:
    board.change()  # steps reach the disk once a second only
    found = json.loads(site_status.status_json(home))
    return {key: found[key] for key in ("state", "round", "work", "step") if key in found}


def test_a_round_is_told_by_its_number_and_step(home, board):
    board.instruction(order("train", 7))
    board.step("north", 7, 3, 0.5)
    assert facts(home, board) == {"state": "training", "round": "7 of 32", "step": "4 of 6"}


def test_the_finale_is_no_round_33_and_has_its_own_steps(home, board):
    board.instruction(order("finale", 33))
    board.step("north", 33, 39, 0.5)
    expected = {"state": "training", "round": "32 of 32", "work": "finale", "step": "40 of 48"}
    assert facts(home, board) == expected


def test_the_local_only_model_of_a_finale_moves(home, board):
    board.instruction(order("finale", 33))
    board.step("north", 5, 2, 0.5)
    found = facts(home, board)
    assert found["work"] == "finale: local-only model, round 5"
    assert found["step"] == "3 of 6"
    board.step("north", 33, 9, 0.5)  # its own last steps
    assert facts(home, board)["step"] == "10 of 48"


def test_publishing_is_said_and_passes(home, board):
    board.instruction(order("publish", 34))
    expected = {"state": "evaluating", "round": "32 of 32", "work": "publishing"}
    assert facts(home, board) == expected
    board.idle()
    assert facts(home, board) == {"state": "waiting", "round": "32 of 32"}
