"""When a volume is a known domain's, and when it is too far from all to be segmented (U4).

    familiar = 90 % of the d_i lie within   d_i: patient i to the nearest prototype, left out itself
    limit = (1 + margin) * max_i d_i

A volume nearer than `familiar` is served with experts; one beyond it, with none: another scanner's
stem costs more than no stem (docs/evidence.md). One beyond `limit` is not believed at all. Leaving
a patient out matters: a prototype lies nearer to the patients that it is the mean of. Both rules
are ours. Both numbers are computed from patients without privacy noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, NonNegativeFloat

from uharmony_model.errors import ConfigError
from uharmony_model.frozen import Frozen
from uharmony_model.gate import Gate

FAMILIAR_SHARE = 0.9
"""The share of the federation's patients that are recognised as those of a known domain."""

MARGIN = 0.1
"""How far beyond the farthest patient of the federation a volume may lie, as a share of it."""


class AbstentionLimit(Frozen):
    """The distance to the nearest prototype beyond which a volume is not believed.

    `margin` is contained in the limit. `false_rate` is the share of the federation's patients that
    would be refused, each left out once; None where the limit was not computed from patients. With
    a limit at the maximum only the farthest one can be, so it is 0 or one patient's share.
    `familiar` is the distance up to which a volume counts as one of a known domain; None: all do.
    """

    limit: NonNegativeFloat
    margin: NonNegativeFloat
    familiar: NonNegativeFloat | None = None
    false_rate: Annotated[float, Field(ge=0, le=1)] | None = None

    @classmethod
    def of(cls, distances: ArrayLike, *, margin: float = MARGIN) -> AbstentionLimit:
        """The limit from left-out distances (n,), as `left_out_distances` gives them.

        Raises:
            ConfigError: fewer than two distances, one that is not finite, or a negative margin.
        """
        d = np.asarray(distances, np.float64).reshape(-1)
        if len(d) < 2 or not np.isfinite(d).all():
            raise ConfigError(
                f"{len(d)} distances; expected two or more finite ones, or nothing can be left out"
            )
        if not margin >= 0:
            raise ConfigError(f"the abstention's margin is {margin}; expected 0 or more")
        # The maximum of the others is the second largest for the farthest patient alone.
        second, first = np.partition(d, -2)[-2:]
        refused = bool(first > (1 + margin) * second)
        return cls(
            limit=float((1 + margin) * first),
            margin=margin,
            familiar=float(np.quantile(d, FAMILIAR_SHARE)),
            false_rate=refused / len(d),
        )

    def knows(self, distance: float) -> bool:
        """Whether a volume this far from its nearest prototype counts as one of its domain."""
        return self.familiar is None or distance <= self.familiar

    def abstains(self, distance: float) -> bool:
        """Whether a volume this far from its nearest prototype is refused."""
        return not distance <= self.limit  # also when it is not a number


def left_out_distances(gate: Gate, rows: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    """Distance of each patient (one row of `rows[domain] (n, d)`) to the nearest prototype.

    The prototype of the patient's own domain is that of the domain's other patients; those of
    other domains, and the common scale, stay as the gate has them.

    Raises:
        ConfigError: a domain is none of the gate's, or has fewer than two patients.
        DataError: rows do not fit the gate.
    """
    found = [np.zeros(0)]
    for domain, given in rows.items():
        values = np.asarray(given, np.float64)
        if domain not in gate.domains or values.ndim != 2 or len(values) < 2:
            raise ConfigError(
                f"domain {domain:.80}: rows {values.shape}, the gate has "
                f"{', '.join(gate.domains):.200}; expected two patients or more of one of these"
            )
        distances = gate.distances(values)
        # Without patient i the mean moves by (u_i - mean) / (n - 1) away from it; so does a
        # released prototype, whose noise stays.
        index = gate.domains.index(domain)
        moved = (values - values.mean(0)) / (len(values) - 1)
        own = (values - gate.means[index] + moved) / gate.scale
        distances[:, index] = np.linalg.norm(own, axis=1)
        found.append(distances.min(1))
    return np.concatenate(found)
