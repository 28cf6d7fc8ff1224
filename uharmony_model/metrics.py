"""How good a segmentation is, per case and class; what is undefined is None, never 0 or 1.

Masks are boolean `(D, H, W)`; `spacing_mm` is the size of a voxel along D, H, W. The surface of a
mask is the set of its voxels with at least one of the six face neighbours outside of it, where
everything beyond the volume is outside; distances run between voxel centres in mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy import ndimage
from torch import Tensor

Mask = npt.NDArray[Any] | Tensor
Distances = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

Word = Literal["above", "below", "not below", "undecided"]
MARGIN = 0.01  # Dice: "not below" means less than a point below
# With five patients of one sign the exact two-sided p is 1/16: no interval decides on them.
FEWEST_PATIENTS = 6

_CONNECTED_26 = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class CaseMetrics:
    """One class in one case. `fp_per_case` counts the predicted lesions that are none."""

    dice: float | None = None
    surface_dice: float | None = None
    hd95_mm: float | None = None
    lesion_recall: float | None = None
    fp_per_case: int | None = None


def measure_case(
    prediction: Mask,
    truth: Mask,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
    *,
    slow: bool = True,
    annotated: Tensor | Sequence[bool] | None = None,
) -> tuple[CaseMetrics, ...]:
    """The metrics of each class, from masks `(J, D, H, W)`.

    A class that is not annotated has none. `slow=False` measures Dice alone and leaves out the
    surfaces and the lesions.
    """
    flags = [True] * len(truth) if annotated is None else [bool(flag) for flag in annotated]
    measured = []
    for predicted, true, flag in zip(_boolean(prediction), _boolean(truth), flags, strict=True):
        if not flag:
            measured.append(CaseMetrics())
            continue
        p, t = _cropped(predicted, true)
        if not slow:
            measured.append(CaseMetrics(dice=dice(p, t)))
            continue
        distances = _surface_distances(p, t, spacing_mm) if p.any() and t.any() else None
        recall, false_positives = lesion_recall_and_fp(p, t)
        measured.append(
            CaseMetrics(
                dice=dice(p, t),
                surface_dice=_surface_dice(distances, tolerance_mm, t),
                hd95_mm=_hd95_mm(distances),
                lesion_recall=recall,
                fp_per_case=false_positives,
            )
        )
    return tuple(measured)


def dice(prediction: Mask, truth: Mask) -> float | None:
    """2 |P and T| / (|P| + |T|); None for an empty truth, 0 for an empty prediction of one."""
    p, t = _boolean(prediction), _boolean(truth)
    volume = int(t.sum())
    if volume == 0:
        return None
    return 2 * int((p & t).sum()) / (int(p.sum()) + volume)


def surface_dice(
    prediction: Mask, truth: Mask, spacing_mm: Sequence[float], tolerance_mm: float
) -> float | None:
    """The share of both surfaces' voxels within `tolerance_mm` of the other surface.

    After Nikolov et al. 2018 (arXiv:1809.04430); ours is to count surface voxels, as MONAI's
    `compute_surface_dice` does without sub-voxels, and not to weigh them by their area. None for
    an empty truth, 0 for an empty prediction of one.
    """
    p, t = _cropped(_boolean(prediction), _boolean(truth))
    distances = _surface_distances(p, t, spacing_mm) if p.any() and t.any() else None
    return _surface_dice(distances, tolerance_mm, t)


def hd95_mm(prediction: Mask, truth: Mask, spacing_mm: Sequence[float]) -> float | None:
    """The larger of the two directed 95th percentiles of surface distances, in mm.

    Percentiles interpolate linearly. None when either mask is empty: no distance exists then.
    """
    p, t = _cropped(_boolean(prediction), _boolean(truth))
    return _hd95_mm(_surface_distances(p, t, spacing_mm) if p.any() and t.any() else None)


def lesion_recall_and_fp(prediction: Mask, truth: Mask) -> tuple[float | None, int]:
    """The share of lesions found, and how many predicted lesions are none.

    A lesion is a component of the truth under 26-connectivity (voxels that touch at a corner
    belong together). It is found when the prediction shares at least one voxel with it. A
    predicted component that shares no voxel with the truth is a false positive; that is counted
    in a case without lesions too, where the recall is None.
    """
    p, t = _boolean(prediction), _boolean(truth)
    lesions, n_lesions = ndimage.label(t, structure=_CONNECTED_26)
    predicted, n_predicted = ndimage.label(p, structure=_CONNECTED_26)
    both = p & t
    found = len(np.unique(lesions[both]))
    touching = len(np.unique(predicted[both]))
    return (found / n_lesions if n_lesions else None), int(n_predicted - touching)


def bootstrap_interval(
    values: Sequence[float | None],
    n: int,
    generator: np.random.Generator,
    *,
    patients: Sequence[str] | None = None,
) -> tuple[float | None, float | None, float | None]:
    """Mean over cases and its 95 % percentile bootstrap interval: (mean, low, high).

    Cases without a value are left out; without any value all three are None. One value gives an
    interval of no width, which says nothing about its certainty: show the number of cases with it.
    With `patients`, one for each value, patients are resampled with all of their cases.
    """
    defined = np.array([value for value in values if value is not None], dtype=np.float64)
    if defined.size == 0:
        return None, None, None
    if patients is not None:
        whose = [p for p, value in zip(patients, values, strict=True) if value is not None]
        places = {patient: index for index, patient in enumerate(dict.fromkeys(whose))}
        at = [places[patient] for patient in whose]
        sums, counts = np.bincount(at, weights=defined), np.bincount(at)
        drawn = generator.integers(len(places), size=(n, len(places)))
        means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(defined.mean()), float(low), float(high)
    draws = generator.integers(defined.size, size=(n, defined.size))
    low, high = np.percentile(defined[draws].mean(axis=1), (2.5, 97.5))
    return float(defined.mean()), float(low), float(high)


def paired_word(low: float | None, high: float | None, patients: int) -> Word:
    """What the 95 % interval of a paired difference in Dice allows to say.

    `above` and `below`: it lies on one side of 0. `not below`: it lies above minus one point. Else,
    without an interval, and with fewer than six patients: `undecided`.
    """
    if low is None or high is None or patients < FEWEST_PATIENTS:
        return "undecided"
    if low > 0:
        return "above"
    if high < 0:
        return "below"
    return "not below" if low > -MARGIN else "undecided"


def _surface_dice(
    distances: Distances | None, tolerance_mm: float, truth: npt.NDArray[np.bool_]
) -> float | None:
    if distances is None:
        return 0.0 if truth.any() else None
    within = sum(int((d <= tolerance_mm).sum()) for d in distances)
    return within / sum(len(d) for d in distances)


def _hd95_mm(distances: Distances | None) -> float | None:
    if distances is None:
        return None
    return max(float(np.percentile(d, 95)) for d in distances)


def _surface_distances(
    prediction: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_], spacing_mm: Sequence[float]
) -> Distances:
    """From each surface voxel of one non-empty mask to the other's surface, both ways."""
    # Not get_edge_surface_distance, which does both: MONAI 1.6 has it warn of its own arguments.
    edges = get_mask_edges(prediction, truth, crop=False)
    spacing = tuple(float(mm) for mm in spacing_mm)
    there = get_surface_distance(edges[0], edges[1], spacing=spacing)
    back = get_surface_distance(edges[1], edges[0], spacing=spacing)
    return np.asarray(there), np.asarray(back)


def _boolean(mask: Mask) -> npt.NDArray[np.bool_]:
    array = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask
    return np.asarray(array, dtype=bool)


def _cropped(
    prediction: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Both masks within the box that holds them: nothing outside of it has a say in a metric."""
    either = prediction | truth
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        hit = np.flatnonzero(either.any(axis=others))
        box.append(slice(hit[0], hit[-1] + 1) if hit.size else slice(0, 0))
    where = tuple(box)
    return np.ascontiguousarray(prediction[where]), np.ascontiguousarray(truth[where])
