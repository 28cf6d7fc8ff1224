"""Presence masks: what the network is given, and what a channel that is not there can do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from uharmony_model.errors import DataError
from uharmony_model.networks import build_network
from uharmony_model.patches import draw_batch
from uharmony_model.presence import (
    drop_modalities,
    input_channels,
    present_channels,
    with_presence,
)
from uharmony_model.study import Study
from uharmony_model.task import Task

ZSCORE = {"policy": "zscore"}
PLAIN = Task.model_validate(
    {"classes": {"organ": 1}, "channels": 3, "intensity": dict.fromkeys(("ct", "mr", "pt"), ZSCORE)}
)
TASK = PLAIN.model_copy(update={"presence": True})


@dataclass
class Volume:
    image: np.ndarray
    label: np.ndarray | None
    foreground: np.ndarray
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    present: tuple[bool, ...] = (True, True, True)


def volume(seed: int, present: tuple[bool, ...] = (True, True, True)) -> Volume:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(3, 10, 10, 10)).astype(np.float32)
    image[~np.array(present)] = 0
    label = np.zeros((10, 10, 10), np.uint8)
    label[4, 4, 4] = 1
    return Volume(image, label, np.array([[4, 4, 4, 1]], np.int32), present=present)


def study(presence: bool = True, **training) -> Study:
    return Study.model_validate(
        {
            "name": "test",
            "method": "fedavg",
            "task": PLAIN.model_dump() | {"presence": presence},
            "network": {"features": (4, 8)},
            "training": {"patch": (8, 8, 8), "batch_size": 4, **training},
        }
    )


def test_without_masks_the_image_is_given_as_it_is():
    image = torch.randn(2, 3, 4, 4, 4)
    assert with_presence(image, [[True, False, True]] * 2, PLAIN) is image
    assert input_channels(PLAIN) == 3
    assert present_channels(PLAIN, ["ct"]) == (True, True, True)


def test_masks_stand_behind_the_images_and_what_is_missing_is_zero():
    image = torch.randn(2, 3, 2, 3, 4)
    image[1, 0] = torch.nan  # anything may stand there
    flags = [[True, True, False], [False, True, True]]
    given = with_presence(image, flags, TASK)
    assert given.shape == (2, input_channels(TASK), 2, 3, 4)
    for b in range(2):
        for c in range(3):
            assert torch.equal(given[b, c], image[b, c] if flags[b][c] else torch.zeros(2, 3, 4))
            assert (given[b, 3 + c] == float(flags[b][c])).all()


def test_channels_are_the_modalities_by_name():
    assert present_channels(TASK, ["pt", "ct"]) == (True, False, True)
    with pytest.raises(DataError, match="no channel is left of us; the study has ct, mr, pt"):
        present_channels(TASK, ["us"])


def test_flags_have_to_fit_the_image():
    with pytest.raises(DataError, match="one flag for each"):
        with_presence(torch.zeros(2, 3, 2, 2, 2), [[True, True, True]], TASK)


@pytest.mark.parametrize("chance", [0.3, 0.8])
def test_dropout_hides_each_channel_with_its_chance_and_never_all(chance):
    count = 20_000
    present = torch.tensor([[True, True, False]] * count)
    kept = drop_modalities(present, chance, np.random.default_rng(0))
    assert not kept[:, 2].any()
    assert kept.any(dim=1).all()
    # Both would go with chance^2, and then each of them stays in half of the cases.
    expected = 1 - chance + chance**2 / 2
    error = 4 * (expected * (1 - expected) / count) ** 0.5
    for channel in (0, 1):
        assert abs(kept[:, channel].double().mean().item() - expected) < error
    both = (1 - chance) ** 2
    error = 4 * (both * (1 - both) / count) ** 0.5
    assert abs(kept[:, :2].all(dim=1).double().mean().item() - both) < error


def test_the_last_channel_is_never_hidden():
    present = torch.tensor([[False, True, False]] * 200)
    assert torch.equal(drop_modalities(present, 0.99, np.random.default_rng(0)), present)


def draw(chosen: Study, volumes: list[Volume], step: int = 0):
    return draw_batch(volumes, chosen.task, chosen.training, 0, "a", 1, step)


def test_a_batch_has_the_same_images_with_masks_behind_them():
    volumes = [volume(0), volume(1)]
    plain, masked = draw(study(False), volumes), draw(study(), volumes)
    assert torch.equal(masked.image[:, :3], plain.image)
    assert (masked.image[:, 3:] == 1).all()
    assert torch.equal(masked.label, plain.label)


def test_augmentation_writes_nothing_into_a_missing_channel():
    volumes = [volume(0, (True, False, True))]
    for step in range(8):
        image = draw(study(), volumes, step).image
        assert (image[:, 1] == 0).all()
        assert (image[:, 4] == 0).all()
        assert (image[:, [3, 5]] == 1).all()
        assert all(image[b, c].std() > 0.1 for b in range(4) for c in (0, 2))


def test_dropout_hides_channels_of_the_same_patches_repeatably():
    volumes = [volume(0), volume(1)]
    hiding, open_ = study(modality_dropout=0.5), study()
    first, again, whole = draw(hiding, volumes), draw(hiding, volumes), draw(open_, volumes)
    assert torch.equal(first.image, again.image)
    flags = first.image[:, 3:].amax(dim=(2, 3, 4)).bool()
    assert flags.any(dim=1).all()
    assert torch.equal(first.image, with_presence(whole.image[:, :3], flags, TASK))
    patterns = {
        tuple(draw(hiding, volumes, step).image[:, 3:, 0, 0, 0].flatten().tolist())
        for step in range(6)
    }
    assert len(patterns) > 1


@pytest.mark.parametrize("name", ["unet", "dynunet"])
def test_a_channel_that_is_not_there_does_nothing_whatever_its_kernel(name):
    features = (4, 8) if name == "unet" else (4, 8, 8)
    content = study().model_dump() | {"network": {"name": name, "features": features}}
    network = build_network(Study.model_validate(content), ("a",), seed=0).eval()
    image = torch.randn(1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    lacking = with_presence(image, [[True, False, True]], TASK)
    whole = with_presence(image, [[True, True, True]], TASK)
    with torch.no_grad():
        before = network(lacking), network(whole)
        for parameter in network.parameters():
            if parameter.ndim == 5 and parameter.shape[1] == 6:
                parameter[:, [1, 4]] += 1.0  # its image and its mask
        assert torch.equal(network(lacking), before[0])
        assert not torch.allclose(network(whole), before[1], atol=1e-3)


def test_the_default_network_sees_the_masks():
    # The skip of its first block goes around the norm; behind a norm a constant would be lost.
    network = build_network(study(), ("a",), seed=0).eval()
    image = torch.zeros(1, 3, 16, 16, 16)
    image[:, 0] = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        known = network(with_presence(image, [[True, False, False]], TASK))
        zeros = network(with_presence(image, [[True, True, True]], TASK))
    assert (known - zeros)[..., 6:10, 6:10, 6:10].abs().max() > 1e-3


def test_a_study_with_masks_names_each_channel():
    with pytest.raises(ValidationError, match="set channels: 3"):
        Task.model_validate({**TASK.model_dump(), "channels": 2})
    with pytest.raises(ValidationError, match=r"needs task\.presence"):
        study(False, modality_dropout=0.1)
