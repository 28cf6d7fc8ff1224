"""What a site predicts with where it does not draw every class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.bench import bench_of
from tests.support.tiny import tiny_study, write_folder
from uharmony_client.predictor import predictor, undrawn_classes
from uharmony_client.site import Site
from uharmony_client.site_config import SiteConfig
from uharmony_client.site_models import keep_federated_model, keep_personal_model, site_entry
from uharmony_client.site_round import Bench, finale_metrics, measure, round_update
from uharmony_client.workbench import carried_after
from uharmony_model.bundle import load_bundle

EVERY = ("blob", "halo")
X = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "volumes", {"alpha": 4}, 8)


@pytest.fixture
def after_a_round(data: Path, tmp_path: Path):
    """A site after its only round, and what it works with."""

    def open_for(
        method: str, annotated: tuple[str, ...] | None = None, **finale
    ) -> tuple[Site, Bench]:
        study = tiny_study(
            method=method,
            task={"classes": {"blob": 1, "halo": 2}},
            training={
                "rounds": 1,
                "local_steps": 3,
                "batch_size": 1,
                "patch": [8, 8, 8],
                "learning_rate": 0.1,
            },
            evaluation={"validation": 0.25, "test": 0.25, "bootstrap": 1, "metrics": ["dice"]},
            finale=finale,
        )
        config = SiteConfig(
            name="alpha", cases=data, store=tmp_path / f"{method}-store", annotated=annotated
        )
        site = Site.open(config, study)
        bench = bench_of(site)
        round_update(site, bench, 1)
        return site, bench

    return open_for


def by_formula(own: Tensor, shared: Tensor) -> Tensor:
    """Probabilities with `halo` undrawn: channels background, blob, halo."""
    p, q = own.softmax(1), shared.softmax(1)
    rest = 1 - p[:, 1:2]
    share = q[:, [0, 2]] / (q[:, [0, 2]].sum(1, keepdim=True))
    return torch.cat((rest * share[:, :1], p[:, 1:2], rest * share[:, 1:]), dim=1)


@pytest.mark.parametrize(
    ("method", "annotated", "found"),
    [
        ("uharmony", ("blob",), ("halo",)),
        ("uharmony", None, ()),
        ("uharmony", EVERY, ()),
        ("fedavg", ("blob",), ()),  # nothing of its own that could have forgotten it
        ("fedavg-bn", ("blob",), ()),  # the counter of a norm has not
        ("ditto", ("blob",), ("halo",)),
        ("fedbn-in", ("blob",), ()),  # what is shared makes no model
        ("local", ("blob",), ()),
    ],
)
def test_where_the_shared_model_is_asked(after_a_round, method, annotated, found):
    site, bench = after_a_round(method, annotated)
    entry, _ = site_entry(site, carried_after(site, 1))
    assert undrawn_classes(site, entry) == found
    network = predictor(site, bench.network, entry)
    assert (network is bench.network) is not bool(found)


def test_the_model_that_stays_at_the_site_divides_the_rest_as_the_shared_one(after_a_round):
    site, bench = after_a_round("uharmony", ("blob",))
    folder = keep_federated_model(site, bench.shared, 1)
    model, plain = load_bundle(folder, "alpha"), load_bundle(folder, None)
    assert model.undrawn == ("halo",)
    assert plain.undrawn == ()
    domain = torch.tensor([0])
    with torch.no_grad():
        found = model.predictor.eval()(X, domain).softmax(1)
        own, shared = model.network(X, domain), plain.network(X)
    assert not torch.allclose(own.softmax(1), found, atol=1e-3)  # or nothing would be shown
    assert torch.allclose(found, by_formula(own, shared), atol=1e-6)


def test_a_whole_model_of_its_own_has_the_shared_one_beside_it(after_a_round):
    site, bench = after_a_round("fedavg", ("blob",), steps=2, candidates=["whole"])
    finale_metrics(site, bench)
    folder = keep_personal_model(site, bench.shared)
    model, plain = load_bundle(folder, "alpha"), load_bundle(folder, None)
    assert model.undrawn == ("halo",)
    with torch.no_grad():
        found, own, shared = (n.eval()(X) for n in (model.predictor, model.network, plain.network))
    assert torch.allclose(found.softmax(1), by_formula(own, shared), atol=1e-6)


@pytest.mark.parametrize("annotated", [None, ("blob",)])
def test_rounds_are_measured_with_what_is_served(after_a_round, monkeypatch, annotated):
    site, bench = after_a_round("uharmony", annotated)
    seen: list[nn.Module] = []

    def asked(network: nn.Module, *given: object, **named: object) -> list[object]:
        seen.append(network)
        return []

    monkeypatch.setattr("uharmony_client.site_round.evaluate_split", asked)
    measure(site, bench, 1, ("test",), slow=False)
    folder = keep_federated_model(site, bench.shared, 1)
    served = load_bundle(folder, "alpha").predictor.eval()
    with torch.no_grad():
        found = [network.eval()(X, torch.tensor([0])) for network in (*seen, served)]
    assert len(found) == 2
    assert torch.equal(*found)
