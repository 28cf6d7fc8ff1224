"""The statistics that sites share, as `benchmarks.leakage` attacks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import leakage_data as data
from benchmarks.leakage_attacks import Floats, Misfit
from uharmony_client.statistic_measures import FEATURE_PATCHES
from uharmony_model.alignment.code_style import patch_codes, site_codes
from uharmony_model.alignment.discriminator import FeatureDiscriminator, discriminator_term
from uharmony_model.alignment.style_autoencoder import StyleAutoencoder, middle_slices
from uharmony_model.randomness import numpy_generator
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.study_style import half_width, style_axis, style_floor

SKETCH = 512
"""Numbers that the attacks see of a gradient of 277,441; a covariance of all would not fit."""


@dataclass(frozen=True, eq=False)
class Statistic:
    """One kind of statistic, as the attacks see it.

    `rows (P, d)` of the sharing site and `own (Q, d)` of the attacker are additive: a release of
    patients is the mean of their rows. `rows_again` and `own_again` are of other draws of patches.
    `release` gives it back from what is really shared, float32. `view` is the form that is matched
    by an image, of rows (..., d), and `misfit` says how far images are from it.
    """

    name: str
    rows: Floats
    own: Floats
    rows_again: Floats
    own_again: Floats
    release: Callable[[Sequence[int]], Floats]
    view: Callable[[Floats], Floats]
    misfit: Callable[[Tensor], Misfit]


def amplitude_of(town: data.Town) -> Statistic:
    """The low-frequency amplitude that a site shares as its style."""
    study = town.study
    every = [data.styles(study, patients).flatten(1).numpy() for patients in _groups(town)]
    # Bins k and -k hold the same number, so half of them say all.
    half = slice(0, every[0].shape[1] // 2 + 1)
    rows, own, rows_again, own_again = (found[:, half] for found in every)
    width, floor = half_width(study), style_floor(study.task)
    scale = torch.from_numpy(own.std(0, ddof=1)).float()

    def misfit(wanted: Tensor) -> Misfit:
        def of(image: Tensor) -> Tensor:
            found = low_amplitude(image, width, floor=floor).flatten(1)[:, half]
            return ((found - wanted) / scale).square().mean(1)

        return of

    def release(chosen: Sequence[int]) -> Floats:
        shared = data.shared_style(study, [town.sharing[i] for i in chosen])
        return np.asarray(shared.flatten().double().numpy()[half])

    return Statistic(
        "amplitude", rows, own, rows_again, own_again, release, lambda row: row, misfit
    )


def _groups(town: data.Town) -> tuple[tuple[data.Patient, ...], ...]:
    sharing, curious = town.sharing, town.curious
    return sharing, curious, data.again(sharing), data.again(curious)


def prototypes_of(town: data.Town, network: SegmentationNetwork) -> Statistic:
    """The class prototypes that a site shares in a round with these weights."""
    every = [data.prototype_sums(network, town.study, patients) for patients in _groups(town)]
    rows, own, rows_again, own_again = (
        np.stack([data.moments(data.shared_prototypes([one]), 1) for one in found])
        for found in every
    )
    classes = town.study.task.outputs
    members = data.usual_members(town, network)

    def view(row: Floats) -> Floats:
        voxels, values = row[..., :classes, None], row[..., classes:]
        mean, square = np.split(values.reshape(*row.shape[:-1], 2 * classes, -1), 2, axis=-2)
        mean, square = (table / np.maximum(voxels, 1e-9) for table in (mean, square))
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        both = np.concatenate((mean, deviation), -1)
        return np.asarray(both.reshape(*row.shape[:-1], -1))

    scale = torch.from_numpy(view(own).std(0, ddof=1)).float()
    scale = scale.clamp_min(float(scale.median()) / 10)

    def misfit(wanted: Tensor) -> Misfit:
        def of(image: Tensor) -> Tensor:
            found = data.soft_prototype_vector(data.features(network, image), members)
            return ((found - wanted) / scale).square().mean(1)

        return of

    def release(chosen: Sequence[int]) -> Floats:
        shared = data.shared_prototypes([every[0][i] for i in chosen])
        return data.moments(shared, len(chosen))

    return Statistic("prototypes", rows, own, rows_again, own_again, release, view, misfit)


def codes_of(town: data.Town, autoencoder: StyleAutoencoder) -> Statistic:
    """Mean and deviation of the style codes of a site's patients, by this autoencoder.

    A row is the patient's mean code and mean squared code, both C * S numbers: deviations about the
    mean of all are made of these.
    """
    axis = style_axis(town.study.task)

    def codes(patient: data.Patient) -> Floats:
        return np.asarray(patch_codes(autoencoder, patient.style, axis).flatten(1).double().numpy())

    every = [[codes(patient) for patient in patients] for patients in _groups(town)]
    rows, own, rows_again, own_again = (
        np.stack([np.concatenate((z.mean(0), (z**2).mean(0))) for z in found]) for found in every
    )
    numbers = rows.shape[1] // 2
    scale = torch.from_numpy(own[:, :numbers].std(0, ddof=1)).float()

    def misfit(wanted: Tensor) -> Misfit:
        def of(image: Tensor) -> Tensor:
            slices = [middle_slices(patch, axis) for patch in image]
            means = [autoencoder.encode_style(some).mean(0) for some in slices]
            return ((torch.stack(means) - wanted) / scale).square().mean(1)

        return of

    def release(chosen: Sequence[int]) -> Floats:
        patients = [str(i) for i in chosen for _ in every[0][i]]
        found = np.concatenate([every[0][i] for i in chosen])[:, None]
        draw = numpy_generator(town.study.seed, "codes of a release")
        tensors = site_codes(found, patients, draw, min_patients=1).state().values()
        mean, spread = (tensor.flatten().double().numpy() for tensor in tensors)
        return np.concatenate((mean, spread**2 + mean**2))

    return Statistic(
        "codes",
        rows,
        own,
        rows_again,
        own_again,
        release,
        lambda row: row[..., :numbers],
        misfit,
    )


def gradients_of(town: data.Town, network: SegmentationNetwork) -> Statistic:
    """The gradient of the discriminator that a site without labels sends in the first round.

    Of it the attacks see a count sketch: each number with a random sign in one of `SKETCH` sums, by
    which lengths and angles stay about what they are.
    """
    channels = data.features(network, town.sharing[0].style[:1]).shape[1]
    discriminator = FeatureDiscriminator(channels, seed=town.study.seed)
    parameters = list(discriminator.parameters())
    draw = numpy_generator(town.study.seed, "sketch")
    numbers = sum(parameter.numel() for parameter in parameters)
    signs = torch.from_numpy(draw.choice([-1.0, 1.0], numbers)).float()
    places = torch.from_numpy(draw.integers(SKETCH, size=numbers))

    def gradient(seen: Tensor, *, graph: bool = False) -> Tensor:
        with (
            torch.enable_grad()
        ):  # where only the value is asked for, it is a gradient all the same
            term = discriminator_term(discriminator(seen), is_target=True)
            found = torch.autograd.grad(term, parameters, create_graph=graph)
        return torch.cat([tensor.flatten() for tensor in found])

    def sketched(row: Tensor) -> Tensor:
        return torch.zeros(SKETCH, dtype=row.dtype).index_add(0, places, signs.to(row) * row)

    def whole(patient: data.Patient) -> Tensor:
        with torch.no_grad():
            seen = data.features(network, patient.style[:FEATURE_PATCHES])
        return gradient(seen)

    every = [[whole(patient) for patient in patients] for patients in _groups(town)]
    rows, own, rows_again, own_again = (
        torch.stack([sketched(one.double()) for one in found]).numpy() for found in every
    )
    scale = torch.from_numpy(own.std(0, ddof=1)).float()

    def misfit(wanted: Tensor) -> Misfit:
        def of(image: Tensor) -> Tensor:
            seen = data.features(network, image)
            graph = seen.requires_grad
            found = torch.stack([sketched(gradient(one[None], graph=graph)) for one in seen])
            return ((found - wanted) / scale).square().mean(1)

        return of

    def release(chosen: Sequence[int]) -> Floats:
        mean = torch.stack([every[0][i].double() for i in chosen]).mean(0).float()
        return np.asarray(sketched(mean.double()).numpy())

    return Statistic(
        "discriminator", rows, own, rows_again, own_again, release, lambda row: row, misfit
    )
