"""The coordinator's file that speaks Flower: a Strategy whose decisions are pure functions.

Flower moves messages; what may be counted is decided by `admission`, what becomes of it by
`aggregate`. One site's bad, late or missing answer is recorded with a reason and the round goes
on; only a missing quorum stops it. Answers are consumed as they come and at most two admitted
updates are held, so that memory does not grow with the number of sites.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from uharmony_model.errors import ExchangeError, QuorumError
from uharmony_model.exchange.hello import check_hello
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.published import PublicationForm
from uharmony_model.schedule import finale_round, publication_round, splits_due
from uharmony_model.study import Study
from uharmony_server.admission import (
    Admitted,
    Expected,
    Refusal,
    RefusalReason,
    admit,
    admit_metrics,
    norm_limit,
)
from uharmony_server.aggregate import WeightedSum
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.metrics import records_from_metrics
from uharmony_server.publication import Published, take
from uharmony_server.records import Record
from uharmony_server.replies import (
    hello_of,
    ledger_head_of,
    payload_of,
    publication_of,
    refusal,
    refusal_of,
)
from uharmony_server.server_step import next_weights

SiteOf = Callable[[int], str | None]  # whose certificate a node has

GROUP = 2  # admitted updates that are held at once; the sum does not depend on it


class HarmonyStrategy(Strategy):
    """FedAvg over the shared backbone, with admission, quorum and a fixed order of sites."""

    def __init__(
        self,
        study: Study,
        state: Checkpoint,
        *,
        certified: SiteOf | None = None,
        online: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        self.study = study
        self.schema = state.schema
        self.state = state
        self.nodes: dict[int, str] = {}
        self._certified, self._online = certified, online
        self._members: frozenset[str] = frozenset()
        self._payload: tuple[int, str, bytes] | None = None

    # --- joining -------------------------------------------------------------------------------

    def greet(self, grid: Grid, *, timeout: float | None = None) -> dict[int, str]:
        """Ask every node that is new who it is and what it agreed to; refuse those that differ.

        Raises:
            QuorumError: fewer sites than the study needs can take part.
        """
        text = Instruction(action="hello", study=self.study.digest, round=0, base="").to_json()
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
            node = reply.metadata.src_node_id
            name = self._named(node) or f"node-{node}"
            try:
                hello = hello_of(reply)
                check_hello(hello, self.study.digest)
            except ExchangeError as error:
                self._refuse(refusal(name, 0, RefusalReason.NOT_AGREED, str(error)))
                continue
            if self._certified is not None and hello.site != name:
                detail = f"says that it is {hello.site}, its certificate is that of {name}"
                self._refuse(refusal(name, 0, RefusalReason.WRONG_SITE, detail))
                continue
            if hello.site in self.nodes.values():
                detail = f"two nodes call themselves {hello.site}; the first one counts"
                self._refuse(refusal(hello.site, 0, RefusalReason.DUPLICATE, detail))
                continue
            self.nodes[node] = hello.site
            self._hear(hello.site, reply)
            hidden = set(self.state.hidden) - {hello.site}
            hidden |= {hello.site} if hello.weight == "equal" else set()
            if hidden != set(self.state.hidden):
                self.state = self.state.with_changes(hidden=tuple(sorted(hidden)))
        needed = self.study.federation.min_sites
        if len(self.nodes) < needed:
            why = "; ".join(f"{r.site}: {r.detail}" for r in self.state.refusals if r.round == 0)
            raise QuorumError(
                f"{len(self.nodes)} sites joined, the study needs {needed} ({why or 'no answers'})"
            )
        return self.nodes

    # --- training ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One instruction a site, in the order of their names; the weights travel as one array."""
        order = Instruction(
            action="train", study=self.study.digest, round=server_round, base=self.state.digest
        )
        return self._messages(order, "train", arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`global' = base + sum_k w_k delta_k` over the admitted updates, sorted by site.

        Raises:
            QuorumError: fewer sites or cases were admitted than the study needs.
        """
        total = WeightedSum(self.schema.numel)
        group: list[Admitted] = []
        admitted: dict[str, tuple[int, float]] = {}
        size, in_vain, unsaid = 0, set(self.state.uncounted), set[str]()
        for site, verdict in self._verdicts(replies, server_round):
            if isinstance(verdict, Refusal):
                self._refuse(verdict)
                continue
            if verdict.cases is None and self._by_cases:
                detail = "hides its number of cases, and did not say so when it was greeted"
                self._refuse(refusal(site, server_round, RefusalReason.BAD_CASE_COUNT, detail))
                unsaid.add(site)
                continue
            # A site with a hidden number has one case at least; nothing else is known.
            admitted[site] = (verdict.cases or 1, verdict.norm)
            if verdict.started_from and not self._counted(verdict.started_from, site):
                in_vain.add((verdict.started_from, site))
            size += verdict.bytes
            group.append(verdict)
            if len(group) == GROUP:
                self._add(total, group)
        self._add(total, group)
        # Greeted again before the next round, it can say so.
        self.nodes = {n: s for n, s in self.nodes.items() if s not in unsaid}
        self._require_members(server_round, admitted)
        self._require_quorum(server_round, admitted)
        weights, momentum = next_weights(
            self.study,
            server_round,
            self.state.global_,
            total.apply(self.state.global_),
            self.state.momentum,
        )
        self.state = self.state.with_changes(
            round=server_round,
            global_=weights,
            momentum=momentum,
            norms=(*self.state.norms, *(norm for _, norm in admitted.values())),
            bytes_up=(*self.state.bytes_up, size),
            counted=(*self.state.counted, tuple(sorted(admitted))),
            uncounted=tuple(sorted(in_vain)),
        )
        return self.arrays(), MetricRecord(
            {"sites": len(admitted), "cases": sum(c for c, _ in admitted.values())}
        )

    # --- evaluation ----------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every site to measure the new weights with its own parameters, when it is due."""
        splits = splits_due(self.study, server_round)
        if not splits:
            return []
        order = Instruction(
            action="evaluate",
            study=self.study.digest,
            round=server_round,
            base=self.state.digest,
            final=server_round == self.study.training.rounds,
            splits=splits,
        )
        return self._messages(order, "evaluate", arrays)

    def configure_finale(self, arrays: ArrayRecord) -> Iterable[Message]:
        """Ask sites for their own steps from the last weights; those that answered rest."""
        order = Instruction(
            action="finale",
            study=self.study.digest,
            round=finale_round(self.study),
            base=self.state.digest,
            final=True,
        )
        return self._messages(order, "train.finale", arrays, but=self.state.at_home)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Keep every site's means as records; a site that could not measure is named."""
        records, _ = self._measured(server_round, replies)
        dice = [r.dice for r in records if r.dice is not None]
        return MetricRecord({"dice": statistics.fmean(dice)}) if dice else None

    def aggregate_finale(self, replies: Iterable[Message]) -> None:
        """As after an evaluation; the sites that answered are not asked again."""
        _, sites = self._measured(finale_round(self.study), replies)
        at_home = tuple(sorted({*self.state.at_home, *sites}))
        self.state = self.state.with_changes(at_home=at_home)

    @property
    def all_at_home(self) -> bool:
        """Whether some site has played the finale, and all that are there have."""
        home = set(self.state.at_home)
        return bool(home) and home.issuperset(self.nodes.values())

    def configure_publish(self, arrays: ArrayRecord) -> Iterable[Message]:
        """Ask sites for what they publish, if they do; those that answered rest."""
        order = Instruction(
            action="publish",
            study=self.study.digest,
            round=publication_round(self.study),
            base=self.state.digest,
            final=True,
        )
        answered = () if self.state.published is None else self.state.published.said
        return self._messages(order, "train.publish", arrays, but=answered)

    def aggregate_publish(self, replies: Iterable[Message], form: PublicationForm) -> None:
        """Keep what was published; a site that says nothing of it is named."""
        round_ = publication_round(self.study)
        published = self.state.published or Published()
        for site, reply in self._in_order(replies, round_):
            answer = publication_of(reply)
            if answer is None:
                self._refuse(refusal_of(reply, site, round_))
                continue
            expected = self._expected(site, round_)
            published, refused = take(published, answer, expected, self.study, form)
            for verdict in refused:
                self._refuse(verdict)
        if published.said:
            self.state = self.state.with_changes(published=published)

    def _measured(self, round_: int, replies: Iterable[Message]) -> tuple[list[Record], list[str]]:
        """Keep the records of the sites that answered as they should, and name these."""
        records: list[Record] = []
        sites = []
        for site, reply in self._in_order(replies, round_):
            payload = payload_of(reply)
            verdict = (
                refusal_of(reply, site, round_)
                if payload is None
                else admit_metrics(payload, self._expected(site, round_))
            )
            if isinstance(verdict, Refusal):
                self._refuse(verdict)
                continue
            try:
                records += records_from_metrics(self.study, round_, verdict)
            except ExchangeError as error:
                reason = RefusalReason.WRONG_SCHEMA
                self._refuse(refusal(site, round_, reason, str(error)))
                continue
            sites.append(site)
        dumped = [record.model_dump(mode="json", by_alias=True) for record in records]
        self.state = self.state.with_changes(records=(*self.state.records, *dumped))
        return records, sites

    def summary(self) -> None:
        """Nothing is printed: progress belongs to the command, records to the report."""

    def arrays(self) -> ArrayRecord:
        """The current global weights as they travel: one flat array with its manifest."""
        base, round_ = self.state.digest, self.state.round
        if self._payload is None or self._payload[:2] != (round_, base):
            data = encode(
                kind=Kind.MODEL,
                study=self.study.digest,
                round=round_,
                site="server",
                base=base,
                codec="fp32",
                schema=self.schema,
                values={},
                flat=self.state.global_,
                body_digest=base,
            )
            self._payload = (round_, base, data)
        data = self._payload[2]
        array = Array("uint8", (len(data),), "uharmony.payload", data)
        return ArrayRecord({"payload": array})

    # --- parts ---------------------------------------------------------------------------------

    def _verdicts(
        self, replies: Iterable[Message], round_: int
    ) -> Iterator[tuple[str, Admitted | Refusal]]:
        """Judge answers in their order, each while the next one is being made or received."""
        waiting: deque[tuple[str, Future[Admitted | Refusal]]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for site, reply in self._in_order(replies, round_):
                waiting.append((site, pool.submit(self._judge, site, reply, round_)))
                if len(waiting) > 1:
                    first, verdict = waiting.popleft()
                    yield first, verdict.result()
            for first, verdict in waiting:
                yield first, verdict.result()

    def _judge(self, site: str, reply: Message, round_: int) -> Admitted | Refusal:
        payload = payload_of(reply)
        if payload is None:
            return refusal_of(reply, site, round_)
        return admit(payload, self._expected(site, round_))

    def _expected(self, site: str, round_: int) -> Expected:
        federation = self.study.federation
        return Expected(
            site=site,
            study=self.study.digest,
            round=round_,
            base=self.state.digest,
            schema=self.schema,
            codec=self.study.codec.up,
            max_cases=federation.max_cases,
            norm_limit=self._norm_limit(),
        )

    def _norm_limit(self) -> float | None:
        """Before any update was admitted, the global weights themselves are the measure."""
        bound = self.study.federation.norm_bound
        if self.state.norms:
            return norm_limit(self.state.norms, bound)
        return bound * max(float(self.state.global_.norm()), 1.0)

    @property
    def _by_cases(self) -> bool:
        """One hidden number makes all weights equal: none can then be told from the others."""
        present = self._members | set(self.nodes.values())
        return self.study.federation.weighting == "cases" and not present.intersection(
            self.state.hidden
        )

    def _add(self, total: WeightedSum, group: list[Admitted]) -> None:
        by_cases = self._by_cases
        weights = [float(u.cases) if by_cases and u.cases is not None else 1.0 for u in group]
        total.add([u.flat for u in group], weights)
        group.clear()

    def _counted(self, round_: int, site: str) -> bool:
        return round_ <= len(self.state.counted) and site in self.state.counted[round_ - 1]

    def _require_quorum(self, round_: int, admitted: Mapping[str, tuple[int, float]]) -> None:
        need, cases = self.study.federation, sum(c for c, _ in admitted.values())
        if len(admitted) < need.min_sites or cases < need.min_cases or not admitted:
            reasons = "; ".join(
                f"{r.site}: {r.reason}" for r in self.state.refusals if r.round == round_
            )
            raise QuorumError(
                f"round {round_}: {len(admitted)} sites with {cases} cases were admitted, the "
                f"study needs {need.min_sites} sites and {need.min_cases} cases "
                f"({reasons or 'no answers'})"
            )

    def _require_members(self, round_: int, admitted: Mapping[str, object]) -> None:
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

    def _messages(
        self, order: Instruction, kind: str, arrays: ArrayRecord, *, but: Collection[str] = ()
    ) -> Iterator[Message]:
        for node, site in sorted(self.nodes.items(), key=lambda item: item[1]):
            if site in but:
                continue
            own = order.model_copy(update={"receipt": self.state.heads.get(site)})
            content = RecordDict(
                {"instruction": ConfigRecord({"json": own.to_json()}), "payload": arrays}
            )
            yield Message(content, node, kind, group_id=str(order.round))

    def _in_order(self, replies: Iterable[Message], round_: int) -> Iterator[tuple[str, Message]]:
        """Replies by site name. A generator in that order stays lazy; a list is sorted."""
        if isinstance(replies, (list, tuple)):
            replies = sorted(replies, key=lambda r: self.nodes.get(r.metadata.src_node_id, ""))
        last = ""
        for reply in replies:
            site = self.nodes.get(reply.metadata.src_node_id)
            if site is None:
                node = f"node-{reply.metadata.src_node_id}"
                detail = "a node that never said who it is"
                self._refuse(refusal(node, round_, RefusalReason.WRONG_SITE, detail))
                continue
            if site == last:
                detail = "a second answer in the same round; the first one counts"
                self._refuse(refusal(site, round_, RefusalReason.DUPLICATE, detail))
                continue
            if site < last:
                raise ExchangeError(f"answers out of order: {site} after {last}; sort them first")
            last = site
            self._hear(site, reply)
            yield site, reply

    def _strangers(self, members: set[int]) -> set[int]:
        """Nodes to be greeted. Once rounds run, a newcomer is not waited for until it comes."""
        new = members - set(self.nodes)
        if self._online is None or not self.state.round:
            return new
        counted = {site for sites in self.state.counted for site in sites}
        there = set(self._online())
        return {node for node in new if self._named(node) in counted or node in there}

    def _named(self, node: int) -> str:
        return (self._certified(node) if self._certified is not None else None) or ""

    def _hear(self, site: str, reply: Message) -> None:
        """Keep the head of the site's ledger: it goes back to the site as a receipt."""
        head = ledger_head_of(reply)
        if head is not None:
            self.state = self.state.with_changes(heads={**self.state.heads, site: head})

    def late(self, site: str, round_: int) -> None:
        """An update that came after its round was closed: refused, and recorded as trained."""
        if round_ > self.state.round or self._counted(round_, site):
            return  # its round is being asked again, or has counted another copy of it
        detail = "its round was closed without it; the site goes on with the next one"
        self._refuse(refusal(site, round_, RefusalReason.LATE, detail))
        pairs = {*self.state.uncounted, (round_, site)}
        self.state = self.state.with_changes(uncounted=tuple(sorted(pairs)))

    def farewell(self, grid: Grid, *, timeout: float) -> None:
        """Tell every site that the study is over, so that its service can end."""
        order = Instruction(action="finish", study=self.study.digest, round=self.state.round)
        content = RecordDict({"instruction": ConfigRecord({"json": order.to_json()})})
        nodes = sorted(self.nodes.items(), key=lambda item: item[1])
        messages = [
            Message(content, node, "query.finish", group_id=str(order.round)) for node, _ in nodes
        ]
        for _ in grid.send_and_receive(messages, timeout=timeout):
            pass

    def _refuse(self, refusal: Refusal) -> None:
        if refusal in self.state.refusals:
            return  # a greeting repeated after an interruption
        self.state = self.state.with_changes(refusals=(*self.state.refusals, refusal))
