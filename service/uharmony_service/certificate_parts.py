"""What certificates of either side are made of, and the one for ports of this machine.

Times are backdated by a day, so that a clock an hour off still works.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from uharmony_service.keys import make_tls_key, write_new

BACKDATED = datetime.timedelta(hours=24)
TEN_YEARS = datetime.timedelta(days=3652)


def make_loopback_certificate(key_file: Path, certificate_file: Path) -> None:
    """Make a certificate which vouches for itself and names only loopback.

    Raises:
        StoreError: one of the files exists.
    """
    key = make_tls_key(key_file)
    subject = distinguished_name("loopback")
    certificate = (
        certificate_builder(subject, subject, key.public_key(), TEN_YEARS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True, leaf=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternative_names(["127.0.0.1", "localhost"]), critical=False)
        .add_extension(authority_identifier(key), critical=False)
        .sign(key, hashes.SHA256())
    )
    write_new(certificate_file, certificate.public_bytes(Encoding.PEM))


def certificate_builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    life: datetime.timedelta,
) -> x509.CertificateBuilder:
    """A certificate in the making, valid from yesterday on."""
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


def distinguished_name(common: str) -> x509.Name:
    """A name that is a common name and nothing else."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def authority_identifier(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    """Which key signed."""
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def key_usage(*, authority: bool, leaf: bool = False) -> x509.KeyUsage:
    """What the key may do: sign certificates (authority), or speak TLS (leaf)."""
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


def alternative_names(hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    """The hosts that the certificate is for, by name or by address."""
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host.lower()))
    return x509.SubjectAlternativeName(names)
