"""Reading the ledger back, offline: is it all there, and is it what was written?

Found are: a changed line, a missing, moved or doubled one, lines cut off at the end (against the
signed head and the receipts), and lines under another key. What cannot be found is a whole folder
put back to an earlier state: the receipts that the coordinator holds show that.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from uharmony_client.ledger import HEAD, LEDGER, LOCK, RECEIPTS, START
from uharmony_client.ledger_entry import (
    MAX_LINE,
    Entry,
    Head,
    Receipt,
    SignedHead,
    is_signed,
    parse_line,
)
from uharmony_model.errors import StoreError

MAX_PROBLEMS = 100


@dataclass(frozen=True)
class Verdict:
    """`entries` lines were read, `head` is the last whole one; no problems: all is as written."""

    entries: int
    head: Head
    problems: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Nothing was found."""
        return not self.problems


def verify(folder: Path, public_key: Ed25519PublicKey) -> Verdict:
    """Check every entry, the chain between them, the signed head and the receipts."""
    path = folder / LEDGER
    with _quiet(folder):  # no longer than needed: what is added after this is another matter
        wanted, problems = _expected_heads(folder, public_key)
        size = path.stat().st_size if path.is_file() else 0
    head, entries = START, 0
    for number, line in _lines(path, size):
        entries += 1
        expected = head.seq + 1
        problem, entry = _problem(line, number, expected, head.sha256, public_key)
        if problem:
            problems.append(problem)
        sha256 = hashlib.sha256(line.removesuffix(b"\n")).hexdigest()
        # After a bad line the chain is followed from what stands there, to find the next one.
        head = Head(entry.seq if entry is not None else expected, sha256)
        source = wanted.get(head.seq, {}).pop(sha256, None)
        if source is not None and not wanted[head.seq]:
            del wanted[head.seq]
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"more than {MAX_PROBLEMS} problems; reading ended at this line")
            return Verdict(entries, head, tuple(problems))
    for seq, digests in sorted(wanted.items()):
        for sha256, source in digests.items():
            problems.append(
                f"entry {seq} ({sha256[:12]}) is missing or another one, {source} names it; "
                "lines were cut off or replaced"
            )
    if entries and not (folder / HEAD).is_file():
        problems.append(f"{HEAD} is missing; lines may have been cut off")
    return Verdict(entries, head, tuple(problems))


def show(folder: Path) -> Iterator[Entry]:
    """The entries in their order, for a table; nothing is verified.

    Raises:
        StoreError: a line that is not an entry.
    """
    for number, line in _lines(folder / LEDGER):
        entry = parse_line(Entry, line.removesuffix(b"\n"))
        if entry is None:
            raise StoreError(
                f"{folder / LEDGER}: line {number} is not an entry; run `ledger verify`"
            )
        yield entry


def _problem(
    line: bytes, number: int, seq: int, prev: str, key: Ed25519PublicKey
) -> tuple[str, Entry | None]:
    """What is wrong with a line, in words, and the entry where it can be read."""
    if not line.endswith(b"\n"):
        return f"line {number} is cut off; a power cut, or the file was shortened", None
    entry = parse_line(Entry, line[:-1])
    if entry is None:
        return f"line {number} is not an entry; it was changed", None
    if entry.key != key.public_bytes_raw().hex():
        return f"entry {entry.seq} (line {number}) is signed with another key", entry
    if not is_signed(entry, key):
        return f"entry {entry.seq} (line {number}) was changed: its signature does not fit", entry
    if entry.seq < seq:
        return f"line {number} is entry {entry.seq}, expected {seq}: doubled or moved", entry
    if entry.seq > seq:
        return f"line {number} is entry {entry.seq}, expected {seq}: missing or moved", entry
    if entry.prev != prev:
        return f"entry {seq} (line {number}) follows another line than the one before it", entry
    return "", entry


def _expected_heads(
    folder: Path, key: Ed25519PublicKey
) -> tuple[dict[int, dict[str, str]], list[str]]:
    """The heads that the ledger must hold, each with the file that names it."""
    wanted: dict[int, dict[str, str]] = {}
    problems = []
    path = folder / HEAD
    if path.is_file():
        with path.open("rb") as file:
            found = parse_line(SignedHead, file.read(MAX_LINE + 1))
        if found is None or not is_signed(found, key):
            problems.append(f"{HEAD} was changed, or is signed with another key")
        else:
            wanted.setdefault(found.seq, {})[found.sha256] = HEAD
    for number, line in _lines(folder / RECEIPTS):
        receipt = parse_line(Receipt, line.removesuffix(b"\n"))
        if receipt is None or not is_signed(receipt, key) or not line.endswith(b"\n"):
            problems.append(f"{RECEIPTS}: line {number} was changed, or is cut off")
            continue
        wanted.setdefault(receipt.seq, {})[receipt.sha256] = f"a receipt of {receipt.when}"
    return wanted, problems


def _lines(path: Path, size: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Lines by number, one in memory at a time; a longer one than allowed comes in pieces."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        number, rest = 0, path.stat().st_size if size is None else size
        while line := file.readline(min(rest, MAX_LINE + 1)):
            number, rest = number + 1, rest - len(line)
            yield number, line


@contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    """Wait until no entry is being written; a copy that cannot be locked is read as it is."""
    with ExitStack() as stack:
        with suppress(OSError):
            fcntl.flock(stack.enter_context((folder / LOCK).open("rb")), fcntl.LOCK_SH)
        yield
