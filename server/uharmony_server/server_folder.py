"""The coordinator's folder: its places, how it is made, and that its study stays the same."""

from __future__ import annotations

import ipaddress
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from uharmony_model.atomic import (
    remove_directory,
    replace_directory,
    temporary_directory,
)
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.joining import Address, split_address
from uharmony_model.frozen import Frozen, parse, read_yaml
from uharmony_model.study import Study, load_study
from uharmony_server.certificates import (
    make_authority,
    renew_server_certificate,
    server_certificate,
)
from uharmony_service.certificate_parts import make_loopback_certificate
from uharmony_service.keys import make_tls_key, write_new

_FOLDERS = (
    "ca", "tls", "loopback", "secrets", "invites", "sites", "requests", "answers", "rounds",
    "run", "model", "log",
)  # fmt: skip


def _an_address(listen: str) -> str:
    ipaddress.ip_address(listen)
    return listen


class ServerConfig(Frozen):
    """server.yaml: where sites reach the coordinator, and what it bears.

    `address` is what sites are told, `listen` and `port` what is opened here; without `port` it
    is the one of the address. A round closes after `deadline_minutes` with whoever has answered;
    a site that has been away for `absent_minutes` is not waited for (None: without end). Rates are
    per second; those before authentication count per address
    of a caller, those after it per site.
    """

    address: Address
    listen: Annotated[str, Field(max_length=45), AfterValidator(_an_address)] = "0.0.0.0"  # noqa: S104
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    deadline_minutes: PositiveFloat | None = None
    absent_minutes: PositiveFloat | None = None
    certificate_hours: Annotated[float, Field(gt=0, le=87_600)] = 2160.0
    invite_hours: Annotated[float, Field(gt=0, le=87_600)] = 168.0
    max_connections: PositiveInt = 512
    max_connections_per_address: PositiveInt = 64
    max_body_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 30)] = 16 << 20
    requests_per_second: PositiveFloat = 200.0
    requests_per_second_before_authentication: PositiveFloat = 5.0
    idle_seconds: PositiveFloat = 60.0
    header_seconds: PositiveFloat = 10.0

    @property
    def listen_port(self) -> int:
        """The port that is opened here."""
        return self.port if self.port is not None else split_address(self.address)[1]

    @property
    def hosts(self) -> list[str]:
        """The names the coordinator's certificate is for."""
        hosts = [split_address(self.address)[0]]
        if not ipaddress.ip_address(self.listen).is_unspecified:
            hosts.append(self.listen)
        return hosts


