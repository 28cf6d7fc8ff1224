"""Joining a study: what the hospital is shown, what it approves, and what it is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from hashlib import sha256

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uharmony_client.finale_plan import (
    carried_view,
    finale_view,
    learning_view,
    stays_view,
    values_asked,
)
from uharmony_client.home import Home
from uharmony_client.joining import enrol, fetch_ca, fetch_study
from uharmony_client.policy import publication_view, require_allowed, shared_parts, statistics_view
from uharmony_client.site_config import SiteConfig, load_cases
from uharmony_model.errors import ConfigError, DataError, ExchangeError
from uharmony_model.exchange.joining import JoinCode, Membership
from uharmony_model.frozen import parse
from uharmony_model.study import Study

Approve = Callable[[Study], bool]


def join(home: Home, code: JoinCode, approve: Approve) -> Study:
    """Fetch the study, have it approved, and enrol under keys made here.

    Raises:
        ConfigError: the site has joined already, its policy does not allow the study, or it was
            not approved; nothing was enrolled.
        ExchangeError: the coordinator is out of reach, is not the one of the code, or refuses.
        StoreError: the site's folder cannot be written.
    """
    site = home.config.name
    if home.joined:
        raise ConfigError(
            f"site {site} has joined a study at {home.membership().address} already; "
            f"leave it first: uharmony-client --site {site} leave"
        )
    ca = fetch_ca(code)
    text = fetch_study(code, ca)
    study = _read(text)
    home.config.annotates(study.task)
    require_allowed(home.config.policy, study)
    if not approve(study):
        raise ConfigError(f"study {study.name} was not approved; nothing was enrolled")
    home.identity.make_keys()
    answer = enrol(code, ca, home.identity.request(site, code, study.digest))
    membership = Membership(
        address=code.address, site=site, study=study.digest, approved_at=int(time.time())
    )
    home.identity.keep(answer, membership, text)
    return study


def _read(text: bytes) -> Study:
    """The study, whose text must be its canonical one: the digest is of exactly these bytes."""
    try:
        study = parse(Study, json.loads(text), "the coordinator's study")
    except (ValueError, RecursionError):
        raise ExchangeError(
            "the coordinator's study cannot be read; install the coordinator's version"
        ) from None
    if sha256(text).hexdigest() != study.digest:
        raise ExchangeError(
            "the coordinator's study is written in another form than this version's; "
            "install the coordinator's version"
        )
    return study


def study_view(study: Study, home: Home) -> RenderableType:
    """What a hospital has to know before it approves."""
    training, federation, policy = study.training, study.federation, home.config.policy
    steps = training.rounds * training.local_steps
    labelled = _has_labels(home.config)
    rows = {
        "study": f"{study.name}, method {study.method}",
        "digest": study.digest,
        "classes": ", ".join(study.task.class_names),
        "modalities": ", ".join(study.task.intensity),
        "training": f"{training.rounds} rounds of {training.local_steps} steps ({steps} in all), "
        f"batch {training.batch_size}, patch {'x'.join(map(str, training.patch))}",
        "network": f"{study.network.name} {list(study.network.features)}",
        "learns from": learning_view(study, labelled=labelled),
        "leaves": f"parts of the model: {', '.join(shared_parts(study))}; "
        f"values: {', '.join(values_asked(study, labelled=labelled))}",
        "statistics": statistics_view(policy, study),
        "at home": finale_view(study, labelled=labelled),
        "published": publication_view(policy, study),
        "stays": "; ".join(
            filter(None, (stays_view(study), carried_view(study, labelled=labelled)))
        ),
        "small cells": f"numbers over fewer than {policy.min_cases} cases do not leave",
        "weighing": federation.weighting,
        "quorum": f"{federation.min_sites} sites, {federation.min_cases} cases",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return Group(Text("The coordinator asks this site to take part in:", style="bold"), table)


def _has_labels(config: SiteConfig) -> bool:
    """Whether the site trains on labels, as far as its table says; `check` looks at the cases."""
    if config.labels == "none":
        return False
    try:
        return any(case.label is not None for case in load_cases(config).cases)
    except DataError:
        return True  # what is wrong with the table is for `check` to say
