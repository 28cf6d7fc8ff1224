"""Step 8 of the data's way: what a round made at this site, durable before anything is sent.

One generation is one round: the update as sent and everything the site carries on (its local
parameters, its optimiser's moments). It is written whole or not at all, checked when read, and
the last three are kept. Asked again for a round it has, a site answers from here and does not
train again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from uharmony_model.atomic import (
    recover,
    remove_directory,
    replace_directory,
    temporary_directory,
)
from uharmony_model.errors import StoreError

KEPT = 3

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class RoundKey:
    """Which round of which study, starting from which global weights (their digest)."""

    study: str
    round: int
    base: str


class LocalStore:
    """Generations of one study under `folder`, readable by this user alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, key: RoundKey, update: bytes, local: Tensors) -> None:
        """Store a round's outcome as one generation and drop all but the last three.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        recover(self.folder)
        temporary = temporary_directory(self._path(key.round))
        contents = {
            "update.bin": update,
            "local.safetensors": save({k: v.contiguous() for k, v in local.items()}),
        }
        facts = {
            "study": key.study,
            "round": key.round,
            "base": key.base,
            "sha256": {n: hashlib.sha256(data).hexdigest() for n, data in contents.items()},
        }
        try:
            for name, data in contents.items():
                (temporary / name).write_bytes(data)
            (temporary / "generation.json").write_text(json.dumps(facts))
        except OSError as error:
            remove_directory(temporary)
            raise StoreError(
                f"{self.folder}: round {key.round} not written: {error.strerror}; free some space "
                "and start again: the rounds before are untouched"
            ) from error
        replace_directory(temporary, self._path(key.round))
        # Rounds after this one belong to a history that the coordinator has left.
        rounds = self._rounds()
        kept = [r for r in rounds if r <= key.round][-KEPT:]
        for number in set(rounds) - set(kept):
            remove_directory(self._path(number))

    def update(self, key: RoundKey) -> bytes | None:
        """The update made for exactly this key, or None when there is none."""
        facts = self._facts(key.round, key.study)
        if facts is None or facts["base"] != key.base:
            return None
        return self._checked(key.round, facts, "update.bin")

    def local(self, key: RoundKey) -> dict[str, torch.Tensor] | None:
        """What the site carries after the round of this key, or None when there is none."""
        facts = self._facts(key.round, key.study)
        if facts is None or facts["base"] != key.base:
            return None
        return self._tensors(key.round, facts)

    def before(self, study: str, round_: int) -> dict[str, torch.Tensor] | None:
        """What the site carries from its newest round before `round_`; None for a newcomer.

        Raises:
            StoreError: the generation the round would start from is no longer kept.
        """
        rounds = self._rounds()
        earlier = [r for r in rounds if r < round_]
        if not earlier:
            if round_ > 1 and rounds:
                raise StoreError(
                    f"round {round_} cannot start: this site keeps rounds {rounds} only; "
                    "resume the study at a later round or start a new study"
                )
            return None
        facts = self._facts(earlier[-1], study)
        return None if facts is None else self._tensors(earlier[-1], facts)

    def _path(self, round_: int) -> Path:
        return self.folder / f"round-{round_:06d}"

    def _rounds(self) -> list[int]:
        return sorted(int(p.name.removeprefix("round-")) for p in self.folder.glob("round-*"))

    def _facts(self, round_: int, study: str) -> dict[str, object] | None:
        path = self._path(round_) / "generation.json"
        if not path.is_file():
            return None
        try:
            facts = json.loads(path.read_bytes())
        except ValueError:
            raise StoreError(f"{path}: damaged; restore the store from a backup") from None
        if not isinstance(facts, dict) or facts.get("study") != study:
            raise StoreError(
                f"{path}: written for study {str(facts)[:80]}, asked for {study}; "
                "use a store folder of its own for each study"
            )
        return facts

    def _checked(self, round_: int, facts: dict[str, object], name: str) -> bytes:
        path = self._path(round_) / name
        digests = facts.get("sha256")
        data = path.read_bytes() if path.is_file() else b""
        expected = digests.get(name) if isinstance(digests, dict) else None
        if hashlib.sha256(data).hexdigest() != expected:
            raise StoreError(
                f"{path}: damaged (SHA-256 differs from its record); restore it from a backup, "
                "or remove the folder of this round to go back to the one before"
            )
        return data

    def _tensors(self, round_: int, facts: dict[str, object]) -> dict[str, torch.Tensor]:
        try:
            return dict(load(self._checked(round_, facts, "local.safetensors")))
        except SafetensorError as error:
            raise StoreError(f"{self._path(round_)}: not readable: {error}") from None
