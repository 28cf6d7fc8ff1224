"""What a site's process keeps in memory between instructions: one network, one set of weights.

However many sites run in this process, there is one network; every use loads its whole state,
so nothing is carried from one site to another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uharmony_client.site import Site
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import (
    Kind,
    Opened,
    decode_body,
    max_payload_bytes,
    open_payload,
)
from uharmony_model.initial import initial_local
from uharmony_model.networks import training_network
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study


class Workbench:
    """The network and the global weights that were used last."""

    def __init__(self) -> None:
        self._made_for: tuple[str, int, torch.device] | None = None
        self._network: SegmentationNetwork | None = None
        self._payload: bytes | None = None
        self._weights: tuple[Opened, Tensor] | None = None

    def network(
        self, study: Study, domains: tuple[str, ...], device: torch.device
    ) -> tuple[nn.Module, Partition]:
        """The study's network for these domains on `device`, and its partition."""
        wanted = (study.digest, len(domains), device)
        if self._network is None or self._made_for != wanted:
            self._network = None  # freed before the next one is built: one model in memory
            self._network = training_network(study, domains, seed=study.seed).to(device)
            self._made_for = wanted
        # Sites with equally many domains share it: names are all that tells their layouts apart.
        self._network.domains = domains
        return self._network, Partition.of(self._network, study.plan.local)

    def weights(self, payload: bytes, order: Instruction, partition: Partition) -> Tensor:
        """The global weights (n,) of a payload that must belong to the instruction.

        Sites that share a process are handed the same bytes object, which is decoded and
        checked once.

        Raises:
            PayloadError: the bytes are damaged or of another schema.
            ExchangeError: they are not the weights the instruction names.
        """
        if self._weights is None or self._payload is not payload:
            schema = partition.shared_schema
            opened = open_payload(payload, max_bytes=max_payload_bytes(schema))
            self._weights = (opened, decode_body(opened.manifest, opened.body, schema))
            self._payload = payload
        (manifest, _, weights_digest), flat = self._weights
        made_by = order.round if order.action == "evaluate" else order.round - 1
        found = (manifest.kind, manifest.study, manifest.round, weights_digest)
        if found != (Kind.MODEL, order.study, made_by, order.base):
            raise ExchangeError(
                f"got {manifest.kind} {weights_digest[:12]} of round {manifest.round}, study "
                f"{manifest.study[:12]}; the instruction asks for weights {order.base[:12]} of "
                f"round {made_by}, study {order.study[:12]}; send both anew"
            )
        return flat


def carried_after(site: Site, round_: int) -> dict[str, Tensor]:
    """What the site carries as it stands after a round; a newcomer's residuals are zero."""
    carried = site.store.before(site.study.digest, round_ + 1)
    return initial_local(site.study, site.domains) if carried is None else carried
