"""The study's own certificate authority: who is a site, who is the coordinator.

It signs two kinds: the coordinator's certificate and the sites'.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ExchangeError
from uharmony_service.certificate_parts import (
    BACKDATED,
    TEN_YEARS,
    alternative_names,
    authority_identifier,
    certificate_builder,
    distinguished_name,
    key_usage,
)
from uharmony_service.keys import (
    common_name,
    is_p256,
    lifetime,
    load_certificate,
    load_tls_key,
    make_tls_key,
    write_new,
)

RENEW_BELOW = 1 / 3


def make_authority(key_file: Path, certificate_file: Path, name: str) -> x509.Certificate:
    """Make the authority of one study: a key and a certificate for ten years.

    Raises:
        StoreError: one of the files exists.
    """
    key = make_tls_key(key_file)
    subject = distinguished_name(f"{name[:40]} study authority")
    certificate = (
        certificate_builder(subject, subject, key.public_key(), TEN_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True), critical=True)
        .add_extension(authority_identifier(key), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_new(certificate_file, certificate.public_bytes(Encoding.PEM))
    return certificate


def server_certificate(
    ca_key: Path, ca_certificate: Path, key: Path, hosts: Iterable[str], hours: float
) -> bytes:
    """Sign the coordinator's certificate (PEM) for the names sites call it by.

    Raises:
        StoreError: a key or the authority's certificate cannot be read.
    """
    signer, authority = load_tls_key(ca_key), load_certificate(ca_certificate)
    return (
        certificate_builder(
            distinguished_name("coordinator"),
            authority.subject,
            load_tls_key(key).public_key(),
            datetime.timedelta(hours=hours),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternative_names(hosts), critical=False)
        .add_extension(authority_identifier(signer), critical=False)
        .sign(signer, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def read_request(csr: str) -> tuple[str, ec.EllipticCurvePublicKey]:
    """The name and the key of a certificate request whose sender holds the private key.

    Raises:
        ExchangeError: it is malformed, signed by another key, or not of P-256.
    """
    try:
        request = x509.load_pem_x509_csr(csr.encode())
        key = request.public_key()
        proven = request.is_signature_valid
        name = common_name(request.subject)
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        raise ExchangeError(
            "the certificate request is malformed; join again with the installed client"
        ) from None
    if not proven or not isinstance(key, ec.EllipticCurvePublicKey) or not is_p256(key):
        raise ExchangeError(
            "the certificate request is not signed by the P-256 key it names; "
            "join again with the installed client"
        )
    if name is None:
        raise ExchangeError("the certificate request names no site; exactly one is expected")
    return name, key


def site_certificate(
    ca_key: Path,
    ca_certificate: Path,
    key: ec.EllipticCurvePublicKey,
    site: str,
    hours: float,
) -> x509.Certificate:
    """Sign a site's certificate. Only its public key comes from the site's request.

    Raises:
        StoreError: the authority's key or certificate cannot be read.
    """
    signer, authority = load_tls_key(ca_key), load_certificate(ca_certificate)
    return (
        certificate_builder(
            distinguished_name(site), authority.subject, key, datetime.timedelta(hours=hours)
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .add_extension(authority_identifier(signer), critical=False)
        .sign(signer, hashes.SHA256())
    )


def renew_server_certificate(
    ca_key: Path,
    ca_certificate: Path,
    key: Path,
    certificate_file: Path,
    hosts: Iterable[str],
    hours: float,
) -> bool:
    """Sign the coordinator's certificate anew when less than a third of its life is left.

    The key stays, so one file changes and no reader ever sees a pair that does not match.

    Raises:
        StoreError: a file cannot be read or written.
    """
    if not needs_renewal(load_certificate(certificate_file)):
        return False
    write_atomic(certificate_file, server_certificate(ca_key, ca_certificate, key, hosts, hours))
    return True


def needs_renewal(certificate: x509.Certificate) -> bool:
    """Is less than a third of the certificate's life left? The backdated day is not life."""
    begin, end = lifetime(certificate)
    begin += BACKDATED.total_seconds()
    return end - time.time() < (end - begin) * RENEW_BELOW
