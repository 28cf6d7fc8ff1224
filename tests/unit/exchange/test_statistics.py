"""The form of shared statistics: what a receiver accepts, and nothing else."""

from __future__ import annotations

from hashlib import sha256

import pytest
import torch

from tests.support import wire
from tests.support.tiny import tiny_study
from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.errors import ExchangeError, PayloadError
from uharmony_model.exchange.combined import (
    MAX_STYLES,
    Combined,
    combined_schema,
    encode_combined,
    open_combined,
)
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.exchange.statistics import StatisticsForm, patients_told, statistic_of

FORM = StatisticsForm((1, 1), (2, 3))
STYLES = (torch.full((1, 3, 3, 3), 0.25), torch.full((1, 3, 3, 3), 0.5))
PROTOTYPES = Prototypes(
    mean=torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]]),
    variance=torch.tensor([[0.0, 0.0, 0.0], [1.0, 4.0, 9.0]]),
    voxels=torch.tensor([0.0, 120.0]),
)


def handed_out(combined: Combined) -> bytes:
    return encode_combined(combined, FORM, study=wire.STUDY, round_=3, base=wire.BASE)


def raw(values, shapes, *, kind=Kind.STATISTICS, fill=0.25) -> bytes:
    schema = Schema(tensors=tuple(TensorSpec(name=n, shape=s) for n, s in sorted(shapes.items())))
    flat = torch.full((schema.numel,), fill)
    return encode(
        kind=kind, study=wire.STUDY, round=3, site="server", schema=schema, values=values, flat=flat
    )


# --- who is asked for what ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "unlabelled", "wanted"),
    [
        ("ust-run-fed", {}, ("amplitude",)),
        ("ust-run-fed", {"amplitude": "off"}, ()),
        ("glua-fed", {}, ("amplitude", "prototypes")),
        ("glua-fed", {"amplitude": "off"}, ("prototypes",)),
        ("fixmatch-fed", {}, ()),
        ("ust-run", {}, ()),  # all cases lie in one place
        ("fedavg", {"rule": "ust-run"}, ("amplitude",)),
        ("local", {"rule": "ust-run"}, ()),  # nothing leaves such a site
    ],
)
def test_what_is_due(method, unlabelled, wanted):
    assert tiny_study(method=method, unlabelled=unlabelled).statistics == wanted


def test_the_form_follows_from_task_patch_and_network():
    study = tiny_study(method="glua-fed", network={"features": [4, 12]})
    # Two outputs: background and blob. A patch of 16 voxels has a half-width of 1.
    assert StatisticsForm.of(study) == StatisticsForm((1, 1), (2, 12))
    wide = tiny_study(method="ust-run-fed", unlabelled={"half_width": 3})
    assert StatisticsForm.of(wide) == StatisticsForm((1, 3), None)
    assert StatisticsForm.of(tiny_study()) == StatisticsForm()


# --- an instruction -------------------------------------------------------------------------------


def test_an_instruction_says_nothing_of_statistics_that_are_not_asked_for():
    order = Instruction(action="train", study=wire.STUDY, round=4, base=wire.BASE)
    assert "statistics" not in order.to_json()
    assert "given" not in order.to_json()
    asked = order.model_copy(update={"statistics": ("amplitude",), "given": wire.BASE})
    assert Instruction.from_json(asked.to_json()) == asked
    assert asked.to_json() == (
        f'{{"action":"train","base":"{wire.BASE}","final":false,"given":"{wire.BASE}",'
        f'"receipt":null,"round":4,"splits":[],"statistics":["amplitude"],"study":"{wire.STUDY}"}}'
    )
    # A default that is written out is another text for the same meaning.
    with pytest.raises(PayloadError, match="canonical"):
        Instruction.from_json(order.to_json().replace('"receipt"', '"given":"","receipt"'))


# --- what is handed out ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combined",
    [Combined(STYLES, PROTOTYPES), Combined(STYLES), Combined((), PROTOTYPES)],
    ids=["both", "styles", "prototypes"],
)
def test_what_was_handed_out_comes_back(combined):
    manifest, found = open_combined(handed_out(combined), FORM)
    assert (manifest.study, manifest.round, manifest.base) == (wire.STUDY, 3, wire.BASE)
    assert len(found.styles) == len(combined.styles)
    assert all(map(torch.equal, found.styles, combined.styles))
    assert (found.prototypes is None) == (combined.prototypes is None)
    if found.prototypes is not None:
        for name, tensor in PROTOTYPES.tensors().items():
            assert torch.equal(found.prototypes.tensors()[name], tensor)


