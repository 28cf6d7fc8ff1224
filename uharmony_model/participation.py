"""Which sites took part in which round: what a run needs to be repeated exactly.

A site that trained changed its own parameters, whether its update was counted or came too late.
So both are kept: `trained` asks the same sites again, `counted` adds up the same updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, PayloadError
from uharmony_model.exchange.canonical import canonical_json, parse_canonical
from uharmony_model.frozen import Frozen
from uharmony_model.task import Name

MAX_BYTES = 1 << 26
RoundNumber = Annotated[int, Field(ge=1, le=10**9)]


class RoundParticipation(Frozen):
    """One round: the sites whose updates were counted, and those that trained as far as known."""

    counted: tuple[Name, ...]
    trained: tuple[Name, ...]

    @field_validator("counted", "trained")
    @classmethod
    def _in_order(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if list(sites) != sorted(set(sites)):
            raise ValueError("each site once, in the order of their names")
        return sites

    @model_validator(mode="after")
    def _counted_trained(self) -> RoundParticipation:
        if not set(self.counted) <= set(self.trained):
            raise ValueError("a site that was counted must have trained")
        return self


class Participation(Frozen):
    """The rounds of one run, by number."""

    format: Literal[1] = 1
    rounds: dict[RoundNumber, RoundParticipation] = Field(default_factory=dict)

    def with_round(
        self, round_: int, counted: Iterable[str], trained: Iterable[str] = ()
    ) -> Participation:
        """The record with this round; who was counted has trained. A round done again replaces."""
        names = sorted(set(counted))
        found = RoundParticipation(counted=tuple(names), trained=tuple(sorted({*names, *trained})))
        return Participation(rounds={**self.rounds, round_: found})


def dump(path: Path, participation: Participation) -> None:
    """Write the record as canonical JSON, whole or not at all.

    Raises:
        StoreError: the disk is full or the folder cannot be written.
    """
    write_atomic(path, canonical_json(participation).encode())


def load(path: Path) -> Participation:
    """Read a record.

    Raises:
        ConfigError: the file is missing, or is no such record.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: more than {MAX_BYTES} bytes; this is no such record")
        data = path.read_bytes()
        return parse_canonical(Participation, data, what=str(path), max_bytes=MAX_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path}: not read: {error.strerror}; give the participation record of a run"
        ) from None
    except PayloadError as error:
        raise ConfigError(
            f"{error}; give the participation record as the coordinator wrote it"
        ) from None
