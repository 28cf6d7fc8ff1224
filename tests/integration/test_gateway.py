"""The public port: who gets through to SuperLink, with what, and who does not."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from tests.support.gateway import PULL, PUSH_OBJECT, FakeSuperLink, Town, read_all, town
from uharmony_client.identity import Identity
from uharmony_client.joining import (
    clock_offset,
    enrol,
    fetch_ca,
    fetch_study,
    leave,
    renew,
    server_time,
)
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.joining import JoinCode
from uharmony_server.certificates import make_authority, server_certificate, site_certificate
from uharmony_service.keys import load_node_key, load_tls_key, make_tls_key


@dataclass
class Scene:
    """A coordinator, its SuperLink and two hospitals."""

    town: Town
    superlink: FakeSuperLink
    north: Identity
    valley: Identity


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    path = tmp_path_factory.mktemp("town")
    with town(path, max_body_bytes=1 << 20) as here:
        superlink = FakeSuperLink(here.folder, here.upstream_port)
        north = here.join("north", path / "north")
        yield Scene(here, superlink, north, here.join("valley", path / "valley"))
        superlink.close()


def node_key(identity: Identity) -> str:
    """As Flower itself writes the header."""
    key = load_node_key(identity.node_key).public_key()
    return base64.b64encode(public_key_to_bytes(key)).decode()


def node_headers(identity: Identity) -> dict[str, str]:
    return {"flwr-public-key": node_key(identity), "content-type": "application/protobuf"}


def test_site_gets_through_with_exactly_its_bytes(scene: Scene):
    body = os.urandom(700_001)
    answer = scene.town.call(
        scene.north.context(),
        PUSH_OBJECT,
        body,
        {
            **node_headers(scene.north),
            "flwr-timestamp": "now",
            "user-agent": "secret",
            "x-forwarded-for": "1.2.3.4",
            "cookie": "a=b",
            "x-uharmony-secret": "guess",
        },
    )
    assert answer.status == 200
    assert answer.body == body
    assert answer.headers["flwr-answer"] == "yes"
    assert "x-internal" not in answer.headers
    seen = scene.superlink.seen[-1]
    assert (seen.method, seen.path, seen.body) == ("POST", PUSH_OBJECT, body)
    assert {name.lower() for name, _ in seen.headers} == {
        "host", "content-length", "content-type", "flwr-public-key", "flwr-timestamp",
        "accept-encoding", "x-uharmony-secret",
    }  # fmt: skip
    secret = scene.town.folder.loopback_secret.read_text()
    assert [value for name, value in seen.headers if name == "x-uharmony-secret"] == [secret]


def test_connections_are_kept_on_both_sides(scene: Scene):
    before = len(scene.superlink.callers)
    connection = http.client.HTTPSConnection(
        "127.0.0.1", scene.town.port, context=scene.north.context(), timeout=5
    )
    with contextlib.closing(connection):
        connection.connect()
        own = connection.sock.getsockname()
        for number in range(10):
            connection.request("POST", PULL, str(number).encode(), node_headers(scene.north))
            assert connection.getresponse().read() == str(number).encode()
            assert connection.sock.getsockname() == own
    assert len(scene.superlink.callers) <= before + 1


def refused(scene: Scene, status: int, reason: str, context: ssl.SSLContext, **call) -> None:
    before, count = len(scene.superlink.seen), scene.town.gateway.shared.refusals[reason]
    answer = scene.town.call(context, **call)
    assert answer.status == status, answer.body
    assert f'"{reason}"'.encode() in answer.body
    assert scene.town.gateway.shared.refusals[reason] == count + 1
    assert len(scene.superlink.seen) == before


def test_stranger_is_refused(scene: Scene):
    refused(
        scene, 401, "no-certificate", scene.town.anonymous(),
        path=PULL, body=b"x", headers=node_headers(scene.north),
    )  # fmt: skip


@pytest.mark.parametrize(("whose", "key"), [("north", "valley"), ("valley", "north")])
def test_certificate_and_node_key_of_different_sites(scene: Scene, whose: str, key: str):
    context = getattr(scene, whose).context()
    headers = node_headers(getattr(scene, key))
    refused(scene, 401, "wrong-node-key", context, path=PULL, body=b"x", headers=headers)


def test_node_key_missing_or_twice(scene: Scene):
    refused(scene, 401, "no-node-key", scene.north.context(), path=PULL, body=b"x")
    key = node_key(scene.north).encode()
    request = b"POST %s HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n" % PULL.encode()
    twice = request + (b"flwr-public-key: %s\r\n" % key) * 2 + b"\r\n"
    before = len(scene.superlink.seen)
    assert b"HTTP/1.1 400" in scene.town.raw(scene.north.context(), twice)
    assert len(scene.superlink.seen) == before


def issue(scene: Scene, tmp_path: Path, **how) -> ssl.SSLContext:
    """A context with north's own name but a certificate made otherwise."""
    folder = scene.town.folder
    key = how.get("key") or scene.north.tls_key
    if how.get("expired"):
        signer = load_tls_key(folder.ca_key)
        now = datetime.datetime.now(datetime.UTC)
        authority = x509.load_pem_x509_certificate(folder.ca_certificate.read_bytes())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")]))
            .issuer_name(authority.subject)
            .public_key(load_tls_key(key).public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now - datetime.timedelta(minutes=1))
            .sign(signer, hashes.SHA256())
        )
    else:
        ca_key, ca = how.get("ca", (folder.ca_key, folder.ca_certificate))
        public = load_tls_key(key).public_key()
        certificate = site_certificate(ca_key, ca, public, how.get("site", "north"), 1)
    (tmp_path / "c.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    context = scene.town.anonymous()
    context.load_cert_chain(tmp_path / "c.pem", key)
    return context


@pytest.mark.parametrize("case", ["wrong authority", "expired", "server certificate"])
def test_certificates_the_handshake_refuses(scene: Scene, tmp_path: Path, case: str):
    if case == "wrong authority":
        foreign = (tmp_path / "ca.key", tmp_path / "ca.pem")
        # Same name as the real one: only the signature differs.
        make_authority(*foreign, scene.town.folder.study.name)
        context = issue(scene, tmp_path, ca=foreign)
    elif case == "expired":
        context = issue(scene, tmp_path, expired=True)
    else:
        context = scene.town.anonymous()
        context.load_cert_chain(scene.town.folder.tls_certificate, scene.town.folder.tls_key)
    before = len(scene.superlink.seen)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        scene.town.call(context, PULL, b"x", node_headers(scene.north))
    assert len(scene.superlink.seen) == before


def test_other_key_under_an_enrolled_name(scene: Scene, tmp_path: Path):
    make_tls_key(tmp_path / "other.key")
    context = issue(scene, tmp_path, key=tmp_path / "other.key")
    refused(
        scene, 401, "not-enrolled", context,
        path=PULL, body=b"x", headers=node_headers(scene.north),
    )  # fmt: skip


def test_enrolled_key_under_another_name(scene: Scene, tmp_path: Path):
    context = issue(scene, tmp_path, site="valley")
    headers = node_headers(scene.valley)
    refused(scene, 401, "not-enrolled", context, path=PULL, body=b"x", headers=headers)


TARGETS = [
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/./pull-messages",
    "/v1/fleet//pull-messages",
    "//v1/fleet/pull-messages",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages#x",
    "/v1/fleet/pull%2dmessages",
    "/v1/fleet/Pull-Messages",
    "/v1/fleet\\pull-messages",
    "https://127.0.0.1/v1/fleet/pull-messages",
    "http://127.0.0.1:1/v1/control/start-run",
    "v1/fleet/pull-messages",
    "*",
    "/",
    "/v1/uharmony/../fleet/pull-messages",
    "/v1/uharmony/ca?x",
]


@pytest.mark.parametrize("target", TARGETS)
def test_any_other_path_is_refused_even_for_a_site(scene: Scene, target: str):
    before = len(scene.superlink.seen)
    key = node_key(scene.north)
    request = (
        f"POST {target} HTTP/1.1\r\nhost: a\r\nconnection: close\r\nflwr-public-key: {key}\r\n"
        "content-length: 1\r\n\r\nx"
    )
    answer = scene.town.raw(scene.north.context(), request.encode())
    assert answer.startswith(b"HTTP/1.1 404"), answer
    assert len(scene.superlink.seen) == before


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "post"])
def test_other_methods_are_refused(scene: Scene, method: str):
    before = len(scene.superlink.seen)
    key = node_key(scene.north)
    request = (
        f"{method} {PULL} HTTP/1.1\r\nhost: a\r\nconnection: close\r\nflwr-public-key: {key}\r\n"
        "content-length: 0\r\n\r\n"
    )
    answer = scene.town.raw(scene.north.context(), request.encode())
    assert answer.startswith(b"HTTP/1.1 405"), answer
    assert len(scene.superlink.seen) == before


