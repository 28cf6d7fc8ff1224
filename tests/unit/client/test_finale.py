"""The last steps at home: which candidates are made, what is chosen, what an interruption costs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.tiny import tiny_study, write_folder
from uharmony_client import finale
from uharmony_client.alone import alone_candidate, alone_site
from uharmony_client.finale import Choice, play_finale
from uharmony_client.local_store import RoundKey
from uharmony_client.optimizer import PREFIX
from uharmony_client.personal import from_names, local_parameters, model_state, personal_part
from uharmony_client.site import Site
from uharmony_client.site_round import Bench, finale_metrics, round_update
from uharmony_client.training_steps import run_steps
from uharmony_client.workbench import carried_after
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import digest, read_manifest
from uharmony_model.initial import initial_weights
from uharmony_model.networks import build_network
from uharmony_model.schedule import finale_round
from uharmony_model.study import Study
from uharmony_model.training_settings import CANDIDATES, Candidate
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.sites import make_sites

SOURCE = Simulation.model_validate({"source": {"kind": "folder", "sites_from": "column"}})
MAIN_STEPS, STEPS = 1, 3


class Killed(BaseException):
    """Stands for a kill."""


def study_of(method: str = "fedavg", **changes: object) -> Study:
    settings: dict[str, object] = {
        "training": {"rounds": 1, "local_steps": MAIN_STEPS, "batch_size": 1, "patch": [8, 8, 8]},
        "evaluation": {"validation": 0.25, "test": 0.25, "bootstrap": 1, "metrics": ["dice"]},
        **changes,
    }
    settings["finale"] = {"steps": STEPS, "rate": 0.3, **changes.get("finale", {})}  # type: ignore[dict-item]
    return tiny_study(method=method, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of one site; studies of other names have stores of their own there."""
    folder: Path = tmp_path_factory.mktemp("data")
    volumes = write_folder(folder / "volumes", {"alpha": 4}, 8)
    make_sites(study_of(), SOURCE, volumes, folder / "sites")
    return folder / "sites"


_numbers = itertools.count()


class Home:
    """A site after its last round; it has played no finale yet."""

    def __init__(self, data: Path, study: Study) -> None:
        study = study.model_copy(update={"name": f"tiny-{next(_numbers)}"})
        arm = Arm.of(study, study.method, 0, ("alpha",))
        self.study = arm.study
        self.site: Site = SiteOpener(arm, data, Machine(1, "cpu")).named("alpha")
        _, initial = initial_weights(self.study)
        self.bench = self.bench_of(initial)
        round_update(self.site, self.bench, 1)
        # As if others had moved the global weights too.
        self.bench = self.bench_of(initial + 0.01)
        self.key = RoundKey(self.study.digest, finale_round(self.study), self.bench.base)
        self.steps: list[int] = []

    def bench_of(self, weights: Tensor) -> Bench:
        network = build_network(self.study, self.site.domains, seed=0)
        partition = Partition.of(network, self.study.plan.local)
        return Bench(network, partition, weights, digest(weights))

    @property
    def carried(self) -> dict[str, Tensor]:
        return carried_after(self.site, 1)

    @property
    def federated(self) -> dict[str, Tensor]:
        bench = self.bench
        state = model_state(bench.network, bench.partition, bench.shared, self.carried)
        return {key: tensor.clone() for key, tensor in state.items()}

    def play(self, *, kill_at: int | None = None, alone: bool = False) -> Choice:
        """The finale in a fresh process; `kill_at` is the step of it after which it ends."""
        self.steps.clear()
        bench = self.bench_of(self.bench.weights)
        return play_finale(
            self.site,
            bench.network,
            bench.partition,
            bench.shared,
            self.carried,
            self.key,
            alone=alone_candidate(self.site) if alone else None,
            on_step=self.listener(kill_at),
        )

    def listener(self, kill_at: int | None = None):
        def on_step(step: int, loss: float) -> None:
            self.steps.append(step)
            if len(self.steps) == kill_at:
                raise Killed

        return on_step

    def answer(self, *, kill_at: int | None = None) -> bytes:
        self.steps.clear()
        bench = self.bench_of(self.bench.weights)
        return finale_metrics(self.site, bench, on_step=self.listener(kill_at))


