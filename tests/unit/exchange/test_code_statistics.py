"""Codes of styles on the wire: what comes back, and what a receiver refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import wire
from tests.support.tiny import tiny_study
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.alignment.shared_discriminator import SharedDiscriminator
from uharmony_model.alignment.style_codes import StyleCodes, code_schema
from uharmony_model.errors import ExchangeError, PayloadError
from uharmony_model.exchange.combined import MAX_STYLES, Combined, encode_combined, open_combined
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.exchange.statistics import StatisticsForm, statistic_of

FORM = StatisticsForm(None, (2, 3), (2, 4))  # two channels, codes of four numbers


def codes(value: float) -> StyleCodes:
    table = value + np.arange(8.0).reshape(2, 4)
    return StyleCodes(table, np.abs(table) / 8)


PROTOTYPES = Prototypes(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2))


def handed_out(combined: Combined, form: StatisticsForm = FORM) -> bytes:
    return encode_combined(combined, form, study=wire.STUDY, round_=3, base=wire.BASE)


def raw(values, count: int, *, fill: float = 0.25) -> bytes:
    tensors = tuple(
        TensorSpec(name=s.name, shape=(count, *s.shape)) for s in code_schema(2, 4).tensors
    )
    schema = Schema(tensors=tensors if count else ())
    return encode(
        kind=Kind.STATISTICS,
        study=wire.STUDY,
        round=3,
        site="server",
        schema=schema,
        values=values,
        flat=torch.full((schema.numel,), fill),
    )


def test_the_form_follows_from_the_study():
    study = tiny_study(method="glua-fed", unlabelled={"style": "codes"})
    assert StatisticsForm.of(study) == StatisticsForm(None, (2, 8), (1, 8))
    assert statistic_of(StatisticsForm.of(study).schema("codes")) == "codes"


@pytest.mark.parametrize("prototypes", [None, PROTOTYPES])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_was_handed_out_comes_back(prototypes, count):
    given = tuple(codes(float(i)) for i in range(count))
    found = open_combined(handed_out(Combined((), prototypes, given)), FORM)[1]
    assert (found.prototypes is None) == (prototypes is None)
    assert len(found.codes) == count
    for one, other in zip(found.codes, given, strict=True):
        np.testing.assert_array_equal(one.centroids, other.centroids)
        np.testing.assert_array_equal(one.spread, other.spread)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({"styles": 0, "prototypes": 0}, 1),
        ({"styles": 0, "prototypes": 0, "codes": 2}, 1),
        ({"styles": 0, "prototypes": 0, "codes": -1}, 1),
        ({"styles": 0, "prototypes": 0, "codes": 1.0}, 1),
        ({"styles": 0, "prototypes": 0, "codes": None}, 1),
        ({"styles": 1, "prototypes": 0, "codes": 1}, 1),
        ({"styles": 0, "prototypes": 0, "codes": MAX_STYLES + 1}, MAX_STYLES + 1),
        ({"styles": 0, "prototypes": 0, "codes": 2**62}, 1),
    ],
)
def test_values_that_do_not_fit_are_refused(values, count):
    with pytest.raises(PayloadError):
        open_combined(raw(values, count), FORM)


@pytest.mark.parametrize("fill", [float("nan"), 1e4, -1.0])
def test_what_no_site_can_have_given_is_refused(fill):
    one = {"styles": 0, "prototypes": 0, "codes": 1}
    assert len(open_combined(raw(one, 1), FORM)[1].codes) == 1
    with pytest.raises(ExchangeError):
        open_combined(raw(one, 1, fill=fill), FORM)


def test_a_discriminator_is_handed_out_beside_the_others():
    form = StatisticsForm(None, (2, 3), (2, 4), 8)
    weights = SharedDiscriminator.first(8, seed=0).weights
    for combined in (
        Combined(discriminator=weights),
        Combined((), PROTOTYPES, (codes(1.0),), weights),
        Combined((), PROTOTYPES),
    ):
        manifest, found = open_combined(handed_out(combined, form), form)
        assert set(manifest.values) == {"styles", "prototypes", "codes", "discriminator"}
        assert (found.prototypes is None) == (combined.prototypes is None)
        assert len(found.codes) == len(combined.codes)
        if combined.discriminator is None:
            assert found.discriminator is None
        else:
            assert found.discriminator is not None
            assert all(torch.equal(found.discriminator[k], v) for k, v in weights.items())
    with pytest.raises(PayloadError, match="does not ask for discriminator"):
        handed_out(Combined(discriminator=weights))
    with pytest.raises(PayloadError, match="discriminator"):
        open_combined(handed_out(Combined(discriminator=weights), form), FORM)
    broken = {k: v * float("inf") for k, v in weights.items()}
    with pytest.raises(ExchangeError):
        open_combined(handed_out(Combined(discriminator=broken), form), form)


def test_a_study_without_codes_hands_out_none_and_says_nothing_of_them():
    plain = StatisticsForm(None, (2, 3))
    manifest, _ = open_combined(handed_out(Combined((), PROTOTYPES), plain), plain)
    assert set(manifest.values) == {"styles", "prototypes"}
    with pytest.raises(PayloadError, match="does not ask for codes"):
        handed_out(Combined((), None, (codes(0.0),)), plain)
    with pytest.raises(PayloadError):
        open_combined(handed_out(Combined((), None, (codes(0.0),))), plain)
    with pytest.raises(PayloadError, match="at most"):
        handed_out(Combined((), None, (codes(0.0),) * (MAX_STYLES + 1)))
