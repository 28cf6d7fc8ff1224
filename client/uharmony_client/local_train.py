"""Step 5 of the data's way: one round of training at one site, legible at a glance.

A round is a pure function `(global, local before, seed) -> (update, local after)`: nothing else
goes in, so it can be repeated with the same result to the last bit. A checkpoint between its
steps changes when they are computed, never what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uharmony_client.optimizer import make_optimizer, moments, restore_moments
from uharmony_client.step_checkpoint import StepCheckpoint
from uharmony_model.errors import TrainingError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.losses import segmentation_loss
from uharmony_model.patches import StoredVolume, draw_batch
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study, Training

StepListener = Callable[[int, float], None]


@dataclass(frozen=True)
class LocalData:
    """What a round trains on: opened volumes, the domain index of each, the classes annotated."""

    site: str
    volumes: Sequence[StoredVolume]
    domains: Sequence[int]
    annotated: Tensor


@dataclass(frozen=True)
class RoundResult:
    """`update` is the flat float32 delta of the shared tensors; `local` never leaves the site."""

    update: Tensor
    local: dict[str, Tensor]
    loss: float


def train_round(
    network: nn.Module,
    data: LocalData,
    *,
    study: Study,
    partition: Partition,
    base: Tensor,
    before: Mapping[str, Tensor],
    round_: int,
    on_step: StepListener | None = None,
    checkpoint: StepCheckpoint | None = None,
) -> RoundResult:
    """Train `study.training.local_steps` steps from the global weights `base (n,)`.

    With a `checkpoint` an interrupted round goes on from the last step that was kept.

    Raises:
        TrainingError: the loss is not finite; the round leaves nothing behind.
    """
    training, task = study.training, study.task
    device = next(network.parameters()).device
    shared = unflatten(base, partition.shared_schema)
    parameters = {k: v for k, v in before.items() if not k.startswith("optimizer/")}
    network.load_state_dict(partition.merge(shared, parameters))
    optimizer = make_optimizer(network, training)
    if training.keep_optimizer:
        restore_moments(optimizer, network, before)

    network.train()
    annotated, done, total = data.annotated.to(device), 0, 0.0
    unfinished = None
    # The end of the round is kept as its generation, so a short round costs nothing here.
    if checkpoint is not None and training.local_steps > checkpoint.every:
        unfinished = checkpoint.of(network, optimizer, before)
        done, total = unfinished.take_up()
    for step in range(done, training.local_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, (round_ - 1) * training.local_steps + step)
        where = (data.site, round_, step)
        image, label, cases = draw_batch(data.volumes, task, training, study.seed, *where)
        domain = torch.tensor([data.domains[case] for case in cases], device=device)
        alone = numpy_generator(study.seed, *where, "domain-dropout").random()
        drop = alone < study.network.harmonization.domain_dropout

        logits = network(image.to(device), domain, drop=drop)
        loss = segmentation_loss(logits, label.to(device), task, annotated)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), training.gradient_clip)
        optimizer.step()

        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"site {data.site}, round {round_}, step {step}: the loss is {value}; "
                "check the intensity policy or lower training.learning_rate"
            )
        total += value
        if unfinished is not None and step + 1 < training.local_steps:
            unfinished.keep(step + 1, total)
        if on_step is not None:
            on_step(step, value)

    state = {k: v.detach().cpu() for k, v in network.state_dict().items()}
    trained, local = partition.split(state)
    update = flatten(trained, partition.shared_schema).sub_(base)
    if training.keep_optimizer:
        local = {**local, **moments(optimizer, network)}
    local = {key: tensor.clone() for key, tensor in local.items()}
    return RoundResult(update, local, total / training.local_steps)


def learning_rate(training: Training, step: int) -> float:
    """The rate at one step of all `rounds * local_steps`: a pure function, so no state to carry."""
    if training.schedule == "constant":
        return training.learning_rate
    share = step / (training.rounds * training.local_steps)
    return training.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
