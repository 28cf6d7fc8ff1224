"""Experts and prototypes through a whole federation: what was opted in to, and only once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from tests.support.tiny import tiny_study, write_folder
from uharmony_client.flower_app import make_client_app
from uharmony_model.bundle import load_bundle
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import encode, open_payload
from uharmony_model.exchange.published import PublicationForm, Reason
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.exchange_settings import Publishable
from uharmony_model.initial import initial_weights
from uharmony_model.publication import read_publication
from uharmony_model.study import Study
from uharmony_server.admission import RefusalReason
from uharmony_server.checkpoint import Checkpoint, load_latest
from uharmony_server.export import export_model
from uharmony_server.rounds import Patience, run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener, run_arm
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid, site_of
from uharmony_simulation.sites import make_sites

MACHINE = Machine(threads=1, device="cpu")
SOURCE = Simulation.model_validate({"source": {"kind": "folder", "sites_from": "column"}})
CASES = {"both": 10, "experts": 11, "none": 10, "small": 9}
OPTED_IN = {
    "both": ["experts", "prototypes"],
    "experts": ["experts"],
    "none": [],
    "small": ["experts", "prototypes"],
}
Tamper = Callable[[str, Message], Message]


def study_of(name: str = "tiny", **publication) -> Study:
    asked = {"experts": True, "prototypes": True, "center": [0.0], "scale": [1.0]}
    return tiny_study(
        name=name,
        training={"rounds": 1, "local_steps": 1, "batch_size": 1, "patch": [8, 8, 8]},
        network={"harmonization": {"domain_dropout": 0.0}},  # else the one step may be without
        evaluation={"validation": 0.0, "test": 0.0, "every": 0, "bootstrap": 1},
        publication={**asked, **publication},
    )


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("home")
    data = write_folder(root / "volumes", CASES, size=8)
    make_sites(study_of(), SOURCE, data, root / "sites")
    for site, allowed in OPTED_IN.items():
        path = root / "sites" / site / "site.yaml"
        content = yaml.safe_load(path.read_text())
        content["policy"]["publish"] = allowed
        path.write_text(yaml.safe_dump(content))
    return root / "sites"


class Run:
    """An arm at the four sites, each with a store of its own for a study's name."""

    def __init__(self, sites: Path, folder: Path, study: Study) -> None:
        self.folder, self.study = folder, study
        self.sites = sites
        self.arm = Arm.of(study, study.method, study.seed, tuple(CASES))
        self.opener = SiteOpener(self.arm, sites, MACHINE)
        self.sent: list[tuple[str, Message]] = []

    def __call__(self, tamper: Tamper | None = None, *, certified: bool = False) -> Checkpoint:
        schema, initial = initial_weights(self.study)
        inner = make_client_app(self.opener)
        self.sent.clear()

        def app(message: Message, context: Context) -> Message:
            site, reply = site_of(context), inner(message, context)
            if message.metadata.message_type != "train.publish":
                return reply
            reply = reply if tamper is None else tamper(site, reply)
            self.sent.append((site, reply))
            return reply

        grid = InProcessGrid(app, self.arm.sites)
        patience = Patience(certified=grid.sites.get) if certified else None
        folder = self.folder / "server"
        return run_rounds(self.study, schema, initial, grid, folder, patience=patience)

    def local(self, site: str) -> dict[str, torch.Tensor]:
        carried = self.opener.named(site).store.before(self.study.digest, 2)
        assert carried is not None
        return carried


def payloads(message: Message) -> dict[str, bytes]:
    return {
        name: message.content.array_records[name]["payload"].data
        for name in ("experts", "prototypes")
        if name in message.content
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory, sites) -> tuple[Run, Checkpoint]:
    run = Run(sites, tmp_path_factory.mktemp("published"), study_of())
    return run, run()


