"""What `benchmarks.leakage` attacks: patients of two sites, and what the one would share.

Volumes are read, divided among sites, prepared and cut as in a simulated study: the same readers,
store, places of patches and statistics as in `uharmony_client.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.leakage_attacks import Floats
from uharmony_client.code_styles import CodeStyles
from uharmony_client.readers import read_cases
from uharmony_client.site_config import SiteConfig
from uharmony_client.statistic_measures import FEATURE_PATCHES, STYLE_PATCHES
from uharmony_client.volume_store import VolumeStore
from uharmony_model.alignment.class_prototypes import Prototypes, PrototypeSum, class_members
from uharmony_model.alignment.style_autoencoder import StyleAutoencoder
from uharmony_model.errors import DataError
from uharmony_model.features import deepest_features
from uharmony_model.frozen import parse
from uharmony_model.losses import segmentation_loss
from uharmony_model.networks import autoencoder_of, build_network, training_network
from uharmony_model.patches import StoredVolume, cut, draw_batch, is_foreground_patch, plan_patch
from uharmony_model.randomness import numpy_generator
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study, load_study
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.study_style import half_width, style_floor
from uharmony_model.unlabelled.style_average import StyleSum
from uharmony_simulation.config import FolderSource, Simulation
from uharmony_simulation.division import divide

STUDY = Path(__file__).resolve().parent.parent / "examples/studies/hippocampus-unlabelled.yaml"
SHARING, CURIOUS = "site-1", "site-2"


@dataclass(frozen=True, eq=False)
class Patient:
    """Patches (K, C, D, H, W) of one patient, as each statistic takes them.

    `again` are the same patient's with other draws: an attacker who has the images, but does not
    know the case's name at the site, has these at best.
    """

    name: str
    volume: StoredVolume
    style: Tensor
    labelled: Tensor
    label: Tensor
    again: Patient | None = None


@dataclass(frozen=True, eq=False)
class Town:
    """The study, the patients of the site that shares, and those of the one that attacks."""

    study: Study
    attribution: str
    sharing: tuple[Patient, ...]
    curious: tuple[Patient, ...]


def read_town(data: Path, folder: Path) -> Town:
    """The two sites of the study; volumes are prepared below `folder`.

    Raises:
        DataError: the folder of volumes cannot be read, or has too few cases.
    """
    study, section = load_study(STUDY)
    study = study.with_method("glua-fed")
    source = parse(Simulation, section, str(STUDY)).source
    assert isinstance(source, FolderSource)
    cases = [case for case in read_cases(data.resolve()).cases if case.label is not None]
    sites = divide(study, source, cases)
    if min(len(sites[name]) for name in (SHARING, CURIOUS)) < 4:
        raise DataError(f"{data}: {len(cases)} labelled cases; expected 16 at least")
    shelf = VolumeStore(folder)
    found = []
    for name in (SHARING, CURIOUS):
        config = SiteConfig(name=name, cases=data, store=folder)
        patients = []
        for case in sites[name]:
            volume = shelf.open(case, study.task, config)
            again = _patient(study, volume, name, f"not {case.case}")
            patients.append(replace(_patient(study, volume, name, case.case), again=again))
        found.append(tuple(patients))
    return Town(study, source.attribution, found[0], found[1])


def again(patients: Sequence[Patient]) -> tuple[Patient, ...]:
    """The same patients with other draws of patches."""
    return tuple(patient.again for patient in patients if patient.again is not None)


def styles(study: Study, patients: Sequence[Patient]) -> Tensor:
    """The style of every patient (P, C, 2b+1, 2b+1, 2b+1), float64, none of which is shared."""
    width, floor = half_width(study), style_floor(study.task)
    return torch.stack(
        [low_amplitude(p.style, width, floor=floor).double().mean(0) for p in patients]
    )


def shared_style(study: Study, patients: Sequence[Patient]) -> Tensor:
    """What a site gives out as the style of these patients, without its minimum."""
    width, floor = half_width(study), style_floor(study.task)
    total = StyleSum(study.task.channels, width)
    for patient in patients:
        total.add(patient.name, low_amplitude(patient.style, width, floor=floor))
    return total.mean(1)


def trained_network(town: Town, steps: int) -> SegmentationNetwork:
    """The study's network after some steps on the attacker's patients, of seeded first weights."""
    study = town.study
    network = build_network(study, (CURIOUS,), seed=study.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=study.training.learning_rate)
    annotated = torch.ones(len(study.task.classes), dtype=torch.bool)
    volumes = [patient.volume for patient in town.curious]
    for step in range(steps):
        batch = draw_batch(volumes, study.task, study.training, study.seed, CURIOUS, 1, step)
        loss = segmentation_loss(network(batch.image), batch.label, study.task, annotated)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def trained_autoencoder(town: Town, steps: int) -> StyleAutoencoder:
    """The style autoencoder after some steps on slices of the attacker's patients."""
    unlabelled = town.study.unlabelled.model_copy(update={"style": "codes"})
    study = town.study.model_copy(update={"unlabelled": unlabelled})
    network = training_network(study, (CURIOUS,), seed=study.seed)
    styles = CodeStyles(study)
    volumes = [patient.volume for patient in town.curious]
    for step in range(steps):
        batch = draw_batch(volumes, study.task, study.training, study.seed, CURIOUS, 1, step)
        draw = numpy_generator(study.seed, CURIOUS, step, "slices")
        styles.learn(network, [batch.image], draw)
    return autoencoder_of(network).eval().requires_grad_(False)


