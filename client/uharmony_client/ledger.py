"""Step 9 of the data's way: what leaves is written down first, so that it can be shown later.

`ledger.jsonl` holds one entry a line in canonical JSON. An entry names the SHA-256 of the line
before it and is signed with the site's own key, so that no line can be changed, taken out or
moved. `head.json` holds the last entry's number and SHA-256, signed, so that lines cannot be cut
off; `receipts.jsonl` the heads that the coordinator has acknowledged.

A power cut can leave half a last line; it is moved aside. Nothing else is ever repaired.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from uharmony_client.durable_lines import add_line, last_line, opened_for_adding
from uharmony_client.ledger_entry import (
    MAX_LINE,
    Entry,
    Head,
    Line,
    Receipt,
    SignedHead,
    TensorFact,
    is_signed,
    parse_line,
    signed_text,
)
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import StoreError
from uharmony_model.exchange.canonical import canonical_json
from uharmony_model.exchange.codec import Buffer, pack
from uharmony_model.exchange.payload import Value
from uharmony_model.exchange.schema import Schema

__all__ = [
    "HEAD",
    "LEDGER",
    "LOCK",
    "RECEIPTS",
    "START",
    "Ledger",
    "is_signed",
    "parse_line",
    "tensor_facts",
]

log = logging.getLogger(__name__)

LEDGER, HEAD, RECEIPTS, LOCK = "ledger.jsonl", "head.json", "receipts.jsonl", "ledger.lock"
START = Head(0, "0" * 64)


class Ledger:
    """The site's own record of what left. Several processes may write to it in turn."""

    def __init__(
        self, folder: Path, key: Ed25519PrivateKey, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Open the ledger in `folder`, or begin one.

        Raises:
            StoreError: the ledger is damaged beyond a torn last line, was cut off, belongs to
                another key, or cannot be written.
        """
        self.folder = folder
        self._key, self._clock = key, clock
        self.public_key = key.public_key().public_bytes_raw().hex()
        self._head, self._size = START, -1
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked():
                self._read_state()
        except OSError as error:
            raise StoreError(
                f"{folder}: the ledger cannot be opened: {error.strerror}; check the folder"
            ) from error

    @property
    def head(self) -> Head:
        """Number and SHA-256 of the last entry; `(0, zeros)` before the first."""
        return self._head

    def append(
        self,
        *,
        kind: str,
        study: str,
        round_: int,
        to: str,
        data: Buffer,
        tensors: Sequence[TensorFact] = (),
        values: Mapping[str, Value] | None = None,
        text: str = "",
        sha256: str = "",
    ) -> Head:
        """Write down `data` before it leaves; durable when this returns.

        `sha256` is for a caller who has hashed `data` already.

        Raises:
            StoreError: the entry could not be made durable; what it speaks of must not leave.
        """
        try:
            with self._locked() as file:
                if os.fstat(file).st_size != self._size:
                    self._read_state()  # another process has written
                entry = Entry(
                    seq=self._head.seq + 1,
                    time=_utc(self._clock()),
                    study=study,
                    round=round_,
                    kind=kind,
                    to=to,
                    bytes=memoryview(data).nbytes,
                    sha256=sha256 or hashlib.sha256(data).hexdigest(),
                    tensors=tuple(tensors),
                    values=dict(values or {}),
                    text=text,
                    prev=self._head.sha256,
                    key=self.public_key,
                )
                line = canonical_json(self._sign(entry)).encode()
                if len(line) >= MAX_LINE:
                    raise StoreError(f"{self.folder}: an entry of {len(line)} bytes; not written")
                self._size += add_line(file, line)
                self._head = Head(entry.seq, hashlib.sha256(line).hexdigest())
                self._write_head()
                return self._head
        except OSError as error:
            self._size = -1  # read the state anew next time
            raise StoreError(
                f"{self.folder / LEDGER}: an entry could not be written: {error.strerror}; "
                "nothing leaves until it can; free some space"
            ) from error

    def add_receipt(self, seq: int, sha256: str, when: str) -> None:
        """Keep a head that the coordinator says it has seen, at `when` (UTC, by its clock).

        Raises:
            StoreError: the receipt cannot be written, or is not one for an entry that is here.
        """
        try:
            receipt = Receipt(seq=seq, sha256=sha256, when=when, key=self.public_key)
        except ValueError:
            raise StoreError(
                f"a receipt for entry {seq!r:.20} that cannot be read; expected a number, a "
                "SHA-256 and a time in UTC; install the same version on both sides"
            ) from None
        try:
            with self._locked(), opened_for_adding(self.folder / RECEIPTS) as file:
                if not self._holds(Head(seq, sha256)):
                    raise StoreError(
                        f"the coordinator acknowledged entry {seq} as {sha256[:12]}, which is not "
                        "in this ledger; run `ledger verify` and tell the coordinator"
                    )
                start, last = last_line(self.folder / RECEIPTS, os.fstat(file).st_size, MAX_LINE)
                if last and not last.endswith(b"\n"):
                    self._set_aside(RECEIPTS, start, last)
                add_line(file, canonical_json(self._sign(receipt)).encode())
        except OSError as error:
            raise StoreError(
                f"{self.folder / RECEIPTS}: not written: {error.strerror}; free some space"
            ) from error

    # --- parts ---------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The ledger's file descriptor, while no other process writes to it."""
        with (
            opened_for_adding(self.folder / LOCK) as lock,
            opened_for_adding(self.folder / LEDGER) as file,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield file

    def _read_state(self) -> None:
        """Where the chain stands, from its last lines and the head that was written after them."""
        self._size = -1
        path = self.folder / LEDGER
        end = path.stat().st_size
        confirmed = self._confirmed()
        start, last = last_line(path, end, MAX_LINE)
        head = self._head_of(last) if last else START
        if head is None and confirmed.seq == 0 and start == 0:
            self._set_aside(LEDGER, start, last)
            head, end = START, 0
        elif head is None:
            _, before = last_line(path, start, MAX_LINE)
            earlier = self._head_of(before) if before else START
            if earlier != confirmed:
                raise StoreError(
                    f"{path}: its last entry is damaged, and it was whole before; nothing is "
                    "repaired: run `ledger verify` and restore it from a backup"
                )
            self._set_aside(LEDGER, start, last)
            head, end = earlier, start
        if head != confirmed and not self._follows(head, confirmed, last):
            raise StoreError(
                f"{path}: ends with entry {head.seq}, the signed head says {confirmed.seq} "
                f"({confirmed.sha256[:12]}); nothing is repaired: run `ledger verify` and restore "
                "it from a backup"
            )
        self._head, self._size = head, end
        if head != confirmed:
            self._write_head()

    def _follows(self, head: Head, confirmed: Head, last: bytes) -> bool:
        """Whether the last line is the one that was written just before a power cut."""
        entry = parse_line(Entry, last[:-1]) if last else None
        return (
            entry is not None and head.seq == confirmed.seq + 1 and entry.prev == confirmed.sha256
        )

    def _head_of(self, line: bytes) -> Head | None:
        """The head that a whole, signed line makes; None for one that is torn."""
        if not line.endswith(b"\n"):
            return None
        entry = parse_line(Entry, line[:-1])
        if entry is None:
            return None
        if entry.key != self.public_key:
            raise StoreError(
                f"{self.folder / LEDGER}: signed with another key ({entry.key[:12]}), this site's "
                f"is {self.public_key[:12]}; give a folder of its own to each site"
            )
        if not is_signed(entry, self._key.public_key()):
            return None
        return Head(entry.seq, hashlib.sha256(line[:-1]).hexdigest())

    def _confirmed(self) -> Head:
        """The head as it was written after the last entry.

        Raises:
            StoreError: it is damaged or signed by another key.
        """
        path = self.folder / HEAD
        if not path.is_file():
            return START
        found = parse_line(SignedHead, path.read_bytes())
        if found is None or not is_signed(found, self._key.public_key()):
            raise StoreError(
                f"{path}: not a head signed with this site's key; restore the ledger's folder "
                "from a backup"
            )
        return Head(found.seq, found.sha256)

    def _write_head(self) -> None:
        try:
            head = SignedHead(seq=self._head.seq, sha256=self._head.sha256, key=self.public_key)
            write_atomic(self.folder / HEAD, canonical_json(self._sign(head)).encode())
        except BaseException:
            self._size = -1  # the next entry first brings the head up to date
            raise

    def _holds(self, head: Head) -> bool:
        """Whether the ledger has this entry; looked for from the end, where it usually is."""
        path = self.folder / LEDGER
        end = path.stat().st_size
        while end:
            end, line = last_line(path, end, MAX_LINE)
            entry = parse_line(Entry, line.removesuffix(b"\n"))
            if entry is None or entry.seq <= head.seq:
                digest = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
                return entry is not None and head == (entry.seq, digest)
        return False

    def _set_aside(self, name: str, start: int, torn: bytes) -> None:
        """Move half a line out of the way; it never left, as it was never whole."""
        number = 1 + sum(1 for _ in self.folder.glob("torn-*.txt"))
        aside = self.folder / f"torn-{number:04d}.txt"
        write_atomic(aside, torn)
        with (self.folder / name).open("r+b") as file:
            file.truncate(start)
            os.fsync(file.fileno())
        log.warning(
            "%s: a torn last line of %d bytes was moved to %s; the chain goes on before it",
            self.folder / name,
            len(torn),
            aside.name,
        )

    def _sign(self, content: Line) -> Line:
        signature = self._key.sign(signed_text(content)).hex()
        return content.model_copy(update={"signature": signature})


def tensor_facts(flat: Tensor, schema: Schema) -> tuple[TensorFact, ...]:
    """Each tensor of a flat float32 buffer (n,), with the SHA-256 of its little-endian bytes."""
    raw, at, facts = memoryview(pack(flat, "fp32")), 0, []
    for spec in schema.tensors:
        piece = raw[at : at + 4 * spec.numel]
        at += piece.nbytes
        facts.append(
            TensorFact(
                name=spec.name,
                shape=spec.shape,
                bytes=piece.nbytes,
                sha256=hashlib.sha256(piece).hexdigest(),
            )
        )
    return tuple(facts)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
