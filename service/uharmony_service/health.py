"""The gRPC health service that container orchestrators probe (grpc.health.v1), on loopback."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from uharmony_model.errors import ConfigError

_STATUS = health_pb2.HealthCheckResponse


class Health:
    """Answers on 127.0.0.1:port while the block is open; port None serves nothing."""

    def __init__(self, port: int | None) -> None:
        """Open the port.

        Raises:
            ConfigError: another process has it.
        """
        self._servicer = health.HealthServicer()
        self._server: grpc.Server | None = None
        if port is None:
            return
        # Else two services on one port would share the probes between them.
        options = (("grpc.so_reuseport", 0),)
        self._server = grpc.server(ThreadPoolExecutor(2), options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self._server.add_insecure_port(f"127.0.0.1:{port}")
        except RuntimeError:
            raise ConfigError(
                f"--health-port {port}: is in use on this machine; choose another"
            ) from None
        self.say(running=True)

    def say(self, *, running: bool) -> None:
        """Whether all of the service's processes run now."""
        self._servicer.set("", _STATUS.SERVING if running else _STATUS.NOT_SERVING)

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
