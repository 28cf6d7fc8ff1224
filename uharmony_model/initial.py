"""What round 1 starts from, at the server and at a site: a freshly built network, split in two."""

from __future__ import annotations

from torch import Tensor

from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import Schema, flatten
from uharmony_model.networks import training_network
from uharmony_model.study import Study


def initial_weights(study: Study) -> tuple[Schema, Tensor]:
    """The shared tensors `(n,)` with their schema.

    Shared tensors do not depend on the number of domains, so any name serves here.
    """
    network = training_network(study, ("any",), seed=study.seed)
    partition = Partition.of(network, study.plan.local)
    shared, _ = partition.split(network.state_dict())
    return partition.shared_schema, flatten(shared, partition.shared_schema)


def initial_local(study: Study, domains: tuple[str, ...]) -> dict[str, Tensor]:
    """The local parameters of a site that has not trained yet: all residuals are zero."""
    fresh = training_network(study, domains, seed=study.seed)
    return Partition.of(fresh, study.plan.local).split(fresh.state_dict())[1]
