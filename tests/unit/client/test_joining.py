"""The site's side of joining, against coordinators that are none, lie or do not answer."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.gateway import STUDY, free_port
from uharmony_client import joining
from uharmony_client.identity import Identity
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_model.exchange.joining import EnrolmentAnswer, JoinCode, Membership
from uharmony_server.certificates import make_authority, site_certificate
from uharmony_server.server_folder import ServerConfig, ServerFolder
from uharmony_service.keys import certificate_digest, load_certificate, load_tls_key, make_tls_key


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ServerFolder:
    config = ServerConfig(address=f"127.0.0.1:{free_port()}")
    return ServerFolder.create(STUDY, tmp_path_factory.mktemp("f") / "d", config)


@pytest.fixture
def code(folder: ServerFolder) -> JoinCode:
    return JoinCode(
        address=folder.config.address,
        ca_sha256=certificate_digest(load_certificate(folder.ca_certificate)),
        token="A" * 43,
        expires=int(time.time()) + 100,
    )


@contextlib.contextmanager
def answering(folder: ServerFolder, answer: bytes) -> Iterator[list[bytes]]:
    """A TLS server with the coordinator's certificate that says the same to everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder.tls_certificate, folder.tls_key)
    heard: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", folder.config.listen_port))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = listener.accept()
                with (
                    contextlib.suppress(OSError),
                    plain,
                    context.wrap_socket(plain, server_side=True) as connection,
                ):
                    heard.append(connection.recv(1 << 16))
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def response(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status.encode(), size, body)


def test_nobody_there(code: JoinCode):
    with pytest.raises(ExchangeError, match="cannot be reached"):
        joining.fetch_ca(code)


def test_proxies_of_the_environment_are_not_asked(
    folder: ServerFolder, code: JoinCode, monkeypatch: pytest.MonkeyPatch
):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with answering(folder, response(folder.ca_certificate.read_bytes())):
        assert joining.fetch_ca(code) == folder.ca_certificate.read_text()


def test_another_authority_is_refused_and_learns_nothing(
    folder: ServerFolder, code: JoinCode, tmp_path: Path
):
    make_authority(tmp_path / "k", tmp_path / "c", folder.study.name)
    with (
        answering(folder, response((tmp_path / "c").read_bytes())) as heard,
        pytest.raises(ExchangeError, match="another authority"),
    ):
        joining.fetch_ca(code)
    assert len(heard) == 1
    assert code.token.encode() not in heard[0]


def test_two_certificates_are_not_the_pinned_one(folder: ServerFolder, code: JoinCode, tmp_path):
    make_authority(tmp_path / "k", tmp_path / "c", "x")
    both = folder.ca_certificate.read_bytes() + (tmp_path / "c").read_bytes()
    with answering(folder, response(both)), pytest.raises(ExchangeError, match="authority"):
        joining.fetch_ca(code)


def test_token_goes_only_to_the_pinned_authority(
    folder: ServerFolder, code: JoinCode, tmp_path: Path
):
    make_authority(tmp_path / "k", tmp_path / "c", folder.study.name)
    with (
        answering(folder, response(b"{}")) as heard,
        pytest.raises(ExchangeError, match="certificate of the study's authority"),
    ):
        joining.fetch_study(code, (tmp_path / "c").read_text())
    assert not any(heard)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (response(b"x" * ((1 << 20) + 1)), "too long"),
        (response(b"", length=1 << 40), "cannot be reached"),
        (b"SSH-2.0-server\r\n", "cannot be reached"),
        (response(b"", "302 Found\r\nlocation: https://127.0.0.1:1/"), "status 302"),
        (response(b'{"detail":"because\\u001b[31m\\nfake: line"}', "403 No"), "because"),
        (response(b"[" * 100_000, "403 No"), "status 403"),
    ],
)
def test_hostile_answers(folder: ServerFolder, code: JoinCode, answer: bytes, match: str):
    with (
        answering(folder, answer),
        pytest.raises(ExchangeError, match=match) as error,
    ):
        joining.fetch_study(code, folder.ca_certificate.read_text())
    assert str(error.value).isprintable()


def test_time_that_is_none(folder: ServerFolder):
    ca = folder.ca_certificate.read_text()
    for body in (b"{}", b'{"time": "1"}', b'{"time": NaN}', b'{"time": -1}', b'{"time": 1e300}'):
        with answering(folder, response(body)), pytest.raises(ExchangeError, match="understood"):
            joining.server_time(folder.config.address, ca)


def test_expired_code_is_not_sent(code: JoinCode, tmp_path: Path, folder: ServerFolder):
    identity = Identity(tmp_path / "identity")
    identity.make_keys()
    old = code.model_copy(update={"expires": int(time.time()) - 1})
    with pytest.raises(ExchangeError, match="has expired"):
        joining.enrol(old, folder.ca_certificate.read_text(), identity.request("a", old, "0" * 64))


def test_identity_keeps_its_keys_and_takes_only_its_own_certificate(
    folder: ServerFolder, tmp_path: Path
):
    identity = Identity(tmp_path / "home" / "identity")
    with pytest.raises(StoreError, match="has not joined"):
        identity.member()
    identity.make_keys()
    before = {path.name: path.read_bytes() for path in identity.folder.iterdir()}
    identity.make_keys()
    assert {path.name: path.read_bytes() for path in identity.folder.iterdir()} == before
    assert set(before) == {"tls.key", "node.key", "ledger.key"}
    assert identity.folder.stat().st_mode & 0o777 == 0o700

    def answer(site: str, key: Path) -> EnrolmentAnswer:
        public = load_tls_key(key).public_key()
        made = site_certificate(folder.ca_key, folder.ca_certificate, public, site, 90)
        pem = made.public_bytes(Encoding.PEM).decode()
        ca = folder.ca_certificate.read_text()
        return EnrolmentAnswer(site="north", certificate=pem, ca=ca, expires=1)

    member = Membership(address="a:1", site="north", study="0" * 64, approved_at=1)
    make_tls_key(tmp_path / "other.key")
    make_authority(tmp_path / "k", tmp_path / "c", "x")
    good = answer("north", identity.tls_key)
    for bad in (
        answer("valley", identity.tls_key),
        answer("north", tmp_path / "other.key"),
        good.model_copy(update={"ca": (tmp_path / "c").read_text()}),
    ):
        with pytest.raises(ExchangeError, match="certificate that was received"):
            identity.keep(bad, member, b"{}")
    assert not identity.membership.exists()
    identity.keep(good, member, b"{}")
    assert identity.member() == member
    assert not identity.needs_renewal()
    assert abs(identity.expires() - time.time() - 90 * 3600) < 60
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in identity.folder.iterdir())
    with pytest.raises(StoreError, match="joined already"):
        identity.keep(good, member, b"{}")
