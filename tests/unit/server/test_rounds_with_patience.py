"""Rounds among real institutions: certificates, hidden weights, late and missing sites."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.fake_sites import BASE, CASES, SCHEMA, Sites, expected, study_of
from uharmony_model.errors import QuorumError
from uharmony_model.exchange_settings import Publication
from uharmony_model.training_settings import Finale
from uharmony_server.admission import RefusalReason
from uharmony_server.checkpoint import load_latest
from uharmony_server.rounds import Patience, run_rounds
from uharmony_simulation.engine import InProcessGrid

SITES = ("site-03", "site-07", "site-09")
STUDY = study_of(norm_bound=1e9)


class Federation(InProcessGrid):
    """An in-process grid whose sites come and go, each with the certificate of its name."""

    def __init__(self, sites: Sites, members=SITES) -> None:
        super().__init__(sites, CASES)
        self.members = set(members)
        self.numbers = {site: node for node, site in enumerate(sorted(CASES), start=1)}
        self.after: dict[str, Callable[[], None]] = {}

    def get_node_ids(self):
        return [self.numbers[site] for site in sorted(self.members)]

    def site_of(self, node: int) -> str | None:
        found = {n: s for s, n in self.numbers.items()}.get(node)
        return found if found in self.members else None

    def send_and_receive(self, messages, *, timeout=None):
        for reply in super().send_and_receive(messages, timeout=timeout):
            yield reply
            if reply.metadata.message_type == "train":
                done = self.after.pop(self.site_of(reply.metadata.src_node_id) or "", None)
                if done is not None:
                    done()


def run(grid: Federation, folder, study=STUDY, **patience):
    patience.setdefault("missed", unexpected)
    return run_rounds(
        study,
        SCHEMA,
        BASE,
        grid,
        folder,
        patience=Patience(certified=grid.site_of, **patience),
    )


def at_round_2(act):
    """Calls `act` before round 2."""
    return lambda round_: act() if round_ == 2 else None


def unexpected(round_, error):
    raise AssertionError(f"round {round_}: {error}")


def two_rounds(names, equal=False):
    return expected(expected(BASE, names, equal).float(), names, equal)


def close(state, wanted):
    return torch.allclose(state.global_.double(), wanted, rtol=1e-5)


def test_a_node_is_whom_its_certificate_says_and_nobody_else(tmp_path):
    sites = Sites(STUDY)
    sites.names = {"site-07": "site-03"}
    state = run(Federation(sites), tmp_path)
    assert [(r.site, r.reason) for r in state.refusals] == [("site-07", RefusalReason.WRONG_SITE)]
    assert close(state, two_rounds(["site-03", "site-09"]))


def test_one_hidden_number_makes_all_weigh_equally(tmp_path):
    sites = Sites(STUDY)
    sites.hidden = {"site-09"}
    state = run(Federation(sites), tmp_path)
    assert state.refusals == ()
    assert close(state, two_rounds(SITES, equal=True))


def test_who_hides_the_number_without_having_said_so_is_refused(tmp_path):
    sites = Sites(STUDY)
    grid = Federation(sites)
    state = run(grid, tmp_path, before_round=at_round_2(lambda: sites.hidden.add("site-09")))
    assert [(r.site, r.round, r.reason) for r in state.refusals] == [
        ("site-09", 2, RefusalReason.BAD_CASE_COUNT)
    ]
    first = expected(BASE, SITES).float()
    assert close(state, expected(first, SITES[:2]))


def test_a_site_that_joins_late_is_greeted_and_takes_part_from_the_next_round(tmp_path):
    sites = Sites(STUDY)
    grid = Federation(sites, SITES[:2])
    state = run(grid, tmp_path, before_round=at_round_2(lambda: grid.members.add("site-09")))
    assert state.counted == (SITES[:2], SITES)
    assert sites.asked.count(("site-03", "query.hello")) == 1
    assert close(state, expected(expected(BASE, SITES[:2]).float(), SITES))


def test_a_round_without_quorum_is_asked_again_until_it_has_one(tmp_path):
    study = study_of(min_sites=3, norm_bound=1e9)
    sites = Sites(study)
    sites.silent = {"site-07"}
    told = []

    def missed(round_, error):
        told.append((round_, str(error)))
        if len(told) == 3:
            sites.silent.clear()

    state = run(Federation(sites), tmp_path, study, missed=missed)
    assert [r for r, _ in told] == [1, 1, 1]
    assert "2 sites" in told[0][1]
    assert close(state, two_rounds(SITES))
    assert [(r.site, r.reason) for r in state.refusals] == [("site-07", RefusalReason.SITE_ERROR)]


def test_a_site_revoked_while_the_round_is_summed_is_not_in_the_sum(tmp_path):
    sites = Sites(STUDY)
    grid = Federation(sites)
    # It has answered and was summed; then, before the round is over, it is shut out.
    grid.after["site-07"] = lambda: grid.members.discard("site-03")
    told = []
    state = run(grid, tmp_path, missed=lambda r, e: told.append(str(e)))
    assert len(told) == 1
    assert "site-03 was revoked" in told[0]
    assert state.counted == (SITES[1:], SITES[1:])
    assert close(state, two_rounds(SITES[1:]))


def test_a_newcomer_is_not_waited_for_until_it_comes(tmp_path):
    sites = Sites(STUDY)
    grid = Federation(sites, SITES[:2])
    there = {"now": [grid.numbers[s] for s in SITES[:2]]}
    state = run(
        grid,
        tmp_path,
        before_round=at_round_2(lambda: grid.members.add("site-09")),
        online=lambda: there["now"],
    )
    assert ("site-09", "query.hello") not in sites.asked[
        : sites.asked.index(("site-03", "query.finish"))
    ]
    assert state.counted == (SITES[:2], SITES[:2])


def test_a_hidden_weight_is_remembered_over_a_restart(tmp_path):
    study = study_of(norm_bound=1e9)
    sites = Sites(study)
    sites.hidden = {"site-09"}

    class StopError(Exception):
        pass

    def stop():
        raise StopError

    with pytest.raises(StopError):
        run(Federation(sites), tmp_path, study, before_round=at_round_2(stop))
    again = load_latest(tmp_path, study.digest, SCHEMA)
    assert again is not None
    assert again.hidden == ("site-09",)
    # It is a member still, though it cannot be greeted: the others go on weighing equally.
    sites.silent = {"site-09"}
    sites.approved = lambda site: study_of(min_sites=2) if site == "site-09" else study
    state = run(Federation(sites), tmp_path, study)
    first = expected(BASE, SITES, equal=True).float()
    assert close(state, expected(first, SITES[:2], equal=True))


def test_late_updates_are_refused_and_recorded_as_trained(tmp_path):
    grid = Federation(Sites(STUDY), SITES[:2])
    late = [[("site-09", 1), ("site-03", 1)], [("site-09", 2)]]
    state = run(grid, tmp_path, late=late.pop)
    # site-03 was counted in round 1: a second copy of its update is not late. And round 2 was
    # not over when the other one came.
    assert [(r.site, r.round, r.reason) for r in state.refusals] == [
        ("site-09", 1, RefusalReason.LATE)
    ]
    assert state.uncounted == ((1, "site-09"),)
    assert close(state, two_rounds(SITES[:2]))


def test_what_a_site_started_from_tells_of_rounds_trained_in_vain(tmp_path):
    sites = Sites(STUDY)
    sites.silent = {"site-07"}
    grid = Federation(sites)
    state = run(grid, tmp_path, before_round=at_round_2(sites.silent.clear))
    assert state.counted == (("site-03", "site-09"), SITES)
    assert state.uncounted == ((1, "site-07"),)  # it says that it went on from round 1
    sites.started_from = {"site-07": 0}
    sites.silent = {"site-07"}
    state = run(grid, tmp_path / "b", before_round=at_round_2(sites.silent.clear))
    assert state.uncounted == ()


def test_all_of_it_comes_back_from_the_checkpoint(tmp_path):
    sites = Sites(STUDY)
    sites.silent = {"site-07"}
    state = run(Federation(sites), tmp_path)
    again = load_latest(tmp_path, STUDY.digest, SCHEMA)
    assert again is not None
    assert (again.counted, again.uncounted, again.heads) == (
        state.counted,
        state.uncounted,
        state.heads,
    )


def test_a_finished_study_says_farewell(tmp_path):
    sites = Sites(STUDY)
    grid = Federation(sites)
    run(grid, tmp_path)
    run(grid, tmp_path)
    assert sites.asked.count(("site-03", "query.finish")) == 2  # again, in case it was not heard


FINALE = STUDY.model_copy(update={"finale": Finale(steps=1)})


def test_a_site_that_went_away_is_waited_for_once_in_the_finale(tmp_path):
    """Its answers are refused here, so every call is made; only the first one is its own too."""
    sites = Sites(FINALE)
    grid = Federation(sites)
    there = [grid.numbers[s] for s in SITES[:2]]
    run(grid, tmp_path, FINALE, online=lambda: there)
    asked = [site for site, kind in sites.asked if kind == "train.finale"]
    assert asked == [*SITES, *SITES[:2], *SITES[:2]]


def test_when_nobody_can_tell_who_is_there_all_are_asked_in_the_finale(tmp_path):
    sites = Sites(FINALE)
    run(Federation(sites), tmp_path, FINALE)
    assert [site for site, kind in sites.asked if kind == "train.finale"] == [*SITES] * 3


def test_a_pause_holds_what_comes_after_the_last_round_and_the_round_is_on_disk(tmp_path):
    study = FINALE.model_copy(update={"publication": Publication(experts=True)})
    sites = Sites(study)
    told = []

    def before_last(what):
        state = load_latest(tmp_path, study.digest, SCHEMA)
        assert state is not None
        told.append((what, state.round, [kind for _, kind in sites.asked[-3:]]))

    run(Federation(sites), tmp_path, study, before_last=before_last)
    finale = ["train.finale"] * 3
    assert told == [
        ("finale", 2, ["train"] * 3),
        ("finale", 2, finale),
        ("finale", 2, finale),
        ("publishing", 2, finale),
    ]


def test_without_patience_a_missed_quorum_is_the_end(tmp_path):
    sites = Sites(STUDY)
    sites.silent = set(CASES)
    with pytest.raises(QuorumError):
        run_rounds(STUDY, SCHEMA, BASE, InProcessGrid(sites, CASES), tmp_path)
