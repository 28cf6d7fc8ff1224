"""One discriminator of several sites: their gradients, one step, and what may travel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uharmony_model.alignment.discriminator import (
    FeatureDiscriminator,
    site_shares,
    sum_gradients,
)
from uharmony_model.alignment.shared_discriminator import (
    SharedDiscriminator,
    SideGradient,
    channels_of,
    check_discriminator,
    discriminator_of,
    discriminator_schema,
    travelling,
)
from uharmony_model.errors import ExchangeError, NetworkError
from uharmony_model.exchange.schema import Schema
from uharmony_model.randomness import torch_generator

CHANNELS = 8
# Two sites with labels and two without, of one to three patients each.
SITES = {"a": (False, 2), "b": (False, 1), "c": (True, 3), "d": (True, 1)}


def patients(site: str, dtype: torch.dtype) -> list[Tensor]:
    """Features (1, C, D, H, W) of a site's patients, of different sizes; targets lie higher."""
    target, count = SITES[site]
    made = []
    for number in range(count):
        generator = torch_generator(0, "shared discriminator", site, number)
        shape = (1, CHANNELS, 3 + number, 4, 3)
        made.append(torch.randn(shape, generator=generator, dtype=torch.float64) + target)
    return [features.to(dtype) for features in made]


def gradient(site: str, weights: dict[str, Tensor]) -> SideGradient:
    """What a site sends: of the mean over its patients of the mean over their places."""
    target, count = SITES[site]
    module = discriminator_of(weights)
    terms = [(module(f) - float(target)).square().mean() for f in patients(site, torch.float32)]
    named = dict(module.named_parameters())
    found = torch.autograd.grad(sum(terms) / count, list(named.values()))
    return SideGradient(dict(zip(named, found, strict=True)), target)


def pooled_loss(module: FeatureDiscriminator) -> Tensor:
    """L_D with all patients in one place, in float64: patients and sites of a side alike."""
    sides = {}
    for side in (False, True):
        own = [site for site in SITES if SITES[site][0] is side]
        per_site = []
        for site in own:
            scores = [module(features) for features in patients(site, torch.float64)]
            terms = [(found - float(side)).square().mean() for found in scores]
            per_site.append(torch.stack(terms).mean())
        sides[side] = torch.stack(per_site).mean()
    return sides[False] + sides[True]


def test_steps_on_the_sites_gradients_are_those_of_the_pooled_discriminator():
    shared = SharedDiscriminator.first(CHANNELS, seed=3)
    pooled = FeatureDiscriminator(CHANNELS, seed=3).double()
    adam = torch.optim.Adam(pooled.parameters(), lr=1e-3, betas=(0.9, 0.99))
    start = {k: v.clone() for k, v in shared.weights.items()}
    for _ in range(5):
        adam.zero_grad()
        pooled_loss(pooled).backward()
        length = sum(float((p.grad**2).sum()) for p in pooled.parameters() if p.grad is not None)
        for parameter in pooled.parameters():
            assert parameter.grad is not None
            parameter.grad /= length**0.5
        adam.step()
        shared = shared.stepped([gradient(site, dict(shared.weights)) for site in SITES])
    assert shared.steps == 5
    for name, parameter in pooled.named_parameters():
        torch.testing.assert_close(
            shared.weights[name].double(), parameter.detach(), rtol=1e-6, atol=1e-6
        )
        assert (shared.weights[name] - start[name]).abs().max() > 1e-3


def test_the_sum_of_gradients_is_that_of_the_pooled_loss():
    weights = SharedDiscriminator.first(CHANNELS, seed=3).weights
    pooled = discriminator_of(weights).double()
    pooled_loss(pooled).backward()
    sent = [gradient(site, dict(weights)) for site in SITES]
    shares = site_shares([1] * len(sent), [one.target for one in sent])
    summed = sum_gradients([one.tensors for one in sent], shares)
    for name, parameter in pooled.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(summed[name].double(), parameter.grad, rtol=1e-6, atol=1e-6)


