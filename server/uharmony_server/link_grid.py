"""A Flower Grid over real sites: asks, waits, asks again where no answer came, and closes in time.

No answer is not a refusal. A site that is offline is asked when it comes back; an error that says
node or task gone means asking again; a SuperLink that was restarted means asking everybody again.
Sites answer from their stores what they have done already. Nodes are numbered by the name of
their site, so what SuperLink calls them may change in the middle of a round.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import Message
from flwr.common.constant import ErrorCode

from uharmony_server.link import AnswerLostError, Arrived, LinkLostError, LinkSession
from uharmony_service.grid import OneRunGrid

log = logging.getLogger(__name__)

Members = Callable[[], Mapping[str, bytes]]
GONE = frozenset(
    {
        ErrorCode.UNKNOWN,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
_POLL_SECONDS = 0.05
_POLL_IDLE_SECONDS = 0.5
_BUSY_SECONDS = 30.0
_PATIENCE_SECONDS = 3600.0  # after that a late answer is not believed in any more


def node_of(site: str) -> int:
    """The number of a site's node in this grid; it does not depend on anything but the name."""
    return int.from_bytes(hashlib.sha256(site.encode()).digest()[:8], "big") >> 1 | 1


@dataclass(frozen=True)
class Waiting:
    """Limits in seconds: a round's deadline, and how long an absent site is waited for."""

    deadline: float | None = None
    absent: float | None = None


class Watcher(Protocol):
    """Who is told what the grid sees, for `status`."""

    def waiting(self, awaited: Mapping[str, float], online: Iterable[str]) -> None:
        """Sites whose answer is missing, since when (wall time), and who is connected."""


@dataclass
class _Ask:
    """One message to one site, as often as it has to be sent."""

    site: str
    message: Message | None
    kind: str
    round: int
    identifier: str = ""
    arrived: Arrived | None = None
    parts: dict[str, bytes] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    absent_since: float | None = None


