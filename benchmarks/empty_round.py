"""What a round costs when the sites do nothing: engine, digests, admission and checkpoint.

The peers run the same exchange: Flower's Ray engine with the same ClientApp and strategy, and a
plain loop that adds the same tensors without any exchange at all.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from benchmarks.memory import peak_mib
from benchmarks.network import study as some_study
from benchmarks.rows import Row
from uharmony_model.allocator import keep_freed_pages
from uharmony_model.exchange.hello import Hello
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, decode, encode
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.study import Study
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.rounds import run_rounds
from uharmony_simulation.engine import InProcessGrid, site_of
from uharmony_simulation.ray_engine import run_with_ray

ROUNDS = 4


def settings(rounds: int = ROUNDS) -> Study:
    """A study without evaluation, so that a round is training's exchange alone."""
    study = some_study("uharmony", "unet")
    content = study.model_dump()
    content["training"]["rounds"] = rounds
    content["evaluation"] = {"validation": 0.0, "test": 0.0, "every": 0}
    return Study.model_validate(content)


def schema_of(megabytes: int) -> Schema:
    """A model of this size in forty tensors."""
    numel = megabytes * 250_000 // 40
    return Schema(
        tensors=tuple(TensorSpec(name=f"layer{i:02d}", shape=(numel,)) for i in range(40))
    )


def idle_app(study: Study, schema: Schema, names: dict[int, str]) -> ClientApp:
    """Sites that decode, change every value a little, and encode."""
    app = ClientApp()
    held: dict[str, tuple[bytes, torch.Tensor]] = {}

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        text = Hello(site=site_of(context, names), study=study.digest).model_dump_json()
        return Message(RecordDict({"hello": ConfigRecord({"json": text})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = Instruction.from_json(str(message.content["instruction"]["json"]))
        data = message.content.array_records["payload"]["payload"].data
        if "last" not in held or held["last"][0] is not data:
            held["last"] = (data, decode(data, kind=Kind.MODEL, schema=schema)[1])
        site = site_of(context, names)
        update = encode(
            kind=Kind.UPDATE,
            study=study.digest,
            round=order.round,
            site=site,
            base=order.base,
            codec=study.codec.up,
            schema=schema,
            values={"cases": 10, "loss": 0.0},
            flat=held["last"][1] * 1e-3,
        )
        array = Array("uint8", (len(update),), "uharmony.payload", update)
        return Message(RecordDict({"payload": ArrayRecord({"payload": array})}), reply_to=message)

    return app


def seconds_a_round(megabytes: int, sites: int, engine: str, rounds: int = ROUNDS) -> float:
    """Median seconds between checkpoints; the first round, which warms up, is left out."""
    study, schema = settings(rounds), schema_of(megabytes)
    names = {i: f"site-{i:03d}" for i in range(sites)}
    app = idle_app(study, schema, names)
    initial = torch.randn(schema.numel, generator=torch.Generator().manual_seed(0))
    stamps: list[float] = []

    def main(grid: Grid) -> Checkpoint:
        with tempfile.TemporaryDirectory() as folder:
            return run_rounds(
                study,
                schema,
                initial,
                grid,
                Path(folder),
                on_round=lambda _: stamps.append(time.perf_counter()),
            )

    if engine == "ray":
        run_with_ray(main, app, sites, threads=1, parallel=2)
    else:
        main(InProcessGrid(app, names.values()))
    gaps = sorted(b - a for a, b in itertools.pairwise(stamps))
    return gaps[len(gaps) // 2]


def plain_loop(megabytes: int, sites: int) -> Callable[[], torch.Tensor]:
    """The same arithmetic without exchange: the floor."""
    weights = torch.randn(megabytes * 250_000, generator=torch.Generator().manual_seed(0))

    def work() -> torch.Tensor:
        total = torch.zeros_like(weights)
        for _ in range(sites):
            total.add_(weights * 1e-3, alpha=10.0)
        return weights + total / (10.0 * sites)

    return work


def rows() -> list[Row]:
    """20 MB with 4 sites and 120 MB with 8, beside the peers of the same run."""
    found = []
    for megabytes, sites, limit in ((20, 4, 0.15), (120, 8, 1.5)):
        loop = plain_loop(megabytes, sites)
        loop()
        start = time.perf_counter()
        loop()
        floor = time.perf_counter() - start
        ours = seconds_a_round(megabytes, sites, "inprocess")
        name = f"empty round, {megabytes} MB, {sites} sites"
        found.append(
            Row(name, round(ours, 3), "s", round(ours / floor, 1), f"<= {limit} s", ours <= limit)
        )
        try:
            ray = seconds_a_round(megabytes, sites, "ray")
        except Exception as error:  # a peer that cannot run is reported, not hidden
            found.append(Row(f"{name}: Flower on Ray failed: {error}"[:120], 0.0, "s"))
            continue
        label = f"{name}, v. Flower on Ray"
        found.append(Row(label, round(ours, 3), "s", round(ours / ray, 3), "< 1x", ours < ray))
    return found


def peak_with(megabytes: int, sites: int) -> None:
    """Print the peak MiB and the seconds a round with so many sites (run in a child)."""
    keep_freed_pages()
    seconds = seconds_a_round(megabytes, sites, "inprocess", rounds=3)
    print(f"{peak_mib()} {seconds}")
