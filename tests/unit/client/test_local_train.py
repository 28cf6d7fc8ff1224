"""One round of training: the rate, the moments, the policy, and that it is a pure function."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.blobs import volumes
from tests.support.tiny import tiny_study
from uharmony_client.local_train import learning_rate, train_round
from uharmony_client.optimizer import PREFIX, make_optimizer, moments, restore_moments
from uharmony_client.policy import Policy, apply_policy
from uharmony_client.training_steps import LocalData
from uharmony_model.errors import TrainingError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import flatten
from uharmony_model.networks import build_network


def one_round(study, base=None, before=None, round_=1, domains=("alpha",)):
    network = build_network(study, domains, seed=study.seed)
    partition = Partition.of(network, study.plan.local)
    shared, local = partition.split(network.state_dict())
    if base is None:
        base = flatten(shared, partition.shared_schema)
    data = LocalData("alpha", volumes(), [0, len(domains) - 1, 0], torch.tensor([True]))
    result = train_round(
        network,
        data,
        study=study,
        partition=partition,
        base=base,
        before=local if before is None else before,
        round_=round_,
    )
    return base, result


@pytest.mark.parametrize("method", ["uharmony", "fedavg", "fedbn", "local"])
def test_a_round_is_a_pure_function(method):
    study = tiny_study(method=method)
    (base, first), (_, second) = one_round(study), one_round(study)
    assert torch.equal(first.update, second.update)
    assert first.local.keys() == second.local.keys()
    assert all(torch.equal(first.local[k], second.local[k]) for k in first.local)
    if method != "local":
        assert float(first.update.abs().max()) > 0
    third = one_round(study, base, first.local, round_=2)[1]
    again = one_round(study, base, first.local, round_=2)[1]
    assert torch.equal(third.update, again.update)


def test_moments_are_kept_or_not_as_the_study_says():
    kept = one_round(tiny_study(training={"keep_optimizer": True}))[1].local
    dropped = one_round(tiny_study(training={"keep_optimizer": False}))[1].local
    assert any(k.startswith(PREFIX) for k in kept)
    assert not any(k.startswith(PREFIX) for k in dropped)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("domains", [("alpha",), ("x", "y")])
def test_restored_moments_give_the_next_step_of_an_optimiser_that_never_stopped(optimizer, domains):
    study = tiny_study(training={"optimizer": optimizer})
    network = build_network(study, domains, seed=0)
    running = make_optimizer(network, study.training)

    def step(which: torch.optim.Optimizer) -> None:
        image = torch.linspace(-1, 1, 16**3).reshape(1, 1, 16, 16, 16).sin()
        which.zero_grad()
        network(image, torch.tensor([0])).square().mean().backward()
        which.step()

    step(running)
    stored = {k: v.clone() for k, v in moments(running, network).items()}
    before = {k: v.clone() for k, v in network.state_dict().items()}
    step(running)
    wanted = {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(before)
    fresh = make_optimizer(network, study.training)
    restore_moments(fresh, network, stored)
    step(fresh)
    assert all(torch.equal(network.state_dict()[k], v) for k, v in wanted.items())
    if len(domains) == 2:
        assert any(key.endswith("@x") for key in stored)


def test_a_loss_that_is_not_finite_ends_the_round_with_a_reason():
    study = tiny_study(training={"learning_rate": 1e30, "optimizer": "sgd", "local_steps": 4})
    with pytest.raises(TrainingError, match=r"site alpha, round 1, step \d: the loss is"):
        one_round(study)


def test_cosine_starts_full_ends_at_a_hundredth_and_falls():
    study = tiny_study(training={"rounds": 5, "local_steps": 10})
    highest = study.training.learning_rate
    rates = [learning_rate(study, step) for step in range(51)]
    assert rates[0] == pytest.approx(highest)
    assert rates[-1] == pytest.approx(highest / 100)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))
    assert rates[25] == pytest.approx(highest * (0.01 + 0.99 / 2))
    constant = tiny_study(training={"rounds": 5, "local_steps": 10, "schedule": "constant"})
    assert {learning_rate(constant, step) for step in range(50)} == {highest}


def test_the_schedule_spans_the_steps_at_home_unless_they_have_a_rate_of_their_own():
    rounds = {"rounds": 5, "local_steps": 10}
    together = tiny_study(training=rounds, finale={"steps": 50})
    longer = tiny_study(training={"rounds": 10, "local_steps": 10})
    apart = tiny_study(training=rounds, finale={"steps": 50, "rate": 0.3})
    alone = tiny_study(training=rounds)
    for step in (0, 17, 50, 99):
        assert learning_rate(together, step) == learning_rate(longer, step)
        assert learning_rate(apart, step) == learning_rate(alone, step)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20),
    st.floats(1e-3, 1e3),
)
def test_clipping_never_raises_the_norm_and_keeps_the_direction(values, limit):
    update = torch.tensor(values)
    clipped = apply_policy(update, Policy(clip_norm=limit))
    norm, after = (math.sqrt(float(v.double().square().sum())) for v in (update, clipped))
    assert after <= min(norm, limit) * (1 + 1e-5)
    if norm <= limit:
        assert torch.equal(clipped, update)
    else:
        assert torch.allclose(
            clipped.double() * norm, update.double() * after, rtol=1e-4, atol=1e-4
        )
    assert apply_policy(update, Policy()) is update
