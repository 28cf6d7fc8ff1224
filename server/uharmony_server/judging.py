"""An answer judged by where the federation stands: what a site may send now, and whether it did."""

from __future__ import annotations

from flwr.app import Message

from uharmony_model.errors import ExchangeError
from uharmony_model.study import Study
from uharmony_server.admission import (
    Admitted,
    Expected,
    Refusal,
    RefusalReason,
    admit,
    admit_metrics,
    norm_limit,
)
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.metrics import records_from_metrics
from uharmony_server.records import Record
from uharmony_server.replies import payload_of, refusal, refusal_of


def expected_from(study: Study, state: Checkpoint, site: str, round_: int) -> Expected:
    """What counts as an answer of this site now."""
    return Expected(
        site=site,
        study=study.digest,
        round=round_,
        base=state.digest,
        schema=state.schema,
        codec=study.codec.up,
        max_cases=study.federation.max_cases,
        norm_limit=_norm_limit(study, state),
    )


def judge_update(
    study: Study, state: Checkpoint, site: str, round_: int, reply: Message
) -> Admitted | Refusal:
    """The update that an answer carries, or why it does not count."""
    payload = payload_of(reply)
    if payload is None:
        return refusal_of(reply, site, round_)
    return admit(payload, expected_from(study, state, site, round_))


def judge_metrics(
    study: Study, state: Checkpoint, site: str, round_: int, reply: Message
) -> list[Record] | Refusal:
    """The records of what a site measured, or why they do not count."""
    payload = payload_of(reply)
    if payload is None:
        return refusal_of(reply, site, round_)
    verdict = admit_metrics(payload, expected_from(study, state, site, round_))
    if isinstance(verdict, Refusal):
        return verdict
    try:
        return records_from_metrics(study, round_, verdict)
    except ExchangeError as error:
        return refusal(site, round_, RefusalReason.WRONG_SCHEMA, str(error))


def _norm_limit(study: Study, state: Checkpoint) -> float | None:
    """Before any update was admitted, the global weights themselves are the measure."""
    bound = study.federation.norm_bound
    if state.norms:
        return norm_limit(state.norms, bound)
    return bound * max(float(state.global_.norm()), 1.0)
