"""A run repeated from its participation record, against a computation by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from flwr.app import RecordDict

from tests.support.tiny import simulate, tiny_study, write_folder, write_study
from uharmony_client.flower_app import make_client_app
from uharmony_client.local_train import train_round
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import digest
from uharmony_model.initial import initial_weights
from uharmony_model.networks import build_network
from uharmony_model.participation import Participation, dump
from uharmony_model.unlabelled_settings import STATISTICS
from uharmony_server.aggregate import WeightedSum
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener, run_arm
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid
from uharmony_simulation.participation import ParticipationGrid, check_sites
from uharmony_simulation.sites import make_sites

SITES = ("alpha", "beta", "gamma")
SOURCE = {"source": {"kind": "folder", "sites_from": "column"}}
STUDY = tiny_study(evaluation={"validation": 0.2, "test": 0.3, "every": 2, "bootstrap": 50})
EVERYBODY = Participation().with_round(1, SITES).with_round(2, SITES).with_round(3, SITES)
# Round 2: beta heard nothing of it, gamma came too late. Round 1: beta alone was too late.
BROKEN = EVERYBODY.with_round(2, ["alpha"], ["gamma"]).with_round(1, ["alpha", "gamma"], ["beta"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "volumes")


Locals = dict[str, dict[str, torch.Tensor]]


class Run:
    """One federation in a folder of its own."""

    def __init__(self, folder: Path, data: Path) -> None:
        make_sites(STUDY, Simulation.model_validate(SOURCE), data, folder / "sites")
        self.folder, self.trained = folder, list[tuple[int, str]]()
        self.arm = Arm.of(STUDY, STUDY.method, STUDY.seed, SITES)
        self.opener = SiteOpener(self.arm, folder / "sites", Machine(threads=1, device="cpu"))

    def run(self, participation: Participation | None) -> Checkpoint:
        def on_step(site: str, round_: int, step: int, loss: float) -> None:
            if step == 0:
                self.trained.append((round_, site))

        grid = InProcessGrid(make_client_app(self.opener, on_step=on_step), SITES)
        return run_rounds(
            STUDY,
            *initial_weights(STUDY),
            grid if participation is None else ParticipationGrid(grid, participation),
            self.folder / "server",
        )

    def local(self, site: str) -> dict[str, torch.Tensor]:
        found = self.opener.named(site).store.before(STUDY.digest, 99)
        assert found is not None
        return found


def by_hand(run: Run, participation: Participation) -> tuple[torch.Tensor, Locals]:
    """The rounds without a federation: train who trained, add up who counted."""
    flat = initial_weights(STUDY)[1]
    carried: Locals = {}
    for round_, named in sorted(participation.rounds.items()):
        total = WeightedSum(flat.numel())
        for site in named.trained:
            opened = run.opener.named(site)
            network = build_network(STUDY, opened.domains, seed=STUDY.seed)
            partition = Partition.of(network, STUDY.plan.local)
            result = train_round(
                network,
                opened.training_data(),
                study=STUDY,
                partition=partition,
                base=flat,
                before=carried.get(site) or partition.split(network.state_dict())[1],
                round_=round_,
            )
            carried[site] = result.local
            if site in named.counted:
                total.add([result.update], [float(len(opened.training_data().volumes))])
        flat = total.apply(flat)
    return flat, carried


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data) -> tuple[Run, Checkpoint]:
    run = Run(tmp_path_factory.mktemp("plain"), data)
    return run, run.run(None)


@pytest.fixture(scope="module")
def broken(tmp_path_factory, data) -> tuple[Run, Checkpoint]:
    run = Run(tmp_path_factory.mktemp("broken"), data)
    return run, run.run(BROKEN)


def test_everybodys_participation_is_the_plain_run(tmp_path, data, plain):
    run = Run(tmp_path, data)
    state = run.run(EVERYBODY)
    assert digest(state.global_) == digest(plain[1].global_)
    assert state.records == plain[1].records
    assert digest(by_hand(run, EVERYBODY)[0]) == digest(state.global_)


def test_who_was_missing_or_late_is_missing_or_late_again(broken, plain):
    run, state = broken
    assert run.trained == [(r, s) for r in (1, 2, 3) for s in BROKEN.rounds[r].trained]
    flat, carried = by_hand(run, BROKEN)
    assert digest(state.global_) == digest(flat) != digest(plain[1].global_)
    # A late site went on from what it trained in vain; the absent one from its round before.
    for site in SITES:
        local = run.local(site)
        assert local.keys() == carried[site].keys()
        assert all(torch.equal(local[k], carried[site][k]) for k in local)
    store = run.opener.named("beta").store
    assert [store.started_from(STUDY.digest, r) for r in (2, 3)] == [1, 1]


def test_every_site_is_measured_whoever_took_part(broken):
    measured = {(r["round"], r["site"]) for r in broken[1].records}
    assert measured == {(round_, site) for round_ in (2, 3) for site in SITES}


def test_only_training_follows_the_record(tmp_path, data):
    run = Run(tmp_path, data)
    inner = InProcessGrid(make_client_app(run.opener), SITES)
    grid = ParticipationGrid(inner, BROKEN)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert dict(inner.sites) == {1: "alpha", 2: "beta", 3: "gamma"}

    def answered(kind: str) -> list[int]:
        asked = [grid.create_message(RecordDict(), kind, node, "2") for node in (1, 2, 3)]
        return [reply.metadata.src_node_id for reply in grid.send_and_receive(asked)]

    assert answered("train") == [1]
    assert answered("evaluate") == [1, 2, 3]
    with pytest.raises(NotImplementedError, match="use send_and_receive"):
        grid.push_messages([])


def test_a_site_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="round 2 names site delta, this run has alpha, beta"):
        check_sites(EVERYBODY.with_round(2, ["alpha", "delta"]), SITES)


def test_an_engine_that_cannot_follow_it_is_refused(tmp_path):
    arm = Arm.of(STUDY, STUDY.method, STUDY.seed, SITES)
    machine = Machine(threads=1, engine="ray")
    with pytest.raises(ConfigError, match="use inprocess"):
        run_arm(arm, tmp_path, tmp_path / "arm", machine, participation=EVERYBODY)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_study(tmp_path / "study.yaml", evaluation={"every": 0})
    dump(tmp_path / "broken.json", BROKEN)
    return tmp_path


def start(capsys, home: Path, data: Path, *more: str | Path) -> tuple[int, str]:
    options: list[str | Path] = [
        "--data",
        data,
        "--out",
        home / "out",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    return simulate(capsys, "run", home / "study.yaml", *options, *more)


@pytest.mark.slow
def test_the_command_runs_it_and_keeps_two_runs_apart(capsys, home, data):
    assert start(capsys, home, data, "--participation", home / "broken.json") == (0, "")
    outcome = home / "out/arms/uharmony/seed-0/done.json"
    first = json.loads(outcome.read_text())["weights"]
    # Evaluation differs from that of `broken`, but changes no weights.
    site = yaml.safe_load((home / "out/sites/alpha/site.yaml").read_text())
    assert site["policy"] == {
        "min_cases": 1,
        "allow_rollback": True,
        "share": ["backbone", "norm_affine", "norm_statistics", "polynomial", "style_autoencoder"],
        "statistics": list(STATISTICS),
    }
    again = start(capsys, home, data, "--participation", home / "broken.json", "--resume")
    assert again == (0, "")
    code, said = start(capsys, home, data, "--resume")
    assert code == StoreError.exit_code
    assert "asked to go on with all sites in every round" in said
    assert json.loads(outcome.read_text())["weights"] == first


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (EVERYBODY, ("--arm", "uharmony", "--arm", "local"), "2 arms and 1 seeds"),
        (EVERYBODY, ("--seed", "0", "--seed", "1"), "1 arms and 2 seeds"),
        (EVERYBODY, ("--engine", "ray"), "use inprocess"),
        (EVERYBODY.with_round(4, SITES), (), "round 4, the study has 3"),
        (Participation().with_round(2, SITES), (), "does not name round 1 of 3"),
    ],
)
def test_a_record_that_is_not_of_one_run_of_the_study_is_refused(
    capsys, home, data, change, options, says
):
    dump(home / "record", change)
    code, said = start(capsys, home, data, "--participation", home / "record", *options)
    assert code == ConfigError.exit_code
    assert says in said
    assert not (home / "out").exists()
