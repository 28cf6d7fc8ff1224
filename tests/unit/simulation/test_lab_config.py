"""A study's file: which cells and tasks it declares, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.support.tiny import study_content, tiny_study
from uharmony_model.errors import ConfigError
from uharmony_simulation.config import FolderSource, Simulation
from uharmony_simulation.lab import _chains, affordable, plan
from uharmony_simulation.lab_config import (
    Cell,
    Grid,
    Lab,
    changed_study,
    conditions,
    load_lab,
)
from uharmony_simulation.lab_task import Task

RANDOM = Simulation.model_validate(
    {"source": {"kind": "folder", "sites_from": "random", "random_sites": 4}}
)


def lab(**changes) -> Lab:
    return Lab.model_validate({"name": "lab", "study": "s.yaml", "arms": ["fedavg"], **changes})


def test_every_combination_of_the_grid_is_a_cell_once():
    grid = Grid(shift=("noise", "none"), strength=(1.0, 2.0), sites=(2, 3))
    names = [cell.name for cell in grid.cells()]
    assert names == [
        *("noise-1_sites-2", "noise-1_sites-3", "noise-2_sites-2", "noise-2_sites-3"),
        *("none_sites-2", "none_sites-3"),  # without a shift its strength says nothing
    ]
    assert grid.cells()[0].title == "noise 1, sites 2"


def test_a_plan_has_every_arm_seed_and_fold_of_every_cell_and_the_reference_first():
    declared = lab(
        arms=["uharmony", "local"],
        seeds=[3, 5],
        folds=2,
        grid={"strength": [1, 2], "shift": ["bias"]},
    )
    groups = plan(declared, tiny_study(), RANDOM)
    assert [[task.arm.name for task in group] for group in groups] == [["local", "uharmony"]] * 8
    found = {(t.cell.name, t.seed, t.fold, t.arm.name) for group in groups for t in group}
    assert len(found) == 16
    assert len({str(task.declared) for group in groups for task in group}) == 16
    for group in groups:
        assert len({(t.cell.name, t.seed, t.fold) for t in group}) == 1


def test_only_what_a_site_trains_alone_is_waited_for():
    """Longer arms are compared with a longer local-only model: that one alone holds them up."""
    longer = {"training.rounds": 9}
    arms = [
        "fedavg",
        "uharmony",
        {"name": "ordered", "method": "uharmony", "set": {"network.harmonization.order": 2}},
        {"name": "fedavg-9", "method": "fedavg", "set": longer},
        {"name": "local-9", "method": "local", "set": longer},
        "local",
    ]
    (group,) = plan(lab(arms=arms), tiny_study(), RANDOM)

    def chains(*done: str) -> list[list[str]]:
        names = {task.arm.name: task.name for task in group}
        found = _chains(group, [names[name] for name in done])
        return [[task.arm.name for task in chain] for chain in found]

    assert chains() == [["local", "fedavg", "uharmony", "ordered"], ["local-9", "fedavg-9"]]
    assert chains("local") == [["fedavg"], ["uharmony"], ["ordered"], ["local-9", "fedavg-9"]]
    assert chains("fedavg", "local-9") == [["local", "uharmony", "ordered"], ["fedavg-9"]]


def test_a_study_with_settings_of_its_own_still_trains_its_sites_alone_first():
    """The local arm is known by its method: what does not matter to it may be set all the same."""
    for changed in ({"network": {"harmonization": {"order": 2}}}, {"unlabelled": {"weight": 2.0}}):
        (group,) = plan(lab(arms=["fedavg", "local"]), tiny_study(**changed), RANDOM)
        chains = [[task.arm.name for task in chain] for chain in _chains(group, ())]
        assert chains == [["local", "fedavg"]]
    twice = [{"name": "local-2", "method": "local", "set": {"network.harmonization.order": 2}}]
    with pytest.raises(ConfigError, match="one study under two names"):
        plan(lab(arms=["local", *twice]), tiny_study(), RANDOM)


def test_the_one_site_with_labels_does_not_miss_rounds():
    _, study, simulation = load_lab(Path("examples/studies/hippocampus-few-labels.yaml"))
    with pytest.raises(ConfigError, match="leave out labelled or dropout"):
        conditions(simulation, study, Cell(labelled=8, dropout=0.5))


def test_one_study_under_two_names_is_refused():
    as_it_is = {"training.rounds": tiny_study().training.rounds}
    twice = ["fedavg", {"name": "same", "method": "fedavg", "set": as_it_is}]
    with pytest.raises(ConfigError, match="arms fedavg and same are one study under two names"):
        plan(lab(arms=twice), tiny_study(), RANDOM)


def test_a_record_is_of_no_other_task_than_its_own():
    def task(study=None, **changes) -> Task:
        return plan(lab(**changes), study or tiny_study(), RANDOM)[0][0]

    tasks = [
        task(),
        task(seeds=[1]),
        task(folds=2),
        task(arms=["fedprox"]),
        task(grid={"dropout": [0.5]}),
        task(grid={"shift": ["noise"]}),
        task(grid={"without": ["site-1"]}),
        task(tiny_study(training={"rounds": 4})),
        task(tiny_study(network={"norm": "layer"})),
        task(arms=[{"name": "fedavg", "method": "fedavg", "set": {"training.batch_size": 3}}]),
    ]
    for one in tasks:
        record = json.loads(json.dumps({"declared": one.declared}))
        assert [other.made(record) for other in tasks] == [other is one for other in tasks]
    assert not task().made({})


def test_a_record_outlives_settings_that_are_newer_as_long_as_they_are_at_their_defaults():
    (group,) = plan(lab(arms=["uharmony"]), tiny_study(), RANDOM)
    record = json.loads(json.dumps({"declared": group[0].declared}))
    del record["declared"]["study"]["network"]["harmonization"]["layers"]
    del record["declared"]["study"]["finale"]
    assert group[0].made(record)
    changed = tiny_study(network={"harmonization": {"layers": "encoder"}})
    assert not plan(lab(arms=["uharmony"]), changed, RANDOM)[0][0].made(record)
    longer = tiny_study(finale={"steps": 1})
    assert not plan(lab(arms=["uharmony"]), longer, RANDOM)[0][0].made(record)
    record["declared"]["study"]["colour"] = "red"
    assert not group[0].made(record)


def test_what_a_method_does_not_read_makes_no_record_another():
    changed = tiny_study(network={"harmonization": {"order": 2, "domain_dropout": 0.3}})
    for method, same in (("fedavg", True), ("local", True), ("u2net", True), ("uharmony", False)):
        now, then = (plan(lab(arms=[method]), s, RANDOM)[0][0] for s in (tiny_study(), changed))
        assert now.made(json.loads(json.dumps({"declared": then.declared}))) is same


def test_what_a_method_fixes_itself_makes_no_record_another():
    changed = tiny_study(network={"harmonization": {"domain_dropout": 0.3, "residuals": ["stem"]}})
    other = tiny_study(network={"harmonization": {"order": 2}})
    now, then, further = (
        plan(lab(arms=["fedavg-revin"]), s, RANDOM)[0][0] for s in (tiny_study(), changed, other)
    )
    assert now.made(json.loads(json.dumps({"declared": then.declared})))
    assert not now.made(json.loads(json.dumps({"declared": further.declared})))


@pytest.mark.parametrize("key", ["method", "seed", "evaluation.folds", "evaluation.fold"])
def test_what_is_a_tasks_own_is_set_nowhere_else(key):
    arm = {"name": "a", "method": "fedavg", "set": {key: 1}}
    with pytest.raises(ConfigError, match=f"arm a sets {key}, which is every task's own"):
        plan(lab(arms=[arm]), tiny_study(), RANDOM)


def test_changes_to_the_study_reach_every_arm_and_an_arm_has_the_last_word(tmp_path):
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({**study_content(), "simulation": RANDOM.model_dump(mode="json")})
    )
    declared = {
        "name": "lab",
        "study": "study.yaml",
        "set": {"training.rounds": 7, "training.batch_size": 3},
        "arms": ["fedavg", {"name": "b", "method": "fedprox", "set": {"training.batch_size": 5}}],
    }
    path = tmp_path / "lab.yaml"
    path.write_text(yaml.safe_dump(declared))
    (tasks,) = plan(*load_lab(path))
    assert [task.study.training.rounds for task in tasks] == [7, 7]
    assert [task.study.training.batch_size for task in tasks] == [3, 5]
    path.write_text(yaml.safe_dump({**declared, "set": {"training.colour": 1}}))
    with pytest.raises(ConfigError, match=r"lab\.yaml sets training\.colour, which a study"):
        load_lab(path)


def test_an_arm_sets_keys_of_the_study_by_their_path():
    arm = lab(
        arms=[
            {
                "name": "affine",
                "method": "uharmony",
                "set": {"network.harmonization.stage2": "affine", "training.rounds": 7},
            }
        ]
    ).arms[0]
    study = changed_study(tiny_study(), arm, seed=4, folds=5, fold=3)
    assert study.network.harmonization.stage2 == "affine"
    assert (study.training.rounds, study.seed, study.method) == (7, 4, "uharmony")
    assert (study.evaluation.folds, study.evaluation.fold) == (5, 3)


@pytest.mark.parametrize(
    ("key", "value"), [("network.colour", 1), ("nothing", 1), ("training.rounds", 0)]
)
def test_an_arm_that_sets_what_a_study_does_not_have_is_refused(key, value):
    arm = lab(arms=[{"name": "odd", "method": "fedavg", "set": {key: value}}]).arms[0]
    with pytest.raises(ConfigError, match="arm odd"):
        changed_study(tiny_study(), arm, seed=0, folds=None, fold=None)


def test_a_shift_leaves_the_first_site_as_it_is_and_inverts_the_last():
    there = conditions(RANDOM, tiny_study(), Cell(shift="mixed-invert", strength=1.5))
    assert isinstance(there.source, FolderSource)
    scanners = there.source.scanners
    assert sorted(scanners) == ["site-2", "site-3", "site-4"]
    assert [scanners[name].invert for name in sorted(scanners)] == [False, False, True]
    assert all(s.strength == 1.5 and len(s.effects) == 4 for s in scanners.values())


@pytest.mark.parametrize("kind", ["contrast", "bias", "resolution", "noise"])
def test_a_single_shift_has_one_effect(kind):
    there = conditions(RANDOM, tiny_study(), Cell(shift=kind))
    assert isinstance(there.source, FolderSource)
    assert {s.effects for s in there.source.scanners.values()} == {(kind,)}


def test_imbalance_is_the_ratio_of_the_largest_site_to_the_smallest():
    there = conditions(RANDOM, tiny_study(), Cell(sites=3, cases=40, imbalance=4))
    assert isinstance(there.source, FolderSource)
    assert there.source.cases_per_site == {
        "site-1": 40,
        "site-2": round(40 / math.sqrt(4)),
        "site-3": 10,
    }
    assert there.source.random_sites == 3


def test_conditions_that_the_data_decide_are_not_changed():
    modalities = Simulation.model_validate({"source": {"kind": "folder", "sites_from": "modality"}})
    assert conditions(modalities, tiny_study(), Cell(dropout=0.3)) == modalities
    with pytest.raises(ConfigError, match="sites_from: random"):
        conditions(modalities, tiny_study(), Cell(shift="noise"))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell(imbalance=4), "imbalance needs cases"),
        (Cell(labels_lost=0.1), "of 4 sites is none"),
        (Cell(modalities_lost=0.1), "of 4 sites is none"),
    ],
)
def test_conditions_that_would_do_nothing_are_refused(cell, message):
    with pytest.raises(ConfigError, match=message):
        conditions(RANDOM, tiny_study(), cell)


def test_processes_fit_into_the_budget_and_one_always_runs():
    assert affordable(8, 700, None) == 8
    assert affordable(8, 700, 2100) == 3
    assert affordable(2, 700, 2100) == 2
    assert affordable(8, 700, 100) == 1


def test_a_file_is_read_with_the_study_beside_it(tmp_path: Path):
    content = study_content() | {"simulation": RANDOM.model_dump(mode="json")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    path = tmp_path / "lab.yaml"
    path.write_text("name: lab\nstudy: base.yaml\narms: [fedavg, local]\n")
    declared, study, simulation = load_lab(path)
    assert [arm.name for arm in declared.arms] == ["local", "fedavg"]
    assert study == tiny_study()
    assert simulation == RANDOM
    for wrong, message in (
        ("arms: [fedavg, fedavg]", "one name"),
        ("arms: [unheard]", "unknown method"),
        ("arms: []", "at least 1"),
        ("arms: [fedavg]\ngrid: {colour: [1]}", "colour"),
        ("arms: [fedavg]\ngrid: {strength: [99]}", "strength"),
        ("arms: [pooled]\ngrid: {without: [site-1]}", "would hold the cases of the site"),
    ):
        path.write_text(f"name: lab\nstudy: base.yaml\n{wrong}\n")
        with pytest.raises(ConfigError, match=message):
            load_lab(path)


@pytest.mark.parametrize(
    "path", sorted(Path("examples/studies").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_studies_of_this_project_are_readable(path):
    content = yaml.safe_load(path.read_text())
    if "arms" in content:
        declared, study, simulation = load_lab(path)
        assert plan(declared, study, simulation)
