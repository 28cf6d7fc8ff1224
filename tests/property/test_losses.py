"""Unlabelled is never background, for any logits, any truth and any set of annotated classes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.losses.dice import DiceCELoss

from uharmony_model.losses import segmentation_loss
from uharmony_model.task import Task

CLASSES = 4
SHAPE = (3, 4, 2)
INTENSITY = {"ct": {"policy": "window"}}
GROUPS = {f"organ{j}": j + 1 for j in range(CLASSES)}
EXCLUSIVE = Task.model_validate({"classes": GROUPS, "intensity": INTENSITY})
OVERLAPPING = Task.model_validate({"classes": GROUPS, "overlapping": True, "intensity": INTENSITY})

seeds = st.integers(0, 2**31)
flags = st.lists(st.booleans(), min_size=CLASSES, max_size=CLASSES)
partial = flags.filter(lambda f: any(f) and not all(f))


def _case(seed: int, annotated: list[bool], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and a label map that holds background and annotated classes alone."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, channels, *SHAPE, generator=generator)
    allowed = torch.tensor([0, *(j + 1 for j, flag in enumerate(annotated) if flag)])
    chosen = torch.randint(len(allowed), (2, *SHAPE), generator=generator)
    return logits, allowed[chosen].to(torch.uint8)


@given(seeds, partial, st.floats(0.01, 0.99))
def test_probability_moves_freely_between_background_and_the_unannotated(seed, annotated, share):
    logits, label = _case(seed, annotated, 1 + CLASSES)
    unannotated = 1 + annotated.index(False)
    both = torch.logaddexp(logits[:, 0], logits[:, unannotated])
    moved = logits.clone()
    moved[:, 0] = both + torch.tensor(share).log()
    moved[:, unannotated] = both + torch.tensor(1 - share).log()
    before = segmentation_loss(logits, label, EXCLUSIVE, annotated)
    after = segmentation_loss(moved, label, EXCLUSIVE, annotated)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@given(seeds, partial)
def test_an_unannotated_class_is_not_pushed_down_at_background(seed, annotated):
    logits, label = _case(seed, annotated, 1 + CLASSES)
    logits.requires_grad_()
    segmentation_loss(logits, label, EXCLUSIVE, annotated).backward()
    assert logits.grad is not None
    background = label == 0
    for j, flag in enumerate(annotated):
        if not flag:
            # A descent step raises it or leaves it: the gradient is not positive.
            assert (logits.grad[:, 1 + j][background] <= 1e-8).all()


@given(seeds, flags.filter(any))
def test_overlapping_channels_without_annotation_get_no_gradient(seed, annotated):
    logits, label = _case(seed, annotated, CLASSES)
    logits.requires_grad_()
    segmentation_loss(logits, label, OVERLAPPING, annotated).backward()
    assert logits.grad is not None
    for j, flag in enumerate(annotated):
        silent = bool((logits.grad[:, j] == 0).all())
        assert silent != flag


def test_plain_dice_and_cross_entropy_does_push_it_down():
    # The control: without the merging, the properties above do not hold.
    logits, label = _case(0, [True, True, True, False], 1 + CLASSES)
    logits.requires_grad_()
    plain = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    plain(logits, label.long()[:, None]).backward()
    assert logits.grad is not None
    assert (logits.grad[:, CLASSES][label == 0] > 1e-8).any()
