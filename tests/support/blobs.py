"""Volumes in memory that a round can train on: a bright block in noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Stored:
    image: np.ndarray
    label: np.ndarray
    foreground: np.ndarray
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    present: tuple[bool, ...] = (True,)


def volumes(count: int = 3) -> list[Stored]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        label = np.zeros((16, 16, 16), np.uint8)
        label[4:10, 5:11, 6:12] = 1
        image = (rng.normal(size=(1, 16, 16, 16)) + 2 * label).astype(np.float32)
        points = np.argwhere(label)
        made.append(
            Stored(image, label, np.column_stack([points, np.ones(len(points))]).astype(np.int32))
        )
    return made
