"""Codes of styles at the coordinator: when they are asked for, what is taken, kept, handed out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import wire
from tests.support.gathering import expected_of
from tests.support.tiny import tiny_study
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.exchange.combined import open_combined
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import flatten
from uharmony_model.exchange.statistics import Said, StatisticsForm
from uharmony_server.admission import RefusalReason
from uharmony_server.gathered import Gathered, SaidBySite, packed, unpacked
from uharmony_server.statistics import Answer, Gathering

STUDY = tiny_study(
    method="glua-fed",
    unlabelled={"min_patients": 3, "style": "codes", "align": "off"},
    training={"rounds": 8},
)
FORM = StatisticsForm.of(STUDY)
SAID = '{"codes":"given"}'
SILENT: SaidBySite = {"c": {"codes": Said.NOT_OPTED_IN}}


def style(value: float = 1.0, spread: float = 0.5) -> StyleCodes:
    return StyleCodes(np.full((1, 8), value), np.full((1, 8), spread))


def payload(found: StyleCodes | None = None, **changes) -> bytes:
    schema = FORM.schema("codes")
    fields = {
        "kind": Kind.STATISTICS,
        "study": STUDY.digest,
        "round": 0,
        "site": "north",
        "schema": schema,
        "values": {"patients": 3},
        "flat": flatten((found or style()).state(), schema),
    }
    return encode(**{**fields, **changes})


def take(gathering, data: bytes | None, said=SAID, held=None, site="north"):
    expected = expected_of(STUDY, site)
    answer = Answer({} if data is None else {"codes": data}, said)
    return gathering.take(held or Gathered(), answer, expected)


def test_codes_are_asked_for_once_the_autoencoder_rests():
    gathering = Gathering(STUDY)
    assert STUDY.style_rounds == 2
    asked = [gathering.asked("north", Gathered(), number) for number in (1, 2, 3, 8)]
    assert asked == [(), (), ("codes",), ("codes",)]
    held, refused = take(gathering, payload())
    assert refused == []
    assert gathering.asked("north", held, 4) == ()
    assert gathering.asked("south", held, 4) == ("codes",)
    held, _ = take(gathering, None, '{"codes":"not_opted_in"}', held, "south")
    held = gathering.closed(held)
    assert gathering.asked("south", held, 5) == ()
    assert Gathering(STUDY).asked("south", held, 5) == ("codes",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"values": {"patients": 2}}, RefusalReason.BAD_CASE_COUNT),
        ({"flat": torch.full((16,), float("inf"))}, RefusalReason.NOT_FINITE),
        ({"flat": torch.full((16,), -1.0)}, RefusalReason.WRONG_SCHEMA),  # a negative deviation
        ({"round": 5, "base": wire.BASE}, None),
        ({"site": "south"}, None),
    ],
)
def test_what_does_not_count_is_refused_with_its_reason(changes, reason):
    held, (refusal,) = take(Gathering(STUDY), payload(**changes))
    assert not held.codes
    assert reason is None or refusal.reason is reason


def test_codes_are_handed_out_without_names_and_one_more_for_who_gives_none():
    gathering = Gathering(STUDY)
    held = Gathered(codes={"b": style(4.0, 3.0), "a": style(0.0, 1.0)})
    words: tuple[tuple[SaidBySite, int], ...] = (({}, 2), (SILENT, 3))
    for said, count in words:
        together = Gathered(codes=held.codes, said=said)
        data = gathering.payload(together, 4, wire.BASE)
        assert data is not None
        _, found = open_combined(data, FORM)
        rows = sorted((float(c.centroids[0, 0]), float(c.spread[0, 0])) for c in found.codes)
        # Mean 2; the spread holds (1 + 4 + 9 + 4) / 2 = 9.
        wide = [(2.0, 3.0)] if count == 3 else []
        np.testing.assert_allclose(rows, sorted([(0.0, 1.0), (4.0, 3.0), *wide]))
        swapped = Gathered(codes={"a": style(4.0, 3.0), "b": style(0.0, 1.0)}, said=said)
        assert gathering.payload(swapped, 4, wire.BASE) == data
    assert gathering.payload(Gathered(said=SILENT), 4, wire.BASE) is None


def test_what_is_kept_comes_back_whole():
    held = Gathered(codes={"north.1": style(0.1)}, said={"south": {"codes": Said.DAMAGED}})
    facts, data = packed(held)
    found = unpacked(data, facts)
    assert found.said == held.said
    assert found.codes.keys() == held.codes.keys()
    for name, tensor in held.codes["north.1"].state().items():
        assert torch.equal(found.codes["north.1"].state()[name], tensor)
    assert found.of_next_round().codes.keys() == held.codes.keys()
