"""A deployed round without local work: three sites and a coordinator share this machine.

Ours is the complete configuration: TLS, client certificates, gateway, node authentication, ledger
and checkpoint. Beside it, in the same run, stock Flower: SuperLink and three SuperNodes with TLS
and node authentication, its own processes, FedAvg's exchange of the same array. Stock has no
gateway and no client certificates, so it does less; the ratio is to our disadvantage.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from benchmarks import bare, stock_flower
from benchmarks.network import study as some_study
from benchmarks.rows import Row
from uharmony_model.atomic import write_atomic
from uharmony_model.exchange.payload import Kind, encode
from uharmony_model.initial import initial_weights
from uharmony_model.study import Study
from uharmony_simulation.deployed import SERVER, Deployment

SITES = ("alpha", "beta", "gamma")
ROUNDS = 6
FEATURES = {20: (33, 66, 132, 264), 120: (81, 162, 324, 648)}
LIMITS = {20: (0.35, 2.0), 120: (0.6, 6.0)}


def study_of(megabytes: int, codec: str, rounds: int = ROUNDS) -> Study:
    """A study whose shared weights have this size, without evaluation."""
    content = some_study("uharmony", "unet").model_dump()
    content["network"]["features"] = FEATURES[megabytes]
    content["training"] |= {"rounds": rounds, "patch": (32, 32, 32)}
    content["evaluation"] |= {"validation": 0.0, "test": 0.0, "every": 0}
    content["federation"] |= {"min_sites": len(SITES)}
    content["codec"] = {"up": codec, "down": "fp32"}
    return Study.model_validate(content)


def ours(megabytes: int, codec: str, folder: Path) -> tuple[float, int, int]:
    """Median seconds between checkpoints, and bytes up and down of a site in a round."""
    study = study_of(megabytes, codec)
    with deployment(study, folder) as running:
        stamps: list[float] = []
        end = time.monotonic() + 600
        while len(stamps) < ROUNDS and time.monotonic() < end:
            if running.round() > len(stamps):
                stamps.append(time.perf_counter())
            time.sleep(0.02)
        running.finish(60)
        state = json.loads(
            (running.server / "rounds" / f"round-{ROUNDS:06d}" / "state.json").read_bytes()
        )["state"]
    gaps = [b - a for a, b in itertools.pairwise(stamps)]
    return statistics.median(gaps), state["bytes_up"][-1] // len(SITES), bytes_down(study)


def bytes_down(study: Study) -> int:
    """The payload that carries the weights to a site."""
    schema, weights = initial_weights(study)
    payload = encode(
        kind=Kind.MODEL, study=study.digest, round=1, site="server", schema=schema, flat=weights
    )
    return len(payload)


@contextmanager
def deployment(study: Study, folder: Path) -> Iterator[Deployment]:
    """The real coordinator, and real sites except for the training."""
    running = Deployment(folder / "run", study, {s: empty_site(folder / s, s) for s in SITES})
    try:
        running.init()
        running.call(SERVER, "pause", "--dir", str(running.server))
        running.start_server()
        running.await_gateway()
        for site in SITES:
            running.join(site)
        running.call(SERVER, "resume", "--dir", str(running.server))
        for site in SITES:
            log = (folder / f"{site}.log").open("wb")
            running.processes[site] = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.idle_service", str(running.site_yaml(site))],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        yield running
    finally:
        running.stop()


def empty_site(folder: Path, name: str) -> Path:
    """A site.yaml with a case table that is never read."""
    folder.mkdir(parents=True)
    with (folder / "cases.csv").open("w", newline="") as table:
        csv.writer(table).writerow(["case", "image"])
    content = {"name": name, "cases": "cases.csv", "store": "store", "policy": {"min_cases": 1}}
    write_atomic(folder / "site.yaml", yaml.safe_dump(content).encode())
    return folder / "site.yaml"


def rows() -> list[Row]:
    """20 and 120 MB: ours with fp32 and bf16, stock in the same run, and the bytes."""
    found: list[Row] = []
    for megabytes, (ratio_limit, seconds_limit) in LIMITS.items():
        with ExitStack() as stack:
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(4)]
            stock = stock_flower.seconds_a_round(megabytes, len(SITES), folders[0])
            seconds, up, down = ours(megabytes, "fp32", folders[1])
            half, half_up, _ = ours(megabytes, "bf16", folders[2])
            plain = bare.seconds_a_round(study_of(megabytes, "fp32"), SITES, folders[3])
        name = f"deployed round, {megabytes} MB, {len(SITES)} sites"
        ratio = seconds / stock
        found += [
            Row(f"{name}, stock Flower", round(stock, 2), "s"),
            Row(
                f"{name}, complete v. stock",
                round(seconds, 2),
                "s",
                round(ratio, 3),
                f"<= {ratio_limit}x",
                ratio <= ratio_limit,
            ),
            Row(name, round(seconds, 2), "s", None, f"<= {seconds_limit} s",
                seconds <= seconds_limit),
            Row(f"{name}, bare v. stock", round(plain, 2), "s", round(plain / stock, 3)),
            Row(f"{name}, bf16 up", round(half, 2), "s", round(half / stock, 3)),
            Row(f"{name}, bytes up, fp32", up, "B a site", round(up / down, 3)),
            Row(f"{name}, bytes up, bf16", half_up, "B a site", round(half_up / down, 3)),
            Row(f"{name}, bytes down", down, "B a site", 1.0),
        ]  # fmt: skip
    return found