def test_exactly_what_was_opted_in_to_leaves(published):
    run, state = published
    assert state.refusals == ()
    assert {site: set(payloads(reply)) for site, reply in run.sent} == {
        "both": {"experts", "prototypes"},
        "experts": {"experts"},
        "none": set(),
        "small": set(),
    }
    few, out = (Reason.TOO_FEW_PATIENTS,), (Reason.NOT_OPTED_IN,)
    done = (Reason.PUBLISHED,)
    assert state.published is not None
    assert state.published.said == {
        "both": {"experts": done, "prototypes": done},
        "experts": {"experts": done, "prototypes": out},
        "none": {"experts": out, "prototypes": out},
        "small": {"experts": few, "prototypes": few},
    }


def test_what_is_handed_out_is_what_the_sites_carry(published, tmp_path):
    run, state = published
    export_model(state, run.study, tmp_path / "model")
    found = read_publication(tmp_path / "model")
    assert found is not None
    assert {site: dict(e.patients) for site, e in found.experts.items()} == {
        "both": {"both": 10},
        "experts": {"experts": 11},
    }
    for site, expert in found.experts.items():
        carried = run.local(site)
        wanted = {key for key in carried if key.endswith(f"@{site}") and "optimizer" not in key}
        assert expert.residuals.keys() == wanted
        assert all(torch.equal(expert.residuals[key], carried[key]) for key in wanted)
        assert any(bool(tensor.any()) for tensor in expert.residuals.values())
    # One prototype came; alone it would be the nearest to every volume.
    assert state.published is not None
    (prototype,) = state.published.prototypes
    assert (prototype.domain, prototype.patients, prototype.epsilon) == ("both.both", 10, 1.0)
    assert len(prototype.mean) == 8
    assert found.prototypes is None
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "study.json", "shared.safetensors", "sites", "README.md", "experts",
    }  # fmt: skip
    assert "no privacy is claimed" in (tmp_path / "model" / "README.md").read_text()
    assert load_bundle(tmp_path / "model", None).study == run.study


def test_it_is_asked_once_and_kept_with_the_checkpoint(published):
    run, state = published
    resumed = Run(run.sites, run.folder, run.study)
    again = resumed()
    assert resumed.sent == []
    assert again.published is not None
    assert state.published is not None
    assert again.published.said == state.published.said
    assert again.published.prototypes == state.published.prototypes
    assert again.digest == state.digest


def test_a_coordinator_that_lost_it_is_sent_the_same_bytes(published, sites, tmp_path):
    run, state = published
    first = {site: payloads(reply) for site, reply in run.sent}
    other = Run(sites, tmp_path, run.study)
    again = other()
    assert {site: payloads(reply) for site, reply in other.sent} == first
    assert first["both"]["prototypes"]
    assert again.published is not None
    assert state.published is not None
    assert again.published.prototypes == state.published.prototypes


def test_publishing_changes_nothing_else_and_the_noise_is_drawn_anew(published, sites, tmp_path):
    """Equal studies of another name have equal bits, but not equal noise."""
    _, state = published
    other = Run(sites, tmp_path, study_of("other"))()
    silent = Run(sites, tmp_path / "silent", study_of("silent", experts=False, prototypes=False))
    assert other.digest == state.digest == silent().digest
    assert silent.sent == []
    assert other.published is not None
    assert state.published is not None
    mine, theirs = other.published, state.published
    for site in ("both", "experts"):
        one, two = mine.experts[site].residuals, theirs.experts[site].residuals
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert mine.prototypes[0].mean != theirs.prototypes[0].mean


def test_among_institutions_it_is_asked_the_same_way(sites, tmp_path):
    run = Run(sites, tmp_path, study_of("certified"))
    state = run(certified=True)
    assert state.published is not None
    assert set(state.published.experts) == {"both", "experts"}
    assert [p.domain for p in state.published.prototypes] == ["both.both"]
    run(certified=True)
    assert run.sent == []


