"""What a site gives of its own for others to learn with, round by round, and what it is given.

Only what the site's policy names, and of enough patients (`statistic_measures`). Who gives nothing
says why by a code, and receives all the same. A style is kept as a release is: two means that
differ by one patient would give that patient away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from uharmony_client.failures import no_room
from uharmony_client.learning import NOTHING, Given
from uharmony_client.outgoing import Outgoing
from uharmony_client.releases import Releases
from uharmony_client.site import Site
from uharmony_client.site_round import Bench
from uharmony_client.statistic_measures import (
    Workplace,
    amplitude_of,
    codes_of,
    gradient_of,
    prototypes_of,
)
from uharmony_model.errors import ExchangeError, StoreError, UHarmonyError
from uharmony_model.exchange.combined import open_combined
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, Value, decode, encode
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.exchange.statistics import (
    ONCE,
    PATIENTS,
    TARGET,
    Said,
    StatisticsForm,
    patients_told,
)
from uharmony_model.study import Study
from uharmony_model.unlabelled.style_average import AMPLITUDE
from uharmony_model.unlabelled_settings import Statistic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """Payloads that have passed the gate, and by code why each statistic is given or not."""

    payloads: Mapping[Statistic, bytes]
    text: str


def given_of(
    payload: bytes | None, order: Instruction, study: Study, form: StatisticsForm
) -> Given:
    """What the federation gives for a round, from the payload that came beside the weights.

    Raises:
        ExchangeError: it is not the one that the instruction names, or holds what cannot be used.
    """
    if not order.given and payload is None:
        return NOTHING
    found = "" if payload is None else sha256(payload).hexdigest()
    if payload is None or found != order.given:
        raise _not_of(order, f"a payload of statistics {found[:12] or 'that is missing'}")
    manifest, combined = open_combined(payload, form)
    wanted = (study.digest, order.round - 1, order.base, "server")
    if (manifest.study, manifest.round, manifest.base, manifest.site) != wanted:
        raise _not_of(order, f"statistics with weights {manifest.base[:12]}")
    return Given(combined.styles, combined.prototypes, combined.codes, combined.discriminator)


def without_own(given: Given, site: Site, form: StatisticsForm) -> Given:
    """The same without the style that this site gave itself: it teaches nothing here.

    Where what it gave cannot be read any more its own style stays among them.
    """
    try:
        return _without_own(given, site, form)
    except StoreError as error:
        log.warning("the site's own style is not left out: %s", error)
        return given


def _without_own(given: Given, site: Site, form: StatisticsForm) -> Given:
    if given.styles and (own := _released("amplitude", site, form)) is not None:
        style = own[AMPLITUDE]
        return replace(given, styles=tuple(s for s in given.styles if not torch.equal(s, style)))
    if given.codes and (own := _released("codes", site, form)) is not None:
        others = (
            codes
            for codes in given.codes
            if not all(torch.equal(codes.state()[name], own[name]) for name in own)
        )
        return replace(given, codes=tuple(others))
    return given


def _released(what: Statistic, site: Site, form: StatisticsForm) -> dict[str, Tensor] | None:
    kept = Releases(site.config.store, site.study.digest)
    earlier = kept.get(what, max_bytes=form.max_bytes(what))
    if earlier is None:
        return None
    schema = form.schema(what)
    return unflatten(decode(earlier[0], kind=Kind.STATISTICS, schema=schema)[1], schema)


def statistics_answer(
    site: Site,
    bench: Bench,
    order: Instruction,
    form: StatisticsForm,
    out: Outgoing,
    given: Given = NOTHING,
) -> Answer:
    """What the site gives of what it is asked for; nothing that goes wrong here stops its round.

    `given` is what the federation gave for this round.

    Raises:
        StoreError, MemoryError: the machine has no room, or the ledger cannot be written.
    """
    payloads: dict[Statistic, bytes] = {}
    said: dict[Statistic, Said] = {}
    for what in order.statistics:
        try:
            said[what], data = _made(what, Workplace(site, bench, order, form, given))
            if data is not None:
                payloads[what] = out.payload(data, form.schema(what))
        except StoreError as error:
            if no_room(error):
                raise
            log.warning("%s not given: %s", what, error)
            said[what] = Said.DAMAGED
        except UHarmonyError as error:
            log.warning("%s not given: %s", what, error)
            said[what] = Said.NOT_USABLE
        log.info("%s: %s", what, said[what].value)
    text = out.text("statistics", order.study, order.round, json.dumps(said))
    return Answer(payloads, text)


def _made(what: Statistic, here: Workplace) -> tuple[Said, bytes | None]:
    if what not in here.site.config.policy.statistics:
        return Said.NOT_OPTED_IN, None
    data = _made_once(what, here) if what in ONCE else _made_for_round(what, here)
    return (Said.TOO_FEW_PATIENTS, None) if data is None else (Said.GIVEN, data)


def _made_once(what: Statistic, here: Workplace) -> bytes | None:
    """A style as it is sent: from the store where it was made; None of too few patients.

    A case that lacks a channel has no style of that one, so it is left out.
    """
    site, form = here.site, here.form
    kept = Releases(site.config.store, site.study.digest)
    earlier = kept.get(what, max_bytes=form.max_bytes(what))
    if earlier is not None:
        data, manifest = earlier
        return data if patients_told(manifest.values, what) >= here.least else None
    patients = here.patients(lambda case: all(site.volumes[case.case].present))
    if len(patients) < here.least:
        return None
    measured = amplitude_of(here, patients) if what == "amplitude" else codes_of(here, patients)
    data = encode(
        kind=Kind.STATISTICS,
        study=site.study.digest,
        round=0,  # it belongs to no weights, so that it can be sent again as it is
        site=site.name,
        schema=form.schema(what),
        values={PATIENTS: here.least},
        flat=flatten(measured, form.schema(what)),
    )
    kept.keep(what, data)
    return data


def _made_for_round(what: Statistic, here: Workplace) -> bytes | None:
    """What belongs to the round's weights; None of too few patients."""
    site, schema = here.site, here.form.schema(what)
    values: dict[str, Value] = {PATIENTS: here.least}
    if what == "prototypes":
        measured = prototypes_of(here)
    else:
        target = not here.taught
        measured = gradient_of(here, target=target)
        values[TARGET] = int(target)
    if measured is None:
        return None
    return encode(
        kind=Kind.STATISTICS,
        study=site.study.digest,
        round=here.order.round,
        site=site.name,
        base=here.bench.base,
        schema=schema,
        values=values,
        flat=flatten(measured, schema),
    )


def _not_of(order: Instruction, got: str) -> ExchangeError:
    return ExchangeError(
        f"got {got}; the instruction for round {order.round} names {order.given[:12] or 'none'} "
        f"with weights {order.base[:12]}; send both anew"
    )
