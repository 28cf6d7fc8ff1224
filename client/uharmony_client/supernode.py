"""A thin launcher around Flower's SuperNode: what a hospital's network needs of it.

It adds a client certificate, a clock that follows the coordinator's, take-over after a kill, and
shorter waits. The parts of Flower that it replaces are names inside `flwr.supernode`; they are
replaced in this one file, for exactly one version.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import flwr.supercore.heartbeat as heartbeat
import flwr.supercore.retry.http_retry as http_retry
import flwr.supernode.fleet_http_connection as connection
import flwr.supernode.main as runtime_api
import flwr.supernode.node_auth_http_interceptor as node_auth
import flwr.supernode.start_client_internal as main_loop
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import Status, SubStatus
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.date import now as local_now
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeState

from uharmony_client.joining import clock_offset
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, ExchangeError
from uharmony_service.loopback import guarded, read_secret, serve_on
from uharmony_service.runtime import FLOWER, OBJECT_POLL_SECONDS, require_flower
from uharmony_service.supervision import end_with_parent

HEARTBEAT_SECONDS = 10
LONGEST_RETRY_SECONDS = 5
TAKEOVER_GAP_SECONDS = 1.0  # long enough for the coordinator to see that the old node is gone
_CLOCK_TOLERANCE_SECONDS = 2.0
_PULLING: dict[str, Any] = {
    "initial_backoff": OBJECT_POLL_SECONDS,
    "backoff_cap": 1.0,
    "max_tries_per_object": None,
    "max_time": 600,
}
_SHORT, _LONG, _BUSY_SECONDS = 0.05, 1.0, 30.0


class Waits:
    """Stands in for the `time` module of Flower's main loop: short waits while there is work."""

    def __init__(self) -> None:
        self._last_work = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        """3 s is Flower's wait for a message, 0.5 s its wait for an answer of the executor."""
        if seconds < 1:
            self._last_work = time.monotonic()
            time.sleep(_SHORT / 2)
            return
        idle = time.monotonic() - self._last_work > _BUSY_SECONDS
        time.sleep(_LONG if idle else _SHORT)


class Certificates:
    """The TLS side of the one outbound connection; a renewed certificate is taken up by itself."""

    def __init__(self, ca: Path, certificate: Path, key: Path) -> None:
        self._certificate, self._key, self._seen = certificate, key, 0
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.load_verify_locations(cafile=str(ca))
        self.refresh()

    def refresh(self) -> None:
        """Read the certificate again if its file is another one."""
        changed = self._certificate.stat().st_mtime_ns
        if changed != self._seen:
            self.context.load_cert_chain(self._certificate, self._key)
            self._seen = changed


def _client_class(certificates: Certificates) -> type[FleetHttpClient]:
    class CertifiedClient(FleetHttpClient):
        """Flower's Fleet client with our TLS context and without proxies from the environment."""

        @classmethod
        def from_server_address(  # type: ignore[no-untyped-def]
            cls, server_address, insecure, root_certificates, interceptors, *, retry_invoker=None
        ):
            client = cls(
                f"https://{server_address}",
                interceptors=interceptors,
                verify=certificates.context,
                retry_invoker=retry_invoker,
            )
            client._client.follow_redirects = False
            return client

        def SendNodeHeartbeat(self, request: Any) -> Any:  # noqa: N802 - Flower's name
            with suppress(OSError, ssl.SSLError):
                certificates.refresh()
            return super().SendNodeHeartbeat(request)

    return CertifiedClient


def _remembering(request_response: Callable[..., Any], record: Path) -> Callable[..., Any]:
    """Note the node's number once it is active: what a take-over after a kill needs."""

    @contextmanager
    def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with request_response(*args, **kwargs) as found:
            write_atomic(record, str(found[0]).encode())
            yield found
        record.unlink(missing_ok=True)

    return wrapped


def _tidy(pull: Callable[..., Any]) -> Callable[..., Any]:
    """Drop what a message left behind whose run ended while it was received.

    Flower leaves its task open; the executor would wait for its weights for minutes.
    """

    def wrapped(*, state: NodeState, **kwargs: Any) -> Any:
        run = pull(state=state, **kwargs)
        if run is None:  # nothing is under way: one message is handled at a time
            open_tasks = state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING])
            for task in open_tasks:
                state.finish_task(task.task_id, sub_status=SubStatus.FAILED, details="run ended")
            if open_tasks:
                state.delete_messages()
        return run

    return wrapped


