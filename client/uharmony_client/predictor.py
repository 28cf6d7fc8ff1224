"""What a site predicts with: its network, and for classes that it does not draw the shared one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from uharmony_client.site import Site
from uharmony_model.exchange.partition import Partition
from uharmony_model.networks import training_network
from uharmony_model.undrawn import with_undrawn


def undrawn_classes(site: Site, own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The classes that the shared model says at this site, in the task's order.

    None where the site draws all, where it has nothing of its `own` that could have forgotten
    them (a norm's counter has not), or where what is shared makes no model.
    """
    study = site.study
    if not site.study.plan.serves_unseen or not any(t.is_floating_point() for t in own.values()):
        return ()
    drawn = zip(study.task.class_names, site.annotated.tolist(), strict=True)
    return tuple(name for name, known in drawn if not known)


def predictor(
    site: Site,
    network: nn.Module,
    own: Mapping[str, Tensor],
    shared: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """`network`, which holds the site's `own` tensors, as it predicts at this site.

    `shared` are the federation's weights by name, where `own` is a whole model that has others.
    Else the network without its residuals is the shared model.
    """
    undrawn = undrawn_classes(site, own)
    study = site.study
    if not undrawn or shared is None:
        return with_undrawn(network, undrawn, study.task)
    plain = training_network(study, site.domains, seed=study.seed)
    partition = Partition.of(plain, study.plan.local)
    # A fresh network's residuals are zero.
    plain.load_state_dict(partition.merge(shared, partition.split(plain.state_dict())[1]))
    return with_undrawn(network, undrawn, study.task, plain.to(site.device))
