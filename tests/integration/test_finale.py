"""The finale through the whole federation: answers, records, gains, and the model that is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from rich.console import Console
from torch import Tensor

from tests.support.tiny import ARMS, tiny_study, write_folder, write_study
from uharmony_client import finale
from uharmony_client.evaluate import evaluate_split
from uharmony_client.flower_app import make_client_app
from uharmony_client.local_train import train_round
from uharmony_client.personal import own_model
from uharmony_model.bundle import load_bundle
from uharmony_model.errors import NetworkError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import encode, read_manifest
from uharmony_model.initial import initial_weights
from uharmony_model.methods import METHODS
from uharmony_model.networks import build_network
from uharmony_model.study import Study
from uharmony_model.training_settings import CANDIDATES
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.records import Record
from uharmony_server.rounds import run_rounds
from uharmony_server.summary import arms_of, site_gains
from uharmony_simulation.arms import Arm, Machine, SiteOpener, run_arm
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid, site_of
from uharmony_simulation.progress import make_progress
from uharmony_simulation.run import run_study
from uharmony_simulation.sites import make_sites

MACHINE = Machine(threads=1, device="cpu")
SOURCE = Simulation.model_validate({"source": {"kind": "folder", "sites_from": "column"}})
SITES = ("alpha", "gamma")
ROUNDS, STEPS = 3, 2
SHARES = {"validation": 0.25, "test": 0.25, "every": 0, "bootstrap": 1, "metrics": ["dice"]}
Tamper = Callable[[str, Message, Message], Message]


class Interrupted(KeyboardInterrupt):
    """Stands for a kill: nothing of ours may catch it."""


def study_of(
    method: str = "fedper", name: str = "tiny", *, steps: int = STEPS, rounds: int = ROUNDS
) -> Study:
    """Studies of other names have stores of their own at the same sites, and the same bits."""
    return tiny_study(
        name=name,
        method=method,
        training={"rounds": rounds, "local_steps": 1, "batch_size": 1, "patch": [8, 8, 8]},
        finale={"steps": steps, "rate": 1.0},
        evaluation=SHARES,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "volumes", {"alpha": 4, "gamma": 4}, 8)


@pytest.fixture(scope="module")
def sites(tmp_path_factory, data) -> Path:
    folder: Path = tmp_path_factory.mktemp("home") / "sites"
    make_sites(study_of(), SOURCE, data, folder)
    return folder


class Run:
    """An arm at the two sites of a folder."""

    def __init__(self, sites: Path, folder: Path, study: Study) -> None:
        self.folder, self.sites = folder, sites
        self.arm = Arm.of(study, study.method, study.seed, SITES)
        self.opener = SiteOpener(self.arm, sites, MACHINE)
        self.asked: list[tuple[str, str]] = []

    @property
    def finales(self) -> int:
        """How often a site was asked to play its finale, in the last call."""
        return [kind for _, kind in self.asked].count("train.finale")

    def __call__(self, *, on_step=None, tamper: Tamper | None = None) -> Checkpoint:
        study = self.arm.study
        schema, initial = initial_weights(study)
        inner = make_client_app(self.opener, on_step=on_step)
        self.asked.clear()

        def app(message: Message, context: Context) -> Message:
            site = site_of(context)
            self.asked.append((site, message.metadata.message_type))
            reply = inner(message, context)
            return reply if tamper is None else tamper(site, message, reply)

        grid = InProcessGrid(app, self.arm.sites)
        return run_rounds(study, schema, initial, grid, self.folder / "server" / self.arm.name)

    def kept(self, name: str) -> dict[str, Tensor]:
        """The model that a site has after its finale."""
        store = self.opener.named(name).store
        carried = store.before(self.arm.study.digest, self.arm.study.training.rounds + 2)
        assert carried is not None
        found = own_model(carried, self.arm.name)
        assert found is not None
        return found[0]


def records_of(state: Checkpoint) -> list[Record]:
    return [Record.model_validate(dict(record)) for record in state.records]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, sites) -> tuple[Run, Checkpoint]:
    run = Run(sites, tmp_path_factory.mktemp("undisturbed"), study_of())
    state = run()
    assert run.finales == len(SITES)
    return run, state


def test_it_is_played_once_by_every_site_and_measured_as_a_column_of_its_own(undisturbed):
    _, state = undisturbed
    assert state.refusals == ()
    assert state.at_home == SITES
    assert state.round == ROUNDS
    records = records_of(state)
    assert {(r.round, r.column, r.kept in CANDIDATES) for r in records} == {
        (ROUNDS, "fedper", False),
        (ROUNDS + 1, "fedper +home", True),
    }
    for column in ("fedper", "fedper +home"):
        found = {(r.site, r.split) for r in records if r.column == column}
        assert found == {(site, split) for site in SITES for split in ("validation", "test")}


def test_what_happens_at_home_changes_nothing_in_the_rounds(undisturbed, tmp_path, sites):
    _, state = undisturbed
    without = Run(sites, tmp_path, study_of(steps=0))
    plain = without()
    assert plain.digest == state.digest
    assert plain.at_home == ()
    assert without.finales == 0
    before = [r for r in records_of(state) if r.kept is None]
    assert records_of(plain) == before


def test_after_the_finale_nobody_is_asked_again(undisturbed):
    run, state = undisturbed
    again = run()
    assert run.asked == []
    assert (again.digest, again.records) == (state.digest, state.records)


def test_killed_in_the_finale_it_ends_as_if_nothing_had_been(undisturbed, tmp_path, sites):
    run = Run(sites, tmp_path, study_of("fedper", "killed"))

    def stop(site: str, round_: int, at: int, loss: float) -> None:
        if (site, round_, at) == ("gamma", ROUNDS + 1, 1):
            raise Interrupted

    with pytest.raises(Interrupted):
        run(on_step=stop)
    trained: set[tuple[str, int]] = set()
    state = run(on_step=lambda site, round_, at, loss: trained.add((site, round_)))
    wanted, expected = undisturbed
    assert state.records == expected.records
    assert state.digest == expected.digest
    assert trained == {("gamma", ROUNDS + 1)}  # alpha answered from its store
    for site in SITES:
        assert same(run.kept(site), wanted.kept(site))


@pytest.mark.parametrize("method", ARMS)
def test_every_method_has_a_finale(tmp_path, sites, method):
    study = study_of(method, rounds=1, steps=1)
    if METHODS[method].backbone is not None:
        try:
            build_network(study, ("alpha",), seed=0)
        except (NetworkError, KeyError):
            pytest.skip("its network is not built yet")
    run = Run(sites, tmp_path, study)
    state = run()
    assert [(r.site, r.detail) for r in state.refusals] == []
    assert state.at_home == (("pooled",) if METHODS[method].pooled else SITES)
    home = [r for r in records_of(state) if r.kept is not None]
    assert {(r.site, r.column) for r in home} == {(site, f"{method} +home") for site in SITES}


# --- what it is worth ----------------------------------------------------------------------------


def test_gains_at_home_are_over_the_site_alone_at_home(tmp_path, sites):
    records: list[Record] = []
    for method in ("local", "fedper"):
        state = Run(sites, tmp_path, study_of(method, "gains"))()
        assert state.refusals == ()
        records += records_of(state)
    assert arms_of(records) == ["local", "local +home", "fedper", "fedper +home"]
    dice = {(r.site, r.column): r.dice for r in records if r.split == "test"}
    gains = site_gains(records)
    assert {column for _, column in gains} == {"fedper", "fedper +home"}
    for site in SITES:
        for end in ("", " +home"):
            mine, alone = dice[site, f"fedper{end}"], dice[site, f"local{end}"]
            assert mine is not None
            assert alone is not None
            assert gains[site, f"fedper{end}"].mean == pytest.approx(mine - alone)


def test_the_local_candidate_is_the_arm_local_to_the_bit(tmp_path, sites, monkeypatch):
    monkeypatch.setattr(finale, "choose", lambda dice, rule: list(dice)[-1])
    alone = Run(sites, tmp_path / "alone", study_of("local", "one"))
    fedper = Run(sites, tmp_path / "both", study_of("fedper", "other"))
    theirs, mine = records_of(alone()), records_of(fedper())
    assert {r.kept for r in mine if r.kept} == {"local"}
    for site in SITES:
        assert same(fedper.kept(site), alone.kept(site))

    def home(records: list[Record]) -> list[tuple[str, str, float | None]]:
        return sorted((r.site, r.split, r.dice) for r in records if r.kept)

    assert home(mine) == home(theirs)


def test_pooled_training_has_a_finale_of_the_sum_of_all_steps(tmp_path, sites):
    run = Run(sites, tmp_path, study_of("pooled", "pooled"))
    steps: list[int] = []
    state = run(on_step=lambda site, round_, at, loss: steps.append(round_))
    assert steps.count(ROUNDS + 1) == STEPS * len(SITES)
    home = [r for r in records_of(state) if r.column == "pooled +home"]
    assert {r.site for r in home} == set(SITES)
    assert {r.kept for r in home} <= {"federated", "whole", "between"}
    assert state.at_home
    run()
    assert run.asked == []


IMAGE = torch.linspace(-3, 3, 16**3).reshape(1, 1, 16, 16, 16).sin()


@pytest.mark.parametrize(
    ("method", "kept"),
    [("uharmony", "federated"), ("uharmony", "own"), ("uharmony", "local"), ("fedbn", "between")],
)
def test_the_model_that_is_handed_out_is_the_one_that_was_measured(
    tmp_path, sites, monkeypatch, method, kept
):
    monkeypatch.setattr(finale, "choose", lambda dice, rule: kept if kept in dice else "federated")
    measured: dict[str, Tensor] = {}

    def spy(network, site, split, *, round_, slow):
        rows = evaluate_split(network, site, split, round_=round_, slow=slow)
        if (split, round_, site.study.method) == ("test", 2, method):
            with torch.no_grad():
                measured[site.name] = network.eval()(IMAGE, torch.tensor([0]))
        return rows

    monkeypatch.setattr("uharmony_client.site_round.evaluate_split", spy)
    run = Run(sites, tmp_path, study_of(method, f"{method}-{kept}", rounds=1))
    run_arm(run.arm, run.sites, tmp_path / "arm", MACHINE, figures=False)
    assert set(measured) == set(SITES)
    for site, logits in measured.items():
        model = load_bundle(tmp_path / "arm" / "model", site)
        with torch.no_grad():
            assert torch.equal(model.network(IMAGE, torch.tensor([0])), logits)


@pytest.mark.slow
def test_in_whatever_order_arms_are_named_nothing_is_trained_twice(tmp_path, data, monkeypatch):
    """The finale of another arm trains what the arm `local` does; a store keeps three rounds."""
    trained: list[tuple[str, str, int]] = []

    def spy(network, data, *, study, round_, **named):
        trained.append((study.method, data.site, round_))
        return train_round(network, data, study=study, round_=round_, **named)

    monkeypatch.setattr("uharmony_client.site_round.train_round", spy)
    content = {
        "training": {"rounds": 4, "local_steps": 1, "batch_size": 1, "patch": [8, 8, 8]},
        "finale": {"steps": 1},
        "evaluation": SHARES,
    }
    records = run_study(
        write_study(tmp_path / "study.yaml", **content),
        tmp_path / "out",
        data=data,
        arms=("fedavg", "local"),
        seeds=(),
        machine=MACHINE,
        resume=False,
        progress=make_progress(Console(quiet=True), "json"),
    )
    wanted = {f"{arm}{end}" for arm in ("fedavg", "local") for end in ("", " +home")}
    assert {r.column for r in records if r.split == "test"} == wanted
    assert sorted(trained) == sorted(
        (arm, site, round_)
        for arm in ("fedavg", "local")
        for site in SITES
        for round_ in range(1, 5)
    )


# --- what is refused -----------------------------------------------------------------------------


def with_values(reply: Message, change: Callable[[dict[str, object]], None]) -> Message:
    """The site's metrics with other values, otherwise well made."""
    data = reply.content.array_records["payload"]["payload"].data
    manifest = read_manifest(data, max_bytes=1 << 20)
    values: dict[str, object] = dict(manifest.values)
    change(values)
    made = encode(
        kind=manifest.kind,
        study=manifest.study,
        round=manifest.round,
        site=manifest.site,
        base=manifest.base,
        codec=manifest.codec,
        values=values,  # type: ignore[arg-type]
    )
    array = Array("uint8", (len(made),), "uharmony.payload", made)
    reply.content["payload"] = ArrayRecord({"payload": array})
    return reply


