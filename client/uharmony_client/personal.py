"""What a site carries from round to round, by kind of tensor; and its whole models of its own.

KEY[@DOMAIN]                local parameters of the federated model
optimizer/MOMENT/...        moments of its optimiser
personal/KEY[@DOMAIN]       a whole model of the site's own (Ditto, or after the finale)
personal/optimizer/...      moments of that one
alone/KEY                   the model trained without anybody, where the finale chose it
unlabelled/...              teacher and queue of learning without labels
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from uharmony_client.optimizer import PREFIX
from uharmony_model.exchange.partition import Partition
from uharmony_model.methods import EVERYTHING

PERSONAL, ALONE, UNLABELLED = "personal/", "alone/", "unlabelled/"
METHOD_ALONE = "local"  # the method of a model trained without anybody


def local_parameters(carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The local parameters of the federated model."""
    others = (PREFIX, PERSONAL, ALONE, UNLABELLED)
    return {k: v for k, v in carried.items() if not k.startswith(others)}


def own_model(carried: Mapping[str, Tensor], method: str) -> tuple[dict[str, Tensor], str] | None:
    """The site's whole model by name and the method whose network it is of; None: it has none."""
    personal = local_parameters(personal_part(carried))
    if personal:
        return personal, method
    alone = {k.removeprefix(ALONE): v for k, v in carried.items() if k.startswith(ALONE)}
    return (alone, METHOD_ALONE) if alone else None


def personal_part(carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model of the site's own with its moments, without the prefix; empty where there is none."""
    return {k.removeprefix(PERSONAL): v for k, v in carried.items() if k.startswith(PERSONAL)}


def unlabelled_part(carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an objective for unlabelled cases carries, without the prefix."""
    own = {k: v for k, v in carried.items() if k.startswith(UNLABELLED)}
    return {k.removeprefix(UNLABELLED): v for k, v in own.items()}


def as_personal(tensors: Mapping[str, Tensor], prefix: str = PERSONAL) -> dict[str, Tensor]:
    """The same under the prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def by_name(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict as tensors by KEY or KEY@DOMAIN: how a model of a site's own is kept."""
    return Partition.of(network, EVERYTHING).split(state)[1]


def from_names(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict again."""
    return Partition.of(network, EVERYTHING).merge({}, tensors)


def model_state(
    network: nn.Module,
    partition: Partition,
    shared: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What a site measures and predicts with: its own model where it has one, else the merged."""
    own = local_parameters(personal_part(carried))
    return from_names(network, own) if own else partition.merge(shared, local_parameters(carried))
