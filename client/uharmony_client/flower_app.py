"""The site's file that speaks Flower: instructions in, one payload out.

Six questions are answered: `hello` (who are you, what did you agree to), `train` (one round, and
the statistics that the site gives), `evaluate`, `finale` (the site's own last steps), `publish`
(what the site gives away, if it does), and `finish`. The server sends data, never code.
What a site cannot do it says with a reason, in an answer of its own kind; the federation goes on
without it. A full disk or memory is no answer: the process ends, is started again, and is asked
again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from uharmony_client.alone import alone_candidate
from uharmony_client.approval import approved_order
from uharmony_client.asked import require_unchanged
from uharmony_client.evaluate import summarise
from uharmony_client.failures import no_room, speakable
from uharmony_client.learning import cases_learned_from
from uharmony_client.ledger import Ledger
from uharmony_client.outgoing import Outgoing
from uharmony_client.publish import publish
from uharmony_client.site import Site
from uharmony_client.site_models import keep_federated_model, keep_personal_model
from uharmony_client.site_round import (
    Bench,
    finale_metrics,
    measure,
    metrics_payload,
    round_update,
)
from uharmony_client.small_cells import EQUAL, update_values
from uharmony_client.statistics import given_of, statistics_answer, without_own
from uharmony_client.workbench import Workbench
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_model.exchange.hello import Hello
from uharmony_model.exchange.instruction import Instruction, Receipt
from uharmony_model.exchange.statistics import StatisticsForm
from uharmony_model.schedule import (
    finale_round,
)

log = logging.getLogger(__name__)
OpenSite = Callable[[Context], Site]
OnStep = Callable[[str, int, int, float], None]
OnInstruction = Callable[[Instruction], None]


@dataclass(frozen=True)
class Listeners:
    """Who is told what happens: an instruction (before it is followed), a step, the end.

    `alone` is told the steps of the local-only model, whose rounds begin anew in a finale.
    """

    instruction: OnInstruction = lambda order: None
    step: OnStep | None = None
    alone: OnStep | None = None
    finished: Callable[[], None] = lambda: None


@dataclass
class _Desk:
    """What one process keeps between instructions."""

    open_site: OpenSite
    outgoing: Callable[[Site], Outgoing]
    listeners: Listeners
    bench: Workbench = field(default_factory=Workbench)
    receipt: Receipt | None = None
    forms: dict[str, StatisticsForm] = field(default_factory=dict)

    def form(self, site: Site, bench: Bench) -> StatisticsForm:
        """What the statistics of a site's study look like."""
        study = site.study
        if not study.statistics:
            return StatisticsForm()
        if study.digest not in self.forms:
            self.forms[study.digest] = StatisticsForm.of(study, bench.network)
        return self.forms[study.digest]


def make_client_app(
    open_site: OpenSite,
    *,
    outgoing: Callable[[Site], Outgoing] | None = None,
    on_step: OnStep | None = None,
    listeners: Listeners | None = None,
) -> ClientApp:
    """A Flower ClientApp for the site that `open_site` opens from a node's context.

    Everything that leaves passes through `outgoing`; without one, policies still hold but there
    is no ledger: nothing leaves a building in a simulation.
    """
    app = ClientApp()
    desk = _Desk(
        open_site,
        outgoing or (lambda site: Outgoing(None, site.config.policy)),
        listeners or Listeners(step=on_step),
    )

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return _answer(desk, message, context, "hello", _hello)

    @app.query("finish")
    def finish(message: Message, context: Context) -> Message:
        return _answer(desk, message, context, "finish", _finish)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(desk, message, context, "train", _train)

    @app.train("finale")
    def finale(message: Message, context: Context) -> Message:
        return _answer(desk, message, context, "finale", _finale)

    @app.train("publish")
    def published(message: Message, context: Context) -> Message:
        return _answer(desk, message, context, "publish", _publish)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(desk, message, context, "evaluate", _evaluate)

    return app


def _hello(
    desk: _Desk, site: Site, out: Outgoing, order: Instruction, message: Message
) -> RecordDict:
    values = update_values(
        cases_learned_from(site.training_data(), site.study), 0.0, site.study, site.config.policy
    )
    text = Hello(
        site=site.name,
        study=site.study.digest,
        weight="equal" if values["cases"] == EQUAL else "cases",
    ).model_dump_json()
    text = out.text("hello", site.study.digest, 0, text)
    return RecordDict({"hello": ConfigRecord({"json": text})})


def _finish(
    desk: _Desk, site: Site, out: Outgoing, order: Instruction, message: Message
) -> RecordDict:
    text = out.text("status", site.study.digest, order.round, json.dumps({"finished": order.round}))
    desk.listeners.finished()
    return RecordDict({"status": ConfigRecord({"json": text})})


def _train(
    desk: _Desk, site: Site, out: Outgoing, order: Instruction, message: Message
) -> RecordDict:
    """The site's round, with what sites gave before it; and what this one gives, if it is asked."""
    bench = _bench(desk, site, order, message)
    require_unchanged(site, order)
    form = desk.form(site, bench)
    given = given_of(_statistics_of(message), order, site.study, form)
    given = without_own(given, site, form)
    on_step = _listener(desk, site, order.round)
    update = round_update(site, bench, order.round, given=given, on_step=on_step)
    content = _carried(out.payload(update, bench.partition.shared_schema))
    if order.statistics:
        answer = statistics_answer(site, bench, order, form, out, given)
        for what, data in answer.payloads.items():
            content[what] = ArrayRecord({"payload": _array(data)})
        content["statistics"] = ConfigRecord({"json": answer.text})
    return content


