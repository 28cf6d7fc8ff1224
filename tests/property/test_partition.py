"""No local tensor ever enters a payload, and nothing is lost between split and merge."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.support import wire
from uharmony_model.exchange.partition import Partition, part_of
from uharmony_model.exchange.payload import Kind, decode, encode
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.harmonize import harmonize
from uharmony_model.methods import METHODS, Part
from uharmony_model.network_settings import Harmonization
from uharmony_model.segmentation_network import SegmentationNetwork

# Prefixes of one another, and names of the very things that must stay.
ADVERSARIAL = (
    "norm1",
    "norm10",
    "norm1_gain",
    "conv",
    "backbone",
    "shared",
    "gain",
    "polynomial",
    "weight_residual",
)
DOMAINS = st.lists(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True),
    min_size=1,
    max_size=3,
    unique=True,
)
PARTS = st.frozensets(st.sampled_from(list(Part)))
LOCALS = st.sampled_from([method.local for method in METHODS.values()]) | PARTS
KINDS = st.sampled_from(["conv", "instance", "batch", "statistics", "group", "act"])
LAYERS = st.dictionaries(st.sampled_from(ADVERSARIAL), KINDS, min_size=2, max_size=5)

BUILD = {
    "conv": lambda: nn.Conv3d(2, 2, 1),
    "instance": lambda: nn.InstanceNorm3d(2, affine=True),
    "batch": lambda: nn.BatchNorm3d(2),
    "statistics": lambda: nn.InstanceNorm3d(2, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(1, 2),
    "act": nn.PReLU,
}
NORMS = {"instance", "batch", "statistics", "group"}


def built(layers: dict[str, str], domains: list[str], *, harmonised: bool) -> nn.Module:
    network = nn.Sequential()
    for name, kind in layers.items():
        network.add_module(name, BUILD[kind]())
    convolutions = [name for name, kind in layers.items() if kind == "conv"]
    if harmonised and NORMS & set(layers.values()):
        return harmonize(
            network,
            domains=domains,
            settings=Harmonization(),
            stem=convolutions[:1],
            head=convolutions[1:2],
        )
    return SegmentationNetwork(network, domains=domains)


def filled(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else torch.randint(0, 2**40, tensor.shape, generator=generator)
        for key, tensor in model.state_dict().items()
    }


def stays(model: nn.Module, key: str, local: frozenset[Part]) -> bool:
    """The rule said again: by the type of the module, from the methods' own table."""
    path, _, name = key.rpartition(".")
    kind = type(model.get_submodule(path)).__name__
    if kind == "HarmonicNorm":
        return (Part.POLYNOMIAL if name == "polynomial" else Part.PHI) in local
    if kind == "ResidualConv":
        return model.get_submodule(path).part in local
    if kind in {"Conv3d", "PReLU"}:
        return Part.BACKBONE in local
    if name == "num_batches_tracked":
        return True
    return (Part.NORM_STATISTICS if name.startswith("running") else Part.NORM_AFFINE) in local


@given(LAYERS, DOMAINS, LOCALS, st.booleans(), st.integers(0, 2**32))
def test_local_tensors_stay_and_merge_inverts_split(layers, domains, local, harmonised, seed):
    model = built(layers, domains, harmonised=harmonised)
    partition = Partition.of(model, local)
    state = filled(model, seed)
    shared, kept = partition.split(state)

    expected = {key for key in state if stays(model, key, local)}
    assert set(partition.local_keys) == expected
    assert set(partition.shared_keys) == set(state) - expected
    assert {name.split("@")[0] for name in kept} == expected
    assert {n.split("@")[1] for n in kept if "@" in n} <= set(domains)

    flat = flatten(shared, partition.shared_schema)
    payload = encode(
        kind=Kind.UPDATE,
        study=wire.STUDY,
        round=1,
        site="site-a",
        schema=partition.shared_schema,
        flat=flat,
    )
    received = unflatten(
        decode(payload, kind=Kind.UPDATE, schema=partition.shared_schema)[1],
        partition.shared_schema,
    )
    assert set(received) == set(state) - expected
    for tensor in kept.values():  # nor its numbers, under whatever name
        if tensor.is_floating_point() and tensor.numel():
            assert tensor.contiguous().numpy().tobytes() not in payload

    merged = partition.merge(received, kept)
    assert list(merged) == list(state)
    for key, tensor in state.items():
        assert merged[key].dtype == tensor.dtype
        assert torch.equal(merged[key], tensor)
    model.load_state_dict(merged, strict=True)


@given(LAYERS, DOMAINS, DOMAINS)
def test_sites_with_other_domains_share_the_same_schema(layers, one, two):
    local = METHODS["uharmony"].local
    first, second = (
        Partition.of(built(layers, list(domains), harmonised=True), local).shared_schema
        for domains in (one, two)
    )
    assert first == second


@given(LAYERS)
def test_renaming_a_module_never_changes_its_part(layers):
    renamed = dict(zip(reversed(ADVERSARIAL), layers.values(), strict=False))
    parts = [
        list(part_of(built(names, ["d"], harmonised=False)).values()) for names in (layers, renamed)
    ]
    assert parts[0] == parts[1]