def test_where_nobody_answers_all_are_asked_again(sites, tmp_path):
    def silent(site: str, reply: Message) -> Message:
        del reply.content["publication"]
        return reply

    run = Run(sites, tmp_path, study_of("silence"))
    state = run(silent)
    assert state.published is None
    assert {r.reason for r in state.refusals} == {RefusalReason.SITE_ERROR}
    later = run()
    assert [site for site, _ in run.sent] == sorted(CASES)
    assert later.published is not None
    assert set(later.published.experts) == {"both", "experts"}


def test_a_damaged_publication_is_a_damaged_checkpoint(sites, tmp_path):
    run = Run(sites, tmp_path, study_of("damaged"))
    state = run()
    (path,) = (tmp_path / "server").glob("round-*/published/published.json")
    text = path.read_text()
    assert '"patients":10' in text
    path.write_text(text.replace('"patients":10', '"patients":99'))
    with pytest.raises(StoreError, match="checkpoints can be read"):
        load_latest(tmp_path / "server", run.study.digest, state.schema)


def test_the_arm_of_a_simulation_has_it_too(published, sites, tmp_path):
    run, _ = published
    run_arm(run.arm, sites, tmp_path / "arm", MACHINE, figures=False)
    found = read_publication(tmp_path / "arm" / "model")
    assert found is not None
    assert set(found.experts) == {"both", "experts"}
    outcome = json.loads((tmp_path / "arm" / "done.json").read_text())
    assert "prototype" not in json.dumps(outcome)


def test_methods_without_residuals_at_the_sites_publish_nothing(sites, tmp_path):
    run = Run(sites, tmp_path, study_of("plain").with_method("fedavg"))
    state = run()
    assert (state.published, run.sent, state.refusals) == (None, [], ())


def test_a_frame_that_does_not_fit_is_known_before_anybody_trains(sites, tmp_path):
    run = Run(sites, tmp_path, study_of("unfit", scale=[1.0, 1.0, 1.0]))
    with pytest.raises(ConfigError, match="center and scale"):
        run()
    assert not (tmp_path / "server").exists()


# --- what is refused -----------------------------------------------------------------------------


def changed(reply: Message, what: str, **changes) -> Message:
    """The site's own release with something else in it, otherwise well made and sealed."""
    form = PublicationForm.of(study_of("tampered"))
    kind: Publishable = "prototypes" if what == "prototypes" else "experts"
    data = reply.content.array_records[kind]["payload"].data
    manifest, body, _ = open_payload(data, max_bytes=1 << 24)
    flat = torch.frombuffer(bytearray(body), dtype=torch.float32)
    domains = [name.removeprefix("patients/") for name in manifest.values if "/" in name]
    fields = {
        "kind": manifest.kind,
        "study": manifest.study,
        "round": manifest.round,
        "site": manifest.site,
        "base": manifest.base,
        "values": dict(manifest.values),
        "schema": form.schema(kind, domains),
        "flat": flat,
    }
    made = encode(**{**fields, **{k: v(fields) for k, v in changes.items()}})
    array = Array("uint8", (len(made),), "uharmony.payload", made)
    reply.content[kind] = ArrayRecord({"payload": array})
    return reply


def renamed(fields) -> Schema:
    tensors = fields["schema"].tensors
    first = TensorSpec(name="aaa@both", shape=tensors[0].shape)
    return Schema(tensors=(first, *tensors[1:]))


def reshaped(fields) -> Schema:
    (spec, *rest) = fields["schema"].tensors
    return Schema(tensors=(TensorSpec(name=spec.name, shape=(1, *spec.shape)), *rest))


def with_value(name: str, value: object):
    return lambda fields: {**fields["values"], name: value}