def _evaluate(
    desk: _Desk, site: Site, out: Outgoing, order: Instruction, message: Message
) -> RecordDict:
    """The global weights with the site's own parameters, measured on the splits asked for."""
    bench = _bench(desk, site, order, message)
    require_unchanged(site, order)
    rows = measure(site, bench, order.round, order.splits, slow=order.final)
    if order.final and out.ledger is not None:
        keep_federated_model(site, bench.shared, order.round)
    metrics = metrics_payload(site, order.base, order.round, summarise(rows, site))
    return _carried(out.payload(metrics, None))


def _finale(
    desk: _Desk, site: Site, out: Outgoing, order: Instruction, message: Message
) -> RecordDict:
    """The site's own steps from the last weights; what it kept, measured."""
    bench = _bench(desk, site, order, message)
    on_step = _listener(desk, site, order.round)
    alone = alone_candidate(site, on_step=desk.listeners.alone)
    metrics = finale_metrics(site, bench, alone=alone, on_step=on_step)
    if out.ledger is not None:
        keep_personal_model(site, bench.shared)
    return _carried(out.payload(metrics, None))


def _publish(
    desk: _Desk, site: Site, out: Outgoing, order: Instruction, message: Message
) -> RecordDict:
    """What the site publishes, one payload of a kind, and by codes why it does or does not."""
    # From the weights that the finale starts from: those of the last round.
    last = order.model_copy(update={"round": finale_round(site.study)})
    answer = publish(site, _bench(desk, site, last, message))
    content = RecordDict()
    for release in answer.releases:
        data = out.payload(release.data, release.schema)
        content[release.what] = ArrayRecord({"payload": _array(data)})
    text = out.text("publication", order.study, order.round, json.dumps(dict(answer.said)))
    content["publication"] = ConfigRecord({"json": text})
    return content


def _bench(desk: _Desk, site: Site, order: Instruction, message: Message) -> Bench:
    network, partition = desk.bench.network(site.study, site.domains, site.device)
    weights = desk.bench.weights(_payload_of(message), order, partition)
    return Bench(network, partition, weights, order.base)


def _instruction_of(message: Message) -> str:
    try:
        return str(message.content.config_records["instruction"]["json"])
    except KeyError:
        raise ExchangeError("a message without an instruction; send one") from None


def _payload_of(message: Message) -> bytes:
    try:
        return message.content.array_records["payload"]["payload"].data
    except KeyError:
        raise ExchangeError("a message without a payload; send the weights") from None


def _statistics_of(message: Message) -> bytes | None:
    record = message.content.array_records.get("statistics")
    return None if record is None else record["payload"].data


def _carried(data: bytes) -> RecordDict:
    return RecordDict({"payload": ArrayRecord({"payload": _array(data)})})


def _array(data: bytes) -> Array:
    return Array("uint8", (len(data),), "uharmony.payload", data)


Work = Callable[[_Desk, Site, Outgoing, Instruction, Message], RecordDict]


def _answer(desk: _Desk, message: Message, context: Context, action: str, work: Work) -> Message:
    """Do one piece of work; an error becomes a refusal that says no more than may leave.

    Raises:
        StoreError, MemoryError: the machine has no room; another answer would be a wrong one.
    """
    out: Outgoing | None = None
    order: Instruction | None = None
    try:
        site = desk.open_site(context)
        out = desk.outgoing(site)
        order = approved_order(_instruction_of(message), site.study, action)
        desk.listeners.instruction(order)
        if order.receipt not in (None, desk.receipt) and out.ledger is not None:
            desk.receipt = order.receipt
            _keep_receipt(out.ledger, order.receipt)
        content = work(desk, site, out, order, message)
    except Exception as error:  # whatever goes wrong here, its text stays here
        log.warning("refused: %s", error)
        log.debug("where it went wrong", exc_info=True)
        if no_room(error):
            raise
        text = json.dumps({"detail": speakable(error)})
        if out is not None:
            study, round_ = ("", 0) if order is None else (order.study, order.round)
            text = out.text("refusal", study, round_, text)
        content = RecordDict({"refusal": ConfigRecord({"json": text})})
    if out is not None and out.ledger is not None:
        head = json.dumps({"seq": out.ledger.head.seq, "sha256": out.ledger.head.sha256})
        content["ledger"] = ConfigRecord({"json": head})
    return Message(content, reply_to=message)


def _keep_receipt(ledger: Ledger, receipt: Receipt) -> None:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        ledger.add_receipt(receipt.seq, receipt.sha256, when)
    except StoreError as error:
        # The round does not depend on it, but somebody should look.
        log.warning("the coordinator has seen another ledger than this one: %s", error)


def _listener(desk: _Desk, site: Site, round_: int) -> Callable[[int, float], None] | None:
    on_step = desk.listeners.step
    return None if on_step is None else lambda step, loss: on_step(site.name, round_, step, loss)
