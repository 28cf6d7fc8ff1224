"""The coordinator's folder, its authority, and the records of who may join and who has."""

from __future__ import annotations

import datetime
import ipaddress
import json
import stat
import time
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.support.gateway import STUDY
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, ExchangeError, StoreError
from uharmony_server.certificates import (
    make_authority,
    read_request,
    server_certificate,
    site_certificate,
)
from uharmony_server.gateway_limits import Places, Rates, caller
from uharmony_server.mailbox import Errand, Mailbox
from uharmony_server.registrar import Registrar
from uharmony_server.registry import Enrolment, Registry
from uharmony_server.server_folder import ServerConfig, ServerFolder
from uharmony_service.keys import load_certificate, load_tls_key, make_tls_key, signing_request

HOUR = 3600


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ServerFolder:
    path = tmp_path_factory.mktemp("made") / "not" / "yet"
    return ServerFolder.create(STUDY, path / "d", ServerConfig(address="fed.example.org:8443"))


def test_everything_in_the_folder_is_private(made: ServerFolder):
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    for path in made.path.rglob("*"):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert made.study_json.read_text() == made.study.canonical_json()
    assert ServerFolder.open(made.path) == made


def test_a_folder_is_made_once_and_keys_stay(made: ServerFolder, tmp_path: Path):
    before = {path: path.read_bytes() for path in made.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="not empty"):
        ServerFolder.create(STUDY, made.path, made.config)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(StoreError, match="never overwritten"):
        make_authority(made.ca_key, made.ca_certificate, "x")
    assert made.ca_key.read_bytes() == before[made.ca_key]
    (tmp_path / "empty").mkdir()
    ServerFolder.create(STUDY, tmp_path / "empty", made.config)
    with pytest.raises(ConfigError, match="no such file"):
        ServerFolder.create(tmp_path / "none.yaml", tmp_path / "e", made.config)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    with pytest.raises(ConfigError, match="uharmony-server init"):
        ServerFolder.open(tmp_path)


def test_a_changed_study_is_named_key_by_key(tmp_path: Path):
    folder = ServerFolder.create(STUDY, tmp_path / "d", ServerConfig(address="a:1"))
    folder.check_study()
    content = yaml.safe_load(STUDY.read_text())
    content["training"]["rounds"] = 6
    content["task"]["classes"]["other"] = 2
    folder.study_yaml.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        folder.check_study()
    text = str(error.value)
    assert "training.rounds: approved 5, now 6" in text
    assert "task.classes.other: approved None, now [2]" in text
    assert "a changed study is a new study" in text
    assert "local_steps" not in text


def test_the_order_of_classes_is_part_of_the_study(tmp_path: Path):
    content = yaml.safe_load(STUDY.read_text())
    content["task"]["classes"] = {"a": 1, "b": 2}
    source = tmp_path / "s.yaml"
    source.write_text(yaml.safe_dump(content, sort_keys=False))
    folder = ServerFolder.create(source, tmp_path / "d", ServerConfig(address="a:1"))
    content["task"]["classes"] = {"b": 2, "a": 1}
    folder.study_yaml.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError, match=r"task\.classes: the order of keys"):
        folder.check_study()


@pytest.mark.parametrize(
    "bad", ["", "host", "host:0", "host:65536", "ho st:1", "http://a:1", "a:1:2", "[::1]", "a:1\n"]
)
def test_addresses_that_are_none(bad: str):
    with pytest.raises(ValueError, match="address"):
        ServerConfig(address=bad)


def test_server_certificate_names_what_sites_call(made: ServerFolder):
    certificate = load_certificate(made.tls_certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.DNSName("fed.example.org")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    local = load_certificate(made.loopback_certificate).extensions
    assert set(local.get_extension_for_class(x509.SubjectAlternativeName).value) == {
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost"),
    }  # fmt: skip
    six = ServerConfig(address="[2001:db8::1]:443", listen="10.0.0.7")
    assert six.hosts == ["2001:db8::1", "10.0.0.7"]
    assert six.listen_port == 443


def test_authority_signs_no_further_authority(made: ServerFolder):
    authority = load_certificate(made.ca_certificate)
    basic = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert basic.value == x509.BasicConstraints(ca=True, path_length=0)
    years = (authority.not_valid_after_utc - authority.not_valid_before_utc).days / 365.25
    assert 9.9 < years < 10.1


def test_site_certificate_takes_only_the_key(made: ServerFolder, tmp_path: Path):
    key = make_tls_key(tmp_path / "k")
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "evil")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("fed.example.org")]), False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )
    name, public = read_request(request)
    assert name == "evil"
    certificate = site_certificate(made.ca_key, made.ca_certificate, public, "north", 10)
    certificate.verify_directly_issued_by(load_certificate(made.ca_certificate))
    assert certificate.subject.rfc4514_string() == "CN=north"
    assert certificate.public_key() == key.public_key()
    extensions = certificate.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)
    now = datetime.datetime.now(datetime.UTC)
    assert abs((now - certificate.not_valid_before_utc).total_seconds() - 24 * HOUR) < 60
    assert abs((certificate.not_valid_after_utc - now).total_seconds() - 10 * HOUR) < 60


