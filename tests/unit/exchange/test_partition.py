from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import nn

from uharmony_model.errors import PartitionError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import Schema
from uharmony_model.harmonize import HarmonizedNetwork, harmonize
from uharmony_model.methods import EVERYTHING, METHODS, RESIDUALS, Part
from uharmony_model.network_settings import RESIDUAL_NAMES, Harmonization
from uharmony_model.segmentation_network import SegmentationNetwork


def harmonised(*domains: str) -> HarmonizedNetwork:
    network = nn.Sequential(
        nn.Conv3d(1, 2, 1), nn.InstanceNorm3d(2, affine=True), nn.ReLU(), nn.Conv3d(2, 2, 1)
    )
    settings = Harmonization(residuals=RESIDUAL_NAMES)
    return harmonize(network, domains=domains, settings=settings, stem=("0",), head=("3",))


SHARED = {
    "network.0.shared.weight",
    "network.0.shared.bias",
    "network.1.polynomial",
    "network.3.shared.weight",
    "network.3.shared.bias",
}
LOCAL = {
    "network.0.weight_residual",
    "network.1.gain",
    "network.1.shift",
    "network.1.rho",
    "network.1.lam",
    "network.3.weight_residual",
    "network.3.bias_residual",
}


def test_residuals_stay_and_are_named_by_domain():
    model = harmonised("ct", "mr")
    partition = Partition.of(model, RESIDUALS)
    assert partition.shared_keys == tuple(sorted(SHARED))
    assert partition.local_keys == tuple(sorted(LOCAL))
    assert partition.local_names == tuple(
        sorted(f"{key}@{domain}" for key in LOCAL for domain in ("ct", "mr"))
    )
    state = model.state_dict()
    state["network.1.gain"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    shared, local = partition.split(state)
    assert set(shared) == SHARED
    assert local["network.1.gain@ct"].tolist() == [1, 2]
    assert local["network.1.gain@mr"].tolist() == [3, 4]
    assert local["network.0.weight_residual@mr"].shape == (2, 1, 1, 1, 1)


def test_domains_are_loaded_by_name_and_not_by_position():
    model = harmonised("ct", "mr")
    state = model.state_dict()
    state["network.1.gain"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    shared, local = Partition.of(model, RESIDUALS).split(state)
    swapped = Partition.of(harmonised("mr", "ct"), RESIDUALS).merge(shared, local)
    assert swapped["network.1.gain"].tolist() == [[3, 4], [1, 2]]


def test_the_shared_schema_does_not_depend_on_the_domains():
    schemas = [
        Partition.of(harmonised(*domains), RESIDUALS).shared_schema
        for domains in (("a",), ("b",), ("a", "b", "c"))
    ]
    assert schemas[0] == schemas[1] == schemas[2]
    assert {spec.name for spec in schemas[0].tensors} == SHARED


def test_stacked_tensors_that_are_shared_travel_whole():
    model = harmonised("ct", "mr")
    partition = Partition.of(model, frozenset({Part.STEM_RESIDUAL, Part.HEAD_RESIDUAL}))
    shared, local = partition.split(model.state_dict())
    assert shared["network.1.gain"].shape == (2, 2)
    assert all("@" in name and "residual" in name for name in local)


def test_when_everything_is_local_nothing_is_shared():
    model = harmonised("ct", "mr")
    partition = Partition.of(model, EVERYTHING)
    shared, local = partition.split(model.state_dict())
    assert shared == {}
    assert partition.shared_schema == Schema(tensors=())
    assert set(local) == SHARED | {f"{key}@{d}" for key in LOCAL for d in ("ct", "mr")}


def test_when_nothing_is_local_everything_is_shared():
    model = harmonised("ct")
    partition = Partition.of(model, frozenset())
    assert set(partition.shared_keys) == SHARED | LOCAL
    assert partition.local_names == ()


@pytest.mark.parametrize("method", METHODS)
def test_counters_of_batches_always_stay(method):
    model = SegmentationNetwork(nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)))
    partition = Partition.of(model, METHODS[method].local)
    assert "network.1.num_batches_tracked" in partition.local_keys
    statistics_stay = Part.NORM_STATISTICS in METHODS[method].local
    assert ("network.1.running_mean" in partition.local_keys) == statistics_stay


