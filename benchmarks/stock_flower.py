"""Stock Flower on this machine: the peer of `benchmarks.deployed_round`.

`flower-superlink` with TLS and node authentication and one `flower-supernode` a site, each in its
default mode: a process for every task, application bundles sent by the server.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from uharmony_service.certificate_parts import make_loopback_certificate
from uharmony_service.keys import make_node_key
from uharmony_service.loopback import free_port
from uharmony_service.supervision import QUIET

ROUNDS = 4
_PROJECT = """[project]
name = "stock"
version = "1.0.0"
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"
[tool.flwr.app.config]
"""
_CLIENT = """import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import torch  # what every training client imports

app = ClientApp()


@app.train()
def train(message, context):
    weights = message.content["arrays"].to_numpy_ndarrays()[0]
    noise = np.random.default_rng(context.node_id % 2**32).standard_normal(
        weights.size, dtype=np.float32
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord([weights + 1e-4 * noise]),
            "metrics": MetricRecord({"num-examples": 20}),
        }
    )
    return Message(content, reply_to=message)
"""
_SERVER = """import time

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    def aggregate_train(self, server_round, replies):
        out = super().aggregate_train(server_round, replies)
        with open({stamps!r}, "a") as file:
            file.write(f"{{time.time()}} {{len(list(replies))}}\\n")
        return out


@app.main()
def main(grid, context):
    weights = np.random.default_rng(0).standard_normal({numel}, dtype=np.float32)
    strategy = Timed(
        fraction_evaluate=0.0, min_train_nodes={sites}, min_available_nodes={sites}
    )
    strategy.start(grid=grid, initial_arrays=ArrayRecord([weights]), num_rounds={rounds})
"""


def seconds_a_round(megabytes: int, sites: int, folder: Path) -> float:
    """Median seconds between aggregations; the first round, which warms up, is left out."""
    stamps = folder / "stamps"
    server = _SERVER.format(
        stamps=str(stamps), numel=megabytes * 250_000, sites=sites, rounds=ROUNDS
    )
    bundle, _ = build_fab_from_files(
        {
            "pyproject.toml": _PROJECT.encode(),
            "stock/__init__.py": b"",
            "stock/client.py": _CLIENT.encode(),
            "stock/server.py": server.encode(),
        }
    )
    with processes(folder, sites) as (address, certificate):
        with control(address, certificate) as client:
            client.StartRun(StartRunRequest(fab=Fab(hash_str="", content=bundle)))
        end = time.monotonic() + 600
        while time.monotonic() < end and len(_times(stamps)) < ROUNDS:
            time.sleep(0.2)
    times = _times(stamps)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    if len(gaps) < ROUNDS - 1:
        raise RuntimeError(f"stock Flower made {len(times)} rounds of {ROUNDS} in 10 minutes")
    return statistics.median(gaps)


@contextlib.contextmanager
def processes(folder: Path, sites: int) -> Iterator[tuple[str, bytes]]:
    """SuperLink and SuperNodes with TLS and registered keys, as Flower's guide says."""
    pem, key, port = folder / "tls.pem", folder / "tls.key", free_port()
    make_loopback_certificate(key, pem)
    address, started = f"127.0.0.1:{port}", []
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        **QUIET,
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(folder / "home"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",  # it starts others by their names
    }
    log = (folder / "log").open("wb")

    def start(program: str, *arguments: str) -> None:
        started.append(
            subprocess.Popen(
                [str(programs / program), *arguments],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )
        )  # fmt: skip

    try:
        start(
            "flower-superlink", "--host", "127.0.0.1", "--port", str(port),
            "--ssl-ca-certfile", str(pem), "--ssl-certfile", str(pem), "--ssl-keyfile", str(key),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        with control(address, pem.read_bytes()) as client:
            for number in range(sites):
                own = make_node_key(folder / f"node-{number}.key")
                public = own.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                )
                _patiently(client, RegisterNodeRequest(public_key=public))
                start(
                    "flower-supernode", "--superlink", address, "--root-certificates", str(pem),
                    "--auth-supernode-private-key", str(folder / f"node-{number}.key"),
                    "--host", "127.0.0.1", "--port", str(free_port()),
                )  # fmt: skip
        yield address, pem.read_bytes()
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        log.close()


def control(address: str, certificate: bytes) -> ControlHttpClient:
    """Flower's control client."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr-cli")
    return ControlHttpClient.from_server_address(address, False, certificate, [version])


def _patiently(client: ControlHttpClient, request: RegisterNodeRequest) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            client.RegisterNode(request)
        except Exception:  # SuperLink is starting
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
        else:
            return


def _times(stamps: Path) -> list[float]:
    return (
        [float(line.split()[0]) for line in stamps.read_text().splitlines()]
        if (stamps.is_file())
        else []
    )
