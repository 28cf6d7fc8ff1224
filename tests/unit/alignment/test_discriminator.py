"""The feature discriminator, and the claim that its sites' gradients add up to the pooled one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uharmony_model.alignment.discriminator import (
    FeatureDiscriminator,
    discriminator_term,
    gradients_of,
    set_gradients,
    site_shares,
    sum_gradients,
)
from uharmony_model.errors import ExchangeError, NetworkError, QuorumError
from uharmony_model.randomness import torch_generator

CHANNELS = 8


def draw(*shape: int, where: str) -> Tensor:
    generator = torch_generator(0, "test discriminator", where)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pooled_loss(discriminator: nn.Module, data: list[tuple[Tensor, bool]]) -> Tensor:
    """The definition: every voxel's square in one list for each side, whoever it came from."""
    squares: dict[bool, list[Tensor]] = {False: [], True: []}
    for features, is_target in data:
        wanted = 1.0 if is_target else 0.0
        squares[is_target].append((discriminator(features) - wanted).pow(2).flatten())
    return torch.cat(squares[False]).mean() + torch.cat(squares[True]).mean()


def federated_step(discriminator: nn.Module, data: list[tuple[Tensor, bool]]) -> dict[str, Tensor]:
    """Each site's gradient from its own data; the sum by the shares of their voxels."""
    sent = [
        gradients_of(discriminator, discriminator_term(discriminator(features), is_target))
        for features, is_target in data
    ]
    voxels = [features[:, 0].numel() for features, _ in data]
    return sum_gradients(sent, site_shares(voxels, [is_target for _, is_target in data]))


# Sites of unequal size, so that a plain mean over sites would be another loss.
TWO = [
    (draw(2, CHANNELS, 3, 4, 3, where="a"), False),
    (1 + draw(1, CHANNELS, 4, 4, 4, where="b"), True),
]
THREE = [*TWO, (1.5 + draw(1, CHANNELS, 2, 3, 3, where="c"), True)]
THREE_SOURCES = [(0.3 + draw(3, CHANNELS, 2, 3, 3, where="d"), False), *TWO]


