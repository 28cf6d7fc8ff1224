"""UST-RUN at one site: its loss against the equation, each switch, the queue and the hardest."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.few_labels import (
    OVERLAPPING,
    Place,
    checkpoint,
    data_of,
    stored,
    strong_of,
    study_of,
)
from uharmony_client.objective import LocalData
from uharmony_client.ust_run import UstRun
from uharmony_model.losses import segmentation_loss
from uharmony_model.patches import draw_batch
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study
from uharmony_model.unlabelled.amplitude import low_amplitude, mix_amplitude
from uharmony_model.unlabelled.copy_paste import draw_box

ROUND, STEP, FLOOR, SIZE = 2, 1, -4.0, (8, 8, 8)
DOMAINS = ("x", "y")
Label = tuple[Tensor, Tensor]  # class and certainty


def network_of(study: Study, shift: float) -> nn.Module:
    """A network whose domains differ and that finds some foreground."""
    network = Place(study, DOMAINS).network()
    with torch.no_grad():
        for parameter in network.parameters():
            wave = (torch.arange(parameter.numel()) * 0.7 + shift).cos().view_as(parameter)
            parameter.add_(0.1 * wave)
    return network


def carried() -> dict[str, Tensor]:
    """A queue of three samples of other domains and a hardest sample, as a round before left it."""
    rng = np.random.default_rng(4)

    def patches(count: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=(count, 1, *SIZE)).astype(np.float32))

    labels = torch.zeros(3, *SIZE, dtype=torch.uint8)
    labels[:, 2:5, 1:6, 3:7] = 1
    hard = torch.zeros(1, *SIZE, dtype=torch.int64)
    hard[:, 5:7, 2:3, 1:4] = 1
    certain = torch.zeros(1, *SIZE, dtype=torch.bool)
    certain[:, 3:] = True
    return {
        "queue/images": patches(3),
        "queue/labels": labels,
        "queue/hardness": torch.tensor([0.1, 0.2, 0.3]),
        "queue/threshold": torch.tensor([0.9]),
        "queue/domains": torch.tensor([1, 1, 1]),
        "hardest/image": patches(1),
        "hardest/label": hard,
        "hardest/certain": certain,
        "hardest/domain": torch.tensor([1]),
        "drawn-from": torch.tensor(list(hashlib.sha256(b"[]").digest()), dtype=torch.uint8),
    }


def generator(study: Study, purpose: str) -> np.random.Generator:
    return numpy_generator(study.seed, "alpha", ROUND, STEP, purpose)


def masked(logits: Tensor, label: Label) -> Tensor:
    """Cross-entropy over all voxels and Dice over the certain ones, of one foreground class."""
    y, sure = label[0], label[1].float()
    entropy = -(logits.log_softmax(1).gather(1, y[:, None])[:, 0] * sure).sum() / sure.numel()
    p, truth = logits.softmax(1)[:, 1] * sure, (y == 1) * sure
    return entropy + 1 - (2 * (p * truth).sum() + 1e-5) / (p.sum() + truth.sum() + 1e-5)


def mixed(mask: Tensor, into: Label, of: Label) -> Label:
    return torch.where(mask, of[0], into[0]), torch.where(mask, of[1], into[1])


def cover(*labels: Tensor) -> Tensor:
    """The box around all foregrounds (D, H, W)."""
    where = torch.stack([label > 0 for label in labels]).any(0).nonzero()
    box = torch.zeros(SIZE, dtype=torch.bool)
    (a, b, c), (d, e, f) = where.amin(0).tolist(), (where.amax(0) + 1).tolist()
    box[a:d, b:e, c:f] = True
    return box


def reference(
    study: Study,
    data: LocalData,
    network: nn.Module,
    teacher: nn.Module,
    before: dict[str, Tensor],
    styles: tuple[Tensor, ...] = (),
) -> Tensor:
    """The whole loss of one step in plain words, from the published form."""
    settings, training, task = study.unlabelled, study.training, study.task
    progress = (training.local_steps + STEP) / (training.rounds * training.local_steps)
    weight = settings.weight * math.exp(-5 * (1 - progress) ** 2)

    def draw(site: str, cases: Any, domains: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = draw_batch(cases, task, training, study.seed, site, ROUND, STEP)
        return batch.image, batch.label, torch.tensor([domains[i] for i in batch.cases])

    def taught(image: Tensor, domain: Tensor) -> Label:
        with torch.no_grad():
            confidence, channel = teacher(image, domain).softmax(1).max(1)
        return channel, confidence >= settings.threshold

    def styled(image: Tensor) -> Tensor:
        if settings.amplitude == "off":
            return image
        if styles:
            chosen = generator(study, "style").integers(len(styles), size=2)
            style = torch.stack([styles[i] for i in chosen])
        else:
            style = low_amplitude(x_u, settings.half_width or 1, floor=FLOOR)
        top = 1.0 if settings.amplitude == "full" else progress
        ratio = torch.from_numpy(generator(study, "ratio").uniform(0, top, size=2)).float()
        return mix_amplitude(image, style, ratio, floor=FLOOR)

    x_u, _, of_u = draw("alpha/unlabelled", data.unlabelled, data.unlabelled_domains)
    s_u, y_u = strong_of(study, x_u, ROUND, STEP), taught(x_u, of_u)
    total = torch.zeros(())
    places: Any
    has_queue = settings.queue and "queue/images" in before
    if data.volumes:
        x_l, label, of_l = draw("alpha", data.volumes, data.domains)
        plain = x_l if settings.copy_paste else styled(x_l)
        total = segmentation_loss(network(plain, of_l), label, task, data.annotated)
        places = generator(study, "queue").permutation(3)[:1] if has_queue else []
    else:
        x_l, label, of_l = torch.zeros_like(x_u), torch.zeros(2, *SIZE), torch.zeros_like(of_u)
        places = generator(study, "queue").integers(3, size=2) if has_queue else []
    for sample, place in enumerate(places):
        x_l[sample], label[sample] = before["queue/images"][place], before["queue/labels"][place]
        of_l[sample] = before["queue/domains"][place]
    guide = y_u
    if settings.copy_paste and (data.volumes or has_queue):
        y_l = (label.long(), torch.ones_like(label, dtype=torch.bool))
        if not bool(data.annotated.all()):
            y_l[1][len(places) :] = label[len(places) :] > 0
        boxes = [draw_box(generator(study, f"box-{i}"), SIZE).mask(SIZE) for i in range(2)]
        mask = torch.stack(boxes)
        room = mask[:, None]
        if settings.symmetric:
            y_ul = taught(torch.where(room, x_l, x_u), of_u)
            y_lu = taught(torch.where(room, x_u, x_l), of_l)
            y_w = mixed(mask, y_ul, y_lu)
            guide = (y_w[0], y_w[1] & (y_w[0] == y_u[0]) & y_u[1])
        look = styled(x_l)
        x_ul, x_lu = torch.where(room, look, s_u), torch.where(room, s_u, look)
        y_ul, y_lu, of_ul = mixed(mask, y_u, y_l), mixed(mask, y_l, y_u), of_u
        if settings.hardest and "hardest/image" in before:
            k = int(generator(study, "hardest").integers(2))
            box = cover(before["hardest/label"][0], label[k])
            more = torch.where(box, x_l[k : k + 1], before["hardest/image"])
            hard = (before["hardest/label"], before["hardest/certain"])
            y_more = mixed(box, hard, (y_l[0][k : k + 1], y_l[1][k : k + 1]))
            x_ul, of_ul = torch.cat((x_ul, more)), torch.cat((of_ul, before["hardest/domain"]))
            y_ul = (torch.cat((y_ul[0], y_more[0])), torch.cat((y_ul[1], y_more[1])))
        total = total + weight * masked(network(x_ul, of_ul), y_ul)
        total = total + weight * masked(network(x_lu, of_l), y_lu)
    return total + weight * weight * masked(network(s_u, of_u), guide)


def both(
    study: Study,
    data: LocalData | None = None,
    before: dict[str, Tensor] | None = None,
    styles: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The loss of one step, and what it has to be."""
    data = data_of(domains=2) if data is None else data
    before = carried() if before is None else before
    network, teacher = network_of(study, 0.0), network_of(study, 1.0)
    objective = UstRun(data, study, styles)
    kept = {k: v.clone() for k, v in before.items()}
    objective.restore(
        {k: v for k, v in kept.items() if study.unlabelled.queue or not k.startswith("queue/")}
        if study.unlabelled.hardest
        else {k: v for k, v in kept.items() if not k.startswith("hardest/")}
    )
    objective.teacher(teacher)
    found = objective.loss(network, ROUND, STEP, drop=False)
    return found.detach(), reference(study, data, network, teacher, before, styles).detach()


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


