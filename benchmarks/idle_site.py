"""A site that does no local work: the real executor, SuperNode, gate and ledger, no training.

Started by `benchmarks.deployed_round`, once a site, beside the site's real SuperNode.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from uharmony_client.executor import execute_tasks
from uharmony_client.home import Home
from uharmony_client.ledger import Ledger
from uharmony_client.outgoing import Outgoing
from uharmony_model.allocator import keep_freed_pages
from uharmony_model.exchange.hello import Hello
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, decode, encode
from uharmony_model.initial import initial_weights
from uharmony_model.study import Study
from uharmony_service.command_line import run_process
from uharmony_service.keys import load_ledger_key
from uharmony_service.loopback import read_secret
from uharmony_service.supervision import end_with_parent


def idle_app(study: Study, name: str, out: Outgoing | None, finished: list[bool]) -> ClientApp:
    """Decode, change every value, encode, write down (where there is a gate), send."""
    app = ClientApp()
    schema, _ = initial_weights(study)
    noise = torch.randn(schema.numel, generator=torch.Generator().manual_seed(len(name))) * 1e-4

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        text = Hello(site=name, study=study.digest).model_dump_json()
        return Message(RecordDict({"hello": ConfigRecord({"json": text})}), reply_to=message)

    @app.query("finish")
    def finish(message: Message, context: Context) -> Message:
        finished.append(True)
        return Message(RecordDict({"status": ConfigRecord({"json": "{}"})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = Instruction.from_json(str(message.content["instruction"]["json"]))
        data = message.content.array_records["payload"]["payload"].data
        flat = decode(data, kind=Kind.MODEL, schema=schema)[1]
        update = encode(
            kind=Kind.UPDATE,
            study=study.digest,
            round=order.round,
            site=name,
            base=order.base,
            codec=study.codec.up,
            schema=schema,
            values={"cases": 20, "loss": 0.0},
            flat=flat * 1e-3 + noise,
        )
        sent = update if out is None else out.payload(update, schema)
        array = Array("uint8", (len(sent),), "uharmony.payload", sent)
        return Message(RecordDict({"payload": ArrayRecord({"payload": array})}), reply_to=message)

    return app


def main() -> None:
    """`python -m benchmarks.idle_site SITE_YAML PORT`."""
    end_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("site")
    parser.add_argument("port", type=int)
    given = parser.parse_args()
    keep_freed_pages()
    torch.set_num_threads(1)
    home = Home.find(str(Path(given.site)))
    finished: list[bool] = []
    ledger = Ledger(home.ledger, load_ledger_key(home.identity.ledger_key))
    out = Outgoing(ledger, home.config.policy, to=home.membership().address)
    execute_tasks(
        idle_app(home.study(), home.config.name, out, finished),
        f"127.0.0.1:{given.port}",
        read_secret(home.run / "secret"),
        done=lambda: bool(finished),
    )


if __name__ == "__main__":
    run_process(main)
