"""Alignment at one site: both halves of its loss, its styles, its prototypes, what it weighs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.few_labels import OVERLAPPING, Place, data_of, stored, study_of
from uharmony_client.alignment_objective import MEMORY, Alignment
from uharmony_client.objective import LocalData
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.alignment.feature_mask import RAMP
from uharmony_model.alignment.prototype_gap import EPS
from uharmony_model.features import deepest_features
from uharmony_model.losses import segmentation_loss
from uharmony_model.patches import draw_batch
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study
from uharmony_model.unlabelled.amplitude import low_amplitude, mix_amplitude

ROUND, STEP, FLOOR = 2, 1, -4.0


def given() -> Prototypes:
    wave = torch.arange(16).reshape(2, 8).float()
    return Prototypes(wave.cos(), 1 + wave.sin().square(), torch.tensor([300.0, 200.0]))


def passed(network: nn.Module, image: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and features of the deepest level (B, 8, 4, 4, 4)."""
    with deepest_features(network) as seen:
        logits = network(image, domain)
    return logits, seen.features


def batch_of(study: Study, data: LocalData, *, labelled: bool, step: int = STEP):
    site, cases, domains = (
        ("alpha", data.volumes, data.domains)
        if labelled
        else ("alpha/unlabelled", data.unlabelled, data.unlabelled_domains)
    )
    batch = draw_batch(cases, study.task, study.training, study.seed, site, ROUND, step)
    return batch.image, batch.label, torch.tensor([domains[case] for case in batch.cases])


