"""What a study makes of styles: the size of their box, the floor of their images, their codes.

Both sides of the exchange, and every objective that mixes styles, take them from here.
"""

from __future__ import annotations

from uharmony_model.alignment.style_autoencoder import AutoencoderSettings
from uharmony_model.study import Study
from uharmony_model.task import Task
from uharmony_model.unlabelled.amplitude import amplitude_half_width

STYLE_NUMBERS = AutoencoderSettings().style_dim  # of a style code


def half_width(study: Study) -> int:
    """The half-width of the low-frequency box, in bins."""
    return study.unlabelled.half_width or amplitude_half_width(study.training.patch)


def style_floor(task: Task) -> float:
    """Below all means of a patch, so that its amplitude keeps the mean's sign."""
    return -4.0 if any(p.policy == "zscore" for p in task.intensity.values()) else -1.0


def style_axis(task: Task) -> int:
    """Across which axis of an image (C, D, H, W) its slices lie: that of the largest spacing.

    The last one, whose slices are axial, where spacings are equal or not known.
    """
    spacing = task.spacing_mm or (1.0, 1.0, 1.0)
    return max(range(3), key=lambda axis: (spacing[axis], axis)) + 1