SWITCHES: dict[str, dict[str, Any]] = {
    "all": {},
    "no copy-paste": {"copy_paste": False},
    "no guidance": {"symmetric": False},
    "full amplitude": {"amplitude": "full"},
    "no amplitude": {"amplitude": "off"},
    "wider box": {"half_width": 2},
    "no queue": {"queue": False},
    "no hardest": {"hardest": False},
    "half the weight": {"weight": 0.5},
}


@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_the_loss_is_its_equation_and_each_switch_changes_its_part(method):
    """With domains of their own too: queued and hardest samples are of domain y."""
    # Late, so that the unlabelled terms weigh something: here the ramp is 0.78.
    values = {}
    for name, changes in SWITCHES.items():
        study = study_of("ust-run", method, unlabelled=changes, training={"rounds": 2})
        found, wanted = both(study)
        assert close(found, wanted), name
        values[name] = float(found)
    assert len({round(value, 4) for value in values.values()}) == len(values)


def test_styles_that_were_given_take_the_place_of_the_batchs_own():
    study = study_of("ust-run", training={"rounds": 2})
    rng = np.random.default_rng(0)
    rows = [torch.from_numpy(rng.uniform(0, 3, (1, 3, 3, 3))).float() for _ in range(3)]
    styles = tuple((row + row.flip((-1, -2, -3))) / 2 for row in rows)
    found, wanted = both(study, styles=styles)
    assert close(found, wanted)
    assert not close(found, both(study)[0])


