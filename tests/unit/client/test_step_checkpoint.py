"""A round taken up in its middle ends in the bits of one that never stopped."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.blobs import volumes
from tests.support.tiny import tiny_study
from uharmony_client.local_store import UNFINISHED, LocalStore, RoundKey
from uharmony_client.local_train import RoundResult, train_round
from uharmony_client.step_checkpoint import EVERY, StepCheckpoint
from uharmony_client.training_steps import LocalData
from uharmony_model.errors import StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import flatten
from uharmony_model.networks import build_network
from uharmony_model.study import Study

STUDY, STEPS = "5" * 64, 4
KEY = RoundKey(STUDY, 2, "b")


class Cut(BaseException):
    """Stands for the power cut."""


class Site:
    """One site in its second round, with whatever its first one left it."""

    def __init__(self, study: Study, domains: tuple[str, ...] = ("x", "y")) -> None:
        self.study, self.domains = study, domains
        network = build_network(study, domains, seed=study.seed)
        self.partition = Partition.of(network, study.plan.local)
        shared, self.before = self.partition.split(network.state_dict())
        self.base = flatten(shared, self.partition.shared_schema)
        first = self.round(round_=1)
        self.base, self.before = self.base + first.update, first.local

    def round(self, checkpoint=None, *, cut_at=None, taken=None, before=None, round_=2):
        """A process of its own: the network is built anew."""

        def on_step(step: int, loss: float) -> None:
            if taken is not None:
                taken.append(step)
            if step == cut_at:
                raise Cut

        return train_round(
            build_network(self.study, self.domains, seed=self.study.seed),
            LocalData("alpha", volumes(), [0, len(self.domains) - 1, 0], torch.tensor([True])),
            study=self.study,
            partition=self.partition,
            base=self.base,
            before=self.before if before is None else before,
            round_=round_,
            on_step=on_step,
            checkpoint=checkpoint,
        )


def site(**training) -> Site:
    return Site(tiny_study(training={"local_steps": STEPS, "patch": [8, 8, 8], **training}))


def same(one: RoundResult, other: RoundResult) -> bool:
    return (
        torch.equal(one.update, other.update)
        and one.loss == other.loss
        and one.local.keys() == other.local.keys()
        and all(torch.equal(one.local[k], other.local[k]) for k in one.local)
    )


@pytest.fixture(scope="module")
def kept() -> Site:
    return site()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("keep_optimizer", [True, False])
def test_cut_after_every_step_it_ends_in_the_same_bits(tmp_path, optimizer, keep_optimizer):
    where = site(optimizer=optimizer, keep_optimizer=keep_optimizer)
    undisturbed = where.round()
    for every in (1, 3):
        for cut_at in range(STEPS):
            checkpoint = StepCheckpoint(tmp_path / f"{every}-{cut_at}", KEY, every)
            with pytest.raises(Cut):
                where.round(checkpoint, cut_at=cut_at)
            taken: list[int] = []
            assert same(where.round(checkpoint, taken=taken), undisturbed)
            # The last whole multiple of `every`, but never the end: that is the generation's.
            done = min(cut_at + 1, STEPS - 1) // every * every
            assert taken == list(range(done, STEPS))


def test_cut_again_and_again_it_ends_in_the_same_bits(tmp_path, kept):
    checkpoint = StepCheckpoint(tmp_path, KEY, every=1)
    for cut_at in range(STEPS):
        with pytest.raises(Cut):
            kept.round(checkpoint, cut_at=cut_at)
    assert same(kept.round(checkpoint), kept.round())


def test_a_short_round_writes_and_reads_nothing(tmp_path, kept):
    kept.round(StepCheckpoint(tmp_path / "equal", KEY, every=STEPS))
    kept.round(StepCheckpoint(tmp_path / "usual", KEY))
    assert EVERY == 50
    assert list(tmp_path.iterdir()) == []


def interrupted(kept: Site, folder: Path) -> StepCheckpoint:
    checkpoint = StepCheckpoint(folder, KEY, every=2)
    with pytest.raises(Cut):
        kept.round(checkpoint, cut_at=1)
    assert checkpoint.path.is_file()
    return checkpoint


def test_a_damaged_one_is_left_alone_with_a_word(tmp_path, kept, caplog):
    checkpoint = interrupted(kept, tmp_path)
    whole, undisturbed = checkpoint.path.read_bytes(), kept.round()
    rng = np.random.default_rng(3)
    places = [0, 31, 32, 40, len(whole) - 1, *rng.integers(0, len(whole), 3)]
    damaged = [b"", whole[:20], whole[: len(whole) // 2]]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(flipped))
    for data in damaged:
        checkpoint.path.write_bytes(data)
        caplog.clear()
        taken: list[int] = []
        assert same(kept.round(checkpoint, taken=taken), undisturbed)
        assert taken[0] == 0
        (line,) = [r.getMessage() for r in caplog.records if "starts at its first step" in r.msg]
        assert "damaged" in line


@pytest.mark.parametrize(
    "key", [RoundKey("6" * 64, 2, "b"), RoundKey(STUDY, 3, "b"), RoundKey(STUDY, 2, "c")]
)
def test_one_of_another_round_is_left_alone_with_a_word(tmp_path, kept, caplog, key):
    interrupted(kept, tmp_path)
    taken: list[int] = []
    assert same(kept.round(StepCheckpoint(tmp_path, key, every=2), taken=taken), kept.round())
    assert taken[0] == 0
    assert "another history" in caplog.text


def test_one_that_began_from_another_state_is_left_alone(tmp_path, kept, caplog):
    checkpoint = interrupted(kept, tmp_path)
    name = next(k for k in kept.before if not k.startswith("optimizer/"))
    other = {**kept.before, name: kept.before[name] + 1}
    taken: list[int] = []
    assert same(kept.round(checkpoint, before=other, taken=taken), kept.round(before=other))
    assert taken[0] == 0
    assert "another history" in caplog.text


def test_one_of_another_network_is_left_alone(tmp_path, kept, caplog):
    interrupted(kept, tmp_path)
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    found = StepCheckpoint(tmp_path, KEY).of(network, optimizer, kept.before).take_up()
    assert found == (0, 0.0)
    assert "another network" in caplog.text


def test_a_full_disk_costs_the_checkpoint_not_the_round(tmp_path, kept, caplog, monkeypatch):
    def full(*_: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr("uharmony_client.step_checkpoint.write_atomic", full)
    assert same(kept.round(StepCheckpoint(tmp_path, KEY, every=1)), kept.round())
    assert "no step checkpoint: no space left" in caplog.text


def test_it_goes_when_the_generation_is_written(tmp_path, kept, caplog):
    caplog.set_level(logging.INFO)
    store = LocalStore(tmp_path / "store")
    checkpoint = interrupted(kept, store.folder)
    assert checkpoint.path.stat().st_mode & 0o777 == 0o600
    assert store.newest(STUDY) == 0
    result = kept.round(checkpoint)
    assert "goes on after step 2" in caplog.text
    store.write(KEY, b"update", result.local)
    assert [p.name for p in store.folder.iterdir()] == ["round-000002"]
    assert not (store.folder / UNFINISHED).exists()
