"""Classes that a site does not annotate, measured all the same where all labels are known.

The site's own store has nothing of them. The reference that holds all cases has: there each test
case of the site is measured with every class drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uharmony_client.evaluate import measure_volume
from uharmony_client.site import Site
from uharmony_client.site_models import site_network
from uharmony_client.workbench import carried_after
from uharmony_model.schedule import finale_round


def add_unannotated(
    rows: Sequence[dict[str, Any]], site: Site, whole: Site, shared: Mapping[str, Tensor]
) -> None:
    """Put Dice of the site's unannotated classes into `by_class` of its rows.

    `whole` holds the same cases with all labels, `shared` are the weights after the last round.
    The mean Dice of a row stays that of the classes that the site draws.
    """
    names = site.study.task.class_names
    if bool(site.annotated.all()) or not rows:
        return
    every = torch.ones(len(names), dtype=torch.bool)
    for at_home in sorted({bool(row["at_home"]) for row in rows}):
        last = finale_round(site.study) if at_home else site.study.training.rounds
        network = site_network(site, shared, carried_after(site, last))
        domains = {case.case: site.domains.index(case.domain) for case in site.split("test")}
        for row in rows:
            if row["at_home"] != at_home or row["case"] not in domains:
                continue
            measured = measure_volume(
                network,
                whole.volumes[row["case"]],
                site.study,
                domain=domains[row["case"]],
                device=site.device,
                annotated=every,
            )
            for name, values, drawn in zip(names, measured, site.annotated.tolist(), strict=True):
                if not drawn and values.dice is not None:
                    row["by_class"][name] = round(values.dice, 6)
