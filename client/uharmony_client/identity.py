"""Who this site is: its keys, its certificate and the study it approved, in `identity/`.

The keys are made here and never leave. A copy of this folder is the site.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from pydantic import ValidationError

from uharmony_model.atomic import make_directory, write_atomic
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_model.exchange.canonical import canonical_json
from uharmony_model.exchange.joining import (
    EnrolmentAnswer,
    EnrolmentRequest,
    JoinCode,
    Membership,
)
from uharmony_service.keys import (
    common_name,
    key_digest,
    ledger_key_text,
    lifetime,
    load_certificate,
    load_ledger_key,
    load_node_key,
    load_tls_key,
    make_ledger_key,
    make_node_key,
    make_tls_key,
    node_key_text,
    signing_request,
    write_new,
)

MAX_MEMBERSHIP_BYTES = 1 << 16


@dataclass(frozen=True)
class Identity:
    """The folder `identity/` of a site."""

    folder: Path

    @property
    def tls_key(self) -> Path:
        """The key of the site's certificate."""
        return self.folder / "tls.key"

    @property
    def certificate(self) -> Path:
        """The site's certificate."""
        return self.folder / "tls.pem"

    @property
    def ca(self) -> Path:
        """The authority the site trusts, and no other."""
        return self.folder / "ca.pem"

    @property
    def node_key(self) -> Path:
        """The key SuperNode signs with."""
        return self.folder / "node.key"

    @property
    def ledger_key(self) -> Path:
        """The key the ledger is signed with."""
        return self.folder / "ledger.key"

    @property
    def study(self) -> Path:
        """The study as it was approved."""
        return self.folder / "study.json"

    @property
    def membership(self) -> Path:
        """Which study, where, since when."""
        return self.folder / "membership.json"

    def make_keys(self) -> None:
        """Make the keys that are not there yet.

        Raises:
            StoreError: the folder cannot be written.
        """
        try:
            make_directory(self.folder)
            self.folder.chmod(0o700)
        except OSError as error:
            raise StoreError(f"{self.folder}: cannot be made: {error.strerror}") from error
        if not self.tls_key.exists():
            make_tls_key(self.tls_key)
        if not self.node_key.exists():
            make_node_key(self.node_key)
        if not self.ledger_key.exists():
            make_ledger_key(self.ledger_key)

    def request(self, site: str, code: JoinCode, study: str) -> EnrolmentRequest:
        """What is sent to be enrolled; `study` is the digest that was approved.

        Raises:
            StoreError: a key cannot be read.
        """
        return EnrolmentRequest(
            token=code.token,
            csr=signing_request(load_tls_key(self.tls_key), site),
            node_key=node_key_text(load_node_key(self.node_key).public_key()),
            ledger_key=ledger_key_text(load_ledger_key(self.ledger_key)),
            study=study,
        )

    def keep(self, answer: EnrolmentAnswer, membership: Membership, study: bytes) -> None:
        """Store what enrolling gave; the membership comes last, so it is there when all is.

        Raises:
            ExchangeError: the certificate is not for this site and this key.
            StoreError: a file cannot be written, or the site is a member already.
        """
        self.check(answer, membership.site)
        if self.membership.exists():
            raise StoreError(
                f"{self.membership}: this site has joined already; leave that study first"
            )
        write_atomic(self.ca, answer.ca.encode())
        write_atomic(self.certificate, answer.certificate.encode())
        write_atomic(self.study, study)
        write_new(self.membership, canonical_json(membership).encode())

    def member(self) -> Membership:
        """The membership.

        Raises:
            StoreError: this site has not joined, or the file is damaged.
        """
        try:
            with self.membership.open("rb") as file:
                content = file.read(MAX_MEMBERSHIP_BYTES)
            return Membership.model_validate_json(content, strict=True)
        except FileNotFoundError:
            raise StoreError(
                f"{self.membership}: this site has not joined; join with `uharmony-client join`"
            ) from None
        except (OSError, ValidationError):
            raise StoreError(f"{self.membership}: damaged; restore it from the backup") from None

    def expires(self) -> float:
        """The end of the site's certificate, in seconds since 1970.

        Raises:
            StoreError: it cannot be read.
        """
        return lifetime(load_certificate(self.certificate))[1]

    def needs_renewal(self) -> bool:
        """Is less than a third of the certificate's life left, the backdated day not counted?

        Raises:
            StoreError: it cannot be read.
        """
        begin, end = lifetime(load_certificate(self.certificate))
        return end - time.time() < (end - begin - 86_400) / 3

    def context(self) -> ssl.SSLContext:
        """TLS as this site: its certificate, and trust in the one authority.

        Raises:
            StoreError: a file of the identity cannot be used.
        """
        try:
            context = trusting(self.ca.read_text())
            context.load_cert_chain(self.certificate, self.tls_key)
        except (OSError, ValueError, ExchangeError) as error:
            raise StoreError(
                f"{self.folder}: its certificates cannot be used ({error}); restore the backup"
            ) from error
        return context

    def check(self, answer: EnrolmentAnswer, site: str) -> None:
        """Is what was received this site's certificate, for its own key?

        Raises:
            ExchangeError: it is not.
        """
        try:
            certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
            authority = x509.load_pem_x509_certificate(answer.ca.encode())
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ExchangeError(
                "the certificate that was received is not one of the study's authority; join again"
            ) from error
        own = key_digest(load_tls_key(self.tls_key).public_key())
        if key_digest(certificate.public_key()) != own or common_name(certificate.subject) != site:
            raise ExchangeError(
                f"the certificate that was received is not for site {site} and its key; join again"
            )


def trusting(ca: str) -> ssl.SSLContext:
    """TLS 1.3 with trust in one authority and no other.

    Raises:
        ExchangeError: the text is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca)
    except (ssl.SSLError, ValueError):
        raise ExchangeError("the authority's certificate is damaged; join again") from None
    return context