@pytest.mark.parametrize(
    "framing",
    [
        "transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 1\r\n\r\nx",
        "content-length: 1\r\ncontent-length: 2\r\n\r\nxx",
        "content-length: -1\r\n\r\n",
        "content-length: +1\r\n\r\nx",
        "content-length: 1\r\n folded: x\r\n\r\nx",
        "content-length : 1\r\n\r\nx",
        "x: \x00\r\ncontent-length: 0\r\n\r\n",
    ],
)
def test_ambiguous_framing_never_reaches_superlink(scene: Scene, framing: str):
    before = len(scene.superlink.seen)
    request = f"POST {PULL} HTTP/1.1\r\nhost: a\r\nflwr-public-key: {node_key(scene.north)}\r\n"
    answer = scene.town.raw(scene.north.context(), (request + framing).encode())
    assert answer[:10] == b"HTTP/1.1 4", answer
    assert len(scene.superlink.seen) == before


def test_smuggled_second_request_is_judged_like_any_other(scene: Scene):
    before = len(scene.superlink.seen)
    head = f"host: a\r\nflwr-public-key: {node_key(scene.north)}\r\n"
    two = (
        f"POST {PULL} HTTP/1.1\r\n{head}content-length: 1\r\n\r\nx"
        f"POST /v1/control/start-run HTTP/1.1\r\n{head}content-length: 1\r\n\r\nx"
    )
    answer = scene.town.raw(scene.north.context(), two.encode(), answers=2)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"HTTP/1.1 404") == 1
    assert [seen.path for seen in scene.superlink.seen[before:]] == [PULL]