HOSTILE = {
    "foreign tensor": ("experts", {"schema": renamed}, RefusalReason.WRONG_SCHEMA),
    "other shape": ("experts", {"schema": reshaped}, RefusalReason.WRONG_SCHEMA),
    "NaN": (
        "experts",
        {"flat": lambda f: f["flat"].index_fill(0, torch.tensor([1]), float("nan"))},
        RefusalReason.NOT_FINITE,
    ),
    "another site": ("experts", {"site": lambda f: "experts"}, RefusalReason.WRONG_SITE),
    "another study": ("experts", {"study": lambda f: "0" * 64}, RefusalReason.WRONG_STUDY),
    "other weights": ("experts", {"base": lambda f: "0" * 64}, RefusalReason.WRONG_BASE),
    "another domain": (
        "experts",
        {"values": with_value("patients/elsewhere", 20)},
        RefusalReason.WRONG_SCHEMA,
    ),
    "no name": ("experts", {"values": with_value("patients/a b", 20)}, RefusalReason.WRONG_SCHEMA),
    "few": ("experts", {"values": with_value("patients/both", 9)}, RefusalReason.BAD_CASE_COUNT),
    "a text": (
        "experts",
        {"values": with_value("patients/both", "<11")},
        RefusalReason.WRONG_SCHEMA,
    ),
    "more values": ("experts", {"values": with_value("dice", 0.5)}, RefusalReason.WRONG_SCHEMA),
    "budget": (
        "prototypes",
        {"values": with_value("epsilon", 0.5)},
        RefusalReason.WRONG_BUDGET,
    ),
    "far away": ("prototypes", {"flat": lambda f: f["flat"] + 1e3}, RefusalReason.NORM_TOO_LARGE),
    "infinite": (
        "prototypes",
        {"flat": lambda f: f["flat"] + float("inf")},
        RefusalReason.NOT_FINITE,
    ),
}


@pytest.fixture(scope="module")
def tampered(tmp_path_factory, sites) -> dict[str, tuple[Checkpoint, str]]:
    """Every hostile answer of the site `both`, to a coordinator that trains anew each time."""
    found = {}
    for what, (kind, changes, _) in HOSTILE.items():

        def tamper(site: str, reply: Message, kind=kind, changes=changes) -> Message:
            return changed(reply, kind, **changes) if site == "both" else reply

        run = Run(sites, tmp_path_factory.mktemp("tampered"), study_of("tampered"))
        found[what] = (run(tamper), kind)
    return found


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bad_release_is_refused_with_its_reason_and_the_others_count(tampered, what):
    state, kind = tampered[what]
    (refusal,) = state.refusals
    assert (refusal.site, refusal.reason, refusal.round) == ("both", HOSTILE[what][2], 3)
    assert state.published is not None
    expected = {"experts"} if kind == "experts" else {"both", "experts"}
    assert set(state.published.experts) == expected
    assert len(state.published.prototypes) == (1 if kind == "experts" else 0)


@pytest.mark.parametrize("text", ["", "[]", '{"experts": ["because"]}', '{"ages": ["published"]}'])
def test_an_answer_without_codes_is_refused(sites, tmp_path, text):
    def tamper(site: str, reply: Message) -> Message:
        if site == "both":
            reply.content["publication"] = ConfigRecord({"json": text})
        return reply

    state = Run(sites, tmp_path, study_of("tampered"))(tamper)
    (refusal,) = state.refusals
    assert (refusal.site, refusal.reason) == ("both", RefusalReason.DAMAGED)
    assert state.published is not None
    assert set(state.published.experts) == {"experts"}


@pytest.mark.parametrize(
    ("round_", "publication", "detail"),
    [
        (2, {}, "round 2"),
        (4, {}, "round 4"),
        (3, {"experts": False, "prototypes": False}, "nothing"),
    ],
)
def test_a_site_publishes_only_when_it_was_approved(sites, round_, publication, detail):
    study = study_of("unapproved", **publication)
    arm = Arm.of(study, study.method, study.seed, tuple(CASES))
    order = Instruction(action="publish", study=study.digest, round=round_, base="0" * 64)
    record = ConfigRecord({"json": order.to_json()})
    message = Message(RecordDict({"instruction": record}), 1, "train.publish", group_id="3")
    context = Context(0, 0, {"site": "both"}, RecordDict(), {})
    reply = make_client_app(SiteOpener(arm, sites, MACHINE))(message, context)
    assert payloads(reply) == {}
    assert detail in str(reply.content.config_records["refusal"]["json"])
