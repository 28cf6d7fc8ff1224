"""What the gateway lets through: exact paths, known callers, few headers. Pure, no socket.

Paths are compared byte for byte as they came. A rule about prefixes can be walked around with
dot segments; here nothing is decoded, joined or normalised.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cryptography import x509
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from uharmony_server.registry import Enrolment
from uharmony_service.keys import common_name, key_digest, lifetime

Headers = Iterable[tuple[bytes, bytes]]

FLEET = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
PUSH_MESSAGES = b"/v1/fleet/push-messages"
CA, TIME, STUDY = b"/v1/uharmony/ca", b"/v1/uharmony/time", b"/v1/uharmony/study"
ENROL, RENEW, LEAVE = b"/v1/uharmony/enrol", b"/v1/uharmony/renew", b"/v1/uharmony/leave"
METHODS: Mapping[bytes, bytes] = {
    **dict.fromkeys(FLEET, b"POST"),
    **dict.fromkeys((CA, TIME, STUDY), b"GET"),
    **dict.fromkeys((ENROL, RENEW, LEAVE), b"POST"),
}
NODE_KEY = b"flwr-public-key"
MAX_HEADERS = 64
_FORWARDED = frozenset({b"content-type", b"accept", b"accept-encoding"})
_RETURNED = frozenset({b"content-type", b"content-encoding", b"retry-after"})


class Refused(Exception):  # noqa: N818 - an answer to a caller, not an error of this program
    """A request that is answered with a status and a stable reason code."""

    def __init__(self, status: int, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Answer:
    """What goes back to a caller."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)


@dataclass(frozen=True)
class Peer:
    """The other end of a connection; without a certificate only its address is known."""

    address: str
    site: str | None = None
    tls_key: str | None = None
    expires: float = 0.0


def peer_of(address: str, certificate: bytes | None) -> Peer:
    """Who the certificate (DER) that the handshake verified speaks of."""
    if certificate is None:
        return Peer(address)
    parsed = x509.load_der_x509_certificate(certificate)
    return Peer(
        address, common_name(parsed.subject), key_digest(parsed.public_key()), lifetime(parsed)[1]
    )


def recognise(peer: Peer, enrolments: Mapping[str, Enrolment], study: str) -> Enrolment:
    """The enrolment of a caller, from its certificate.

    Raises:
        Refused: there is no certificate, or it is not that of an enrolled site.
    """
    if peer.site is None or peer.tls_key is None:
        raise Refused(401, "no-certificate", "a certificate of an enrolled site is needed")
    # The handshake has checked this too, but a connection may outlive its certificate.
    if peer.expires < time.time():
        raise Refused(401, "certificate-expired", "join again with a new code")
    record = enrolments.get(peer.site)
    if record is None or not hmac.compare_digest(record.tls_key, peer.tls_key):
        raise Refused(401, "not-enrolled", "this certificate is not of an enrolled site")
    if record.revoked_at is not None:
        raise Refused(401, "revoked", "this site has left or was revoked")
    if record.study != study:
        raise Refused(401, "other-study", "this site is enrolled in another study")
    return record


def check_route(method: bytes, target: bytes) -> None:
    """Is this one of the exact paths, called in its one way?

    Raises:
        Refused: it is not.
    """
    expected = METHODS.get(target)
    if expected is None:
        raise Refused(404, "unknown-path", "there is nothing here")
    if method != expected:
        raise Refused(405, "wrong-method", f"only {expected.decode()} is allowed")


def check_headers(headers: Headers) -> None:
    """Are the headers few, and those that count given once?

    Raises:
        Refused: they are not.
    """
    names = [name for name, _ in headers]
    if len(names) > MAX_HEADERS:
        raise Refused(431, "too-many-headers", f"at most {MAX_HEADERS} are allowed")
    counted = [name for name in names if name in _FORWARDED or name.startswith(b"flwr-")]
    if len(set(counted)) != len(counted) or names.count(b"authorization") > 1:
        raise Refused(400, "header-twice", "a header that may be given once is given twice")


def body_size(headers: Headers, limit: int) -> int:
    """The declared size of the body, 0 if there is none.

    Raises:
        Refused: it is larger than the limit, or not declared.
    """
    declared = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            # One-byte chunks would cost far more time than they have bytes.
            raise Refused(411, "no-length", "give the body's size in content-length")
        if name == b"content-length":
            # The parser has checked the form; its number of digits bounds the conversion.
            declared = int(value) if len(value) <= 15 else limit + 1
    if declared > limit:
        raise Refused(413, "body-too-large", f"at most {limit} bytes are allowed")
    return declared


def check_node_key(headers: Headers, record: Enrolment) -> None:
    """Is the key that signs for SuperNode the one the site enrolled with?

    Raises:
        Refused: it is missing, given twice, or another site's.
    """
    keys = [value for name, value in headers if name == NODE_KEY]
    if len(keys) != 1:
        raise Refused(401, "no-node-key", "the node's key must be given exactly once")
    if not hmac.compare_digest(keys[0], record.node_key.encode()):
        raise Refused(401, "wrong-node-key", "certificate and node key are of different sites")


def check_senders(body: bytes) -> None:
    """Does every message that is pushed come from the node that pushes it?

    Flower compares the node with the key, but not the messages with the node.

    Raises:
        Refused: it does not, or the body is not such a request.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        raise Refused(400, "not-protobuf", "the body is not what this path takes") from None
    node = request.node.node_id
    if any(message.metadata.src_node_id != node for message in request.messages_list):
        raise Refused(403, "wrong-sender", "a message names another node as its sender")


def forwarded(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that SuperLink gets to see."""
    return [
        (name, value) for name, value in headers if name in _FORWARDED or name.startswith(b"flwr-")
    ]


def returned(headers: Headers) -> tuple[tuple[bytes, bytes], ...]:
    """The headers of SuperLink's answer that a site gets to see."""
    return tuple(
        (name, value) for name, value in headers if name in _RETURNED or name.startswith(b"flwr-")
    )
