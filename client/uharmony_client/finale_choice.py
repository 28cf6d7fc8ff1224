"""Which of its candidates a site keeps after the finale, from their Dice on its validation cases.

`best`: the highest mean. `clear`: the federated model stays unless another one is better by more
than the standard error of the paired difference; of those the highest. Two or three cases say
little, and the best of five noisy means is noise. Both rules are ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from uharmony_model.training_settings import Candidate, ChoiceRule

ByCase = Mapping[str, float]

# Of equals the one that changed less is kept.
_ORDER: tuple[Candidate, ...] = ("federated", "own", "between", "whole", "local")
# Without validation cases the one that was trained on most.
_UNSEEN: tuple[Candidate, ...] = ("whole", "own", "between", "federated", "local")


def choose(dice: Mapping[Candidate, ByCase], rule: ChoiceRule) -> Candidate:
    """The candidate to keep; `dice` holds each one's cases."""
    if not any(dice.values()):
        return next(name for name in _UNSEEN if name in dice)
    means = {name: found for name in _ORDER if (found := mean(dice.get(name, {}))) is not None}
    if rule == "clear" and "federated" in means:
        stays = dice["federated"]
        means = {n: m for n, m in means.items() if n == "federated" or clearly(dice[n], stays)}
    return max(means, key=lambda name: means[name])  # the first of equals


def clearly(better: ByCase, reference: ByCase) -> bool:
    """Whether the mean of the paired differences exceeds its standard error."""
    found = [better[case] - reference[case] for case in reference.keys() & better.keys()]
    if len(found) < 2:
        return False
    return statistics.fmean(found) > statistics.stdev(found) / math.sqrt(len(found))


def mean(dice: ByCase) -> float | None:
    """The mean over cases, None where there is none."""
    return statistics.fmean(dice.values()) if dice else None
