"""`uharmony-client --site X status`: what the service does, and whether it can go on doing it."""

from __future__ import annotations

import json
import time

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from uharmony_client.home import Home
from uharmony_client.ledger import HEAD, parse_line
from uharmony_client.ledger_entry import SignedHead
from uharmony_client.site_board import SiteBoard
from uharmony_model.errors import StoreError
from uharmony_service.board import read_board
from uharmony_service.lock import is_held

_MAX_HEAD = 4096


def status_json(home: Home) -> str:
    """Everything that `status` knows, for machines."""
    return json.dumps(_facts(home), indent=1)


def status_view(home: Home) -> RenderableType:
    """The same for a terminal."""
    table = Table.grid(padding=(0, 2))
    for name, value in _facts(home).items():
        table.add_row(name.replace("_", " "), Text(str(value)))
    return table


def _facts(home: Home) -> dict[str, object]:
    facts: dict[str, object] = {"site": home.config.name, "joined": home.joined}
    if not home.joined:
        return facts
    member = home.membership()
    board = read_board(home.run / "status.json", SiteBoard) or SiteBoard()
    facts |= {
        "study": member.study,
        "coordinator": member.address,
        "service": "running" if is_held(home.run) else "not running",
        "state": board.state,
        "round": f"{board.round} of {board.rounds}",
    }
    if board.what and board.state in ("training", "evaluating"):
        facts["work"] = board.what
    if board.state == "training":
        at_home = board.what == "finale"
        facts["step"] = f"{board.step} of {board.finale_steps if at_home else board.steps}"
    if board.asked:
        facts["last_asked_seconds_ago"] = round(time.time() - board.asked)
    facts["cases"] = board.cases
    facts["quarantined"] = board.quarantined
    if board.note:
        facts["note"] = board.note
    try:
        days = (home.identity.expires() - time.time()) / 86400
        facts["certificate_days"] = round(days, 1)
    except StoreError as error:
        facts["certificate_days"] = str(error)
    facts["ledger_head"] = _ledger_head(home)
    return facts


def _ledger_head(home: Home) -> str:
    path = home.ledger / HEAD
    found = parse_line(SignedHead, path.read_bytes()[:_MAX_HEAD]) if path.is_file() else None
    return "" if found is None else f"entry {found.seq}, {found.sha256}"
