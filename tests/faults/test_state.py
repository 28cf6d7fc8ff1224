"""The coordinator's state, in one process, at every point: kills, flipped bits, answers twice.

The sites' stores hold the last rounds of an undisturbed run, so every attempt takes milliseconds
and must not train a single step. Writes that were never synchronised: `test_power_loss.py` among
the integration tests.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import Message, MessageType

from tests.faults.record import keep
from tests.support.kill import Killed, killed_at
from tests.support.tiny import tiny_study, write_folder
from uharmony_client.flower_app import make_client_app
from uharmony_model.initial import initial_weights
from uharmony_model.study import Study
from uharmony_server import rounds
from uharmony_server.aggregate import WeightedSum
from uharmony_server.checkpoint import Checkpoint, load_latest, save
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid
from uharmony_simulation.sites import make_sites

pytestmark = [pytest.mark.slow]
SITES = ("alpha", "beta", "gamma")
STUDY: Study = tiny_study(
    training={"rounds": 5}, evaluation={"validation": 0.0, "test": 0.0, "every": 0}
)
KEPT_ROUNDS = (3, 4, 5)  # what the sites' stores hold at the end
SOURCE = {"source": {"kind": "folder", "sites_from": "column"}}
Grids = Callable[..., InProcessGrid]


@dataclass
class Stood:
    """What an undisturbed run has left: stores, and the coordinator's folder after each round."""

    folder: Path
    opener: SiteOpener
    final: Checkpoint
    steps: list[tuple[str, int]] = field(default_factory=list)

    def after(self, round_: int, target: Path) -> Path:
        """A copy of the coordinator's folder as it was after a round."""
        return Path(shutil.copytree(self.folder / f"after-{round_}", target))

    def go_on(self, folder: Path, kind: Grids = InProcessGrid) -> Checkpoint:
        """Run from where the folder stands to the end."""
        self.steps.clear()
        app = make_client_app(self.opener, on_step=lambda s, r, n, loss: self.steps.append((s, r)))
        return run_rounds(STUDY, *initial_weights(STUDY), kind(app, SITES), folder)

    def check(self, state: Checkpoint) -> None:
        """The same bits, every site counted once in each round, and no step trained again."""
        assert state.digest == self.final.digest
        assert torch.equal(state.global_, self.final.global_)
        assert state.counted == (SITES,) * STUDY.training.rounds
        assert not self.steps


@pytest.fixture(scope="module")
def stood(tmp_path_factory: pytest.TempPathFactory) -> Stood:
    folder = tmp_path_factory.mktemp("stood")
    data = write_folder(folder / "data")
    make_sites(STUDY, Simulation.model_validate(SOURCE), data, folder / "sites")
    arm = Arm.of(STUDY, STUDY.method, STUDY.seed, SITES)
    opener = SiteOpener(arm, folder / "sites", Machine(threads=1, device="cpu"))
    (folder / "after-0").mkdir()

    def note(state: Checkpoint) -> None:
        shutil.copytree(folder / "server", folder / f"after-{state.round}")

    final = run_rounds(
        STUDY,
        *initial_weights(STUDY),
        InProcessGrid(make_client_app(opener), SITES),
        folder / "server",
        on_round=note,
    )
    return Stood(folder, opener, final)


@pytest.mark.faults_quick
def test_killed_at_every_write_of_a_checkpoint(stood: Stood, tmp_path: Path, monkeypatch):
    points = 0
    for round_ in KEPT_ROUNDS:
        at, done = 0, False
        while not done:
            folder = stood.after(round_ - 1, tmp_path / f"{round_}-{at}")

            def cut(where: Path, state: Checkpoint, at: int = at, round_: int = round_) -> None:
                if state.round != round_:
                    save(where, state)
                    return
                with killed_at(at) as countdown:
                    save(where, state)
                if countdown.calls > at:
                    raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(rounds, "save", cut)
                try:
                    stood.go_on(folder)
                    done = True
                except Killed:
                    points += 1
            stood.check(stood.go_on(folder))
            at += 1
    # Each round: a folder, two files, the fsyncs and renames; from the fourth on one is removed.
    assert points >= 3 * 10
    keep("kill at every change of the disk while a checkpoint is written (in one process)",
         f"{points} points, all identical")  # fmt: skip


