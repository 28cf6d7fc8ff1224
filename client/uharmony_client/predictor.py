"""What a site predicts with: its network, and for classes that it does not draw the shared one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from uharmony_client.site import Site
from uharmony_model.exchange.partition import Partition
from uharmony_model.networks import training_network
from uharmony_model.undrawn import UndrawnFromShared


def undrawn_classes(site: Site, own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The classes that the shared model says at this site, in the task's order.

    None where the site draws all, where it has nothing of its `own` that could have forgotten
    them, or where what is shared makes no model.
    """
    study = site.study
    if not own or not study.plan.serves_unseen:
        return ()
    drawn = zip(study.task.class_names, site.annotated.tolist(), strict=True)
    return tuple(name for name, known in drawn if not known)


def predictor(
    site: Site, network: nn.Module, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> nn.Module:
    """`network` with the site's `own` tensors in it, as it predicts at this site.

    `shared` are the federation's weights by name.
    """
    undrawn = undrawn_classes(site, own)
    if not undrawn:
        return network
    study = site.study
    plain = training_network(study, site.domains, seed=study.seed)
    partition = Partition.of(plain, study.plan.local)
    # A fresh network's residuals are zero.
    plain.load_state_dict(partition.merge(shared, partition.split(plain.state_dict())[1]))
    return UndrawnFromShared(network, plain.to(site.device), undrawn, study.task)