class LinkGrid(OneRunGrid):
    """Carries a strategy's messages to the enrolled sites that are not revoked."""

    def __init__(
        self, link: LinkSession, members: Members, waiting: Waiting, watcher: Watcher
    ) -> None:
        self._link, self._members, self._waiting, self._watcher = link, members, waiting, watcher
        super().__init__()
        self._stale: dict[str, _Ask] = {}
        self._late: list[tuple[str, int]] = []
        self._busy_until = 0.0

    # --- what a strategy uses --------------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Every member, connected or not."""
        return sorted(node_of(site) for site in self._members())

    def site_of(self, node: int) -> str | None:
        """The member that this number stands for: who its certificate says it is."""
        return {node_of(site): site for site in self._members()}.get(node)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Answers in the order of the messages, each as soon as those before it are settled.

        `timeout` is the round's deadline in seconds; None takes the coordinator's setting.
        """
        limit = self._waiting.deadline if timeout is None else timeout
        names = {node_of(site): site for site in self._members()}
        asks = [
            _Ask(
                names[m.metadata.dst_node_id],
                m,
                m.metadata.message_type,
                int(m.metadata.group_id),
            )
            for m in messages
            if m.metadata.dst_node_id in names
        ]
        end = None if limit is None else time.monotonic() + limit
        for position, ask in enumerate(asks):
            message = self._settle(ask, asks[position:], end)
            if message is None:
                self._leave_behind(ask)
            else:
                yield message
        self._watcher.waiting({}, ())

    def online(self) -> list[int]:
        """The numbers of the members that are connected now."""
        return [node_of(site) for site in self.tend()]

    def tend(self) -> list[str]:
        """Between rounds: register who has joined, and see who is connected."""
        try:
            self._link.admit(self._members())
            found = sorted(self._link.online())
        except LinkLostError as error:
            log.warning("SuperLink is away (%s); beginning a new run", error)
            self._begin_again([])
            return []
        self._watcher.waiting({}, found)
        return found

    def take_late(self) -> list[tuple[str, int]]:
        """(site, round) of updates that have come after their rounds were closed, once each."""
        found, self._late = self._late, []
        return found

    # --- parts -----------------------------------------------------------------------------------

    def _settle(self, ask: _Ask, open_: list[_Ask], end: float | None) -> Message | None:
        """Wait for one answer; None when the round goes on without. Revoked sites are not read."""
        while ask.site in self._members():
            message = self._read(ask)
            if message is not None or self._given_up(ask, end):
                return message
            self._turn(open_)
        return None

    def _given_up(self, ask: _Ask, end: float | None) -> bool:
        """Past the deadline, or absent for longer than is waited for."""
        now, absent = time.monotonic(), self._waiting.absent
        if end is not None and now > end:
            return True
        return (
            absent is not None and ask.absent_since is not None and now - ask.absent_since > absent
        )

    def _turn(self, asks: list[_Ask]) -> None:
        """Send what can be sent, take in what has come, wait a moment."""
        try:
            self._exchange(asks)
        except LinkLostError as error:
            log.warning("SuperLink is away (%s); beginning a new run", error)
            self._begin_again(asks)
        busy = time.monotonic() < self._busy_until
        time.sleep(_POLL_SECONDS if busy else _POLL_IDLE_SECONDS)

    def _exchange(self, asks: list[_Ask]) -> None:
        members = self._members()
        self._link.admit(members)
        online = self._link.online()
        now = time.monotonic()
        for ask in asks:
            if ask.site in online:
                ask.absent_since = None
            elif ask.absent_since is None:
                ask.absent_since = now
        # A site that still works on a closed round gets no other one on top of it.
        busy = {a.site for a in self._stale.values() if now - a.since < _PATIENCE_SECONDS}
        due = [
            a
            for a in asks
            if not a.identifier and a.site in online and a.site in members and a.site not in busy
        ]
        if due:
            copies = [_addressed(a.message, online[a.site]) for a in due if a.message is not None]
            for ask, identifier in zip(due, self._link.push(copies), strict=True):
                ask.identifier = identifier or ""
            self._busy_until = now + _BUSY_SECONDS
        by_identifier = {a.identifier: a for a in asks if a.identifier and a.arrived is None}
        for arrived in self._link.answers({*by_identifier, *self._stale}):
            self._take(arrived, by_identifier)
            self._busy_until = now + _BUSY_SECONDS
        missing = {a.site: time.time() - (now - a.since) for a in asks if a.arrived is None}
        self._watcher.waiting(missing, sorted(online))

    def _take(self, arrived: Arrived, asks: Mapping[str, _Ask]) -> None:
        about = arrived.head.metadata.reply_to_message_id
        gone = arrived.head.has_error() and arrived.head.error.code in GONE
        if about in self._stale:
            missed = self._stale.pop(about)
            self._link.forget(arrived)
            if missed.kind == "train" and not arrived.head.has_error():
                self._late.append((missed.site, missed.round))
            return
        ask = asks.get(about)
        if ask is None:
            return
        if gone:
            log.info("site %s: %s; asking again", ask.site, arrived.head.error.reason)
            ask.identifier = ""
        else:
            ask.arrived = arrived

    def _read(self, ask: _Ask) -> Message | None:
        """The answer under the site's own number, or None as long as it is not whole."""
        if ask.arrived is None:
            return None
        try:
            if not self._link.collect(ask.arrived, ask.parts):
                return None
        except (LinkLostError, AnswerLostError) as error:
            log.warning("site %s: its answer was lost (%s); asking again", ask.site, error)
            ask.arrived, ask.identifier, ask.parts = None, "", {}
            return None
        message = self._link.assemble(ask.arrived, ask.parts)
        message.metadata.__dict__["_src_node_id"] = node_of(ask.site)
        return message

    def _leave_behind(self, ask: _Ask) -> None:
        """The round goes on without this answer; if it still comes, it is late."""
        if ask.arrived is not None:
            # It had begun to come: the site has trained, and what is left of it is not waited for.
            with suppress(LinkLostError):
                self._link.forget(ask.arrived)
            if ask.kind == "train" and ask.site in self._members():
                self._late.append((ask.site, ask.round))
        elif ask.identifier:
            ask.message = None  # with it the weights; that it was asked is all that matters now
            ask.since = time.monotonic()
            self._stale[ask.identifier] = ask

    def _begin_again(self, asks: list[_Ask]) -> None:
        self._link.open(self._members())
        self._stale.clear()
        for ask in asks:
            ask.identifier, ask.arrived, ask.parts = "", None, {}
        self._busy_until = time.monotonic() + _BUSY_SECONDS


def _addressed(message: Message, node: int) -> Message:
    """A fresh copy for the node's number of today; its arrays are shared, not copied."""
    about = message.metadata
    return Message(message.content, node, about.message_type, group_id=about.group_id)
