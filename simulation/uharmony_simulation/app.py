"""`uharmony-simulate`: the federation in one process, on one GPU or a few cores."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from uharmony_model.allocator import keep_freed_pages
from uharmony_model.errors import ConfigError
from uharmony_model.methods import METHODS
from uharmony_model.participation import load
from uharmony_server.summary import summary_table
from uharmony_service.command_line import run as run_command
from uharmony_simulation.arms import Machine
from uharmony_simulation.compare import compare
from uharmony_simulation.lab import Places, run_lab
from uharmony_simulation.lab_config import load_lab
from uharmony_simulation.lab_publish import publish
from uharmony_simulation.progress import make_progress
from uharmony_simulation.run import run_study

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Run a federation in one process, with every baseline on the same splits and steps.",
)


class Engine(StrEnum):
    """Who runs the sites."""

    inprocess = "inprocess"
    ray = "ray"


class Output(StrEnum):
    """How progress is told."""

    auto = "auto"
    text = "text"
    json = "json"


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="study.yaml with a simulation: section")],
    out: Annotated[Path, typer.Option(help="folder for records, checkpoints and the report")],
    data: Annotated[
        Path | None, typer.Option(help="folder of volumes, for studies that read one")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help=f"one or more of: {', '.join(METHODS)}")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="one or more; the study's when left out")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="sites in turn in this process, or Ray workers")
    ] = Engine.inprocess,
    resume: Annotated[bool, typer.Option("--resume", help="go on with what is in --out")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch threads; all cores when left out")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    participation: Annotated[
        Path | None,
        typer.Option(help="repeat a run with the sites this record of it says took part"),
    ] = None,
    output: Annotated[
        Output, typer.Option(help="auto: bars on a terminal, else JSON lines")
    ] = Output.auto,
) -> None:
    """Run one or more arms of a study and write results.json, cases.csv and report.html."""
    unknown = sorted(set(arm or ()) - set(METHODS))
    if unknown:
        raise ConfigError(f"--arm {unknown[0]}: unknown; known are {', '.join(METHODS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: unknown; known are auto, cpu, cuda")
    record = None if participation is None else load(participation)
    keep_freed_pages()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = threads or cores or 1
    torch.set_num_threads(threads)
    parallel = max(1, (cores or 1) // threads)
    console = Console()
    with make_progress(console, output.value) as progress:
        records = run_study(
            study,
            out,
            data=data,
            arms=arm or (),
            seeds=seed or (),
            machine=Machine(threads, device, engine.value, parallel),
            resume=resume,
            progress=progress,
            participation=record,
        )
        progress.finished(out / "results.json", out / "report.html")
    if output is Output.json or (output is Output.auto and not console.is_terminal):
        return
    console.print(summary_table(records))
    console.print(
        f"results  {out / 'results.json'}\nreport   {out / 'report.html'}", highlight=False
    )


@app.command("study")
def heterogeneity_study(
    lab: Annotated[Path, typer.Argument(help="file of the study: arms, seeds, grid")],
    out: Annotated[Path, typer.Option(help="folder for sites, models, records and the report")],
    data: Annotated[Path | None, typer.Option(help="folder of volumes")] = None,
    records: Annotated[
        Path | None, typer.Option(help="records to go on from and to add to; in --out if left out")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes at a time")] = 1,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="fewer processes where they would need more")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch threads of each process")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    only_report: Annotated[
        bool, typer.Option("--only-report", help="train nothing; tables of what is done")
    ] = False,
) -> None:
    """Train every arm under every condition of a grid, with several seeds, and compare.

    It can be interrupted at any time and goes on when it is started again; what has a record is
    never trained again.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: unknown; known are auto, cpu, cuda")
    declared, study, simulation = load_lab(lab)
    places = Places(out, records or out / "records", data)
    if not only_report:
        run_lab(
            declared,
            study,
            simulation,
            places,
            Machine(threads, device),
            workers=workers,
            memory_mib=None if memory_gib is None else round(memory_gib * 1024),
            say=lambda text: print(text, flush=True),
        )
    publish(declared, study, simulation, places)
    print(f"report  {out / 'report.html'}", flush=True)


@app.command()
def deployed(
    study: Annotated[Path, typer.Argument(help="study.yaml with a simulation: section")],
    out: Annotated[Path, typer.Option(help="folder for both runs")],
    data: Annotated[
        Path | None, typer.Option(help="folder of volumes, for studies that read one")
    ] = None,
    output: Annotated[
        Output, typer.Option(help="auto: bars on a terminal, else JSON lines")
    ] = Output.auto,
) -> None:
    """Run a study in one process and as real processes over TLS; both must agree to the bit.

    Run again, it goes on where it stopped. Exit code 1 when the final weights differ.
    """
    keep_freed_pages()
    torch.set_num_threads(1)
    console = Console()
    with make_progress(console, output.value) as progress:
        found = compare(
            study, out, data=data, progress=progress, say=lambda text: print(text, flush=True)
        )
    console.print(summary_table(found.records))
    console.print(f"report      {found.report}", highlight=False, soft_wrap=True)
    console.print(f"in process  {found.inprocess}", highlight=False, soft_wrap=True)
    console.print(f"deployed    {found.deployed}", highlight=False, soft_wrap=True)
    console.print("identical to the last bit" if found.identical else "NOT IDENTICAL")
    if not found.identical:
        raise typer.Exit(1)


def main() -> None:
    """The console command."""
    run_command(app)