@dataclass(frozen=True)
class ServerFolder:
    """One study at the coordinator. Everything in it is private to its owner."""

    path: Path
    config: ServerConfig
    study: Study

    @classmethod
    def create(cls, study_yaml: Path, folder: Path, config: ServerConfig) -> ServerFolder:
        """Make the folder with its study, authority and certificates: whole, or not at all.

        Raises:
            ConfigError: the study cannot be followed, or the folder exists and is not empty.
            StoreError: it cannot be written.
        """
        study, _ = load_study(study_yaml)
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    f"{folder}: exists and is not empty; keys are never overwritten: "
                    "choose another folder"
                )
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be made: {error.strerror}") from error
        temporary = temporary_directory(folder)
        try:
            made = cls(temporary, config, study)
            for name in _FOLDERS:
                (temporary / name).mkdir(mode=0o700)
            write_new(made.study_yaml, study_yaml.read_bytes())
            write_new(made.study_json, study.canonical_json().encode())
            content = yaml.safe_dump(config.model_dump(), sort_keys=False)
            write_new(temporary / "server.yaml", content.encode())
            # Until the first start; each start draws another one.
            write_new(made.loopback_secret, secrets.token_hex(32).encode())
            make_authority(made.ca_key, made.ca_certificate, study.name)
            make_tls_key(made.tls_key)
            write_new(
                made.tls_certificate,
                server_certificate(
                    made.ca_key,
                    made.ca_certificate,
                    made.tls_key,
                    config.hosts,
                    config.certificate_hours,
                ),
            )
            make_loopback_certificate(made.loopback_key, made.loopback_certificate)
            replace_directory(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            remove_directory(folder.parent / f".{folder.name}.old")
            raise
        return cls(folder, config, study)

    @classmethod
    def open(cls, folder: Path) -> ServerFolder:
        """Open a folder that `create` made.

        Raises:
            ConfigError: it is none, or its server.yaml cannot be followed.
        """
        if not (folder / "study.json").is_file():
            raise ConfigError(
                f"{folder}: not a coordinator's folder; make one with `uharmony-server init`"
            )
        source = folder / "server.yaml"
        config = parse(ServerConfig, read_yaml(source), str(source))
        study, _ = load_study(folder / "study.json")
        return cls(folder, config, study)

    def check_study(self) -> None:
        """Refuse a study.yaml that no longer says what sites approved.

        Raises:
            ConfigError: it names the keys that differ, with what was approved and what is there.
        """
        now, _ = load_study(self.study_yaml)
        changed = list(
            _differences(self.study.model_dump(mode="json"), now.model_dump(mode="json"))
        )
        if changed or now.digest != self.study.digest:
            lines = "; ".join(changed[:10]) or "the order of keys"
            more = f" (and {len(changed) - 10} more)" if len(changed) > 10 else ""
            raise ConfigError(
                f"{self.study_yaml}: differs from the study that sites approved: {lines}{more}; "
                "a changed study is a new study: put it back, or make a new folder for it"
            )

    def renew_certificate(self) -> bool:
        """Sign the coordinator's certificate anew if it is time; say whether it was.

        Raises:
            StoreError: a file cannot be read or written.
        """
        return renew_server_certificate(
            self.ca_key,
            self.ca_certificate,
            self.tls_key,
            self.tls_certificate,
            self.config.hosts,
            self.config.certificate_hours,
        )

    @property
    def study_yaml(self) -> Path:
        """The study as the coordinator wrote it."""
        return self.path / "study.yaml"

    @property
    def study_json(self) -> Path:
        """The study as sites approve it: canonical JSON."""
        return self.path / "study.json"

    @property
    def ca_key(self) -> Path:
        """The authority's key; the gateway never opens it."""
        return self.path / "ca" / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        """The authority's certificate."""
        return self.path / "ca" / "ca.pem"

    @property
    def tls_key(self) -> Path:
        """The gateway's key."""
        return self.path / "tls" / "server.key"

    @property
    def tls_certificate(self) -> Path:
        """The gateway's certificate."""
        return self.path / "tls" / "server.pem"

    @property
    def loopback_key(self) -> Path:
        """SuperLink's key."""
        return self.path / "loopback" / "loopback.key"

    @property
    def loopback_certificate(self) -> Path:
        """SuperLink's certificate."""
        return self.path / "loopback" / "loopback.pem"

    @property
    def loopback_secret(self) -> Path:
        """What a request over loopback must carry to reach SuperLink."""
        return self.path / "secrets" / "loopback"

    @property
    def invites(self) -> Path:
        """One file a site that was invited."""
        return self.path / "invites"

    @property
    def sites(self) -> Path:
        """One file a site that is enrolled."""
        return self.path / "sites"

    @property
    def requests(self) -> Path:
        """What the gateway hands to the registrar."""
        return self.path / "requests"

    @property
    def answers(self) -> Path:
        """What the registrar hands back."""
        return self.path / "answers"

    @property
    def rounds(self) -> Path:
        """Checkpoints."""
        return self.path / "rounds"

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.path / "model"

    @property
    def run(self) -> Path:
        """What running processes say of themselves."""
        return self.path / "run"

    @property
    def log(self) -> Path:
        """Logs."""
        return self.path / "log"

    @property
    def gateway_status(self) -> Path:
        """The gateway's counters."""
        return self.run / "gateway.json"


def _differences(before: Any, after: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        lines: list[str] = []
        for key in [*before, *(key for key in after if key not in before)]:
            place = f"{where}.{key}" if where else str(key)
            lines += _differences(before.get(key), after.get(key), place)
        if not lines and list(before) != list(after):
            lines.append(f"{where}: the order of keys")
        return lines
    return [] if before == after else [f"{where}: approved {before!r:.60}, now {after!r:.60}"]
