"""The study: unknown keys, sensible refusals, a digest that follows the content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from tests.support.tiny import study_content, tiny_study
from uharmony_model.errors import ConfigError
from uharmony_model.frozen import parse
from uharmony_model.methods import METHODS
from uharmony_model.study import Study, load_study

ROOT = Path(__file__).resolve().parents[3]


def test_the_digest_follows_every_change_and_survives_json():
    study = tiny_study()
    assert Study.model_validate_json(study.canonical_json()).digest == study.digest
    changed = [
        tiny_study(seed=1),
        tiny_study(method="fedavg"),
        tiny_study(training={"rounds": 4}),
        tiny_study(task={"classes": {"blob": 2}}),
        tiny_study(evaluation={"metrics": ["dice"]}),
    ]
    assert len({s.digest for s in [study, *changed]}) == 6


def test_what_a_study_asks_for_by_name():
    five = ("dice", "surface_dice", "hd95_mm", "lesion_recall", "fp_per_case")
    assert tiny_study().asks == (*five, "cases", "loss")
    fewer = {"metrics": ["hd95_mm", "dice"]}
    study = tiny_study(evaluation=fewer, federation={"weighting": "equal"})
    assert study.asks == ("dice", "hd95_mm", "loss")
    other_order = tiny_study(
        evaluation={"metrics": ["dice", "hd95_mm"]}, federation={"weighting": "equal"}
    )
    assert other_order.digest == study.digest


def test_the_order_of_classes_is_part_of_the_study_and_that_of_modalities_is_not():
    two = [tiny_study(task={"classes": c}) for c in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    assert two[0].digest != two[1].digest
    policies = {"MR": {"policy": "zscore"}, "CT": {"policy": "window"}}
    backwards = dict(reversed(policies.items()))
    same = [tiny_study(task={"intensity": i}) for i in (policies, backwards)]
    assert same[0].digest == same[1].digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"epochs": 2}}, "training.epochs"),
        ({"training": {"rounds": 0}}, "training.rounds"),
        ({"method": "fedsgd"}, "known: local"),
        ({"task": {"classes": {}}}, "at least one class"),
        ({"task": {"classes": {"a": 1, "b": 1}}}, "overlapping: true"),
        ({"task": {"classes": {"a": 0}}}, "classes"),
        ({"task": {"intensity": {"CT": {"policy": "window", "low": 9, "high": 1}}}}, "below high"),
        ({"task": {"intensity": {"MR": {"policy": "nyul"}}}}, "nyul"),
        ({"evaluation": {"validation": 0.5, "test": 0.5}}, "nothing is left"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"name": "../etc"}, "name"),
        ({"evaluation": {"metrics": ["dice", "dice"]}}, "twice"),
        ({"evaluation": {"metrics": ["age"]}}, "metrics"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(changes, words):
    with pytest.raises(ConfigError) as refused:
        parse(Study, study_content(**changes), "study.yaml")
    assert "\n" not in str(refused.value)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b\n", "name: [\n", "a: &x [1]\nb: *x\n", "a: !!python/object:os.system {}\n"],
)
def test_yaml_that_is_no_plain_mapping_is_refused(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_study(path)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_examples_are_studies(path):
    study, simulation = load_study(path)
    assert study.name == path.stem
    assert simulation


def test_the_documentation_names_every_key():
    text = (ROOT / "docs/study.md").read_text()

    def names(model: type[BaseModel]) -> set[str]:
        found = set(model.model_fields)
        for field in model.model_fields.values():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= names(kind)
        return found

    assert [name for name in sorted(names(Study)) if name not in text] == []


def test_variants_of_a_study_share_one_local_only_model():
    variants = [
        tiny_study(),
        tiny_study(method="fedprox", training={"proximal": 1.0, "head_share": 0.2}),
        tiny_study(network={"harmonization": {"order": 2, "residuals": ["head"]}}),
        tiny_study(federation={"server_rate": 0.5, "momentum": 0.5}),
    ]
    assert len({study.with_method("local").digest for study in variants}) == 1
    assert len({study.with_method("uharmony").digest for study in variants}) == 4
    longer = tiny_study(training={"local_steps": 9}).with_method("local")
    assert longer.digest != variants[0].with_method("local").digest


@pytest.mark.parametrize(
    ("method", "norm", "shares"),
    [
        ("fedavg-bn", "instance", True),
        ("fedavg", "batch", True),
        ("fedper", "batch", True),
        ("fedavg", "instance", False),
        ("fedbn", "batch", False),
        ("silobn", "instance", False),
        ("gperxan", "instance", False),
        ("uharmony", "batch", False),
        ("local", "batch", False),
    ],
)
def test_no_momentum_steps_shared_running_variances(method, norm, shares):
    """Momentum 0.5 makes of a fall from 1 to 0.2 a variance of 1 - 0.8 - 0.5 * 0.8 = -0.2."""
    changes = {"method": method, "network": {"norm": norm}}
    tiny_study(**changes)
    if shares:
        with pytest.raises(ValidationError, match=r"federation\.momentum would step"):
            tiny_study(**changes, federation={"momentum": 0.5})
    else:
        tiny_study(**changes, federation={"momentum": 0.5})


def test_methods_that_keep_residuals_and_nothing_else():
    assert {name for name, method in METHODS.items() if method.keeps_residuals} == {"uharmony"}


@pytest.mark.parametrize(
    ("method", "rule", "message"),
    [
        ("u2net", "glua", "u2net does not say where its deepest level is"),
        ("fedavg", "adabn", "adabn adapts running statistics"),
        ("uharmony", "adabn", "adabn adapts running statistics"),
        ("fedavg-bn", "adabn", "statistics that stay at each site"),
    ],
)
def test_a_rule_that_the_network_cannot_follow_is_refused(method, rule, message):
    with pytest.raises(ValidationError, match=message):
        tiny_study(method=method, unlabelled={"rule": rule})


OVERLAPPING = {"classes": {"whole": [1, 2], "core": 2}, "overlapping": True}


@pytest.mark.parametrize(("rounds", "asked", "found"), [(1, 2, 0), (2, 2, 1), (3, 2, 2), (3, 9, 2)])
def test_a_warm_up_ends_before_the_last_round(rounds, asked, found):
    study = tiny_study(
        method="ust-run-fed", unlabelled={"warm_up": asked}, training={"rounds": rounds}
    )
    assert study.warm_up == found


def test_overlapping_classes_are_not_queued_so_a_federation_says_that_it_needs_no_queue():
    with pytest.raises(ValidationError, match="overlapping classes are not queued"):
        tiny_study(method="ust-run-fed", task=OVERLAPPING)
    for unlabelled in ({"queue": False}, {"copy_paste": False}):
        tiny_study(method="ust-run-fed", task=OVERLAPPING, unlabelled=unlabelled)
    for method in ("ust-run", "fixmatch-fed", "glua-fed"):
        tiny_study(method=method, task=OVERLAPPING)


def test_rules_are_the_methods_or_else_the_studys():
    assert tiny_study(method="silobn", unlabelled={"rule": "adabn"}).rule == "adabn"
    assert tiny_study(method="ust-run-fed", unlabelled={"rule": "fixmatch"}).rule == "ust-run"
    assert tiny_study(method="labelled-only-fed", unlabelled={"rule": "fixmatch"}).rule == "none"
    assert tiny_study(method="labelled-only-fed").takes_unlabelled
    assert not tiny_study(method="fedavg").takes_unlabelled
    batch = tiny_study(method="silobn", unlabelled={"rule": "adabn"})
    assert batch.with_method("local").rule == "none"


def test_a_study_without_unlabelled_cases_is_as_before_there_were_any():
    plain = tiny_study()
    assert "unlabelled" not in json.loads(plain.canonical_json())
    assert "unlabelled" in json.loads(tiny_study(unlabelled={"rule": "fixmatch"}).canonical_json())


def test_the_view_of_steps_without_residuals_is_named_where_it_is_chosen():
    def layer(study: Study) -> dict[str, object]:
        found: dict[str, object] = json.loads(study.canonical_json())["network"]["harmonization"]
        return found

    assert "unseen_view" not in layer(tiny_study())
    chosen = {"harmonization": {"unseen_view": "strong"}}
    assert layer(tiny_study(network=chosen))["unseen_view"] == "strong"
    assert "unseen_view" not in layer(tiny_study(network=chosen).with_method("local"))


def test_views_are_named_where_they_are_chosen():
    def training(study: Study) -> dict[str, object]:
        found: dict[str, object] = json.loads(study.canonical_json())["training"]
        return found

    assert not {"views", "view_share"} & set(training(tiny_study()))
    chosen = training(tiny_study(training={"views": "strong"}))
    assert (chosen["views"], chosen["view_share"]) == ("strong", 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"views": "strong"}}, "leave network.harmonization.unseen_view at plain"),
        ({"network": {"harmonization": {"domain_dropout": 0}}}, "give domain_dropout more than 0"),
        ({"unlabelled": {"rule": "ust-run"}}, "ust-run makes its own views"),
        ({"method": "uharmony", "unlabelled": {"rule": "glua"}}, "glua makes its own views"),
    ],
)
def test_a_view_that_nothing_would_see_is_refused(changes, said):
    layer = changes.get("network", {}).get("harmonization", {})
    network = {"harmonization": {"unseen_view": "inverted", **layer}}
    with pytest.raises(ValidationError, match=said):
        tiny_study(**{"method": "uharmony", **changes, "network": network})
    tiny_study(network={"harmonization": {"unseen_view": "inverted"}}, method="fedavg-revin")
