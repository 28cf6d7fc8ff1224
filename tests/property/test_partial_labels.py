"""Sites that draw different classes of one union: no class is ever learned as background."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from uharmony_model.losses import segmentation_loss
from uharmony_model.task import Task

CLASSES = {"bright": 1, "dark": 2}
TASKS = {
    overlapping: Task.model_validate(
        {
            "classes": CLASSES,
            "overlapping": overlapping,
            "intensity": {"mr": {"policy": "zscore"}},
        }
    )
    for overlapping in (False, True)
}
DRAWN = {"a": (True, False), "b": (False, True)}  # what each of the two sites annotates
SIZE = 8

flags = st.tuples(st.booleans(), st.booleans()).filter(lambda f: any(f) and not all(f))


@given(st.integers(0, 2**31), flags)
def test_the_loss_has_no_slope_between_background_and_the_unannotated(seed, drawn):
    """Along the way on which only these two exchange probability, the derivative is zero.

    p_0 + p_u stays when logit u rises by p_0 and logit 0 falls by p_u, to the first order.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(1, 3, 3, 3, 3, generator=generator)).double().requires_grad_()
    own, other = 1 + drawn.index(True), 1 + drawn.index(False)
    label = own * torch.randint(2, (1, 3, 3, 3), generator=generator).to(torch.uint8)
    segmentation_loss(logits, label, TASKS[False], drawn).backward()
    assert logits.grad is not None
    p, slope = logits.detach().softmax(1), logits.grad
    along = slope[:, other] * p[:, 0] - slope[:, 0] * p[:, other]
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-7)
    # The test can fail: against the annotated class there is a slope.
    across = slope[:, own] * p[:, 0] - slope[:, 0] * p[:, own]
    assert across.abs().max() > 1e-5


def toy(site: str, step: int) -> tuple[Tensor, Tensor]:
    """Noise with voxels of +3 (bright) and -3 (dark); the whole truth."""
    generator = torch.Generator().manual_seed(1000 * step + ord(site))
    truth = torch.randint(0, 3, (2, SIZE, SIZE, SIZE), generator=generator).to(torch.uint8)
    level = torch.tensor([0.0, 3.0, -3.0])[truth.long()]
    noise = 0.3 * torch.randn(level.shape, generator=generator)
    return (level + noise)[:, None], truth


def as_drawn(truth: Tensor, drawn: tuple[bool, ...]) -> Tensor:
    """The label as a site writes it: the other class looks like background."""
    label = truth.clone()
    for value, flag in zip(CLASSES.values(), drawn, strict=True):
        if not flag:
            label[truth == value] = 0
    return label


def learned(task: Task, *, marginal: bool) -> dict[str, float]:
    """Mean probability of each class on its own voxels, after both sites have trained in turn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = nn.Sequential(nn.Conv3d(1, 8, 1), nn.ReLU(), nn.Conv3d(8, task.outputs, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    for step in range(150):
        for site, drawn in DRAWN.items():
            image, truth = toy(site, step)
            label = as_drawn(truth, drawn)
            loss = segmentation_loss(network(image), label, task, drawn if marginal else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    image, truth = toy("a", 999)
    with torch.no_grad():
        logits = network(image)
        p = logits.sigmoid() if task.overlapping else logits.softmax(1)[:, 1:]
    return {
        name: float(p[:, j][truth == value].mean())
        for j, (name, value) in enumerate(CLASSES.items())
    }


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_class_that_only_one_site_draws_is_learned_in_full(overlapping):
    for name, probability in learned(TASKS[overlapping], marginal=True).items():
        assert probability > 0.9, name


def test_the_control_that_takes_unannotated_for_background_learns_half_of_it():
    # At half of the voxels it is told the class and at the other half background, so that
    # cross-entropy alone has its least value at one half; Dice pulls it up, but not to 1.
    naive = learned(TASKS[False], marginal=False)
    marginal = learned(TASKS[False], marginal=True)
    assert all(marginal[name] - naive[name] > 0.2 for name in CLASSES)
