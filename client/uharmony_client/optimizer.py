"""The optimiser of a local round, and its moments as named tensors.

Moments belong to the site: they are stored with its local parameters, stacked ones by the name
of their domain, and they never enter a payload.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uharmony_model.exchange.partition import part_of
from uharmony_model.harmonize import stacked_keys
from uharmony_model.methods import RESIDUALS, Part
from uharmony_model.training_settings import Training

PREFIX = "optimizer/"
_MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def make_optimizer(network: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Two groups: residuals are pulled to zero by their own decay, so that zero stays useful.

    A style autoencoder has an optimiser of its own.
    """
    parts = part_of(network)
    named = {n: p for n, p in network.named_parameters() if parts[n] is not Part.STYLE}
    groups = [
        {
            "params": [p for n, p in named.items() if parts[n] not in RESIDUALS],
            "weight_decay": training.weight_decay,
        },
        {
            "params": [p for n, p in named.items() if parts[n] in RESIDUALS],
            "weight_decay": training.residual_decay,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=training.learning_rate)


def moments(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The state as `optimizer/<moment>/<key>[@<domain>]`: the tensors in use, no copies."""
    stacked, domains = stacked_keys(network), _domains(network)
    out: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            key = f"{PREFIX}{moment}/{name}"
            if name in stacked and value.shape == parameter.shape:
                for index, domain in enumerate(domains):
                    out[f"{key}@{domain}"] = value[index].detach().cpu()
            else:
                out[key] = value.detach().cpu()
    return out


def restore_moments(
    optimizer: torch.optim.Optimizer, network: nn.Module, stored: Mapping[str, Tensor]
) -> None:
    """Put stored moments back. A parameter without complete moments starts fresh."""
    stacked, domains = stacked_keys(network), _domains(network)
    kind = "sgd" if isinstance(optimizer, torch.optim.SGD) else "adamw"
    for name, parameter in network.named_parameters():
        state: dict[str, Tensor] = {}
        for moment in _MOMENTS[kind]:
            key = f"{PREFIX}{moment}/{name}"
            if name in stacked:
                rows = [stored.get(f"{key}@{domain}") for domain in domains]
                found = [row for row in rows if row is not None]
                value = torch.stack(found) if found and len(found) == len(rows) else None
            else:
                value = stored.get(key)
            if value is not None and value.shape == parameter.shape:
                state[moment] = value.to(parameter.device, copy=True)
        step = stored.get(f"{PREFIX}step/{name}")
        if kind == "adamw" and step is not None:
            state["step"] = step.clone()
        if len(state) == len(_MOMENTS[kind]) + (kind == "adamw"):
            optimizer.state[parameter] = state


def _domains(network: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(network, "domains", ()))
