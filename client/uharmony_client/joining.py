"""The site's side of joining: whom to trust, what to approve, and the certificate it gets.

Nothing secret is sent before the authority's certificate is the one that the join code pins. The
private keys are made in the site's own folder and stay there.
"""

from __future__ import annotations

import json
import re
import ssl
import time
from hashlib import sha256
from typing import TypeVar

import httpx
from cryptography import x509
from pydantic import BaseModel, Field, ValidationError

from uharmony_client.identity import Identity, trusting
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.canonical import canonical_json
from uharmony_model.exchange.joining import (
    EnrolmentAnswer,
    EnrolmentRequest,
    JoinCode,
    RenewalRequest,
)
from uharmony_service.keys import (
    certificate_digest,
    common_name,
    load_certificate,
    load_tls_key,
    signing_request,
)

MAX_ANSWER_BYTES = 1 << 20
TIMEOUT = httpx.Timeout(30.0, connect=10.0)
ALL_SECONDS = 60.0
_PRINTABLE = re.compile(r"[^ -~]")


def fetch_ca(code: JoinCode) -> str:
    """Fetch the authority's certificate (PEM) and check it against the fingerprint in the code.

    Raises:
        ExchangeError: the coordinator is out of reach, or is not the one of the code.
    """
    # Nobody is trusted yet: what comes is public, and the code's fingerprint decides about it.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    content = _call(code.address, context, "GET", "ca")
    try:
        certificate = x509.load_pem_x509_certificate(content)
        text = content.decode("ascii")
    except ValueError:
        raise ExchangeError(
            f"{code.address} is no coordinator: its answer is not a certificate; check the address"
        ) from None
    found = certificate_digest(certificate)
    if found != code.ca_sha256 or text.count("BEGIN CERTIFICATE") != 1:
        raise ExchangeError(
            f"{code.address} has another authority than the join code says: got {found[:16]}, "
            f"expected {code.ca_sha256[:16]}; do not join: ask the coordinator, "
            "and whether something on the way opens TLS"
        )
    return text


def fetch_study(code: JoinCode, ca: str) -> bytes:
    """Fetch the study as canonical JSON, for the site to look at and approve.

    Raises:
        ExchangeError: out of reach, another server, or the code is not accepted.
    """
    headers = {"authorization": f"Bearer {code.token}"}
    return _call(code.address, trusting(ca), "GET", "study", headers=headers)


def enrol(code: JoinCode, ca: str, request: EnrolmentRequest) -> EnrolmentAnswer:
    """Enrol. With the same keys it may be repeated if the answer was lost.

    Raises:
        ExchangeError: the code has expired, or the coordinator refuses and says why.
    """
    if code.expires < time.time():
        raise ExchangeError("the join code has expired; ask the coordinator for a new one")
    content = _call(code.address, trusting(ca), "POST", "enrol", canonical_json(request).encode())
    answer = _parse(EnrolmentAnswer, content)
    if sha256(_der(answer.ca)).hexdigest() != code.ca_sha256:
        raise ExchangeError("the answer names another authority than the join code; do not join")
    return answer


def renew(identity: Identity, address: str) -> float:
    """Get a new certificate of the same key and store it; when it ends.

    Raises:
        ExchangeError: the coordinator is out of reach or refuses.
        StoreError: a file cannot be read or written.
    """
    site = common_name(load_certificate(identity.certificate).subject) or ""
    request = RenewalRequest(csr=signing_request(load_tls_key(identity.tls_key), site))
    content = _call(address, identity.context(), "POST", "renew", canonical_json(request).encode())
    answer = _parse(EnrolmentAnswer, content)
    if _der(answer.ca) != _der(identity.ca.read_text()):
        raise ExchangeError("the renewal names another authority; the old certificate stays")
    identity.check(answer, site)
    write_atomic(identity.certificate, answer.certificate.encode())
    return identity.expires()


def leave(identity: Identity, address: str) -> None:
    """Tell the coordinator that this site leaves; it is shut out at once.

    Raises:
        ExchangeError: the coordinator is out of reach or refuses.
        StoreError: a file of the identity cannot be used.
    """
    _call(address, identity.context(), "POST", "leave", b"")


def server_time(address: str, ca: str) -> float:
    """The coordinator's clock, in seconds since 1970.

    Raises:
        ExchangeError: out of reach, another server, or nonsense.
    """
    return _parse(_Time, _call(address, trusting(ca), "GET", "time")).time


def clock_offset(address: str, ca: str) -> float:
    """How many seconds the coordinator's clock is ahead of this one, to about half the way there.

    Raises:
        ExchangeError: out of reach, another server, or nonsense.
    """
    before = time.time()
    theirs = server_time(address, ca)
    return theirs - (before + time.time()) / 2


class _Time(BaseModel):
    time: float = Field(ge=0, lt=1 << 40)


Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], content: bytes) -> Model:
    try:
        return model.model_validate_json(content, strict=True)
    except ValidationError:
        raise ExchangeError(
            "the coordinator's answer is not understood; install the coordinator's version"
        ) from None


def _der(pem: str) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(pem)
    except ValueError:
        raise ExchangeError("a certificate that was received is damaged; join again") from None


def _call(
    address: str,
    context: ssl.SSLContext,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> bytes:
    content = bytearray()
    ends = time.monotonic() + ALL_SECONDS
    try:
        with (
            httpx.Client(verify=context, trust_env=False, timeout=TIMEOUT) as client,
            client.stream(
                method, f"https://{address}/v1/uharmony/{path}", content=body, headers=headers
            ) as response,
        ):
            for part in response.iter_raw(1 << 16):
                content += part
                if len(content) > MAX_ANSWER_BYTES or time.monotonic() > ends:
                    raise ExchangeError(f"{address}: the answer is too long or too slow; refused")
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
        raise _unreachable(address, error) from None
    if response.status_code != 200:
        raise ExchangeError(f"{address} refuses: {_reason(response.status_code, bytes(content))}")
    return bytes(content)


def _unreachable(address: str, error: Exception) -> ExchangeError:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return ExchangeError(
            f"{address} does not show a certificate of the study's authority, or the clock of one "
            "side is wrong; check address and clock"
        )
    if "alert" in text.lower():
        return ExchangeError(
            f"{address} does not accept this site's certificate; it may have expired: "
            "ask for a new join code"
        )
    if isinstance(error, httpx.TimeoutException):
        return ExchangeError(f"{address} does not answer in time; check the network and try again")
    return ExchangeError(
        f"{address} cannot be reached ({_PRINTABLE.sub('?', text)[:120]}); "
        "check the address and that the firewall lets this one connection out"
    )


def _reason(status: int, content: bytes) -> str:
    try:
        detail = json.loads(content)["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        detail = ""
    words = _PRINTABLE.sub("?", detail)[:500] if isinstance(detail, str) else ""
    return f"{words} ({status})" if words else f"status {status}"
