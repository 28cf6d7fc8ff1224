"""Step 5 of the data's way: one round of training at one site, legible at a glance.

A round is a pure function `(global, local before, seed) -> (update, local after)`: nothing else
goes in, so it can be repeated with the same result to the last bit. A checkpoint between its
steps changes when they are computed, never what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uharmony_client.learning import NOTHING, Given, objective_of
from uharmony_client.optimizer import make_optimizer, moments, restore_moments
from uharmony_client.personal import (
    UNLABELLED,
    as_personal,
    by_name,
    from_names,
    local_parameters,
    personal_part,
    unlabelled_part,
)
from uharmony_client.step_checkpoint import StepCheckpoint
from uharmony_client.training_steps import LocalData, Pull, StepListener, cosine, run_steps
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.parts import place_of
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.methods import Place
from uharmony_model.study import Study


@dataclass(frozen=True)
class RoundResult:
    """`update` is the flat float32 delta of the shared tensors; `local` never leaves the site.

    `share` is how much of what was seen taught something, in [0, 1]; 0 where nothing was trained.
    `growth` is how far that may weigh by now (`Objective.growth`).
    """

    update: Tensor
    local: dict[str, Tensor]
    loss: float
    share: float = 1.0
    growth: float | None = None


def train_round(
    network: nn.Module,
    data: LocalData,
    *,
    study: Study,
    partition: Partition,
    base: Tensor,
    before: Mapping[str, Tensor],
    round_: int,
    given: Given = NOTHING,
    on_step: StepListener | None = None,
    checkpoint: StepCheckpoint | None = None,
) -> RoundResult:
    """Train `study.training.local_steps` steps from the global weights `base (n,)`.

    `given` is what the federation gives beside them. A site with nothing to learn from leaves the
    weights as they are. With a `checkpoint` an interrupted round goes on from the last step that
    was kept.

    Raises:
        TrainingError: the loss is not finite; the round leaves nothing behind.
    """
    training = study.training
    shared = unflatten(base, partition.shared_schema)
    network.load_state_dict(partition.merge(shared, local_parameters(before)))
    optimizer = make_optimizer(network, training)
    if training.keep_optimizer:
        restore_moments(optimizer, network, before)
    objective = objective_of(data, study, given)
    if objective is None:
        return RoundResult(torch.zeros_like(base), dict(before), 0.0, share=0.0)
    objective.restore(unlabelled_part(before))
    unfinished = None
    # The end of the round is kept as its generation, so a short round costs nothing here.
    if checkpoint is not None and training.local_steps > checkpoint.every:
        unfinished = checkpoint.of(network, optimizer, before, objective)
    loss = run_steps(
        network,
        optimizer,
        objective,
        study,
        round_=round_,
        count=training.local_steps,
        rate=_rate(study, round_),
        learns=_learners(network, study),
        pull=_pull(network, study, shared) if study.plan.training == "proximal" else None,
        unfinished=unfinished,
        on_step=on_step,
    )
    state = {k: v.detach().cpu() for k, v in network.state_dict().items()}
    trained, local = partition.split(state)
    update = flatten(trained, partition.shared_schema).sub_(base)
    if training.keep_optimizer:
        local = {**local, **moments(optimizer, network)}
    local |= as_personal(objective.outlives(), UNLABELLED)
    local = {key: tensor.clone() for key, tensor in local.items()}
    if study.plan.training == "twin" and data.volumes:  # it learns from labels alone
        local |= as_personal(_train_twin(network, data, study, partition, shared, before, round_))
    return RoundResult(update, local, loss, objective.share, objective.growth)


def learning_rate(study: Study, step: int) -> float:
    """The rate at one step of all, a pure function: no state to carry.

    The steps at home after the last round count, unless they have a rate of their own.
    """
    training, finale = study.training, study.finale
    steps = training.rounds * training.local_steps + (finale.steps if finale.rate is None else 0)
    if training.schedule == "constant":
        return training.learning_rate
    return cosine(training.learning_rate, step / steps)


def _learners(network: nn.Module, study: Study) -> Callable[[int], Collection[str] | None]:
    """Which parameters a step trains: FedRep's last block first, and then the rest."""
    if study.plan.training != "alternating":
        return lambda step: None
    last = {key for key, place in place_of(network).items() if place is Place.LAST_BLOCK}
    rest = {name for name, _ in network.named_parameters()} - last
    steps = study.training.local_steps
    # Each gets a step, where there are two.
    alone = min(max(round(study.training.head_share * steps), 1), max(steps - 1, 1))
    return lambda step: last if step < alone else rest


def _rate(study: Study, round_: int) -> Callable[[int], float]:
    done = (round_ - 1) * study.training.local_steps
    return lambda step: learning_rate(study, done + step)


def _pull(network: nn.Module, study: Study, shared: Mapping[str, Tensor]) -> Pull:
    """To the global weights."""
    device = next(network.parameters()).device
    return Pull(study.training.proximal, {k: v.to(device) for k, v in shared.items()})


def _train_twin(
    network: nn.Module,
    data: LocalData,
    study: Study,
    partition: Partition,
    shared: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    round_: int,
) -> dict[str, Tensor]:
    """Ditto's own model: as many steps again, on the same patches, pulled to the global weights.

    It is trained whole after the round and has no step checkpoint: a power cut costs its steps.
    """
    training, own = study.training, personal_part(before)
    start = partition.merge(shared, local_parameters(before))
    parameters = local_parameters(own)
    network.load_state_dict(from_names(network, parameters) if parameters else start)
    optimizer = make_optimizer(network, training)
    if training.keep_optimizer:
        restore_moments(optimizer, network, own)
    run_steps(
        network,
        optimizer,
        data,
        study,
        round_=round_,
        count=training.local_steps,
        rate=_rate(study, round_),
        pull=_pull(network, study, shared),
    )
    state = {k: v.detach().cpu() for k, v in network.state_dict().items()}
    kept = by_name(network, state)
    if training.keep_optimizer:
        kept |= moments(optimizer, network)
    return {key: tensor.clone() for key, tensor in kept.items()}
