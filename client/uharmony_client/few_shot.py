"""A new domain from a few labelled cases (U3): what is shared rests, the residuals are fitted.

    residuals of zero  or  the gate's mixture of published experts     start
    `steps` steps on the labelled cases, as a site trains              fitted
    a patient that was not trained on: best of zero, start, fitted     kept

Nothing leaves the machine, and the result is a site's entry of the model. The fit is ours.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from uharmony_client.case_table import Case
from uharmony_client.domain_choice import DomainChooser
from uharmony_client.evaluate import mean_dice, measure_volume, network_input
from uharmony_client.nifti import MAX_VOXELS
from uharmony_client.optimizer import make_optimizer
from uharmony_client.readers import read_cases
from uharmony_client.site_config import SiteConfig
from uharmony_client.training_steps import LocalData, StepListener, cosine, run_steps
from uharmony_client.volume_store import StoredVolume, VolumeStore
from uharmony_model.bundle import Model, save_bundle
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.exchange.partition import Partition
from uharmony_model.experts import mixed_expert
from uharmony_model.frozen import parse
from uharmony_model.networks import build_network
from uharmony_model.randomness import numpy_generator
from uharmony_model.task import Task
from uharmony_model.undrawn import undrawn_names, with_undrawn

STEPS = 200
LEAST_CASES = 2
LEAST_TO_CHOOSE = 4
"""From so many patients on, one of them is not trained on."""

_OF_THE_CASES = ("annotated", "missing", "label_map", "modality_map")

State = dict[str, Tensor]
Kept = Literal["zero", "start", "fitted"]
_ORDER: tuple[Kept, ...] = ("zero", "start", "fitted")  # of equals, the one that changed less


@dataclass(frozen=True, eq=False)
class FewShot:
    """A new domain: its residuals by KEY@DOMAIN, what they are, and how that was decided.

    `dice` is that of the cases of the `held_out` patient, by candidate; None where no class could
    be measured. Without such a patient there is none, and the fitted residuals are kept. Classes
    that are `undrawn` in the cases stay the shared model's.
    """

    name: str
    local: State
    modalities: tuple[str, ...]
    trained_on: tuple[str, ...]
    held_out: tuple[str, ...]
    kept: Kept
    dice: Mapping[Kept, float | None]
    steps: int
    undrawn: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line for whoever waits: how many cases were used, and what was kept."""
        used = f"few-shot: {len(self.trained_on)} cases trained on"
        if not self.held_out:
            return f"{used}, too few to keep one for choosing; the fitted domain is kept"
        scores = ", ".join(
            f"{kind} {'-' if score is None else format(score, '.3f')}"
            for kind, score in self.dice.items()
        )
        return f"{used}, {len(self.held_out)} held out; its Dice: {scores}; kept: {self.kept}"

    @property
    def facts(self) -> dict[str, object]:
        """The same for the JSON beside a segmentation: counts, no names of cases."""
        return {
            "cases": len(self.trained_on) + len(self.held_out),
            "held_out": len(self.held_out),
            "steps": self.steps,
            "kept": self.kept,
            "dice": dict(self.dice),
        }


def fit_domain(
    chooser: DomainChooser,
    folder: Path,
    *,
    name: str,
    device: torch.device,
    steps: int = STEPS,
    modalities: Sequence[str] = (),
    max_voxels: int = MAX_VOXELS,
    on_step: StepListener | None = None,
    like: SiteConfig | None = None,
) -> FewShot:
    """Fit the residuals of one new domain on the labelled cases in `folder` (or in a table).

    `name` is that of the new site and of its domain. `modalities` are those of cases that name
    none. Prepared volumes lie in a private temporary folder that is removed at the end. `like`
    tells what the cases lack and how they name it: of it count `annotated`, `missing`, `label_map`
    and `modality_map`. Without it every class is drawn in every labelled case.

    Raises:
        ConfigError: the model's method has no residuals, or `like` does not fit its study.
        DataError: fewer than two labelled cases, several domains, or a case that does not fit.
        TrainingError: the loss is not finite.
    """
    with tempfile.TemporaryDirectory(prefix="uharmony-few-shot-") as place:
        content = {"name": name, "cases": folder, "store": place}
        config = parse(SiteConfig, {**content, "resources": {"max_voxels": max_voxels}}, "--name")
        if like is not None:
            config = config.model_copy(update={key: getattr(like, key) for key in _OF_THE_CASES})
        return _fitted(chooser, config, device, steps, modalities, on_step)


