"""What holds for every gate, and for every mixture that a harmonised network is given."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from uharmony_model.gate import Gate
from uharmony_model.harmonize import HarmonizedNetwork, harmonize
from uharmony_model.network_settings import Harmonization
from uharmony_model.prototypes import MAX_RELEASED, Prototype, PublicFrame, clipped

K, D = 4, 3
numbers = st.floats(-50, 50)
points = arrays(np.float64, (K, D), elements=numbers)
places = arrays(np.float64, (D,), elements=numbers)
kinds = st.sampled_from(["soft", "nearest"])
temperatures = st.one_of(st.none(), st.floats(1e-3, 1e3))
mixtures = arrays(np.float64, (K,), elements=st.floats(0.01, 1)).map(lambda w: w / w.sum())
seeds = st.integers(0, 2**31)


def gate_of(means: np.ndarray, temperature: float | None, order=range(K)) -> Gate:
    prototypes = [Prototype(domain=f"d{j}", mean=tuple(means[j]), patients=10) for j in order]
    return Gate.of(prototypes, temperature=temperature)


@given(points, places, kinds, temperatures)
def test_weights_are_a_mixture(means, u, kind, temperature):
    choice = gate_of(means, temperature).choose(u, kind)
    assert (choice.weights >= 0).all()
    assert abs(choice.weights.sum() - 1) < 1e-12
    assert choice.weights[choice.distances.argmin()] == choice.weights.max()


@given(points, places, temperatures, st.permutations(range(K)))
def test_domains_may_change_places(means, u, temperature, order):
    straight = gate_of(means, temperature).choose(u)
    turned = gate_of(means, temperature, order).choose(u)
    assert turned.domains == tuple(f"d{j}" for j in order)
    np.testing.assert_allclose(turned.weights, straight.weights[list(order)], atol=1e-9)
    np.testing.assert_allclose(turned.distances, straight.distances[list(order)])


@given(points, st.integers(0, K - 1))
def test_a_prototype_is_its_own_domain_as_tau_falls(means, j):
    squared = np.square(means - means[j]).sum(1)
    assume(np.delete(squared, j).min() > 1e-3)
    weights = gate_of(means, 1e-5).choose(means[j]).weights
    np.testing.assert_allclose(weights, np.eye(K)[j], atol=1e-12)


@given(points, places)
def test_soft_becomes_nearest_as_tau_falls(means, u):
    gate = gate_of(means, 1e-6)
    first, second = np.sort(np.square(gate.distances(u)))[:2]
    assume(second - first > 1e-3)
    np.testing.assert_allclose(
        gate.choose(u).weights, gate.choose(u, "nearest").weights, atol=1e-12
    )


@given(points, places, arrays(np.float64, (D,), elements=numbers))
def test_a_common_shift_changes_nothing(means, u, shift):
    near = gate_of(means, 10.0).choose(u).weights
    np.testing.assert_allclose(
        gate_of(means + shift, 10.0).choose(u + shift).weights, near, atol=1e-6
    )


def network(seed: int) -> HarmonizedNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            nn.Conv3d(1, 2, 3, padding=1),
            nn.InstanceNorm3d(2, affine=True),
            nn.LeakyReLU(),
            nn.Conv3d(2, 2, 3, padding=1),
            nn.Conv3d(2, 2, 1),
        )
        model = harmonize(
            layers,
            domains=[f"d{k}" for k in range(K)],
            settings=Harmonization(residuals=("phi", "stem", "depthwise", "head")),
            stem=("0",),
            depthwise=("3",),
            head=("4",),
        ).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
    return model


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 3, 4, 3, generator=generator, dtype=torch.float64)


def stacked(model: HarmonizedNetwork) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.shape[0] == K]


@given(seeds, st.integers(0, K - 1), st.integers(0, K - 1))
def test_one_hot_weights_are_the_domain(seed, first, second):
    model, x = network(seed), draw(seed)
    rows = torch.eye(K, dtype=torch.float64)[[first, second]]
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, rows), model(x, torch.tensor([first, second])), rtol=0, atol=1e-12
        )


@given(seeds, mixtures)
def test_a_mixture_is_linear_in_the_parameters(seed, weights):
    """Domains that are all the weighted sum compute, each of them, what the mixture computes."""
    model, x = network(seed), draw(seed)
    row = torch.tensor(weights)
    with torch.no_grad():
        mixed = model(x, row.expand(2, K))
        for parameter in stacked(model):
            parameter.copy_(torch.tensordot(row, parameter, 1).expand_as(parameter))
        torch.testing.assert_close(mixed, model(x, torch.tensor([0, 3])), rtol=1e-8, atol=1e-8)


@given(seeds, mixtures, st.permutations(range(K)))
def test_experts_may_change_places(seed, weights, order):
    model, x = network(seed), draw(seed)
    row = torch.tensor(weights)
    with torch.no_grad():
        straight = model(x, row.expand(2, K))
        for parameter in stacked(model):
            parameter.copy_(parameter[list(order)].clone())
        turned = model(x, row[list(order)].expand(2, K))
        torch.testing.assert_close(turned, straight, rtol=1e-8, atol=1e-8)


@given(arrays(np.float64, (5, 24), elements=numbers), st.integers(1, MAX_RELEASED), seeds)
def test_a_frame_makes_no_row_longer(rows, coordinates, seed):
    frame = PublicFrame.of(24, seed=seed, coordinates=coordinates)
    lengths = np.linalg.norm(frame.rows(rows), axis=1)
    assert (lengths <= np.linalg.norm(rows, axis=1) / np.sqrt(coordinates) + 1e-9).all()


@given(arrays(np.float64, (6, D), elements=st.floats(-1e9, 1e9)), st.floats(1e-3, 1e3))
def test_no_clipped_row_is_longer_than_the_clip(rows, clip):
    lengths = np.linalg.norm(clipped(rows, clip), axis=1)
    assert (lengths <= clip * (1 + 1e-12)).all()
    np.testing.assert_allclose(lengths, np.minimum(np.linalg.norm(rows, axis=1), clip))
