"""Who takes part: greeted, known by certificate, asked and answered in the order of their names.

A node is a number of Flower's; a site is a name. Where certificates tell the names, a site may not
call itself by another one. In one process there are none, and a site is called as it says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from uharmony_model.errors import ExchangeError, QuorumError
from uharmony_model.exchange.hello import check_hello
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.study import Study
from uharmony_server.admission import RefusalReason
from uharmony_server.journal import Journal
from uharmony_server.replies import hello_of, ledger_head_of, refusal

SiteOf = Callable[[int], str | None]  # whose certificate a node has


class Roster:
    """The sites of one study: `nodes` are those that were greeted and agreed, by number.

    `certified` tells whose certificate a node has, `online` which nodes are there; in one process
    there is neither.
    """

    def __init__(
        self,
        study: Study,
        journal: Journal,
        *,
        certified: SiteOf | None = None,
        online: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        self.nodes: dict[int, str] = {}
        self._study, self._journal = study, journal
        self._certified, self._online = certified, online
        self._members: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """The sites that are greeted, and those whose certificates count though they are away."""
        return self._members | frozenset(self.nodes.values())

    def greet(self, grid: Grid, *, timeout: float | None = None) -> dict[int, str]:
        """Ask every node that is new who it is and what it agreed to; refuse those that differ.

        Raises:
            QuorumError: fewer sites than the study needs can take part.
        """
        text = Instruction(action="hello", study=self._study.digest, round=0, base="").to_json()
        content = RecordDict({"instruction": ConfigRecord({"json": text})})
        members = set(grid.get_node_ids())
        self.nodes = {node: site for node, site in self.nodes.items() if node in members}
        self._members = frozenset(filter(None, map(self._named, members)))
        # By name where a certificate tells it, so that answers come in the order of the sites.
        messages = [
            Message(content, node, "query.hello", group_id="0")
            for node in sorted(self._strangers(members), key=lambda n: (self._named(n), n))
        ]
        for reply in grid.send_and_receive(messages, timeout=timeout):
            self._welcome(reply)
        needed = self._study.federation.min_sites
        if len(self.nodes) < needed:
            refusals = self._journal.state.refusals
            why = "; ".join(f"{r.site}: {r.detail}" for r in refusals if r.round == 0)
            raise QuorumError(
                f"{len(self.nodes)} sites joined, the study needs {needed} ({why or 'no answers'})"
            )
        return self.nodes

    def away(self) -> frozenset[str]:
        """The greeted sites that are not connected now; none where nobody can tell."""
        if self._online is None:
            return frozenset()
        there = set(self._online())
        return frozenset(site for node, site in self.nodes.items() if node not in there)

    def leave_out(self, sites: Collection[str]) -> None:
        """Forget sites, so that they are greeted again before the next round."""
        self.nodes = {node: site for node, site in self.nodes.items() if site not in sites}

    def require_members(self, round_: int, admitted: Collection[str]) -> None:
        """A site that was shut out while the sum was made must not be in it: ask the others again.

        Raises:
            QuorumError: the sum holds the update of a site that is no member any more.
        """
        if self._certified is None:
            return
        gone = sorted(s for n, s in self.nodes.items() if s in admitted and not self._named(n))
        if gone:
            raise QuorumError(
                f"round {round_}: {', '.join(gone)} was revoked while the round was summed; "
                "it is asked again without"
            )

    def messages(
        self, order: Instruction, kind: str, arrays: ArrayRecord, *, but: Collection[str] = ()
    ) -> Iterator[Message]:
        """One message a site, in the order of their names, each with the site's own receipt."""
        for node, site in self._by_name():
            if site in but:
                continue
            own = order.model_copy(update={"receipt": self._journal.state.heads.get(site)})
            content = RecordDict(
                {"instruction": ConfigRecord({"json": own.to_json()}), "payload": arrays}
            )
            yield Message(content, node, kind, group_id=str(order.round))

    def in_order(self, replies: Iterable[Message], round_: int) -> Iterator[tuple[str, Message]]:
        """Replies by site name. A generator in that order stays lazy; a list is sorted.

        Raises:
            ExchangeError: a generator gives them in another order.
        """
        if isinstance(replies, (list, tuple)):
            replies = sorted(replies, key=lambda r: self.nodes.get(r.metadata.src_node_id, ""))
        last = ""
        for reply in replies:
            site = self.nodes.get(reply.metadata.src_node_id)
            if site is None:
                node = f"node-{reply.metadata.src_node_id}"
                detail = "a node that never said who it is"
                self._journal.refuse(refusal(node, round_, RefusalReason.WRONG_SITE, detail))
                continue
            if site == last:
                detail = "a second answer in the same round; the first one counts"
                self._journal.refuse(refusal(site, round_, RefusalReason.DUPLICATE, detail))
                continue
            if site < last:
                raise ExchangeError(f"answers out of order: {site} after {last}; sort them first")
            last = site
            self._journal.hear(site, ledger_head_of(reply))
            yield site, reply

    def farewell(self, grid: Grid, *, timeout: float) -> None:
        """Tell every site that the study is over, so that its service can end."""
        round_ = self._journal.state.round
        order = Instruction(action="finish", study=self._study.digest, round=round_)
        content = RecordDict({"instruction": ConfigRecord({"json": order.to_json()})})
        messages = [
            Message(content, node, "query.finish", group_id=str(round_))
            for node, _ in self._by_name()
        ]
        for _ in grid.send_and_receive(messages, timeout=timeout):
            pass

    def _welcome(self, reply: Message) -> None:
        """Take a site in by its hello, or note why not."""
        node = reply.metadata.src_node_id
        name = self._named(node) or f"node-{node}"
        try:
            hello = hello_of(reply)
            check_hello(hello, self._study.digest)
        except ExchangeError as error:
            self._journal.refuse(refusal(name, 0, RefusalReason.NOT_AGREED, str(error)))
            return
        if self._certified is not None and hello.site != name:
            detail = f"says that it is {hello.site}, its certificate is that of {name}"
            self._journal.refuse(refusal(name, 0, RefusalReason.WRONG_SITE, detail))
            return
        if hello.site in self.nodes.values():
            detail = f"two nodes call themselves {hello.site}; the first one counts"
            self._journal.refuse(refusal(hello.site, 0, RefusalReason.DUPLICATE, detail))
            return
        self.nodes[node] = hello.site
        self._journal.hear(hello.site, ledger_head_of(reply))
        self._journal.hide(hello.site, hidden=hello.weight == "equal")

    def _strangers(self, members: set[int]) -> set[int]:
        """Nodes to be greeted. Once rounds run, a newcomer is not waited for until it comes."""
        new = members - set(self.nodes)
        state = self._journal.state
        if self._online is None or not state.round:
            return new
        counted = {site for sites in state.counted for site in sites}
        there = set(self._online())
        return {node for node in new if self._named(node) in counted or node in there}

    def _named(self, node: int) -> str:
        return (self._certified(node) if self._certified is not None else None) or ""

    def _by_name(self) -> list[tuple[int, str]]:
        return sorted(self.nodes.items(), key=lambda item: item[1])