def test_requests_without_possession_are_refused(tmp_path: Path):
    mine, other = make_tls_key(tmp_path / "a"), make_tls_key(tmp_path / "b")
    good = x509.load_pem_x509_csr(signing_request(mine, "north").encode())
    theirs = x509.load_pem_x509_csr(signing_request(other, "north").encode())
    forged = bytearray(good.public_bytes(Encoding.DER))
    spki = good.tbs_certrequest_bytes
    assert len(spki) == len(theirs.tbs_certrequest_bytes)
    begin = bytes(forged).index(spki)
    forged[begin : begin + len(spki)] = theirs.tbs_certrequest_bytes
    pem = x509.load_der_x509_csr(bytes(forged)).public_bytes(Encoding.PEM).decode()
    with pytest.raises(ExchangeError, match="not signed by the P-256 key"):
        read_request(pem)
    weak = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(ExchangeError, match="P-256"):
        read_request(signing_request(weak, "north"))


def test_server_certificate_is_renewed_in_its_last_third(tmp_path: Path):
    folder = ServerFolder.create(
        STUDY, tmp_path / "d", ServerConfig(address="a:1", certificate_hours=90)
    )
    assert not folder.renew_certificate()

    def with_left(hours: float) -> None:
        # Made for 90 h, of which so many are left: signed as if at an earlier time.
        signer, authority = load_tls_key(folder.ca_key), load_certificate(folder.ca_certificate)
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(hours=hours)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(authority.subject)
            .issuer_name(authority.subject)
            .public_key(load_tls_key(folder.tls_key).public_key())
            .serial_number(1)
            .not_valid_before(end - datetime.timedelta(hours=90 + 24))
            .not_valid_after(end)
            .sign(signer, hashes.SHA256())
        )
        write_atomic(folder.tls_certificate, certificate.public_bytes(Encoding.PEM))

    with_left(31)
    assert not folder.renew_certificate()
    with_left(29)
    key = folder.tls_key.read_bytes()
    assert folder.renew_certificate()
    assert folder.tls_key.read_bytes() == key
    assert load_certificate(folder.tls_certificate).not_valid_after_utc.timestamp() > (
        time.time() + 89 * HOUR
    )
    assert not folder.renew_certificate()
    content = server_certificate(
        folder.ca_key, folder.ca_certificate, folder.tls_key, ["a", "10.0.0.1"], 1
    )
    names = x509.load_pem_x509_certificate(content).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert [str(name.value) for name in names.value] == ["a", "10.0.0.1"]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    for name in ("invites", "sites"):
        (tmp_path / name).mkdir()
    return Registry(tmp_path / "invites", tmp_path / "sites")


def enrolment(site: str, number: int, **change) -> Enrolment:
    content = {
        "site": site,
        "tls_key": f"{number:064x}",
        "node_key": f"{number:060d}",
        "ledger_key": f"{number:064x}",
        "study": "0" * 64,
        "enrolled_at": 1,
        "expires": 2,
    }
    return Enrolment(**{**content, **change})


def test_tokens_are_random_and_only_their_digest_is_kept(registry: Registry, tmp_path: Path):
    one, expires = registry.invite("north", 2)
    assert abs(expires - time.time() - 2 * HOUR) < 5
    stored = json.loads((tmp_path / "invites" / "north.json").read_text())
    assert stored["token_sha256"] == sha256(one.encode()).hexdigest()
    assert one not in str(stored)
    two, _ = registry.invite("north", 2)
    assert len(one) == len(two) == 43  # 32 bytes in base64 without padding
    assert one != two
    assert registry.reader(one) is None
    assert registry.reader(two) == "north"


def test_a_token_enrols_one_key_of_one_site(registry: Registry):
    token, _ = registry.invite("north", 1)
    with pytest.raises(ExchangeError, match="for another site"):
        registry.redeem(token, enrolment("valley", 1))
    registry.redeem(token, enrolment("north", 1))
    registry.redeem(token, enrolment("north", 1))
    with pytest.raises(ExchangeError, match="has been used"):
        registry.redeem(token, enrolment("north", 2))
    assert registry.enrolments() == {"north": enrolment("north", 1)}


@pytest.mark.parametrize("key", ["tls_key", "node_key", "ledger_key"])
def test_no_two_sites_share_a_key(registry: Registry, key: str):
    registry.redeem(registry.invite("north", 1)[0], enrolment("north", 1))
    token, _ = registry.invite("valley", 1)
    shared = {key: getattr(enrolment("north", 1), key)}
    with pytest.raises(ExchangeError, match="belongs to another site"):
        registry.redeem(token, enrolment("valley", 2, **shared))
    registry.redeem(token, enrolment("valley", 2))


