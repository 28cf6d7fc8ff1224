"""Rounds of every rule: what may not be learned from, purity, what is carried, what it weighs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.few_labels import (
    RULES,
    TRAINED,
    Cut,
    Place,
    checkpoint,
    data_of,
    garbage,
    same,
    stored,
    study_of,
)
from uharmony_client.learning import Given, cases_learned_from, objective_of
from uharmony_client.objective import Supervised
from uharmony_client.personal import UNLABELLED, local_parameters, own_model
from uharmony_client.semi_supervised import SemiSupervised
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.exchange.partition import Partition
from uharmony_model.patches import draw_batch, without_label
from uharmony_model.study import Study

METHODS = ("fedavg", "uharmony")


def method_of(rule: str) -> str:
    return "adabn" if rule == "adabn" else "fedavg"


def given_of(study: Study) -> Given:
    """One style, and prototypes of both classes at the deepest level of 8 channels."""
    style = torch.full((1, 3, 3, 3), 0.3)
    style[0, 1, 1, 1] = 4.5
    wave = torch.arange(16).reshape(2, 8).float()
    prototypes = Prototypes(wave.cos(), 1 + wave.sin().square(), torch.tensor([300.0, 200.0]))
    return Given((style,), prototypes if study.rule == "glua" else None)


# --- what may be learned from --------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, "none"])
@pytest.mark.parametrize("labelled", [0, 1])
def test_labels_that_may_not_be_used_reach_nothing(rule, labelled):
    # With its queue UST-RUN would wait for something reliable at a site without labels.
    study = study_of(rule, method_of(rule), unlabelled={"queue": bool(labelled)})
    place, own = Place(study), stored(2)
    true, false = stored(2, seed=1), [garbage(case) for case in stored(2, seed=1)]
    given = given_of(study)
    rounds = [place.round(data_of(own[:labelled], others), given=given) for others in (true, false)]
    assert same(*rounds)
    # What is compared can differ: other images, and the same garbage as labels that may be used.
    if rule not in ("none", "adabn"):
        others = place.round(data_of(own[:labelled], stored(2, seed=2)), given=given)
        assert not torch.equal(rounds[0].update, others.update)
    if labelled:
        spoilt = place.round(data_of([garbage(own[0])], true), given=given)
        assert not torch.equal(rounds[0].update, spoilt.update)


def test_patches_of_unlabelled_cases_lie_anywhere_whatever_their_labels():
    study = study_of("fixmatch", training={"foreground": 1.0, "augment": False, "batch_size": 40})
    true = stored(1, seed=1)[0]
    draws = []
    for case in (true, garbage(true), replace(true, foreground=true.foreground[:0])):
        batch = draw_batch([without_label(case)], study.task, study.training, 0, "a", 1, 0)
        assert not bool(batch.label.any())
        draws.append(batch.image)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    aimed = draw_batch([true], study.task, study.training, 0, "a", 1, 0)
    assert not torch.equal(draws[0], aimed.image)


# --- pure, interrupted, carried on ---------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_round_is_pure_and_a_cut_changes_no_bit(rule, labelled, tmp_path):
    method = "adabn" if rule == "adabn" else "uharmony"
    study = study_of(rule, method, training={"local_steps": 3})
    place = Place(study, ("x", "y"))
    data, given = data_of(None if labelled else [], domains=2), given_of(study)
    first = place.round(data, given=given)
    assert same(first, place.round(data, given=given))
    base = place.base + first.update
    second = place.round(data, 2, base=base, before=first.local, given=given)
    for every, cut_at in ((1, 1), (2, 2)):
        kept = checkpoint(tmp_path / f"{every}-{cut_at}", every, 2)
        settings: dict[str, Any] = {
            "base": base,
            "before": first.local,
            "given": given,
            "checkpoint": kept,
        }
        with pytest.raises(Cut):
            place.round(data, 2, cut_at=cut_at, **settings)
        taken: list[int] = []
        assert same(place.round(data, 2, taken=taken, **settings), second)
        assert taken[0] == (cut_at + 1 if every == 1 else 2)


@pytest.mark.parametrize("rule", ["ust-run", "mean-teacher", "glua"])
def test_what_is_carried_matters_in_the_next_round(rule):
    place, data = Place(study_of(rule)), data_of()
    first = place.round(data)
    names = {name for name in first.local if name.startswith(UNLABELLED)}
    assert names
    second = place.round(data, 2, before=first.local)
    less = {k: v for k, v in first.local.items() if k not in names}
    assert not same(second, place.round(data, 2, before=less))


def test_two_rounds_are_one_run_that_never_stopped():
    """A site alone: 2 rounds of 2 steps, and the same draws by one objective kept in memory."""
    study = study_of("ust-run", "local", training={"schedule": "constant"})
    place, data = Place(study), data_of()
    first = place.round(data)
    second = place.round(data, 2, before=first.local)
    objective = objective_of(data, study)
    assert isinstance(objective, SemiSupervised)
    network = place.network()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=study.training.learning_rate, weight_decay=1e-4
    )
    for round_ in (1, 2):
        for step in range(2):
            loss = objective.loss(network, round_, step, drop=False)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), study.training.gradient_clip)
            optimizer.step()
            objective.moved(network, round_, step)
    state = network.state_dict()
    assert all(torch.equal(second.local[name], value) for name, value in state.items())
    carried = objective.outlives()
    kinds = {name.split("/")[0] for name in carried}
    assert kinds == {"teacher", "teacher-steps", "queue", "hardest", "drawn-from"}
    assert all(torch.equal(second.local[UNLABELLED + k], v) for k, v in carried.items())


# --- what leaves and what stays ------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_teacher_and_queue_are_carried_by_name_and_are_no_part_of_a_model(method):
    study = study_of("ust-run", method)
    place = Place(study, ("x", "y"))
    result = place.round(data_of(domains=2))
    plain = Place(study_of("none", method), ("x", "y")).round(data_of(domains=2))
    extra = result.local.keys() - plain.local.keys()
    assert extra
    assert all(name.startswith(UNLABELLED) for name in extra)
    kinds = {name.split("/")[1] for name in extra}
    assert kinds == {"teacher", "teacher-steps", "queue", "hardest", "drawn-from"}
    assert result.update.numel() == place.base.numel()
    shared = {spec.name for spec in place.partition.shared_schema.tensors}
    assert not any(name.startswith(UNLABELLED) for name in shared)
    assert local_parameters(result.local).keys() == place.before.keys()
    assert own_model(result.local, study.method) is None
    teacher = {n.split("teacher/")[1] for n in extra if n.startswith(f"{UNLABELLED}teacher/")}
    assert teacher == shared | set(place.before)
    if method == "uharmony":
        assert {name.split("@")[1] for name in teacher if "@" in name} == {"x", "y"}
        assert any(bool(result.local[name].any()) for name in local_parameters(result.local))


def test_a_site_whose_domains_come_in_another_order_goes_on_with_the_same_teacher():
    study = study_of("mean-teacher", "uharmony")
    data = data_of(domains=2)
    first = Place(study, ("x", "y")).round(data)
    turned = replace(
        data,
        domains=[1 - d for d in data.domains],
        unlabelled_domains=[1 - d for d in data.unlabelled_domains],
    )
    one = Place(study, ("x", "y")).round(data, 2, before=first.local)
    other = Place(study, ("y", "x")).round(turned, 2, before=first.local)
    torch.testing.assert_close(one.update, other.update, rtol=1e-4, atol=1e-6)
    for name in one.local:
        if "/teacher/" in name:
            torch.testing.assert_close(one.local[name], other.local[name], rtol=1e-4, atol=1e-6)


# --- weights -------------------------------------------------------------------------------------


def test_a_site_with_nothing_to_learn_from_changes_nothing_and_counts_for_nothing():
    study = study_of("none", "uharmony")
    place = Place(study)
    before = {**place.before, "unlabelled/teacher/a": torch.ones(2)}
    result = place.round(data_of([]), before=before)
    assert (result.share, result.loss) == (0, 0)
    assert result.update.shape == place.base.shape
    assert not bool(result.update.any())
    assert result.local.keys() == before.keys()
    assert all(torch.equal(result.local[k], before[k]) for k in before)


@pytest.mark.parametrize("rule", RULES)
def test_the_share_of_a_round(rule):
    study = study_of(rule, method_of(rule), training={"rounds": 4}, unlabelled={"warm_up": 1})
    place = Place(study)
    given = given_of(study)
    assert place.round(data_of(), given=given).share == 1
    assert place.round(data_of([]), given=given).share == 0
    # Of UST-RUN's first round at a site nothing is reliable yet.
    begun = place.round(data_of([]), 2, given=given)
    second = place.round(data_of([]), 2, given=given, before=begun.local)
    assert second.growth == pytest.approx(math.exp(-5 * (1 - 2 / 4) ** 2))
    later = second.share
    assert later == {"adabn": 0, "mean-teacher": 1, "entropy-min": 1}.get(rule, later)
    assert 0 <= later <= 1
    if rule in ("fixmatch", "ust-run", "glua"):
        assert 0 < later < 1


def test_the_share_is_of_this_round_alone():
    study, data = study_of("fixmatch", training={"keep_optimizer": False}), data_of([])
    place = Place(study)
    first, fresh = place.round(data), place.round(data, 2)
    assert first.share != fresh.share
    assert same(place.round(data, 2, before=first.local), fresh)


@pytest.mark.parametrize("rule", [*TRAINED, "none"])
def test_dittos_own_model_learns_from_labels_and_a_site_without_has_none(rule):
    study = study_of(rule, "ditto")
    place = Place(study)
    with_labels = place.round(data_of())
    assert own_model(with_labels.local, "ditto") is not None
    result = place.round(data_of([]))
    assert own_model(result.local, "ditto") is None


@pytest.mark.parametrize("rule", TRAINED)
@pytest.mark.parametrize("known", [True, False])
def test_a_last_block_that_trains_alone_gets_a_gradient_or_none(rule, known):
    """FedRep: while the encoder rests, alignment has nothing to move, and must not fail."""
    study = study_of(rule, "fedrep")
    given = given_of(study) if known else Given()
    result = Place(study).round(data_of([]), given=given)
    assert bool(torch.isfinite(result.update).all())


def test_the_objective_follows_the_rule_and_what_there_is():
    for rule in RULES:
        study = study_of(rule, method_of(rule))
        assert isinstance(objective_of(data_of([]), study), SemiSupervised)
        assert objective_of(data_of([], []), study) is None
    plain = study_of("none")
    assert isinstance(objective_of(data_of(), plain), Supervised)
    assert objective_of(data_of([]), plain) is None
    # The method's own rule goes before the study's.
    assert isinstance(objective_of(data_of(), study_of("ust-run", "labelled-only")), Supervised)


def test_a_teacher_is_no_second_copy_in_the_partition():
    """Whole networks by name: nothing of it fits into what is sent."""
    study = study_of("ust-run")
    place = Place(study)
    result = place.round(data_of())
    state: dict[str, Tensor] = {**place.network().state_dict(), **result.local}
    with pytest.raises(Exception, match="too many"):
        Partition.of(place.network(), study.plan.local).split(state)


# --- how many cases it counts --------------------------------------------------------------------


def test_only_cases_that_are_learned_from_are_counted():
    data = data_of(stored(3), stored(5, seed=1))
    assert cases_learned_from(data, study_of("none", "fedavg")) == 3
    assert cases_learned_from(data, study_of("fixmatch", "fedavg")) == 8
    # A site that learns from none counts all it has: its update weighs nothing.
    assert cases_learned_from(data_of([], stored(5)), study_of("none", "fedavg")) == 5
