"""What a site predicts with: its network, and for classes that it does not draw the shared one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from uharmony_client.site import Site
from uharmony_model.bundle import shared_network
from uharmony_model.networks import without_style
from uharmony_model.undrawn import undrawn_names, with_undrawn


def undrawn_classes(site: Site, own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The classes that the shared model says at this site, in the task's order.

    None where the site draws all, where it has nothing of its `own` that could have forgotten
    them (a norm's counter has not), or where what is shared makes no model.
    """
    study = site.study
    if not study.plan.serves_unseen or not any(t.is_floating_point() for t in own.values()):
        return ()
    return undrawn_names(site.annotated, study.task)


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
    undrawn, study, plain = undrawn_classes(site, own), site.study, None
    if undrawn and shared is not None:
        plain = shared_network(study, without_style(shared)).to(site.device)
    return with_undrawn(network, undrawn, study.task, plain)
