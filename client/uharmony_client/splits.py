"""Who is trained on and who is tested: a site's patients drawn into splits, by the study's seed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from uharmony_model.evaluation_settings import Evaluation, Split
from uharmony_model.randomness import numpy_generator


def draw_splits(
    patients: Iterable[str], evaluation: Evaluation, split_seed: int, site: str
) -> dict[str, Split]:
    """Draw a site's patients into splits; at least one is left to train on.

    Counts are the shares rounded half up, at least one test patient of three and one validation
    patient of four when their share is not zero. Of several folds every patient is in one.
    """
    ordered = sorted(set(patients))
    numpy_generator(split_seed, site, "splits").shuffle(ordered)
    n = len(ordered)
    if evaluation.folds is None:
        test = _count(evaluation.test, n, at_least_one_of=3)
    else:
        tested = ordered[evaluation.fold :: evaluation.folds]
        ordered = tested + [patient for patient in ordered if patient not in set(tested)]
        test = len(tested)
    validation = _count(evaluation.validation, n, at_least_one_of=4)
    test = min(test, max(n - 1, 0))
    validation = min(validation, max(n - 1 - test, 0))
    splits: list[Split] = [
        "test" if i < test else "validation" if i < test + validation else "train" for i in range(n)
    ]
    return dict(zip(ordered, splits, strict=True))


def _count(share: float, n: int, *, at_least_one_of: int) -> int:
    rounded = math.floor(share * n + 0.5)
    return max(rounded, 1) if share > 0 and n >= at_least_one_of else rounded