@pytest.mark.parametrize(
    ("kind", "value"),
    [("train.finale", None), ("train.finale", 3), ("train.finale", "equal"), ("evaluate", "own")],
)
def test_an_answer_that_says_what_was_kept_where_it_may_not_is_refused(
    tmp_path, sites, kind, value
):
    def change(values: dict[str, object]) -> None:
        values.pop("kept", None)
        if value is not None:
            values["kept"] = value

    def tamper(site: str, message: Message, reply: Message) -> Message:
        if site == "gamma" and message.metadata.message_type == kind:
            return with_values(reply, change)
        return reply

    study = study_of("fedper", f"{kind}-{value}", rounds=1)
    state = Run(sites, tmp_path, study)(tamper=tamper)
    (refusal,) = state.refusals
    assert (refusal.site, str(refusal.reason)) == ("gamma", "wrong_schema")
    assert "kept" in refusal.detail
    columns = {(r.site, r.column) for r in records_of(state)}
    lost = "fedper +home" if kind == "train.finale" else "fedper"
    assert ("gamma", lost) not in columns
    assert ("alpha", lost) in columns
    assert ("gamma" in state.at_home) == (kind == "evaluate")


def test_a_message_of_one_kind_with_an_order_of_another_is_refused(tmp_path, sites):
    """Else a round beyond those approved could be had as `train` with an order that says finale."""
    run = Run(sites, tmp_path, study_of("fedper", "another-kind", rounds=1))
    answers: dict[tuple[str, str], RecordDict] = {}

    def tamper(site: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type != "train.finale":
            return reply
        order = Instruction.from_json(str(message.content["instruction"]["json"]))
        for action in ("finale", "hello", "finish", "evaluate"):
            changed = order.model_copy(update={"action": action}).to_json()
            content = RecordDict({"instruction": ConfigRecord({"json": changed})})
            content["payload"] = message.content["payload"]
            wrong = Message(content, message.metadata.dst_node_id, "train", group_id="2")
            context = Context(0, 0, {"site": site}, RecordDict(), {})
            answers[site, action] = make_client_app(run.opener)(wrong, context).content
        return reply

    run(tamper=tamper)
    assert len(answers) == 4 * len(SITES)
    for content in answers.values():
        assert "payload" not in content
        assert "refusal" in content
