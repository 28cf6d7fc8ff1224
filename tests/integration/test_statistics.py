"""Styles and prototypes through a whole federation: given in one round, used in the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Context, Message

from tests.support.tiny import tiny_study, write_folder
from uharmony_client.flower_app import make_client_app
from uharmony_model.exchange.combined import Combined, open_combined
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import decode_body, open_payload
from uharmony_model.exchange.schema import unflatten
from uharmony_model.exchange.statistics import Said, StatisticsForm
from uharmony_model.initial import initial_weights
from uharmony_model.study import Study
from uharmony_model.unlabelled_settings import STATISTICS
from uharmony_server.admission import RefusalReason
from uharmony_server.checkpoint import Checkpoint, load_latest
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid, site_of
from uharmony_simulation.sites import make_sites

MACHINE = Machine(threads=1, device="cpu")
SIZE = 16
CASES = {"east": 3, "few": 2, "north": 4, "shy": 3}
SOURCE = Simulation.model_validate(
    {
        "source": {
            "kind": "folder",
            "sites_from": "column",
            "labels": {"few": "none", "shy": "none"},
        }
    }
)
Watch = Callable[[str, Instruction, Message], None]


def study_of(method: str = "ust-run-fed", **changes) -> Study:
    return tiny_study(
        method=method,
        network={"features": [4, 8]},
        training={"rounds": 3, "local_steps": 1, "batch_size": 1, "patch": [SIZE] * 3},
        evaluation={"validation": 0.0, "test": 0.0, "every": 0, "bootstrap": 1},
        unlabelled={"min_patients": 3, "warm_up": 0, "amplitude": "full", "queue_size": 2},
        **changes,
    )


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sites; `shy` gives nothing, `few` has too few patients."""
    root = tmp_path_factory.mktemp("home")
    data = write_folder(root / "volumes", CASES, size=SIZE)
    make_sites(study_of(), SOURCE, data, root / "sites")
    path = root / "sites" / "shy" / "site.yaml"
    content = yaml.safe_load(path.read_text())
    assert tuple(content["policy"].pop("statistics")) == STATISTICS
    path.write_text(yaml.safe_dump(content))
    return root / "sites"


@dataclass
class Seen:
    """One message to a site for a round, and its answer."""

    site: str
    order: Instruction
    given: bytes | None
    reply: Message


class Run:
    """A federation of the four sites with stores of its own."""

    def __init__(self, sites: Path, folder: Path, study: Study) -> None:
        self.study, self.folder = study, folder
        arm = Arm.of(study, study.method, study.seed, tuple(CASES))
        self.opener = SiteOpener(arm, sites, MACHINE, folder / "stores")
        self.form = StatisticsForm.of(study)
        self.seen: list[Seen] = []

    def __call__(self, *, kill: tuple[str, int] | None = None, tamper=None) -> Checkpoint:
        """Run to the end, or until the site of `kill` is asked for its round."""
        schema, initial = initial_weights(self.study)
        inner = make_client_app(self.opener)
        self.seen.clear()

        def app(message: Message, context: Context) -> Message:
            site = site_of(context)
            order = Instruction.from_json(
                str(message.content.config_records["instruction"]["json"])
            )
            if kill == (site, order.round):
                raise KeyboardInterrupt
            reply = inner(message, context)
            if order.action == "train":
                record = message.content.array_records.get("statistics")
                given = None if record is None else record["payload"].data
                if tamper is not None:
                    tamper(site, order.round, reply)
                self.seen.append(Seen(site, order, given, reply))
            return reply

        grid = InProcessGrid(app, CASES)
        return run_rounds(self.study, schema, initial, grid, self.folder / "server")

    def round(self, number: int) -> dict[str, Seen]:
        return {seen.site: seen for seen in self.seen if seen.order.round == number}

    def given(self, number: int) -> Combined:
        """What all sites were given for a round: the same, and as the instruction says."""
        messages = list(self.round(number).values())
        assert len(messages) == len(CASES)
        (data,) = {seen.given for seen in messages}
        assert data is not None
        assert {seen.order.given for seen in messages} == {sha256(data).hexdigest()}
        assert {seen.order.base for seen in messages} == {
            open_payload(data, max_bytes=1 << 22)[0].base
        }
        return open_combined(data, self.form)[1]

    def style(self, site: str) -> np.ndarray:
        """The mean amplitude of a site's volumes: a patch is as large as they are."""
        opened, middle = self.opener.named(site), SIZE // 2
        boxes = []
        for case in opened.split("train"):
            shown = np.array(opened.volumes[case.case].image[0], dtype=np.float64) + 4
            spectrum = np.fft.fftshift(np.abs(np.fft.fftn(shown))) / shown.size
            boxes.append(spectrum[(slice(middle - 1, middle + 2),) * 3])
        return np.asarray(np.mean(boxes, axis=0))


@pytest.fixture(scope="module")
def federation(tmp_path_factory, sites) -> tuple[Run, Checkpoint]:
    run = Run(sites, tmp_path_factory.mktemp("styles"), study_of())
    return run, run()


def test_a_round_is_given_the_styles_of_the_one_before(federation):
    run, state = federation
    assert (state.round, state.refusals) == (3, ())
    assert {seen.given for seen in run.round(1).values()} == {None}
    assert {seen.order.given for seen in run.round(1).values()} == {""}
    for number in (2, 3):
        styles = run.given(number).styles
        assert len(styles) == 2
        for style, site in zip(styles, ("east", "north"), strict=True):
            np.testing.assert_allclose(style[0].numpy(), run.style(site), rtol=1e-4, atol=1e-6)


