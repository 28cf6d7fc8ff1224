"""What a Flower message from a site says: a payload, a hello, or why it says nothing."""

from __future__ import annotations

import json

from flwr.app import ArrayRecord, Message
from pydantic import ValidationError

from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.hello import Hello
from uharmony_model.exchange.instruction import Receipt
from uharmony_model.exchange_settings import PUBLISHABLE
from uharmony_model.unlabelled_settings import STATISTICS
from uharmony_server.admission import Refusal, RefusalReason
from uharmony_server.publication import Answer
from uharmony_server.statistics import Answer as StatisticsAnswer

MAX_TEXT = 4096  # characters of a hello or a refusal; deep nesting needs more


def refusal(site: str, round_: int, reason: RefusalReason, detail: str) -> Refusal:
    """An answer that does not count, on one line."""
    return Refusal(site=site, round=round_, reason=reason, detail=detail)


def payload_of(reply: Message, name: str = "payload") -> bytes | None:
    """The payload bytes of an answer, or None when it carries none."""
    if not reply.has_content() or name not in reply.content:
        return None
    record = reply.content[name]
    if not isinstance(record, ArrayRecord) or set(record) != {"payload"}:
        return None
    return record["payload"].data


def publication_of(reply: Message) -> Answer | None:
    """What a site publishes and what it says of it, or None when it says nothing."""
    if not reply.has_content() or "publication" not in reply.content:
        return None
    try:
        said = str(reply.content["publication"]["json"])
    except (KeyError, TypeError):
        return None
    found = {name: payload_of(reply, name) for name in PUBLISHABLE}
    return Answer({name: data for name, data in found.items() if data is not None}, said)


def statistics_of(reply: Message) -> StatisticsAnswer | None:
    """What a site gives of statistics and what it says of them, or None when it says nothing."""
    if not reply.has_content() or "statistics" not in reply.content:
        return None
    try:
        said = str(reply.content["statistics"]["json"])
    except (KeyError, TypeError):
        return None
    found = {name: payload_of(reply, name) for name in STATISTICS}
    return StatisticsAnswer({k: data for k, data in found.items() if data is not None}, said)


def refusal_of(reply: Message, site: str, round_: int) -> Refusal:
    """Why a site sent no payload: its own reason, or Flower's error."""
    return refusal(site, round_, RefusalReason.SITE_ERROR, _why(reply))


def _why(reply: Message) -> str:
    if reply.has_error():
        return f"error {reply.error.code}: {reply.error.reason}"
    if "refusal" not in reply.content:
        return "an answer without content"
    try:
        text = str(reply.content["refusal"]["json"])
        return str(json.loads(text[:MAX_TEXT])["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "a refusal that cannot be read"


def ledger_head_of(reply: Message) -> Receipt | None:
    """The head of the site's ledger when it sent this answer; None when it says none."""
    if not reply.has_content() or "ledger" not in reply.content:
        return None
    try:
        return Receipt.model_validate_json(str(reply.content["ledger"]["json"])[:MAX_TEXT])
    except (ValidationError, KeyError):
        return None


def hello_of(reply: Message) -> Hello:
    """Who a site says it is and what it agreed to.

    Raises:
        ExchangeError: the answer carries no hello, or one that cannot be read.
    """
    if not reply.has_content() or "hello" not in reply.content:
        raise ExchangeError(f"no hello: {_why(reply)}")
    try:
        return Hello.model_validate_json(str(reply.content["hello"]["json"])[:MAX_TEXT])
    except (ValidationError, KeyError):
        raise ExchangeError("a hello that cannot be read; install the same version") from None
