"""Features of the deepest level, seen in passing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import tiny_study
from uharmony_model.errors import NetworkError
from uharmony_model.features import deepest_features
from uharmony_model.networks import build_network

NETWORKS = {
    "unet": [4, 8],
    "dynunet": [4, 8, 16],
    "segresnet": [8, 16],
}


def image() -> Tensor:
    return torch.linspace(-3, 3, 2 * 16**3).sin().reshape(2, 1, 16, 16, 16)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_the_deepest_level_is_the_coarsest_and_widest_one(name, method):
    study = tiny_study(method=method, network={"name": name, "features": NETWORKS[name]})
    network = build_network(study, ("x",), seed=0)
    plain = network(image(), torch.tensor([0, 0]))
    shapes: list[tuple[int, ...]] = []
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
    with deepest_features(network) as seen:
        logits = network(image(), torch.tensor([0, 0]))
    assert torch.equal(logits, plain)
    edge = 16 >> (len(NETWORKS[name]) - 1)
    assert seen.features.shape == (2, NETWORKS[name][-1], edge, edge, edge)
    assert min(shape[2] for shape in shapes) == edge
    assert max(shape[1] for shape in shapes if shape[2] == edge) == NETWORKS[name][-1]


def test_a_gradient_reaches_the_encoder_and_not_the_head():
    network = build_network(tiny_study(method="fedavg"), ("x",), seed=0)
    with deepest_features(network) as seen:
        network(image())
    seen.features.square().mean().backward()
    first, last = next(network.parameters()), list(network.parameters())[-1]
    assert first.grad is not None
    assert float(first.grad.abs().max()) > 0
    assert last.grad is None


def test_the_last_pass_counts_and_passes_outside_do_not():
    network = build_network(tiny_study(method="fedavg"), ("x",), seed=0).eval()
    with deepest_features(network) as seen:
        network(image())
        first = seen.features
        network(image().flip(0))
        second = seen.features
    network(image())
    assert seen.features is second
    torch.testing.assert_close(second.flip(0), first)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_hook_goes_with_an_error_too():
    network = build_network(tiny_study(method="fedavg"), ("x",), seed=0)
    with pytest.raises(RuntimeError), deepest_features(network):
        raise RuntimeError
    assert not any(module._forward_hooks for module in network.modules())


def test_without_a_pass_or_a_deepest_level_it_says_so():
    network = build_network(tiny_study(method="fedavg"), ("x",), seed=0)
    with deepest_features(network) as seen, pytest.raises(NetworkError, match="pass an image"):
        _ = seen.features
    other = build_network(tiny_study(method="u2net"), ("x",), seed=0)
    for silent in (other, nn.Conv3d(1, 1, 1)):
        with pytest.raises(NetworkError, match="where its deepest level is"):
            deepest_features(silent).__enter__()
