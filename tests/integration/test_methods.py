"""Every method as a federation in one process: it runs, and gives the same bits however it went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from torch import Tensor

from tests.support.tiny import tiny_study, write_folder
from uharmony_client.flower_app import make_client_app
from uharmony_client.personal import local_parameters, personal_part
from uharmony_model.errors import NetworkError
from uharmony_model.exchange.payload import read_manifest
from uharmony_model.initial import initial_weights
from uharmony_model.methods import METHODS
from uharmony_model.networks import build_network
from uharmony_model.study import Study
from uharmony_server.checkpoint import Checkpoint, load_latest, save
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid
from uharmony_simulation.sites import make_sites

MACHINE = Machine(threads=1, device="cpu")
SOURCE = Simulation.model_validate({"source": {"kind": "folder", "sites_from": "column"}})
SITES = ("alpha", "gamma")
Spy = Callable[[Message, Message], None]


class Interrupted(KeyboardInterrupt):
    """Stands for a kill: nothing of ours may catch it."""


def study_of(method: str, name: str = "tiny", **training: object) -> Study:
    """Studies of other names have stores of their own at the same sites, and the same bits."""
    settings = {"rounds": 3, "local_steps": 2, "batch_size": 1, "patch": [8, 8, 8], **training}
    shares = {"validation": 0.0, "test": 0.3, "every": 0, "bootstrap": 1, "metrics": ["dice"]}
    return tiny_study(name=name, method=method, training=settings, evaluation=shares)


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> tuple[Path, Path]:
    """The same sites twice, so that nothing of a first run is found by a second one."""
    data = write_folder(tmp_path_factory.mktemp("data") / "volumes", {"alpha": 4, "gamma": 4}, 8)
    made = []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name) / "sites"
        make_sites(study_of("fedavg"), SOURCE, data, folder)
        made.append(folder)
    return made[0], made[1]


class Run:
    """One arm at the sites of a folder."""

    def __init__(self, sites: Path, folder: Path, study: Study) -> None:
        self.arm = Arm.of(study, study.method, study.seed, SITES)
        self.folder, self.opener = folder, SiteOpener(self.arm, sites, MACHINE)

    def __call__(self, *, on_step=None, on_round=None, spy: Spy | None = None) -> Checkpoint:
        schema, initial = initial_weights(self.arm.study)
        inner = make_client_app(self.opener, on_step=on_step)

        def app(message: Message, context: Context) -> Message:
            reply = inner(message, context)
            if spy is not None:
                spy(message, reply)
            return reply

        grid = InProcessGrid(app, self.arm.sites)
        return run_rounds(self.arm.study, schema, initial, grid, self.folder, on_round=on_round)

    def carried(self) -> dict[str, Tensor]:
        """What all sites hold at the end."""
        found = {}
        for name in self.arm.sites:
            store = self.opener.named(name).store
            last = store.before(self.arm.study.digest, self.arm.study.training.rounds + 2)
            assert last is not None
            found.update({f"{name}: {key}": tensor for key, tensor in last.items()})
        return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def skip_unbuilt(study: Study) -> None:
    try:
        build_network(study, ("alpha",), seed=0)
    except (NetworkError, KeyError) as error:
        if study.plan.backbone is None:
            raise
        pytest.skip(f"{study.plan.backbone}: {error}")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_twice_to_the_same_bits(homes, tmp_path, method):
    edge = 8 if METHODS[method].backbone is None else 16
    study = study_of(method, rounds=2, patch=[edge] * 3)
    skip_unbuilt(study)
    updates: list[tuple[int, str]] = []

    def spy(message: Message, reply: Message) -> None:
        if message.metadata.message_type == "train":
            data = reply.content.array_records["payload"]["payload"].data
            manifest = read_manifest(data, max_bytes=1 << 20)
            updates.append((manifest.numel, manifest.schema_digest))

    runs = [Run(home, tmp_path / home.parent.name, study) for home in homes]
    first, second = runs[0](spy=spy), runs[1]()
    assert first.round == 2
    assert not first.refusals
    assert first.digest == second.digest
    assert first.records == second.records
    assert {r["site"] for r in first.records} == set(SITES)
    assert all(r["dice"] is not None for r in first.records)
    mine, theirs = runs[0].carried(), runs[1].carried()
    assert same(mine, theirs)
    # Every float that left belongs to the shared schema.
    schema, initial = initial_weights(runs[0].arm.study)
    assert set(updates) == {(schema.numel, schema.digest)}
    assert len(updates) == 2 * len(runs[0].arm.sites)
    if schema.numel:
        assert not torch.equal(first.global_, initial)
    names = {key.partition(": ")[2] for key in mine}
    assert bool(personal_part(dict.fromkeys(names, initial))) == (method == "ditto")
    kept = set(local_parameters(dict.fromkeys(names, initial)))
    shared = {tensor.name for tensor in schema.tensors}
    assert not {key.partition("@")[0] for key in kept} & shared


RESUMED = ("fedadam", "ditto", "fedrep", "silobn")


@pytest.fixture(scope="module")
def undisturbed(homes, tmp_path_factory) -> dict[str, tuple[Checkpoint, dict[str, Tensor]]]:
    found = {}
    for method in RESUMED:
        run = Run(homes[0], tmp_path_factory.mktemp(method), study_of(method))
        found[method] = run(), run.carried()
    return found


def stop_after_round_2(state: Checkpoint) -> None:
    if state.round == 2:
        raise Interrupted


def stop_in_round_2(site: str, round_: int, step: int, loss: float) -> None:
    if (site, round_, step) == ("gamma", 2, 1):
        raise Interrupted


@pytest.mark.parametrize("where", ["between", "within"])
@pytest.mark.parametrize("method", RESUMED)
def test_killed_it_ends_in_the_same_bits(undisturbed, homes, tmp_path, method, where):
    run = Run(homes[1], tmp_path, study_of(method, where))
    stop_between, stop_within = (
        (stop_after_round_2, None) if where == "between" else (None, stop_in_round_2)
    )
    with pytest.raises(Interrupted):
        run(on_round=stop_between, on_step=stop_within)
    state, carried = undisturbed[method]
    resumed = run()
    assert resumed.digest == state.digest
    assert resumed.records == state.records
    assert same(run.carried(), carried)
    assert (resumed.momentum is None) == (state.momentum is None) == (method != "fedadam")
    for pair in zip(resumed.momentum or (), state.momentum or (), strict=True):
        assert torch.equal(*pair)


def test_without_its_momentum_fedadam_would_end_elsewhere(undisturbed, homes, tmp_path):
    """So that the tests above can fail."""
    run = Run(homes[1], tmp_path, study_of("fedadam", "without"))
    with pytest.raises(Interrupted):
        run(on_round=stop_after_round_2)
    found = load_latest(tmp_path, run.arm.study.digest, initial_weights(run.arm.study)[0])
    assert found is not None
    save(tmp_path, replace(found, momentum=None))
    assert run().digest != undisturbed["fedadam"][0].digest


def test_fedadam_and_fedprox_are_not_fedavg_and_dittos_shared_model_is(
    undisturbed, homes, tmp_path
):
    fedavg, fedprox = (
        Run(homes[0], tmp_path / method, study_of(method, proximal=1.0))().digest
        for method in ("fedavg", "fedprox")
    )
    assert len({fedavg, fedprox, undisturbed["fedadam"][0].digest}) == 3
    assert undisturbed["ditto"][0].digest == fedavg
