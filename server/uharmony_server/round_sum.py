"""The updates of one round while they come: their sum, who is in it, whether that is enough.

At most two admitted updates are held, so that memory does not grow with the number of sites.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from uharmony_model.errors import QuorumError
from uharmony_model.study import Study
from uharmony_server.admission import Admitted, Refusal, RefusalReason
from uharmony_server.aggregate import WeightedSum

GROUP = 2  # admitted updates that are held at once; the sum does not depend on it


class RoundSum:
    """`base + sum_k w_k delta_k / sum_k w_k` over the updates that are taken, in their order.

    With `n_k` the number of cases, or 1 (`by_cases`), and sums over sites with labels (L) and
    without (U), of those that were taught something:

        w_k = n_k                                          with labels
        w_k = n_k taught_k min(1, sum_L n / sum_U n)       without; alone in a round, n_k taught_k

    so that those without never outweigh those with, however many they are: in one place a step has
    one loss of each kind, L_sup + lambda L_u. Ours.

    `norms` are those of the updates by site, `lengths` those of the ones with a weight;
    `cases` are their numbers, `bytes` is what they weighed on the wire; `started_from` are the
    (round, site) pairs of the outcomes they were trained from; `unsaid` are the sites that hide
    their number of cases without having said so.
    """

    def __init__(self, study: Study, round_: int, numel: int, *, by_cases: bool) -> None:
        self.norms: dict[str, float] = {}
        self.lengths: list[float] = []
        self.cases: dict[str, int] = {}
        self.bytes = 0
        self.started_from: set[tuple[int, str]] = set()
        self.unsaid: set[str] = set()
        self._need, self._round, self._by_cases = study.federation, round_, by_cases
        self._numel = numel
        self._sums: dict[bool, WeightedSum] = {}  # by whether there are labels
        self._counts = {True: 0, False: 0}
        self._group: list[Admitted] = []

    def take(self, site: str, update: Admitted) -> Refusal | None:
        """Add an update, or say why it cannot be weighed."""
        if update.cases is None and self._by_cases:
            detail = "hides its number of cases, and did not say so when it was greeted"
            self.unsaid.add(site)
            reason = RefusalReason.BAD_CASE_COUNT
            return Refusal(site=site, round=self._round, reason=reason, detail=detail)
        self.norms[site] = update.norm
        self.lengths += [update.norm] if update.taught else []
        # A site with a hidden number has one case at least; nothing else is known.
        self.cases[site] = update.cases or 1
        if update.started_from:
            self.started_from.add((update.started_from, site))
        self.bytes += update.bytes
        self._group.append(update)
        if len(self._group) == GROUP:
            self._add()
        return None

    def require_quorum(self, refusals: Sequence[Refusal]) -> None:
        """See that enough sites and cases are in the sum; `refusals` say why others are not.

        Raises:
            QuorumError: fewer sites or cases were admitted than the study needs.
        """
        sites, cases = len(self.cases), sum(self.cases.values())
        if sites and not self.lengths:
            raise QuorumError(
                f"round {self._round}: {sites} sites answered and none was taught anything; a site "
                "with labels has to take part"
            )
        if sites < self._need.min_sites or cases < self._need.min_cases or not sites:
            reasons = "; ".join(f"{r.site}: {r.reason}" for r in refusals if r.round == self._round)
            raise QuorumError(
                f"round {self._round}: {sites} sites with {cases} cases were admitted, the "
                f"study needs {self._need.min_sites} sites and {self._need.min_cases} cases "
                f"({reasons or 'no answers'})"
            )

    def apply(self, base: Tensor) -> Tensor:
        """`base` and the mean update `(n,)`; the sum is used up by this.

        Raises:
            QuorumError: nothing was taken.
        """
        if self._group:
            self._add()
        labelled, others = (self._sums.pop(kind, None) for kind in (True, False))
        if labelled is None or not labelled.total:
            return (others or WeightedSum(self._numel)).apply(base)
        if others is not None and others.total:
            labelled.join(others, min(1.0, self._counts[True] / self._counts[False]))
        return labelled.apply(base)

    def _add(self) -> None:
        for kind in (True, False):
            updates = [update for update in self._group if update.labelled is kind]
            if not updates:
                continue
            cases = [u.cases if self._by_cases and u.cases is not None else 1 for u in updates]
            weights = [u.taught * n for u, n in zip(updates, cases, strict=True)]
            total = self._sums.setdefault(kind, WeightedSum(self._numel))
            total.add([update.flat for update in updates], weights)
            # Who was taught nothing takes no weight from those of its kind that were.
            self._counts[kind] += sum(n for n, w in zip(cases, weights, strict=True) if w)
        self._group.clear()
