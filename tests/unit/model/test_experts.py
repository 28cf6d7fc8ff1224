"""Experts of several sites in one network, against each site's own network."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from uharmony_model.domains import Selection
from uharmony_model.errors import ConfigError, NetworkError, PartitionError
from uharmony_model.exchange.partition import Partition
from uharmony_model.experts import Expert, expert_network, experts_of, mixed_expert
from uharmony_model.harmonize import HarmonizedNetwork, stacked_keys
from uharmony_model.networks import build_network
from uharmony_model.study import Study

SITES = {"north": ("one", "two"), "south": ("one",)}
RESIDUALS = ["phi", "stem", "depthwise", "head"]


def study(method: str = "uharmony", **harmonization) -> Study:
    return Study.model_validate(
        {
            "name": "test",
            "method": method,
            "task": {"classes": {"core": 1}, "intensity": {"mr": {"policy": "zscore"}}},
            "network": {
                "name": "unet",
                "features": (3, 4, 5),
                "harmonization": {"residuals": RESIDUALS, **harmonization},
            },
        }
    )


def site_network(of: Study, site: str) -> HarmonizedNetwork:
    """Shared weights as every site has them, residuals of its own."""
    network = build_network(of, SITES[site], seed=of.seed)
    assert isinstance(network, HarmonizedNetwork)
    generator = torch.Generator().manual_seed(sorted(SITES).index(site))
    with torch.no_grad():
        for name in sorted(stacked_keys(network)):
            parameter = network.get_parameter(name)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def split(of: Study, site: str) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    network = site_network(of, site)
    return Partition.of(network, of.plan.local).split(network.state_dict())


def published(of: Study) -> tuple[Expert, ...]:
    return tuple(
        expert
        for site, domains in SITES.items()
        for expert in experts_of(site, split(of, site)[1], dict.fromkeys(domains, 10))
    )


def draw(batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, 12, 8, 8, generator=torch.Generator().manual_seed(9))


def loaded(of: Study) -> HarmonizedNetwork:
    return expert_network(of, split(of, "north")[0], published(of))


@pytest.mark.parametrize("order", [1, 2])
def test_each_expert_is_its_site_s_network(order):
    of = study(order=order)
    network = loaded(of)
    assert network.domains == ("north.one", "north.two", "south.one")
    assert not network.training
    sources = [("north", 0), ("north", 1), ("south", 0)]
    with torch.no_grad():
        for index, (site, domain) in enumerate(sources):
            expected = site_network(of, site)(draw(), torch.tensor([domain]))
            assert torch.equal(network(draw(), torch.tensor([index])), expected)
            row = torch.eye(3)[index : index + 1]
            torch.testing.assert_close(network(draw(), row), expected, rtol=0, atol=1e-6)
        plain = network(draw())
        torch.testing.assert_close(network(draw(), torch.zeros(1, 3)), plain, rtol=0, atol=0)
        assert not torch.allclose(expected, plain, atol=1e-2)


def test_a_mixture_is_the_network_of_the_mixed_residuals():
    of = study()
    weights = np.array([0.5, 0.2, 0.3])
    experts = published(of)
    expected = {
        key: sum(float(w) * e.residuals[key] for w, e in zip(weights, experts, strict=True))
        for key in experts[0].residuals
    }
    mixed = mixed_expert(experts, weights)
    for key, value in expected.items():
        torch.testing.assert_close(mixed.residuals[key], value)
    alone = expert_network(of, split(of, "south")[0], [mixed])
    with torch.no_grad():
        row = torch.tensor(weights, dtype=torch.float32)[None]
        torch.testing.assert_close(
            loaded(of)(draw(), row), alone(draw(), torch.tensor([0])), rtol=1e-5, atol=1e-5
        )


def test_rows_of_a_batch_mix_each_for_itself():
    network = loaded(study())
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.1, 0.4]])
    with torch.no_grad():
        together = network(draw(3), rows)
        for b in range(3):
            alone = network(draw(3)[b : b + 1], rows[b : b + 1])
            torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-4, atol=1e-5)


def test_weights_get_the_gradient_of_finite_differences():
    network = loaded(study()).double()
    x = draw().double()
    direction = torch.randn(2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def value(weights: Tensor) -> Tensor:
        logits: Tensor = network(x, weights[None])
        return (logits.mean((0, 2, 3, 4)) * direction).sum() + logits.square().mean()

    weights = torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64, requires_grad=True)
    # Statistics that stage 2 restores pass no gradient, by design; so compare without them.
    for name, parameter in network.named_parameters():
        if name.endswith((".rho", ".lam")):
            parameter.data.zero_()
    (found,) = torch.autograd.grad(value(weights), weights)
    step = 1e-6
    for k in range(3):
        offset = step * torch.eye(3, dtype=torch.float64)[k]
        with torch.no_grad():
            slope = (value(weights + offset) - value(weights - offset)) / (2 * step)
        assert float(found[k]) == pytest.approx(float(slope), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([[0.5, 0.6]]), "sums to 1.1"),
        (torch.tensor([[-0.1, 0.6]]), "from -0.1"),
        (torch.tensor([[torch.nan, 0.6]]), "nan"),
        (torch.tensor([[1, 0]]), "floating-point"),
        (torch.tensor([[1.0]]), r"shape \(B, 2\)"),
        (torch.tensor([1.0, 0.0]), r"shape \(B, 2\)"),
    ],
)
def test_rows_that_are_no_mixture(weights, message):
    with pytest.raises(NetworkError, match=message):
        Selection.mixture(weights, 2)


def test_equal_rows_are_known_as_such():
    uniform = Selection.mixture(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), 2)
    assert uniform is not None
    assert uniform.uniform
    apart = Selection.mixture(torch.tensor([[0.5, 0.5], [0.5, 0.4]]), 2)
    assert apart is not None
    assert not apart.uniform
    assert Selection.mixture(torch.zeros(2, 2), 2) is None
    assert Selection.mixture(torch.zeros(2, 2, requires_grad=True), 2) is not None


@pytest.mark.parametrize("shape", [(2, 3), (2,), ()])
def test_a_mixture_for_another_number_of_samples(shape):
    with pytest.raises(NetworkError, match="for 1 samples"):
        loaded(study())(draw(), torch.zeros(shape))


def test_too_few_patients_or_nothing_of_a_domain():
    local = split(study(), "north")[1]
    with pytest.raises(ConfigError, match="9 patients, expected at least 10"):
        experts_of("north", local, {"one": 10, "two": 9})
    with pytest.raises(ConfigError, match="0 patients"):
        experts_of("north", local, {"one": 10})
    with pytest.raises(PartitionError, match="belongs to no domain"):
        experts_of("north", {"network.norm.weight": torch.ones(3)}, {})


def test_experts_that_do_not_fit():
    of = study()
    shared, experts = split(of, "north")[0], published(of)
    key = next(iter(experts[0].residuals))
    broken = {**experts[0].residuals, key: torch.full_like(experts[0].residuals[key], torch.nan)}
    with pytest.raises(PartitionError, match="not finite"):
        expert_network(of, shared, [Expert("a", broken)])
    missing = {k: v for k, v in experts[0].residuals.items() if k != key}
    with pytest.raises(PartitionError, match="missing"):
        expert_network(of, shared, [Expert("a", missing)])
    larger = {**experts[0].residuals, key: torch.zeros(1, 2, 3)}
    with pytest.raises(PartitionError, match="expected"):
        expert_network(of, shared, [Expert("a", larger)])
    with pytest.raises(NetworkError, match="different names"):
        expert_network(of, shared, [experts[0], experts[0]])
    with pytest.raises(ConfigError, match="no expert"):
        expert_network(of, shared, [])
    with pytest.raises(PartitionError, match="different tensors"):
        mixed_expert([experts[0], Expert("a", missing)], [0.5, 0.5])
    with pytest.raises(ConfigError, match="one for each"):
        mixed_expert(experts, [1.0])


@pytest.mark.parametrize("method", ["fedavg", "lg-fedavg", "uharmony-averaged", "pooled-uharmony"])
def test_methods_without_experts(method):
    with pytest.raises(ConfigError, match="keeps no residuals"):
        expert_network(study(method), {}, published(study()))
