"""Classes that a site does not draw, from the model that all sites share.

Where a site draws some classes only, the marginal loss (see `losses`) says nothing on how the rest
(background and the undrawn classes) is divided, so that parameters of the site's own forget it. The
shared model has learned it from those who draw it. With own probabilities p, and q of the shared
model with all residuals zero:

    r(c) = p(c)                                             c drawn at the site
    r(c) = (1 - sum_drawn p) * q(c) / sum_rest q            c background or undrawn

Overlapping classes need no division: each undrawn one is the shared model's. Ours.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from uharmony_model.targets import Annotated, annotated_classes
from uharmony_model.task import Task


def undrawn_names(annotated: Annotated, task: Task) -> tuple[str, ...]:
    """The classes that are not annotated, in the task's order.

    Raises:
        ConfigError: there is not one flag for each class.
    """
    drawn = set(annotated_classes(annotated, task))
    return tuple(name for j, name in enumerate(task.class_names) if j not in drawn)


def with_undrawn(
    own: nn.Module, undrawn: Collection[str], task: Task, shared: nn.Module | None = None
) -> nn.Module:
    """`own` where nothing is undrawn, else both. Without `shared`, `own` without its residuals."""
    if not undrawn:
        return own
    return UndrawnFromShared(own, own if shared is None else shared, undrawn, task)


class UndrawnFromShared(nn.Module):
    """A site's network `own` for the classes that it draws, `shared` for those in `undrawn`.

    It predicts and is not trained. A class that is neither, such as one that the model learned
    after the site's part was made, stays as `own` has it.
    """

    def __init__(
        self, own: nn.Module, shared: nn.Module, undrawn: Collection[str], task: Task
    ) -> None:
        super().__init__()
        self.own, self.shared = own, shared
        self.multiple: int | None = getattr(own, "multiple", None)
        first = 0 if task.overlapping else 1
        found = [first + j for j, name in enumerate(task.class_names) if name in undrawn]
        self._rest = found if task.overlapping else [0, *found]
        self._divides = not task.overlapping

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        """Logits (B, J', D, H, W) of x (B, C, D, H, W); `domain` is for `own` alone."""
        logits: Tensor = self.own(x, domain)
        theirs: Tensor = self.shared(x, None)[:, self._rest]
        if self._divides:
            # Logits of the drawn classes stay to the bit; those of the rest keep their joint mass.
            mass = torch.logsumexp(logits[:, self._rest], dim=1, keepdim=True)
            theirs = mass + theirs - torch.logsumexp(theirs, dim=1, keepdim=True)
        logits = logits.clone()
        logits[:, self._rest] = theirs
        return logits