def test_revoking_who_has_not_joined_withdraws_the_invitation(registry: Registry):
    token, _ = registry.invite("north", 1)
    assert registry.revoke("north") is None
    with pytest.raises(ExchangeError, match="unknown here"):
        registry.redeem(token, enrolment("north", 1))
    with pytest.raises(ConfigError):
        registry.revoke("north")


def test_revoking_ends_the_key_but_not_the_site(registry: Registry):
    registry.redeem(registry.invite("north", 1)[0], enrolment("north", 1))
    before = registry.signature()
    open_token, _ = registry.invite("north", 1)
    revoked = registry.revoke("north")
    assert revoked is not None
    assert revoked.revoked_at is not None
    assert registry.signature() != before
    assert registry.revoke("north") == revoked
    with pytest.raises(ExchangeError, match="unknown here"):
        registry.redeem(open_token, enrolment("north", 2))
    token, _ = registry.invite("north", 1)
    with pytest.raises(ExchangeError, match="certificate key of site north was revoked"):
        registry.redeem(token, enrolment("north", 1))
    with pytest.raises(ExchangeError, match="node key of site north was revoked"):
        registry.redeem(token, enrolment("north", 2, node_key=enrolment("north", 1).node_key))
    # The ledger goes on, so its key may stay.
    registry.redeem(token, enrolment("north", 2, ledger_key=enrolment("north", 1).ledger_key))
    assert registry.enrolments()["north"].revoked_at is None
    with pytest.raises(ConfigError, match="enrolled: north"):
        registry.revoke("nowhere")
    with pytest.raises(ExchangeError, match="keeps the key"):
        registry.renewed("north", enrolment("north", 1).tls_key, 99)
    assert registry.renewed("north", enrolment("north", 2).tls_key, 99).expires == 99


@pytest.mark.parametrize("site", ["", "../x", "a/b", "a" * 65, ".x", "a\n", "ä", "x\x00"])
def test_names_that_are_no_sites(registry: Registry, site: str, tmp_path: Path):
    with pytest.raises(ConfigError):
        registry.invite(site, 1)
    with pytest.raises(ConfigError):
        registry.revoke(site)
    assert not list((tmp_path / "invites").iterdir())


def test_names_that_differ_in_case_only(registry: Registry):
    registry.invite("North", 1)
    with pytest.raises(ConfigError, match="upper and lower case"):
        registry.invite("north", 1)


def test_a_damaged_record_is_an_error_not_an_absence(registry: Registry, tmp_path: Path):
    registry.redeem(registry.invite("north", 1)[0], enrolment("north", 1))
    path = tmp_path / "sites" / "north.json"
    good = path.read_bytes()
    for bad in (good[:-5], good.replace(b"north", b"other"), b"x" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(StoreError):
            registry.enrolments()


def test_registrar_survives_rubbish_and_sweeps(made: ServerFolder):
    desk, box = Registrar(made), Mailbox(made.requests, made.answers)
    (made.requests / "rubbish.json").write_text("{")
    (made.requests / f"{'0' * 32}.json").write_text("[" * 5000)
    name = box.put(Errand(kind="leave", site="north", tls_key="0" * 64))
    assert desk.handle_pending() == 1
    outcome = box.take(name)
    assert outcome is not None
    assert outcome.status == 403
    assert outcome.detail == "this site is not enrolled with this key"
    assert not list(made.requests.iterdir())
    assert not list(made.answers.iterdir())


def test_rates_follow_the_formula():
    now = 0.0
    rates = Rates(2.0, clock=lambda: now)  # a burst of four seconds is 8
    assert [rates.wait("a") for _ in range(9)] == [0.0] * 8 + [None]
    assert rates.wait("b") == 0.0
    now = 0.5
    assert rates.wait("a") == 0.0
    assert rates.wait("a") is None
    assert rates.wait("a", patience=1.0) == pytest.approx(0.5)
    assert rates.wait("a", patience=1.0) == pytest.approx(1.0)
    assert rates.wait("a", patience=1.0) is None


def test_callers_and_places():
    assert caller("2001:db8:1:2:3:4:5:6") == caller("2001:db8:1:2::1") == "2001:db8:1:2::/64"
    assert caller("2001:db8:1:3::1") != caller("2001:db8:1:2::1")
    assert caller("::ffff:10.0.0.1") == caller("10.0.0.1") == "10.0.0.1"
    places = Places(3, 2)
    assert [places.take(name) for name in "aaabb"] == [True, True, False, True, False]
    places.give_back("a")
    assert places.take("b")
    assert places.taken == 3
