"""Who may join and who has joined, as one small file a site, each whole or not there.

The supervisor and the command line write here, one at a time; the gateway only reads. A token is
known by its SHA-256 alone, so a copy of the folder lets nobody join.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, ExchangeError, StoreError
from uharmony_model.exchange.canonical import Digest, canonical_json, explain
from uharmony_model.exchange.joining import LedgerKey, NodeKey, Seconds
from uharmony_model.frozen import Frozen, parse
from uharmony_model.task import Name

MAX_RECORD_BYTES = 1 << 16
HOUR = 3600


class Invite(Frozen):
    """The right of one site to join once; `used_by` is the key that did."""

    site: Name
    token_sha256: Digest
    expires: Seconds
    used_by: Digest | None = None


class Enrolment(Frozen):
    """A site that joined, and the three keys it is known by.

    `tls_key` is the SHA-256 of the public key in its certificates, `expires` the end of the last
    one; times are in seconds since 1970.
    """

    site: Name
    tls_key: Digest
    node_key: NodeKey
    ledger_key: LedgerKey
    study: Digest
    enrolled_at: Seconds
    expires: Seconds
    revoked_at: Seconds | None = None


Record = TypeVar("Record", Invite, Enrolment)


class Registry:
    """The invites and enrolments of one study."""

    def __init__(self, invites: Path, sites: Path) -> None:
        self._invites = invites
        self._sites = sites

    def invite(self, site: str, hours: float) -> tuple[str, int]:
        """A new token for a site and when it expires; it replaces an earlier one.

        Raises:
            ConfigError: this cannot be the name of a site.
            StoreError: the folder cannot be written.
        """
        token = secrets.token_urlsafe(32)
        expires = int(time.time() + hours * HOUR)
        content = {"site": site, "token_sha256": _digest(token), "expires": expires}
        invite = parse(Invite, content, f"site {site!r:.80}")
        with self._writing():
            # Names that differ only in case would share a file on some file systems.
            others = {record.site for record in self._read_all(self._invites, Invite)}
            for other in others | set(self.enrolments()):
                if other != site and other.lower() == site.lower():
                    raise ConfigError(
                        f"site {site}: there is a site {other} already; "
                        "names must differ in more than upper and lower case"
                    )
            self._write(self._invites, invite)
        return token, expires

    def reader(self, token: str) -> str | None:
        """The site whose token lets it read the study: not expired, whether used or not.

        Raises:
            StoreError: an invite is damaged.
        """
        invite = self._find(token)
        if invite is None or invite.expires < time.time():
            return None
        return invite.site

    def invited(self, token: str, tls_key: str) -> str:
        """The site a token lets join now with this key.

        The key that used a token may use it again until it expires: its answer may have been
        lost on the way. Nobody else may.

        Raises:
            ExchangeError: the token is unknown, used or expired.
            StoreError: an invite is damaged.
        """
        invite = self._find(token)
        if invite is None:
            raise ExchangeError(
                "the join code is unknown here or was replaced by a newer one; ask for a new one"
            )
        if invite.used_by is not None and invite.used_by != tls_key:
            raise ExchangeError("the join code has been used; ask for a new one")
        if invite.expires < time.time():
            raise ExchangeError("the join code has expired; ask for a new one")
        return invite.site

    def redeem(self, token: str, enrolment: Enrolment) -> None:
        """Use a token up and enrol the site.

        Raises:
            ExchangeError: the token does not allow it, or a key is not the site's own.
            StoreError: a record is damaged or cannot be written.
        """
        with self._writing():
            if self.invited(token, enrolment.tls_key) != enrolment.site:
                raise ExchangeError("the join code is for another site; ask for one of your own")
            self._check_keys(enrolment)
            found = self._find(token)
            if found is None:  # not reached: `invited` has found it under the same lock
                raise ExchangeError("the join code is unknown here; ask for a new one")
            # First the invite: a kill between the two leaves a token that only this key can use.
            self._write(self._invites, found.model_copy(update={"used_by": enrolment.tls_key}))
            self._write(self._sites, enrolment)

    def enrolments(self) -> dict[str, Enrolment]:
        """All sites that joined, by name, with those that were revoked.

        Raises:
            StoreError: a record is damaged.
        """
        return {record.site: record for record in self._read_all(self._sites, Enrolment)}

    def renewed(self, site: str, tls_key: str, expires: int) -> Enrolment:
        """Note that a site has a newer certificate of the same key.

        Raises:
            ExchangeError: the site is not enrolled with this key, or was revoked.
            StoreError: a record is damaged or cannot be written.
        """
        with self._writing():
            record = self.enrolments().get(site)
            if record is None or record.revoked_at is not None:
                raise ExchangeError(f"site {site} is not enrolled or was revoked; ask for a code")
            if record.tls_key != tls_key:
                raise ExchangeError(
                    "a renewal keeps the key, this request is of another; "
                    "to change the key, join again with a new code"
                )
            record = record.model_copy(update={"expires": expires})
            self._write(self._sites, record)
            return record

    def revoke(self, site: str) -> Enrolment | None:
        """Shut a site out, from the gateway's next look at the records; again changes nothing.

        None when it had not joined yet: then its invitation is withdrawn.

        Raises:
            ConfigError: no such site is enrolled or invited.
            StoreError: a record is damaged or cannot be written.
        """
        with self._writing():
            invite = self._invites / f"{_safe(site)}.json"
            invited = invite.is_file()
            invite.unlink(missing_ok=True)
            record = self.enrolments().get(site)
            if record is None and invited:
                return None
            if record is None:
                known = ", ".join(sorted(self.enrolments())) or "none"
                raise ConfigError(f"site {site!r:.80} is not enrolled; enrolled: {known}")
            if record.revoked_at is None:
                record = record.model_copy(update={"revoked_at": int(time.time())})
                self._write(self._sites, record)
            return record

    def signature(self) -> tuple[tuple[str, int, int, int], ...]:
        """Changes whenever a record of a site does: names, times and sizes of the files.

        Raises:
            StoreError: the folder cannot be read.
        """
        try:
            with os.scandir(self._sites) as entries:
                found = [
                    (entry.name, stat.st_mtime_ns, stat.st_ino, stat.st_size)
                    for entry in entries
                    if entry.name.endswith(".json")
                    for stat in (entry.stat(),)
                ]
        except OSError as error:
            raise StoreError(f"{self._sites}: not readable: {error.strerror}") from error
        return tuple(sorted(found))

    def _check_keys(self, new: Enrolment) -> None:
        for site, old in self.enrolments().items():
            shared = [
                name
                for name, one, other in (
                    ("certificate", old.tls_key, new.tls_key),
                    ("node", old.node_key, new.node_key),
                    ("ledger", old.ledger_key, new.ledger_key),
                )
                if one == other
            ]
            if site != new.site and shared:
                raise ExchangeError(
                    f"the {shared[0]} key belongs to another site; every site makes its own: "
                    "join from an empty identity folder"
                )
            # The ledger goes on under its key; the other two are what a revocation is about.
            if site == new.site and old.revoked_at is not None and shared not in ([], ["ledger"]):
                raise ExchangeError(
                    f"the {shared[0]} key of site {site} was revoked; "
                    "let the site `leave`, which takes its keys away, and join with a new code"
                )

    def _find(self, token: str) -> Invite | None:
        wanted = _digest(token)
        found = None
        for invite in self._read_all(self._invites, Invite):
            if hmac.compare_digest(invite.token_sha256, wanted):
                found = invite
        return found

    def _read_all(self, folder: Path, kind: type[Record]) -> list[Record]:
        try:
            found = [_read(path, kind) for path in sorted(folder.glob("[!.]*.json"))]
        except OSError as error:
            raise StoreError(f"{folder}: not readable: {error.strerror}") from error
        return [record for record in found if record is not None]

    def _write(self, folder: Path, record: Invite | Enrolment) -> None:
        write_atomic(folder / f"{_safe(record.site)}.json", canonical_json(record).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            lock = os.open(self._sites / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"{self._sites}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _read(path: Path, kind: type[Record]) -> Record | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:  # taken away since the folder was listed
        return None
    try:
        if len(content) > MAX_RECORD_BYTES:
            raise StoreError(f"{path}: larger than {MAX_RECORD_BYTES} bytes; this is no record")
        record = kind.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise StoreError(f"{path}: damaged: {explain(error)}; restore it") from None
    if path.name != f"{record.site}.json":
        raise StoreError(f"{path}: is about site {record.site}; a record lies under its own name")
    return record


def _safe(site: str) -> str:
    return parse(_SiteName, {"site": site}, f"site {site!r:.80}").site


class _SiteName(Frozen):
    site: Name


def _digest(token: str) -> str:
    return sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
