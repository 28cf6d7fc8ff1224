"""The gRPC health service that container orchestrators probe (grpc.health.v1), on loopback."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import (
    health,
    health_pb2,
    health_pb2_grpc,
)


class Health:
    """Answers SERVING on 127.0.0.1:port while the block is open; port None serves nothing."""

    def __init__(self, port: int | None) -> None:
        self._port, self._server = port, None if port is None else _server(port)

    def __enter__(self) -> Self:
        if self._server is not None:
            self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.stop(grace=1).wait()


def _server(port: int) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    return server