def test_a_site_with_labels_alone_learns_from_them_in_the_styles_given():
    study, data = study_of("ust-run", training={"rounds": 2}), data_of(unlabelled=[])
    style = torch.zeros(1, 3, 3, 3)
    style[0, 1, 1] = torch.tensor([0.2, 6.0, 0.2])
    network = network_of(study, 0.0)
    found = UstRun(data, study, [style]).loss(network, ROUND, STEP, drop=False)
    batch = draw_batch(data.volumes, study.task, study.training, study.seed, "alpha", ROUND, STEP)
    ratio = torch.from_numpy(generator(study, "ratio").uniform(0, 3 / 4, size=2)).float()
    image = mix_amplitude(batch.image, style[None], ratio, floor=FLOOR)
    domain = torch.zeros(2, dtype=torch.int64)
    wanted = segmentation_loss(network(image, domain), batch.label, study.task, data.annotated)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_at_a_site_without_labels_the_queue_is_what_is_pasted():
    study = study_of("ust-run", "uharmony", training={"rounds": 2})
    data = data_of([], domains=2)
    found, wanted = both(study, data)
    assert close(found, wanted)
    without = {k: v for k, v in carried().items() if not k.startswith("queue/")}
    empty, _ = both(study, data, without)
    assert float(empty) == 0  # nothing reliable is known yet, and sure background teaches nothing


def test_what_hides_in_background_is_not_certain():
    """A site that draws one of two classes: only what it drew is a truth to be pasted."""
    task = {"classes": {"a": 1, "b": 2}}
    study, data = study_of("ust-run", task=task), data_of(annotated=(True, False))
    label = torch.zeros(2, *SIZE, dtype=torch.uint8)
    label[:, 2:4] = 1
    truth = UstRun(data, study)._truth(label, from_queue=1)
    assert bool(truth.certain[0].all())  # the queue's labels are the network's, of all classes
    assert torch.equal(truth.certain[1], label[1] == 1)
    assert torch.equal(truth.label, label.long())
    overlapping = {**task, "overlapping": True}
    many = study_of("ust-run", task=overlapping, unlabelled={"queue": False})
    truth = UstRun(data, many)._truth(label, from_queue=0)
    assert bool(truth.certain[:, 0].all())
    assert not bool(truth.certain[:, 1].any())
    whole = UstRun(data_of(annotated=(True, True)), study)._truth(label, from_queue=0)
    assert bool(whole.certain.all())


