"""Gradients of the discriminator at the coordinator: taken, summed once a round, and not kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support import wire
from tests.support.gathering import expected_of
from tests.support.tiny import tiny_study
from uharmony_model.alignment.discriminator import FeatureDiscriminator
from uharmony_model.alignment.shared_discriminator import travelling
from uharmony_model.exchange.combined import open_combined
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import flatten
from uharmony_model.exchange.statistics import Said, StatisticsForm
from uharmony_server.admission import RefusalReason
from uharmony_server.gathered import Gathered, packed, unpacked
from uharmony_server.statistics import Answer, Gathering

STUDY = tiny_study(
    method="glua-fed",
    unlabelled={"min_patients": 3, "amplitude": "off", "align": "discriminator"},
)
FORM = StatisticsForm.of(STUDY)
SAID = '{"discriminator":"given"}'


def gradient(value: float) -> dict[str, Tensor]:
    return {k: torch.full_like(v, value) for k, v in FeatureDiscriminator(8).state_dict().items()}


def payload(value: float = 0.5, **changes) -> bytes:
    schema = FORM.schema("discriminator")
    fields = {
        "kind": Kind.STATISTICS,
        "study": STUDY.digest,
        "round": 5,
        "base": wire.BASE,
        "site": "north",
        "schema": schema,
        "values": {"patients": 3, "target": 1},
        "flat": flatten(travelling(gradient(value)), schema),
    }
    return encode(**{**fields, **changes})


def take(gathering, data, held=None, site="north"):
    expected = expected_of(STUDY, site)
    return gathering.take(held or Gathered(), Answer({"discriminator": data}, SAID), expected)


def both(gathering: Gathering, order: str = "ns") -> Gathered:
    held = Gathered()
    for letter in order:
        site, target, value = ("north", 1, 0.5) if letter == "n" else ("south", 0, -0.25)
        sent = payload(value, site=site, values={"patients": 3, "target": target})
        held, refused = take(gathering, sent, held, site)
        assert refused == []
    return held


def test_they_are_asked_for_in_every_round():
    gathering, held = Gathering(STUDY), Gathered()
    assert [gathering.asked("north", held, n) for n in (1, 2)] == [("discriminator",)] * 2
    held = gathering.closed(both(gathering))
    assert gathering.asked("north", held, 3) == ("discriminator",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": {"patients": 2, "target": 1}}, RefusalReason.BAD_CASE_COUNT),
        ({"values": {"patients": 3}}, RefusalReason.BAD_CASE_COUNT),
        ({"values": {"patients": 3, "target": 2}}, RefusalReason.BAD_CASE_COUNT),
        (
            {"flat": torch.full((FORM.schema("discriminator").numel,), float("nan"))},
            RefusalReason.NOT_FINITE,
        ),
        (
            {"flat": torch.full((FORM.schema("discriminator").numel,), 1e5)},
            RefusalReason.WRONG_SCHEMA,
        ),
        ({"round": 0, "base": ""}, None),
        ({"site": "south"}, None),
    ],
)
def test_what_does_not_count_is_refused_with_its_reason(changes, reason):
    held, (refusal,) = take(Gathering(STUDY), payload(**changes))
    assert not held.gradients
    assert reason is None or refusal.reason is reason


def test_a_round_ends_with_one_step_and_without_gradients():
    gathering = Gathering(STUDY)
    held = both(gathering)
    assert set(held.gradients) == {"north", "south"}
    assert gathering.payload(Gathered(), 5, wire.BASE) is None
    closed = gathering.closed(held)
    assert closed.gradients == {}
    data = gathering.payload(closed, 5, wire.BASE)
    assert data is not None
    found = open_combined(data, FORM)[1].discriminator
    assert found is not None
    # Adam's first step is the rate against the sign of the sum, 0.5 - 0.25.
    for name, tensor in FeatureDiscriminator(8, seed=STUDY.seed).state_dict().items():
        torch.testing.assert_close(found[name], tensor - 1e-3, rtol=0, atol=1e-6)
    swapped = gathering.payload(gathering.closed(both(gathering, "sn")), 5, wire.BASE)
    assert swapped == data


def test_one_side_alone_hands_out_nothing_and_keeps_no_gradient():
    gathering = Gathering(STUDY)
    closed = gathering.closed(both(gathering, "n"))
    assert (closed.gradients, closed.discriminator) == ({}, None)
    assert gathering.payload(closed, 5, wire.BASE) is None
    stepped = gathering.closed(both(gathering))
    assert stepped.discriminator is not None
    later = gathering.closed(replace(both(gathering, "s"), discriminator=stepped.discriminator))
    assert later.discriminator is stepped.discriminator


def test_what_is_kept_comes_back_whole():
    gathering = Gathering(STUDY)
    held = replace(
        gathering.closed(both(gathering)), said={"south": {"discriminator": Said.DAMAGED}}
    )
    facts, data = packed(held)
    found = unpacked(data, facts)
    assert found.said == held.said
    assert (found.styles, found.prototypes, found.codes) == ({}, {}, {})
    assert gathering.payload(found, 5, wire.BASE) == gathering.payload(held, 5, wire.BASE)
    again = (replace(one, gradients=both(gathering).gradients) for one in (held, found))
    one, other = (packed(gathering.closed(state))[1] for state in again)
    assert one == other