def test_one_huge_gradient_costs_the_round_it_came_in():
    """What Adam remembers of it would hold D still for hundreds of steps."""
    shared = SharedDiscriminator.first(CHANNELS, seed=0)
    honest = [gradient(site, dict(shared.weights)) for site in "ac"]
    huge = SideGradient({k: torch.full_like(v, 9e3) for k, v in shared.weights.items()}, True)
    hit = shared.stepped([*honest, huge])
    losses = []
    for _ in range(60):
        losses.append(float(pooled_loss(discriminator_of(hit.weights).double()).detach()))
        hit = hit.stepped([gradient(site, dict(hit.weights)) for site in SITES])
    undisturbed = shared
    for _ in range(60):
        sent = [gradient(site, dict(undisturbed.weights)) for site in SITES]
        undisturbed = undisturbed.stepped(sent)
    end = float(pooled_loss(discriminator_of(undisturbed.weights).double()).detach())
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < 1.5 * end


def test_without_one_of_the_sides_it_stays():
    shared = SharedDiscriminator.first(CHANNELS, seed=0)
    for sites in ((), ("a", "b"), ("c",)):
        assert shared.stepped([gradient(site, dict(shared.weights)) for site in sites]) is shared


def test_a_stored_one_goes_on_to_the_bit():
    shared = SharedDiscriminator.first(CHANNELS, seed=0)
    for _ in range(2):
        shared = shared.stepped([gradient(site, dict(shared.weights)) for site in "ac"])
    again = SharedDiscriminator.of({k: v.clone() for k, v in shared.tensors().items()})
    one, other = (s.stepped([gradient(x, dict(s.weights)) for x in "ac"]) for s in (shared, again))
    assert one.steps == other.steps == 3
    one_tensors, other_tensors = one.tensors(), other.tensors()
    assert one_tensors.keys() == other_tensors.keys()
    assert all(torch.equal(v, other_tensors[k]) for k, v in one_tensors.items())


def test_every_place_makes_the_first_one_for_itself():
    one, other = (SharedDiscriminator.first(CHANNELS, seed=4).weights for _ in range(2))
    assert all(torch.equal(one[k], other[k]) for k in one)
    different = SharedDiscriminator.first(CHANNELS, seed=5).weights
    assert not all(torch.equal(one[k], different[k]) for k in one)
    with pytest.raises(NetworkError, match="expected at least 4"):
        SharedDiscriminator.first(3, seed=0)


def test_what_travels_comes_back():
    weights = SharedDiscriminator.first(CHANNELS, seed=0).weights
    sent = travelling(weights)
    assert Schema.of(sent) == discriminator_schema(CHANNELS)
    assert channels_of(sent) == CHANNELS
    found = check_discriminator(sent, CHANNELS)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], weights[k]) for k in weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.1e4])
def test_numbers_that_none_can_have_are_refused(value):
    sent = travelling(SharedDiscriminator.first(CHANNELS, seed=0).weights)
    name = sorted(sent)[0]
    sent[name].view(-1)[0] = value
    with pytest.raises(ExchangeError, match=name):
        check_discriminator(sent, CHANNELS)


def test_tensors_of_something_else_are_refused():
    sent = travelling(SharedDiscriminator.first(CHANNELS, seed=0).weights)
    with pytest.raises(ExchangeError, match="expected that of 16 channels"):
        check_discriminator(sent, 16)
    with pytest.raises(ExchangeError, match="a discriminator of"):
        check_discriminator(dict(list(sent.items())[1:]), CHANNELS)
    with pytest.raises(ExchangeError, match="no discriminator"):
        channels_of({"mean": torch.zeros(2, 3)})
    with pytest.raises(ExchangeError, match="no discriminator"):
        discriminator_of({"layers.0.weight": torch.zeros(4, 8, 3, 3, 3)})