def test_a_partly_annotated_sites_loss_has_that_truth():
    study = study_of("ust-run", training={"rounds": 2}, task={"classes": {"a": 1, "b": 2}})
    # `reference` knows one class; what must differ is that background is no truth any more.
    losses = []
    for annotated in ((True, True), (True, False)):
        objective = UstRun(data_of(stored(2), annotated=annotated), study)
        network = network_of(study, 0.0)
        objective.teacher(network_of(study, 1.0))
        losses.append(objective.unlabelled_loss(network, ROUND, STEP, drop=False).detach())
    assert not close(losses[0], losses[1])


def judged(study: Study, objective: UstRun, step: int, network: nn.Module, teacher: nn.Module):
    """Hardness of each sample of a step, by hand."""
    data = objective.data
    where = (study.seed, "alpha/unlabelled", ROUND, step)
    batch = draw_batch(data.unlabelled, study.task, study.training, *where)
    domain = torch.tensor([data.unlabelled_domains[case] for case in batch.cases])
    with torch.no_grad():
        one, two = (net(batch.image, domain).argmax(1) == 1 for net in (network, teacher))
    hard = [
        1 - 2 * int((a & b).sum()) / max(int(a.sum() + b.sum()), 1)
        for a, b in zip(one, two, strict=True)
    ]
    return batch.image, domain, two, hard


def test_queue_and_hardest_are_what_student_and_teacher_say_of_fresh_patches():
    study = study_of("ust-run", "uharmony", unlabelled={"queue_size": 3})
    network, teacher = network_of(study, 0.0), network_of(study, 0.4)
    objective = UstRun(data_of(domains=2), study)
    objective.restore({"teacher-steps": torch.tensor([9])})
    objective.teacher(teacher)
    images: list[Tensor] = []
    domains: list[int] = []
    ever: set[int] = set()
    threshold = 1.0
    for step in range(8):
        image, domain, label, hard = judged(study, objective, step, network, teacher)
        objective.loss(network, ROUND, step, drop=False)
        state = objective.carried()
        worst = int(np.argmax(hard))
        assert torch.equal(state["hardest/image"], image[worst : worst + 1])
        assert torch.equal(state["hardest/label"][0] == 1, label[worst])
        assert state["hardest/domain"].tolist() == [int(domain[worst])]
        before = threshold
        for i, value in enumerate(hard):
            if value < before:
                images, domains = [*images, image[i]][-3:], [*domains, int(domain[i])][-3:]
        threshold = float(state["queue/threshold"])
        assert len(state["queue/images"]) == len(images)
        assert all(torch.equal(a, b) for a, b in zip(state["queue/images"], images, strict=True))
        assert state["queue/domains"].tolist() == domains
        ever |= set(domains)
    assert threshold < 1
    assert ever == {0, 1}


def test_at_the_beginning_nothing_is_trusted():
    study = study_of("ust-run", training={"rounds": 3, "local_steps": 100})
    network = network_of(study, 0.0)
    objective = UstRun(data_of(), study)  # the teacher is the student: hardness would be 0
    for step in range(6):  # 500 / 30 000 of 300 steps is step 5
        objective.loss(network, 1, step, drop=False)
        assert len(objective.carried()["queue/images"]) == (2 if step == 5 else 0)
        objective.moved(network, 1, step)


def test_who_begins_late_begins_at_the_beginning():
    study = study_of("ust-run", training={"rounds": 3, "local_steps": 100})
    network, objective = network_of(study, 0.0), UstRun(data_of(), study)
    for step in range(6):
        objective.loss(network, 3, step, drop=False)
        assert len(objective.carried()["queue/images"]) == (2 if step == 5 else 0)
        objective.moved(network, 3, step)
        again = UstRun(data_of(), study)  # as after a kill
        again.restore(objective.carried())
        objective = again


