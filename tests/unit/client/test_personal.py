"""What a site carries, by kind; and a whole model of its own by name, whatever its domains."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import tiny_study
from uharmony_client.personal import (
    ALONE,
    as_personal,
    by_name,
    from_names,
    local_parameters,
    model_state,
    own_model,
    personal_part,
)
from uharmony_model.errors import PartitionError
from uharmony_model.exchange.partition import Partition
from uharmony_model.methods import METHODS
from uharmony_model.networks import build_network

HERE = [name for name, method in METHODS.items() if method.backbone is None]
ONE, TWO, THREE = torch.ones(1), torch.ones(2), torch.ones(3)
CARRIED = {
    "network.gain@a": ONE,
    "optimizer/exp_avg/network.weight": TWO,
    "personal/network.weight": THREE,
    "personal/optimizer/step/network.weight": ONE,
}


def test_what_is_carried_falls_into_its_kinds():
    assert set(local_parameters(CARRIED)) == {"network.gain@a"}
    own = personal_part(CARRIED)
    assert set(own) == {"network.weight", "optimizer/step/network.weight"}
    assert own["network.weight"] is THREE
    assert set(local_parameters(own)) == {"network.weight"}
    assert set(as_personal(own)) == {k for k in CARRIED if k.startswith("personal/")}
    assert personal_part({"network.gain@a": ONE}) == {}


def random_state(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v + seed
        for key, v in network.state_dict().items()
    }


@pytest.mark.parametrize("domains", [("a",), ("b", "a")])
@pytest.mark.parametrize("method", HERE)
def test_a_whole_model_is_kept_by_name_and_comes_back(method, domains):
    network = build_network(tiny_study(method=method), domains, seed=0)
    state = random_state(network, 3)
    kept = by_name(network, state)
    found = from_names(network, kept)
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)
    # In another order of its domains the same site has the same residuals.
    turned = build_network(tiny_study(method=method), domains[::-1], seed=0)
    image = torch.linspace(-1, 1, 16**3).reshape(1, 1, 16, 16, 16).sin()
    network.load_state_dict(state)
    turned.load_state_dict(from_names(turned, kept))
    logits = [
        model.eval()(image, torch.tensor([names.index("a")]))
        for model, names in ((network, domains), (turned, domains[::-1]))
    ]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("method", ["fedavg", "uharmony", "fedbn", "local"])
def test_a_site_measures_its_own_model_where_it_has_one(method):
    study = tiny_study(method=method)
    network = build_network(study, ("a", "b"), seed=0)
    partition = Partition.of(network, study.plan.local)
    shared, local = partition.split(random_state(network, 1))
    carried = {**local, "optimizer/step/x": ONE}
    merged = model_state(network, partition, shared, carried)
    assert all(torch.equal(v, merged[k]) for k, v in random_state(network, 1).items())

    own = random_state(network, 2)
    carried |= as_personal({**by_name(network, own), "optimizer/step/x": ONE})
    found = model_state(network, partition, shared, carried)
    assert all(torch.equal(found[key], own[key]) for key in own)
    with pytest.raises(PartitionError):
        model_state(network, partition, {}, {"personal/network.unknown": ONE})


def test_a_whole_model_is_of_the_method_or_of_the_site_alone_and_has_no_moments():
    part = {k: v for k, v in CARRIED.items() if not k.startswith("personal/")}
    assert own_model(part, "ditto") is None
    assert own_model(CARRIED, "ditto") == ({"network.weight": THREE}, "ditto")
    alone = as_personal({"network.weight": TWO}, ALONE)
    assert own_model({**part, **alone}, "uharmony") == ({"network.weight": TWO}, "local")
    assert set(local_parameters({**part, **alone})) == {"network.gain@a"}