def pushed(node: int, *senders: int) -> bytes:
    messages = [Message(metadata=Metadata(src_node_id=sender)) for sender in senders]
    request = PushMessagesRequest(node=Node(node_id=node), messages_list=messages)
    return bytes(request.SerializeToString())


def test_messages_must_come_from_the_node_that_pushes(scene: Scene):
    path, context = "/v1/fleet/push-messages", scene.north.context()
    headers = node_headers(scene.north)
    assert scene.town.call(context, path, pushed(5, 5, 5), headers).status == 200
    for body, status, reason in (
        (pushed(5, 5, 6), 403, "wrong-sender"),
        (pushed(5, 0), 403, "wrong-sender"),
        (b"\xff\xff", 400, "not-protobuf"),
    ):
        refused(scene, status, reason, context, path=path, body=body, headers=headers)


def test_body_bounds_before_and_after_authentication(scene: Scene):
    context, headers = scene.north.context(), node_headers(scene.north)
    exact = b"\1" * (1 << 20)
    assert scene.town.call(context, PUSH_OBJECT, exact, headers).body == exact
    refused(
        scene, 413, "body-too-large", context,
        path=PUSH_OBJECT, body=exact + b"\1", headers=headers,
    )  # fmt: skip
    refused(
        scene, 413, "body-too-large", scene.town.anonymous(),
        path="/v1/uharmony/enrol", body=b"\1" * ((64 << 10) + 1),
    )  # fmt: skip


