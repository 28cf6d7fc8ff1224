"""Keys: made once, private, in the forms that Flower and OpenSSL read."""

from __future__ import annotations

import base64
import stat
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from uharmony_model.errors import StoreError
from uharmony_service import keys


@pytest.mark.parametrize("make", [keys.make_tls_key, keys.make_node_key, keys.make_ledger_key])
def test_a_key_is_private_and_never_overwritten(tmp_path: Path, make):
    path = tmp_path / "k"
    make(path)
    before = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(StoreError, match="never overwritten"):
        make(path)
    assert path.read_bytes() == before
    assert [left.name for left in tmp_path.iterdir()] == ["k"]


def test_node_key_is_what_flower_reads_and_sends(tmp_path: Path):
    made = keys.make_node_key(tmp_path / "node.key")
    # As flower-supernode loads it and its header interceptor sends it.
    loaded = load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert loaded.private_numbers() == made.private_numbers()
    text = base64.b64encode(public_key_to_bytes(loaded.public_key())).decode()
    assert keys.node_key_text(made.public_key()) == text
    found = keys.node_key_from_text(text)
    assert found == bytes_to_public_key(base64.b64decode(text))
    for bad in (text[:-4], text + "\n", text.swapcase(), "", "AAAA"):
        assert keys.node_key_from_text(bad) is None
    with pytest.raises(StoreError, match="not a private key"):
        keys.load_tls_key(tmp_path / "node.key")


def test_only_the_public_half_leaves(tmp_path: Path):
    key = keys.make_tls_key(tmp_path / "tls.key")
    text = keys.signing_request(key, "north")
    request = x509.load_pem_x509_csr(text.encode())
    assert request.is_signature_valid
    assert keys.common_name(request.subject) == "north"
    assert request.public_key() == key.public_key()
    assert "PRIVATE" not in text
    ledger = keys.make_ledger_key(tmp_path / "ledger.key")
    assert bytes.fromhex(keys.ledger_key_text(ledger)) == ledger.public_key().public_bytes_raw()


def test_digests_are_over_der(tmp_path: Path):
    key = keys.make_tls_key(tmp_path / "k")
    pem = public_key_to_bytes(key.public_key()).decode().splitlines()
    der = base64.b64decode("".join(pem[1:-1]))
    assert keys.key_digest(key.public_key()) == sha256(der).hexdigest()


def test_damaged_files_are_named(tmp_path: Path):
    path = tmp_path / "k"
    with pytest.raises(StoreError, match="not readable"):
        keys.load_tls_key(path)
    for content in (b"", b"-----BEGIN", b"x" * 100_000):
        path.write_bytes(content)
        for load in (keys.load_tls_key, keys.load_node_key, keys.load_ledger_key):
            with pytest.raises(StoreError, match=str(path)):
                load(path)
        with pytest.raises(StoreError, match=str(path)):
            keys.load_certificate(path)
