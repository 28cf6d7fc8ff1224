"""Forms of alignment in a study: what they ask for, what is refused, what older studies say."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from tests.support.tiny import tiny_study
from uharmony_client.policy import SHAREABLE, Policy, differences, shared_parts, statistics_view
from uharmony_model.bundle import load_bundle, save_bundle
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_weights
from uharmony_model.methods import METHODS, Part
from uharmony_model.networks import build_network, training_network

CODES = {"style": "codes"}


@pytest.mark.parametrize(
    ("method", "unlabelled", "wanted"),
    [
        ("glua-fed", CODES, ("codes", "prototypes")),
        ("glua-fed", {**CODES, "align": "off"}, ("codes",)),
        ("glua-fed", {"align": "off"}, ("amplitude",)),
        ("glua-fed", {"align": "off", "amplitude": "off"}, ()),
        ("glua-fed", {**CODES, "amplitude": "off"}, ("prototypes",)),
        ("uharmony", {"rule": "glua", **CODES}, ("codes", "prototypes")),
        ("glua-fed", {"align": "discriminator"}, ("amplitude", "discriminator")),
        ("uharmony", {"rule": "glua", "align": "discriminator"}, ("amplitude", "discriminator")),
        ("glua", {"align": "discriminator"}, ()),
        ("local", {"rule": "glua", "align": "discriminator"}, ()),
        ("ust-run-fed", CODES, ("amplitude",)),  # it has no codes
        ("ust-run-fed", {"align": "off"}, ("amplitude",)),
        ("glua", CODES, ()),  # all cases lie in one place
    ],
)
def test_what_sites_are_asked_for(method, unlabelled, wanted):
    assert tiny_study(method=method, unlabelled=unlabelled).statistics == wanted


@pytest.mark.parametrize(
    ("method", "unlabelled", "learns"),
    [
        ("glua", CODES, True),
        ("glua-fed", CODES, True),
        ("uharmony", {"rule": "glua", **CODES}, True),
        ("glua", {}, False),
        ("glua", {**CODES, "amplitude": "off"}, False),
        ("fixmatch", CODES, False),
        ("labelled-only", {"rule": "glua", **CODES}, False),
    ],
)
def test_an_autoencoder_is_trained_where_styles_are_codes(method, unlabelled, learns):
    study = tiny_study(method=method, unlabelled=unlabelled)
    assert study.learns_styles is learns
    assert (Part.STYLE in study.parts) is learns
    assert (study.style_rounds > 0) is learns
    network = training_network(study, ("x",), seed=0)
    assert (network.style is not None) is learns
    found = Partition.of(network, study.plan.local).parts
    assert {k for k, part in found.items() if part is Part.STYLE} == {
        k for k in network.state_dict() if k.startswith("style.")
    }
    assert (Part.STYLE in found.values()) is learns
    assert build_network(study, ("x",), seed=0).style is None


@pytest.mark.parametrize(("rounds", "wanted"), [(2, 1), (4, 1), (5, 2), (32, 8)])
def test_it_learns_in_a_quarter_of_the_rounds(rounds, wanted):
    study = tiny_study(method="glua-fed", unlabelled=CODES, training={"rounds": rounds})
    assert study.style_rounds == wanted
    longer = {**CODES, "style_rounds": 1}
    study = tiny_study(method="glua-fed", unlabelled=longer, training={"rounds": rounds})
    assert study.style_rounds == 1


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("glua", {"unlabelled": {**CODES, "style_rounds": 3}}, "3 of 3 rounds"),
        ("glua", {"unlabelled": CODES, "training": {"rounds": 1}}, "1 of 1 rounds"),
        ("glua-fed", {"unlabelled": CODES, "federation": {"momentum": 0.5}}, "came to rest"),
        ("fedadam", {"unlabelled": {"rule": "glua", **CODES}}, "came to rest"),
    ],
)
def test_what_cannot_be_followed_is_refused(method, changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny_study(method=method, **changes)


def test_settings_of_another_rule_refuse_nothing():
    """A lab sets them for all its arms, whatever their methods."""
    for method in METHODS:
        if METHODS[method].unlabelled not in ("glua", None):
            tiny_study(
                method=method, unlabelled={**CODES, "align": "discriminator", "style_rounds": 99}
            )
    assert tiny_study(method="glua", unlabelled={"align": "discriminator"}).learns_styles is False


def test_an_older_study_says_nothing_of_them():
    """Its digest is what sites have approved."""
    settings = {"min_patients": 3}
    study = tiny_study(method="glua-fed", unlabelled=settings)
    said = json.loads(study.canonical_json())["unlabelled"]
    assert not said.keys() & {"style", "style_rounds", "align"}
    assert said["min_patients"] == 3
    for change in (CODES, {"align": "off"}, {"style_rounds": 1}):
        other = tiny_study(method="glua-fed", unlabelled={**settings, **change})
        assert json.loads(other.canonical_json())["unlabelled"].keys() - said.keys() == set(change)
        assert other.digest != study.digest
        assert type(other).model_validate_json(other.canonical_json()) == other


# --- the policy -----------------------------------------------------------------------------------


def test_an_autoencoder_leaves_only_where_the_policy_names_it():
    study = tiny_study(method="glua-fed", unlabelled=CODES)
    assert Part.STYLE in shared_parts(study)
    (line,) = differences(Policy(), study)
    assert line == "method glua-fed shares style_autoencoder, policy.share does not allow it"
    assert differences(Policy(share=SHAREABLE), study) == []
    assert differences(Policy(), tiny_study(method="glua-fed")) == []


def test_a_gradient_is_shown_in_words():
    study = tiny_study(method="glua-fed", unlabelled={"amplitude": "off", "align": "discriminator"})
    denied = "no discriminator, policy.statistics does not name it"
    assert statistics_view(Policy(), study) == denied
    given = statistics_view(Policy(statistics=("discriminator",), min_cases=12), study)
    assert given.startswith("a gradient over 12 training patients or more ")


def test_codes_are_shown_in_words():
    study = tiny_study(method="glua-fed", unlabelled={**CODES, "align": "off"})
    assert statistics_view(Policy(), study) == "no codes, policy.statistics does not name them"
    given = statistics_view(Policy(statistics=("codes",), min_cases=12), study)
    assert given.startswith("mean and deviation of style codes of 12 training patients or more, ")
    assert "16 numbers, once" in given


# --- what is handed out ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["glua-fed", "uharmony"])
def test_a_model_is_handed_out_without_the_autoencoder(tmp_path, method):
    study = tiny_study(method=method, unlabelled={"rule": "glua", **CODES})
    schema, weights = initial_weights(study)
    shared = unflatten(weights, schema)
    assert any(name.startswith("style.") for name in shared)
    local = Partition.of(training_network(study, ("x",), seed=0), study.plan.local)
    entry = local.split(training_network(study, ("x",), seed=0).state_dict())[1]
    save_bundle(tmp_path / "model", study, shared, {"here": entry}, {"here": ("x",)})
    for site in ("here", None):
        model = load_bundle(tmp_path / "model", site)
        assert not any(name.startswith("style.") for name in model.network.state_dict())
        for name, tensor in model.network.state_dict().items():
            if name in shared:
                assert (tensor == shared[name]).all()
