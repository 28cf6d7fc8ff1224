"""A question of the coordinator may be repeated, and not changed."""

from __future__ import annotations

import pytest

from tests.support.few_patients import open_site, study_of, write_cases
from uharmony_client.asked import require_unchanged
from uharmony_client.policy import Policy
from uharmony_client.site import Site
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_model.exchange.instruction import Instruction

A, B = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    return write_cases(tmp_path_factory.mktemp("data") / "volumes")


def site_at(data, store, **policy) -> Site:
    return open_site(data, store, Policy(**policy), study_of())


def ask(site: Site, round_: int, base: str = A, *, action="train", given: str = "") -> None:
    order = Instruction(
        action=action, study=site.study.digest, round=round_, base=base, given=given
    )
    require_unchanged(site, order)


@pytest.mark.parametrize("action", ["train", "evaluate"])
def test_the_same_may_be_asked_again(data, tmp_path, action):
    for round_ in (1, 1, 2, 3, 3, 2, 1, 3, 4):  # a coordinator that lost its last checkpoints
        ask(site_at(data, tmp_path), round_, action=action)


@pytest.mark.parametrize("action", ["train", "evaluate"])
def test_another_for_the_same_round_is_refused(data, tmp_path, action):
    site = site_at(data, tmp_path)
    ask(site, 1, action=action)
    for _ in range(2):  # trying it does not make it the one that was asked
        with pytest.raises(ExchangeError, match="round 1 from other weights"):
            ask(site, 1, B, action=action)
    ask(site, 1, action=action)
    ask(site, 2, B, action=action)


def test_other_statistics_are_another_question(data, tmp_path):
    site = site_at(data, tmp_path)
    ask(site, 2, given=A)
    with pytest.raises(ExchangeError, match="other weights or statistics"):
        ask(site, 2, given=B)


def test_training_and_measuring_are_asked_each_for_themselves(data, tmp_path):
    site = site_at(data, tmp_path)
    ask(site, 1)
    ask(site, 1, B, action="evaluate")
    ask(site, 2, B)
    with pytest.raises(ExchangeError, match="asked to evaluate round 1"):
        ask(site, 1, A, action="evaluate")


def test_a_round_that_nobody_remembers_is_over(data, tmp_path):
    site = site_at(data, tmp_path)
    for round_ in range(1, 6):
        ask(site, round_)
    ask(site, 3)
    with pytest.raises(
        ExchangeError, match="round 2 which is over; this site was asked for round 5"
    ):
        ask(site, 2)


def test_a_site_may_allow_to_go_back(data, tmp_path):
    site = site_at(data, tmp_path, allow_rollback=True)
    for round_ in (1, 2, 3):
        ask(site, round_)
    ask(site, 2, B)
    strict = site_at(data, tmp_path)
    with pytest.raises(ExchangeError, match="round 2 from other weights"):
        ask(strict, 2, A)
    ask(strict, 3, A)  # of the history that was left nothing is remembered


def test_a_damaged_memory_is_said(data, tmp_path):
    site = site_at(data, tmp_path)
    ask(site, 1)
    path = site.store.folder / "asked.json"
    assert path.stat().st_mode & 0o077 == 0
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(StoreError, match="remove the file"):
        ask(site, 1)
