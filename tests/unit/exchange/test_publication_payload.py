"""The form of what sites publish, the study's words for it, and when it is due."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.tiny import tiny_study
from uharmony_model.descriptor import describe
from uharmony_model.errors import ConfigError, PayloadError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import Kind, decode, encode
from uharmony_model.exchange.published import (
    MAX_DOMAINS,
    PublicationForm,
    descriptor_length,
    patient_values,
    patients_of,
    published_name,
)
from uharmony_model.exchange_settings import Publication
from uharmony_model.frozen import parse
from uharmony_model.networks import build_network
from uharmony_model.schedule import finale_round, publication_due, publication_round
from uharmony_model.study import Study

ASKED = {"experts": True, "prototypes": True, "center": [0.0], "scale": [1.0]}


def study_of(**changes) -> Study:
    return tiny_study(publication={**ASKED, **changes})


# --- the study ------------------------------------------------------------------------------------


def test_nothing_is_asked_by_default_and_such_a_study_says_nothing_of_it():
    study = tiny_study()
    assert study.publication.asked == publication_due(study) == ()
    assert "publication" not in study.canonical_json()
    assert study.digest == tiny_study(publication={}).digest
    assert Study.model_validate_json(study.canonical_json()) == study


def test_what_is_asked_is_in_the_digest_and_comes_back():
    study = study_of()
    assert study.digest != tiny_study().digest != study_of(epsilon=0.5).digest
    again = Study.model_validate_json(study.canonical_json())
    assert (again, again.digest) == (study, study.digest)


@pytest.mark.parametrize(
    "content",
    [
        {"prototypes": True},
        {"prototypes": True, "center": [0.0]},
        {"prototypes": True, "scale": [1.0]},
        {"epsilon": 0},
        {"epsilon": 1.01},
        {"delta": 0},
        {"delta": 0.1},
        {"delta": 0.05, "min_patients": 20},
        {"min_patients": 9},
        {"coordinates": 0},
        {"coordinates": 17},
        {"center": []},
        {"scale": [0.0]},
        {"scale": [math.inf]},
        {"center": [math.nan]},
        {"ages": True},
    ],
)
def test_what_no_study_may_ask(content):
    with pytest.raises(ConfigError):
        parse(Publication, content, "study.yaml")


@pytest.mark.parametrize(
    ("method", "due"),
    [
        ("uharmony", ("experts", "prototypes")),
        ("uharmony-averaged", ()),
        ("pooled-uharmony", ()),
        ("fedavg", ()),
        ("fedbn", ()),
        ("u2net", ()),
    ],
)
def test_only_methods_with_residuals_at_the_sites_publish(method, due):
    assert publication_due(study_of().with_method(method)) == due
    assert publication_due(study_of(prototypes=False).with_method(method)) == due[:1]


def test_it_comes_after_the_finale():
    study = study_of()
    assert publication_round(study) == finale_round(study) + 1 == study.training.rounds + 2


# --- values ---------------------------------------------------------------------------------------


def test_patients_go_there_and_back():
    patients = {"b": 12, "a.1": 10}
    values = patient_values(patients)
    assert values == {"patients/a.1": 10, "patients/b": 12}
    assert patients_of(values) == patients
    assert patients_of({**values, "epsilon": 1.0}, also=("epsilon",)) == patients


@pytest.mark.parametrize(
    ("values", "also"),
    [
        ({}, ()),
        ({"epsilon": 1.0}, ("epsilon",)),
        ({"patients/a": 10, "dice": 0.5}, ()),
        ({"patients/a": 10}, ("epsilon",)),
        ({"patients/a": 10, "epsilon": 1.0}, ()),
        ({"patients/": 10}, ()),
        ({"patients/a b": 10}, ()),
        ({"patients/a@b": 10}, ()),
        ({"patients/../a": 10}, ()),
        ({"patients/" + 65 * "a": 10}, ()),
        ({"patients/a": 10.0}, ()),
        ({"patients/a": True}, ()),
        ({"patients/a": "<11"}, ()),
        ({"patients/a": None}, ()),
        ({f"patients/d{i}": 10 for i in range(MAX_DOMAINS + 1)}, ()),
    ],
)
def test_other_values_are_refused(values, also):
    with pytest.raises(PayloadError) as refused:
        patients_of(values, also=also)
    assert "\n" not in str(refused.value)


def test_a_domain_is_called_by_its_site_outside():
    assert published_name("north", "t1.5") == "north.t1.5"
    assert published_name("n" * 31, "d" * 32) == "n" * 31 + "." + "d" * 32
    assert published_name("n" * 32, "d" * 32) is None


# --- tensors --------------------------------------------------------------------------------------


def test_experts_are_the_local_tensors_of_a_network_with_these_domains():
    study = study_of()
    domains = ("one", "two")
    network = build_network(study, domains, seed=3)
    local = Partition.of(network, study.plan.local).split(network.state_dict())[1]
    schema = PublicationForm.of(study).schema("experts", domains)
    assert {spec.name: spec.shape for spec in schema.tensors} == {
        name: tuple(tensor.shape) for name, tensor in local.items()
    }


@pytest.mark.parametrize("coordinates", [1, 8, 16])
def test_prototypes_have_so_many_numbers(coordinates):
    study = study_of(coordinates=coordinates)
    schema = PublicationForm.of(study).schema("prototypes", ("one", "two"))
    # Two statistics for each of the four channels of the first level.
    numbers = min(coordinates, 8)
    assert [(s.name, s.shape) for s in schema.tensors] == [
        ("prototype@one", (numbers,)),
        ("prototype@two", (numbers,)),
    ]


def test_the_length_of_a_descriptor_is_known_without_an_image():
    study = study_of()
    network = build_network(study, ("any",), seed=0)
    volume = torch.randn(1, 12, 16, 9, generator=torch.Generator().manual_seed(0))
    assert descriptor_length(study) == len(describe(network, volume)) == 8


def test_without_prototypes_there_is_no_frame():
    form = PublicationForm.of(study_of(prototypes=False))
    assert form.frame is None
    assert form.schema("prototypes", ("one",)).numel == 0


@pytest.mark.parametrize("numbers", [2, 7, 9])
def test_a_center_that_does_not_fit_the_network_is_refused(numbers):
    with pytest.raises(ConfigError, match="8 each"):
        PublicationForm.of(study_of(center=[0.0] * numbers))


@pytest.mark.parametrize("what", ["experts", "prototypes"])
def test_the_bound_holds_the_longest_honest_payload_and_not_much_more(what):
    form = PublicationForm.of(study_of())
    domains = [f"d{i:02d}" for i in range(MAX_DOMAINS)]
    schema = form.schema(what, domains)
    data = encode(
        kind=Kind.EXPERT,
        study="0" * 64,
        round=3,
        site="north",
        base="1" * 64,
        schema=schema,
        flat=torch.zeros(schema.numel),
        values=patient_values(dict.fromkeys(domains, 10)),
    )
    assert len(data) <= form.max_bytes(what) <= len(data) + (1 << 20) + 2048
    manifest, flat = decode(data, kind=Kind.EXPERT, schema=schema)
    assert set(patients_of(manifest.values)) == set(domains)
    assert flat.numel() == schema.numel
