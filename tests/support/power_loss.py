"""A disk that loses power: what a folder can look like afterwards, from what was synchronised.

`recorded(folder)` notes every change below a folder and every fsync (none is really done). `after`
then makes one of the states a power cut may leave. The disk is as bad as POSIX lets it be: the
content of a file is kept by an fsync of that file, a name by an fsync of its directory, and
everything later is kept or lost by itself, in any order; unsynchronised content may be old, torn,
mixed or zeros. A rename is whole or lost. What was written before the block is durable.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HOOKED = ("open", "fdopen", "fchmod", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")

# A name: the identity of its directory, and the entry there.
Name = tuple[int, str]
ROOT = 0


@dataclass(frozen=True)
class Named:
    """Entries that changed together: to which file or directory, or to nothing."""

    entries: dict[Name, int | None]


@dataclass(frozen=True)
class Written:
    """A file has other content; `cut` is what an unfinished write of it may look like."""

    file: int
    data: bytes


@dataclass(frozen=True)
class Synchronised:
    """An fsync of a file or of a directory."""

    what: int


@dataclass
class Recorder:
    """The history of one folder."""

    root: Path
    history: list[Named | Written | Synchronised] = field(default_factory=list)
    acknowledged: list[int] = field(default_factory=list)
    _start: int = 0
    _live: dict[int, int] = field(default_factory=dict)
    _next: int = 1
    _names: dict[Name, int] = field(default_factory=dict)
    _content: dict[int, bytes] = field(default_factory=dict)
    _folders: set[int] = field(default_factory=lambda: {ROOT})

    def acknowledge(self) -> None:
        """The writer has said that what it wrote so far is safe."""
        self.observe()
        self.acknowledged.append(len(self.history))

    def begin(self) -> None:
        """Take what is there as durable."""
        self.observe()
        self.history += [Synchronised(i) for i in [*self._folders, *self._content]]
        self._start = len(self.history)

    def synchronise(self, descriptor: int) -> None:
        """Note an fsync, when it is of something below the folder or of the folder."""
        inode = os.fstat(descriptor).st_ino
        if inode == self.root.stat().st_ino:
            self.history.append(Synchronised(ROOT))
        elif inode in self._live:
            self.history.append(Synchronised(self._live[inode]))

    def observe(self) -> None:
        """Note what has changed since the last look."""
        names: dict[Name, int] = {}
        content: dict[int, bytes] = {}
        seen: dict[int, int] = {}
        self._walk(self.root, ROOT, names, content, seen)
        # The number of a file that is gone may be given to another one.
        self._live = seen
        was_named, before = set(self._names.values()), self._names
        changed = {n: names.get(n) for n in [*names, *before] if names.get(n) != before.get(n)}
        moved = {n: i for n, i in changed.items() if i is not None and i in was_named}
        sources = {n for n, i in before.items() if i in moved.values() and n not in names}
        if moved:
            self.history.append(Named({**dict.fromkeys(sources), **moved}))
        rest = {n: i for n, i in changed.items() if n not in moved and n not in sources}
        self.history += [Named({name: what}) for name, what in rest.items()]
        self.history += [
            Written(i, data) for i, data in content.items() if self._content.get(i, b"") != data
        ]
        self._names, self._content = names, content

    def _walk(
        self,
        folder: Path,
        identity: int,
        names: dict[Name, int],
        content: dict[int, bytes],
        seen: dict[int, int],
    ) -> None:
        for entry in sorted(os.scandir(folder), key=lambda e: e.name):
            number = entry.inode()
            if number not in self._live:
                self._live[number] = self._next
                self._next += 1
            mine = seen[number] = self._live[number]
            names[identity, entry.name] = mine
            if entry.is_dir():
                self._folders.add(mine)
                self._walk(Path(entry.path), mine, names, content, seen)
            else:
                with open(entry.path, "rb") as file:  # noqa: PTH123 - os.open is hooked
                    content[mine] = file.read()

    def cuts(self, rng: random.Random, count: int) -> list[int]:
        """Moments of a power cut: a third of them just after something was acknowledged."""
        moments = []
        for _ in range(count):
            if self.acknowledged and rng.random() < 1 / 3:
                moments.append(rng.choice(self.acknowledged))
            else:
                moments.append(rng.randint(self._start, len(self.history)))
        return moments

    def after(self, cut: int, rng: random.Random, target: Path) -> int:
        """Make a state that a cut may leave; gives how many writes were acknowledged before it."""
        kept = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        past = self.history[:cut]
        last = {op.what: at for at, op in enumerate(past) if isinstance(op, Synchronised)}
        entries: dict[Name, int] = {}
        versions: dict[int, list[bytes]] = {}
        for at, op in enumerate(past):
            if isinstance(op, Written):
                durable = last.get(op.file, -1) > at
                earlier = [] if durable else versions.get(op.file, [b""])
                versions[op.file] = [*earlier, op.data]
            elif isinstance(op, Named):
                durable = any(last.get(folder, -1) > at for folder, _ in op.entries)
                if durable or rng.random() < kept:
                    moved = {i for i in op.entries.values() if i is not None}
                    entries = {n: i for n, i in entries.items() if i not in moved}
                    for name, what in op.entries.items():
                        if what is None:
                            entries.pop(name, None)
                        else:
                            entries[name] = what
        target.mkdir()
        self._build(target, ROOT, entries, versions, rng)
        return sum(at <= cut for at in self.acknowledged)

    def _build(
        self,
        target: Path,
        identity: int,
        entries: dict[Name, int],
        versions: dict[int, list[bytes]],
        rng: random.Random,
    ) -> None:
        for (folder, name), what in entries.items():
            if folder != identity:
                continue
            if what in self._folders:
                (target / name).mkdir()
                self._build(target / name, what, entries, versions, rng)
            else:
                (target / name).write_bytes(_torn(versions.get(what, [b""]), rng))


def _torn(versions: list[bytes], rng: random.Random) -> bytes:
    """One of the contents a file may have when only the first of its versions is durable."""
    if len(versions) == 1:
        return versions[0]
    old, new = versions[0], rng.choice(versions[1:])
    at = rng.randint(0, len(new))
    return rng.choice(
        (old, new, new[:at], new[:at] + bytes(len(new) - at), new[:at] + old[at:], bytes(len(new)))
    )


@contextmanager
def recorded(folder: Path) -> Iterator[Recorder]:
    """Within this block everything done below `folder` is noted, and nothing is synchronised."""
    recorder = Recorder(folder)
    recorder.begin()

    def noting(name, call):
        def wrapper(*args, **kwargs):
            recorder.observe()
            if name == "fsync":
                recorder.synchronise(args[0])
                return None
            result = call(*args, **kwargs)
            recorder.observe()
            return result

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in HOOKED:
            patch.setattr(os, name, noting(name, getattr(os, name)))
        yield recorder
    recorder.observe()
