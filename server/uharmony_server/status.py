"""`uharmony-server status`: who is there, which round, who is awaited and since when."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uharmony_server.board import Board
from uharmony_server.registry import Enrolment, Registry
from uharmony_server.server_folder import ServerFolder
from uharmony_service.board import read_board
from uharmony_service.lock import is_held

_SHOWN_REFUSALS = 10
_LAST_STEPS = {
    "finale": "sites take their last steps at home",
    "publishing": "sites are asked what they publish",
}


def status_json(folder: ServerFolder) -> str:
    """Everything that `status` knows, for machines."""
    board, sites, gateway = _facts(folder)
    return json.dumps(
        {
            "study": folder.study.name,
            "digest": folder.study.digest,
            "serving": is_held(folder.run),
            "board": board.model_dump(mode="json"),
            "sites": {
                name: {
                    "enrolled_at": site.enrolled_at,
                    "certificate_expires": site.expires,
                    "revoked_at": site.revoked_at,
                    "online": name in board.online,
                    "awaited_since": board.awaited.get(name),
                }
                for name, site in sites.items()
            },
            "invited": sorted(_invited(folder) - set(sites)),
            "gateway": gateway,
        },
        indent=1,
    )


def status_view(folder: ServerFolder) -> RenderableType:
    """The same for a terminal."""
    board, sites, gateway = _facts(folder)
    serving = is_held(folder.run)
    head = Table.grid(padding=(0, 2))
    head.add_row("study", f"{folder.study.name}  {folder.study.digest[:16]}")
    head.add_row("service", "running" if serving else "not running")
    head.add_row("state", board.state + (f": {board.note}" if board.note else ""))
    head.add_row("round", f"{board.round} of {folder.study.training.rounds} done")
    if board.state in ("running", "waiting") and serving:
        head.add_row("", f"the next one runs since {_ago(board.round_started)}")
    if board.state in _LAST_STEPS and serving:
        head.add_row("", f"{_LAST_STEPS[board.state]} since {_ago(board.round_started)}")
    if board.weights:
        head.add_row("weights", board.weights)
    table = Table(title="Sites", title_justify="left")
    for column in ("site", "connected", "in the last round", "awaited since", "certificate"):
        table.add_column(column)
    for name, site in sites.items():
        since = board.awaited.get(name)
        table.add_row(
            Text(name),
            "revoked" if site.revoked_at else "yes" if serving and name in board.online else "no",
            "yes" if name in board.counted else "no" if board.round else "",
            _ago(since) if serving and since else "",
            f"{(site.expires - time.time()) / 86400:.1f} days",
        )
    for name in sorted(_invited(folder) - set(sites)):
        table.add_row(Text(name), "invited", "", "", "")
    parts: list[RenderableType] = [head, table]
    if board.refusals:
        refused = Table(title="Last refusals", title_justify="left")
        for column in ("round", "site", "reason", "detail"):
            refused.add_column(column)
        for found in board.refusals[-_SHOWN_REFUSALS:]:
            refused.add_row(
                str(found.round), Text(found.site), found.reason.value, Text(found.detail)
            )
        parts.append(refused)
    if gateway:
        parts.append(Text(f"gateway: {json.dumps(gateway)}"))
    return Group(*parts)


def _facts(folder: ServerFolder) -> tuple[Board, Mapping[str, Enrolment], object]:
    board = read_board(folder.run / "status.json", Board) or Board()
    sites = Registry(folder.invites, folder.sites).enrolments()
    try:
        gateway = json.loads(folder.gateway_status.read_bytes()[:65536])
    except (OSError, ValueError):
        gateway = {}
    return board, sites, gateway


def _invited(folder: ServerFolder) -> set[str]:
    return {path.stem for path in folder.invites.glob("[!.]*.json")}


def _ago(since: float) -> str:
    seconds = int(max(0.0, time.time() - since))
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"
