"""What a site works with before its first round."""

from __future__ import annotations

from torch import Tensor

from uharmony_client.site import Site
from uharmony_client.site_round import Bench
from uharmony_client.workbench import Workbench
from uharmony_model.exchange.payload import digest
from uharmony_model.initial import initial_weights


def bench_of(site: Site, weights: Tensor | None = None) -> Bench:
    """A network for the site, and global weights: the initial ones where none are given."""
    network, partition = Workbench().network(site.study, site.domains, site.device)
    found = initial_weights(site.study)[1] if weights is None else weights
    return Bench(network, partition, found, digest(found))
