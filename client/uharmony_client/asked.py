"""What the coordinator asked this site last: a question may be repeated, not changed.

A site approves so many rounds of a study. A coordinator that asks for one of them again and again,
each time from other weights, or measures ever other weights as one round, would get as many answers
as it likes. A coordinator that has lost nothing never does: what it asks in a round follows from
its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt

from uharmony_client.local_store import KEPT
from uharmony_client.site import Site
from uharmony_model.atomic import make_directory, write_atomic
from uharmony_model.errors import ExchangeError, PayloadError, StoreError
from uharmony_model.exchange.canonical import canonical_json, parse_canonical
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.frozen import Frozen

_FILE = "asked.json"
_MAX_BYTES = 4096


class _Question(Frozen):
    """A round, the digest of its weights, and of what came beside them."""

    round: NonNegativeInt
    base: str
    given: str


class _Asked(Frozen):
    """The last questions of each kind, oldest first."""

    format: Literal[1] = 1
    train: tuple[_Question, ...] = ()
    evaluate: tuple[_Question, ...] = ()


def require_unchanged(site: Site, order: Instruction) -> None:
    """Refuse another question for a round than was asked before; else remember this one.

    As many are remembered as the site keeps rounds.

    Raises:
        ExchangeError: it is another one, and the site's policy does not allow to go back.
        StoreError: what was remembered is damaged, or cannot be written.
    """
    action: Literal["train", "evaluate"] = "train" if order.action == "train" else "evaluate"
    folder = site.store.folder
    found = _read(folder / _FILE)
    before = found.train if action == "train" else found.evaluate
    new = _Question(round=order.round, base=order.base, given=order.given)
    if new in before:
        return
    later = [one for one in before if one.round >= new.round]
    if later and not site.config.policy.allow_rollback:
        same = any(one.round == new.round for one in later)
        how = "from other weights or statistics" if same else "which is over"
        raise ExchangeError(
            f"asked to {action} round {new.round} {how}; this site was asked for round "
            f"{before[-1].round} last. If the coordinator lost its state, the site allows it with "
            "policy.allow_rollback: true"
        )
    kept = (*(one for one in before if one.round < new.round), new)[-KEPT:]
    make_directory(folder)
    write_atomic(folder / _FILE, canonical_json(found.model_copy(update={action: kept})).encode())


def _read(path: Path) -> _Asked:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return _Asked()
    except OSError as error:
        raise StoreError(f"{path}: not readable: {error}") from None
    try:
        return parse_canonical(_Asked, text, what=str(path), max_bytes=_MAX_BYTES)
    except PayloadError as error:
        raise StoreError(
            f"{error}; remove the file to accept what the coordinator asks next"
        ) from None
