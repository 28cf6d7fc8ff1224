"""From the mean of the updates to the next global weights: the server's own step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.payload import quantize
from uharmony_model.exchange.schema import Schema
from uharmony_model.study import Study

BETA_1, BETA_2, TAU = 0.9, 0.99, 1e-3  # of FedAdam, as Flower has them
_VARIANCE = "running_var"  # as PyTorch's norms name it

Moments = tuple[Tensor, ...]


def next_weights(
    study: Study,
    round_: int,
    base: Tensor,
    averaged: Tensor,
    moments: Moments | None,
    schema: Schema | None = None,
) -> tuple[Tensor, Moments | None]:
    """The weights `(n,)` after a round, and what the server's own optimiser carries on.

    `averaged` is `base` plus the mean update; `schema` tells which of them are running variances.

    Raises:
        ExchangeError: the result is not finite.
    """
    weights = averaged
    if study.plan.server == "adam":
        step, moments = adam_step(averaged - base, moments, round_, study.federation.server_rate)
        weights = base + step
    elif study.federation.momentum:
        step, moments = nesterov_step(averaged - base, moments, study.federation.momentum)
        weights = base + step
    if not math.isfinite(float(weights.abs().sum(dtype=torch.float64))):
        raise ExchangeError(
            f"round {round_}: the sum of the updates is not finite; lower "
            "federation.norm_bound. The last checkpoint is untouched"
        )
    # The lossy downlink belongs to the study: what is sent is what counts.
    if study.codec.down != "fp32":
        weights = base + quantize(weights - base, study.codec.down)
    return (weights if schema is None else _variances_held(weights, schema)), moments


def adam_step(
    delta: Tensor, moments: Moments | None, round_: int, rate: float
) -> tuple[Tensor, Moments]:
    """FedAdam's step from the mean update `delta (n,)`.

    Reddi et al. 2021 (arXiv:2003.00295), algorithm 2, with the bias correction that Flower's
    FedAdam has.
    """
    first, second = moments or (torch.zeros_like(delta), torch.zeros_like(delta))
    first = BETA_1 * first + (1 - BETA_1) * delta
    second = BETA_2 * second + (1 - BETA_2) * delta.square()
    rate *= math.sqrt(1 - BETA_2 ** (round_ + 1)) / (1 - BETA_1 ** (round_ + 1))
    return rate * first / (second.sqrt() + TAU), (first, second)


def _variances_held(weights: Tensor, schema: Schema) -> Tensor:
    """The weights with no running variance below zero, which a coarse step can make of a fall.

    bf16 rounds an update to one part in 2^9: a variance that falls by more can end below zero, and
    BatchNorm then takes the root of a negative number.
    """
    offset, below = 0, []
    for spec in schema.tensors:
        place = slice(offset, offset + spec.numel)
        offset += spec.numel
        if spec.name.rpartition(".")[2] == _VARIANCE and bool((weights[place] < 0).any()):
            below.append(place)
    if below:
        weights = weights.clone()
        for place in below:
            weights[place].clamp_(min=0)
    return weights


def nesterov_step(
    delta: Tensor, moments: Moments | None, momentum: float
) -> tuple[Tensor, Moments]:
    """A step with Nesterov momentum from the mean update `delta (n,)`, at rate 1.

    `v' = momentum * v + delta`, step `delta + momentum * v'`: FedAvgM (Hsu et al. 2019,
    arXiv:1909.06335) in the form that DiLoCo (Douillard et al. 2023, arXiv:2311.08105) uses.
    """
    (velocity,) = moments or (torch.zeros_like(delta),)
    velocity = momentum * velocity + delta
    return delta + momentum * velocity, (velocity,)
