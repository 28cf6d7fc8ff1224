"""The plain objective: what supervised training was before there were others, to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.support.few_labels import Place, data_of, same, stored, study_of
from uharmony_client.learning import objective_of
from uharmony_client.objective import Supervised, on_device
from uharmony_client.semi_supervised import SemiSupervised
from uharmony_model.losses import segmentation_loss
from uharmony_model.patches import Batch, draw_batch
from uharmony_model.randomness import numpy_generator
from uharmony_model.unseen_view import viewed


@pytest.mark.parametrize("drop", [False, True])
def test_the_supervised_loss_is_that_of_the_labelled_draw_alone(drop):
    study = study_of("none", "uharmony")
    place, data = Place(study, ("x", "y")), data_of(domains=2)
    network = place.network()
    with torch.no_grad():  # domains differ, and without residuals it is another network
        for name, parameter in network.named_parameters():
            if name in place.partition.local_keys:
                parameter.add_(torch.arange(parameter.numel()).view_as(parameter).cos() * 0.1)
    found = Supervised(data, study).loss(network, 2, 1, drop=drop)
    batch = draw_batch(data.volumes, study.task, study.training, study.seed, "alpha", 2, 1)
    domain = torch.tensor([data.domains[case] for case in batch.cases])
    logits = network(batch.image, domain, drop=drop)
    wanted = segmentation_loss(logits, batch.label, study.task, data.annotated)
    assert torch.equal(found, wanted)
    other = segmentation_loss(
        network(batch.image, domain, drop=not drop), batch.label, study.task, data.annotated
    )
    assert not torch.equal(found, other)


@pytest.mark.parametrize(
    ("method", "drop", "view", "changed"),
    [
        ("uharmony", True, "strong", True),
        ("uharmony", True, "inverted", True),
        ("uharmony", True, "plain", False),
        ("uharmony", False, "inverted", False),  # a site's own part sees its images as they are
        ("fedavg", True, "inverted", False),  # it has no state that only unseen sites have
    ],
)
def test_only_steps_without_residuals_see_an_unseen_scanner(method, drop, view, changed):
    plain = study_of("none", method)
    study = study_of("none", method, network={"harmonization": {"unseen_view": view}})
    network, data = Place(plain, ("x",)).network(), data_of()
    one, other = (Supervised(data, s).loss(network, 2, 1, drop=drop) for s in (plain, study))
    assert bool(one != other) is changed
    assert torch.equal(other, Supervised(data, study).loss(network, 2, 1, drop=drop))


@pytest.mark.parametrize("method", ["uharmony", "fedavg"])
@pytest.mark.parametrize("drop", [False, True])
def test_views_are_for_labelled_patches_of_any_method_and_step(method, drop):
    plain = study_of("none", method)
    every = study_of("none", method, training={"views": "strong", "view_share": 1.0})
    data, network = data_of(), Place(plain, ("x",)).network()
    image, label, domain = Supervised(data, plain).draw(network, 2, 1)
    draws = [numpy_generator(plain.seed, "alpha", 2, 1, "view", s) for s in range(len(image))]
    seen = viewed(image, plain.task, "strong", draws)
    assert not torch.equal(seen, image)
    wanted = segmentation_loss(network(seen, domain, drop=drop), label, plain.task, data.annotated)
    assert torch.equal(Supervised(data, every).loss(network, 2, 1, drop=drop), wanted)


@pytest.mark.parametrize("rule", ["mean-teacher", "fixmatch", "ust-run", "glua"])
def test_views_change_what_labels_teach_and_no_unlabelled_patch(rule):
    plain = study_of(rule)
    study = study_of(rule, training={"views": "inverted", "view_share": 1.0})
    network = Place(plain).network()
    one, other = (objective_of(data_of(unlabelled=stored(3)), s) for s in (plain, study))
    assert isinstance(one, SemiSupervised)
    assert isinstance(other, SemiSupervised)
    assert torch.equal(one.unlabelled(network, 1, 0)[0], other.unlabelled(network, 1, 0)[0])
    assert not torch.equal(one.labelled(network, 1, 0)[0], other.labelled(network, 1, 0)[0])


def test_without_a_rule_unlabelled_cases_change_nothing():
    place = Place(study_of("none"))
    assert same(place.round(data_of()), place.round(data_of(unlabelled=[])))


@pytest.mark.parametrize("rule", ["mean-teacher", "fixmatch", "entropy-min", "ust-run"])
def test_without_unlabelled_cases_a_rule_is_supervised_training(rule):
    study, plain = study_of(rule), study_of("none")
    with_rule = Place(study).round(data_of(unlabelled=[]))
    without = Place(plain).round(data_of(unlabelled=[]))
    assert same(with_rule, without)
    assert with_rule.share == 1


def test_nothing_is_carried_by_it():
    study = study_of("none")
    objective = objective_of(data_of(), study)
    assert isinstance(objective, Supervised)
    objective.restore({})
    objective.moved(Place(study).network(), 1, 0)
    assert (objective.carried(), objective.outlives(), objective.share) == ({}, {}, 1.0)


def test_cases_are_all_that_there_are_and_each_patch_gets_its_domain():
    data = data_of(stored(3), stored(2), domains=2)
    assert data.cases == 5
    batch = Batch(torch.zeros(2, 1, 2, 2, 2), torch.zeros(2, 2, 2, 2), (1, 0))
    network = Place(study_of("none")).network()
    assert on_device(network, batch, [4, 7])[2].tolist() == [7, 4]
