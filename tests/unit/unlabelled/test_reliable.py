"""Hardness with sets of voxels, the threshold walked by hand, the queue there and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.randomness import numpy_generator
from uharmony_model.unlabelled.reliable import ReliableQueue, hardness

SIZE = (2, 2, 2)


def samples(numbers: list[float], start: int = 0, channels: int = 1):
    """Samples whose voxels all hold their own number, and these as their hardness."""
    count = len(numbers)
    ids = torch.arange(start, start + count)
    images = ids.float().reshape(-1, 1, 1, 1, 1).repeat(1, channels, *SIZE)
    labels = ids.to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, *SIZE)
    return images, labels, torch.tensor(numbers, dtype=torch.float32)


def queue_of(*numbers: float, capacity: int = 10) -> ReliableQueue:
    return ReliableQueue.empty(1, SIZE, capacity=capacity).offer(*samples(list(numbers)))


def ids(queue: ReliableQueue) -> list[int]:
    return [int(value) for value in queue.images[:, 0, 0, 0, 0]]


def dice_of_sets(first: np.ndarray, second: np.ndarray) -> float | None:
    a = {tuple(v) for v in np.argwhere(first).tolist()}
    b = {tuple(v) for v in np.argwhere(second).tolist()}
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else None


def test_hardness_is_one_minus_dice_over_the_classes_that_were_found():
    generator = numpy_generator(0, "masks")
    first = generator.random((20, 3, 2, 3, 2)) < generator.choice([0, 0.2, 0.6], (20, 3, 1, 1, 1))
    second = first ^ (generator.random(first.shape) < 0.05)
    second &= generator.random((20, 3, 1, 1, 1)) < 0.7
    measured = hardness(torch.from_numpy(first), torch.from_numpy(second))
    assert measured.shape == (20,)
    assert measured.dtype == torch.float32
    undefined = 0
    for b in range(20):
        dices = [dice_of_sets(first[b, j], second[b, j]) for j in range(3)]
        found = [value for value in dices if value is not None]
        undefined += 0 < len(found) < 3
        expected = 1 - sum(found) / len(found) if found else 1.0
        assert float(measured[b]) == pytest.approx(expected, abs=1e-6)
    assert undefined  # the case that matters did occur


def test_agreement_on_nothing_is_no_evidence():
    nothing = torch.zeros(1, 2, *SIZE, dtype=torch.bool)
    assert hardness(nothing, nothing).tolist() == [1]


def test_an_absent_class_hides_no_disagreement_on_another():
    first, second = torch.zeros(2, 1, 4, *SIZE, dtype=torch.bool)
    first[0, 0, 0, 0, 0] = first[0, 0, 0, 0, 1] = second[0, 0, 0, 0, 1] = second[0, 0, 1, 1, 1] = (
        True
    )
    assert hardness(first, second).tolist() == [0.5]  # not 1 - (0.5 + 3) / 4
    assert hardness(first, first).tolist() == [0]
    assert hardness(first, torch.zeros_like(first)).tolist() == [1]


def test_hardness_of_what_is_no_pair_of_masks():
    good = torch.zeros(1, 2, *SIZE, dtype=torch.bool)
    for other in (good.float(), good[:, :1], good[0]):
        with pytest.raises(ConfigError, match="one shape"):
            hardness(good, other)


def test_a_queue_starts_empty_at_tau_0():
    queue = ReliableQueue.empty(3, (4, 5, 6))
    assert len(queue) == 0
    assert queue.images.shape == (0, 3, 4, 5, 6)
    assert queue.labels.shape == (0, 4, 5, 6)
    assert queue.threshold == pytest.approx(0.1, rel=1e-6)
    assert queue.threshold <= 0.1
    assert queue.capacity == 10


def test_the_threshold_walked_by_hand():
    queue = ReliableQueue.empty(1, SIZE, capacity=2)
    steps = [  # hardness, threshold afterwards, entries afterwards
        (0.5, 0.1, []),  # grows from tau_0, but not above it
        (0.08, 0.08, [1]),  # enters: the largest in the queue
        (0.08, 0.08 * 1.0005, [1]),  # not below the threshold
        (0.06, 0.08, [1, 3]),  # min(0.08004, max(0.08, 0.06))
        (0.05, 0.06, [3, 4]),  # the first leaves; max(0.06, 0.05)
        (0.07, 0.06 * 1.0005, [3, 4]),
        (0.02, 0.05, [4, 6]),
        (0.01, 0.02, [6, 7]),
    ]
    for number, (h, threshold, entries) in enumerate(steps):
        queue = queue.offer(*samples([h], number))
        assert queue.threshold == pytest.approx(threshold, rel=1e-5), number
        assert ids(queue) == entries
    assert queue.hardness.tolist() == pytest.approx([0.02, 0.01])
    assert queue.labels[:, 0, 0, 0].tolist() == [6, 7]


def slow_walk(numbers: list[float], capacity: int) -> tuple[float, list[int]]:
    tau, entries = 0.1, list[tuple[float, int]]()
    for number, h in enumerate(numbers):
        if h < tau:
            entries.append((h, number))
            if len(entries) > capacity:
                del entries[0]
            tau = min(tau, max(h for h, _ in entries))
        else:
            tau = min(1.0005 * tau, 0.1)
    return tau, [number for _, number in entries]


@pytest.mark.parametrize("batch", [1, 3, 60])
def test_a_long_walk_in_batches_is_that_of_its_samples(batch):
    numbers = [round(v, 5) for v in numpy_generator(1, "walk").uniform(0.02, 0.12, 60).tolist()]
    queue = ReliableQueue.empty(1, SIZE, capacity=4)
    for first in range(0, 60, batch):
        queue = queue.offer(*samples(numbers[first : first + batch], first))
        tau, entries = slow_walk(numbers[: first + batch], 4)
        assert queue.threshold == pytest.approx(tau, rel=1e-5)
        assert ids(queue) == entries
        assert queue.threshold <= 0.1


def test_together_a_batch_has_one_threshold_that_moves_once():
    queue = ReliableQueue.empty(1, SIZE).offer(*samples([0.03, 0.05, 0.5]), together=True)
    assert ids(queue) == [0, 1]  # one by one, 0.05 would not be below 0.03
    assert queue.threshold == pytest.approx(0.05, rel=1e-6)
    later = queue.offer(*samples([0.5, 0.5, 0.5], 3), together=True)
    assert later.threshold == pytest.approx(0.05 * 1.0005, rel=1e-6)
    assert ids(queue_of(0.03, 0.05, 0.5)) == [0]
    nobody = queue.offer(*samples([]), together=True)
    assert nobody.threshold == queue.threshold


def test_more_than_the_capacity_at_once_keeps_the_newest():
    queue = ReliableQueue.empty(1, SIZE, capacity=2)
    queue = queue.offer(*samples([0.04, 0.03, 0.02]), together=True)
    assert ids(queue) == [1, 2]
    assert queue.threshold == pytest.approx(0.03, rel=1e-6)


def test_perfect_agreement_does_not_close_the_queue_for_ever():
    queue = queue_of(0.0)
    assert queue.threshold == pytest.approx(0.001, rel=1e-5)
    for _ in range(20):
        queue = queue.offer(*samples([0.5] * 50))
    assert queue.threshold == pytest.approx(0.001 * 1.0005**1000, rel=1e-3)
    queue = queue.offer(*samples([0.5] * 10_000))
    assert queue.threshold == pytest.approx(0.1, rel=1e-6)
    assert queue.threshold <= 0.1


def test_an_offer_changes_neither_the_queue_nor_what_was_offered():
    images, labels, numbers = samples([0.05, 0.9])
    before = ReliableQueue.empty(1, SIZE)
    after = before.offer(images, labels, numbers)
    images += 7
    labels += 7
    numbers += 7
    assert len(before) == 0
    assert before.threshold == pytest.approx(0.1, rel=1e-6)
    assert ids(after) == [0]
    assert after.labels.tolist() == torch.zeros(1, *SIZE).tolist()
    assert after.hardness.tolist() == pytest.approx([0.05])


def test_entries_keep_no_graph():
    images, labels, numbers = samples([0.05])
    assert (
        not ReliableQueue.empty(1, SIZE)
        .offer(images.requires_grad_(), labels, numbers)
        .images.requires_grad
    )


def test_an_offer_that_does_not_fit_is_refused():
    queue = ReliableQueue.empty(1, SIZE)
    images, labels, numbers = samples([0.05])
    for offered in (
        (images.double(), labels, numbers),
        (images, labels.long(), numbers),
        (images, labels, numbers.double()),
        (images[:, :, :1], labels[:, :1], numbers),
        (images, labels[:, :1], numbers),
        (images, labels, numbers.repeat(2)),
        samples([0.05], channels=2),
        (images, labels, torch.tensor([float("nan")])),
        (images, labels, torch.tensor([-0.1])),
    ):
        with pytest.raises(ConfigError, match="expected"):
            queue.offer(*offered)


@pytest.mark.parametrize("numbers", [[], [0.5, 0.5], [0.07, 0.5, 0.031, 0.9, 0.9]])
def test_a_queue_comes_back_from_the_store_as_it_was(numbers):
    queue = queue_of(*numbers, capacity=3)
    tensors = load(save({**queue.tensors(), "stem.weight": torch.ones(1)}))
    assert set(tensors) == {
        "queue/images",
        "queue/labels",
        "queue/hardness",
        "queue/threshold",
        "stem.weight",
    }
    assert {t.dtype for t in tensors.values()} <= {torch.float32, torch.uint8}
    again = ReliableQueue.of(tensors, 1, SIZE, capacity=3)
    assert again.threshold == queue.threshold
    for name in ("images", "labels", "hardness"):
        assert torch.equal(getattr(again, name), getattr(queue, name))
    # From there both go on alike, to the bit.
    more = samples([0.5, 0.03, 0.02, 0.5], 50)
    assert again.offer(*more).threshold == queue.offer(*more).threshold
    assert ids(again.offer(*more)) == ids(queue.offer(*more))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", None),
        ("threshold", None),
        ("images", torch.zeros(2, 1, 2, 2, 3)),
        ("images", torch.zeros(2, 1, *SIZE, dtype=torch.float64)),
        ("images", torch.full((2, 1, *SIZE), float("nan"))),
        ("labels", torch.zeros(3, *SIZE, dtype=torch.uint8)),
        ("labels", torch.zeros(2, *SIZE, dtype=torch.int64)),
        ("hardness", torch.zeros(1)),
        ("hardness", torch.tensor([0.05, float("nan")])),
        ("hardness", torch.tensor([0.05, 1.5])),
        ("threshold", torch.tensor(0.1)),
        ("threshold", torch.tensor([0.2])),
        ("threshold", torch.tensor([0.0])),
        ("threshold", torch.tensor([float("nan")])),
        ("threshold", torch.tensor([1], dtype=torch.uint8)),
    ],
)
def test_a_damaged_queue_is_refused(name, value):
    tensors = queue_of(0.09, 0.08).tensors()
    if value is None:
        del tensors[f"queue/{name}"]
    else:
        tensors[f"queue/{name}"] = value
    with pytest.raises(StoreError, match=r"carried queue.*go back"):
        ReliableQueue.of(tensors, 1, SIZE)


def test_a_queue_of_other_patches_is_refused():
    tensors = queue_of(0.09, 0.08).tensors()
    for channels, size, capacity in ((2, SIZE, 10), (1, (2, 2, 3), 10), (1, SIZE, 1)):
        with pytest.raises(StoreError, match="expected"):
            ReliableQueue.of(tensors, channels, size, capacity=capacity)


def test_a_queue_that_cannot_be_is_not_made():
    queue = queue_of(0.09, 0.08)
    for changes in (
        {"capacity": 1},
        {"capacity": 0},
        {"ceiling": 0.0},
        {"threshold": 0.2},
        {"threshold": 0.0},
        {"hardness": queue.hardness[:1]},
        {"labels": queue.labels.long()},
    ):
        with pytest.raises(ConfigError, match="expected"):
            replace(queue, **changes)


def test_a_site_without_a_queue_is_told_what_is_missing():
    with pytest.raises(StoreError, match="queue/images, queue/labels, queue/hardness") as caught:
        ReliableQueue.of({}, 1, SIZE)
    assert "\n" not in str(caught.value)
