"""The updates of one round: the weighted mean, what is kept of it, and the quorum."""

from __future__ import annotations

import pytest
import torch

from tests.support.fake_sites import BASE, study_of
from uharmony_model.errors import QuorumError
from uharmony_server.admission import Admitted, Refusal, RefusalReason
from uharmony_server.aggregate import WeightedSum
from uharmony_server.round_sum import RoundSum

CASES = {"a": 1, "b": 5, "c": 2}  # one more than is held at once
DELTAS = {name: torch.arange(5.0) * (index - 1) for index, name in enumerate(CASES)}


def update(site, **changes):
    content = {"cases": CASES[site], "flat": DELTAS[site], "norm": 2.0, "bytes": 7, **changes}
    return Admitted(site=site, **content)


def summed(*, by_cases=True, **federation):
    total = RoundSum(study_of(**federation), 2, 5, by_cases=by_cases)
    for site in CASES:
        assert total.take(site, update(site)) is None
    return total


@pytest.mark.parametrize("by_cases", [True, False])
def test_the_mean_is_weighed_by_cases_or_equally(by_cases):
    total = summed(by_cases=by_cases)
    weights = {name: cases if by_cases else 1 for name, cases in CASES.items()}
    mean = sum(weights[name] * DELTAS[name].double() for name in CASES) / sum(weights.values())
    assert torch.allclose(total.apply(BASE).double(), BASE.double() + mean, atol=1e-6)
    assert (total.cases, total.bytes) == (CASES, 21)
    assert total.norms == dict.fromkeys(CASES, 2.0)


def test_who_hides_the_cases_unannounced_is_not_in_the_sum():
    total = summed()
    refused = total.take("d", update("a", cases=None))
    assert isinstance(refused, Refusal)
    assert (refused.site, refused.round, refused.reason) == ("d", 2, RefusalReason.BAD_CASE_COUNT)
    assert total.unsaid == {"d"}
    assert set(total.norms) == set(CASES)


def test_a_hidden_number_counts_as_one_case_where_all_weigh_the_same():
    total = summed(by_cases=False)
    assert total.take("d", update("a", cases=None)) is None
    assert total.cases["d"] == 1
    assert total.unsaid == set()


def test_the_rounds_that_updates_were_trained_from_are_kept():
    total = summed()
    total.take("d", update("a", started_from=1))
    assert total.started_from == {(1, "d")}  # 0 says that there was none


@pytest.mark.parametrize(
    ("federation", "enough"),
    [
        ({"min_sites": 3, "min_cases": 8}, True),
        ({"min_sites": 4}, False),
        ({"min_cases": 9}, False),
    ],
)
def test_the_quorum_counts_sites_and_cases(federation, enough):
    total = summed(**federation)
    if enough:
        total.require_quorum(())
        return
    earlier = Refusal(site="e", round=1, reason=RefusalReason.SITE_ERROR, detail="away")
    now = earlier.model_copy(update={"site": "d", "round": 2})
    with pytest.raises(QuorumError, match=r"3 sites with 8 cases.*\(d: site_error\)"):
        total.require_quorum((earlier, now))


def test_nothing_is_no_quorum():
    total = RoundSum(study_of(), 1, 5, by_cases=True)
    with pytest.raises(QuorumError, match="no answers"):
        total.require_quorum(())


# Sites, their cases, and what taught them: None where labels did.
KINDS: dict[str, tuple[dict[str, int], dict[str, float | None]]] = {
    "fewer cases without labels": ({"a": 6, "b": 2}, {"a": None, "b": 0.5}),
    "more without": ({"a": 2, "b": 5, "c": 3}, {"a": None, "b": 0.5, "c": 1.0}),
    "two with": ({"a": 2, "b": 9, "c": 3}, {"a": None, "b": 0.25, "c": None}),
    "nobody with": ({"a": 2, "b": 5}, {"a": 0.5, "b": 0.25}),
    "nothing taught those without": ({"a": 2, "b": 5}, {"a": None, "b": 0.0}),
    "one without was taught nothing": (
        {"a": 2, "b": 3, "c": 9},
        {"a": None, "b": 0.5, "c": 0.0},
    ),
}


@pytest.mark.parametrize("by_cases", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sites_without_labels_weigh_together_no_more_than_those_with(kind, by_cases):
    cases, taught = KINDS[kind]
    total = RoundSum(study_of(), 2, 5, by_cases=by_cases)
    for site in cases:
        share = taught[site]
        said = {"labelled": share is None, "taught": 1.0 if share is None else share}
        total.take(site, update(site, cases=cases[site], **said))
    weighed = {site: (n if by_cases else 1) for site, n in cases.items()}
    labelled = sum(n for site, n in weighed.items() if taught[site] is None)
    others = sum(n for site, n in weighed.items() if taught[site])  # of more than nothing
    at_most = min(1.0, labelled / others) if labelled and others else 1.0
    factors = {site: 1.0 if share is None else share * at_most for site, share in taught.items()}
    weights = {site: n * factors[site] for site, n in weighed.items()}
    if labelled:
        without = sum(w for site, w in weights.items() if taught[site] is not None)
        assert without <= labelled
    mean = sum(w * DELTAS[site].double() for site, w in weights.items()) / sum(weights.values())
    assert torch.allclose(total.apply(BASE).double(), BASE.double() + mean, atol=1e-6)


def test_with_labels_alone_the_bits_are_those_of_one_sum():
    total = RoundSum(study_of(), 2, 5, by_cases=True)
    for site in ("a", "c"):
        total.take(site, update(site))
    total.take("b", update("b", labelled=False, taught=0.0))
    expected = WeightedSum(5)
    expected.add([DELTAS["a"], DELTAS["c"]], [CASES["a"], CASES["c"]])
    assert torch.equal(total.apply(BASE), expected.apply(BASE))
