"""The one loop of all training, against a plain one: pulls, what stands still, what is own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.blobs import volumes
from tests.support.tiny import tiny_study
from uharmony_client.local_train import RoundResult, train_round
from uharmony_client.optimizer import PREFIX, make_optimizer
from uharmony_client.personal import local_parameters, model_state, personal_part
from uharmony_client.training_steps import LocalData, Pull, run_steps
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.losses import segmentation_loss
from uharmony_model.networks import build_network
from uharmony_model.patches import draw_batch
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study

State = dict[str, Tensor]


def study_of(method: str, **training: object) -> Study:
    settings = {"patch": [8, 8, 8], "local_steps": 2, "schedule": "constant", **training}
    return tiny_study(method=method, training=settings)


def data_of(domains: int = 1) -> LocalData:
    return LocalData("alpha", volumes(), [0, domains - 1, 0], torch.tensor([True]))


class Site:
    """One site without a disk: what it starts from, and a round of it."""

    def __init__(self, study: Study, domains: tuple[str, ...] = ("x", "y")) -> None:
        self.study, self.domains = study, domains
        self.network = build_network(study, domains, seed=study.seed)
        self.partition = Partition.of(self.network, study.plan.local)
        shared, self.before = self.partition.split(
            {k: v.clone() for k, v in self.network.state_dict().items()}
        )
        self.base = flatten(shared, self.partition.shared_schema)

    def round(self, number: int = 1, *, base=None, before=None, on_step=None) -> RoundResult:
        return train_round(
            self.network,
            data_of(len(self.domains)),
            study=self.study,
            partition=self.partition,
            base=self.base if base is None else base,
            before=self.before if before is None else before,
            round_=number,
            on_step=on_step,
        )


def parameters(network: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def by_hand(
    study: Study,
    network: SegmentationNetwork,
    *,
    steps: int,
    pull: float = 0.0,
    anchor: State | None = None,
) -> State:
    """Nesterov's SGD written out, with decay and clipping: no optimiser of torch's."""
    training, task = study.training, study.task
    values = parameters(network)
    buffers = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(steps):
        batch = draw_batch(volumes(), task, training, study.seed, "alpha", 1, step)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(values[name])
        loss = segmentation_loss(network(batch.image), batch.label, task, torch.tensor([True]))
        names = list(values)
        found = torch.autograd.grad(loss, [network.get_parameter(n) for n in names])
        gradients = dict(zip(names, found, strict=True))
        if anchor is not None:
            gradients = {n: g + pull * (values[n] - anchor[n]) for n, g in gradients.items()}
        norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        shrink = min(1.0, training.gradient_clip / (float(norm) + 1e-6))
        for name, gradient in gradients.items():
            step_ = shrink * gradient + training.weight_decay * values[name]
            buffers[name] = step_ if step == 0 else 0.9 * buffers[name] + step_
            values[name] = values[name] - training.learning_rate * (step_ + 0.9 * buffers[name])
    return values


SGD = {"optimizer": "sgd", "learning_rate": 0.05, "weight_decay": 0.01}


@pytest.mark.parametrize("clip", [1e6, 0.1])
def test_fedprox_is_sgd_on_the_loss_and_the_pull_to_the_global_weights(clip):
    study = study_of("fedprox", proximal=3.0, local_steps=3, gradient_clip=clip, **SGD)
    site = Site(study)
    shared = unflatten(site.base, site.partition.shared_schema)
    fresh = build_network(study, site.domains, seed=study.seed)
    wanted = by_hand(study, fresh, steps=3, pull=3.0, anchor=dict(shared))
    update = unflatten(site.round().update, site.partition.shared_schema)
    for name, value in wanted.items():
        torch.testing.assert_close(update[name], value - shared[name], rtol=2e-4, atol=2e-6)
    # The pull is felt: without it the same steps end elsewhere.
    free = by_hand(study, fresh, steps=3)
    moved = max(float((free[n] - wanted[n]).abs().max()) for n in wanted)
    assert moved > 1e-4


def test_fedprox_without_a_pull_is_fedavg_to_the_bit():
    rounds = [Site(study_of(method, proximal=0.0)).round() for method in ("fedprox", "fedavg")]
    assert torch.equal(rounds[0].update, rounds[1].update)


def test_a_pull_is_the_gradient_of_its_penalty():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        anchor = {name: torch.randn(p.shape) for name, p in network.named_parameters()}
        grads = [torch.randn(p.shape) for p in network.parameters()]
    del anchor["1.weight"]  # a parameter of the site's own has none
    penalty = sum(
        ((0.7 / 2) * (network.get_parameter(n) - a).square()).sum() for n, a in anchor.items()
    )
    assert isinstance(penalty, Tensor)
    wanted = torch.autograd.grad(
        penalty, list(network.parameters()), allow_unused=True, materialize_grads=True
    )
    for parameter, gradient in zip(network.parameters(), grads, strict=True):
        parameter.grad = gradient.clone()
    network.get_parameter("0.bias").grad = None  # it does not learn in this step
    Pull(0.7, anchor).add_to(network)
    for (name, p), before, more in zip(network.named_parameters(), grads, wanted, strict=True):
        if name == "0.bias":
            assert p.grad is None
        else:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, before + more)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_does_not_learn_keeps_its_bits_and_learns_again_afterwards(optimizer):
    study = study_of("fedavg", optimizer=optimizer, weight_decay=0.1)
    network = build_network(study, ("x",), seed=0)
    first = next(iter(dict(network.named_parameters())))

    def steps(learns) -> None:
        settings: dict[str, Any] = {"round_": 1, "count": 2, "rate": lambda step: 0.01}
        run_steps(network, running, data_of(), study, learns=learns, **settings)

    running = make_optimizer(network, study.training)
    steps(lambda step: None)  # so that there are moments, which could move it
    before = parameters(network)
    steps(lambda step: {first})
    after = parameters(network)
    assert not torch.equal(after.pop(first), before.pop(first))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for p in network.parameters())


def test_a_step_without_its_residuals_passes_where_nothing_else_learns():
    """Domain dropout uses no residual; where the rest stands still, nothing is to learn."""
    study = tiny_study(
        training={"patch": [8, 8, 8]}, network={"harmonization": {"domain_dropout": 0.9}}
    )
    network = build_network(study, ("x",), seed=0)
    partition = Partition.of(network, study.plan.local)
    own: Collection[str] = frozenset(partition.local_keys)
    before = parameters(network)
    running = make_optimizer(network, study.training)
    settings: dict[str, Any] = {"round_": 1, "count": 5, "rate": lambda step: 0.01}
    run_steps(network, running, data_of(), study, learns=lambda step: own, **settings)
    after = parameters(network)
    assert all(torch.equal(after[n], v) for n, v in before.items() if n not in own)


@pytest.mark.parametrize(("steps", "share", "alone"), [(4, 0.5, 2), (4, 0.25, 1), (5, 0.8, 4)])
def test_fedrep_trains_the_last_block_and_then_the_rest(steps, share, alone):
    site = Site(study_of("fedrep", local_steps=steps, head_share=share, weight_decay=0.1))
    last = {n for n, _ in site.network.named_parameters() if n in site.partition.local_keys}
    seen = [parameters(site.network)]
    site.round(on_step=lambda step, loss: seen.append(parameters(site.network)))
    for step in range(steps):
        moved = {n for n, value in seen[step].items() if not torch.equal(seen[step + 1][n], value)}
        assert moved
        assert moved <= last if step < alone else not moved & last, step


def test_fedrep_sends_the_body_and_keeps_the_head():
    site = Site(study_of("fedrep"))
    result = site.round()
    names = {t.name for t in site.partition.shared_schema.tensors}
    assert names == set(site.partition.shared_keys)
    assert names.isdisjoint(local_parameters(result.local))
    assert float(result.update.abs().max()) > 0


DITTO = {"keep_optimizer": True, "local_steps": 2}


def two_rounds(site: Site, second_base: Tensor) -> tuple[RoundResult, RoundResult]:
    first = site.round()
    return first, site.round(2, base=second_base, before=first.local)


def test_ditto_shares_what_fedavg_shares():
    ditto, fedavg = (Site(study_of(method, **DITTO)) for method in ("ditto", "fedavg"))
    base = ditto.base + 0.01
    for mine, theirs in zip(two_rounds(ditto, base), two_rounds(fedavg, base), strict=True):
        assert torch.equal(mine.update, theirs.update)
        assert mine.loss == theirs.loss


def test_dittos_own_model_without_a_pull_is_the_model_of_a_site_alone():
    """Whatever the global weights do; so it is carried on, with moments of its own."""
    ditto = Site(study_of("ditto", proximal=0.0, **DITTO))
    alone = Site(study_of("local", **DITTO))
    mine = two_rounds(ditto, ditto.base + 0.1)[1].local
    theirs = two_rounds(alone, alone.base)[1].local
    own = personal_part(mine)
    assert own.keys() == theirs.keys()
    assert any(key.startswith(PREFIX) for key in own)
    assert all(torch.equal(own[key], theirs[key]) for key in own)


def test_dittos_own_model_is_pulled_to_the_global_weights_that_the_round_began_with():
    distances = []
    for strength in (0.0, 5.0):
        study = study_of("ditto", proximal=strength, local_steps=4, **SGD)
        site = Site(study)
        shared = dict(unflatten(site.base, site.partition.shared_schema))
        own = local_parameters(personal_part(site.round().local))
        fresh = build_network(study, site.domains, seed=study.seed)
        wanted = by_hand(study, fresh, steps=4, pull=strength, anchor=shared)
        for name, value in wanted.items():
            torch.testing.assert_close(own[name], value, rtol=2e-4, atol=2e-5)
        distances.append(sum(float((own[n] - shared[n]).square().sum()) for n in wanted))
    assert distances[1] < distances[0]


def test_what_ditto_measures_is_its_own_model_and_not_the_shared_one():
    site = Site(study_of("ditto", proximal=0.5, **DITTO))
    _, result = two_rounds(site, site.base + 0.05)
    new = site.base + result.update
    shared = dict(unflatten(new, site.partition.shared_schema))
    measured = model_state(site.network, site.partition, shared, result.local)
    own = local_parameters(personal_part(result.local))
    assert measured.keys() == own.keys() == shared.keys()
    assert all(torch.equal(measured[key], own[key]) for key in own)
    assert any(not torch.equal(measured[key], shared[key]) for key in own)
