"""`uharmony-client --site X`: the service of a site, and all its people want to know of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console

from uharmony_client import ledger_commands, results_commands
from uharmony_client.home import Home
from uharmony_client.results_commands import Json
from uharmony_client.site_config import SiteConfig
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.joining import JoinCode
from uharmony_model.frozen import parse
from uharmony_model.study import Study, load_study
from uharmony_service.command_line import run as run_command

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    help="A hospital's side of a study. Without a command: run the service of the site.",
)
app.add_typer(ledger_commands.app, name="ledger")

_TEMPLATE = """# What only this hospital knows; nothing of this file is ever sent.
name: {name}
cases: {cases}          # a case table (.csv), or a folder in a known layout
store: {store}
# labels: none          # learn from no label here, or from those of so many patients
# annotated: [lesion]   # the study's classes that are drawn here; all of them when left out
# modality_map: {{t1: T1}}
# label_map: {{2: 1}}
policy:
  min_cases: 11         # numbers over fewer cases do not leave; 1 switches this off
  # statistics: [amplitude]   # averages over patients that a study without labels may ask for
resources:
  checkpoint_steps: 50  # a power cut costs at most this many steps
"""


@app.callback()
def service(
    context: typer.Context,
    site: Annotated[
        str | None,
        typer.Option(help="the site's name, or its site.yaml or its folder; not for extend"),
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="gRPC health service on 127.0.0.1")
    ] = None,
) -> None:
    """Run the service of the site when no command is given."""
    context.obj = site
    if context.invoked_subcommand == "extend":  # works on a model's folder, wherever that is
        return
    if site is None:
        raise click.UsageError("Missing option '--site'.", context)
    if context.invoked_subcommand is not None:
        return
    from uharmony_client.service import serve

    home = Home.find(site)
    member = home.membership()
    print(
        f"site {home.config.name}: study {member.study[:16]} at {member.address}; "
        f"logs in {home.log}",
        flush=True,
    )
    code = serve(home, health_port=health_port, say=lambda text: print(text, flush=True))
    if code == 0:
        print("the service has ended", flush=True)
    sys.exit(code)


@app.command()
def init(
    context: typer.Context,
    cases: Annotated[Path, typer.Option(help="case table or folder of volumes")],
    store: Annotated[
        Path | None, typer.Option(help="where this site keeps everything of its own")
    ] = None,
) -> None:
    """Write a commented site.yaml into a folder named as the site."""
    name = str(context.obj)
    target = Path(name) / "site.yaml"
    if target.exists():
        raise ConfigError(f"{target}: exists; edit it, or choose another --site")
    # Quoted as JSON, which YAML reads too: a path may hold any character.
    places = {"cases": str(cases.absolute()), "store": str(store.absolute()) if store else "store"}
    parse(SiteConfig, {"name": name, **places}, f"--site {name!r:.80}")
    text = _TEMPLATE.format(name=name, **{key: json.dumps(path) for key, path in places.items()})
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, text.encode())
    Home.find(str(target))
    print(f"wrote {target}; next: uharmony-client --site {name} check")


@app.command()
def join(
    context: typer.Context,
    code: Annotated[str, typer.Argument(help="the word that the coordinator handed over")],
    approve: Annotated[
        str | None, typer.Option(help="approve the study with this digest without asking")
    ] = None,
) -> None:
    """Look at a study, approve it, and enrol; keys are made here and stay here."""
    from uharmony_client.join import join as enrol
    from uharmony_client.join import study_view

    home, console = Home.find(context.obj), Console()

    def decide(study: Study) -> bool:
        console.print(study_view(study, home))
        if approve is not None:
            if approve != study.digest:
                raise ConfigError(
                    f"--approve {approve:.64}: the coordinator's study is {study.digest}; "
                    "look at it before you approve it"
                )
            return True
        return typer.confirm("Approve this study for this site?")

    study = enrol(home, JoinCode.from_text(code), decide)
    print(f"{home.config.name} has joined {study.name}; next: uharmony-client --site {context.obj}")


@app.command()
def check(
    context: typer.Context,
    study: Annotated[
        Path | None, typer.Option(help="study.yaml; the approved study when left out")
    ] = None,
    connect: Annotated[
        bool, typer.Option("--connect", help="test the connection to the coordinator too")
    ] = False,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="show names of cases, for your eyes")
    ] = False,
    json_: Json = False,
) -> None:
    """Look at the data and the machine before anything is trained. Contacts nobody by itself."""
    from uharmony_client.check import render, run_check
    from uharmony_client.connection import reach

    home, console = Home.find(context.obj), Console()
    known = load_study(study)[0] if study else home.study() if home.joined else None
    with console.status("looking at the cases") as status:
        report = run_check(
            home.config,
            known,
            on_case=lambda name, number, count: status.update(f"case {number + 1} of {count}"),
            connection=(lambda: reach(home)) if connect else None,
            reveal=reveal,
        )
    if json_:
        print(report.to_json())
    else:
        console.print(render(report))
    sys.exit(report.exit_code)


@app.command("dry-run")
def dry_run(
    context: typer.Context,
    study: Annotated[
        Path | None, typer.Option(help="study.yaml; the approved study when left out")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="fewer steps than a round")] = None,
    json_: Json = False,
) -> None:
    """Train one round with the network blocked, and show exactly what would leave."""
    from uharmony_client.dry_run import dry_run as run_dry
    from uharmony_client.dry_run import render
    from uharmony_client.site import Site

    home = Home.find(context.obj)
    known = load_study(study)[0] if study else home.study()
    found = run_dry(Site.open(home.config, known), steps)
    if json_:
        print(found.to_json())
    else:
        Console().print(render(found))


@app.command()
def status(context: typer.Context, json_: Json = False) -> None:
    """Show what the service does, since when, and how long the certificate is good."""
    from uharmony_client.site_status import status_json, status_view

    home = Home.find(context.obj)
    if json_:
        print(status_json(home))
    else:
        Console().print(status_view(home))


app.command()(results_commands.evaluate)
app.command()(results_commands.report)


@app.command()
def extend(
    model: Annotated[Path, typer.Argument(help="folder of a finished model")],
    cases: Annotated[Path, typer.Option(help="labelled cases: a table, or a folder of volumes")],
    name: Annotated[str, typer.Option(help="of the new domain; --site of uharmony-predict")],
    out: Annotated[Path, typer.Option(help="folder for the extended model")],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME=VALUE", help="a new class and its label value"),
    ] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=POLICY", help="a new modality: MR=zscore, CT=window,low=-160,high=240"
        ),
    ] = None,
    annotated: Annotated[
        str | None,
        typer.Option(metavar="CLASS,...", help="classes that are drawn in the cases; else all"),
    ] = None,
    channels: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="modalities of the cases, where they name none"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="of training")] = 200,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="replace an earlier model")] = False,
) -> None:
    """Add a domain to a trained model, and a class or modality if asked; the old outputs stay."""
    from uharmony_client.device import choose_device
    from uharmony_client.extend import extend as run_extend

    made = run_extend(
        model,
        cases,
        out,
        name=name,
        device=choose_device(device),
        classes=classes or (),
        modalities=modality or (),
        annotated=annotated.split(",") if annotated is not None else (),
        channels=channels.split(",") if channels else (),
        steps=steps,
        force=force,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    for line in made.lines:
        print(line)
    print(f"wrote {out}; next: uharmony-predict {out} VOLUME --site {name}")


@app.command()
def backup(context: typer.Context, archive: Annotated[Path, typer.Argument()]) -> None:
    """Write keys, generations, ledger and models of the site to one file. Keep it as a key."""
    from uharmony_client.backup import backup as write_backup

    home = Home.find(context.obj)
    with home.only_one():
        found = write_backup(home.config.store, archive)
    print(
        f"{archive}: {found.files} files, {found.bytes} bytes; it holds the site's keys "
        "and may hold parts of images"
    )


@app.command()
def restore(context: typer.Context, archive: Annotated[Path, typer.Argument()]) -> None:
    """Bring a backup back into an empty store."""
    from uharmony_client.backup import restore as read_backup

    home = Home.find(context.obj)
    found = read_backup(archive, home.config.store)
    print(f"{home.config.store}: {found.files} files restored")


@app.command()
def leave(
    context: typer.Context,
    purge: Annotated[
        bool, typer.Option("--purge", help="delete all generations, models and evaluations here")
    ] = False,
) -> None:
    """Leave the study: the coordinator shuts this site out. The ledger always stays."""
    from uharmony_client.leave import leave as end

    home = Home.find(context.obj)
    with home.only_one():
        for line in end(home, purge=purge):
            print(line)


def main() -> None:
    """The console command."""
    run_command(app)


if __name__ == "__main__":
    main()
