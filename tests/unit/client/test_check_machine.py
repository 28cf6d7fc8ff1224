from __future__ import annotations

import os
from collections import namedtuple
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from uharmony_client.check.machine import Need, Reached, look_at_machine
from uharmony_client.site_config import Resources
from uharmony_model.errors import ExchangeError

NEED = Need(volumes=1 << 20, generations=1 << 20, memory=1 << 20)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _user(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)


@pytest.fixture
def store(config):
    config.store.mkdir(mode=0o700)
    (config.store / "identity").mkdir(mode=0o700)
    return config.store


def found(config, need=NEED, connection=None):
    return {code for code, _ in look_at_machine(config, need, connection).noted}


def certificate(days_before, days_after):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "north")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + timedelta(days=days_before))
        .not_valid_after(now + timedelta(days=days_after))
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def test_a_usual_machine_has_notes_only(config, store):
    assert found(config) <= {"U604", "U609"}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (certificate(-1, 30), None),
        (certificate(-1, 6), "U606"),
        (certificate(-9, -1), "U607"),
        (certificate(1, 30), "U607"),
        (b"-----BEGIN CERTIFICATE-----", "U608"),
        (bytes(1 << 17), "U608"),
    ],
)
def test_days_of_the_certificate(config, store, content, code):
    (store / "identity" / "tls.pem").write_bytes(content)
    assert found(config) & {"U606", "U607", "U608"} == ({code} if code else set())


@pytest.mark.parametrize(("mode", "code"), [(0o755, "U610"), (0o701, "U610"), (0o750, "U611")])
def test_rights_of_the_store(config, store, mode, code):
    store.chmod(mode)
    assert code in found(config)


def test_rights_of_the_keys(config, store):
    key = store / "identity" / "tls.key"
    key.write_bytes(b"")
    key.chmod(0o600)
    assert not found(config) & {"U610", "U611"}
    key.chmod(0o644)
    assert "U610" in found(config)


def test_root_and_a_store_without_the_right_to_write(config, store, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert "U612" in found(config)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    result = look_at_machine(config, NEED, None)
    assert "U613" in {code for code, _ in result.noted}
    assert result.facts["data"] == "read-only"


def test_space_counts_store_and_volumes_on_one_disk_together(config, monkeypatch):
    free = (1 << 30) + (3 << 20)  # what is spare, and three MiB
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(free, 0, free))
    assert "U601" not in found(config, Need(1 << 20, 1 << 20, 0))
    assert "U601" in found(config, Need(2 << 20, 2 << 20, 0))


def test_prepared_volumes_need_no_room_again(config, store, monkeypatch):
    free = (1 << 30) + (1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(free, 0, free))
    assert "U601" in found(config, Need(3 << 20, 0, 0))
    (store / "volumes").mkdir()
    (store / "volumes" / "image.npy").write_bytes(bytes(2 << 20))
    assert "U601" not in found(config, Need(3 << 20, 0, 0))


def test_memory_device_and_threads(config, monkeypatch):
    monkeypatch.setattr("uharmony_client.check.machine.available_memory", lambda: 100)
    assert "U602" in found(config, Need(0, 0, 101))
    assert "U602" not in found(config, Need(0, 0, 100))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    many = Resources(device="cuda", threads=len(os.sched_getaffinity(0)) + 1)
    assert {"U603", "U605"} <= found(config.model_copy(update={"resources": many}))


@pytest.mark.parametrize(
    ("ahead", "expected"), [(None, False), (4.9, False), (5.1, True), (-3600.0, True)]
)
def test_the_clock_is_compared_only_when_asked(config, ahead, expected):
    assert ("U615" in found(config, NEED, lambda: Reached(ahead, 0.1))) == expected


def test_a_coordinator_that_does_not_answer(config):
    def refuse():
        raise ExchangeError("the certificate was refused")

    def silent():
        raise ConnectionRefusedError

    for connection in (refuse, silent):
        result = look_at_machine(config, NEED, connection)
        assert "U614" in {code for code, _ in result.noted}
        assert result.facts["coordinator"] == "not reached"
