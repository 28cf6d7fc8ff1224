"""The coordinator's file that speaks Flower: a Strategy whose decisions are made elsewhere.

Flower moves messages. Who is there is known by `roster`, what may be counted is decided by
`admission`, what becomes of it by `round_sum`; `journal` keeps the state. One site's bad, late or
missing answer is recorded with a reason and the round goes on; only a missing quorum stops it.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.published import PublicationForm
from uharmony_model.schedule import finale_round, publication_round, splits_due
from uharmony_model.study import Study
from uharmony_server.admission import Admitted, Refusal
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.gathered import Gathered
from uharmony_server.journal import Journal
from uharmony_server.judging import expected_from, judge_metrics, judge_update
from uharmony_server.publication import Published, take
from uharmony_server.records import Record
from uharmony_server.replies import publication_of, refusal_of, statistics_of
from uharmony_server.roster import Roster, SiteOf
from uharmony_server.round_sum import RoundSum
from uharmony_server.server_step import next_weights
from uharmony_server.statistics import Answer, Gathering


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
        self._journal = Journal(state)
        self._roster = Roster(study, self._journal, certified=certified, online=online)
        self._payload: tuple[int, str, bytes] | None = None
        self._gathering = Gathering(study) if study.statistics else None

    @property
    def state(self) -> Checkpoint:
        """Where the federation stands."""
        return self._journal.state

    @property
    def nodes(self) -> dict[int, str]:
        """The sites that were greeted and agreed, by node."""
        return self._roster.nodes

    # --- joining and leaving -------------------------------------------------------------------

    def greet(self, grid: Grid, *, timeout: float | None = None) -> dict[int, str]:
        """Ask every node that is new who it is and what it agreed to; refuse those that differ.

        Raises:
            QuorumError: fewer sites than the study needs can take part.
        """
        return self._roster.greet(grid, timeout=timeout)

    def late(self, site: str, round_: int) -> None:
        """An update that came after its round was closed: refused, and recorded as trained."""
        self._journal.late(site, round_)

    def farewell(self, grid: Grid, *, timeout: float) -> None:
        """Tell every site that the study is over, so that its service can end."""
        self._roster.farewell(grid, timeout=timeout)

    # --- training ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One instruction a site, in the order of their names; the weights travel as one array.

        What sites gave before travels beside them.
        """
        order = Instruction(
            action="train", study=self.study.digest, round=server_round, base=self.state.digest
        )
        if self._gathering is None:
            return self._roster.messages(order, "train", arrays)
        return self._with_statistics(self._gathering, order, arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """`global' = base + sum_k w_k delta_k` over the admitted updates, sorted by site.

        Raises:
            QuorumError: fewer sites or cases were admitted than the study needs.
        """
        total = RoundSum(self.study, server_round, self.schema.numel, by_cases=self._by_cases)
        held = self.state.statistics and self.state.statistics.of_next_round()
        beside = 0  # bytes of what is no update
        for site, verdict, said in self._verdicts(replies, server_round):
            refused = verdict if isinstance(verdict, Refusal) else total.take(site, verdict)
            if refused is not None:
                self._journal.refuse(refused)
            elif said is not None and self._gathering is not None:
                expected = expected_from(self.study, self.state, site, server_round)
                beside += said.bytes
                held, bad = self._gathering.take(held or Gathered(), said, expected)
                for one in bad:
                    self._journal.refuse(one)
        if held is not None and self._gathering is not None:
            held = self._gathering.closed(held)
        # Greeted again before the next round, it can say so.
        self._roster.leave_out(total.unsaid)
        self._roster.require_members(server_round, total.norms)
        total.require_quorum(self.state.refusals)
        weights, momentum = next_weights(
            self.study,
            server_round,
            self.state.global_,
            total.apply(self.state.global_),
            self.state.momentum,
            self.schema,
        )
        in_vain = {pair for pair in total.started_from if not self._journal.counted(*pair)}
        self._journal.enter(
            round=server_round,
            global_=weights,
            momentum=momentum,
            norms=(*self.state.norms, *total.lengths),
            bytes_up=(*self.state.bytes_up, total.bytes + beside),
            counted=(*self.state.counted, tuple(sorted(total.norms))),
            uncounted=tuple(sorted({*self.state.uncounted, *in_vain})),
            statistics=held,
        )
        return self.arrays(), MetricRecord(
            {"sites": len(total.cases), "cases": sum(total.cases.values())}
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
        return self._roster.messages(order, "evaluate", arrays)

    def configure_finale(
        self, arrays: ArrayRecord, *, away: Collection[str] = ()
    ) -> Iterable[Message]:
        """Ask sites for their own steps from the last weights; who answered or is `away` rests."""
        order = Instruction(
            action="finale",
            study=self.study.digest,
            round=finale_round(self.study),
            base=self.state.digest,
            final=True,
        )
        but = {*self.state.at_home, *away}
        return self._roster.messages(order, "train.finale", arrays, but=but)

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
        self._journal.enter(at_home=at_home)

    def all_at_home(self, *, away: Collection[str] = ()) -> bool:
        """Whether some site has played the finale, and all that are greeted and not away have."""
        home = set(self.state.at_home)
        return bool(home) and home.issuperset(set(self.nodes.values()) - set(away))

    def away(self) -> frozenset[str]:
        """The greeted sites that are not connected now; none where nobody can tell."""
        return self._roster.away()

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
        return self._roster.messages(order, "train.publish", arrays, but=answered)

    def aggregate_publish(self, replies: Iterable[Message], form: PublicationForm) -> None:
        """Keep what was published; a site that says nothing of it is named."""
        round_ = publication_round(self.study)
        published = self.state.published or Published()
        for site, reply in self._roster.in_order(replies, round_):
            answer = publication_of(reply)
            if answer is None:
                self._journal.refuse(refusal_of(reply, site, round_))
                continue
            expected = expected_from(self.study, self.state, site, round_)
            published, refused = take(published, answer, expected, self.study, form)
            for verdict in refused:
                self._journal.refuse(verdict)
        if published.said:
            self._journal.enter(published=published)

    def _measured(self, round_: int, replies: Iterable[Message]) -> tuple[list[Record], list[str]]:
        """Keep the records of the sites that answered as they should, and name these."""
        records: list[Record] = []
        sites = []
        for site, reply in self._roster.in_order(replies, round_):
            verdict = judge_metrics(self.study, self.state, site, round_, reply)
            if isinstance(verdict, Refusal):
                self._journal.refuse(verdict)
                continue
            records += verdict
            sites.append(site)
        dumped = [record.model_dump(mode="json", by_alias=True) for record in records]
        self._journal.enter(records=(*self.state.records, *dumped))
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
        return _record(self._payload[2])

    # --- parts ---------------------------------------------------------------------------------

    def _with_statistics(
        self, gathering: Gathering, order: Instruction, arrays: ArrayRecord
    ) -> Iterator[Message]:
        """Messages of a round with what was given, each asking its site for what it has not."""
        held = self.state.statistics or Gathered()
        data = gathering.payload(held, order.round - 1, order.base)
        if data is not None:
            order = order.model_copy(update={"given": hashlib.sha256(data).hexdigest()})
        sites = frozenset(self.nodes.values())
        for site in sorted(sites):
            own = order.model_copy(update={"statistics": gathering.asked(site, held, order.round)})
            for message in self._roster.messages(own, "train", arrays, but=sites - {site}):
                if data is not None:
                    message.content["statistics"] = _record(data)
                yield message

    def _verdicts(
        self, replies: Iterable[Message], round_: int
    ) -> Iterator[tuple[str, Admitted | Refusal, Answer | None]]:
        """Judge answers in their order, each while the next one is being made or received."""
        waiting: deque[tuple[str, Future[Admitted | Refusal], Answer | None]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for site, reply in self._roster.in_order(replies, round_):
                said = None if self._gathering is None else statistics_of(reply)
                waiting.append((site, pool.submit(self._judge, site, reply, round_), said))
                if len(waiting) > 1:
                    first, verdict, its = waiting.popleft()
                    yield first, verdict.result(), its
            for first, verdict, its in waiting:
                yield first, verdict.result(), its

    def _judge(self, site: str, reply: Message, round_: int) -> Admitted | Refusal:
        return judge_update(self.study, self.state, site, round_, reply)

    @property
    def _by_cases(self) -> bool:
        """One hidden number makes all weights equal: none can then be told from the others."""
        hidden = self._roster.names.intersection(self.state.hidden)
        return self.study.federation.weighting == "cases" and not hidden


def _record(data: bytes) -> ArrayRecord:
    return ArrayRecord({"payload": Array("uint8", (len(data),), "uharmony.payload", data)})