def test_huge_declared_body_is_refused_unread(scene: Scene):
    request = (
        f"POST {PUSH_OBJECT} HTTP/1.1\r\nhost: a\r\nflwr-public-key: {node_key(scene.north)}\r\n"
        f"content-length: {10**18}\r\n\r\n"
    )
    with scene.town.connect(scene.north.context()) as connection:
        connection.sendall(request.encode())
        connection.settimeout(3)
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_flood_of_headers(scene: Scene):
    head = f"POST {PULL} HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n"
    many = head + "".join(f"x-{i}: y\r\n" for i in range(120)) + "\r\n"
    assert b"HTTP/1.1 431" in scene.town.raw(scene.north.context(), many.encode())
    long = head + "x: " + "y" * 100_000 + "\r\n\r\n"
    assert b"HTTP/1.1 431" in scene.town.raw(scene.north.context(), long.encode())


def test_plain_http_and_old_tls(scene: Scene):
    with socket.create_connection(("127.0.0.1", scene.town.port), timeout=5) as plain:
        plain.sendall(b"GET /v1/uharmony/ca HTTP/1.1\r\nhost: a\r\n\r\n")
        assert b"HTTP" not in read_all(plain)
    old = scene.north.context()
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        scene.town.connect(old)
    # Python 3.13 checks certificates by the letter of RFC 5280 in its default context.
    strict = scene.north.context()
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    with scene.town.connect(strict) as fine:
        assert fine.version() == "TLSv1.3"


def test_what_is_public(scene: Scene):
    anonymous = scene.town.anonymous()
    ca = scene.town.call(anonymous, "/v1/uharmony/ca", None, method="GET")
    assert ca.body == scene.town.folder.ca_certificate.read_bytes()
    pem = scene.town.folder.ca_certificate.read_text()
    assert abs(server_time(scene.town.folder.config.address, pem) - time.time()) < 5
    assert abs(clock_offset(scene.town.folder.config.address, pem)) < 1
    study = scene.town.call(anonymous, "/v1/uharmony/study", None, method="GET")
    assert study.status == 401
    mine = scene.town.call(scene.north.context(), "/v1/uharmony/study", None, method="GET")
    assert mine.body == scene.town.folder.study.canonical_json().encode()
    for path in ("renew", "leave"):
        assert scene.town.call(anonymous, f"/v1/uharmony/{path}", b"{}").status == 401


def newcomer(path: Path) -> Identity:
    identity = Identity(path / "identity")
    identity.make_keys()
    return identity


def try_to_join(scene: Scene, code: JoinCode, identity: Identity, site: str, **change) -> object:
    request = identity.request(site, code, scene.town.folder.study.digest)
    return enrol(code, fetch_ca(code), request.model_copy(update=change))


def test_join_codes_that_do_not_open(scene: Scene, tmp_path: Path):
    here, guest = scene.town, newcomer(tmp_path)
    code = here.code("harbour")
    wrong = code.model_copy(update={"token": "A" * 43})
    with pytest.raises(ExchangeError, match="unknown here"):
        try_to_join(scene, wrong, guest, "harbour")
    with pytest.raises(ExchangeError, match="unknown or has expired"):
        fetch_study(wrong, fetch_ca(code))
    with pytest.raises(ExchangeError, match="another authority than the join code"):
        fetch_ca(code.model_copy(update={"ca_sha256": "0" * 64}))
    with pytest.raises(ExchangeError, match="is for site harbour"):
        try_to_join(scene, code, guest, "north")
    with pytest.raises(ExchangeError, match=r"approved study 0{12}.*this is [0-9a-f]{12}"):
        try_to_join(scene, code, guest, "harbour", study="0" * 64)
    with pytest.raises(ExchangeError, match="node key belongs to another site"):
        try_to_join(scene, code, guest, "harbour", node_key=node_key(scene.north))
    with pytest.raises(ExchangeError, match="not a P-256"):
        try_to_join(scene, code, guest, "harbour", node_key="A" * 60)
    csr = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(ExchangeError, match="malformed"):
        try_to_join(scene, code, guest, "harbour", csr=csr)
    expired = here.code("harbour", hours=-1)
    lying = expired.model_copy(update={"expires": int(time.time()) + 100})
    with pytest.raises(ExchangeError, match="has expired"):
        try_to_join(scene, lying, guest, "harbour")
    with pytest.raises(ExchangeError, match="was replaced"):
        try_to_join(scene, code, guest, "harbour")
    assert "harbour" not in here.registry.enrolments()


