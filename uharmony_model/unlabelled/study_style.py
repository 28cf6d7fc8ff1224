"""What a study makes of styles: the size of their box, and the floor of their images.

Both sides of the exchange, and every objective that mixes styles, take them from here.
"""

from __future__ import annotations

from uharmony_model.study import Study
from uharmony_model.task import Task
from uharmony_model.unlabelled.amplitude import amplitude_half_width


def half_width(study: Study) -> int:
    """The half-width of the low-frequency box, in bins."""
    return study.unlabelled.half_width or amplitude_half_width(study.training.patch)


def style_floor(task: Task) -> float:
    """Below all means of a patch, so that its amplitude keeps the mean's sign."""
    return -4.0 if any(p.policy == "zscore" for p in task.intensity.values()) else -1.0
