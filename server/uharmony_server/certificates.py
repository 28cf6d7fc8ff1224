"""The study's own certificate authority: who is a site, who is the coordinator.

It signs three kinds: the coordinator's certificate, the sites', and one for SuperLink, which
listens on loopback only. Times are backdated by a day, so that a clock an hour off still works.
"""

from __future__ import annotations

import datetime
import ipaddress
import time
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ExchangeError
from uharmony_service.keys import (
    common_name,
    is_p256,
    lifetime,
    load_certificate,
    load_tls_key,
    make_tls_key,
    write_new,
)

BACKDATED = datetime.timedelta(hours=24)
TEN_YEARS = datetime.timedelta(days=3652)
RENEW_BELOW = 1 / 3


def make_authority(key_file: Path, certificate_file: Path, name: str) -> x509.Certificate:
    """Make the authority of one study: a key and a certificate for ten years.

    Raises:
        StoreError: one of the files exists.
    """
    key = make_tls_key(key_file)
    subject = _name(f"{name[:40]} study authority")
    certificate = (
        _builder(subject, subject, key.public_key(), TEN_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(_issuer(key), critical=False)
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
        _builder(
            _name("coordinator"),
            authority.subject,
            load_tls_key(key).public_key(),
            datetime.timedelta(hours=hours),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_alternatives(hosts), critical=False)
        .add_extension(_issuer(signer), critical=False)
        .sign(signer, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def make_loopback_certificate(key_file: Path, certificate_file: Path) -> None:
    """Make SuperLink's own certificate, which vouches for itself and names only loopback.

    Raises:
        StoreError: one of the files exists.
    """
    key = make_tls_key(key_file)
    subject = _name("loopback")
    certificate = (
        _builder(subject, subject, key.public_key(), TEN_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True, leaf=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_alternatives(["127.0.0.1", "localhost"]), critical=False)
        .add_extension(_issuer(key), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_new(certificate_file, certificate.public_bytes(Encoding.PEM))


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
        _builder(_name(site), authority.subject, key, datetime.timedelta(hours=hours))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .add_extension(_issuer(signer), critical=False)
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


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    life: datetime.timedelta,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _issuer(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _usage(*, authority: bool, leaf: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=leaf or not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host.lower()))
    return x509.SubjectAlternativeName(names)