def chosen(data: Path, name: Candidate, method: str = "fedavg", **changes) -> Home:
    """A home whose only candidate is this one."""
    return Home(data, study_of(method, finale={"candidates": [name]}, **changes))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- what is made --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "made", "trained"),
    [
        ("fedavg", {"federated", "whole", "between", "local"}, 1),
        ("fedprox", {"federated", "whole", "between", "local"}, 1),
        ("fedbn-in", set(CANDIDATES), 2),
        ("fedper", set(CANDIDATES), 2),
        ("uharmony", set(CANDIDATES), 2),
        ("fedbn", set(CANDIDATES), 2),
        ("gperxan", set(CANDIDATES), 2),
        # What is local there are statistics and counters: no step trains them.
        ("silobn", {"federated", "whole", "between", "local"}, 1),
        ("fedavg-bn", {"federated", "whole", "between", "local"}, 1),
        ("ditto", {"federated", "whole", "between", "local"}, 1),
        ("local", {"federated", "whole", "between"}, 1),
    ],
)
def test_the_candidates_of_a_method(data, method, made, trained):
    home = Home(data, study_of(method))
    found = home.play(alone=True)
    assert set(found.validation) == made
    assert home.steps == [*range(STEPS)] * trained
    assert found.kept in made


@pytest.mark.parametrize("names", [["federated"], ["between"], ["own", "whole"]])
def test_only_the_candidates_that_the_study_names(data, names):
    home = Home(data, study_of("fedper", finale={"candidates": names}))
    assert set(home.play(alone=True).validation) == set(names)
    assert len(home.steps) == STEPS * len({"between": 1, "whole": 1, "own": 1}.keys() & set(names))


@pytest.mark.parametrize(("method", "names"), [("fedavg", ["own"]), ("local", ["own", "local"])])
def test_where_no_candidate_can_be_made_the_federated_model_stays(data, method, names):
    home = Home(data, study_of(method, finale={"candidates": names}))
    found = home.play(alone=True)
    assert found.kept == "federated"
    assert equal(found.model.state, home.federated)


def test_the_federated_candidate_is_what_was_measured_after_the_last_round(data):
    home = chosen(data, "federated", "fedper")
    assert equal(home.play().model.state, home.federated)
    assert home.steps == []


NO_DROP = {"network": {"harmonization": {"domain_dropout": 0.0}}}
DROP = {"network": {"harmonization": {"domain_dropout": 0.9}}}
BATCH = {"network": {"norm": "batch"}}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedper", {}),
        ("lg-fedavg", {}),
        ("fedbn", {}),
        ("fedbn-in", {}),
        ("gperxan", {}),
        ("uharmony", NO_DROP),
        ("fedper", BATCH),
        ("fedrep", BATCH),
    ],
)
def test_own_changes_what_is_local_and_leaves_every_shared_tensor(data, method, changes):
    home = chosen(data, "own", method, **changes)
    found, before = home.play().model.state, home.federated
    shared = set(home.bench.partition.shared_keys)
    assert {key for key in shared if not torch.equal(found[key], before[key])} == set()
    local = set(home.bench.partition.local_keys)
    assert any(not torch.equal(found[key], before[key]) for key in local)


def test_own_passes_the_steps_that_domain_dropout_empties(data):
    home = chosen(data, "own", "uharmony", **DROP)
    assert home.play().kept == "own"
    assert home.steps == [*range(STEPS)]


def test_whole_changes_the_shared_tensors_too_and_falls_from_a_share_of_the_rate(data, monkeypatch):
    rates: list[float] = []

    def spy(*given, rate, count, **named):
        rates.extend(rate(step) for step in range(count))
        return run_steps(*given, rate=rate, count=count, **named)

    home = chosen(data, "whole", "fedper")
    monkeypatch.setattr("uharmony_client.finale.run_steps", spy)
    found, before = home.play().model.state, home.federated
    for keys in (home.bench.partition.shared_keys, home.bench.partition.local_keys):
        assert any(not torch.equal(found[key], before[key]) for key in keys)
    # Three steps of a cosine from 0.3 * 0.01 to a hundredth of it.
    assert rates[0] == pytest.approx(0.003)
    assert rates[1] == pytest.approx(0.003 * (0.01 + 0.99 * 0.75))
    assert rates[2] == pytest.approx(0.003 * (0.01 + 0.99 * 0.25))


