"""gPerXAN's norm against its formula, written out with means and variances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import tiny_study
from uharmony_model.exchange.partition import Partition
from uharmony_model.methods import METHODS
from uharmony_model.networks import build_network
from uharmony_model.perxan import PerxanNorm, with_perxan

C, EPS = 3, 1e-3


def make() -> PerxanNorm:
    generator = torch.Generator().manual_seed(0)
    layer = PerxanNorm(C, eps=EPS).double()
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        assert layer.batch.running_mean is not None
        assert layer.batch.running_var is not None
        layer.batch.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.batch.running_var.copy_(torch.tensor([0.3, 2.0, 1.5]))
    return layer


def draw() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(2, C, 4, 3, 5, generator=generator, dtype=torch.float64) + 1


def over_channels(values: Tensor) -> Tensor:
    return values.view(1, C, 1, 1, 1)


def formula(layer: PerxanNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """w_1 * IN + w_2 * BN, with the batch norm's `mean` and `var` (C,) given."""
    mu = x.mean(dim=(2, 3, 4), keepdim=True)
    sigma = (x.var(dim=(2, 3, 4), keepdim=True, unbiased=False) + EPS).sqrt()
    instance = (x - mu) / sigma * over_channels(layer.weight) + over_channels(layer.bias)
    batch = (x - over_channels(mean)) / (over_channels(var) + EPS).sqrt()
    batch = batch * over_channels(layer.batch.weight) + over_channels(layer.batch.bias)
    powers = layer.mix.exp()
    return powers[0] / powers.sum() * instance + powers[1] / powers.sum() * batch


def test_in_evaluation_it_is_the_formula_with_the_running_statistics():
    layer, x = make().eval(), draw()
    mean, var = layer.batch.running_mean, layer.batch.running_var
    assert mean is not None
    assert var is not None
    torch.testing.assert_close(layer(x), formula(layer, x, mean, var))


def test_in_training_it_is_the_formula_with_the_statistics_of_the_batch():
    layer, x = make().train(), draw()
    mean, var = x.mean(dim=(0, 2, 3, 4)), x.var(dim=(0, 2, 3, 4), unbiased=False)
    torch.testing.assert_close(layer(x), formula(layer, x, mean, var))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_move_in_training_alone(training):
    layer, x = make().train(training), draw()
    before = {k: v.clone() for k, v in layer.batch.named_buffers()}
    layer(x)
    after = dict(layer.batch.named_buffers())
    if not training:
        assert all(torch.equal(after[k], v) for k, v in before.items())
        return
    # torch's BatchNorm: a tenth of the way to the batch's mean and unbiased variance.
    mean, var = x.mean(dim=(0, 2, 3, 4)), x.var(dim=(0, 2, 3, 4), unbiased=True)
    torch.testing.assert_close(
        after["running_mean"], 0.9 * before["running_mean"] + 0.1 * mean.double()
    )
    torch.testing.assert_close(after["running_var"], 0.9 * before["running_var"] + 0.1 * var)
    assert int(after["num_batches_tracked"]) == int(before["num_batches_tracked"]) + 1


def test_both_branches_start_alike():
    layer, x = PerxanNorm(C).train(), draw().float()
    halves = 0.5 * nn.InstanceNorm3d(C)(x) + 0.5 * nn.BatchNorm3d(C)(x)
    torch.testing.assert_close(layer(x), halves)


def test_it_replaces_every_instance_norm_with_its_width_and_eps():
    network = nn.Sequential(
        nn.InstanceNorm3d(2, eps=0.1),
        nn.Sequential(nn.Conv3d(2, 4, 1), nn.InstanceNorm3d(4, affine=True)),
        nn.BatchNorm3d(4),
    )
    assert with_perxan(network) is network
    found = [m for m in network.modules() if isinstance(m, PerxanNorm)]
    assert [(m.weight.numel(), m.eps, m.batch.eps) for m in found] == [
        (2, 0.1, 0.1),
        (4, 1e-5, 1e-5),
    ]
    assert not any(isinstance(m, nn.InstanceNorm3d) for m in network.modules())
    assert type(network[2]) is nn.BatchNorm3d


def test_under_gperxan_the_batch_norms_stay_and_the_rest_is_shared():
    network = build_network(tiny_study(method="gperxan"), ("a",), seed=0)
    partition = Partition.of(network, METHODS["gperxan"].local)
    layers = {p: m for p, m in network.named_modules() if isinstance(m, PerxanNorm)}
    assert layers
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(partition.local_keys) == {f"{p}.batch.{name}" for p in layers for name in tensors}
    for path in layers:
        assert {f"{path}.{name}" for name in ("weight", "bias", "mix")} <= set(
            partition.shared_keys
        )
