"""What a hospital reads after a finale: what it kept, and what the federation's model was worth."""

from __future__ import annotations

import csv
import json
import statistics
import threading
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from rich.console import Console

from tests.support.tiny import tiny_study, write_folder
from uharmony_client import alone, flower_app
from uharmony_client.alone import alone_candidate, alone_site, train_alone
from uharmony_client.flower_app import Listeners, make_client_app
from uharmony_client.results_view import results_json, results_view
from uharmony_client.site import Site
from uharmony_client.site_models import (
    federated_model,
    keep_federated_model,
    keep_personal_model,
    model_note,
)
from uharmony_client.site_report import write_site_report
from uharmony_client.site_results import SiteResults, evaluate_site
from uharmony_client.site_round import Bench, finale_metrics, measure, round_update
from uharmony_model.errors import ConfigError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import digest
from uharmony_model.initial import initial_weights
from uharmony_model.networks import build_network
from uharmony_model.schedule import splits_due
from uharmony_service.lock import only_one
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid
from uharmony_simulation.sites import make_sites

ROUNDS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "volumes", {"alpha": 6}, 8)


class Hospital:
    """One site that does everything up to its finale; `kept` is its only candidate."""

    def __init__(self, folder: Path, data: Path, kept: str) -> None:
        study = tiny_study(
            method="fedper",
            training={"rounds": ROUNDS, "local_steps": 2, "batch_size": 1, "patch": [8, 8, 8]},
            finale={"steps": 2, "candidates": [kept]},
            evaluation={"validation": 0.2, "test": 0.5, "every": 1, "bootstrap": 20},
        )
        source = {"source": {"kind": "folder", "sites_from": "column"}}
        make_sites(study, Simulation.model_validate(source), data, folder)
        arm = Arm.of(study, "fedper", 0, ("alpha",))
        self.site: Site = SiteOpener(arm, folder, Machine(1, "cpu")).named("alpha")
        _, weights = initial_weights(arm.study)
        network = build_network(arm.study, self.site.domains, seed=0)
        partition = Partition.of(network, arm.study.plan.local)
        self.bench = Bench(network, partition, weights, digest(weights))

    def federate(self) -> None:
        for round_ in range(1, ROUNDS + 1):
            round_update(self.site, self.bench, round_)
            last = round_ == ROUNDS
            splits = splits_due(self.site.study, round_)
            measure(self.site, self.bench, round_, splits, slow=last)
        keep_federated_model(self.site, self.bench.shared, ROUNDS)

    def finale(self) -> None:
        finale_metrics(self.site, self.bench, alone=alone_candidate(self.site))
        keep_personal_model(self.site, self.bench.shared)

    def results(self) -> SiteResults:
        train_alone(self.site)
        return evaluate_site(self.site, federated_model(self.site))


@pytest.fixture(scope="module", params=["local", "whole"])
def ended(request, tmp_path_factory, data) -> tuple[str, Hospital, SiteResults]:
    hospital = Hospital(tmp_path_factory.mktemp(request.param), data, request.param)
    hospital.federate()
    hospital.finale()
    return request.param, hospital, hospital.results()


def mean_dice(path: Path) -> float:
    with path.open(newline="") as lines:
        return statistics.fmean(float(row["dice"]) for row in csv.DictReader(lines) if row["dice"])


def test_the_model_is_called_what_it_is(ended):
    kept, hospital, found = ended
    assert model_note(federated_model(hospital.site)).kept == kept
    assert (found.kept, found.round) == (kept, ROUNDS + 1)
    console = Console(width=240)
    with console.capture() as shown:
        console.print(results_view(found))
    text = shown.get()
    if kept == "local":
        assert found.overall.difference.mean == 0  # it is compared with itself
        assert "kept its local-only model" in text
        assert "federated, then" not in text
    else:
        assert "federated, then at home: whole" in text
    content = json.loads(results_json(found))
    assert content["kept"] == kept
    assert content["before_finale"]["federated"]["mean"] == pytest.approx(
        mean_dice(hospital.site.evaluations / f"test-round-{ROUNDS:06d}.csv")
    )


def test_the_federations_model_is_compared_as_it_was_after_the_last_round(ended):
    _, hospital, found = ended
    assert found.before is not None
    ours = mean_dice(hospital.site.evaluations / f"test-round-{ROUNDS:06d}.csv")
    own = alone_site(hospital.site).evaluations / f"test-round-{ROUNDS + 1:06d}.csv"
    assert found.before.difference.mean == pytest.approx(ours - mean_dice(own))


