"""The teacher: a moving average of the student; and how the weight of what it says grows.

    theta' <- a theta' + (1 - a) theta,    a = min(1 - 1 / (step + 1), decay)
    lambda(t) = exp(-5 (1 - t/T)^2)

The average is Mean Teacher's (Tarvainen & Valpola 2017, arXiv:1703.01780), the ramp Temporal
Ensembling's (Laine & Aila 2017, arXiv:1610.02242); both as in MiDSS (Ma et al. 2024,
arXiv:2404.08951), whose decay is 0.99. As long as step <= 1 / (1 - decay) - 1 the average is the
plain mean of the students so far.

Ours: t/T moves at every step, MiDSS' in 200 larger ones. Buffers follow too: MiDSS moves parameters
only and lets the teacher's norms see its own batches; a teacher that is used with its running
statistics needs the student's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uharmony_model.errors import NetworkError


def move_teacher(teacher: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Move the teacher towards the student, in place, after the student's step `step` (from 0).

    The first call copies, whatever the decay. Parameters and float buffers are averaged, other
    buffers (counters, indices) are copied. A teacher in float16 or on another device is moved in
    its own precision and place. The student is not touched.

    Raises:
        NetworkError: the two do not hold the same tensors; nothing was moved then.
    """
    olds, news = _tensors(teacher), _tensors(student)
    _require_alike(olds, news)
    share = 1 - min(1 - 1 / (step + 1), decay)
    with torch.no_grad():
        for name, old in olds.items():
            new = news[name].detach().to(old)
            if old.is_floating_point():
                old.lerp_(new, share)
            else:
                old.copy_(new)


def ramp_up(progress: float) -> float:
    """Weight of the unlabelled losses at `progress` t/T: from exp(-5) = 0.0067 at 0 to 1 at 1."""
    return math.exp(-5 * (1 - min(max(progress, 0.0), 1.0)) ** 2)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _require_alike(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor]) -> None:
    for name in sorted(teacher.keys() | student.keys()):
        shapes = [
            str(tuple(side[name].shape)) if name in side else "no such tensor"
            for side in (teacher, student)
        ]
        if shapes[0] != shapes[1]:
            raise NetworkError(
                f"teacher and student differ at '{name}': {shapes[0]} and {shapes[1]}; expected "
                "two networks of the same study, make the teacher as a copy of the student"
            )
