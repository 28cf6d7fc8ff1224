"""A site follows no order that its hospital did not approve."""

from __future__ import annotations

import pytest

from tests.support import wire
from tests.support.tiny import tiny_study
from uharmony_client.flower_app import _refuse_what_was_not_approved
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.instruction import Instruction

# Three rounds; validation after each second round and the last, test after the last alone.
STUDY = tiny_study(evaluation={"every": 2})


def check(action, round_, splits=(), final=False):
    order = Instruction(
        action=action, study=wire.STUDY, round=round_, base=wire.BASE, splits=splits, final=final
    )
    _refuse_what_was_not_approved(order, STUDY)


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
