"""A site follows no order that its hospital did not approve."""

from __future__ import annotations

import pytest

from tests.support import wire
from tests.support.tiny import tiny_study
from uharmony_client.approval import approved_order, require_approved
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.instruction import Instruction

# Three rounds; validation after each second round and the last, test after the last alone.
STUDY = tiny_study(evaluation={"every": 2})


def check(action, round_, splits=(), final=False):
    order = Instruction(
        action=action, study=wire.STUDY, round=round_, base=wire.BASE, splits=splits, final=final
    )
    require_approved(order, STUDY)


@pytest.mark.parametrize(
    "order",
    [
        ("hello", 0),
        ("finish", 3),
        ("train", 1),
        ("train", 3),
        ("evaluate", 2, ("validation",)),
        ("evaluate", 3, ("validation", "test"), True),
    ],
)
def test_what_was_approved_is_followed(order):
    check(*order)


@pytest.mark.parametrize(
    "order",
    [
        ("train", 0),
        ("train", 4),
        ("train", 2**31 - 1),
        ("evaluate", 4, ("validation", "test"), True),
        ("evaluate", 1, ("validation",)),
        ("evaluate", 2, ("validation",), True),
        ("evaluate", 2, ("test",)),
        ("evaluate", 2, ("validation", "test")),
        ("evaluate", 3, ("validation",), True),
        ("evaluate", 3, ("validation", "test")),
        ("evaluate", 3, ("test", "validation"), True),
        ("evaluate", 3, ("validation", "test", "test"), True),  # twice the cases, half the secret
        ("evaluate", 3, ("train", "validation", "test"), True),
        ("evaluate", 2, ()),
    ],
)
def test_anything_else_is_refused(order):
    with pytest.raises(ExchangeError, match="approved"):
        check(*order)


# Three rounds, then the finale as round 4, then the publication as round 5.
GENEROUS = tiny_study(finale={"steps": 2}, publication={"experts": True})


@pytest.mark.parametrize(("action", "round_"), [("finale", 4), ("publish", 5)])
def test_finale_and_publication_have_their_round_and_must_be_in_the_study(action, round_):
    for number in range(7):
        order = Instruction(action=action, study=wire.STUDY, round=number, base=wire.BASE)
        if number == round_:
            require_approved(order, GENEROUS)
        else:
            with pytest.raises(ExchangeError, match="approved"):
                require_approved(order, GENEROUS)
        with pytest.raises(ExchangeError, match="approved"):
            require_approved(order, STUDY)


def test_an_order_is_of_the_approved_study_and_of_the_kind_of_its_message():
    order = Instruction(action="train", study=STUDY.digest, round=1, base=wire.BASE)
    assert approved_order(order.to_json(), STUDY, "train") == order
    with pytest.raises(ExchangeError, match="for evaluate asks for train"):
        approved_order(order.to_json(), STUDY, "evaluate")
    later = order.model_copy(update={"round": 4})
    with pytest.raises(ExchangeError, match="asked for round 4"):
        approved_order(later.to_json(), STUDY, "train")
    other = order.model_copy(update={"study": wire.STUDY})
    with pytest.raises(ExchangeError, match=wire.STUDY[:12]):
        approved_order(other.to_json(), STUDY, "train")
    with pytest.raises(ExchangeError):
        approved_order("{}", STUDY, "train")
