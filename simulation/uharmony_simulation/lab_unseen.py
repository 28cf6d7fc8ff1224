"""A site that was left out: what the ladder for unseen sites is worth on its test cases.

    U0            all residuals zero
    U1, U1 hard   the gate's mixture of the other sites' experts; the nearest one alone
    auto          what `--domain auto` serves: U1 where the volume is familiar, else U0
    U2            that mixture moved by entropy on the volume itself
    U3-n          residuals fitted on n of its own training cases
    U4            how often the gate says that it does not know

Prototypes are exact here, in a frame made from the other sites' own volumes: this is what the
ladder can do, not what a release with noise leaves of it.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uharmony_client.case_table import CaseTable
from uharmony_client.domain_choice import Chosen, DomainChooser
from uharmony_client.evaluate import mean_dice, measure_volume, network_input
from uharmony_client.few_shot import fit_domain
from uharmony_client.personal import local_parameters
from uharmony_client.site import Site
from uharmony_client.workbench import carried_after
from uharmony_model.abstention import AbstentionLimit, left_out_distances
from uharmony_model.bundle import Model, load_bundle
from uharmony_model.descriptor import describe
from uharmony_model.exchange.partition import Partition
from uharmony_model.experts import Expert, expert_network
from uharmony_model.gate import Gate
from uharmony_model.networks import build_network
from uharmony_model.prototypes import MAX_RELEASED, PublicFrame, prototype_of
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.test_time import MixtureSearch
from uharmony_model.undrawn import with_undrawn

Dice = dict[str, float]
_SMALLEST_SCALE = 1e-3


def measure_unseen(
    folder: Path, opened: Sequence[Site], left: Site, few_shot: Sequence[int]
) -> dict[str, Any]:
    """Every step of the ladder on the test split of `left`, from the model in `folder`.

    Each step gives Dice by case; `U4` the shares of test volumes refused, here and at the sites
    that took part, where each is a false alarm, and of those that are familiar; `known` Dice under
    `auto` by site that took part. A model without residuals has U0 alone.
    """
    model = load_bundle(folder, None)
    if not model.study.keeps_residuals:
        model.network.to(left.device)
        plain: Dice = {}
        for case in left.split("test"):
            _put(plain, left, case.case, model.network, None)
        return {"site": left.name, "dice": {"U0": plain}, "U4": None}
    guarded = _chooser(model, opened)
    chooser = dataclasses.replace(guarded, limit=None)  # mixes for every volume
    chooser.model.network.to(left.device)
    known: list[Chosen] = []
    at_home: dict[str, Dice] = {site.name: {} for site in opened}
    for site in opened:
        for case in site.split("test"):
            known.append(guarded.choose(_input(site, case.case)))
            network, weights = guarded.model.network, known[-1].weights
            _put(at_home[site.name], site, case.case, network, weights)
    cases = left.split("test")
    ladder: dict[str, Dice] = {"U0": {}, "U1": {}, "U1 hard": {}, "auto": {}, "U2": {}}
    served = []
    for case in cases:
        image = _input(left, case.case)
        served.append(guarded.choose(image))
        chosen = chooser.choose(image)
        searched = chooser.choose(image, search=MixtureSearch(), volume=case.case)
        assert chosen.gate is not None  # noqa: S101 - the chooser has prototypes
        hard = torch.zeros(len(chosen.gate.domains))
        hard[int(chosen.gate.distances.argmin())] = 1.0
        mixtures = {"U0": None, "U1": chosen.weights, "U1 hard": hard, "U2": searched.weights}
        for step, mixture in mixtures.items():
            _put(ladder[step], left, case.case, chooser.model.network, mixture)
        taken = ladder["U1" if served[-1].familiar else "U0"]
        if case.case in taken:
            ladder["auto"][case.case] = taken[case.case]
    for count in few_shot:
        ladder[f"U3-{count}"] = _few_shot(chooser, left, count)
    return {
        "site": left.name,
        "dice": ladder,
        "known": at_home,
        "U4": {
            "refused": _share(c.abstained for c in served),
            "refused at the sites that took part": _share(c.abstained for c in known),
            "familiar": _share(bool(c.familiar) for c in served),
            "familiar at the sites that took part": _share(bool(c.familiar) for c in known),
        },
    }


def _share(said: Iterable[bool]) -> float | None:
    answers = list(said)
    return statistics.fmean(answers) if answers else None


def _chooser(model: Model, opened: Sequence[Site]) -> DomainChooser:
    """The gate and the experts of the sites that took part; a row a patient."""
    network, study = model.network, model.study
    assert isinstance(network, SegmentationNetwork)  # noqa: S101 - as build_network made it
    described: dict[str, dict[str, list[Any]]] = {}
    experts: dict[str, Expert] = {}
    for site in opened:
        local = local_parameters(carried_after(site, study.training.rounds))
        for case in site.split("train"):
            name = f"{site.name}.{case.domain}"
            u = describe(network, _input(site, case.case), window=study.training.patch)
            described.setdefault(name, {}).setdefault(case.patient, []).append(u)
            residuals = _of_domain(local, case.domain)
            if not bool(site.annotated.all()):  # such a site publishes no expert
                residuals = {key: torch.zeros_like(tensor) for key, tensor in residuals.items()}
            experts.setdefault(name, Expert(name, residuals))
    patients = {
        name: np.stack([np.mean(rows, axis=0) for rows in by_patient.values()])
        for name, by_patient in described.items()
    }
    every = np.concatenate(list(patients.values()))
    frame = PublicFrame.of(
        every.shape[1],
        seed=study.seed,
        coordinates=min(MAX_RELEASED, every.shape[1]),
        center=every.mean(0),
        scale=np.maximum(every.std(0), _SMALLEST_SCALE),
    )
    rows = {name: frame.rows(values) for name, values in patients.items()}
    gate = Gate.of([prototype_of(name, values) for name, values in rows.items()])
    shared = Partition.of(network, study.plan.local).split(network.state_dict())[0]
    ordered = tuple(experts[name] for name in gate.domains)
    mixing = expert_network(study, shared, ordered)
    return DomainChooser(
        Model(mixing, study, mixing.domains, model.modalities, model.digest),
        ordered,
        gate,
        frame,
        AbstentionLimit.of(left_out_distances(gate, rows)),
    )


def _of_domain(local: Mapping[str, Tensor], domain: str) -> dict[str, Tensor]:
    ending = f"@{domain}"
    return {k.removesuffix(ending): v for k, v in local.items() if k.endswith(ending)}


def _few_shot(chooser: DomainChooser, left: Site, count: int) -> Dice:
    """Fit on `count` training cases, the first in the order of the table."""
    study, cases = left.study, left.split("train")[:count]
    with tempfile.TemporaryDirectory(prefix="uharmony-lab-") as place:
        table = Path(place) / "cases.csv"
        CaseTable(cases=tuple(c.model_copy(update={"split": None}) for c in cases)).write_csv(table)
        fitted = fit_domain(chooser, table, name=left.name, device=left.device, like=left.config)
    network = build_network(study, (left.name,), seed=study.seed)
    partition = Partition.of(network, study.plan.local)
    mixing = chooser.model.network
    shared = Partition.of(mixing, study.plan.local).split(mixing.state_dict())[0]
    cpu = {key: tensor.cpu() for key, tensor in shared.items()}
    network.load_state_dict(partition.merge(cpu, fitted.local))
    served = with_undrawn(network.to(left.device), fitted.undrawn, study.task)
    dice: Dice = {}
    for case in left.split("test"):
        _put(dice, left, case.case, served, torch.ones(1))
    return dice


def _put(
    dice: Dice, site: Site, case: str, network: torch.nn.Module, mixture: Tensor | None
) -> None:
    """Measure one case under a mixture (K,) of the network's domains; None: residuals of zero."""
    measured = measure_volume(
        network,
        site.volumes[case],
        site.study,
        domain=mixture,
        device=site.device,
        annotated=site.annotated,
    )
    found = mean_dice(measured)
    if found is not None:
        dice[case] = round(found, 6)


def _input(site: Site, case: str) -> Tensor:
    return network_input(site.volumes[case], site.study.task)
