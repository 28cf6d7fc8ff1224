"""The choice of a domain for a volume of no known site, against formulas and plain networks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.support import published as support
from uharmony_client.domain_choice import SHARED, AbstainedError, DomainChooser
from uharmony_model.bundle import load_bundle
from uharmony_model.descriptor import describe
from uharmony_model.errors import PartitionError, StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.networks import build_network
from uharmony_model.publication import Frame, Prototypes, Publication
from uharmony_model.test_time import MixtureSearch

STRIPES = 3


@pytest.fixture
def chooser(tmp_path, study):
    def make(**choices):
        loaded = load_bundle(support.write_model(tmp_path / "model", study), None)
        return DomainChooser.of(loaded, support.publication(study, **choices))

    return make


def image(look):
    return support.normalised(support.scan(look))


def expected_gate(study, look):
    """(weights, distances) from the descriptors of the looks alone, by the formula."""
    network = support.plain_network(study)
    rows = np.array([describe(network, image(k)) for k in (*support.LOOKS.values(), look)])
    rows /= np.sqrt(rows.shape[1])
    known, row = rows[:-1], rows[-1]
    squared = ((known - row) ** 2).sum(1)
    apart = [((known[i] - known[j]) ** 2).sum() for i, j in ((0, 1), (0, 2), (1, 2))]
    weights = np.exp(-squared / (np.median(apart) / 4))
    return weights / weights.sum(), np.sqrt(squared)


@pytest.mark.parametrize("look", [0, 1, 2, STRIPES])
def test_the_gate_weighs_the_published_experts(chooser, study, look):
    made = chooser()
    assert made.notice is None
    chosen = made.choose(image(look))
    weights, distances = expected_gate(study, look)
    assert chosen.gate.domains == support.NAMES
    np.testing.assert_allclose(chosen.gate.weights, weights, atol=1e-9)
    np.testing.assert_allclose(chosen.gate.distances, distances, atol=1e-6)
    assert made.model.domains == support.NAMES
    np.testing.assert_allclose(chosen.weights.numpy(), weights, atol=1e-6)
    assert chosen.facts["mixture"] == pytest.approx(dict(zip(support.NAMES, weights, strict=True)))
    assert chosen.facts["gate"] == chosen.facts["mixture"]
    assert (chosen.adaptation, chosen.facts["test_time"]) == ("gate", None)
    if look != STRIPES:
        assert chosen.facts["nearest"] == support.NAMES[look]
        assert chosen.facts["distance"] == pytest.approx(0, abs=1e-6)


def test_the_mixture_is_the_network_of_the_mixed_residuals(chooser, study):
    made = chooser()
    chosen = made.choose(image(STRIPES))
    shared, local = support.tensors(study)
    network = build_network(study, ("x",), seed=3)
    partition = Partition.of(network, study.plan.local)
    by_expert = {
        f"{site}.{domain}": {k: t for k, t in local[site].items() if k.endswith(f"@{domain}")}
        for site, domains in support.SITES.items()
        for domain in domains
    }
    mixed = {
        f"{key}@x": sum(
            w * by_expert[name][f"{key}@{name.partition('.')[2]}"]
            for name, w in chosen.mixture.items()
        )
        for key in (name.partition("@")[0] for name in by_expert["south.s"])
    }
    network.load_state_dict(partition.merge(shared, mixed))
    with torch.no_grad():
        expected = network.eval()(image(STRIPES)[None], torch.tensor([0]))
        found = made.model.network(image(STRIPES)[None], chosen.weights[None])
        plain = network(image(STRIPES)[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def test_prototypes_without_an_expert_give_their_weight_to_the_shared_network(chooser, study):
    made = chooser(experts=("south",))
    assert made.model.domains == ("south.s", SHARED)
    chosen = made.choose(image(STRIPES))
    weights, _ = expected_gate(study, STRIPES)
    assert chosen.gate.domains == support.NAMES
    np.testing.assert_allclose(chosen.weights, [weights[2], weights[:2].sum()], atol=1e-6)
    shared = made.model.network(image(0)[None], torch.tensor([[0.0, 1.0]]))
    plain = support.plain_network(study)(image(0)[None])
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)


def test_without_a_publication_residuals_are_zero_and_it_says_so(tmp_path, study):
    loaded = load_bundle(support.write_model(tmp_path / "model", study), None)
    for published in (None, dataclasses.replace(support.publication(study), prototypes=None)):
        made = DomainChooser.of(loaded, published)
        assert made.notice is not None
        assert "all residuals are zero" in made.notice
        chosen = made.choose(image(0), search=MixtureSearch())
        assert chosen.weights is None
        assert not chosen.abstained
        assert chosen.facts["adaptation"] == "none"
        assert {chosen.facts[name] for name in ("gate", "nearest", "limit", "false_rate")} == {None}


def test_prototypes_alone_can_still_abstain(chooser):
    made = chooser(experts=(), limit=0.5)
    assert "no expert was published" in made.notice
    chosen = made.choose(image(STRIPES))
    assert (chosen.weights, chosen.adaptation, chosen.abstained) == (None, "none", True)
    assert not made.choose(image(1)).abstained


@pytest.mark.parametrize(("factor", "abstained"), [(1.001, False), (0.999, True)])
def test_it_abstains_beyond_the_limit(chooser, study, factor, abstained):
    nearest = expected_gate(study, STRIPES)[1].min()
    chosen = chooser(limit=factor * nearest).choose(image(STRIPES))
    assert chosen.abstained is abstained
    facts = chosen.facts
    assert facts["abstained"] is abstained
    assert facts["limit"] == factor * nearest
    assert (facts["margin"], facts["false_rate"]) == (0.1, 0.25)


@pytest.mark.parametrize(("factor", "familiar"), [(1.001, True), (0.999, False)])
@pytest.mark.parametrize("search", [None, MixtureSearch(steps=1)])
def test_an_unfamiliar_volume_gets_no_expert(chooser, study, factor, familiar, search):
    nearest = expected_gate(study, STRIPES)[1].min()
    made = chooser(limit=2 * nearest, familiar=factor * nearest)
    chosen = made.choose(image(STRIPES), search=search)
    assert chosen.facts["familiar"] is familiar
    assert not chosen.abstained
    assert (chosen.weights is not None) is familiar
    assert (chosen.adaptation == "none") is not familiar
    assert made.choose(image(1)).familiar  # it lies on a prototype


def test_without_a_limit_it_says_that_it_never_abstains(chooser):
    made = chooser(limit=None)
    assert "never abstains" in made.notice
    chosen = made.choose(image(STRIPES))
    assert (chosen.abstained, chosen.facts["limit"]) == (False, None)
    assert chosen.facts["familiar"] is None
    assert chosen.weights is not None


@pytest.mark.parametrize(("kept", "adaptation"), [(0.0, "test-time"), (1.0, "gate")])
def test_the_search_is_reported_as_taken_or_not(chooser, kept, adaptation):
    made = chooser()
    plain = made.choose(image(1))
    # With kept_volume 1 not one voxel of a class may be lost; with 0 all may.
    settings = MixtureSearch(steps=20, rate=0.5, kept_volume=kept, consistency=0)
    chosen = made.choose(image(1), search=settings, volume="v")
    assert chosen.facts["gate"] == plain.facts["gate"]
    assert chosen.search.entropy[1] < chosen.search.entropy[0]
    assert chosen.adaptation == adaptation
    assert torch.equal(chosen.weights, plain.weights) == (adaptation == "gate")
    verdict = "taken" if adaptation == "test-time" else "foreground lost"
    assert chosen.facts["test_time"]["verdict"] == verdict
    again = made.choose(image(1), search=settings, volume="v")
    assert torch.equal(again.weights, chosen.weights)


def test_a_publication_of_another_model_is_refused(tmp_path, study):
    loaded = load_bundle(support.write_model(tmp_path / "model", study), None)
    other = support.publication(study)
    assert other.prototypes is not None
    frame = Frame(dimension=10, seed=0, coordinates=8)
    moved = Prototypes(frame=frame, prototypes=other.prototypes.prototypes)
    made = DomainChooser.of(loaded, Publication(other.experts, moved))
    with pytest.raises(StoreError, match="of 10 numbers, this network gives 8"):
        made.choose(image(0))
    wider = study.model_copy(
        update={"network": study.network.model_copy(update={"features": (6, 8)})}
    )
    with pytest.raises(PartitionError):
        DomainChooser.of(loaded, Publication(support.publication(wider).experts, other.prototypes))


def test_abstaining_has_a_code_of_its_own():
    assert AbstainedError.exit_code == 9
