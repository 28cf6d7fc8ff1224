"""The plain rules: each loss against its equation, its teacher, and its weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.few_labels import OVERLAPPING, Place, data_of, stored, strong_of, study_of
from uharmony_client.learning import objective_of
from uharmony_client.objective import LocalData, Objective
from uharmony_client.semi_supervised import SemiSupervised, WithTeacher
from uharmony_model.errors import StoreError
from uharmony_model.losses import segmentation_loss
from uharmony_model.patches import draw_batch
from uharmony_model.study import Study

ROUND, STEP = 2, 1


def made(data: LocalData, study: Study) -> SemiSupervised:
    found = objective_of(data, study)
    assert isinstance(found, SemiSupervised)
    return found


def drawn(study: Study, data: LocalData, step: int = STEP) -> tuple[Tensor, Tensor]:
    """The unlabelled batch: from generators of their own."""
    where = (study.seed, "alpha/unlabelled", ROUND, step)
    batch = draw_batch(data.unlabelled, study.task, study.training, *where)
    return batch.image, torch.tensor([data.unlabelled_domains[case] for case in batch.cases])


def ramp(study: Study, step: int = STEP) -> float:
    training = study.training
    done = ((ROUND - 1) * training.local_steps + step) / (training.rounds * training.local_steps)
    return math.exp(-5 * (1 - done) ** 2)


def supervised(study: Study, data: LocalData, network: nn.Module) -> Tensor:
    batch = draw_batch(data.volumes, study.task, study.training, study.seed, "alpha", ROUND, STEP)
    domain = torch.tensor([data.domains[case] for case in batch.cases])
    return segmentation_loss(network(batch.image, domain), batch.label, study.task, data.annotated)


def moved_copy(place: Place) -> nn.Module:
    """Another network: what a teacher or a later student may be."""
    network = place.network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.3)
    return network


def fixmatch(study: Study, network: nn.Module, image: Tensor, domain: Tensor):
    """Written out for exclusive classes: cross-entropy over all voxels, Dice over certain ones."""
    with torch.no_grad():
        confidence, channel = network(image, domain).softmax(1).max(1)
    certain = (confidence >= study.unlabelled.threshold).float()
    logits = network(strong_of(study, image, ROUND, STEP), domain)
    logs = logits.log_softmax(1)
    entropy = -(logs.gather(1, channel[:, None])[:, 0] * certain).sum() / certain.numel()
    dices = []
    for j in range(1, logits.shape[1]):
        p, y = logits.softmax(1)[:, j] * certain, (channel == j) * certain
        dices.append((2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
    return entropy + 1 - torch.stack(dices).mean()


def mean_teacher(study: Study, network: nn.Module, image: Tensor, domain: Tensor):
    with torch.no_grad():
        wanted = moved_copy(Place(study, ("x", "y")))(image, domain).softmax(1)
    seen = network(strong_of(study, image, ROUND, STEP), domain).softmax(1)
    return (seen - wanted).square().mean()


def entropy_min(study: Study, network: nn.Module, image: Tensor, domain: Tensor):
    p = network(image, domain).softmax(1)
    return -(p * p.log()).sum(1).mean() / math.log(p.shape[1])


EQUATIONS: dict[str, Any] = {
    "fixmatch": fixmatch,
    "mean-teacher": mean_teacher,
    "entropy-min": entropy_min,
}


@pytest.mark.parametrize("rule", EQUATIONS)
@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_a_loss_is_its_equation(rule, method):
    study = study_of(rule, method, unlabelled={"weight": 0.7})
    place, data = Place(study, ("x", "y")), data_of(domains=2)
    network = place.network()
    objective = made(data, study)
    if isinstance(objective, WithTeacher):
        objective.teacher(moved_copy(place))
    found = objective.loss(network, ROUND, STEP, drop=False)
    image, domain = drawn(study, data)
    added = EQUATIONS[rule](study, network, image, domain)
    assert float(added.detach()) > 1e-4
    wanted = supervised(study, data, network) + 0.7 * ramp(study) * added
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    # At a site without labels it is the second term alone, on the same draws.
    alone = made(data_of([], domains=2), study)
    if isinstance(alone, WithTeacher):
        alone.teacher(moved_copy(place))
    torch.testing.assert_close(
        alone.loss(network, ROUND, STEP, drop=False), 0.7 * ramp(study) * added, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("rule", EQUATIONS)
def test_overlapping_classes_are_learned_from_too(rule):
    study = study_of(rule, task=OVERLAPPING)
    data = data_of(annotated=(True, True))
    network = Place(study).network()
    objective = made(data, study)
    if isinstance(objective, WithTeacher):
        objective.teacher(moved_copy(Place(study)))
    loss = objective.unlabelled_loss(network, ROUND, STEP, drop=False)
    (gradient,) = torch.autograd.grad(loss, [next(network.parameters())])
    assert float(gradient.abs().max()) > 0


def test_no_gradient_reaches_the_teacher_or_the_pseudo_label():
    study = study_of("mean-teacher")
    objective = made(data_of(), study)
    assert isinstance(objective, WithTeacher)
    network = Place(study).network()
    objective.loss(network, ROUND, STEP, drop=False).backward()
    teacher = objective.teacher(network)
    assert teacher is not network
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None and p.requires_grad for p in network.parameters())


def test_the_teacher_is_a_copy_first_and_then_the_average_in_closed_form():
    """Decay 0.6: a_0 = 0, a_1 = 1/2, a_2 = 0.6: t = 0.6 (w_0 + w_1) / 2 + 0.4 w_2."""
    study = study_of("mean-teacher", unlabelled={"teacher_decay": 0.6})
    objective, network = made(data_of(), study), Place(study).network()
    assert isinstance(objective, WithTeacher)
    name = next(iter(dict(network.named_parameters())))
    students = []
    for done in range(3):
        with torch.no_grad():
            network.get_parameter(name).add_(0.1 * (done + 1))
        students.append(network.get_parameter(name).detach().clone())
        objective.moved(network, 1 + done // 2, done % 2)  # two steps a round
    wanted = 0.6 * (students[0] + students[1]) / 2 + 0.4 * students[2]
    found = objective.teacher(network).get_parameter(name)
    torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-6)


def test_a_kept_teacher_of_another_network_is_named():
    study, other = study_of("mean-teacher"), study_of("mean-teacher", network={"features": [4, 12]})
    objective = made(data_of(), other)
    objective.moved(Place(other).network(), 1, 0)
    again = made(data_of(), study)
    again.restore(objective.outlives())
    assert isinstance(again, WithTeacher)
    with pytest.raises(StoreError, match="site alpha: the kept teacher"):
        again.teacher(Place(study).network())


def test_the_strong_view_leaves_masks_of_presence_alone():
    intensity = {"CT": {"policy": "zscore"}, "MR": {"policy": "zscore"}}
    task = {"channels": 2, "presence": True, "intensity": intensity}
    study = study_of("fixmatch", task=task, training={"modality_dropout": 0.5})
    cases = [case.__class__(**{**vars(case), "present": (True, True)}) for case in stored(2, 1, 2)]
    objective = made(data_of([], cases), study)
    network = Place(study).network()
    image, _ = objective.unlabelled(network, ROUND, 0)
    assert image.shape[1] == 4
    changed = objective.strong(image, ROUND, 0)
    assert torch.equal(changed[:, 2:], image[:, 2:])
    hidden = image[:, 2:].amax((2, 3, 4)) == 0
    assert bool(hidden.any())
    assert not bool(hidden.all())
    assert float(changed[:, :2][hidden].abs().max()) == 0
    assert not torch.equal(changed[:, :2], image[:, :2])
    styled = objective.in_style(
        image, torch.ones(1, 2, 3, 3, 3).expand(2, -1, -1, -1, -1), 3, 1, floor=-4.0
    )
    assert torch.equal(styled[:, 2:], image[:, 2:])
    assert float(styled[:, :2][hidden].abs().max()) == 0
    assert not torch.equal(styled[:, :2], image[:, :2])


def test_a_style_that_shows_nothing_changes_nothing():
    """The amplitude of an absent channel: nothing but the mean. The other channel is mixed."""
    intensity = {"CT": {"policy": "zscore"}, "MR": {"policy": "zscore"}}
    study = study_of(
        "ust-run",
        task={"channels": 2, "presence": True, "intensity": intensity},
        unlabelled={"amplitude": "full"},
    )
    objective = made(data_of([], stored(1, 1, 2)), study)
    image = torch.linspace(-5, 5, 2 * 4 * 512).sin().reshape(2, 4, 8, 8, 8)
    style = torch.full((2, 2, 3, 3, 3), 0.7)
    style[0, 1] = 0.0
    style[0, 1, 1, 1, 1] = 4.0
    styled = objective.in_style(image, style, 1, 0, floor=-4.0)
    changed = [[not torch.equal(styled[b, c], image[b, c]) for c in range(4)] for b in range(2)]
    assert changed == [[True, False, False, False], [True, True, False, False]]


def test_progress_spans_all_rounds_and_ends_at_one():
    study = study_of("fixmatch", training={"rounds": 3, "local_steps": 4})
    objective = made(data_of(), study)
    assert objective.progress(1, 0) == 0
    assert objective.progress(2, 2) == 0.5
    assert objective.progress(3, 3) == pytest.approx(11 / 12)
    assert objective.progress(4, 2) == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_the_share_is_one_with_labels_nothing_in_warm_up_and_then_the_mean(labelled):
    study = study_of("fixmatch", training={"rounds": 4}, unlabelled={"warm_up": 1})
    data = data_of(None if labelled else [])
    objective, network = made(data, study), Place(study).network()
    assert objective.share == (1 if labelled else 0)  # nothing was seen yet
    for round_ in (1, ROUND):
        objective = made(data, study)
        shares = []
        for step in range(2):
            objective.loss(network, round_, step, drop=False)
            where = (study.seed, "alpha/unlabelled", round_, step)
            batch = draw_batch(data.unlabelled, study.task, study.training, *where)
            sure = network(batch.image).softmax(1).amax(1) >= study.unlabelled.threshold
            shares.append(float(sure.float().mean()))
        assert 0 < np.mean(shares) < 1
        grown = math.exp(-5 * (1 - round_ / 4) ** 2)
        assert objective.growth == (None if labelled else pytest.approx(grown))
        later = 1.0 if labelled else pytest.approx(float(np.mean(shares)), abs=1e-6)
        assert objective.share == (0 if round_ == 1 and not labelled else later)


def test_adaptive_statistics_are_the_targets_own_and_weights_get_no_gradient():
    study = study_of("adabn", "adabn")
    network = Place(study).network()
    objective = made(data_of([]), study)
    norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm3d))
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda m, inputs, o: seen.append(inputs[0].detach()))
    loss = objective.loss(network, ROUND, STEP, drop=False)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not bool(p.grad.any()) for p in network.parameters())
    (features,) = seen
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, 0.1 * features.mean((0, 2, 3, 4)))
    assert objective.share == 0


def test_adaptive_statistics_leave_a_site_with_labels_as_it_is():
    study, data = study_of("adabn", "adabn"), data_of()
    network, other = Place(study).network(), Place(study).network()
    objective: Objective = made(data, study)
    assert torch.equal(
        objective.loss(network, ROUND, STEP, drop=False), supervised(study, data, other)
    )
    for one, two in zip(network.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)
    assert objective.share == 1


def test_weak_views_of_both_kinds_are_drawn_apart():
    study, cases = study_of("fixmatch"), stored(2)
    objective = made(data_of(cases, cases), study)
    network = Place(study).network()
    image = objective.labelled(network, ROUND, STEP)[0]
    assert not torch.equal(image, objective.unlabelled(network, ROUND, STEP)[0])
    assert F.mse_loss(image, objective.labelled(network, ROUND, STEP)[0]) == 0
    assert not torch.equal(image, objective.labelled(network, ROUND, STEP + 1)[0])
