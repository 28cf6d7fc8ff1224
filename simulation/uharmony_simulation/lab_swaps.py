"""What every site's model is worth at every other site, and what a neighbour's part costs.

Where a foreign part costs nothing, it carries no knowledge of the domain.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from uharmony_client.evaluate import dice_by_case, evaluate_split
from uharmony_client.personal import model_state
from uharmony_client.predictor import predictor
from uharmony_client.site import Site
from uharmony_client.workbench import carried_after
from uharmony_model.exchange.partition import Partition
from uharmony_model.methods import EVERYTHING, RESIDUALS, Part
from uharmony_model.networks import training_network
from uharmony_model.study import Study

Dice = dict[str, float]  # by case, over classes
ALL_LOCAL = "all that is local"


def measure_swaps(
    study: Study, opened: Sequence[Site], shared: dict[str, torch.Tensor], round_: int
) -> tuple[dict[str, dict[str, float | None]], list[dict[str, Any]]]:
    """Test Dice by (model's site, data's site), and a row for each case, part and site.

    `shared` are the weights after the last round, `round_`. Sites with several domains have
    neither, and nor has a method that keeps everything at the sites. A neighbour's whole model
    says the classes that the neighbour draws; with one part of it the site still says its own.
    """
    if any(len(site.domains) != 1 for site in opened) or study.plan.local == EVERYTHING:
        return {}, []
    carried = {site.name: carried_after(site, round_) for site in opened}
    # Without its residuals such a network is the shared one: no second one is needed.
    plain = None if study.keeps_residuals else shared
    matrix: dict[str, dict[str, float | None]] = {site.name: {} for site in opened}
    swaps: list[dict[str, Any]] = []
    for index, site in enumerate(opened):
        network = training_network(study, site.domains, seed=study.seed).to(site.device)
        partition = Partition.of(network, study.plan.local)
        own = carried[site.name]
        measured: dict[str, Dice] = {}
        for other in opened:
            foreign = _renamed(carried[other.name], other, site)
            network.load_state_dict(model_state(network, partition, shared, foreign))
            measured[other.name] = _dice(predictor(other, network, foreign, plain), site)
            matrix[other.name][site.name] = _mean(measured[other.name])
        neighbour = opened[(index + 1) % len(opened)]
        if partition.local_keys:
            swaps += _pairs(site, ALL_LOCAL, measured[site.name], measured[neighbour.name])
        foreign = _renamed(carried[neighbour.name], neighbour, site)
        for part in _parts(study):
            keys = {k for k, p in partition.parts.items() if p is part}
            mixed = {k: foreign[k] if k.partition("@")[0] in keys else v for k, v in own.items()}
            network.load_state_dict(model_state(network, partition, shared, mixed))
            swapped = _dice(predictor(site, network, mixed, plain), site)
            swaps += _pairs(site, part.value, measured[site.name], swapped)
    return matrix, swaps


def _pairs(site: Site, part: str, own: Dice, swapped: Dice) -> list[dict[str, Any]]:
    patients = {case.case: case.patient for case in site.split("test")}
    return [
        {
            "site": site.name,
            "part": part,
            "case": case,
            "patient": patients[case],
            "own": own[case],
            "swapped": swapped[case],
        }
        for case in own
        if case in swapped
    ]


def _parts(study: Study) -> list[Part]:
    return [part for part in Part if part in RESIDUALS & study.parts and part in study.plan.local]


def _renamed(carried: dict[str, torch.Tensor], other: Site, site: Site) -> dict[str, torch.Tensor]:
    theirs, ours = f"@{other.domains[0]}", f"@{site.domains[0]}"
    return {
        k.removesuffix(theirs) + ours if k.endswith(theirs) else k: v for k, v in carried.items()
    }


def _dice(network: torch.nn.Module, site: Site) -> Dice:
    rows = evaluate_split(network, site, "test", round_=0, slow=False)
    return {case: round(dice, 6) for case, dice in dice_by_case(rows).items()}


def _mean(dice: Dice) -> float | None:
    return round(statistics.fmean(dice.values()), 6) if dice else None