def _take_over(
    client_class: type[FleetHttpClient], address: str, key: ec.EllipticCurvePrivateKey, record: Path
) -> None:
    """Sign the killed predecessor off, or its key stays locked until its heartbeat runs out."""
    if not record.is_file():
        return
    interceptors: list[Any] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        node_auth.NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    client = client_class.from_server_address(address, False, None, interceptors)
    with client, suppress(httpx.HTTPError, ValueError):
        client.DeactivateNode(DeactivateNodeRequest(node_id=int(record.read_text())))
        time.sleep(TAKEOVER_GAP_SECONDS)


def _clock_offset(identity: Path, address: str) -> float:
    """Seconds to add to this machine's clock: Flower refuses signatures of another time."""
    try:
        offset = clock_offset(address, (identity / "ca.pem").read_text())
    except ExchangeError as error:
        print(f"the coordinator cannot be reached now ({error}); trying on", flush=True)
        return 0.0
    if abs(offset) < _CLOCK_TOLERANCE_SECONDS:
        return 0.0
    print(f"this clock is {-offset:+.0f} s off the coordinator's; set it (NTP)", flush=True)
    return offset


def adapt(
    secret: str,
    record: Path,
    *,
    client_class: type[FleetHttpClient] = FleetHttpClient,
    now: Callable[[], datetime] = local_now,
) -> None:
    """Put our parts into the places of Flower's, in this process.

    Raises:
        ConfigError: this Flower does not have such a place.
    """
    create_app = runtime_api.create_app
    request_response = _remembering(connection.http_request_response, record)
    for module, name, replacement in (
        (node_auth, "now", now),
        (connection, "FleetHttpClient", client_class),
        (connection, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_SECONDS),
        (heartbeat, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_SECONDS),
        (http_retry, "MAX_RETRY_DELAY", LONGEST_RETRY_SECONDS),
        (main_loop, "time", Waits()),
        (main_loop, "pull_objects", partial(pull_objects, **_PULLING)),
        (main_loop, "_pull_and_store_message", _tidy(main_loop._pull_and_store_message)),
        (main_loop, "http_request_response", request_response),
        (runtime_api, "create_app", lambda **k: guarded(create_app(**k), secret)),
    ):
        if not hasattr(module, name):
            raise ConfigError(f"flwr {FLOWER} has no {module.__name__}.{name}; install it anew")
        setattr(module, name, replacement)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m uharmony_client.supernode`: started by the service, not by hand."""
    end_with_parent()
    require_flower()
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--socket", type=int, required=True, help="a listening loopback socket")
    given = parser.parse_args(arguments)

    identity: Path = given.identity
    secret = read_secret(given.run / "secret")
    certificates = Certificates(identity / "ca.pem", identity / "tls.pem", identity / "tls.key")
    client_class = _client_class(certificates)
    offset = timedelta(seconds=_clock_offset(identity, given.coordinator))

    def coordinator_now() -> datetime:
        return local_now() + offset

    adapt(secret, given.run / "node", client_class=client_class, now=coordinator_now)
    listener = socket.socket(fileno=given.socket)
    serve_on(listener)
    key = load_ssh_private_key((identity / "node.key").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        sys.exit("node.key is no key of an elliptic curve; join again")
    _take_over(client_class, given.coordinator, key, given.run / "node")
    os.environ.setdefault("FLWR_HOME", str(given.run / "flower"))
    sys.argv = [
        "flower-supernode", "--isolation", "process",
        "--superlink", given.coordinator,
        "--root-certificates", str(identity / "ca.pem"),
        "--auth-supernode-private-key", str(identity / "node.key"),
        "--host", "127.0.0.1", "--port", str(listener.getsockname()[1]),
    ]  # fmt: skip
    code: object = 1
    try:
        flower_supernode()
    except SystemExit as end:
        code = end.code
    finally:
        # Flower asks itself to stop by a signal, from more than one thread. A second one in the
        # midst of the first leaves its web server running without the rest: end in any case.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
