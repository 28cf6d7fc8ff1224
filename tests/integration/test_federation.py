"""The whole way of the data, in one process: determinism, interruption, bad sites, no leak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message

from tests.support.tiny import tiny_study, write_folder, write_study
from uharmony_client.flower_app import make_client_app
from uharmony_client.site import Site
from uharmony_model.errors import DataError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import Kind, digest, encode, read_manifest
from uharmony_model.initial import initial_weights
from uharmony_model.methods import METHODS
from uharmony_model.networks import build_network
from uharmony_model.study import Study
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid, site_of
from uharmony_simulation.sites import make_sites

SITES = ("alpha", "beta", "gamma")
MACHINE = Machine(threads=1, device="cpu")
SOURCE = {"source": {"kind": "folder", "sites_from": "column"}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "volumes")


class Federation:
    """One federation in a folder of its own, with hooks to disturb it."""

    def __init__(self, folder: Path, data: Path, study: Study) -> None:
        self.folder, self.study = folder, study
        if not (folder / "sites").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_sites(study, Simulation.model_validate(SOURCE), data, folder / "sites")
        self.arm = Arm.of(study, study.method, study.seed, SITES)
        self.opener = SiteOpener(self.arm, folder / "sites", MACHINE)

    def run(self, *, on_step=None, on_round=None, tamper=None) -> Checkpoint:
        schema, initial = initial_weights(self.arm.study)
        inner = make_client_app(self.opener, on_step=on_step)

        def app(message: Message, context: Context) -> Message:
            reply = inner(message, context)
            return reply if tamper is None else tamper(site_of(context), message, reply)

        grid = InProcessGrid(app, self.arm.sites)
        return run_rounds(
            self.arm.study, schema, initial, grid, self.folder / "server", on_round=on_round
        )

    def local(self, site: str) -> dict[str, torch.Tensor]:
        found = self.opener.named(site).store.before(self.arm.study.digest, 99)
        assert found is not None
        return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    federation = Federation(tmp_path_factory.mktemp("undisturbed"), data, tiny_study())
    return federation, federation.run()


def test_the_same_study_and_seed_give_the_same_bits(undisturbed, tmp_path, data):
    first, state = undisturbed
    second = Federation(tmp_path, data, tiny_study())
    assert digest(second.run().global_) == digest(state.global_)
    for site in SITES:
        mine, theirs = second.local(site), first.local(site)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_another_seed_gives_other_weights(undisturbed, tmp_path, data):
    other = Federation(tmp_path, data, tiny_study(seed=1)).run()
    assert digest(other.global_) != undisturbed[1].digest


class _Interrupted(KeyboardInterrupt):
    """Stands for Ctrl-C or a kill: nothing of ours may catch it."""


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("round_", [1, 2, 3])
def test_interrupted_in_the_middle_of_a_round_and_resumed(
    undisturbed, tmp_path, data, site, round_
):
    federation = Federation(tmp_path, data, tiny_study())

    def stop(name: str, at: int, step: int, loss: float) -> None:
        if (name, at, step) == (site, round_, 1):
            raise _Interrupted

    with pytest.raises(_Interrupted):
        federation.run(on_step=stop)
    trained: list[tuple[str, int]] = []
    state = federation.run(on_step=lambda n, r, s, loss: trained.append((n, r)) if s == 0 else None)
    assert digest(state.global_) == undisturbed[1].digest
    assert state.records == undisturbed[1].records
    # Sites before the interrupted one answered from their store.
    done_before = [(s, round_) for s in SITES if s < site]
    assert not set(done_before) & set(trained)


@pytest.mark.parametrize("round_", [1, 2])
def test_interrupted_between_rounds_and_resumed(undisturbed, tmp_path, data, round_):
    federation = Federation(tmp_path, data, tiny_study())

    def stop(state: Checkpoint) -> None:
        if state.round == round_:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        federation.run(on_round=stop)
    assert digest(federation.run().global_) == undisturbed[1].digest


def _replace(reply: Message, data: bytes) -> Message:
    array = Array("uint8", (len(data),), "uharmony.payload", data)
    reply.content["payload"] = ArrayRecord({"payload": array})
    return reply


def _bad_update(study: Study, what: str, data: bytes) -> bytes:
    """The site's own update with one thing wrong, otherwise well made."""
    manifest = read_manifest(data, max_bytes=1 << 20)
    schema, _ = initial_weights(study)
    flat = torch.zeros(schema.numel)
    values: dict[str, float | int | None] = {"cases": 2, "loss": 0.5}
    if what == "nan":
        flat[3] = float("nan")
    elif what == "negative count":
        values["cases"] = -4
    else:
        tensors = list(schema.tensors)
        if what == "unknown key":
            tensors[0] = tensors[0].model_copy(update={"name": "aaa.weight"})
        else:
            shape = (*tensors[0].shape, 2)
            tensors[0] = tensors[0].model_copy(update={"shape": shape})
        schema = schema.model_copy(update={"tensors": tuple(tensors)})
        flat = torch.zeros(schema.numel)
    return encode(
        kind=Kind.UPDATE,
        study=manifest.study,
        round=manifest.round,
        site=manifest.site,
        base=manifest.base,
        codec=manifest.codec,
        schema=schema,
        values=values,
        flat=flat,
    )


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nan", "not_finite"),
        ("wrong shape", "wrong_schema"),
        ("unknown key", "wrong_schema"),
        ("negative count", "bad_case_count"),
    ],
)
def test_one_bad_site_is_refused_and_named_and_the_others_finish(tmp_path, data, what, reason):
    study = tiny_study(evaluation={"validation": 0.2, "test": 0.3, "every": 0, "bootstrap": 50})
    federation = Federation(tmp_path, data, study)

    def tamper(site: str, message: Message, reply: Message) -> Message:
        if site != "beta" or message.metadata.message_type != "train":
            return reply
        data_ = reply.content.array_records["payload"]["payload"].data
        return _replace(reply, _bad_update(federation.arm.study, what, data_))

    state = federation.run(tamper=tamper)
    assert state.round == 3
    assert {(r.site, str(r.reason)) for r in state.refusals} == {("beta", reason)}
    assert len(state.refusals) == 3
    assert torch.isfinite(state.global_).all()