def test_who_gives_nothing_says_why_and_receives_all_the_same(federation):
    run, state = federation
    assert state.statistics is not None
    assert state.statistics.said == {
        "east": {"amplitude": Said.GIVEN},
        "few": {"amplitude": Said.TOO_FEW_PATIENTS},
        "north": {"amplitude": Said.GIVEN},
        "shy": {"amplitude": Said.NOT_OPTED_IN},
    }
    sent = {seen.site: "amplitude" in seen.reply.content for seen in run.round(1).values()}
    assert sent == {"east": True, "few": False, "north": True, "shy": False}
    assert run.round(2)["shy"].given == run.round(2)["east"].given
    assert len(run.given(2).styles) == 2  # by `given`: every site has the same
    assert not (run.folder / "stores" / "few" / "ledger").exists()


def test_the_bytes_of_a_round_are_those_of_updates_and_of_statistics(federation):
    run, state = federation
    for number, counted in enumerate(state.bytes_up, start=1):
        payloads = [
            len(array.data)
            for seen in run.round(number).values()
            for record in seen.reply.content.array_records.values()
            for array in record.values()
        ]
        assert len(payloads) == (6 if number == 1 else 4)
        assert counted == sum(payloads)


def test_a_style_is_asked_for_once(federation):
    run, _ = federation
    asked = {
        number: {s.order.statistics for s in run.round(number).values()} for number in (1, 2, 3)
    }
    assert asked == {1: {("amplitude",)}, 2: {()}, 3: {()}}
    assert all("statistics" not in seen.reply.content for seen in run.round(2).values())


def test_styles_change_what_is_learned(federation, sites, tmp_path):
    _, state = federation

    def lost(site: str, round_: int, reply: Message) -> None:
        reply.content.pop("statistics", None)

    without = Run(sites, tmp_path, study_of())
    other = without(tamper=lost)
    assert {seen.given for seen in without.seen} == {None}
    assert other.statistics is None
    assert other.digest != state.digest


@pytest.mark.parametrize("at", [("north", 1), ("few", 2), ("east", 3)])
def test_a_killed_coordinator_ends_with_the_same_weights(federation, sites, tmp_path, at):
    """Sites that had answered answer from their stores, the style among it."""
    _, state = federation
    run = Run(sites, tmp_path, study_of())
    with pytest.raises(KeyboardInterrupt):
        run(kill=at)
    found = run()
    assert found.digest == state.digest
    assert (found.round, found.refusals) == (3, ())
    assert {number for number in (1, 2, 3) if run.round(number)} == set(range(at[1], 4))
    schema = initial_weights(run.study)[0]
    kept = load_latest(tmp_path / "server", run.study.digest, schema)
    assert kept is not None
    assert kept.statistics is not None
    assert set(kept.statistics.styles) == {"east", "north"}


def test_a_bad_statistic_is_refused_and_the_update_counts(sites, tmp_path):
    def swapped(site: str, round_: int, reply: Message) -> None:
        if site == "east" and round_ == 1:
            reply.content["amplitude"] = reply.content["payload"]

    run = Run(sites, tmp_path, study_of())
    state = run(tamper=swapped)
    (refusal,) = state.refusals
    assert (refusal.site, refusal.round, refusal.reason) == ("east", 1, RefusalReason.WRONG_KIND)
    assert state.counted == (tuple(sorted(CASES)),) * 3
    assert state.statistics is not None
    assert set(state.statistics.styles) == {"north"}


def test_the_coordinator_merges_what_labelled_sites_say_of_their_features(sites, tmp_path):
    run = Run(sites, tmp_path, study_of("glua-fed"))
    state = run()
    assert state.refusals == ()
    assert {seen.order.statistics for seen in run.round(3).values()} == {("prototypes",)}
    for number in (1, 2):
        counts, sums, squares = torch.zeros(2), torch.zeros(2, 8), torch.zeros(2, 8)
        givers = [seen for seen in run.round(number).values() if "prototypes" in seen.reply.content]
        # `few` and `shy` have no labels that may be used.
        assert [seen.site for seen in givers] == ["east", "north"]
        for seen in givers:
            data = seen.reply.content.array_records["prototypes"]["payload"].data
            manifest, body, _ = open_payload(data, max_bytes=1 << 22)
            assert manifest.base == seen.order.base
            schema = run.form.schema("prototypes")
            one = unflatten(decode_body(manifest, body, schema), schema)
            n = one["present"][:, None]  # of how many voxels they are nobody says
            counts, sums = counts + one["present"], sums + n * one["mean"]
            squares = squares + n * (one["variance"] + one["mean"] ** 2)
        merged = run.given(number + 1).prototypes
        assert merged is not None
        assert counts.tolist() == [2.0, 2.0]
        assert bool(merged.present.all())
        mean = sums / counts[:, None]
        torch.testing.assert_close(merged.mean, mean, rtol=1e-4, atol=1e-5)
        variance = squares / counts[:, None] - mean**2
        torch.testing.assert_close(merged.variance, variance, rtol=1e-3, atol=1e-4)
    assert len(run.given(2).styles) == 2


def test_a_study_without_statistics_is_as_before(sites, tmp_path):
    run = Run(sites, tmp_path, study_of("fixmatch-fed"))
    state = run()
    assert state.statistics is None
    for seen in run.seen:
        assert set(seen.reply.content) == {"payload"}
        assert seen.given is None
        assert set(seen.order.model_dump()) == {
            "action", "study", "round", "base", "final", "splits", "receipt",
        }  # fmt: skip
    (newest,) = (tmp_path / "server").glob("round-000003")
    assert {p.name for p in newest.iterdir()} == {"weights.safetensors", "state.json"}
