"""Step 7 of the data's way: what the site does to an update before it is put into wire form."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from uharmony_model.frozen import Frozen


class Policy(Frozen):
    """The site's own limits. `clip_norm` bounds the L2 norm of what leaves; None leaves it."""

    clip_norm: PositiveFloat | None = None


def apply_policy(update: Tensor, policy: Policy) -> Tensor:
    """Scale the update (n,) down to the allowed norm; a smaller one passes unchanged."""
    if policy.clip_norm is None:
        return update
    norm = float(update.double().norm())
    return update if norm <= policy.clip_norm else update * (policy.clip_norm / norm)