def test_a_site_that_raises_is_named_and_the_others_finish(tmp_path, data, caplog):
    federation = Federation(tmp_path, data, tiny_study())

    def tamper(site: str, message: Message, reply: Message) -> Message:
        if site == "gamma" and message.metadata.message_type == "train":
            raise RuntimeError("no memory left on device")
        return reply

    state = federation.run(tamper=tamper)
    assert {r.site for r in state.refusals} == {"gamma"}
    assert "no memory left" in state.refusals[0].detail


def test_what_goes_wrong_at_a_site_is_told_without_names_of_cases_or_folders(tmp_path, data):
    federation = Federation(tmp_path, data, tiny_study())
    site = federation.opener.named("beta")
    assert site.store.before(federation.arm.study.digest, 1) is None
    broken = federation.opener

    def opener(context: Context) -> Site:
        if site_of(context) == "beta":
            raise DataError(f"case beta_1 of patient Doe at {data} cannot be read")
        return broken(context)

    federation.opener = opener  # type: ignore[assignment]
    state = federation.run()
    (refusal,) = state.refusals
    assert (refusal.site[:5], refusal.reason) == ("node-", "not_agreed")
    assert "DataError" in refusal.detail
    assert not any(word in refusal.detail for word in ("beta_1", "Doe", str(data)))


@pytest.mark.parametrize("method", ["uharmony", "fedbn", "fedavg", "local"])
def test_no_local_tensor_leaves_and_none_is_forgotten(tmp_path, data, method):
    study = tiny_study(method=method, training={"rounds": 1})
    federation = Federation(tmp_path, data, study)
    sent: list[bytes] = []

    def spy(site: str, message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            sent.append(reply.content.array_records["payload"]["payload"].data)
        return reply

    federation.run(tamper=spy)
    schema, _ = initial_weights(federation.arm.study)
    network = build_network(study, ("alpha",), seed=0)
    partition = Partition.of(network, METHODS[method].local)
    assert {t.name for t in schema.tensors} == set(partition.shared_keys)
    assert not set(partition.shared_keys) & set(partition.local_keys)
    # Every float of a payload belongs to the shared schema: there is no room for anything else.
    for data_ in sent:
        assert read_manifest(data_, max_bytes=1 << 20).numel == schema.numel
    # Planted in a local tensor, a value no training makes must not be found in what is sent.
    kept = {k for k in federation.local("alpha") if not k.startswith("optimizer/")}
    assert {k.split("@")[0] for k in kept} == set(partition.local_keys)


@pytest.mark.parametrize(
    ("averaged", "kept_there", "owner"),
    [("fedavg", "fedbn-in", "InstanceNorm3d"), ("fedavg-bn", "fedbn", "BatchNorm3d")],
)
def test_fedbn_keeps_its_norms_and_differs_from_fedavg(tmp_path, data, averaged, kept_there, owner):
    schemas, states = {}, {}
    for method in (averaged, kept_there):
        federation = Federation(tmp_path / method, data, tiny_study(method=method))
        states[method] = federation.run()
        schemas[method], _ = initial_weights(federation.arm.study)
    shared = {m: {t.name for t in s.tensors} for m, s in schemas.items()}
    kept = shared[averaged] - shared[kept_there]
    assert kept
    network = build_network(tiny_study(method=kept_there), ("alpha",), seed=0)
    modules = dict(network.named_modules())
    owners = {type(modules[key.rpartition(".")[0]]).__name__ for key in kept}
    assert owners == {owner}
    split = lambda m: torch.split(  # noqa: E731 - two uses, two lines apart
        states[m].global_, [int(torch.tensor(t.shape).prod()) for t in schemas[m].tensors]
    )
    fedavg = dict(zip([t.name for t in schemas[averaged].tensors], split(averaged), strict=True))
    fedbn = dict(zip([t.name for t in schemas[kept_there].tensors], split(kept_there), strict=True))
    assert any(not torch.equal(fedavg[k], fedbn[k]) for k in fedbn)


def test_a_lossy_codec_up_and_down_ends_near_the_lossless_one(undisturbed, tmp_path, data):
    study = tiny_study(codec={"up": "bf16", "down": "bf16"})
    lossy = Federation(tmp_path, data, study).run().global_
    exact = undisturbed[1].global_
    moved = (exact - initial_weights(tiny_study())[1]).norm()
    assert 0 < float((lossy - exact).norm()) < 0.2 * float(moved)


@pytest.mark.alone
@pytest.mark.slow
def test_flowers_ray_engine_gives_the_same_bits(undisturbed, tmp_path, data):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    study = write_study(tmp_path / "study.yaml")
    # A process of its own, as a user starts it: Ray leaves workers behind in the one it ran in.
    program = "from uharmony_simulation.app import main; main()"
    options = ["--data", data, "--out", tmp_path / "out", "--engine", "ray", "--threads", "1"]
    subprocess.run(
        [sys.executable, "-c", program, "run", study, *options, "--device", "cpu"],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        timeout=300,
    )
    outcome = json.loads((tmp_path / "out/arms/uharmony/seed-0/done.json").read_text())
    assert outcome["weights"] == undisturbed[1].digest
