"""What would leave in a round, made for real and sent nowhere: networking is blocked meanwhile.

The first round's update is trained from the study's initial weights, exactly as the service does
it, and described down to the SHA-256 of every tensor. Nothing is stored.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from uharmony_client.finale_plan import learning_view
from uharmony_client.learning import objective_of
from uharmony_client.ledger import tensor_facts
from uharmony_client.ledger_entry import TensorFact
from uharmony_client.local_train import train_round
from uharmony_client.outgoing import Outgoing
from uharmony_client.policy import (
    STARTED_FROM,
    apply_policy,
    require_allowed,
    statistics_view,
)
from uharmony_client.site import Site
from uharmony_client.site_round import values_of
from uharmony_client.workbench import Workbench
from uharmony_model.exchange.payload import Kind, Value, decode, digest, encode
from uharmony_model.initial import initial_local, initial_weights


@dataclass(frozen=True)
class DryRun:
    """An update as it would be sent: `bytes` and `sha256` are of the buffer on the wire.

    `steps` is how many were trained, on so many `labelled` and `unlabelled` cases; 0 where the
    study finds nothing to learn from, and the update is then zero. When `all_steps` were trained,
    from the same initial weights, the first round sends exactly this update. `learns` says what
    the study learns from here, `statistics` what the round would send beside it. `stays` names
    the tensors that never leave the site.
    """

    site: str
    study: str
    base: str
    steps: int
    all_steps: bool
    labelled: int
    unlabelled: int
    learns: str
    statistics: str
    bytes: int
    sha256: str
    codec: str
    tensors: tuple[TensorFact, ...]
    values: dict[str, Value]
    stays: tuple[str, ...]

    def to_json(self) -> str:
        """The same for machines."""
        fields: dict[str, Any] = asdict(self)
        fields["tensors"] = [fact.model_dump() for fact in self.tensors]
        return json.dumps(fields, indent=1, sort_keys=True, allow_nan=False)


def dry_run(site: Site, steps: int | None = None) -> DryRun:
    """Train one update from the initial weights and describe it; `steps` makes it shorter.

    Raises:
        ConfigError: the study asks for more than the site's policy allows.
        TrainingError: the loss is not finite.
    """
    study, policy = site.study, site.config.policy
    require_allowed(policy, study)
    count = study.training.local_steps if steps is None else steps
    shorter = study.training.model_copy(update={"local_steps": count})
    with no_network():
        network, partition = Workbench().network(study, site.domains, site.device)
        schema, base = initial_weights(study)
        data = site.training_data()
        result = train_round(
            network,
            data,
            study=study.model_copy(update={"training": shorter}),
            partition=partition,
            base=base,
            before=initial_local(study, site.domains),
            round_=1,
        )
        update = encode(
            kind=Kind.UPDATE,
            study=study.digest,
            round=1,
            site=site.name,
            base=digest(base),
            codec=study.codec.up,
            schema=schema,
            values={**values_of(result, data, study, policy), STARTED_FROM: 0},
            flat=apply_policy(result.update, policy),
        )
        sent = Outgoing(None, policy).payload(update, schema)
        manifest, flat = decode(sent, kind=Kind.UPDATE, schema=schema)
    return DryRun(
        site=site.name,
        study=study.digest,
        base=manifest.base,
        steps=0 if objective_of(data, study) is None else count,
        all_steps=count == study.training.local_steps,
        labelled=len(data.volumes),
        unlabelled=len(data.unlabelled),
        learns=learning_view(study, labelled=bool(data.volumes)),
        statistics=statistics_view(policy, study),
        bytes=len(sent),
        sha256=hashlib.sha256(sent).hexdigest(),
        codec=manifest.codec,
        tensors=tensor_facts(flat, schema),
        values=dict(manifest.values),
        stays=tuple(sorted(result.local)),
    )


class NetworkUsedError(RuntimeError):
    """Something tried to reach a network while it was blocked: a defect, never a finding."""


def _refuse(*_: object, **__: object) -> NoReturn:
    raise NetworkUsedError("a dry run uses no network; please report this")


class _NoSocket(socket.socket):
    """Stands in for `socket.socket`: a class still, as others derive from it."""

    def __init__(self, *_: object, **__: object) -> None:
        _refuse()


@contextmanager
def no_network() -> Iterator[None]:
    """Within this block no socket can be made, connected or used to look up a name."""
    original = socket.socket
    with ExitStack() as stack:
        stack.enter_context(_replaced(socket, "socket", _NoSocket))
        for name in ("create_connection", "getaddrinfo"):
            stack.enter_context(_replaced(socket, name, _refuse))
        for name in ("connect", "connect_ex", "sendto"):  # for those who took the class before
            stack.enter_context(_replaced(original, name, _refuse))
        yield


@contextmanager
def _replaced(owner: object, name: str, stand_in: object) -> Iterator[None]:
    own = name in vars(owner)
    kept = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, kept)
        else:
            delattr(owner, name)


def render(found: DryRun) -> RenderableType:
    """The same for people: what would leave, what stays."""
    table = Table(title=f"What would leave {found.site} in a round")
    for name in ("tensor", "type", "shape", "bytes", "SHA-256"):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    for fact in found.tensors:
        shape = " x ".join(map(str, fact.shape)) or "1"
        cells = (fact.name, fact.dtype, shape, f"{fact.bytes:,}", fact.sha256[:16])
        table.add_row(*map(Text, cells))
    values = ", ".join(f"{name} = {_shown(value)}" for name, value in found.values.items())
    whole = "the first round sends exactly this" if found.all_steps else "shorter than a round"
    lines = (
        f"{len(found.tensors)} tensors, {found.bytes:,} bytes as sent ({found.codec}), "
        f"SHA-256 {found.sha256}",
        f"values: {values}",
        f"made in {found.steps} steps from base {found.base[:16]}; {whole}",
        _learned(found),
        f"statistics beside it: {found.statistics}",
        f"stays here: {len(found.stays)} tensors ({_some(found.stays)})",
    )
    return Group(table, *map(Text, lines))


def _learned(found: DryRun) -> str:
    """From which cases, and that they may have taught nothing."""
    nothing = "" if found.steps else "nothing was trained, every number is 0: "
    cases = f"training cases taken with a label {found.labelled}, without {found.unlabelled}"
    return f"{nothing}{cases}; the study learns from {found.learns}"


def _shown(value: Value) -> str:
    return "not told" if value is None else str(value)


def _some(names: tuple[str, ...], most: int = 8) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
