from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from uharmony_model.errors import ConfigError
from uharmony_service.health import Health
from uharmony_service.loopback import free_port


def probe(port: int) -> int:
    """What an orchestrator's probe sees."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found: int = stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status
        return found


def test_a_probe_is_answered_while_the_service_runs_and_not_after():
    port = free_port()
    with Health(port) as health:
        assert probe(port) == health_pb2.HealthCheckResponse.SERVING
        health.say(running=False)
        assert probe(port) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(ConfigError, match=f"{port}.*in use"):
            Health(port)
    with pytest.raises(grpc.RpcError):
        probe(port)


def test_without_a_port_nothing_is_opened():
    with Health(None) as found:
        assert found._server is None
