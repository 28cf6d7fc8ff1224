"""Sites that answer without training, for tests of the strategy and of the rounds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from tests.support.tiny import tiny_study
from uharmony_model.exchange.hello import Hello
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, decode, encode
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.study import Study
from uharmony_simulation.engine import site_of

SCHEMA = Schema(tensors=(TensorSpec(name="w", shape=(5,)),))
BASE = torch.linspace(-1, 1, 5)
CASES = {f"site-{i:02d}": i + 1 for i in range(11)}  # more than one group of held updates


def study_of(**federation) -> Study:
    return tiny_study(
        federation=federation,
        training={"rounds": 2},
        evaluation={"validation": 0.0, "test": 0.0, "every": 0},
    )


def delta_of(site: str, weights: torch.Tensor) -> torch.Tensor:
    return weights * 0.1 + int(site[-2:])


class Sites:
    """Sites that answer without training; `study` is what they say they approved."""

    def __init__(self, study: Study, approved: Callable[[str], Study] | None = None) -> None:
        self.study = study
        self.approved = approved or (lambda _: study)
        self.silent: set[str] = set()
        self.hidden: set[str] = set()  # tell no number of cases
        self.names: dict[str, str] = {}  # call themselves otherwise
        self.started_from: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []

    def delta(self, site: str, weights: torch.Tensor) -> torch.Tensor:
        return delta_of(site, weights)

    def __call__(self, message: Message, context: Context) -> Message:
        site = site_of(context)
        self.asked.append((site, message.metadata.message_type))
        if message.metadata.message_type == "query.finish":
            return Message(RecordDict(), reply_to=message)
        if message.metadata.message_type == "query.hello":
            hello = Hello(
                site=self.names.get(site, site),
                study=self.approved(site).digest,
                weight="equal" if site in self.hidden else "cases",
            )
            record = ConfigRecord({"json": hello.model_dump_json()})
            return Message(RecordDict({"hello": record}), reply_to=message)
        if site in self.silent:
            raise RuntimeError("away")
        order = Instruction.from_json(str(message.content.config_records["instruction"]["json"]))
        array = message.content.array_records["payload"]["payload"]
        _, weights = decode(array.data, kind=Kind.MODEL, schema=SCHEMA)
        data = encode(
            kind=Kind.UPDATE,
            study=self.study.digest,
            round=order.round,
            site=site,
            base=order.base,
            schema=SCHEMA,
            values={
                "cases": "equal" if site in self.hidden else CASES[site],
                "started_from": self.started_from.get(site, order.round - 1),
            },
            flat=self.delta(site, weights),
        )
        made = Array("uint8", (len(data),), "uharmony.payload", data)
        return Message(RecordDict({"payload": ArrayRecord({"payload": made})}), reply_to=message)


def expected(weights: torch.Tensor, names, equal: bool = False) -> torch.Tensor:
    """base + sum_k w_k delta_k in float64, w_k = cases over their sum or equal."""
    share = {n: 1.0 if equal else float(CASES[n]) for n in names}
    total = sum(share.values())
    wide = weights.double()
    return wide + sum(share[n] / total * delta_of(n, wide) for n in names)