def moments(features: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and voxels of background and the class, label by nearest neighbour."""
    small = label[:, 1::2, 1::2, 1::2]  # nearest of a grid of half the edge
    found = [features.movedim(1, -1)[small == value].detach() for value in (0, 1)]
    means = torch.stack([rows.mean(0) for rows in found])
    variances = torch.stack([rows.var(0, unbiased=False) for rows in found])
    return means, variances, torch.tensor([float(len(rows)) for rows in found])


def aligned(study: Study, logits: Tensor, features: Tensor, known: Prototypes) -> Tensor:
    """How far the masked mean of each class is from its prototype, over confident places."""
    progress = ((ROUND - 1) * 2 + STEP) / (study.training.rounds * 2)
    strength = min(progress / RAMP, 1)
    p = logits.softmax(1).detach()
    weights = F.avg_pool3d(p, 2)
    sure = F.avg_pool3d((p.amax(1) >= study.unlabelled.threshold).float(), 2) >= 0.5
    gaps = torch.zeros(features[:, 0].shape)
    for c in range(2):
        mean, variance = (v[c].view(1, 8, 1, 1, 1) for v in (known.mean, known.variance))
        gaps = gaps + weights[:, c] * ((features - mean) ** 2 / (variance + EPS)).mean(1)
    top = torch.from_numpy(np.quantile(gaps.detach().double().numpy(), [0.95])).float()
    mask = (gaps.detach() / top).clamp(max=1)
    distances = []
    for c in range(2):
        here = (1 + strength * mask) * weights[:, c]
        if weights[:, c][sure].sum() < 1:
            continue
        masked = (features.movedim(1, -1)[sure] * here[sure][:, None]).sum(0) / here[sure].sum()
        distances.append(((masked - known.mean[c]) ** 2 / (known.variance[c] + EPS)).mean())
    return torch.stack(distances).mean()


def ramp(study: Study) -> float:
    progress = ((ROUND - 1) * 2 + STEP) / (study.training.rounds * 2)
    return math.exp(-5 * (1 - progress) ** 2)


@pytest.mark.parametrize("amplitude", ["ramp", "full", "off"])
@pytest.mark.parametrize("styles", [True, False])
def test_the_loss_is_its_equation(amplitude, styles):
    study = study_of("glua", "uharmony", unlabelled={"amplitude": amplitude, "weight": 0.8})
    place, data = Place(study, ("x", "y")), data_of(domains=2)
    network = place.network()
    shared = [torch.full((1, 3, 3, 3), value) for value in (0.2, 0.9)] if styles else []
    objective = Alignment(data, study, shared, given())
    found = objective.loss(network, ROUND, STEP, drop=False)

    image, label, domain = batch_of(study, data, labelled=True)
    other, _, of_other = batch_of(study, data, labelled=False)
    style = low_amplitude(other, 1, floor=FLOOR)
    if styles:
        chosen = numpy_generator(study.seed, "alpha", ROUND, STEP, "style").integers(2, size=2)
        style = torch.stack([shared[i] for i in chosen])
    draw = numpy_generator(study.seed, "alpha", ROUND, STEP, "ratio")
    top = 1.0 if amplitude == "full" else 0.5
    ratio = torch.from_numpy(draw.uniform(0, top, size=2)).float()
    terms = [segmentation_loss(network(image, domain), label, study.task, data.annotated)]
    if amplitude != "off":
        changed = mix_amplitude(image, style, ratio, floor=FLOOR)
        assert not torch.allclose(changed, image, atol=1e-3)
        terms.append(segmentation_loss(network(changed, domain), label, study.task, data.annotated))
    added = aligned(study, *passed(network, other, of_other), given())
    wanted = torch.stack(terms).mean() + 0.8 * ramp(study) * added
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_in_one_place_the_prototypes_are_those_of_styled_patches_and_are_remembered():
    study = study_of("glua", training={"foreground": 1.0})
    data, network = data_of(), Place(study).network()
    objective = Alignment(data, study)
    wanted: Prototypes | None = None
    for step in range(3):
        objective.labelled_loss(network, ROUND, step, drop=False)
        image, label, domain = batch_of(study, data, labelled=True, step=step)
        other, _, _ = batch_of(study, data, labelled=False, step=step)
        draw = numpy_generator(study.seed, "alpha", ROUND, step, "ratio")
        ratio = torch.from_numpy(draw.uniform(0, (2 + step) / 6, size=2)).float()
        styled = mix_amplitude(image, low_amplitude(other, 1, floor=FLOOR), ratio, floor=FLOOR)
        mean, variance, voxels = moments(passed(network, styled, domain)[1], label)
        assert bool((voxels > 0).all())
        if wanted is None:
            wanted = Prototypes(mean, variance, voxels)
        else:
            wanted = Prototypes(
                MEMORY * wanted.mean + (1 - MEMORY) * mean,
                MEMORY * wanted.variance + (1 - MEMORY) * variance,
                voxels,
            )
        held = objective.carried()
        assert {name for name in held if "/" in name} == {
            f"prototypes/{name}" for name in ("mean", "variance", "voxels")
        }
        torch.testing.assert_close(held["prototypes/mean"], wanted.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            held["prototypes/variance"], wanted.variance, rtol=1e-3, atol=1e-5
        )
        assert torch.equal(held["prototypes/voxels"], wanted.voxels)
    again = Alignment(data, study)
    again.restore(objective.outlives())
    losses = [
        one.unlabelled_loss(network, ROUND, STEP, drop=False).detach() for one in (objective, again)
    ]
    assert torch.equal(*losses)
    assert wanted is not None
    image, _, domain = batch_of(study, data, labelled=False)
    expected = aligned(study, *passed(network, image, domain), wanted)
    torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-3, atol=1e-5)


def test_a_class_that_a_batch_lacks_keeps_its_prototype():
    study = study_of("glua")
    objective = Alignment(data_of(), study)
    first, second = given(), given()
    lacking = Prototypes(
        torch.stack((second.mean[0] + 1, torch.zeros(8))),
        torch.stack((second.variance[0], torch.zeros(8))),
        torch.tensor([50.0, 0.0]),
    )
    for start, nxt in ((first, lacking), (lacking, first)):
        objective._running = None
        objective._remember(start)
        objective._remember(nxt)
        held = objective.carried()
        background = MEMORY * start.mean[0] + (1 - MEMORY) * nxt.mean[0]
        torch.testing.assert_close(held["prototypes/mean"][0], background)
        assert torch.equal(held["prototypes/mean"][1], first.mean[1])
        assert torch.equal(held["prototypes/variance"][1], first.variance[1])


@pytest.mark.parametrize("known", [None, "nobody"])
def test_without_prototypes_nothing_is_learned_and_nothing_counts(known):
    study = study_of("glua")
    nobody = Prototypes(torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(2))
    objective = Alignment(data_of([]), study, (), nobody if known else None)
    network = Place(study).network()
    loss = objective.loss(network, ROUND, STEP, drop=False)
    loss.backward()
    assert loss.item() == 0
    assert not any(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)
    assert objective.share == 0
    sure = Alignment(data_of([]), study, (), given())
    sure.loss(network, ROUND, STEP, drop=False)
    assert 0 < sure.share <= 1


def test_the_gradient_is_the_encoders_alone():
    study = study_of("glua")
    network = Place(study).network()
    objective = Alignment(data_of([]), study, (), given())
    objective.loss(network, ROUND, STEP, drop=False).backward()
    names = [n for n, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert names
    assert all(name.startswith(("network.model.0", "network.model.1")) for name in names)


def test_prototypes_that_were_given_go_before_ones_own():
    study = study_of("glua")
    network, data = Place(study).network(), data_of()
    losses = []
    for prototypes in (None, given()):
        objective = Alignment(data, study, (), prototypes)
        objective.labelled_loss(network, ROUND, STEP, drop=False)
        losses.append(objective.unlabelled_loss(network, ROUND, STEP, drop=False).item())
    alone = Alignment(data_of([]), study, (), given())
    assert losses[1] == alone.unlabelled_loss(network, ROUND, STEP, drop=False).item()
    assert losses[0] != losses[1]


def test_overlapping_classes_and_masks_of_presence_go_through():
    intensity = {"CT": {"policy": "zscore"}, "MR": {"policy": "zscore"}}
    task = {**OVERLAPPING, "channels": 2, "presence": True, "intensity": intensity}
    study = study_of("glua", task=task, training={"modality_dropout": 0.4})
    cases = [
        [case.__class__(**{**vars(case), "present": (True, True)}) for case in stored(2, seed, 2)]
        for seed in (0, 1)
    ]
    seen: list[Tensor] = []
    network = Place(study).network()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective = Alignment(data_of(*cases, annotated=(True, True)), study)
    for step in range(3):
        assert objective.loss(network, ROUND, step, drop=False).item() > 0
    images = torch.cat(seen)
    masks = images[:, 2:]
    assert bool(((masks == 0) | (masks == 1)).all())
    assert not bool(images[:, :2][masks == 0].any())