def test_equal_statistics_are_equal_bytes_and_the_order_of_styles_is_kept():
    first, second = handed_out(Combined(STYLES)), handed_out(Combined(STYLES))
    assert sha256(first).digest() == sha256(second).digest()
    assert handed_out(Combined(STYLES[::-1])) != first


STYLE, TWO = {"amplitude": (1, 1, 3, 3, 3)}, {"amplitude": (2, 1, 3, 3, 3)}
TABLES = {"present": (2,), "mean": (2, 3), "variance": (2, 3)}


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({}, STYLE),
        ({"styles": 1}, STYLE),
        ({"styles": 1, "prototypes": 0, "patients": 12}, STYLE),
        ({"styles": 2, "prototypes": 0}, STYLE),
        ({"styles": 1, "prototypes": 0}, TWO),
        ({"styles": 1.0, "prototypes": 0}, STYLE),
        ({"styles": -1, "prototypes": 0}, STYLE),
        ({"styles": None, "prototypes": 0}, STYLE),
        ({"styles": 1, "prototypes": 1}, STYLE),
        ({"styles": 0, "prototypes": 2}, TABLES),
        ({"styles": MAX_STYLES + 1, "prototypes": 0}, {"amplitude": (MAX_STYLES + 1, 1, 3, 3, 3)}),
        ({"styles": 2**62, "prototypes": 0}, STYLE),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_is_made_of_them(values, shapes):
    with pytest.raises(PayloadError):
        open_combined(raw(values, shapes), FORM)


def test_what_no_image_can_have_is_refused():
    one = {"styles": 1, "prototypes": 0}
    assert len(open_combined(raw(one, STYLE), FORM)[1].styles) == 1
    with pytest.raises(ExchangeError, match="spans"):
        open_combined(raw(one, STYLE, fill=99.0), FORM)
    with pytest.raises(ExchangeError, match="another number"):
        open_combined(raw({"styles": 0, "prototypes": 1}, TABLES), FORM)
    with pytest.raises(PayloadError, match="expected statistics"):
        open_combined(raw(one, STYLE, kind=Kind.MODEL), FORM)


def test_what_the_study_does_not_ask_for_is_refused():
    only_styles, only_tables = StatisticsForm(FORM.style), StatisticsForm(None, FORM.prototypes)
    with pytest.raises(PayloadError, match="does not ask"):
        open_combined(handed_out(Combined((), PROTOTYPES)), only_styles)
    with pytest.raises(PayloadError, match="0 to 0"):
        open_combined(handed_out(Combined(STYLES)), only_tables)


def test_more_styles_than_are_handed_out_are_refused():
    with pytest.raises(PayloadError, match="at most 1024"):
        handed_out(Combined(STYLES[:1] * (MAX_STYLES + 1)))


# --- what a site says -----------------------------------------------------------------------------


def test_a_statistic_is_known_by_its_tensors():
    assert statistic_of(FORM.schema("amplitude")) == "amplitude"
    assert statistic_of(FORM.schema("prototypes")) == "prototypes"
    assert statistic_of(Schema.of({"weight": torch.zeros(1)})) is None
    assert statistic_of(combined_schema(FORM, 1, prototypes=True)) is None
    assert statistic_of(Schema(tensors=())) is None
    with_gradient = StatisticsForm(discriminator=8)
    assert statistic_of(with_gradient.schema("discriminator")) == "discriminator"


@pytest.mark.parametrize(
    "values", [{}, {"patients": None}, {"patients": 11.0}, {"patients": 11, "loss": 0.5}]
)
def test_nothing_but_a_number_of_patients_is_said(values):
    assert patients_told({"patients": 11}, "amplitude") == 11
    with pytest.raises(PayloadError, match="patients"):
        patients_told(values, "amplitude")


@pytest.mark.parametrize(
    "values",
    [
        {"patients": 11},
        {"patients": 11, "target": 2},
        {"patients": 11, "target": 1.0},
        {"patients": 11, "target": None},
        {"patients": 11, "target": 1, "loss": 0.5},
        {"target": 1},
    ],
)
def test_a_gradient_says_its_side_too(values):
    assert patients_told({"patients": 11, "target": 1}, "discriminator") == 11
    assert patients_told({"patients": 11, "target": 0}, "discriminator") == 11
    with pytest.raises(PayloadError, match="target"):
        patients_told(values, "discriminator")
    with pytest.raises(PayloadError):
        patients_told({"patients": 11, "target": 1}, "prototypes")
