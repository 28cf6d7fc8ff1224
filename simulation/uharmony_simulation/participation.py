"""A run repeated with the participation of another one: the same sites, the same sums.

Where a deadline closed a round without a site, the weights depend on who was counted. With the
record of that run the federation in this process comes to the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flwr.app import Message, MessageType

from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.canonical import canonical_json
from uharmony_model.participation import Participation
from uharmony_model.study import Study
from uharmony_service.grid import OneRunGrid
from uharmony_simulation.engine import InProcessGrid

RECORD = "participation.json"


class ParticipationGrid(OneRunGrid):
    """Carries training only to sites that trained, and only counted answers back.

    Everything else passes: all sites are greeted and measured.
    """

    def __init__(self, grid: InProcessGrid, participation: Participation) -> None:
        super().__init__()
        self._grid = grid
        self._rounds = participation.rounds

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, one a site."""
        return self._grid.get_node_ids()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Answers in the order of the messages, each computed when it is asked for."""
        asked = (m for m in messages if self._trained(m))
        # A site whose answer does not count has trained all the same: its own state moved on.
        return (m for m in self._grid.send_and_receive(asked, timeout=timeout) if self._counted(m))

    def _trained(self, message: Message) -> bool:
        facts = message.metadata
        if facts.message_type != MessageType.TRAIN:
            return True
        return self._grid.sites[facts.dst_node_id] in self._rounds[int(facts.group_id)].trained

    def _counted(self, answer: Message) -> bool:
        facts = answer.metadata
        if facts.message_type != MessageType.TRAIN:
            return True
        return self._grid.sites[facts.src_node_id] in self._rounds[int(facts.group_id)].counted


def check_one_run(
    participation: Participation, study: Study, arms: Sequence[str], seeds: Sequence[int]
) -> None:
    """See that a record can be that of a run of this study, before anything is made.

    Raises:
        ConfigError: there are several arms or seeds, or the rounds are not those of the study.
    """
    if len(arms) != 1 or len(seeds) != 1:
        raise ConfigError(
            f"--participation is of one run, got {len(arms)} arms and {len(seeds)} seeds; "
            "give one --arm and one --seed"
        )
    last, found = study.training.rounds, set(participation.rounds)
    beyond, missing = sorted(found - set(range(1, last + 1))), set(range(1, last + 1)) - found
    if beyond:
        raise ConfigError(
            f"--participation names round {beyond[0]}, the study has {last}; "
            "give the record of a run of this study"
        )
    if missing:
        raise ConfigError(
            f"--participation does not name round {min(missing)} of {last}; "
            "give the record of a whole run"
        )


def check_sites(participation: Participation, sites: Sequence[str]) -> None:
    """See that every site of a record exists.

    Raises:
        ConfigError: one does not.
    """
    for number, found in sorted(participation.rounds.items()):
        unknown = sorted(set(found.trained) - set(sites))
        if unknown:
            raise ConfigError(
                f"--participation: round {number} names site {unknown[0]}, this run has "
                f"{', '.join(sorted(sites))}; give the record of a run with the same sites"
            )


def claim(folder: Path, participation: Participation | None) -> None:
    """Make an arm's folder one of this record, or of everybody's participation (None).

    Raises:
        StoreError: what is in the folder was trained under another participation.
    """
    wanted = None if participation is None else canonical_json(participation).encode()
    record = folder / RECORD
    found = record.read_bytes() if record.is_file() else None
    begun = (folder / "server").exists() or (folder / "done.json").exists()
    if begun and found != wanted:
        raise StoreError(
            f"{folder}: trained with {_short(found)}, asked to go on with {_short(wanted)}; "
            "a changed participation is another run: give another --out"
        )
    if wanted is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(record, wanted, mode=0o644)
    else:
        record.unlink(missing_ok=True)


def _short(record: bytes | None) -> str:
    if record is None:
        return "all sites in every round"
    return f"participation {hashlib.sha256(record).hexdigest()[:12]}"
