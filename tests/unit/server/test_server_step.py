"""The server's own step: FedAdam as Flower has it, and the mean left alone for all others."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam

from tests.support.tiny import tiny_study
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.schema import Schema, flatten, unflatten
from uharmony_model.methods import METHODS
from uharmony_server.server_step import BETA_1, BETA_2, TAU, adam_step, nesterov_step, next_weights
from uharmony_simulation.engine import InProcessGrid

N = 50
RATE = 0.03


def draw(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(N, generator=torch.Generator().manual_seed(seed))


class Flowers:
    """Flower's FedAdam over one array, fed with the answers of two nodes."""

    def __init__(self) -> None:
        self.adam = FedAdam(eta=RATE, beta_1=0.9, beta_2=0.99, tau=1e-3)
        # It stamps messages; nothing is sent through it.
        self.grid = InProcessGrid(lambda message, context: message, ("a", "b"))

    def round(
        self, number: int, base: torch.Tensor, answers: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        arrays = ArrayRecord({"w": Array(base.numpy())})
        asked = list(self.adam.configure_train(number, arrays, ConfigRecord(), self.grid))
        replies = []
        for message in asked:
            node = message.metadata.dst_node_id
            content = RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(answers[node].numpy())}),
                    "metrics": MetricRecord({"num-examples": node}),
                }
            )
            replies.append(Message(content, reply_to=message))
        assert {r.metadata.src_node_id for r in replies} == set(answers)
        found, _ = self.adam.aggregate_train(number, replies)
        assert found is not None
        return torch.from_numpy(found["w"].numpy().copy()).float()


def test_fedadam_is_flowers_over_three_rounds():
    study = tiny_study(method="fedadam", federation={"server_rate": RATE})
    flowers, moments = Flowers(), None
    ours = theirs = draw(0)
    for number in (1, 2, 3):
        deltas = {node: draw(10 * number + node, 0.1) for node in (1, 2)}
        answers = {node: theirs + delta for node, delta in deltas.items()}
        theirs = flowers.round(number, theirs, answers)
        mean = (1 * deltas[1] + 2 * deltas[2]) / 3  # by cases: one and two
        before = ours
        ours, moments = next_weights(study, number, ours, ours + mean, moments)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert float((ours - before).abs().max()) > RATE / 10


def test_the_first_step_is_the_formula():
    """With m = 0.1 d and v = 0.01 d^2 the bias corrections of round 1 do not cancel them."""
    delta = draw(3).double()
    step, (first, second) = adam_step(delta, None, 1, RATE)
    torch.testing.assert_close(first, 0.1 * delta)
    torch.testing.assert_close(second, 0.01 * delta**2)
    rate = RATE * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)
    torch.testing.assert_close(step, rate * 0.1 * delta / (0.1 * delta.abs() + 1e-3))
    assert (BETA_1, BETA_2, TAU) == (0.9, 0.99, 1e-3)


def test_moments_that_are_carried_are_not_changed_in_place():
    moments = (draw(1), draw(2).square())
    kept = tuple(m.clone() for m in moments)
    adam_step(draw(3), moments, 2, RATE)
    assert all(torch.equal(*pair) for pair in zip(moments, kept, strict=True))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fedadam"}))
def test_every_other_method_takes_the_mean_as_it_is(method):
    base, averaged = draw(0), draw(1)
    weights, moments = next_weights(tiny_study(method=method), 1, base, averaged, None)
    assert torch.equal(weights, averaged)
    assert moments is None


@pytest.mark.parametrize("method", ["fedavg", "fedadam"])
def test_what_is_sent_down_is_what_counts(method):
    """Under a lossy codec the step itself is rounded, to about one part in 256."""
    exact, lossy = (
        next_weights(tiny_study(method=method, codec={"down": down}), 1, draw(0), draw(1), None)[0]
        for down in ("fp32", "bf16")
    )
    step = lossy - draw(0)
    assert not torch.equal(exact, lossy)
    torch.testing.assert_close(step, exact - draw(0), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(step.bfloat16().float(), step, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["fedavg", "fedadam"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sum_that_is_not_finite_is_refused(method, bad):
    averaged = draw(1)
    averaged[3] = bad
    with pytest.raises(ExchangeError, match="round 4: the sum of the updates is not finite"):
        next_weights(tiny_study(method=method), 4, draw(0), averaged, None)


def test_an_update_of_zero_leaves_the_weights_until_there_is_momentum():
    study = tiny_study(method="fedadam")
    base = draw(0)
    weights, moments = next_weights(study, 1, base, base.clone(), None)
    assert torch.equal(weights, base)
    weights, moments = next_weights(study, 2, base, base + 0.1, moments)
    further, _ = next_weights(study, 3, weights, weights.clone(), moments)
    assert bool((further > weights).all())  # 0.9 of the last round's momentum


def test_nesterov_momentum_by_hand():
    """Three equal updates of 1 with momentum 0.5: v = 1, 1.5, 1.75; steps 1 + v / 2."""
    delta, moments, steps = torch.ones(3), None, []
    for _ in range(3):
        step, moments = nesterov_step(delta, moments, 0.5)
        steps.append(step[0].item())
    assert steps == [1.5, 1.75, 1.875]
    assert moments is not None
    assert torch.equal(moments[0], torch.full((3,), 1.75))


def test_momentum_counts_in_the_weights_and_none_of_it_changes_nothing():
    base, averaged = torch.zeros(4), torch.tensor([1.0, -2.0, 0.5, 0.0])
    plain, nothing = next_weights(tiny_study(method="fedavg"), 1, base, averaged, None)
    assert plain is averaged
    assert nothing is None
    study = tiny_study(method="fedavg", federation={"momentum": 0.5})
    weights, moments = next_weights(study, 1, base, averaged, None)
    assert torch.equal(weights, 1.5 * averaged)
    assert moments is not None
    again, _ = next_weights(study, 2, weights, weights + averaged, moments)
    assert torch.equal(again, weights + 1.75 * averaged)


def test_a_variance_that_falls_far_is_not_rounded_below_zero():
    """A fall by 301.49 becomes one by 302: bf16 has 8 bits, so steps of 2 above 256."""
    before = {
        "n.running_mean": torch.tensor([1.0, -1.0, 0.0]),
        "n.running_var": torch.tensor([1.0, 301.5, 2.0]),
        "n.weight": torch.tensor([1.0, 301.5, 2.0]),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["n.running_mean"] = torch.tensor([-1.0, -2.0, 0.0])
    for name in ("n.running_var", "n.weight"):
        after[name] = torch.tensor([0.0002, 0.01, 1.5])
    schema = Schema.of(before)
    study = tiny_study(method="fedavg-bn", codec={"down": "bf16"})
    base, mean = flatten(before, schema), flatten(after, schema)
    plain = unflatten(next_weights(study, 1, base, mean, None)[0], schema)
    held = unflatten(next_weights(study, 1, base, mean, None, schema)[0], schema)
    assert float(plain["n.running_var"].min()) < 0  # or nothing would be shown here
    for name in ("n.running_mean", "n.weight"):  # only variances are held
        assert torch.equal(held[name], plain[name])
        assert float(held[name].min()) < 0
    assert torch.equal(held["n.running_var"], plain["n.running_var"].clamp(min=0))
    # What is not below zero is left as it is, in the same memory.
    exact = tiny_study(method="fedavg-bn")
    assert next_weights(exact, 1, base, mean, None, schema)[0] is mean
