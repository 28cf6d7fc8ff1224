"""Step 8 of the data's way: what a round made at this site, durable before anything is sent.

One generation is one round: the update as sent and everything the site carries on (its local
parameters, its optimiser's moments). It is written whole or not at all, checked when read, and
the last three are kept. Asked again for a round it has, a site answers from here and does not
train again. What the site carries never goes back by itself: a damaged generation is an error,
and a round before the newest one is written only when the operator allows it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from safetensors import SafetensorError
from safetensors.torch import load, save

from uharmony_model.atomic import (
    make_directory,
    recover,
    remove_directory,
    replace_directory,
    set_aside,
    temporary_directory,
)
from uharmony_model.errors import PayloadError, StoreError
from uharmony_model.exchange.canonical import Digest, canonical_json, parse_canonical
from uharmony_model.frozen import Frozen

KEPT = 3
UNFINISHED = "unfinished-round"

_ROUND = re.compile(r"^(?:round-(\d{6,})|\.round-(\d{6,})\.old)$")
_MAX_RECORD_BYTES = 1 << 16
_UPDATE, _LOCAL, _RECORD = "update.bin", "local.safetensors", "generation.json"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class RoundKey:
    """Which round of which study, starting from which global weights (their digest)."""

    study: str
    round: int
    base: str


class _Facts(Frozen):
    """`started_from` is the round that this one went on from, 0 for none; None where not known."""

    format: Literal[2] = 2
    study: str
    round: PositiveInt
    base: str
    sha256: dict[str, Digest]
    started_from: NonNegativeInt | None = None

    @model_serializer(mode="wrap")
    def _known(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Records from before there was this field have to stay canonical.
        content: dict[str, Any] = default(self)
        if self.started_from is None:
            del content["started_from"]
        return content


class _Sealed(Frozen):
    """The facts with their own digest: a flipped bit in `base` must not look like another key."""

    sha256: Digest
    facts: _Facts


class LocalStore:
    """Generations of one study under `folder`, readable by this user alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self, key: RoundKey, update: bytes, local: Tensors, *, allow_rollback: bool = False
    ) -> None:
        """Store a round's outcome as one generation and drop all but the last three.

        The round's step checkpoint is dropped with it. Later rounds are dropped only under
        `allow_rollback`: they belong to a history that the coordinator has left.

        Raises:
            StoreError: the disk is full or the folder cannot be written; or this site holds later
                rounds and may not go back.
        """
        later = [r for r in self._rounds() if r > key.round]
        if later and not allow_rollback:
            raise StoreError(
                f"{self.folder}: round {key.round} is before rounds {later} that this site holds; "
                "ask the coordinator why it went back, and to accept it once set "
                "policy.allow_rollback: true in site.yaml"
            )
        make_directory(self.folder)
        recover(self.folder)
        temporary = temporary_directory(self._place(key.round))
        contents = {
            _UPDATE: update,
            _LOCAL: save({k: v.contiguous() for k, v in local.items()}),
        }
        facts = _Facts(
            study=key.study,
            round=key.round,
            base=key.base,
            sha256={n: hashlib.sha256(data).hexdigest() for n, data in contents.items()},
            started_from=self._starts_from(key.study, key.round),
        )
        try:
            for name, data in contents.items():
                (temporary / name).write_bytes(data)
            record = _Sealed(sha256=_seal(facts), facts=facts)
            (temporary / _RECORD).write_bytes(canonical_json(record).encode())
        except OSError as error:
            remove_directory(temporary)
            raise StoreError(
                f"{self.folder}: round {key.round} not written: {error.strerror}; free some space "
                "and start again: the rounds before are untouched"
            ) from error
        replace_directory(temporary, self._place(key.round))
        rounds = self._rounds()
        kept = [r for r in rounds if r <= key.round][-KEPT:]
        for number in sorted(set(rounds) - set(kept), reverse=True):
            remove_directory(self._place(number))
        with suppress(OSError):  # left behind it is only refused, by its key
            (self.folder / UNFINISHED).unlink(missing_ok=True)

    def update(self, key: RoundKey) -> bytes | None:
        """The update made for exactly this key, or None when there is none.

        Raises:
            StoreError: the generation of this round is damaged, in whatever file.
        """
        facts = self._facts(key.round, key.study)
        if facts is None or facts.base != key.base:
            return None
        self._checked(key.round, facts, _LOCAL)
        return self._checked(key.round, facts, _UPDATE)

    def local(self, key: RoundKey) -> dict[str, torch.Tensor] | None:
        """What the site carries after the round of this key, or None when there is none.

        Raises:
            StoreError: it is damaged.
        """
        facts = self._facts(key.round, key.study)
        if facts is None or facts.base != key.base:
            return None
        return self._tensors(key.round, facts)

    def before(self, study: str, round_: int) -> dict[str, torch.Tensor] | None:
        """What the site carries from its newest round before `round_`; None for a newcomer.

        Raises:
            StoreError: the generation the round would start from is damaged or no longer kept.
        """
        number = self.started_from(study, round_)
        facts = self._facts(number, study) if number else None
        return None if facts is None else self._tensors(number, facts)

    def started_from(self, study: str, round_: int) -> int:
        """The round whose generation `round_` starts from; 0 where the site had none before it.

        Raises:
            StoreError: that generation is no longer kept.
        """
        number = self._starts_from(study, round_)
        if number is None:
            raise StoreError(
                f"round {round_} cannot start: this site keeps rounds {self._rounds()} only; "
                "resume the study at a later round or start a new study"
            )
        return number

    def newest(self, study: str, *, up_to: int | None = None) -> int:
        """The newest round this site has done, of those `up_to` one; 0 when it has done none.

        Raises:
            StoreError: its record is damaged or of another study.
        """
        number = max((r for r in self._rounds() if up_to is None or r <= up_to), default=0)
        if number:
            self._facts(number, study)
        return number

    def mark_before(self, round_: int) -> str:
        """SHA-256 of the record of what `round_` starts from, or that of nothing where none is.

        Never an error: it tells files apart that belong to different beginnings.
        """
        earlier = [r for r in self._rounds() if r < round_]
        data = b""
        if earlier:
            with suppress(OSError):
                data = (self._path(earlier[-1]) / _RECORD).read_bytes()
        return hashlib.sha256(data).hexdigest()

    def _place(self, round_: int) -> Path:
        return self.folder / f"round-{round_:06d}"

    def _path(self, round_: int) -> Path:
        """Where the whole generation lies; set aside when its replacement was cut short."""
        place = self._place(round_)
        aside = set_aside(place)
        return aside if aside.is_dir() and not place.is_dir() else place

    def _rounds(self) -> list[int]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted({int(found[1] or found[2]) for p in paths if (found := _ROUND.match(p.name))})

    def _starts_from(self, study: str, round_: int) -> int | None:
        """As `started_from`; None where it is no longer kept, or nobody can tell."""
        rounds = self._rounds()
        earlier = [r for r in rounds if r < round_]
        if earlier:
            return earlier[-1]
        if not rounds or round_ == 1:
            return 0
        # Whoever began from nothing with the oldest round that is kept had none before it.
        try:
            oldest = self._facts(rounds[0], study)
        except StoreError:
            return None
        return 0 if oldest is not None and oldest.started_from == 0 else None

    def _facts(self, round_: int, study: str) -> _Facts | None:
        """The record of a round, None when the round was not done here."""
        folder = self._path(round_)
        if not folder.is_dir():
            return None
        path = folder / _RECORD
        try:
            data = path.read_bytes()
            sealed = parse_canonical(_Sealed, data, what=_RECORD, max_bytes=_MAX_RECORD_BYTES)
        except (OSError, PayloadError):
            raise _damaged(path, "cannot be read") from None
        facts = sealed.facts
        if _seal(facts) != sealed.sha256 or facts.round != round_:
            raise _damaged(path, "SHA-256 differs from its record")
        if facts.study != study:
            raise StoreError(
                f"{path}: written for study {facts.study[:80]}, asked for {study}; "
                "use a store folder of its own for each study"
            )
        return facts

    def _checked(self, round_: int, facts: _Facts, name: str) -> bytes:
        path = self._path(round_) / name
        try:
            data = path.read_bytes()
        except OSError:
            raise _damaged(path, "cannot be read") from None
        if hashlib.sha256(data).hexdigest() != facts.sha256.get(name):
            raise _damaged(path, "SHA-256 differs from its record")
        return data

    def _tensors(self, round_: int, facts: _Facts) -> dict[str, torch.Tensor]:
        try:
            return dict(load(self._checked(round_, facts, _LOCAL)))
        except SafetensorError as error:
            raise StoreError(f"{self._path(round_)}: not readable: {error}") from None


def _seal(facts: _Facts) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _damaged(path: Path, how: str) -> StoreError:
    return StoreError(
        f"{path}: damaged ({how}); restore it from a backup, "
        "or remove the folder of this round to go back to the one before"
    )
