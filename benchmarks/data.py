"""Drawing a batch from memory-mapped volumes: what a training step waits for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.network import study
from benchmarks.rows import Row, interleaved
from uharmony_model.patches import draw_batch

SHAPE = (240, 240, 155)


@dataclass(frozen=True)
class Stored:
    """A preprocessed case as the site's store holds it."""

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.uint8]
    foreground: npt.NDArray[np.int32]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    present: tuple[bool, ...] = (True,) * 4


def rows() -> list[Row]:
    """Two 64^3 patches of four channels a step, without and with augmentation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        rng = np.random.default_rng(0)
        np.save(path / "image.npy", rng.normal(size=(4, *SHAPE)).astype(np.float32))
        np.save(path / "label.npy", np.zeros(SHAPE, np.uint8))
        points = np.column_stack([rng.integers(0, 150, (1000, 3)), np.ones(1000)])
        volume = Stored(
            np.load(path / "image.npy", mmap_mode="r"),
            np.load(path / "label.npy", mmap_mode="r"),
            points.astype(np.int32),
        )
        content = study("uharmony", "unet").model_dump()
        content["task"]["channels"] = 4
        chosen = type(study("uharmony", "unet")).model_validate(content)
        steps = iter(range(10_000))
        works = {}
        for augment in (False, True):
            training = chosen.training.model_copy(
                update={"patch": (64, 64, 64), "augment": augment}
            )
            works[f"{augment}"] = lambda training=training: draw_batch(
                [volume], chosen.task, training, 0, "bench", 1, next(steps)
            )
        times = interleaved(works, repeats=15)
    return [
        Row(
            "batch of two 64^3 x 4 patches",
            round(times["False"], 2),
            "ms",
            None,
            "<= 5 ms",
            times["False"] <= 5,
        ),
        Row("the same, augmented", round(times["True"], 2), "ms"),
    ]