@pytest.mark.parametrize(("labels", "entries"), [(None, True), ([], False)])
def test_without_labels_nothing_of_the_first_round_is_trusted(labels, entries):
    """Such a site learns nothing in it, so that student and teacher agree on anything."""
    study = study_of("ust-run", training={"rounds": 4, "local_steps": 3})
    place = Place(study)
    first = place.round(data_of(labels), 1)
    held = first.local.get("unlabelled/queue/images")
    assert (held is not None and len(held) > 0) is entries
    second = place.round(data_of(labels), 2, before=first.local)
    assert len(second.local["unlabelled/queue/images"]) > 0


@pytest.mark.parametrize(
    ("switch", "absent"),
    [
        ({"queue": False}, ("queue/",)),
        ({"hardest": False}, ("hardest/",)),
        ({"copy_paste": False}, ("queue/", "hardest/")),
    ],
)
def test_what_is_switched_off_keeps_nothing(switch, absent):
    study = study_of("ust-run", unlabelled=switch)
    objective = UstRun(data_of(), study)
    objective.loss(network_of(study, 0.0), ROUND, STEP, drop=False)
    held = objective.carried()
    assert not [name for name in held if name.startswith(absent)]
    kept = {"queue/", "hardest/"} - set(absent)
    assert all(any(name.startswith(prefix) for name in held) for prefix in kept)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"names": ("one", "three")}, False),
        ({"names": ("one",), "unlabelled_domains": (1,)}, False),
        ({"unlabelled_domains": (0, 0)}, False),
    ],
)
def test_patches_of_other_cases_than_there_are_now_are_forgotten(change, kept):
    study = study_of("ust-run")
    data = replace(data_of([], domains=2), names=("one", "two"))
    before = UstRun(data, study, ())
    named = json.dumps([[0, "two"], [1, "one"]]).encode()
    of = torch.tensor(list(hashlib.sha256(named).digest()), dtype=torch.uint8)
    before.restore({**carried(), "drawn-from": of})
    network = network_of(study, 0.0)
    before.teacher(network)
    after = UstRun(replace(data, **change), study, ())
    after.restore(before.carried())
    left = after.carried()
    assert any(key.startswith("hardest/") for key in left) is kept
    assert any(key.startswith("queue/") for key in left) is kept
    teacher = after.teacher(network_of(study, 1.0)).state_dict()
    assert all(torch.equal(teacher[k], v) for k, v in network.state_dict().items())


def test_gradients_reach_the_student_alone_and_judging_makes_none():
    study = study_of("ust-run")
    network = network_of(study, 0.0)
    objective = UstRun(data_of(), study)
    objective.loss(network, ROUND, STEP, drop=False).backward()
    teacher = objective.teacher(network)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in network.parameters())
    assert not any(tensor.requires_grad for tensor in objective.carried().values())


@pytest.mark.parametrize("labelled", [True, False])
def test_overlapping_classes_go_without_the_queue(labelled, tmp_path):
    study = study_of(
        "ust-run", task=OVERLAPPING, training={"local_steps": 3}, unlabelled={"queue": False}
    )
    data = data_of(None if labelled else [], annotated=(True, True))
    place = Place(study)
    result = place.round(data, 2)
    assert not [name for name in result.local if name.startswith("unlabelled/queue/")]
    assert float(result.update.abs().max()) > 0
    again = place.round(data, 2, checkpoint=checkpoint(tmp_path, 1, 2))
    assert torch.equal(again.update, result.update)


def test_masks_of_presence_are_pasted_with_their_voxels_and_never_mixed():
    intensity = {"CT": {"policy": "zscore"}, "MR": {"policy": "zscore"}}
    task = {"channels": 2, "presence": True, "intensity": intensity}
    study = study_of("ust-run", task=task, training={"modality_dropout": 0.4})
    cases = [
        [case.__class__(**{**vars(case), "present": (True, True)}) for case in stored(2, seed, 2)]
        for seed in (0, 1)
    ]
    seen: list[Tensor] = []
    network = Place(study).network()
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective = UstRun(data_of(*cases), study)
    for step in range(3):
        objective.loss(network, ROUND, step, drop=False)
    masks = torch.cat([image[:, 2:] for image in seen])
    assert bool(((masks == 0) | (masks == 1)).all())
    hidden = torch.cat([image[:, :2] for image in seen])[masks == 0]
    assert len(hidden)
    assert not bool(hidden.any())
