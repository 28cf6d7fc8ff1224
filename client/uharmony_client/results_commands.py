"""`evaluate` and `report`: the federated model beside the site's own, at this site alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from uharmony_client.home import Home
from uharmony_model.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="for machines")]


def evaluate(context: typer.Context, json_: Json = False) -> None:
    """Compare the federated model with the site's own local-only model on its test split."""
    from uharmony_client.results_view import results_json, results_view

    results, _ = _results(Home.find(context.obj))
    if json_:
        print(results_json(results))
    else:
        Console().print(results_view(results))


def report(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="HTML file; in the store when left out")] = None,
) -> None:
    """Write the site's own report: both models, every case, pictures. It stays here."""
    from uharmony_client.site_report import write_site_report

    home = Home.find(context.obj)
    results, site = _results(home)
    target = out or home.config.store / "report.html"
    write_site_report(target, site, results)
    print(f"report {target}")


def _results(home: Home):  # type: ignore[no-untyped-def]  # its types would import torch
    """Both models measured; the site's own one is trained first where that is not done yet."""
    from uharmony_client.alone import train_alone
    from uharmony_client.site import Site
    from uharmony_client.site_models import federated_model
    from uharmony_client.site_results import evaluate_site, require_measurable

    site = Site.open(home.config, home.study())
    model, training = federated_model(site), site.study.training
    if not (model / "study.json").is_file():
        raise ConfigError(f"{model}: no federated model yet; it comes after the study's last round")
    require_measurable(site, model)
    rounds = training.rounds

    def place(round_: int) -> str:
        return f"round {round_} of {rounds}" if round_ <= rounds else "last steps at home"

    if not site.training_data().volumes:  # alone it has nothing to learn from
        return evaluate_site(site, model), site
    with Console(stderr=True).status("training the site's own model") as shown:
        train_alone(
            site,
            on_step=lambda name, round_, step, loss: shown.update(
                f"own model: {place(round_)}, step {step + 1}, loss {loss:.3f}"
            ),
        )
    return evaluate_site(site, model), site