def _fitted(
    chooser: DomainChooser,
    config: SiteConfig,
    device: torch.device,
    steps: int,
    modalities: Sequence[str],
    on_step: StepListener | None,
) -> FewShot:
    study, name = chooser.model.study, config.name
    network = build_network(study, (name,), seed=study.seed)
    partition = Partition.of(network, study.plan.local)
    learned = frozenset(partition.local_keys) & {key for key, _ in network.named_parameters()}
    if not (study.keeps_residuals and learned):
        raise ConfigError(
            f"method {study.method} has no residuals that a new site could fit; --few-shot needs "
            "a model of the method uharmony"
        )
    annotated = torch.tensor(config.annotates(study.task))
    cases = _labelled(config.cases, name, modalities)
    training, held_out = _without_one_patient(cases, study.seed, name)
    store = VolumeStore(config.store / "volumes")
    volumes = {case.case: store.open(case, study.task, config) for case in cases}
    shared = _shared(chooser.model)
    # A fresh network's residuals are zero.
    candidates: dict[Kept, State] = {"zero": _own(partition, network.state_dict())}
    start = _mixture(chooser, [volumes[case.case] for case in training], name)
    if start is not None:
        candidates["start"] = start
    network.load_state_dict(partition.merge(shared, start or candidates["zero"]))
    network.to(device)
    run_steps(
        network,
        make_optimizer(network, study.training),
        LocalData(
            site=name,
            volumes=[volumes[case.case] for case in training],
            domains=[0] * len(training),
            annotated=annotated,
        ),
        study,
        round_=0,
        count=steps,
        rate=lambda step: cosine(study.training.learning_rate, step / steps),
        learns=lambda step: learned,
        on_step=on_step,
    )
    candidates["fitted"] = _own(partition, network.state_dict())
    undrawn = undrawn_names(annotated, study.task)
    served = with_undrawn(network, undrawn, study.task)
    dice: dict[Kept, float | None] = {}
    for kind, local in candidates.items() if held_out else ():
        network.load_state_dict(partition.merge(shared, local))
        held = [volumes[case.case] for case in held_out]
        dice[kind] = _mean_dice(served, held, chooser.model, device, annotated)
    kept = _best(dice)
    return FewShot(
        name=name,
        local=candidates[kept],
        modalities=_common_modalities(cases, config, study.task),
        trained_on=tuple(case.case for case in training),
        held_out=tuple(case.case for case in held_out),
        kept=kept,
        dice=dice,
        steps=steps,
        undrawn=undrawn,
    )


def save_fitted(folder: Path, chooser: DomainChooser, fitted: FewShot) -> None:
    """Write a model's folder with the new site as its only entry, whole or not at all.

    Raises:
        StoreError: the folder cannot be written.
    """
    save_bundle(
        folder,
        chooser.model.study,
        _shared(chooser.model),
        {fitted.name: fitted.local},
        {fitted.name: (fitted.name,)},
        {fitted.name: fitted.modalities},
        undrawn={fitted.name: fitted.undrawn},
    )


def _labelled(folder: Path, name: str, modalities: Sequence[str]) -> list[Case]:
    table = read_cases(folder, site=name)
    cases = sorted((c for c in table.cases if c.label is not None), key=lambda case: case.case)
    if len(cases) < LEAST_CASES:
        raise DataError(
            f"{folder}: {len(cases)} of {len(table.cases)} cases have a label; expected at least "
            f"{LEAST_CASES}, better 4 to 10"
        )
    domains = {(case.site, case.domain) for case in cases}
    if len(domains) > 1:
        named = ", ".join(f"{site}/{domain}" for site, domain in sorted(domains))
        raise DataError(
            f"{folder}: cases of {len(domains)} domains ({named:.300}); few-shot fits one: give "
            "the cases of each in a folder of their own"
        )
    given = tuple(modalities)
    return [c if c.modality else c.model_copy(update={"modality": given}) for c in cases]


def _without_one_patient(
    cases: Sequence[Case], seed: int, name: str
) -> tuple[list[Case], list[Case]]:
    """(to train on, to choose by); the second is empty where patients are few."""
    patients = sorted({case.patient for case in cases})
    if len(patients) < LEAST_TO_CHOOSE:
        return list(cases), []
    drawn = numpy_generator(seed, name, "few-shot held out").integers(len(patients))
    one = patients[int(drawn)]
    return [c for c in cases if c.patient != one], [c for c in cases if c.patient == one]


def _shared(model: Model) -> State:
    partition = Partition.of(model.network, model.study.plan.local)
    tensors = partition.split(model.network.state_dict())[0]
    return {key: tensor.detach().cpu() for key, tensor in tensors.items()}


def _own(partition: Partition, state: Mapping[str, Tensor]) -> State:
    local = partition.split(state)[1]
    return {key: tensor.detach().cpu().clone() for key, tensor in local.items()}


def _mixture(chooser: DomainChooser, volumes: Sequence[StoredVolume], name: str) -> State | None:
    """What the gate gives the cases' mean descriptor, as residuals of the new domain."""
    if chooser.gate is None or not chooser.experts:
        return None
    task = chooser.model.study.task
    rows = [chooser.describe(network_input(volume, task)) for volume in volumes]
    weights = chooser.mixture(chooser.gate.choose(np.mean(rows, axis=0)))
    mixed = mixed_expert(chooser.experts, weights)
    return {f"{key}@{name}": tensor.cpu() for key, tensor in mixed.residuals.items()}


def _mean_dice(
    network: nn.Module,
    volumes: Sequence[StoredVolume],
    model: Model,
    device: torch.device,
    annotated: Tensor,
) -> float | None:
    """The mean over volumes; each the mean over its classes."""
    measured = (
        measure_volume(network, v, model.study, domain=0, device=device, annotated=annotated)
        for v in volumes
    )
    found = [dice for metrics in measured if (dice := mean_dice(metrics)) is not None]
    return statistics.fmean(found) if found else None


def _best(dice: Mapping[Kept, float | None]) -> Kept:
    known: dict[Kept, float] = {
        kind: score for kind in _ORDER if (score := dice.get(kind)) is not None
    }
    return max(known, key=lambda kind: known[kind]) if known else "fitted"


def _common_modalities(cases: Sequence[Case], config: SiteConfig, task: Task) -> tuple[str, ...]:
    """The study's modalities of all cases, channel by channel; empty when they vary."""
    lacking = config.lacks(task)
    named = {tuple(config.modality_map.get(name, name) for name in c.modality) for c in cases}
    return tuple(n for n in named.pop() if n not in lacking) if len(named) == 1 else ()
