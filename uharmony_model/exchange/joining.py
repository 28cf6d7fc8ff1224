"""How a site joins: the code it is handed, what it asks for and what it is given.

The code travels outside the system, by a letter or a telephone call. Everything in it and in the
requests is bounded, because both ends read it before they trust each other.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeInt

from uharmony_model.errors import ConfigError, PayloadError
from uharmony_model.exchange.canonical import Digest, canonical_json, parse_canonical
from uharmony_model.frozen import Frozen
from uharmony_model.task import Name

PREFIX = "UH1."
MAX_CODE = 1000
MAX_ADDRESS = 300
_CODE = re.compile(r"UH1\.([A-Za-z0-9_-]{1,1000})", re.ASCII)


def split_address(address: str) -> tuple[str, int]:
    """The host, without the brackets of an IPv6 address, and the port."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _known_port(address: str) -> str:
    if not 1 <= split_address(address)[1] <= 65535:
        raise ValueError("the port must be from 1 to 65535")
    return address


Address = Annotated[
    str,
    Field(
        pattern=r"^([A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}$",
        max_length=MAX_ADDRESS,
    ),
    AfterValidator(_known_port),
]
Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
Csr = Annotated[
    str,
    Field(
        pattern=r"^-----BEGIN CERTIFICATE REQUEST-----\n[A-Za-z0-9+/=\n]{1,4000}"
        r"-----END CERTIFICATE REQUEST-----\n$"
    ),
]
Certificates = Annotated[
    str,
    Field(
        pattern=r"^(-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+"
        r"-----END CERTIFICATE-----\n){1,4}$",
        max_length=16_000,
    ),
]
NodeKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{40,598}={0,2}$")]
LedgerKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[NonNegativeInt, Field(lt=1 << 40)]


class JoinCode(Frozen):
    """One word for one site: where to go, whom to trust there, and the right to join once.

    `ca_sha256` is of the authority's certificate (DER); `expires` is in seconds since 1970.
    """

    address: Address
    ca_sha256: Digest
    token: Token
    expires: Seconds

    def to_text(self) -> str:
        """The word that is handed to the site."""
        encoded = base64.urlsafe_b64encode(canonical_json(self).encode())
        return PREFIX + encoded.rstrip(b"=").decode()

    @classmethod
    def from_text(cls, text: str) -> JoinCode:
        """Read a join code; white space around it is allowed.

        Raises:
            ConfigError: it is not a join code, or not a whole one. The message does not show it.
        """
        found = _CODE.fullmatch(text.strip()) if len(text) <= 2 * MAX_CODE else None
        if not found:
            raise ConfigError(
                f"this is not a join code; one word that begins with {PREFIX} is expected: "
                "copy it whole from what `uharmony-server invite` printed"
            )
        word = found[1]
        try:
            content = base64.urlsafe_b64decode(word + "=" * (-len(word) % 4))
            code = parse_canonical(cls, content, what="join code", max_bytes=MAX_CODE)
        except (binascii.Error, ValueError, PayloadError):
            code = None
        if code is None or code.to_text() != PREFIX + word:
            raise ConfigError(
                "the join code is damaged or cut short; copy it whole, or ask for a new one"
            )
        return code


class EnrolmentRequest(Frozen):
    """What a site sends to be enrolled. Its private keys stay where they were made.

    `node_key` is the key SuperNode signs with, as it stands in Flower's header: base64 of the
    PEM of the public key. `ledger_key` is the public Ed25519 key of the site's ledger, in hex.
    """

    token: Token
    csr: Csr
    node_key: NodeKey
    ledger_key: LedgerKey
    study: Digest


class RenewalRequest(Frozen):
    """A request for a new certificate of the same key."""

    csr: Csr


class EnrolmentAnswer(Frozen):
    """The certificate of a site and of the authority that signed it, both PEM."""

    site: Name
    certificate: Certificates
    ca: Certificates
    expires: Seconds


class Membership(Frozen):
    """What a site keeps about the study it joined; `approved_at` in seconds since 1970."""

    address: Address
    site: Name
    study: Digest
    approved_at: Seconds