@pytest.mark.faults_quick
def test_killed_at_every_step_of_the_sum(stood: Stood, tmp_path: Path, monkeypatch):
    points = 0
    for name in ("add", "apply"):
        real = getattr(WeightedSum, name)
        for at in range(10):
            calls = 0

            def cut(self, *given, real=real, at=at):
                nonlocal calls
                calls += 1
                if calls > at:
                    raise Killed
                return real(self, *given)

            folder = stood.after(2, tmp_path / f"{name}-{at}")
            with monkeypatch.context() as patch:
                patch.setattr(WeightedSum, name, cut)
                try:
                    stood.go_on(folder)
                    break
                except Killed:
                    points += 1
            stood.check(stood.go_on(folder))
    # Three sites are added in groups of two and one, and applied once: three rounds of each.
    assert points == 3 * 2 + 3 * 1
    keep("kill at every step of the sum (in one process)", f"{points} points, all identical")


def damaged(path: Path, rng: random.Random, how: str) -> None:
    """Flip one bit of a file, or cut it short."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    else:
        del data[at:]
    path.write_bytes(data)


@pytest.mark.faults
@pytest.mark.parametrize(("how", "count"), [("flip", 240), ("cut", 40)])
def test_a_damaged_checkpoint(stood: Stood, tmp_path: Path, caplog, how: str, count: int):
    """The checkpoint before it is taken, sites answer from their stores, the end is the same."""
    caplog.set_level(logging.CRITICAL, logger="uharmony_server.checkpoint")
    rng = random.Random(11)  # noqa: S311 - a sample, no secret
    schema = initial_weights(STUDY)[0]
    fell_back = 0
    for number in range(count):
        folder = stood.after(4, tmp_path / str(number))
        name = ("weights.safetensors", "state.json")[number % 2]
        damaged(folder / "round-000004" / name, rng, how)
        state = load_latest(folder, STUDY.digest, schema)
        assert state is not None
        fell_back += state.round == 3
        stood.check(stood.go_on(folder))
        shutil.rmtree(folder)
    # A flip in the padding or in a name of a header that is not read changes no number.
    assert fell_back >= 0.95 * count
    word = "one flipped bit in" if how == "flip" else "the end missing of"
    keep(f"{word} the newest checkpoint (in one process)",
         f"{count} samples, {fell_back} fell back to the round before, all identical")  # fmt: skip


class Replaying(InProcessGrid):
    """Every answer a hundred times, and all answers of the round before once more."""

    before: tuple[Message, ...] = ()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        now: list[Message] = []
        earlier = {m.metadata.src_node_id: m for m in self.before}
        for answer in super().send_and_receive(messages, timeout=timeout):
            if answer.metadata.message_type != MessageType.TRAIN:
                yield answer
                continue
            now.append(answer)
            yield from [answer] * 100
            if answer.metadata.src_node_id in earlier:
                yield earlier[answer.metadata.src_node_id]
        self.before = tuple(now)


class Reversed(InProcessGrid):
    """Answers in the reverse order of the sites."""

    def send_and_receive(  # type: ignore[override]
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return list(super().send_and_receive(messages, timeout=timeout))[::-1]


@pytest.mark.faults_quick
def test_answers_a_hundred_times_and_of_the_round_before(stood: Stood, tmp_path: Path):
    state = stood.go_on(stood.after(2, tmp_path / "server"), Replaying)
    stood.check(state)
    refused = {(r.round, r.site, r.reason.value) for r in state.refusals}
    assert refused == {(r, s, "duplicate") for r in KEPT_ROUNDS for s in SITES}
    keep("every update 100 times, and once more in the next round (in one process)",
         "counted once, the others refused as duplicate")  # fmt: skip


@pytest.mark.faults_quick
def test_answers_in_another_order(stood: Stood, tmp_path: Path):
    stood.check(stood.go_on(stood.after(2, tmp_path / "server"), Reversed))