@pytest.mark.parametrize("method", ["fedavg", "fedbn"])
def test_between_is_the_mean_of_the_federated_model_and_the_whole_one(data, method):
    home = chosen(data, "between", method)
    between = home.play()
    whole = chosen(data, "whole", method).play().model.state
    assert set(between.validation) == {"between"}
    for key, before in home.federated.items():
        found = between.model.state[key]
        if found.is_floating_point():
            torch.testing.assert_close(found, (before + whole[key]) / 2)
        else:
            assert torch.equal(found, whole[key])


@pytest.mark.parametrize("method", ["fedavg", "fedper", "ditto"])
def test_the_local_candidate_is_the_model_of_the_site_alone(data, method, monkeypatch):
    home = Home(data, study_of(method))
    monkeypatch.setattr(finale, "choose", lambda dice, rule: list(dice)[-1])
    found = home.play(alone=True)
    assert found.kept == "local"
    own = alone_site(home.site)
    kept = local_parameters(personal_part(carried_after(own, finale_round(own.study))))
    network = build_network(own.study, own.domains, seed=0)
    assert equal(found.model.state, from_names(network, kept))
    assert not equal(found.model.state, home.federated)


# --- what is chosen ------------------------------------------------------------------------------


def score_with(monkeypatch, scores: dict[str, float | None]) -> dict[str, dict[str, Tensor]]:
    """Let validation say these numbers, by candidate in the order in which they are measured."""
    left = iter(scores)
    states: dict[str, dict[str, Tensor]] = {}

    def validation(
        model: finale.Candidate, site: Site, shared: dict[str, Tensor]
    ) -> dict[str, float]:
        name = next(left)
        states[name] = model.state
        found = scores[name]
        return {} if found is None else {"case": found}

    monkeypatch.setattr(finale, "_validation", validation)
    return states


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([0.5, 0.6, 0.4], "own"),
        ([0.5, 0.6, 0.7], "whole"),
        ([0.5, 0.1, 0.2], "federated"),
        ([0.5, 0.5, 0.5], "federated"),
        ([0.4, 0.5, 0.5], "own"),
        ([None, 0.1, 0.2], "whole"),
    ],
)
def test_the_best_by_validation_is_kept_and_of_equals_the_one_that_changed_less(
    data, monkeypatch, scores, kept
):
    names = ["federated", "own", "whole"]
    home = Home(data, study_of("fedper", finale={"candidates": names}))
    states = score_with(monkeypatch, dict(zip(names, scores, strict=True)))
    found = home.play()
    assert found.kept == kept
    assert equal(found.model.state, states[kept])
    assert dict(found.validation) == dict(zip(names, scores, strict=True))


def test_half_of_a_change_is_less_than_the_whole_of_it(data, monkeypatch):
    home = Home(data, study_of("fedavg", finale={"candidates": ["whole", "between"]}))
    monkeypatch.setattr(finale, "_validation", lambda *given: {"case": 0.5})
    assert home.play().kept == "between"


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (list(CANDIDATES), "whole"),
        (["federated", "own", "between", "local"], "own"),
        (["federated", "local"], "federated"),
    ],
)
def test_without_validation_cases_the_last_trained_is_kept(data, names, kept):
    shares = {"validation": 0.0, "test": 0.25, "bootstrap": 1, "metrics": ["dice"]}
    study = study_of("fedper", finale={"candidates": names}, evaluation=shares)
    found = Home(data, study).play(alone=True)
    assert found.kept == kept
    assert set(found.validation.values()) == {None}


def test_labels_that_may_not_be_used_choose_nothing(data):
    """Where several sites' cases lie in one place, each with a word of its own on its labels."""
    home = Home(data, study_of("fedavg", finale={"candidates": ["whole"]}))
    model = finale.Candidate(home.bench.network, "fedavg", home.federated)
    cases = {case.case for case in home.site.split("validation")}
    found = finale._validation(model, home.site, home.bench.shared)
    assert set(found) == cases
    assert cases
    without = dataclasses.replace(home.site, labels={"alpha": "none"})
    assert finale._validation(model, without, home.bench.shared) == {}