def test_code_is_used_once_but_its_answer_may_be_lost(scene: Scene, tmp_path: Path):
    code, guest = scene.town.code("lake"), newcomer(tmp_path / "a")
    try_to_join(scene, code, guest, "lake")
    try_to_join(scene, code, guest, "lake")
    with pytest.raises(ExchangeError, match="has been used"):
        try_to_join(scene, code, newcomer(tmp_path / "b"), "lake")
    # What waits in the folder is gone, whatever was answered.
    assert not list(scene.town.folder.requests.iterdir())
    assert not list(scene.town.folder.answers.iterdir())


def test_renewal_keeps_the_key_and_lives_longer(scene: Scene, tmp_path: Path):
    here = scene.town
    identity = here.join("hill", tmp_path)
    key, before = identity.tls_key.read_bytes(), identity.certificate.read_bytes()
    ends = renew(identity, here.folder.config.address)
    assert identity.certificate.read_bytes() != before
    assert identity.tls_key.read_bytes() == key
    hours = here.folder.config.certificate_hours
    assert abs(ends - time.time() - hours * 3600) < 60
    assert here.registry.enrolments()["hill"].expires == int(ends)
    assert here.call(identity.context(), PULL, b"x", node_headers(identity)).status == 200


def wait_until(condition, seconds: float = 5) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.alone
def test_revoked_while_connected(scene: Scene, tmp_path: Path):
    here = scene.town
    identity = here.join("cape", tmp_path)
    with here.connect(identity.context()) as connection:
        head = f"POST {PULL} HTTP/1.1\r\nhost: a\r\nflwr-public-key: {node_key(identity)}\r\n"
        connection.sendall((head + "content-length: 1\r\n\r\nx").encode())
        assert connection.recv(5000).startswith(b"HTTP/1.1 200")
        here.registry.revoke("cape")
        started = time.monotonic()
        read_all(connection)
        assert time.monotonic() - started < 3
    answer = here.call(identity.context(), PULL, b"x", node_headers(identity))
    assert answer.status == 401
    assert b'"revoked"' in answer.body
    assert here.call(scene.north.context(), PULL, b"x", node_headers(scene.north)).status == 200
    with pytest.raises(ExchangeError, match="was revoked"):
        try_to_join(scene, here.code("cape"), identity, "cape")


def test_leave_shuts_the_site_out(scene: Scene, tmp_path: Path):
    here = scene.town
    identity = here.join("moor", tmp_path)
    leave(identity, here.folder.config.address)
    assert here.registry.enrolments()["moor"].revoked_at is not None

    def shut_out() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = here.call(identity.context(), PULL, b"x", node_headers(identity))
            return answer.status == 401
        return False

    assert wait_until(shut_out)


def test_status_file_counts_refusals(scene: Scene):
    here = scene.town
    here.call(here.anonymous(), "/nothing", b"")
    here.call(scene.north.context(), PULL, b"x", node_headers(scene.north))
    wanted = here.gateway.shared.refusals["unknown-path"]
    assert wait_until(lambda: f'"unknown-path": {wanted}' in here.folder.gateway_status.read_text())
    assert wait_until(lambda: '"north"' in here.folder.gateway_status.read_text())


def test_server_certificate_is_reloaded(scene: Scene):
    folder = scene.town.folder
    with scene.town.connect(scene.town.anonymous()) as connection:
        old = connection.getpeercert(binary_form=True)
    new = server_certificate(
        folder.ca_key, folder.ca_certificate, folder.tls_key, folder.config.hosts, 1
    )
    write_atomic(folder.tls_certificate, new)

    def shown() -> bytes | None:
        with scene.town.connect(scene.town.anonymous()) as connection:
            return connection.getpeercert(binary_form=True)

    assert old != ssl.PEM_cert_to_DER_cert(new.decode())
    assert wait_until(lambda: shown() == ssl.PEM_cert_to_DER_cert(new.decode()))


