"""What a hospital without labels is told, and what is never said of it: a Dice it cannot have."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console, RenderableType

from tests.support.tiny import tiny_study, write_folder
from tests.unit.client.check_site import codes, page
from uharmony_client.alone import alone_model, train_alone
from uharmony_client.check import Report, run_check
from uharmony_client.check.leaving import carried_bytes, generation_bytes, what_leaves
from uharmony_client.dry_run import dry_run
from uharmony_client.dry_run import render as dry_run_view
from uharmony_client.evaluate import evaluate_split, measure_volume, summarise
from uharmony_client.finale_plan import finale_steps, finale_view, learning_view, values_asked
from uharmony_client.home import Home
from uharmony_client.join import study_view
from uharmony_client.learning import objective_of
from uharmony_client.results_view import results_json, results_view
from uharmony_client.site import Site
from uharmony_client.site_config import Labels, SiteConfig, load_site
from uharmony_client.site_models import keep_federated_model
from uharmony_client.site_report import write_site_report
from uharmony_client.site_results import compare, evaluate_site
from uharmony_client.training_steps import run_steps
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_weights
from uharmony_model.networks import build_network
from uharmony_model.study import Study

COUNT, SIZE = 10, 8
TRAINING = {"rounds": 4, "local_steps": 2, "batch_size": 2, "patch": [8, 8, 8]}


def study_of(method: str = "ust-run-fed", **changes: object) -> Study:
    return tiny_study(method=method, **{"training": TRAINING, **changes})


@pytest.fixture(autouse=True)
def _user(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten cases of the site alpha, with labels beside them."""
    return write_folder(tmp_path_factory.mktemp("data") / "volumes", {"alpha": COUNT}, SIZE)


