"""Ask the health service of this container (grpc.health.v1, on loopback): `probe.py PORT`."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SECONDS = 5.0


def main(port: str) -> int:
    """0 where the service says that it serves, 1 where it does not or there is none."""
    serving = health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            print(f"no answer at port {port}: {error.code().name}")
            return 1
    return 0 if answer.status == serving else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
