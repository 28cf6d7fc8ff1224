"""`uharmony-server`: the coordinator's commands. All but `start` work while it runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.joining import JoinCode
from uharmony_model.frozen import parse
from uharmony_server.registry import Registry
from uharmony_server.server_folder import ServerConfig, ServerFolder
from uharmony_service.command_line import run as run_command
from uharmony_service.keys import certificate_digest, load_certificate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Coordinate one study: invite sites, run its rounds, hand out the model.",
)
Folder = Annotated[Path, typer.Option("--dir", help="the coordinator's folder of this study")]
HERE = Path()


@app.command()
def init(
    study: Annotated[Path, typer.Argument(help="study.yaml")],
    folder: Folder,
    address: Annotated[
        str, typer.Option(help="HOST:PORT under which the sites reach this machine")
    ] = "localhost:8443",
    listen: Annotated[str, typer.Option(help="address to open here; all by default")] = "0.0.0.0",  # noqa: S104
    deadline_minutes: Annotated[
        float | None, typer.Option(help="close a round after this; never when left out")
    ] = None,
) -> None:
    """Make the folder of a study: authority, certificates, settings. Nothing is overwritten."""
    given = {"address": address, "listen": listen, "deadline_minutes": deadline_minutes}
    config = parse(ServerConfig, given, "init")
    made = ServerFolder.create(study, folder, config)
    console = Console()
    console.print(f"study      {made.study.name}  {made.study.digest}", highlight=False)
    console.print(f"folder     {folder}  (settings: server.yaml)", highlight=False)
    console.print("next       uharmony-server invite SITE --dir " + str(folder), highlight=False)


@app.command()
def invite(
    site: Annotated[str, typer.Argument(help="name of the site")],
    folder: Folder = HERE,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="how long the code is good")
    ] = None,
) -> None:
    """Print a code with which one site can join once. Hand it over on a channel you trust."""
    opened = ServerFolder.open(folder)
    registry = Registry(opened.invites, opened.sites)
    token, expires = registry.invite(site, hours or opened.config.invite_hours)
    ca = certificate_digest(load_certificate(opened.ca_certificate))
    code = JoinCode(address=opened.config.address, ca_sha256=ca, token=token, expires=expires)
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expires))
    print(f"For {site}, good until {until}, once:", file=sys.stderr)
    print(code.to_text())


@app.command()
def start(
    folder: Folder = HERE,
    health_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="gRPC health service on 127.0.0.1")
    ] = None,
) -> None:
    """Run the study until its last round is done; start it again to go on after any stop."""
    from uharmony_server.board import Board
    from uharmony_server.service import serve
    from uharmony_service.board import read_board

    opened = ServerFolder.open(folder)
    opened.check_study()
    print(
        f"serving study {opened.study.name} on {opened.config.listen}:{opened.config.listen_port}; "
        f"logs in {opened.log}",
        flush=True,
    )
    board = read_board(opened.run / "status.json", Board)
    if board is not None and board.state == "finished":
        print("this study is finished; its report and model are written again", flush=True)
    code = serve(opened, health_port=health_port, say=lambda text: print(text, flush=True))
    board = read_board(opened.run / "status.json", Board)
    if code == 0 and board is not None and board.state == "finished":
        print(f"report {opened.path / 'report.html'}", flush=True)
    sys.exit(code)


@app.command()
def status(
    folder: Folder = HERE,
    json_: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Show sites, round, who is awaited and since when, and what was refused."""
    from uharmony_server.status import status_json, status_view

    opened = ServerFolder.open(folder)
    if json_:
        print(status_json(opened))
    else:
        Console().print(status_view(opened))


@app.command()
def pause(folder: Folder = HERE) -> None:
    """Begin no further round; the one under way is finished."""
    opened = ServerFolder.open(folder)
    write_atomic(opened.run / "paused", b"")
    print("paused: the round under way is finished, no other begins")


@app.command()
def resume(folder: Folder = HERE) -> None:
    """Go on after `pause`."""
    opened = ServerFolder.open(folder)
    (opened.run / "paused").unlink(missing_ok=True)
    print("going on")


@app.command()
def revoke(site: Annotated[str, typer.Argument()], folder: Folder = HERE) -> None:
    """Shut a site out for good, within a second, also in the middle of a round."""
    opened = ServerFolder.open(folder)
    if Registry(opened.invites, opened.sites).revoke(site) is None:
        print(f"{site} had not joined; its invitation is withdrawn")
    else:
        print(f"{site} is revoked; a new invitation lets it join again with new keys")


@app.command()
def report(folder: Folder = HERE) -> None:
    """Write results.json and report.html from the last checkpoint."""
    from uharmony_server.publish import write_outcome

    opened = ServerFolder.open(folder)
    write_outcome(opened, _latest(opened))
    print(f"report {opened.path / 'report.html'}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="folder to write the model to")],
    folder: Folder = HERE,
) -> None:
    """Write the shared model of the last checkpoint, for `uharmony-predict`."""
    from uharmony_server.export import export_model

    opened = ServerFolder.open(folder)
    export_model(_latest(opened), opened.study, model)
    print(f"model {model}")


def _latest(folder: ServerFolder):  # type: ignore[no-untyped-def]  # its type would import torch
    from uharmony_model.initial import initial_weights
    from uharmony_server.checkpoint import read_latest

    schema, _ = initial_weights(folder.study)
    state = read_latest(folder.rounds, folder.study.digest, schema)
    if state is None:
        raise ConfigError(f"{folder.path}: no round is done yet; start the service first")
    return state


def main() -> None:
    """The console command."""
    run_command(app)


if __name__ == "__main__":
    main()
