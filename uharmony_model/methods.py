"""The methods by name: which norms the network has, and which of its parts stay at the site.

A method is a pair of choices and nothing else; training, exchange and aggregation are the same
code for all of them. A part that is local never enters a payload.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """What a tensor of the model is, decided by the type of the module that owns it."""

    BACKBONE = "backbone"  # convolutions, linear layers, attention
    NORM_AFFINE = "norm_affine"  # weight and bias of a plain norm layer
    NORM_STATISTICS = "norm_statistics"  # running mean, variance and their counter
    POLYNOMIAL = "polynomial"  # a_p of the harmonisation layer
    PHI = "phi"  # g, b, rho, lambda of the harmonisation layer
    STEM_RESIDUAL = "stem_residual"
    HEAD_RESIDUAL = "head_residual"
    INDEX = "index"  # constant integer buffers that a network computes when it is built


RESIDUALS = frozenset({Part.PHI, Part.STEM_RESIDUAL, Part.HEAD_RESIDUAL})
EVERYTHING = frozenset(Part)


@dataclass(frozen=True)
class Method:
    """`local` parts stay at the site; `harmonized` says whether norms are replaced."""

    meaning: str
    harmonized: bool
    local: frozenset[Part]
    pooled: bool = False  # all sites' cases in one place: a reference that no hospital can run


METHODS: dict[str, Method] = {
    "local": Method("each site alone, InstanceNorm", False, EVERYTHING),
    "pooled": Method("all cases in one place, InstanceNorm", False, EVERYTHING, pooled=True),
    "pooled-uharmony": Method(
        "all cases in one place, harmonisation layer", True, EVERYTHING, pooled=True
    ),
    "fedavg": Method("InstanceNorm, everything shared", False, frozenset()),
    "fedbn": Method(
        "InstanceNorm, norm affine local (after FedBN, Li et al. 2021, arXiv:2102.07623)",
        False,
        frozenset({Part.NORM_AFFINE, Part.NORM_STATISTICS}),
    ),
    "uharmony": Method("harmonisation layer; phi, stem and head residuals local", True, RESIDUALS),
}