def test_constants_go_nowhere_and_come_back():
    network = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1))
    partition = Partition.of(network, frozenset())
    state = network.state_dict()
    shared, local = partition.split(state)
    constants = {key for key in state if key.endswith("relative_position_index")}
    assert constants
    assert not constants & {*shared, *local}
    merged = partition.merge(shared, local)
    assert list(merged) == list(state)
    assert all(torch.equal(merged[key], state[key]) for key in state)


def test_what_is_merged_loads_strictly_and_split_gives_views():
    model = harmonised("ct", "mr")
    partition = Partition.of(model, RESIDUALS)
    shared, local = partition.split(model.state_dict())
    with torch.no_grad():
        model.get_parameter("network.1.gain").fill_(5)
    assert local["network.1.gain@ct"].tolist() == [5, 5]
    model.load_state_dict(partition.merge(shared, local), strict=True)


def drop(state, key):
    return {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda shared, local: (drop(shared, "network.1.polynomial"), local),
            "shared: 1 tensors missing",
        ),
        (
            lambda shared, local: (shared, drop(local, "network.1.gain@mr")),
            "local: 1 tensors missing",
        ),
        (lambda shared, local: (shared | {"x": torch.zeros(1)}, local), "1 too many"),
        (
            lambda shared, local: (shared, local | {"network.1.gain@pet": torch.zeros(2)}),
            "1 too many",
        ),
        (
            lambda shared, local: (shared, local | {"network.1.gain": torch.zeros(2, 2)}),
            "1 too many",
        ),
        (
            lambda shared, local: (shared, local | {"network.1.gain@mr": torch.zeros(1)}),
            r"is \(1,\)",
        ),
        (
            lambda shared, local: (shared, local | {"network.1.gain@mr": torch.zeros(1, 2)}),
            r"is \(1, 2\)",
        ),
        (
            lambda shared, local: (
                shared | {"network.1.polynomial": torch.zeros(2, 2).double()},
                local,
            ),
            "float64",
        ),
        (lambda shared, local: (local, shared), "missing"),
    ],
)
def test_merge_is_strict(change, message):
    model = harmonised("ct", "mr")
    partition = Partition.of(model, RESIDUALS)
    with pytest.raises(PartitionError, match=message):
        partition.merge(*change(*partition.split(model.state_dict())))


def test_split_is_strict():
    partition = Partition.of(harmonised("ct", "mr"), RESIDUALS)
    with pytest.raises(PartitionError, match=r"expected \(2, "):
        partition.split(harmonised("ct").state_dict())
    with pytest.raises(PartitionError, match="too many"):
        partition.split(harmonised("ct", "mr").state_dict() | {"extra": torch.zeros(1)})


def test_an_at_sign_in_a_key_would_be_ambiguous():
    network = nn.Sequential()
    network.add_module("gain@ct", nn.Conv3d(1, 1, 1))
    with pytest.raises(PartitionError, match="rename the module"):
        Partition.of(network, RESIDUALS)


@pytest.mark.parametrize(
    "domains", [("a@b",), ("",), ("a b",), ("a\n",), ("../a",), ("a" * 65,), ("a", "a"), (1,)]
)
def test_domain_names_are_checked(domains):
    network = SegmentationNetwork(nn.Conv3d(1, 1, 1))
    network.domains = domains
    with pytest.raises(PartitionError):
        Partition.of(network, RESIDUALS)


def test_the_stack_must_fit_the_domains():
    model = harmonised("ct", "mr")
    model.domains = ("ct",)
    with pytest.raises(PartitionError, match="expected 1 domains in front"):
        Partition.of(model, RESIDUALS)