def table(data: Path, path: Path, *, labels: int = 0, splits: dict[int, str] | None = None) -> Path:
    """A table whose first cases have their labels, and splits where they are written."""
    with path.open("w", newline="") as file:
        columns = ["case", "patient", "site", "modality", "image", "label", "split"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for number in range(COUNT):
            name = f"alpha_{number}.nii.gz"
            label = str(data / "labels" / name) if number < labels else ""
            row = {"case": f"c{number}", "patient": f"p{number}", "site": "alpha", "modality": "MR"}
            files = {"image": str(data / "images" / name), "label": label}
            writer.writerow({**row, **files, "split": (splits or {}).get(number, "")})
    return path


def site_of(
    data: Path,
    folder: Path,
    may: Labels = "all",
    *,
    labels: int = 0,
    splits: dict[int, str] | None = None,
) -> SiteConfig:
    """The site over such a table; `may` is what site.yaml says of its labels."""
    table(data, folder / "cases.csv", labels=labels, splits=splits)
    content: dict[str, object] = {"name": "alpha", "cases": "cases.csv", "store": "store"}
    content |= {"labels": may, "resources": {"device": "cpu"}}
    (folder / "site.yaml").write_text(yaml.safe_dump(content))
    return load_site(folder / "site.yaml")


def text_of(view: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        console.print(view)
    return " ".join(shown.get().split())


def details(report: Report, code: str) -> list[str]:
    return [d.text for f in report.findings if f.rule.code == code for d in f.details]


# --- check ---------------------------------------------------------------------------------------


def test_under_a_rule_all_cases_are_training_cases_and_nothing_is_amiss(data, tmp_path):
    report = run_check(site_of(data, tmp_path), study_of())
    assert report.exit_code == 0, page(report)
    assert (dict(report.splits), report.unlabelled) == ({"train": COUNT}, COUNT)
    assert {"U412", "U414"} <= codes(report)
    assert not codes(report) & {"U404", "U408", "U409", "U410"}
    assert len(details(report, "U412")) == COUNT
    text = page(report)
    assert f"{COUNT} of train are taken without a label" in text
    assert "class  cases" not in text  # no label was read, so no voxel was counted


def test_a_study_that_learns_from_labels_alone_says_in_one_line_what_to_do(data, tmp_path):
    report = run_check(site_of(data, tmp_path), study_of("fedavg"))
    (finding,) = [f for f in report.findings if f.rule.severity.word == "error"]
    assert (finding.rule.code, report.unlabelled) == ("U408", 0)
    assert "label patients" in finding.rule.remedy
    assert "ust-run-fed" in finding.rule.remedy
    assert "\n" not in finding.rule.remedy
    assert not codes(report) & {"U409", "U410", "U412", "U414"}  # that one line says it all
    assert set(details(report, "U404")) == {"left out: the study learns from labels alone"}


@pytest.mark.parametrize(
    ("method", "code", "exit_code"),
    [("ust-run-fed", None, 0), ("fedavg", "U408", 11), ("labelled-only-fed", "U415", 0)],
)
def test_labels_that_may_not_be_trained_on(data, tmp_path, method, code, exit_code):
    # 10 patients, test 0.3 and validation 0.2: 3, 2, and 5 to train on.
    report = run_check(site_of(data, tmp_path, "none", labels=COUNT), study_of(method))
    assert codes(report) & {"U408", "U415"} == ({code} if code else set())
    assert report.exit_code == exit_code, page(report)
    assert "0 of 5 training patients" in details(report, "U413")[0]
    assert report.unlabelled == (5 if method == "ust-run-fed" else 0)
    assert report.classes["blob"].cases == COUNT  # their labels measure all the same


@pytest.mark.parametrize(("labels", "told"), [(2, ["2 of 5"]), (5, []), (99, []), ("all", [])])
def test_some_labels_are_told_by_patients(data, tmp_path, labels, told):
    report = run_check(site_of(data, tmp_path, labels, labels=COUNT), study_of())
    assert [text.split("; ")[1][:6] for text in details(report, "U413")] == told
    assert not codes(report) & {"U408", "U412"}


def test_a_case_whose_patient_is_tested_is_left_out(data, tmp_path):
    splits = {0: "train", 1: "test", 9: "test"}
    config = site_of(data, tmp_path, labels=2, splits=splits)
    report = run_check(config, study_of())
    assert details(report, "U404")[0].startswith("left out: its patient")
    assert len(details(report, "U412")) == 7
    assert report.unlabelled == 7


def test_without_a_study_nothing_is_said_of_training(data, tmp_path):
    report = run_check(site_of(data, tmp_path), None)
    assert set(details(report, "U404")) == {"no label"}
    assert "trained on" not in next(f.rule.remedy for f in report.findings if f.rule.code == "U404")


def test_a_damaged_case_is_left_out_as_training_will(data, tmp_path):
    """The quarantine counts cases without a label as training does, or nothing could be left."""
    config = site_of(data, tmp_path)
    broken = tmp_path / "broken.nii"
    broken.write_bytes(b"")
    config.cases.write_text(
        config.cases.read_text().replace(str(data / "images" / "alpha_3.nii.gz"), str(broken))
    )
    report = run_check(config, study_of())
    assert "U190" not in codes(report)
    assert (report.quarantined, report.unlabelled) == (1, COUNT - 1)
    assert len(Site.open(config, study_of()).training_data().unlabelled) == COUNT - 1


# --- room ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ust-run-fed", "mean-teacher-fed", "fixmatch-fed", "glua-fed"])
@pytest.mark.parametrize("labels", ["all", "none"])
def test_there_is_room_for_what_is_carried(data, tmp_path, method, labels):
    """Against what an objective gives to be carried, with the queue and the hardest patch full."""
    study = study_of(method, unlabelled={"queue_size": 2, "queue_threshold": 1.0})
    config = site_of(data, tmp_path, labels, labels=6)
    site = Site.open(config, study)
    objective = objective_of(site.training_data(), study)
    assert objective is not None
    network = build_network(study, site.domains, seed=0)
    rate = torch.optim.SGD(network.parameters(), lr=1e-3)
    run_steps(network, rate, objective, study, round_=1, count=2, rate=lambda _: 1e-3)
    found = sum(v.numel() * v.element_size() for v in objective.outlives().values())
    leaving, _ = what_leaves(config, study, site.domains)
    assert leaving is not None
    small = 4096  # means of features, numbers beside the patches
    assert found <= carried_bytes(leaving, study) + small
    plain = study_of("fedavg")
    more = generation_bytes(leaving, study) - generation_bytes(leaving, plain)
    assert more == 4 * carried_bytes(leaving, study)  # three generations and the checkpoint


def test_the_queue_is_counted_by_its_patches(config):
    study = study_of(unlabelled={"queue_size": 7})
    leaving, _ = what_leaves(config, study, ("north",))
    assert leaving is not None
    model = 4 * (leaving.scalars + leaving.stays)
    # 8^3 voxels: 7 images with a byte of label; one with classes of 8 bytes and a flag.
    assert carried_bytes(leaving, study) == model + 512 * (7 * 5 + (4 + 8 + 1))
    off = study_of(unlabelled={"queue": False, "hardest": False})
    assert carried_bytes(leaving, off) == model


# --- join ----------------------------------------------------------------------------------------


def test_what_is_approved_names_what_is_learned_from_given_and_kept(data, tmp_path):
    home = Home(site_of(data, tmp_path), tmp_path / "site.yaml")
    text = text_of(study_view(study_of(finale={"steps": 4}), home))
    for words in (
        "cases without a label, by ust-run",
        "in the first 2 rounds only sites with labels count",
        "loss, taught, kept",
        "no amplitude, policy.statistics does not name it",
        "after the last round nothing is trained",
        "a teacher",
        "up to 11 patches of images",
    ):
        assert words in text, words
    assert "local, " not in text  # no model is trained alone
    plain = text_of(study_view(study_of("fedavg"), home))
    assert "this site trains on none; label patients" in plain
    assert "teacher" not in plain


def test_a_table_that_cannot_be_read_does_not_hinder_the_look_at_a_study(config, tmp_path):
    text = text_of(study_view(study_of(), Home(config, tmp_path / "site.yaml")))
    assert "cases with and without a label, by ust-run" in text


def test_a_site_without_labels_trains_nothing_at_home():
    study = study_of(finale={"steps": 4})
    assert finale_steps(study, labelled=False) == {}
    assert "nothing is trained" in finale_view(study, labelled=False)
    assert "no finale" in finale_view(study_of(), labelled=False)


def test_what_taught_leaves_under_every_study():
    assert "taught" not in values_asked(study_of("fedavg"))
    assert values_asked(study_of("fedavg"), labelled=False)[-1] == "taught"
    assert values_asked(study_of(), labelled=False).count("taught") == 1


@pytest.mark.parametrize(("rounds", "words"), [(0, None), (1, "the first round"), (3, "3 rounds")])
def test_the_warm_up_is_told(rounds, words):
    text = learning_view(study_of(unlabelled={"warm_up": rounds}), labelled=False)
    assert (words in text) if words else ("only sites with labels" not in text)


# --- dry-run -------------------------------------------------------------------------------------


def test_a_dry_run_says_from_what_it_learned(data, tmp_path):
    found = dry_run(Site.open(site_of(data, tmp_path), study_of()))
    assert (found.steps, found.labelled, found.unlabelled) == (2, 0, COUNT)
    text = text_of(dry_run_view(found))
    assert "statistics beside it: no amplitude" in text
    assert "only sites with labels count" in text


def test_a_dry_run_that_trains_nothing_says_so(data, tmp_path):
    config = site_of(data, tmp_path, "none", labels=COUNT)
    found = dry_run(Site.open(config, study_of("fedavg")))
    assert (found.steps, found.labelled) == (0, 0)
    assert found.values["taught"] == 0
    assert "nothing was trained, every number is 0" in text_of(dry_run_view(found))


# --- measuring -----------------------------------------------------------------------------------


def with_model(config: SiteConfig, study: Study) -> tuple[Site, Path]:
    site = Site.open(config, study)
    schema, weights = initial_weights(study)
    return site, keep_federated_model(site, unflatten(weights, schema), 0)


def test_a_test_case_without_a_label_gives_no_row(data, tmp_path):
    splits = {0: "train", 1: "test", 9: "test"}
    study = study_of()
    site = Site.open(site_of(data, tmp_path, labels=2, splits=splits), study)
    assert [case.case for case in site.split("test")] == ["c1", "c9"]
    network = build_network(study, site.domains, seed=0)
    rows = evaluate_split(network, site, "test", round_=1, slow=True)
    assert {row.case for row in rows} == {"c1"}
    assert summarise(evaluate_split(network, site, "validation", round_=1, slow=True), site) == {}
    with pytest.raises(DataError, match="without a label"):
        measure_volume(
            network,
            site.volumes["c9"],
            study,
            domain=0,
            device=site.device,
            annotated=site.annotated,
        )


def test_where_no_case_has_a_label_nothing_is_measured_and_that_is_said(data, tmp_path):
    site, model = with_model(site_of(data, tmp_path), study_of())
    train_alone(site)
    with pytest.raises(ConfigError, match="nothing can be measured here") as caught:
        evaluate_site(site, model)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not list(site.evaluations.glob("test-*.csv"))


def test_no_label_among_the_test_cases_is_told_apart(data, tmp_path):
    splits = {0: "train", 1: "train", 9: "test"}
    site, model = with_model(site_of(data, tmp_path, labels=2, splits=splits), study_of())
    train_alone(site)
    with pytest.raises(ConfigError, match="no test case to compare on"):
        evaluate_site(site, model)


def test_no_model_that_was_never_trained_is_compared_with(data, tmp_path):
    """Labels that are kept out of training measure the federation's model, and that alone."""
    study = study_of()
    site, model = with_model(site_of(data, tmp_path, "none", labels=COUNT), study)
    assert not alone_model(site).exists()
    results = evaluate_site(site, model)
    assert not results.own
    # 3 of 10 patients are tested; their mean Dice is that of the rows, and no difference is.
    dice = [row.dice for row in results.federated if row.dice is not None]
    assert (results.overall.n, results.overall.patients, len(dice)) == (3, 3, 3)
    assert results.overall.federated.mean == pytest.approx(sum(dice) / 3)
    assert (results.overall.alone.mean, results.overall.difference.mean) == (None, None)
    assert [pair.difference for pair in results.cases] == [None] * 3
    text = text_of(results_view(results))
    assert "no model of its own to compare with" in text
    assert "undecided" not in text
    assert '"local_only": false' in results_json(results)
    write_site_report(tmp_path / "report.html", site, results)
    html = (tmp_path / "report.html").read_text()
    assert "no model of its own to compare with" in html
    assert "local-only" not in html.split("<body>")[1]
    assert "<div><dt>of them without a label</dt><dd>5</dd></div>" in html


def test_a_class_that_no_case_shows_has_no_value_without_a_model_beside_it(data, tmp_path):
    site, model = with_model(site_of(data, tmp_path, "none", labels=COUNT), study_of())
    rows = evaluate_site(site, model).federated
    none = [dataclasses.replace(row, dice=None) for row in rows]
    found = compare(site, none, None, round_=1, federated_model=model)
    assert (found.overall.federated.mean, found.overall.n, found.cases) == (None, 0, ())