@pytest.mark.slow
@pytest.mark.e2e
def test_as_a_process_it_ends_cleanly_on_sigterm(tmp_path: Path):
    with town(tmp_path) as here:
        north = here.join("north", tmp_path / "north")
    superlink = FakeSuperLink(here.folder, here.upstream_port)
    command = [sys.executable, "-m", "uharmony_server.gateway", str(here.folder.path)]
    process = subprocess.Popen([*command, str(here.upstream_port)], stderr=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            with contextlib.suppress(ConnectionError):
                answer = here.call(north.context(), PULL, b"x", node_headers(north))
                return answer.status == 200
            return False

        assert wait_until(answers, 30)
        with here.connect(north.context()) as connection:
            head = f"POST {PULL} HTTP/1.1\r\nhost: a\r\nflwr-public-key: {node_key(north)}\r\n"
            connection.sendall((head + "content-length: 5\r\n\r\nfi").encode())
            time.sleep(0.3)
            process.terminate()
            time.sleep(0.3)
            # What has begun is finished; nothing new begins.
            with pytest.raises(ConnectionError):
                here.connect(north.context())
            connection.sendall(b"nal")
            assert read_all(connection).endswith(b"final")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        superlink.close()
    assert '"north"' in here.folder.gateway_status.read_text()
    assert here.folder.ca_key.exists()


def test_superlink_down_then_back(tmp_path: Path):
    with town(tmp_path) as here:
        north = here.join("north", tmp_path / "north")
        call = (north.context(), PULL, b"x", node_headers(north))
        assert here.call(*call).status == 503
        for _ in range(2):
            superlink = FakeSuperLink(here.folder, here.upstream_port)
            assert here.call(*call).status == 200
            assert here.call(*call).status == 200
            superlink.close()
            assert here.call(*call).status == 503


@pytest.mark.alone
@pytest.mark.slow
def test_slow_headers_bodies_and_handshakes_are_cut(tmp_path: Path):
    with town(tmp_path, header_seconds=0.4, idle_seconds=0.4) as here:
        started = time.monotonic()
        with here.connect(here.anonymous()) as connection:
            connection.sendall(b"GET /v1/uharmony/ca HTTP/1.1\r\n")
            for _ in range(8):
                time.sleep(0.1)
                with contextlib.suppress(OSError):
                    connection.sendall(b"x: y\r\n")
            connection.settimeout(3)
            assert b"408" in read_all(connection)
        with here.connect(here.anonymous()) as connection:
            connection.sendall(
                b"POST /v1/uharmony/enrol HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nx"
            )
            assert b"408" in read_all(connection)
        with socket.create_connection(("127.0.0.1", here.port), timeout=5) as silent:
            assert read_all(silent) == b""
        with here.connect(here.anonymous()) as idle:
            assert read_all(idle) == b""
        assert time.monotonic() - started < 8
        assert wait_until(lambda: here.gateway._places.taken == 0)


@pytest.mark.alone
@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
def test_cap_on_connections_counts_before_the_handshake(tmp_path: Path, limit: str):
    with town(tmp_path, **{limit: 3}) as here, contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", here.port), timeout=5))
            for _ in range(3)
        ]
        assert wait_until(lambda: here.gateway._places.taken == 3)
        with socket.create_connection(("127.0.0.1", here.port), timeout=5) as fourth:
            started = time.monotonic()
            assert read_all(fourth) == b""
            assert time.monotonic() - started < 2
        for connection in held:
            connection.close()
        assert wait_until(lambda: here.gateway._places.taken == 0)
        ca = here.call(here.anonymous(), "/v1/uharmony/ca", None, method="GET")
        assert ca.status == 200


def test_rate_before_authentication(tmp_path: Path):
    # 1 a second with a burst of four seconds: of 12 at once, 4 get an answer (5 if it is slow).
    with town(tmp_path, requests_per_second_before_authentication=1) as here:
        statuses = [
            here.call(here.anonymous(), "/v1/uharmony/time", None, method="GET").status
            for _ in range(12)
        ]
        assert statuses[:4] == [200] * 4
        assert set(statuses[4:]) <= {200, 429}
        assert statuses.count(200) <= 6
