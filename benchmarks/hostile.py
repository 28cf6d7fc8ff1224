"""What a hostile update does here and in Flower's own FedAvg: `python -m benchmarks hostile`.

One round of three sites, one of them hostile, run twice: by this project's strategy and by
`flwr.serverapp.strategy.FedAvg`. Printed is a Markdown table; docs/hostile_input.md holds it.
"""

from __future__ import annotations

import argparse
import logging
import math
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from benchmarks.hostile_cases import cases
from benchmarks.hostile_forms import Asked, Case, carried, fedavg
from tests.support.tiny import tiny_study
from uharmony_model.exchange.hello import Hello
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.study import Study
from uharmony_server.admission import Refusal
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.strategy import HarmonyStrategy
from uharmony_simulation.engine import InProcessGrid, name_the_task, site_of

HOSTILE = "harbour"  # between the others, so that leaving it out could shift something
HONEST = ("alster", "north")
SCHEMA = Schema(tensors=(TensorSpec(name="a", shape=(3,)), TensorSpec(name="w", shape=(2, 2))))
BASE = torch.linspace(-1, 1, SCHEMA.numel)
_ADDRESS_SPACE = 64 << 30  # a claim of 4 TiB must fail on every machine, overcommitting or not

Wrong = Callable[[Asked], RecordDict]


@dataclass(frozen=True)
class Outcome:
    """A round's new weights `(n,)` and what was refused in it."""

    weights: torch.Tensor
    refusals: tuple[Refusal, ...]


def study() -> Study:
    """A study without any training of its own."""
    return tiny_study(
        training={"rounds": 9}, evaluation={"validation": 0.0, "test": 0.0, "every": 0}
    )


def delta_of(site: str, round_: int) -> tuple[float, ...]:
    """What an honest site has learned in a round."""
    generator = torch.Generator().manual_seed(round_ * 100 + len(site))
    return tuple((0.1 * torch.randn(SCHEMA.numel, generator=generator)).tolist())


class Sites:
    """Three sites; in round 2 the hostile one answers with `wrong`, or not at all if None."""

    def __init__(self, approved: Study, wrong: Wrong | None) -> None:
        self._study, self._wrong = approved, wrong

    def __call__(self, message: Message, context: Context) -> Message:
        """Flower's ClientApp."""
        site = site_of(context)
        if message.metadata.message_type == "query.hello":
            text = Hello(site=site, study=self._study.digest).model_dump_json()
            return Message(RecordDict({"hello": ConfigRecord({"json": text})}), reply_to=message)
        order = Instruction.from_json(str(message.content.config_records["instruction"]["json"]))
        asked = Asked(order.study, order.round, site, order.base, (), delta_of(site, order.round))
        if site != HOSTILE or order.round != 2:
            return Message(carried(asked.payload()), reply_to=message)
        if self._wrong is None:
            raise RuntimeError("away")
        return Message(self._wrong(asked), reply_to=message)


def our_round(wrong: Wrong | None, *, twice: bool = False) -> Outcome:
    """Two rounds of this project's strategy; in the second one a site is hostile or away."""
    approved = study()
    grid = InProcessGrid(Sites(approved, wrong), (*HONEST, HOSTILE))
    start = Checkpoint(round=0, global_=BASE, schema=SCHEMA, study=approved.digest)
    strategy = HarmonyStrategy(approved, start)
    strategy.greet(grid)
    for round_ in (1, 2):
        asked = strategy.configure_train(round_, strategy.arrays(), ConfigRecord(), grid)
        replies = list(grid.send_and_receive(asked))
        if twice and round_ == 2:
            replies += [r for r in replies if grid.sites[r.metadata.src_node_id] == HOSTILE]
        strategy.aggregate_train(round_, replies)
    return Outcome(strategy.state.global_, strategy.state.refusals)


def flower_round(base: torch.Tensor, answer: Wrong | None, *, twice: bool = False) -> str:
    """What FedAvg makes of the same: in words, measured against the step of the honest two."""
    sent, hostile = [], None
    for site in (*HONEST, HOSTILE):
        asked = Asked("", 2, site, "", tuple(base.tolist()), delta_of(site, 2))
        if site != HOSTILE:
            sent.append(fedavg(asked.arrays()))
        else:
            hostile = asked
    honest = _weights(_aggregate(sent))
    if answer is not None and hostile is not None:
        sent += [answer(hostile)] * (2 if twice else 1)
    try:
        found = _weights(_aggregate(sent))
    except MemoryError:
        return "MemoryError ends the run"
    except Exception as error:
        return f"{type(error).__name__} ends the run"
    if found.dtype.kind == "c":
        return f"counted; global weights become {found.dtype}"
    if not np.isfinite(found).all():
        kind = "NaN" if np.isnan(found).any() else "Inf"
        return f"counted; global weights hold {kind}"
    step = float(np.linalg.norm(honest - base.numpy()))
    moved = float(np.linalg.norm(found - honest)) / step
    more = "; and as float64" if found.dtype == np.float64 else ""
    return f"counted; moves the weights by {_figure(moved)} honest steps{more}"


def _aggregate(sent: Sequence[RecordDict]) -> RecordDict:
    # Flower's messages are made by its runtime; the strategy looks at content and error only.
    name_the_task()
    asked = [Message(RecordDict(), node, "train") for node in range(1, len(sent) + 1)]
    for message in asked:
        message.metadata.__dict__["_message_id"] = f"m{message.metadata.dst_node_id}"
    replies = [Message(r, reply_to=m) for r, m in zip(sent, asked, strict=True)]
    arrays, _ = FedAvg().aggregate_train(2, replies)
    return RecordDict({"arrays": arrays}) if arrays is not None else RecordDict()


def _weights(content: RecordDict) -> np.ndarray:
    arrays = content.array_records["arrays"]
    return np.concatenate([arrays[name].numpy().reshape(-1) for name in ("a", "w")])


def _figure(value: float) -> str:
    if value < 1e-6:
        return "0"
    return f"{value:.1f}" if value < 100 else f"1e{math.log10(value):.0f}"


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Within this block a claim of terabytes fails at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = _ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(_ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def in_words(case: Case, found: Outcome) -> str:
    """What this coordinator did, in a cell of the table."""
    if case.reason is None:
        return f"admitted: {case.note}"
    codes = sorted({refusal.reason.value for refusal in found.refusals})
    return f"refused: {', '.join(codes)}" + (f"; {case.note}" if case.note else "")


def table() -> str:
    """The Markdown table of all cases."""
    lines = ["| # | input | this coordinator | Flower's FedAvg |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder, bounded_memory():
        marker = Path(folder) / "executed"
        after_one = torch.from_numpy(_first_round())
        for case in cases(marker):
            ours = in_words(case, our_round(case.ours, twice=case.twice))
            theirs = flower_round(after_one, case.flower, twice=case.twice)
            lines.append(f"| {case.number} | {case.name} | {ours} | {theirs} |")
        if marker.exists():
            raise RuntimeError("a pickle was executed")
    return "\n".join(lines)


def _first_round() -> np.ndarray:
    """The weights after round 1, in which all are honest and weigh the same."""
    deltas = np.array([delta_of(site, 1) for site in (*HONEST, HOSTILE)], dtype=np.float32)
    return np.asarray(BASE.numpy() + deltas.mean(0), dtype=np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    argparse.ArgumentParser(prog="python -m benchmarks hostile", description=__doc__).parse_args(
        arguments
    )
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
