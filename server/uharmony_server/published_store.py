"""What was published, as part of a checkpoint: read only if every byte is as it was written.

FOLDER/round-000007/published/published.json    codes and prototypes, with their SHA-256
                              experts/          as in the model that is handed out
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from uharmony_model.atomic import make_directory, write_atomic
from uharmony_model.errors import ConfigError, PartitionError, PayloadError, StoreError
from uharmony_model.exchange.canonical import Digest, canonical_json, parse_canonical
from uharmony_model.exchange.published import Reason
from uharmony_model.exchange_settings import Publishable
from uharmony_model.frozen import Frozen
from uharmony_model.prototypes import Prototype
from uharmony_model.publication import Publication, read_publication, write_publication
from uharmony_server.publication import Published

_FILE = "published.json"
_MAX_BYTES = 1 << 26


class _Facts(Frozen):
    said: dict[str, dict[Publishable, tuple[Reason, ...]]] = Field(default_factory=dict)
    prototypes: tuple[Prototype, ...] = ()
    experts: dict[str, dict[str, int]] = Field(default_factory=dict)


class _Sealed(Frozen):
    sha256: Digest
    facts: _Facts


def write_published(folder: Path, published: Published) -> None:
    """Write it into a new folder.

    Raises:
        StoreError: the folder cannot be written, or what was published cannot be kept.
    """
    make_directory(folder)
    facts = _Facts(
        said={site: dict(said) for site, said in published.said.items()},
        prototypes=published.prototypes,
        experts={site: dict(found.patients) for site, found in published.experts.items()},
    )
    sealed = _Sealed(sha256=_seal(facts), facts=facts)
    write_atomic(folder / _FILE, canonical_json(sealed).encode())
    try:
        write_publication(folder, Publication(experts=dict(published.experts)))
    except (ConfigError, PartitionError) as error:
        raise StoreError(f"{folder}: not written: {error}") from None


def read_published(folder: Path) -> Published | None:
    """What a checkpoint holds; None where nothing had been asked.

    Raises:
        StoreError: a file is damaged or missing.
    """
    if not folder.exists():
        return None
    path = folder / _FILE
    try:
        sealed = parse_canonical(_Sealed, path.read_bytes(), what=_FILE, max_bytes=_MAX_BYTES)
    except (OSError, PayloadError) as error:
        raise StoreError(f"{path}: not readable ({type(error).__name__})") from None
    facts = sealed.facts
    found = read_publication(folder)
    experts = {} if found is None else dict(found.experts)
    kept = {site: dict(published.patients) for site, published in experts.items()}
    if sealed.sha256 != _seal(facts) or kept != facts.experts:
        raise StoreError(f"{folder}: not what was written")
    return Published(facts.said, experts, facts.prototypes)


def _seal(facts: _Facts) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()
