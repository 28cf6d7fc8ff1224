"""The site's own model: as many steps on the same splits, and nothing from anybody else.

It is what a federation has to be measured against. It is trained as the method `local`, round by
round and in the same store, so it is that arm of a simulation and is never trained twice.

    store/generations/<digest of the study as local>/round-000007/
          alone/<the same digest>/model/     the finished model, with this site's entry
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from uharmony_client.finale import Candidate, detached
from uharmony_client.personal import METHOD_ALONE
from uharmony_client.site import Site
from uharmony_client.site_models import save_site_model, site_network
from uharmony_client.site_round import Bench, finale_metrics, measure, round_update
from uharmony_client.workbench import carried_after
from uharmony_model.atomic import recover
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import digest
from uharmony_model.networks import build_network
from uharmony_model.schedule import finale_round, splits_due
from uharmony_service.lock import only_one

OnStep = Callable[[str, int, int, float], None]
_WAIT_SECONDS = 1.0


def train_alone(site: Site, *, on_step: OnStep | None = None) -> Path:
    """Train the local-only model to the study's end and give the folder of the model.

    What is there already is not trained again: after a kill it goes on from the last step that was
    kept, and a finished model is given as it is. `on_step` gets site, round, step and loss.

    Raises:
        ConfigError: another process trains this model just now.
        StoreError: the disk is full, or an earlier round is damaged.
        TrainingError: the loss is not finite.
    """
    own, model = alone_site(site), alone_model(site)
    if (model / "study.json").is_file():
        return model
    with _only_one(own, wait=False):
        recover(own.store.folder)
        _, round_ = _trained(own, on_step)
        save_site_model(model, own, {}, carried_after(own, round_), round_)
    return model


def alone_candidate(site: Site, *, on_step: OnStep | None = None) -> Callable[[], Candidate] | None:
    """The local-only model for a finale to choose from; None where the site is alone anyway.

    Where another process trains this model just now, it is waited for. `on_step` is as in
    `train_alone`.
    """
    if site.study.method == METHOD_ALONE or site.study.plan.pooled:
        return None

    def trained() -> Candidate:
        own = alone_site(site)
        with _only_one(own, wait=True):
            _, round_ = _trained(own, on_step)
            carried = carried_after(own, round_)
        network = site_network(own, {}, carried)
        return Candidate(network, METHOD_ALONE, detached(network))

    return trained


def alone_site(site: Site) -> Site:
    """The same opened data under the study's method `local`, with that study's store."""
    return site.with_study(site.study.with_method(METHOD_ALONE))


def alone_model(site: Site) -> Path:
    """Where the finished local-only model of the site's study lies."""
    return site.config.store / "alone" / alone_site(site).study.digest / "model"


@contextmanager
def _only_one(own: Site, *, wait: bool) -> Iterator[None]:
    """Hold this model's store: a service in its finale and a command may both want to train it.

    Raises:
        ConfigError: another process trains it just now, and it is not waited for.
    """
    message = (
        f"site {own.name}: another process trains the local-only model just now, such as the "
        "service in its finale; try again when `status` says that it is done"
    )
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(only_one(own.config.store / "run" / "alone", message))
                break
            except ConfigError:
                if not wait:
                    raise
            time.sleep(_WAIT_SECONDS)
        yield


def _trained(own: Site, on_step: OnStep | None) -> tuple[Bench, int]:
    """Train what is missing; gives the bench and the last round that is in the store."""
    study = own.study
    network = build_network(study, own.domains, seed=study.seed).to(own.device)
    nothing = torch.empty(0)
    bench = Bench(network, Partition.of(network, study.plan.local), nothing, digest(nothing))
    rounds, done = study.training.rounds, own.store.newest(study.digest)
    for round_ in range(max(1, min(done, rounds)), rounds + 1):
        if round_ > done:
            round_update(own, bench, round_, on_step=_listener(own, round_, on_step))
        _measure(own, bench, round_)
    if not study.finale.steps:
        return bench, rounds
    last = finale_round(study)
    finale_metrics(own, bench, on_step=_listener(own, last, on_step))
    return bench, last


def _measure(own: Site, bench: Bench, round_: int) -> None:
    """Keep the validation rows of a round when the federation keeps its own of it."""
    rows = own.evaluations / f"validation-round-{round_:06d}.csv"
    if "validation" in splits_due(own.study, round_) and not rows.is_file():
        measure(own, bench, round_, ("validation",), slow=round_ == own.study.training.rounds)


def _listener(
    own: Site, round_: int, on_step: OnStep | None
) -> Callable[[int, float], None] | None:
    if on_step is None:
        return None
    return lambda step, loss: on_step(own.name, round_, step, loss)