# --- what an interruption costs ------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [1, STEPS, STEPS + 1, 2 * STEPS])
def test_killed_it_goes_on_with_the_candidate_it_was_at(data, kill_at):
    wanted = Home(data, study_of("fedper")).play()
    home = Home(data, study_of("fedper"))
    with pytest.raises(Killed):
        home.play(kill_at=kill_at)
    found = home.play()
    assert found.kept == wanted.kept
    assert found.validation == wanted.validation
    assert equal(found.model.state, wanted.model.state)
    # Killed in the second candidate, the first one is on disk.
    assert len(home.steps) == STEPS * (2 if kill_at <= STEPS else 1)


def test_with_a_step_checkpoint_only_some_steps_are_repeated(data):
    study = study_of("fedper", finale={"candidates": ["whole"]})
    wanted = Home(data, study).play()
    home = Home(data, study)
    resources = home.site.config.resources.model_copy(update={"checkpoint_steps": 1})
    config = home.site.config.model_copy(update={"resources": resources})
    home.site = dataclasses.replace(home.site, config=config)
    with pytest.raises(Killed):
        home.play(kill_at=3)
    found = home.play()
    assert home.steps == [2]
    assert equal(found.model.state, wanted.model.state)


def test_a_candidate_that_is_damaged_on_disk_is_trained_again(data):
    wanted = Home(data, study_of("fedper")).play()
    home = Home(data, study_of("fedper"))
    with pytest.raises(Killed):
        home.play(kill_at=STEPS + 1)
    (path,) = home.site.store.folder.rglob("own.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    found = home.play()
    assert len(home.steps) == 2 * STEPS
    assert equal(found.model.state, wanted.model.state)


# --- the answer ----------------------------------------------------------------------------------


def test_asked_again_the_same_bytes_come_without_training(data):
    home = Home(data, study_of("fedper"))
    first = home.answer()
    assert len(home.steps) == 2 * STEPS
    assert home.answer() == first
    assert home.steps == []
    manifest = read_manifest(first, max_bytes=1 << 20)
    assert manifest.values["kept"] in CANDIDATES
    assert manifest.round == 2
    assert any(name.startswith("test/alpha/alpha/blob/") for name in manifest.values)


def test_killed_while_it_measures_no_candidate_is_trained_again(data, monkeypatch):
    """Surfaces of whole volumes take their time; a kill there must not cost the steps."""
    home = Home(data, study_of("fedper"))

    def kill(*given, **named):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("uharmony_client.site_round.evaluate_split", kill)
        with pytest.raises(Killed):
            home.answer()
    home.answer()
    assert home.steps == []


def test_what_was_kept_is_what_the_site_measures_and_says_why(data):
    home = chosen(data, "whole", "fedper")
    wanted = chosen(data, "whole", "fedper").play()
    federated = home.federated
    home.answer()
    carried = carried_after(home.site, 2)
    bench = home.bench
    state = model_state(bench.network, bench.partition, bench.shared, carried)
    assert equal(state, wanted.model.state)
    assert not any(key.startswith(PREFIX) for key in personal_part(carried))
    facts = json.loads((home.site.evaluations / "finale.json").read_text())
    assert facts["kept"] == "whole"
    assert facts["validation_dice"] == pytest.approx(dict(wanted.validation))
    # What it had after the last round is still there, for a coordinator that asks about it again.
    assert personal_part(home.carried) == {}
    assert equal(home.federated, federated)


def test_nothing_of_the_finale_stays_beside_the_generations(data):
    home = Home(data, study_of("fedper"))
    home.answer()
    assert {path.name for path in home.site.store.folder.iterdir()} == {
        "round-000001",
        "round-000002",
    }


def test_after_the_finale_no_round_is_trained(data):
    home = Home(data, study_of("fedper"))
    home.answer()
    policy = home.site.config.policy.model_copy(update={"allow_rollback": False})
    config = home.site.config.model_copy(update={"policy": policy})
    site = dataclasses.replace(home.site, config=config)
    with pytest.raises(ExchangeError, match="this site has done round 2"):
        round_update(site, home.bench_of(home.bench.weights + 1), 1)
