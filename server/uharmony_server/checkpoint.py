"""The coordinator's state after each round, so that a kill costs at most the round it falls into.

FOLDER/round-000007/weights.safetensors    the shared tensors by name
                    momentum.safetensors   of the server's own optimiser, where it has one
                    state.json             everything else, with digests of all
                    statistics.safetensors what sites gave for others to learn with, if they did
                    published/             what sites published at the end (`published_store`)
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from uharmony_model.atomic import (
    make_directory,
    recover,
    remove_directory,
    replace_directory,
    temporary_directory,
)
from uharmony_model.errors import ExchangeError, StoreError
from uharmony_model.exchange.canonical import Digest, canonical_json, parse_canonical
from uharmony_model.exchange.instruction import Receipt
from uharmony_model.exchange.payload import digest
from uharmony_model.exchange.schema import Schema, flatten, unflatten
from uharmony_model.frozen import Frozen
from uharmony_server.admission import Refusal
from uharmony_server.gathered import Facts, Gathered, packed, unpacked
from uharmony_server.publication import Published
from uharmony_server.published_store import read_published, write_published

KEEP = 3
_MOMENTUM = "momentum.safetensors"
_STATISTICS = "statistics.safetensors"
_PUBLISHED = "published"
_ROUND = re.compile(r"^round-(\d{6,})$")
_MAX_STATE_BYTES = 1 << 28
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The federation after `round`: the shared weights `global_ (n,)` and what came with them.

    `norms` are those of every update admitted so far; `records` are JSON-able; `bytes_up` is what
    the admitted updates of each round weighed on the wire; `counted` are the sites of each round,
    `uncounted` the (round, site) pairs that were trained in vain, as far as known; `heads` are the
    heads of the sites' ledgers as last seen; `hidden` are the sites that tell no number of cases;
    `at_home` are those that played the finale; `momentum` is what the server's own optimiser
    carries, moments `(n,)`; `published` is what sites published and `statistics` what they gave,
    None while none has answered.
    """

    round: int
    global_: Tensor
    schema: Schema
    study: str
    norms: tuple[float, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    records: tuple[Mapping[str, Any], ...] = ()
    bytes_up: tuple[int, ...] = ()
    counted: tuple[tuple[str, ...], ...] = ()
    uncounted: tuple[tuple[int, str], ...] = ()
    heads: Mapping[str, Receipt] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    at_home: tuple[str, ...] = ()
    momentum: tuple[Tensor, ...] | None = None
    published: Published | None = None
    statistics: Gathered | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the shared weights, the `base` of the next round."""
        return digest(self.global_)

    def with_changes(self, **changes: Any) -> Checkpoint:
        """A copy with other values; weights that stay are not hashed again."""
        copy = replace(self, **changes)
        if "global_" not in changes and "digest" in self.__dict__:
            copy.__dict__["digest"] = self.digest
        return copy


class _State(Frozen):
    format: Literal[1] = 1
    study: Digest
    round: NonNegativeInt
    schema_digest: Digest
    weights: Digest
    norms: tuple[float, ...]
    refusals: tuple[Refusal, ...]
    records: tuple[dict[str, JsonValue], ...]
    bytes_up: tuple[NonNegativeInt, ...] = ()
    counted: tuple[tuple[str, ...], ...] = ()
    uncounted: tuple[tuple[NonNegativeInt, str], ...] = ()
    heads: dict[str, Receipt] = Field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    at_home: tuple[str, ...] = ()
    momentum: tuple[Digest, ...] | None = None
    statistics: Facts | None = None

    @model_serializer(mode="wrap")
    def _known(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Checkpoints from before there was this field have to stay canonical.
        content: dict[str, Any] = default(self)
        if self.statistics is None:
            del content["statistics"]
        return content


class _Sealed(Frozen):
    sha256: Digest
    state: _State


class _DamagedError(StoreError):
    """A checkpoint cannot be read; an earlier one may."""


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Store a checkpoint in one step and remove all but the last three; gives its directory.

    Raises:
        StoreError: the disk is full, or a record is not JSON; the earlier ones are untouched.
    """
    given = checkpoint.statistics
    try:
        facts, tables = (None, b"") if given is None else packed(given)
        state = _State(
            study=checkpoint.study,
            round=checkpoint.round,
            schema_digest=checkpoint.schema.digest,
            weights=checkpoint.digest,
            norms=checkpoint.norms,
            refusals=checkpoint.refusals,
            records=tuple(dict(record) for record in checkpoint.records),
            bytes_up=checkpoint.bytes_up,
            counted=checkpoint.counted,
            uncounted=checkpoint.uncounted,
            heads=dict(checkpoint.heads),
            hidden=checkpoint.hidden,
            at_home=checkpoint.at_home,
            momentum=_digests(checkpoint.momentum),
            statistics=facts,
        )
        text = canonical_json(_Sealed(sha256=_seal(state), state=state))
        tensors = unflatten(checkpoint.global_, checkpoint.schema)
        make_directory(folder)
    except (OSError, ValueError, ExchangeError, StoreError) as error:
        raise StoreError(f"{folder}: checkpoint not written: {_line(error)}") from error
    final = folder / f"round-{checkpoint.round:06d}"
    temporary = temporary_directory(final)
    try:
        save_file(tensors, temporary / "weights.safetensors")
        if checkpoint.momentum is not None:
            named = {str(i): moment for i, moment in enumerate(checkpoint.momentum)}
            save_file(named, temporary / _MOMENTUM)
        if facts is not None:
            (temporary / _STATISTICS).write_bytes(tables)
        if checkpoint.published is not None:
            write_published(temporary / _PUBLISHED, checkpoint.published)
        (temporary / "state.json").write_text(text, encoding="ascii")
        replace_directory(temporary, final)
    except (OSError, SafetensorError, StoreError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StoreError(f"{folder}: checkpoint not written: {_line(error)}") from error
    for _, path in _rounds(folder)[:-KEEP]:
        remove_directory(path)
    return final


def load_latest(folder: Path, study: str, schema: Schema) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none at all.

    Also cleans up after a kill, so nobody else may be writing to the folder.

    Raises:
        StoreError: the checkpoints are of another study, or none of them is whole.
    """
    recover(folder)
    return read_latest(folder, study, schema)


def read_latest(folder: Path, study: str, schema: Schema) -> Checkpoint | None:
    """As `load_latest`, but nothing is cleaned up: another process may be writing here.

    Raises:
        StoreError: the checkpoints are of another study, or none of them is whole.
    """
    rounds = _rounds(folder)
    for number, path in reversed(rounds):
        try:
            return _load(path, number, study, schema)
        except _DamagedError as error:
            _logger.warning("%s; falling back to the checkpoint before it", error)
    if rounds:
        raise StoreError(
            f"{folder}: none of {len(rounds)} checkpoints can be read; "
            "restore the folder from a backup, or give another one to start again"
        )
    return None


def _rounds(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(_ROUND.match(path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match)


def _load(path: Path, number: int, study: str, schema: Schema) -> Checkpoint:
    try:
        text = (path / "state.json").read_bytes()
        sealed = parse_canonical(_Sealed, text, what="state.json", max_bytes=_MAX_STATE_BYTES)
    except (OSError, ExchangeError) as error:
        raise _DamagedError(f"{path}: damaged: {_line(error)}") from None
    state = sealed.state
    if sealed.sha256 != _seal(state) or state.round != number:
        raise _DamagedError(f"{path}: damaged: state.json differs from its own digest")
    if state.study != study or state.schema_digest != schema.digest:
        raise StoreError(
            f"{path}: is of study {state.study[:12]} with schema {state.schema_digest[:12]}, "
            f"this is {study[:12]} with {schema.digest[:12]}; a changed study is a new study: "
            "give it another folder"
        )
    try:
        flat = flatten(load_file(path / "weights.safetensors"), schema)
    except (OSError, SafetensorError, ExchangeError) as error:
        raise _DamagedError(f"{path}: damaged: {_line(error)}") from None
    checkpoint = Checkpoint(
        round=number,
        global_=flat,
        schema=schema,
        study=study,
        norms=state.norms,
        refusals=state.refusals,
        records=state.records,
        bytes_up=state.bytes_up,
        counted=state.counted,
        uncounted=state.uncounted,
        heads=state.heads,
        hidden=state.hidden,
        at_home=state.at_home,
        momentum=_momentum(path, state),
        published=_published(path / _PUBLISHED),
        statistics=_given(path, state),
    )
    if checkpoint.digest != state.weights:
        raise _DamagedError(f"{path}: damaged: the weights differ from their digest")
    return checkpoint


def _momentum(path: Path, state: _State) -> tuple[Tensor, ...] | None:
    if state.momentum is None:
        return None
    try:
        found = load_file(path / _MOMENTUM)
        moments = tuple(found[str(i)] for i in range(len(state.momentum)))
    except (OSError, SafetensorError, KeyError) as error:
        raise _DamagedError(f"{path}: damaged: {_line(error)}") from None
    if _digests(moments) != state.momentum:
        raise _DamagedError(f"{path}: damaged: the server's moments differ from their digests")
    return moments


def _given(path: Path, state: _State) -> Gathered | None:
    if state.statistics is None:
        return None
    try:
        return unpacked((path / _STATISTICS).read_bytes(), state.statistics)
    except (OSError, StoreError) as error:
        raise _DamagedError(f"{path}: damaged: {_line(error)}") from None


def _published(path: Path) -> Published | None:
    try:
        return read_published(path)
    except StoreError as error:
        raise _DamagedError(f"{path}: damaged: {_line(error)}") from None


def _digests(moments: tuple[Tensor, ...] | None) -> tuple[str, ...] | None:
    return None if moments is None else tuple(map(digest, moments))


def _seal(state: _State) -> str:
    return hashlib.sha256(canonical_json(state).encode()).hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
