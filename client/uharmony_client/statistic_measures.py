"""What a site measures of its own patients for others to learn with.

    amplitude       the mean style of its training patients, with labels or without
    codes           mean and deviation of the style codes of the same patches, by the autoencoder
                    as it came to rest
    prototypes      of the deepest features over its labelled patients, under a round's weights
    discriminator   the gradient of its term of L_D: of its labelled patients where it has some,
                    else of all; under a round's weights

Each of patches that are always the same, of so many patients or more, or nothing. A gradient is the
mean over patients of the mean over a patient's places: each patient weighs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uharmony_client.case_table import Case
from uharmony_client.code_styles import measured_codes
from uharmony_client.learning import NOTHING, Given
from uharmony_client.personal import local_parameters
from uharmony_client.policy import least_patients
from uharmony_client.site import Site
from uharmony_client.site_round import Bench
from uharmony_client.workbench import carried_after
from uharmony_model.alignment.class_prototypes import PrototypeSum, class_members
from uharmony_model.alignment.discriminator import discriminator_term, gradients_of
from uharmony_model.alignment.shared_discriminator import (
    SharedDiscriminator,
    discriminator_of,
    travelling,
)
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.statistics import StatisticsForm
from uharmony_model.features import deepest_features
from uharmony_model.inference import evaluating
from uharmony_model.patches import cut, is_foreground_patch, plan_patch, without_label
from uharmony_model.presence import with_presence
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.study_style import style_floor
from uharmony_model.unlabelled.style_average import AMPLITUDE, StyleSum

STYLE_PATCHES = 8  # of each case, anywhere in it, as unlabelled patches lie
FEATURE_PATCHES = 4  # of each case in each round; labelled ones as training patches lie

Patients = Mapping[str, Sequence[Case]]


@dataclass(frozen=True)
class Workplace:
    """What a statistic of one round is measured with."""

    site: Site
    bench: Bench
    order: Instruction
    form: StatisticsForm
    given: Given = NOTHING

    @property
    def least(self) -> int:
        """Of fewer patients nothing is measured."""
        return least_patients(self.site.config.policy, self.site.study)

    @property
    def taught(self) -> Patients:
        """Training patients with a label that may be used, and those cases of theirs."""
        # A case whose label may not be used is another object there.
        labelled = {id(volume) for volume in self.site.training_data().volumes}
        return self.patients(lambda case: id(self.site.volumes[case.case]) in labelled)

    def patients(self, chosen: Callable[[Case], bool]) -> Patients:
        """Training patients and the chosen ones of their cases."""
        cases = [case for case in self.site.split("train") if chosen(case)]
        found: dict[str, list[Case]] = {}
        for case in sorted(cases, key=lambda case: (case.patient, case.case)):
            found.setdefault(case.patient, []).append(case)
        return found

    @contextmanager
    def network(self) -> Iterator[None]:
        """The bench's network with the round's weights and what the site carries into it."""
        bench = self.bench
        carried = local_parameters(carried_after(self.site, self.order.round - 1))
        bench.network.load_state_dict(bench.partition.merge(bench.shared, carried))
        with evaluating(bench.network), torch.no_grad():
            yield


def amplitude_of(here: Workplace, patients: Patients) -> dict[str, Tensor]:
    """The mean low amplitudes of these patients."""
    form = here.form
    assert form.style is not None  # noqa: S101 - as the study asks for it
    channels, width = form.style
    total, floor = StyleSum(channels, width), style_floor(here.site.study.task)
    for patient, cases in patients.items():
        for case in cases:
            image, _ = _patches(here.site, case, STYLE_PATCHES, labelled=False)
            total.add(patient, low_amplitude(image, width, floor=floor))
    return {AMPLITUDE: form.style_of({AMPLITUDE: total.mean(here.least)})}


def codes_of(here: Workplace, patients: Patients) -> dict[str, Tensor]:
    """By the autoencoder of the round's weights, a code for each channel of each patch.

    Raises:
        ExchangeError: the autoencoder learns still, so that codes could not be compared later.
    """
    site, study = here.site, here.site.study
    if here.order.round <= study.style_rounds:
        raise ExchangeError(
            f"style codes are asked for in round {here.order.round}; they are given after round "
            f"{study.style_rounds}, when the autoencoder rests"
        )
    images = (
        (patient, _patches(site, case, STYLE_PATCHES, labelled=False)[0])
        for patient, cases in patients.items()
        for case in cases
    )
    draw, bench = numpy_generator(study.seed, site.name, "codes"), here.bench
    found = measured_codes(bench.network, bench.shared, images, study.task, draw, here.least)
    return here.form.codes_of(found.state()).state()


def prototypes_of(here: Workplace) -> dict[str, Tensor] | None:
    """Prototypes of the classes that enough labelled patients have; None where there is none."""
    patients = here.taught
    if len(patients) < here.least:
        return None
    assert here.form.prototypes is not None  # noqa: S101 - as the study asks for them
    total = PrototypeSum.zero(*here.form.prototypes)
    with here.network():
        for cases in patients.values():
            total = total + PrototypeSum.of_patient([_members(here, case) for case in cases])
    found = total.prototypes(here.least)
    if not bool(found.present.any()):
        return None
    return here.form.prototypes_of(found.tensors()).tensors()


def gradient_of(here: Workplace, *, target: bool) -> dict[str, Tensor] | None:
    """The gradient of this site's term under the discriminator of the round, by `travelling`."""
    patients = here.patients(lambda _: True) if target else here.taught
    if len(patients) < here.least:
        return None
    channels = here.form.discriminator
    assert channels is not None  # noqa: S101 - as the study asks for it
    weights = here.given.discriminator
    if weights is None:
        weights = SharedDiscriminator.first(channels, here.site.study.seed).weights
    device = next(here.bench.network.parameters()).device
    discriminator = discriminator_of(weights).to(device)
    total: dict[str, Tensor] = {}
    with here.network():
        for cases in patients.values():
            features = torch.cat([_features(here, c, labelled=not target)[0] for c in cases])
            with torch.enable_grad():
                term = discriminator_term(discriminator(features), target)
                found = gradients_of(discriminator, term)
            for name, gradient in found.items():
                kept = gradient.double().cpu()
                total[name] = total[name] + kept if name in total else kept
    mean = {name: (summed / len(patients)).float() for name, summed in total.items()}
    sent = travelling(mean)
    here.form.discriminator_of(sent)  # as every receiver will look at it
    return sent


