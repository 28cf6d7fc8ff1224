"""Which labels a site learns from: all, those of a few patients, or none at all."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.bench import bench_of
from tests.support.nifti_files import nifti_bytes
from tests.unit.client.check_site import SHAPE, write_site
from uharmony_client import finale
from uharmony_client.case_table import Case, CaseTable
from uharmony_client.finale import play_finale
from uharmony_client.local_store import LocalStore, RoundKey
from uharmony_client.objective import LocalData
from uharmony_client.personal import UNLABELLED
from uharmony_client.site import Site
from uharmony_client.site_config import Labels, SiteConfig
from uharmony_client.site_models import site_entry
from uharmony_client.site_round import round_update
from uharmony_client.workbench import carried_after
from uharmony_model.errors import DataError
from uharmony_model.patches import draw_batch
from uharmony_model.schedule import finale_round
from uharmony_model.study import Study

PATIENTS = 8  # of two cases each: 5 to train on, 1 to validate, 2 to test
SPLITS = ["train"] * 5 + ["validation"] + ["test"] * 2


def study_of(study: Study, rule: str = "fixmatch", method: str = "fedavg", **changes) -> Study:
    content = study.model_dump() | {"method": method, **changes}
    content["training"] = {**content["training"], "local_steps": 2, "rounds": 1}
    content["unlabelled"] = {"rule": rule, "threshold": 0.51, "warm_up": 0}
    content["evaluation"] = {**content["evaluation"], "metrics": ("dice",)}
    return Study.model_validate(content)


def rows(without: tuple[int, ...] = (), splits: list[str] | None = None):
    """Cells of sixteen cases; the patients of `without` have no label, and so no split."""
    given = SPLITS if splits is None else splits
    cells: dict[int, Mapping[str, str]] = {}
    for number in range(2 * PATIENTS):
        patient = number // 2
        cells[number] = {"patient": f"q{patient}", "split": given[patient], "modality": "T1"}
        if patient in without:
            cells[number] = {**cells[number], "label": "", "split": ""}
    return cells


@pytest.fixture
def opened(config: SiteConfig, study: Study):
    """`opened(labels, rule)` is the site of sixteen cases under a rule."""

    def open_(labels: Labels, rule: str = "fixmatch", *, seed: int = 0, **table) -> Site:
        if not config.cases.exists():
            write_site(config, count=2 * PATIENTS, rows=rows(**table))
        here = config.model_copy(update={"labels": labels})
        return Site.open(here, study_of(study, rule, split_seed=seed))

    return open_


def taught(site: Site) -> set[str]:
    """The cases whose labels are learned from, by their images."""
    volumes = site.training_data().volumes
    return {name for name, volume in site.volumes.items() if any(volume is v for v in volumes)}


def patients(site: Site) -> set[str]:
    return {case.patient for case in site.table.cases if case.case in taught(site)}


def draw(site: Site, data: LocalData) -> torch.Tensor:
    study = site.study
    return draw_batch(data.unlabelled, study.task, study.training, 0, "north", 1, 0).image


def test_by_default_all_labels_of_the_training_split_are_learned_from(opened):
    site = opened("all")
    assert taught(site) == {f"c{number}" for number in range(10)}
    assert not site.training_data().unlabelled


def test_without_labels_every_training_case_is_unlabelled_and_none_of_another_split(opened):
    data = opened("none").training_data()
    assert (len(data.volumes), len(data.unlabelled), data.cases) == (0, 10, 10)
    assert all(not np.asarray(volume.label).any() for volume in data.unlabelled)
    assert all(len(volume.foreground) == 0 for volume in data.unlabelled)


@pytest.mark.parametrize("labels", ["none", 2])
def test_other_labels_of_unlabelled_cases_change_no_bit_of_a_round(opened, config, labels):
    first = opened(labels)
    learned = taught(first)
    other = np.zeros(SHAPE, "u1")
    other[:3, :3, :3] = 3
    for case in first.split("train"):
        if case.case not in learned:
            assert case.label is not None
            case.label.write_bytes(nifti_bytes(other))
    second = opened(labels)
    assert taught(second) == learned
    hidden = [case.case for case in second.split("train") if case.case not in learned]
    assert all((np.asarray(second.volumes[name].label) == 3).sum() == 27 for name in hidden)
    assert torch.equal(draw(first, first.training_data()), draw(second, second.training_data()))
    updates = []
    for number, site in enumerate((first, second)):
        here = dataclasses.replace(site, store=LocalStore(config.store / f"{number}"))
        updates.append(round_update(here, bench_of(site), 1))
    assert updates[0] == updates[1]


def test_few_labels_are_those_of_patients_drawn_by_the_split_seed(opened):
    drawn = {seed: patients(opened(2, seed=seed)) for seed in range(6)}
    for seed, found in drawn.items():
        assert len(found) == 2
        assert found <= {f"q{number}" for number in range(5)}
        assert len(taught(opened(2, seed=seed))) == 4  # both cases of each
    assert len({tuple(sorted(found)) for found in drawn.values()}) > 1
    assert patients(opened(2)) == drawn[0]
    assert patients(opened(1)) <= patients(opened(2)) <= patients(opened(3))
    assert len(patients(opened(99))) == 5


def test_the_order_of_the_table_does_not_matter(opened, config):
    found = patients(opened(2))
    heading, *lines = config.cases.read_text().splitlines()
    config.cases.write_text("\n".join([heading, *reversed(lines)]) + "\n")
    assert patients(opened(2)) == found


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_patients_without_a_label_are_not_drawn_under_any_rule(opened, labels):
    """The arm that learns from labels alone learns from the same patients as the others."""
    found = {rule: patients(opened(labels, rule, without=(0, 2))) for rule in ("none", "fixmatch")}
    assert found["none"] == found["fixmatch"]
    assert len(found["none"]) == labels
    assert found["none"] <= {"q1", "q3", "q4"}
    assert opened(labels, "fixmatch").training_data().cases == 10
    assert opened(labels, "none").training_data().cases == 6


def two_sites(folder: Path, config: SiteConfig) -> SiteConfig:
    """The table of two sites, north with its labels drawn and south beside it."""
    with config.cases.open(newline="") as file:
        content = list(csv.DictReader(file))
    more = [
        {**row, "case": f"s{row['case']}", "patient": f"s{row['patient']}", "site": "south"}
        for row in content
    ]
    path = folder / "both.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows([*more, *content])
    return config.model_copy(update={"name": "pooled", "cases": path})


def test_in_one_place_the_same_patients_are_learned_from(opened, config, study, tmp_path):
    alone = opened(2)
    both = two_sites(tmp_path, config)
    pooled = Site.open(
        both,
        study_of(study),
        own_cases_only=False,
        labels={"north": 2, "south": "none"},
    )
    assert taught(pooled) == taught(alone)
    assert pooled.training_data().cases == 20
    everybody = Site.open(
        both, study_of(study), own_cases_only=False, labels={"north": "none", "south": "all"}
    )
    assert taught(everybody) == {f"sc{number}" for number in range(10)}


# --- tables --------------------------------------------------------------------------------------


def case_of(name: str, patient: str, *, label: bool, split=None, site: str = "north") -> Case:
    image, path = (Path("i.nii"),), Path("l.nii") if label else None
    return Case(
        case=name, patient=patient, site=site, domain=site, image=image, label=path, split=split
    )


def test_a_patient_of_another_split_is_never_trained_on():
    table = CaseTable(
        cases=(
            case_of("a", "p1", label=True, split="test"),
            case_of("b", "p1", label=False),
            case_of("c", "p2", label=True, split="validation"),
            case_of("d", "p2", label=False),
            case_of("e", "p3", label=True, split="train"),
            case_of("f", "p3", label=False),
            case_of("g", "p4", label=False),
            case_of("h", "p4", label=False, split="test"),
            case_of("i", "p5", label=False),
            case_of("j", "p5x", label=True),  # labelled and in no split: nobody's decision here
            case_of("k", "p1", label=False, site="south"),
        )
    )
    found = {case.case: case.split for case in table.with_unlabelled().cases}
    kept = {"a": "test", "b": None, "c": "validation", "d": None, "h": "test", "g": None}
    assert found == {**kept, "e": "train", "f": "train", "i": "train", "j": None, "k": "train"}


@pytest.mark.parametrize("seed", range(3))
def test_the_splits_of_labelled_cases_stay_and_no_patient_is_in_two(study, seed):
    rng = np.random.default_rng(seed)
    cases = tuple(
        case_of(f"c{i}", f"p{rng.integers(12)}", label=bool(rng.integers(2))) for i in range(40)
    )
    plain = CaseTable(cases=cases).with_splits(study.evaluation, seed)
    wide = plain.with_unlabelled()
    where: dict[str, set[str]] = {}
    for before, after in zip(plain.cases, wide.cases, strict=True):
        assert before.label is None or before == after
        if after.split is not None:
            where.setdefault(after.patient, set()).add(after.split)
    assert all(len(splits) == 1 for splits in where.values())
    assert sum(c.split == "train" for c in wide.cases) > sum(
        c.split == "train" for c in plain.cases
    )


def test_a_table_without_any_label_is_an_unlabelled_site_under_a_rule(opened):
    everybody = tuple(range(PATIENTS))
    site = opened("all", "ust-run", without=everybody)
    data = site.training_data()
    assert (len(data.volumes), len(data.unlabelled)) == (0, 16)
    with pytest.raises(DataError, match="site north: no case is left to train on"):
        opened("all", "none")


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_the_finale_of_a_site_without_labels_keeps_the_federated_model(
    opened, study, monkeypatch, method
):
    site = opened("none", "ust-run")
    wanted = study_of(study, "ust-run", method, finale={"steps": 2, "candidates": ("whole", "own")})
    site = site.with_study(wanted)
    bench = bench_of(site)
    round_update(site, bench, 1)
    carried = carried_after(site, 1)
    assert {n.split("/")[1] for n in carried if n.startswith(UNLABELLED)} >= {"teacher"}
    entry, own = site_entry(site, carried)
    assert own is None
    assert entry.keys() == set(bench.partition.local_names)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("evaluate_split", "run_steps"):
        monkeypatch.setattr(finale, name, forbidden)
    key = RoundKey(site.study.digest, finale_round(site.study), bench.base)
    choice = play_finale(
        site,
        bench.network,
        bench.partition,
        bench.shared,
        carried,
        key,
        alone=forbidden,  # type: ignore[arg-type]
    )
    assert (choice.kept, choice.validation) == ("federated", {})
    merged = bench.partition.merge(bench.shared, entry)
    assert choice.model.state.keys() == merged.keys()
    assert all(torch.equal(choice.model.state[k], merged[k]) for k in merged)


def test_a_site_that_has_labels_somewhere_would_have_had_to_choose(opened, study, monkeypatch):
    """The counterpart: with labels the same finale trains."""
    site = opened(2, "ust-run").with_study(
        study_of(study, "ust-run", finale={"steps": 1, "candidates": ("whole", "federated")})
    )
    bench = bench_of(site)
    round_update(site, bench, 1)
    key = RoundKey(site.study.digest, finale_round(site.study), bench.base)
    carried = carried_after(site, 1)
    args = (site, bench.network, bench.partition, bench.shared, carried, key)
    assert play_finale(*args).validation.keys() == {"federated", "whole"}
