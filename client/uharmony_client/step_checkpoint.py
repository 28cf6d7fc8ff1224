"""A round in the middle: what a power cut may not cost more than a few steps of.

Every `every` steps the whole state of the round (network, moments, steps done, running loss) is
one file in the site's store, and a round that starts again goes on from there, to the same bits.
The file is only a saving of time: damaged, of another round or impossible to write, it is left
alone and the round is trained from its start.

UNFINISHED    SHA-256 of the rest (32 bytes), canonical JSON, a line feed, safetensors
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from uharmony_client.local_store import UNFINISHED, RoundKey
from uharmony_client.objective import Objective
from uharmony_client.optimizer import PREFIX, moments, restore_moments
from uharmony_model.atomic import make_directory, write_atomic
from uharmony_model.errors import PayloadError, StoreError
from uharmony_model.exchange.canonical import Digest, canonical_json, parse_canonical
from uharmony_model.frozen import Frozen

EVERY = 50
_NETWORK, _OBJECTIVE = "network/", "objective/"
_SEAL, _MAX_FACTS_BYTES = 32, 4096
log = logging.getLogger(__name__)


class _Facts(Frozen):
    """Where a round stands, and of which round it is: `before` is what the site carried into it."""

    format: Literal[1] = 1
    study: str
    round: PositiveInt
    base: str
    before: Digest
    steps: PositiveInt
    loss: float


@dataclass(frozen=True)
class StepCheckpoint:
    """Where the middle of one round is kept: in `folder`, every `every` steps."""

    folder: Path
    key: RoundKey
    every: int = EVERY

    @property
    def path(self) -> Path:
        """The one file; a store has at most one unfinished round."""
        return self.folder / UNFINISHED

    def of(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        before: Mapping[str, Tensor],
        objective: Objective | None = None,
    ) -> UnfinishedRound:
        """The round that trains `network` from `before`; an objective may move more than that."""
        return UnfinishedRound(self, network, optimizer, before, objective)


@dataclass(frozen=True, eq=False)
class UnfinishedRound:
    """One run of a round: taken up where a cut left it, and kept on its way."""

    checkpoint: StepCheckpoint
    network: nn.Module
    optimizer: torch.optim.Optimizer
    before: Mapping[str, Tensor]
    objective: Objective | None = None

    def take_up(self) -> tuple[int, float]:
        """Put network and moments where the round stood; gives steps done and their summed loss.

        Without a whole checkpoint of exactly this round, nothing is touched and (0, 0.0) given.
        """
        path = self.checkpoint.path
        if not path.is_file():
            return 0, 0.0
        try:
            facts, tensors = _read(path)
            self._check(facts, tensors)
        except (OSError, ValueError, PayloadError, SafetensorError, StoreError) as error:
            log.warning("%s: not used, the round starts at its first step: %s", path, error)
            return 0, 0.0
        self.network.load_state_dict(_without(tensors, _NETWORK))
        # Moments from before the round would stay where the checkpoint has none.
        self.optimizer.state.clear()
        restore_moments(self.optimizer, self.network, tensors)
        if self.objective is not None:
            self.objective.restore(_without(tensors, _OBJECTIVE))
        log.info("round %d goes on after step %d", facts.round, facts.steps)
        return facts.steps, facts.loss

    def keep(self, steps: int, loss: float) -> None:
        """Write the round down after `steps` steps, when that is due."""
        if steps % self.checkpoint.every:
            return
        key = self.checkpoint.key
        facts = _Facts(
            study=key.study,
            round=key.round,
            base=key.base,
            before=self._before,
            steps=steps,
            loss=loss,
        )
        state = {f"{_NETWORK}{k}": v.detach() for k, v in self.network.state_dict().items()}
        extra = {} if self.objective is None else self.objective.carried()
        tensors = {**state, **{f"{_OBJECTIVE}{k}": v for k, v in extra.items()}}
        tensors |= moments(self.optimizer, self.network)
        body = save({k: v.cpu().contiguous() for k, v in tensors.items()})
        head = canonical_json(facts).encode() + b"\n"
        seal = hashlib.sha256(head)
        seal.update(body)
        try:
            make_directory(self.checkpoint.folder)
            write_atomic(self.checkpoint.path, b"".join((seal.digest(), head, body)))
        except StoreError as error:
            # The round itself can still succeed, and says it plainly if it cannot be stored.
            log.warning("no step checkpoint: %s", error)

    @cached_property
    def _before(self) -> str:
        """A round taken up over another state than it began with would be no round of anybody."""
        found = hashlib.sha256()
        for name in sorted(self.before):
            tensor = self.before[name].detach().cpu().contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def _check(self, facts: _Facts, tensors: Mapping[str, Tensor]) -> None:
        key = self.checkpoint.key
        if RoundKey(facts.study, facts.round, facts.base) != key or facts.before != self._before:
            raise StoreError(f"it is of round {facts.round} of another history")
        layout = {f"{_NETWORK}{k}": v for k, v in self.network.state_dict().items()}
        found = {k: v for k, v in tensors.items() if not k.startswith((PREFIX, _OBJECTIVE))}
        if found.keys() != layout.keys() or any(
            v.shape != layout[k].shape or v.dtype != layout[k].dtype for k, v in found.items()
        ):
            raise StoreError("it is of another network")


def _without(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _read(path: Path) -> tuple[_Facts, dict[str, Tensor]]:
    data = path.read_bytes()
    if hashlib.sha256(memoryview(data)[_SEAL:]).digest() != data[:_SEAL]:
        raise StoreError("it is damaged")
    end = data.index(b"\n", _SEAL)
    facts = parse_canonical(_Facts, data[_SEAL:end], what="facts", max_bytes=_MAX_FACTS_BYTES)
    return facts, dict(load(data[end + 1 :]))
