"""The site's own model: as many steps on the same splits, and nothing from anybody else.

It is what a federation has to be measured against. It is trained as the method `local`, round by
round under the study's own seeds, so it equals that arm of a simulation to the last bit.

    store/alone/<study digest>/round-000007/   generations, as of a federated round
                               model/          the finished model, with this site's entry
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from uharmony_client.evaluate import evaluate_split, save_rows
from uharmony_client.local_store import LocalStore, RoundKey
from uharmony_client.local_train import train_round
from uharmony_client.optimizer import PREFIX
from uharmony_client.site import Site
from uharmony_client.step_checkpoint import StepCheckpoint
from uharmony_model.atomic import recover
from uharmony_model.bundle import save_bundle
from uharmony_model.errors import StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import digest
from uharmony_model.initial import initial_local
from uharmony_model.networks import build_network
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study

METHOD = "local"
OnStep = Callable[[str, int, int, float], None]


def train_alone(site: Site, *, on_step: OnStep | None = None) -> Path:
    """Train the local-only model to the study's last round and give the folder of the model.

    What is there already is not trained again: after a kill it goes on from the last step that was
    kept, and a finished model is given as it is. `on_step` gets site, round, step and loss.

    Raises:
        StoreError: the disk is full, or an earlier round is damaged.
        TrainingError: the loss is not finite.
    """
    own = alone_site(site)
    model = alone_model(site)
    recover(own.store.folder)
    if (model / "study.json").is_file():
        return model
    study = own.study
    network = build_network(study, own.domains, seed=study.seed).to(own.device)
    partition = Partition.of(network, study.plan.local)
    done = own.store.newest(study.digest)
    if done:
        _measure(own, network, partition, done)
    for round_ in range(done + 1, study.training.rounds + 1):
        _train(own, network, partition, round_, on_step)
        _measure(own, network, partition, round_)
    save_bundle(
        model,
        study,
        {},
        {own.name: _parameters(own, study.training.rounds)},
        {own.name: own.domains},
        {own.name: own.modalities},
    )
    return model


def alone_site(site: Site) -> Site:
    """The same opened data under the study's method `local`, with a store apart."""
    study = Study.model_validate({**site.study.model_dump(), "method": METHOD})
    store = LocalStore(alone_model(site).parent)
    return dataclasses.replace(site.with_study(study), store=store)


def alone_model(site: Site) -> Path:
    """Where the finished local-only model of the site's study lies."""
    return site.config.store / "alone" / site.study.digest / "model"


def _train(
    own: Site,
    network: SegmentationNetwork,
    partition: Partition,
    round_: int,
    on_step: OnStep | None,
) -> None:
    study = own.study
    key, before = _key(study, round_), own.store.before(study.digest, round_)
    every = own.config.resources.checkpoint_steps

    def listener(step: int, loss: float) -> None:
        if on_step is not None:
            on_step(own.name, round_, step, loss)

    result = train_round(
        network,
        own.training_data(),
        study=study,
        partition=partition,
        base=torch.empty(0),
        before=initial_local(study, own.domains) if before is None else before,
        round_=round_,
        on_step=listener,
        checkpoint=StepCheckpoint(own.store.folder, key, every),
    )
    own.store.write(key, b"", result.local)


def _measure(own: Site, network: SegmentationNetwork, partition: Partition, round_: int) -> None:
    """Keep the validation rows of a round when the federation keeps its own of it."""
    settings, last = own.study.evaluation, own.study.training.rounds
    due = round_ == last or (settings.every and round_ % settings.every == 0)
    rows = own.evaluations / f"validation-round-{round_:06d}.csv"
    if not due or settings.validation == 0 or rows.is_file():
        return
    network.load_state_dict(partition.merge({}, _parameters(own, round_)))
    found = evaluate_split(network, own, "validation", round_=round_, slow=round_ == last)
    save_rows(found, own, "validation", round_)


def _parameters(own: Site, round_: int) -> dict[str, torch.Tensor]:
    local = own.store.local(_key(own.study, round_))
    if local is None:
        raise StoreError(
            f"{own.store.folder}: round {round_} is not there; remove the folder to train the "
            "local-only model again"
        )
    return {key: tensor for key, tensor in local.items() if not key.startswith(PREFIX)}


def _key(study: Study, round_: int) -> RoundKey:
    # Nothing is shared, so every round starts from the same global weights: none.
    return RoundKey(study.digest, round_, digest(torch.empty(0)))
