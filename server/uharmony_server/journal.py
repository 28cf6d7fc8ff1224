"""The state of the federation as it is written on: what the coordinator notes, and where it stands.

A state is never changed in place. Every entry replaces it, so whoever holds one (an update that is
being judged, a checkpoint that is being written) holds it whole.
"""

from __future__ import annotations

from typing import Any

from uharmony_model.exchange.instruction import Receipt
from uharmony_server.admission import Refusal, RefusalReason
from uharmony_server.checkpoint import Checkpoint


class Journal:
    """The one place where the state of a running study changes; `state` is the newest."""

    def __init__(self, state: Checkpoint) -> None:
        self.state = state

    def enter(self, **changes: Any) -> None:
        """Replace the state by one with other values."""
        self.state = self.state.with_changes(**changes)

    def refuse(self, refusal: Refusal) -> None:
        """Note why an answer does not count."""
        if refusal in self.state.refusals:
            return  # a greeting repeated after an interruption
        self.enter(refusals=(*self.state.refusals, refusal))

    def hear(self, site: str, head: Receipt | None) -> None:
        """Keep the head of the site's ledger: it goes back to the site as a receipt."""
        if head is not None:
            self.enter(heads={**self.state.heads, site: head})

    def hide(self, site: str, *, hidden: bool) -> None:
        """Note whether a site tells how many cases it has."""
        sites = set(self.state.hidden) - {site}
        sites |= {site} if hidden else set()
        if sites != set(self.state.hidden):
            self.enter(hidden=tuple(sorted(sites)))

    def counted(self, round_: int, site: str) -> bool:
        """Whether the site's update is in the sum of that round."""
        return round_ <= len(self.state.counted) and site in self.state.counted[round_ - 1]

    def late(self, site: str, round_: int) -> None:
        """An update that came after its round was closed: refused, and recorded as trained."""
        if round_ > self.state.round or self.counted(round_, site):
            return  # its round is being asked again, or has counted another copy of it
        detail = "its round was closed without it; the site goes on with the next one"
        reason = RefusalReason.LATE
        self.refuse(Refusal(site=site, round=round_, reason=reason, detail=detail))
        pairs = {*self.state.uncounted, (round_, site)}
        self.enter(uncounted=tuple(sorted(pairs)))
