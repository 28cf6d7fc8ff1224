"""Keys and certificates as files: made once, private to their owner, never overwritten."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import secrets
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import NameOID

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import StoreError

MAX_KEY_BYTES = 1 << 16


def write_new(path: Path, data: bytes) -> None:
    """Write a file (0600) that must not exist yet.

    Raises:
        StoreError: there is one already, or the folder cannot be written.
    """
    # A link fails where a rename would replace, and the file appears whole.
    whole = path.parent / f".{path.name}.tmp-{secrets.token_hex(8)}"
    write_atomic(whole, data)
    try:
        os.link(whole, path)
    except FileExistsError:
        raise StoreError(
            f"{path}: exists and is never overwritten; move it away if a new one is wanted"
        ) from None
    except OSError as error:
        raise StoreError(f"{path}: not written: {error.strerror}; check its folder") from error
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()


def make_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A P-256 key for certificates, as PEM.

    Raises:
        StoreError: the file exists or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def make_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key SuperNode signs with, in the OpenSSH form that flower-supernode reads.

    Raises:
        StoreError: the file exists or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return key


def make_ledger_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 key a site signs its ledger with, as PEM.

    Raises:
        StoreError: the file exists or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return key


def load_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a P-256 key (PEM).

    Raises:
        StoreError: the file is missing or is no such key.
    """
    key = _load(path, ssh=False)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p256(key.public_key()):
        raise StoreError(f"{path}: not a P-256 private key; restore it from the backup")
    return key


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a SuperNode's key (OpenSSH).

    Raises:
        StoreError: the file is missing or is no such key.
    """
    key = _load(path, ssh=True)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p256(key.public_key()):
        raise StoreError(f"{path}: not a P-256 private key; restore it from the backup")
    return key


def load_ledger_key(path: Path) -> Ed25519PrivateKey:
    """Read a ledger's key (PEM).

    Raises:
        StoreError: the file is missing or is no such key.
    """
    key = _load(path, ssh=False)
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreError(f"{path}: not an Ed25519 private key; restore it from the backup")
    return key


def is_p256(key: PublicKeyTypes) -> bool:
    """Is this a public key on the one curve that is used here?"""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def node_key_text(key: ec.EllipticCurvePublicKey) -> str:
    """The node key as Flower's header carries it: base64 of its PEM."""
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(pem).decode()


def node_key_from_text(text: str) -> ec.EllipticCurvePublicKey | None:
    """The node key of a header, or None if the text is not exactly one P-256 key."""
    try:
        key = load_pem_public_key(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error):
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not is_p256(key):
        return None
    return key if node_key_text(key) == text else None


def ledger_key_text(key: Ed25519PrivateKey) -> str:
    """The public half of a ledger's key, in hex."""
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def signing_request(key: ec.EllipticCurvePrivateKey, site: str) -> str:
    """A certificate request (PEM) that names the site and proves possession of the key."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def load_certificate(path: Path) -> x509.Certificate:
    """Read the first certificate of a file (PEM).

    Raises:
        StoreError: the file is missing or holds none.
    """
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError:
        raise StoreError(f"{path}: not a certificate (PEM); restore it from the backup") from None


def certificate_digest(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate (DER), in hex: what a join code pins."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_digest(key: PublicKeyTypes) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo, DER), in hex; renewals keep it."""
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def common_name(subject: x509.Name) -> str | None:
    """The one common name of a subject, or None if there is none or more than one."""
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        return None
    return names[0].value


def lifetime(certificate: x509.Certificate) -> tuple[float, float]:
    """From when to when a certificate is valid, in seconds since 1970."""
    return (
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def _load(path: Path, *, ssh: bool) -> object:
    content = _read(path)
    try:
        return load_ssh_private_key(content, None) if ssh else load_pem_private_key(content, None)
    except (ValueError, TypeError):
        raise StoreError(f"{path}: not a private key; restore it from the backup") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise StoreError(f"{path}: not readable: {error.strerror}; check it is there") from None
    if len(content) > MAX_KEY_BYTES:
        raise StoreError(f"{path}: larger than {MAX_KEY_BYTES} bytes; this is no key")
    return content