def test_rows_that_are_gone_or_damaged_are_no_comparison(ended):
    _, hospital, found = ended
    path = hospital.site.evaluations / f"test-round-{ROUNDS:06d}.csv"
    content = path.read_text()
    try:
        for text in ("", "case\nx\n", content.replace("0.", "zero")):
            path.write_text(text)
            assert evaluate_site(hospital.site, federated_model(hospital.site)).before is None
        path.unlink()
        assert evaluate_site(hospital.site, federated_model(hospital.site)).before is None
    finally:
        path.write_text(content)
    assert found.before is not None


def test_the_page_says_it_and_draws_no_choice_as_a_point(ended, tmp_path):
    kept, hospital, found = ended
    write_site_report(tmp_path / "report.html", hospital.site, found)
    page = (tmp_path / "report.html").read_text()
    assert hospital.site.evaluations.joinpath(f"validation-round-{ROUNDS + 1:06d}.csv").is_file()
    assert page.count('<circle class="dot"') == 2 * ROUNDS
    assert f"round {ROUNDS + 1}" not in page
    if kept == "local":
        assert "This site kept its local-only model" in page
        assert '<th scope="col">federated</th>' not in page
    else:
        assert page.count('<th scope="col">federated, then at home: whole</th>') == 2
    assert "last_block" in page


def test_without_the_note_of_the_choice_the_answer_still_leaves(data, tmp_path):
    hospital = Hospital(tmp_path, data, "federated")
    hospital.federate()
    finale_metrics(hospital.site, hospital.bench)
    note = hospital.site.evaluations / "finale.json"
    for content in ("{", '{"round": 3, "kept": "other", "validation_dice": {}}'):
        note.write_text(content)
        keep_personal_model(hospital.site, hospital.bench.shared)
        assert model_note(federated_model(hospital.site)).kept is None


# --- two processes that want the local-only model -------------------------------------------------


def test_a_command_does_not_train_what_the_finale_trains_just_now(data, tmp_path):
    hospital = Hospital(tmp_path, data, "local")
    hospital.federate()
    seen: list[str] = []

    def ask(*_: object) -> None:
        if not seen:
            with pytest.raises(ConfigError, match="trains the local-only model just now") as told:
                train_alone(hospital.site)
            seen.append(str(told.value))

    candidate = alone_candidate(hospital.site, on_step=ask)
    assert candidate is not None
    candidate()
    assert seen
    train_alone(hospital.site)


def test_the_finale_waits_for_a_command(data, tmp_path, monkeypatch):
    monkeypatch.setattr(alone, "_WAIT_SECONDS", 0.01)
    hospital = Hospital(tmp_path, data, "local")
    hospital.federate()
    candidate = alone_candidate(hospital.site)
    assert candidate is not None
    done: list[object] = []
    with only_one(hospital.site.config.store / "run" / "alone", "held"):
        waiting = threading.Thread(target=lambda: done.append(candidate()))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not alone_site(hospital.site).store.newest(alone_site(hospital.site).study.digest)
    waiting.join(60)
    assert len(done) == 1


def test_the_service_is_told_the_steps_of_the_local_only_model(data, tmp_path, monkeypatch):
    """Else nothing moves in `status` while a whole model is trained in the finale."""
    hospital = Hospital(tmp_path, data, "local")
    hospital.federate()
    told: list[tuple[int, int]] = []
    listeners = Listeners(alone=lambda site, round_, step, loss: told.append((round_, step)))
    asked = Instruction(
        study=hospital.site.study.digest,
        base=hospital.bench.base,
        round=ROUNDS + 1,
        action="finale",
    )
    monkeypatch.setattr(flower_app, "_bench", lambda *given: hospital.bench)
    app = make_client_app(lambda context: hospital.site, listeners=listeners)
    grid = InProcessGrid(app, ("alpha",))
    content = RecordDict({"instruction": ConfigRecord({"json": asked.to_json()})})
    (reply,) = grid.send_and_receive([Message(content, 1, "train.finale", group_id="1")])
    answer = reply.content
    assert "payload" in answer
    assert told == [(r, s) for r in range(1, ROUNDS + 1) for s in (0, 1)]
