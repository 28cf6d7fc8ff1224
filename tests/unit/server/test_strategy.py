"""The strategy with hand-made answers: order, groups, quorum, joining."""

from __future__ import annotations

import statistics

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from tests.support.fake_sites import BASE, CASES, SCHEMA, Sites, delta_of, expected, study_of
from tests.support.tiny import tiny_study
from uharmony_model.errors import QuorumError
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.rounds import run_rounds
from uharmony_server.strategy import HarmonyStrategy
from uharmony_simulation.engine import InProcessGrid, site_of


@pytest.mark.parametrize("weighting", ["cases", "equal"])
def test_rounds_compute_the_weighted_mean(tmp_path, weighting):
    study = study_of(weighting=weighting, norm_bound=1e9)
    state = run_rounds(study, SCHEMA, BASE, InProcessGrid(Sites(study), CASES), tmp_path)
    wanted = expected(BASE, CASES, weighting == "equal")
    wanted = expected(wanted.float(), CASES, weighting == "equal")
    assert torch.allclose(state.global_.double(), wanted, rtol=1e-5)
    assert state.refusals == ()


def test_flowers_own_loop_drives_it_to_the_same_result(tmp_path):
    study = study_of(norm_bound=1e9)
    ours = run_rounds(study, SCHEMA, BASE, InProcessGrid(Sites(study), CASES), tmp_path)
    grid = InProcessGrid(Sites(study), CASES)
    start = Checkpoint(round=0, global_=BASE, schema=SCHEMA, study=study.digest)
    strategy = HarmonyStrategy(study, start)
    strategy.greet(grid)
    strategy.start(grid, strategy.arrays(), num_rounds=2)
    assert torch.equal(strategy.state.global_, ours.global_)


def test_answers_in_any_order_give_the_same_bits():
    study = study_of(norm_bound=1e9)
    results = []
    for turn in (1, -1):
        grid = InProcessGrid(Sites(study), CASES)
        start = Checkpoint(round=0, global_=BASE, schema=SCHEMA, study=study.digest)
        strategy = HarmonyStrategy(study, start)
        strategy.greet(grid)
        asked = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
        replies = list(grid.send_and_receive(asked))[::turn]
        strategy.aggregate_train(1, replies)
        results.append(strategy.state.global_)
    assert torch.equal(*results)


def test_a_second_answer_of_a_site_does_not_count():
    study = study_of(norm_bound=1e9)
    grid = InProcessGrid(Sites(study), CASES)
    start = Checkpoint(round=0, global_=BASE, schema=SCHEMA, study=study.digest)
    strategy = HarmonyStrategy(study, start)
    strategy.greet(grid)
    asked = strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(asked))
    strategy.aggregate_train(1, [*replies, replies[3]])
    assert [(r.site, r.reason) for r in strategy.state.refusals] == [("site-03", "duplicate")]
    assert torch.allclose(strategy.state.global_.double(), expected(BASE, CASES), rtol=1e-5)


def test_the_round_goes_on_without_silent_sites_until_the_quorum_is_missed(tmp_path):
    study = study_of(min_sites=9, norm_bound=1e9)
    sites = Sites(study)
    sites.silent = {"site-01", "site-07"}
    state = run_rounds(study, SCHEMA, BASE, InProcessGrid(sites, CASES), tmp_path / "a")
    assert {r.site for r in state.refusals} == sites.silent
    there = [name for name in CASES if name not in sites.silent]
    wanted = expected(expected(BASE, there).float(), there)
    assert torch.allclose(state.global_.double(), wanted, rtol=1e-5)
    sites.silent.add("site-10")
    with pytest.raises(QuorumError, match=r"8 sites with 45 cases.*site-10: site_error"):
        run_rounds(study, SCHEMA, BASE, InProcessGrid(sites, CASES), tmp_path / "b")


def test_a_site_that_approved_another_study_takes_no_part(tmp_path):
    study = study_of(norm_bound=1e9)
    other = tiny_study(seed=9)
    sites = Sites(study, lambda site: other if site == "site-04" else study)
    state = run_rounds(study, SCHEMA, BASE, InProcessGrid(sites, CASES), tmp_path)
    (refusal,) = state.refusals
    assert refusal.reason == "not_agreed"
    assert other.digest[:12] in refusal.detail
    assert study.digest[:12] in refusal.detail


def test_an_update_out_of_all_proportion_is_refused_from_the_first_round_on(tmp_path):
    study = study_of(norm_bound=2.0)
    names = list(CASES)[:3]
    state = run_rounds(study, SCHEMA, BASE, InProcessGrid(Sites(study), names), tmp_path)
    past: list[float] = []
    weights, refused = BASE, set()
    for round_ in (1, 2):
        # Before there is any history the global weights are the measure, then its median.
        limit = 2.0 * (statistics.median(past) if past else max(float(weights.norm()), 1.0))
        norms = {n: float(delta_of(n, weights).norm()) for n in names}
        there = [n for n in names if norms[n] <= limit]
        refused |= {(n, round_, "norm_too_large") for n in names if n not in there}
        past += [norms[n] for n in there]
        weights = expected(weights, there).float()
    assert ("site-02", 1, "norm_too_large") in refused
    assert {(r.site, r.round, str(r.reason)) for r in state.refusals} == refused
    assert torch.allclose(state.global_, weights, rtol=1e-5)


@pytest.mark.parametrize("size", [3e38, 1e20])
def test_a_huge_finite_first_update_does_not_poison_the_run(tmp_path, size):
    study = study_of()

    class OneHuge(Sites):
        def delta(self, site: str, weights: torch.Tensor) -> torch.Tensor:
            return torch.full((5,), size) if site == "site-05" else weights * 0.01

    state = run_rounds(study, SCHEMA, BASE, InProcessGrid(OneHuge(study), CASES), tmp_path)
    assert {r.site for r in state.refusals} == {"site-05"}
    assert float(state.global_.abs().max()) < 2


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "7", "\x00"])
def test_no_refusal_text_ends_a_run(tmp_path, text):
    study = study_of(norm_bound=1e9)
    sites = Sites(study)

    def app(message: Message, context: Context) -> Message:
        if site_of(context) != "site-02":
            return sites(message, context)
        return Message(RecordDict({"refusal": ConfigRecord({"json": text})}), reply_to=message)

    state = run_rounds(study, SCHEMA, BASE, InProcessGrid(app, CASES), tmp_path)
    assert state.round == 2
    assert len(state.refusals) == 1
