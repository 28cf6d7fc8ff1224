"""Experts: the residuals of several sites as the domains of one network (U1).

A site's own tensors are `KEY@DOMAIN` (see `uharmony_model.exchange.partition`). Published, each
domain is one expert, `SITE.DOMAIN`; a network with K experts as its domains takes a mixture of
them as weights (B, K). Experts are trained on patients, and no privacy is claimed for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from uharmony_model.errors import ConfigError, PartitionError
from uharmony_model.exchange.partition import Partition
from uharmony_model.harmonize import HarmonizedNetwork
from uharmony_model.networks import build_network
from uharmony_model.prototypes import require_patients
from uharmony_model.study import Study


@dataclass(frozen=True, eq=False)
class Expert:
    """The residuals of one domain, by state-dict key, without an axis of domains."""

    name: str
    residuals: Mapping[str, Tensor]


def experts_of(
    site: str, local: Mapping[str, Tensor], patients: Mapping[str, int]
) -> tuple[Expert, ...]:
    """A site's local tensors as experts to publish; `patients` counts those of each domain.

    Raises:
        ConfigError: a domain has too few patients, or none are counted for it.
        PartitionError: a tensor belongs to no domain, as in methods whose norms are local.
    """
    domains: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(local.items()):
        key, at, domain = name.rpartition("@")
        if not at:
            raise PartitionError(
                f"{name}: belongs to no domain; only residuals can be published as experts"
            )
        domains.setdefault(domain, {})[key] = tensor
    for domain in domains:
        require_patients(patients.get(domain, 0))
    return tuple(Expert(f"{site}.{domain}", tensors) for domain, tensors in domains.items())


def expert_network(
    study: Study, shared: Mapping[str, Tensor], experts: Sequence[Expert]
) -> HarmonizedNetwork:
    """The study's network with the experts as its domains, in their order, in evaluation mode.

    Raises:
        ConfigError: there is no expert, or the study's method keeps no residuals at its sites.
        PartitionError: tensors are not those of the study's network, or not finite.
        NetworkError: two experts have one name.
    """
    if not study.keeps_residuals:
        raise ConfigError(f"method {study.method} keeps no residuals at its sites: no experts")
    if not experts:
        raise ConfigError("no expert to load; without one, use the shared model as it is")
    local = {f"{key}@{e.name}": tensor for e in experts for key, tensor in e.residuals.items()}
    for name, tensor in local.items():
        if not bool(torch.isfinite(tensor).all()):
            raise PartitionError(f"{name}: not finite; leave this expert out")
    network = build_network(study, [expert.name for expert in experts], seed=study.seed)
    assert isinstance(network, HarmonizedNetwork)  # noqa: S101 - as the method is harmonised
    partition = Partition.of(network, study.plan.local)
    network.load_state_dict(partition.merge(shared, local), strict=True)
    return network.eval()


def mixed_expert(experts: Sequence[Expert], weights: ArrayLike, name: str = "mixture") -> Expert:
    """One expert that is the weighted sum of several: what a mixture of them computes.

    Raises:
        ConfigError: there is not one weight for each expert.
        PartitionError: the experts differ in their tensors.
    """
    row = torch.as_tensor(weights, dtype=torch.float64)
    if not experts or row.shape != (len(experts),):
        raise ConfigError(
            f"{tuple(row.shape)} weights for {len(experts)} experts; expected one for each"
        )
    first = experts[0].residuals
    for expert in experts[1:]:
        shapes = {key: tensor.shape for key, tensor in expert.residuals.items()}
        if shapes != {key: tensor.shape for key, tensor in first.items()}:
            raise PartitionError(
                f"experts {experts[0].name} and {expert.name} have different tensors; are they of "
                "one study?"
            )
    mixed = {}
    for key, like in first.items():
        stacked = torch.stack([expert.residuals[key].double() for expert in experts])
        mixed[key] = torch.tensordot(row, stacked, dims=1).to(like.dtype)
    return Expert(name, mixed)
