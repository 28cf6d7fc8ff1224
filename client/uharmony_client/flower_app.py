"""The site's only file that speaks Flower: instructions in, one payload out.

Three questions are answered: `hello` (who are you, what did you agree to), `train` (one round)
and `evaluate`. The server sends data, never code. What a site cannot do it says with a reason,
in an answer of its own kind; the federation goes on without it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from uharmony_client.evaluate import evaluate_split, save_rows, summarise
from uharmony_client.local_store import RoundKey
from uharmony_client.local_train import train_round
from uharmony_client.policy import apply_policy
from uharmony_client.site import Site
from uharmony_client.workbench import Workbench, initial_local, site_parameters
from uharmony_model.errors import ExchangeError, TrainingError
from uharmony_model.exchange.hello import Hello
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.exchange.schema import unflatten

log = logging.getLogger(__name__)
OpenSite = Callable[[Context], Site]
OnStep = Callable[[str, int, int, float], None]


def make_client_app(open_site: OpenSite, *, on_step: OnStep | None = None) -> ClientApp:
    """A Flower ClientApp for the site that `open_site` opens from a node's context."""
    app = ClientApp()
    bench = Workbench()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        def work() -> RecordDict:
            site = open_site(context)
            text = Hello(site=site.name, study=site.study.digest).model_dump_json()
            return RecordDict({"hello": ConfigRecord({"json": text})})

        return _reply(message, work)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def work() -> RecordDict:
            site = open_site(context)
            order, payload = _asked(message, site)
            return _carried(_train(bench, site, order, payload, on_step))

        return _reply(message, work)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def work() -> RecordDict:
            site = open_site(context)
            order, payload = _asked(message, site)
            return _carried(_evaluate(bench, site, order, payload))

        return _reply(message, work)

    return app


def _train(
    bench: Workbench, site: Site, order: Instruction, payload: bytes, on_step: OnStep | None
) -> bytes:
    """The site's round: from its store when it has it, else trained, stored, then sent."""
    study = site.study
    network, partition = bench.network(study, site.domains, site.device)
    base = bench.weights(payload, order, partition)
    key = RoundKey(study.digest, order.round, order.base)
    stored = site.store.update(key)
    if stored is not None:
        return stored
    before = site.store.before(study.digest, order.round)
    if before is None:
        before = initial_local(study, site.domains)
    listener = None if on_step is None else _listener(on_step, site.name, order.round)
    data = site.training_data()
    result = train_round(
        network,
        data,
        study=study,
        partition=partition,
        base=base,
        before=before,
        round_=order.round,
        on_step=listener,
    )
    update = encode(
        kind=Kind.UPDATE,
        study=study.digest,
        round=order.round,
        site=site.name,
        base=order.base,
        codec=study.codec.up,
        schema=partition.shared_schema,
        values={"cases": len(data.volumes), "loss": result.loss},
        flat=apply_policy(result.update, site.config.policy),
    )
    site.store.write(key, update, result.local)
    return update


def _evaluate(bench: Workbench, site: Site, order: Instruction, payload: bytes) -> bytes:
    """The global weights with the site's own parameters, measured on the splits asked for."""
    study = site.study
    network, partition = bench.network(study, site.domains, site.device)
    flat = bench.weights(payload, order, partition)
    own = site_parameters(site, after_round=order.round)
    network.load_state_dict(partition.merge(unflatten(flat, partition.shared_schema), own))
    rows = []
    for split in order.splits:
        found = evaluate_split(network, site, split, round_=order.round, slow=order.final)
        save_rows(found, site, split, order.round)
        rows += found
    return encode(
        kind=Kind.METRICS,
        study=study.digest,
        round=order.round,
        site=site.name,
        base=order.base,
        codec="fp32",
        schema=None,
        values=summarise(rows, site),
        flat=None,
    )


def _asked(message: Message, site: Site) -> tuple[Instruction, bytes]:
    """The instruction and the payload that came with it.

    Raises:
        ExchangeError: they cannot be read, or are of a study this site did not approve.
    """
    try:
        text = message.content.config_records["instruction"]["json"]
        array = message.content.array_records["payload"]["payload"]
    except KeyError:
        raise ExchangeError("a message without instruction or payload; send both") from None
    order = Instruction.from_json(str(text))
    if order.study != site.study.digest:
        raise ExchangeError(
            f"asked for study {order.study[:12]}, this site approved {site.study.digest[:12]}; "
            "approve the changed study as a new one"
        )
    return order, array.data


def _carried(data: bytes) -> RecordDict:
    array = Array("uint8", (len(data),), "uharmony.payload", data)
    return RecordDict({"payload": ArrayRecord({"payload": array})})


def _reply(message: Message, work: Callable[[], RecordDict]) -> Message:
    """Do one piece of work; an error becomes a refusal that says no more than may leave."""
    try:
        content = work()
    except Exception as error:  # whatever goes wrong here, its text stays here
        log.warning("refused: %s", error)
        log.debug("where it went wrong", exc_info=True)
        refusal = json.dumps({"detail": _speakable(error)})
        content = RecordDict({"refusal": ConfigRecord({"json": refusal})})
    return Message(content, reply_to=message)


def _speakable(error: Exception) -> str:
    """What the coordinator is told. Errors about data and files name cases and folders."""
    if isinstance(error, ExchangeError | TrainingError):
        return str(error)[:300]
    return f"{type(error).__name__}; the reason stands in the site's own log"


def _listener(on_step: OnStep, site: str, round_: int) -> Callable[[int, float], None]:
    return lambda step, loss: on_step(site, round_, step, loss)