class _EnoughError(Exception):
    """The deepest level was reached."""


def features(network: SegmentationNetwork, image: Tensor) -> Tensor:
    """Features (B, C', d, h, w) of the deepest level, with their gradient."""

    def stop(module: nn.Module, inputs: object, output: Tensor) -> None:
        raise _EnoughError

    with deepest_features(network) as seen:
        # The decoder would cost as much again and is not looked at.
        handle = network.get_submodule(network.deepest).register_forward_hook(stop)
        try:
            network(image)
        except _EnoughError:
            pass
        finally:
            handle.remove()
    return seen.features


def prototype_sums(
    network: SegmentationNetwork, study: Study, patients: Sequence[Patient]
) -> list[PrototypeSum]:
    """The sums of every patient, none of which is shared."""
    found = []
    for patient in patients:
        with torch.no_grad():
            seen = features(network, patient.labelled)
        members = class_members(patient.label, study.task, seen.shape[2:])
        found.append(PrototypeSum.of_patient([(seen, members)]))
    return found


def shared_prototypes(sums: Sequence[PrototypeSum]) -> Prototypes:
    """What a site gives out of these patients, without its minima."""
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total.prototypes(min_patients=1, min_voxels=1)


def moments(shared: Prototypes, n: int) -> Floats:
    """The sums (d,) that prototypes were made of, over n: a mean over patients again."""
    voxels = shared.voxels.double()
    mean, variance = shared.mean.double(), shared.variance.double()
    sums = voxels[:, None] * mean
    squares = voxels[:, None] * (variance + mean**2)
    return np.asarray(torch.cat((voxels, sums.flatten(), squares.flatten())).numpy() / n)


def prototype_vector(shared: Prototypes) -> Tensor:
    """Means and deviations of the classes' features (J', 2C') as a row (d,), float64."""
    deviation = shared.variance.double().sqrt()
    return torch.cat((shared.mean.double(), deviation), 1).flatten()


def usual_members(town: Town, network: SegmentationNetwork) -> Tensor:
    """Where the classes lie in the attacker's own patches: shares (1, J', d, h, w)."""
    with torch.no_grad():
        grid = features(network, town.curious[0].labelled).shape[2:]
    masks = [class_members(p.label, town.study.task, grid).float().mean(0) for p in town.curious]
    return torch.stack(masks).mean(0, keepdim=True)


def soft_prototype_vector(seen: Tensor, members: Tensor) -> Tensor:
    """`prototype_vector` of each patch (B, d), of features and shares of the classes in a place."""
    shares = members / members.sum((2, 3, 4), keepdim=True).clamp_min(1e-6)
    mean = torch.einsum("bcdhw,ajdhw->bjc", seen, shares)
    square = torch.einsum("bcdhw,ajdhw->bjc", seen.square(), shares)
    deviation = (square - mean**2).clamp_min(1e-8).sqrt()
    return torch.cat((mean, deviation), 2).flatten(1)


def _patient(study: Study, volume: StoredVolume, site: str, case: str) -> Patient:
    style, _ = _patches(study, volume, (site, case), STYLE_PATCHES, labelled=False)
    image, label = _patches(study, volume, (site, case), FEATURE_PATCHES, labelled=True)
    return Patient(case, volume, style, image, label)


def _patches(
    study: Study, volume: StoredVolume, where: tuple[str, str], count: int, *, labelled: bool
) -> tuple[Tensor, Tensor]:
    size = study.training.patch
    image = np.empty((count, study.task.channels, *size), dtype=np.float32)
    label = np.empty((count, *size), dtype=np.uint8)
    for number in range(count):
        draw = numpy_generator(study.seed, *where, number, "statistics")
        aimed = labelled and is_foreground_patch(number, study.training.foreground)
        plan = plan_patch([volume], study.task, size, draw, foreground=aimed)
        cut(volume, plan.start, image[number], label[number])
    return torch.from_numpy(image), torch.from_numpy(label)