@pytest.mark.parametrize("data", [TWO, THREE, THREE_SOURCES], ids=["1+1", "1+2", "2+1"])
def test_summed_gradients_are_the_pooled_gradient(data: list[tuple[Tensor, bool]]):
    discriminator = FeatureDiscriminator(CHANNELS).double()
    pooled_loss(discriminator, data).backward()
    summed = federated_step(discriminator, data)
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4
        torch.testing.assert_close(summed[name], parameter.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("data", [TWO, THREE], ids=["2 sites", "3 sites"])
def test_ten_steps_of_adam_end_with_the_pooled_discriminator(data: list[tuple[Tensor, bool]]):
    pooled = FeatureDiscriminator(CHANNELS).double()
    federated = FeatureDiscriminator(CHANNELS).double()
    start = {name: p.detach().clone() for name, p in pooled.named_parameters()}
    at_pool = torch.optim.Adam(pooled.parameters(), lr=1e-3, betas=(0.9, 0.99))
    at_sites = torch.optim.Adam(federated.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for _ in range(10):
        at_pool.zero_grad()
        pooled_loss(pooled, data).backward()
        at_pool.step()
        set_gradients(federated, federated_step(federated, data))
        at_sites.step()
    others = dict(federated.named_parameters())
    for name, parameter in pooled.named_parameters():
        assert (parameter - start[name]).abs().max() > 5e-3
        torch.testing.assert_close(others[name], parameter, rtol=0, atol=1e-6)


def test_three_sites_need_their_shares():
    discriminator = FeatureDiscriminator(CHANNELS).double()
    pooled_loss(discriminator, THREE).backward()
    sent = [gradients_of(discriminator, discriminator_term(discriminator(f), t)) for f, t in THREE]
    unweighted = sum_gradients(sent)
    pooled = dict(discriminator.named_parameters())["layers.4.bias"].grad
    assert pooled is not None
    assert (unweighted["layers.4.bias"] - pooled).abs() > 1e-2


def test_a_batch_norm_would_break_the_sum():
    """The control: with statistics over the batch, a site's term depends on who else is in it."""
    normed = nn.Sequential(
        nn.Conv3d(CHANNELS, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Conv3d(4, 1, 1)
    )
    normed = normed.double()
    everything = normed(torch.cat([f[:, :, :2, :3, :3] for f, _ in THREE]))
    flags = torch.tensor([t for f, t in THREE for _ in f]).double().view(-1, 1, 1, 1, 1)
    squares = (everything - flags).pow(2)
    loss = squares[flags.flatten() == 0].mean() + squares[flags.flatten() == 1].mean()
    pooled = gradients_of(normed, loss)
    summed = federated_step(normed, [(f[:, :, :2, :3, :3], t) for f, t in THREE])
    assert (pooled["0.weight"] - summed["0.weight"]).abs().max() > 1e-4


def test_target_is_one():
    scores = torch.tensor([[[[0.5, -1.0], [2.0, 1.0]]]])
    assert discriminator_term(scores, True).item() == pytest.approx((0.25 + 4 + 1 + 0) / 4)
    assert discriminator_term(scores, False).item() == pytest.approx((0.25 + 1 + 4 + 1) / 4)
    assert discriminator_term(torch.ones(1, 1, 2, 2), True) == 0
    assert discriminator_term(torch.zeros(1, 1, 2, 2), False) == 0


def test_half_precision_scores_are_squared_in_single():
    scores = torch.full((1, 1, 4, 4), 300.0, dtype=torch.float16)  # its square is inf in half
    assert discriminator_term(scores, False).dtype == torch.float32
    assert discriminator_term(scores, False).item() == pytest.approx(90000)


@pytest.mark.parametrize("dims", [2, 3])
def test_layers_widths_and_scores(dims: int):
    discriminator = FeatureDiscriminator(16, dims)
    shapes = [tuple(p.shape) for p in discriminator.parameters() if p.ndim > 1]
    kernel = (3,) * dims
    assert shapes == [(8, 16, *kernel), (4, 8, *kernel), (1, 4, *kernel)]
    assert not list(discriminator.buffers())
    features = torch.randn(2, 16, *(4, 5, 6)[:dims], generator=torch_generator(0, "features"))
    scores = discriminator(features)
    assert scores.shape == (2, 1, *features.shape[2:])
    convolve = F.conv2d if dims == 2 else F.conv3d
    x = features
    named = dict(discriminator.named_parameters())
    for place in (0, 2, 4):
        weight, bias = named[f"layers.{place}.weight"], named[f"layers.{place}.bias"]
        x = convolve(x, weight, bias, padding=1)
        if place < 4:
            x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(scores, x)


def test_a_score_sees_three_voxels_each_way_and_no_other_sample():
    discriminator = FeatureDiscriminator(CHANNELS, 2).double()
    features = draw(2, CHANNELS, 9, 9, where="field").requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(features)[0, 0, 4, 4], features)
    seen = gradient[0].abs().sum(0) > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[1:8, 1:8] = True
    assert torch.equal(seen, expected)
    assert not gradient[1].any()


def test_first_weights_follow_from_the_seed_and_disturb_no_generator():
    before = torch.random.get_rng_state()
    first, same = FeatureDiscriminator(8, seed=3), FeatureDiscriminator(8, seed=3)
    other = FeatureDiscriminator(8, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(first.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(("channels", "dims"), [(3, 3), (8, 1), (8, 4)])
def test_what_no_discriminator_can_be_made_for(channels: int, dims: int):
    with pytest.raises(NetworkError, match="at least 4 channels"):
        FeatureDiscriminator(channels, dims)


def test_shares_are_of_a_side():
    assert site_shares([10, 30, 5], [False, False, True]) == (0.25, 0.75, 1.0)
    assert site_shares([7, 1, 3], [True, False, True]) == (0.7, 1.0, 0.3)
    flags = np.array([True, False])
    assert site_shares([2, 2], list(flags)) == (1.0, 1.0)
    with pytest.raises(QuorumError, match="2 of one side"):
        site_shares([3, 4], [True, True])
    with pytest.raises(QuorumError, match="no site"):
        site_shares([], [])
    with pytest.raises(ExchangeError, match="above 0"):
        site_shares([3, 0], [True, False])
    with pytest.raises(ExchangeError, match="a side for each"):
        site_shares([3, 4], [True])


def test_the_sum_is_weighted_and_in_float64():
    sites = [{"w": torch.tensor([1e8, 2.0])}, {"w": torch.tensor([1.0, 4.0])}]
    sites.append({"w": torch.tensor([-1e8, 8.0])})
    assert sum_gradients(sites)["w"].tolist() == [1.0, 14.0]  # float32 would lose the 1
    assert sum_gradients(sites)["w"].dtype == torch.float32
    assert sum_gradients(sites, (0.5, 0.25, 0.5))["w"].tolist() == [0.25, 6.0]
    assert sites[0]["w"].tolist() == [1e8, 2.0]


def test_gradients_that_cannot_be_summed():
    good = {"w": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ExchangeError, match="at least one"):
        sum_gradients([])
    with pytest.raises(ExchangeError, match="a share for each"):
        sum_gradients([good, good], (1.0,))
    with pytest.raises(ExchangeError, match=r"gradient 1: missing \['b'\], extra \['c'\]"):
        sum_gradients([good, {"w": torch.ones(2), "c": torch.ones(1)}])
    with pytest.raises(ExchangeError, match=r"w is \(1,\), expected \(2,\)"):
        sum_gradients([good, {"w": torch.ones(1), "b": torch.ones(1)}])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ExchangeError, match="gradient 0: b is not finite"):
            sum_gradients([{"w": torch.ones(2), "b": torch.tensor([bad])}])


def test_set_gradients_refuses_what_is_no_gradient_of_this_network():
    discriminator = FeatureDiscriminator(4, 2)
    sizes = {name: torch.ones_like(p) for name, p in discriminator.named_parameters()}
    set_gradients(discriminator, sizes)
    assert all(p.grad is not None and p.grad.eq(1).all() for p in discriminator.parameters())
    with pytest.raises(ExchangeError, match="missing"):
        set_gradients(discriminator, {})
    with pytest.raises(ExchangeError, match="expected"):
        set_gradients(discriminator, {**sizes, "layers.0.bias": torch.ones(1)})