def _members(here: Workplace, case: Case) -> tuple[Tensor, Tensor]:
    """Features (B, C, ...) of a case's patches, and which class each place is of (B, J', ...)."""
    features, label = _features(here, case, labelled=True)
    task, annotated = here.site.study.task, here.site.annotated
    members = class_members(label.to(features.device), task, features.shape[2:], annotated)
    return features, members


def _features(here: Workplace, case: Case, *, labelled: bool) -> tuple[Tensor, Tensor]:
    """Features (B, C, ...) of a case's patches in the bench's network, with their labels."""
    site, network = here.site, here.bench.network
    device = next(network.parameters()).device
    image, label = _patches(site, case, FEATURE_PATCHES, labelled=labelled)
    if site.study.task.presence:
        present = torch.tensor([list(site.volumes[case.case].present)] * len(image))
        image = with_presence(image, present, site.study.task)
    domain = torch.full((len(image),), site.domains.index(case.domain), device=device)
    with deepest_features(network) as seen:
        network(image.to(device), domain)
    return seen.features, label


def _patches(site: Site, case: Case, count: int, *, labelled: bool) -> tuple[Tensor, Tensor]:
    """Patches (count, C, D, H, W) of one case, unchanged, with their labels; always the same."""
    study, stored = site.study, site.volumes[case.case]
    volume = stored if labelled else without_label(stored)
    size = study.training.patch
    image = np.empty((count, study.task.channels, *size), dtype=np.float32)
    label = np.empty((count, *size), dtype=np.uint8)
    for number in range(count):
        draw = numpy_generator(study.seed, site.name, case.case, number, "statistics")
        aimed = labelled and is_foreground_patch(number, study.training.foreground)
        plan = plan_patch([volume], study.task, size, draw, foreground=aimed)
        cut(volume, plan.start, image[number], label[number])
    return torch.from_numpy(image), torch.from_numpy(label)
