"""What a site gives of its own for others to learn with, round by round, and what it is given.

    amplitude     the mean style of its training patients, with labels or without: made once
    prototypes    of the deepest features over its labelled patients: made anew for each round's
                  weights, of the same patches
    codes         mean and deviation of the style codes of the same patches as `amplitude`, by the
                  autoencoder as it came to rest: made once

Only what the site's policy names, and of enough patients. Who gives nothing says why by a code,
and receives all the same. A style is kept as a release is: two means that differ by one patient
would give that patient away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from uharmony_client.case_table import Case
from uharmony_client.code_styles import measured_codes
from uharmony_client.failures import no_room
from uharmony_client.learning import NOTHING, Given
from uharmony_client.outgoing import Outgoing
from uharmony_client.personal import local_parameters
from uharmony_client.policy import least_patients
from uharmony_client.releases import Releases
from uharmony_client.site import Site
from uharmony_client.site_round import Bench
from uharmony_client.workbench import carried_after
from uharmony_model.alignment.class_prototypes import PrototypeSum, class_members
from uharmony_model.errors import ExchangeError, StoreError, UHarmonyError
from uharmony_model.exchange.instruction import Instruction
from uharmony_model.exchange.payload import Kind, decode, encode
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.exchange.statistics import (
    PATIENTS,
    PROTOTYPE_PATCHES,
    Said,
    StatisticsForm,
    open_combined,
    patients_told,
)
from uharmony_model.features import deepest_features
from uharmony_model.inference import evaluating
from uharmony_model.patches import cut, is_foreground_patch, plan_patch, without_label
from uharmony_model.presence import with_presence
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study
from uharmony_model.unlabelled.amplitude import low_amplitude
from uharmony_model.unlabelled.study_style import style_floor
from uharmony_model.unlabelled.style_average import AMPLITUDE, StyleSum
from uharmony_model.unlabelled_settings import Statistic

STYLE_PATCHES = 8  # of each case, anywhere in it, as unlabelled patches lie

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
    return Given(combined.styles, combined.prototypes, combined.codes)


def without_own(given: Given, site: Site, form: StatisticsForm) -> Given:
    """The same without the style that this site gave itself: it teaches nothing here.

    Raises:
        StoreError: what it gave is damaged.
    """
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
    site: Site, bench: Bench, order: Instruction, form: StatisticsForm, out: Outgoing
) -> Answer:
    """What the site gives of what it is asked for; nothing that goes wrong here stops its round.

    Raises:
        StoreError, MemoryError: the machine has no room, or the ledger cannot be written.
    """
    payloads: dict[Statistic, bytes] = {}
    said: dict[Statistic, Said] = {}
    for what in order.statistics:
        try:
            said[what], data = _made(what, site, bench, order, form)
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


def _made(
    what: Statistic, site: Site, bench: Bench, order: Instruction, form: StatisticsForm
) -> tuple[Said, bytes | None]:
    if what not in site.config.policy.statistics:
        return Said.NOT_OPTED_IN, None
    if what == "prototypes":
        data = _prototypes(site, bench, order, form)
    elif what == "codes":
        data = _made_once(what, site, form, partial(_codes, site, bench, order, form))
    else:
        data = _made_once(what, site, form, partial(_amplitude, site, form))
    return (Said.TOO_FEW_PATIENTS, None) if data is None else (Said.GIVEN, data)


Patients = Mapping[str, Sequence[Case]]
Measure = Callable[[Patients, int], dict[str, Tensor]]


def _made_once(what: Statistic, site: Site, form: StatisticsForm, measure: Measure) -> bytes | None:
    """A style as it is sent: from the store where it was made; None of too few patients.

    A case that lacks a channel has no style of that one, so it is left out.
    """
    study, least = site.study, least_patients(site.config.policy, site.study)
    kept = Releases(site.config.store, study.digest)
    earlier = kept.get(what, max_bytes=form.max_bytes(what))
    if earlier is not None:
        data, manifest = earlier
        return data if patients_told(manifest.values) >= least else None
    whole = [case for case in site.split("train") if all(site.volumes[case.case].present)]
    patients = _by_patient(whole)
    if len(patients) < least:
        return None
    tensors = measure(patients, least)
    data = encode(
        kind=Kind.STATISTICS,
        study=study.digest,
        round=0,  # it belongs to no weights, so that it can be sent again as it is
        site=site.name,
        schema=form.schema(what),
        values={PATIENTS: least},
        flat=flatten(tensors, form.schema(what)),
    )
    kept.keep(what, data)
    return data


def _amplitude(
    site: Site, form: StatisticsForm, patients: Patients, least: int
) -> dict[str, Tensor]:
    assert form.style is not None  # noqa: S101 - as the study asks for it
    channels, width = form.style
    total, floor = StyleSum(channels, width), style_floor(site.study.task)
    for patient, cases in patients.items():
        for case in cases:
            image, _ = _patches(site, case, STYLE_PATCHES, labelled=False)
            total.add(patient, low_amplitude(image, width, floor=floor))
    return {AMPLITUDE: form.style_of({AMPLITUDE: total.mean(least)})}


def _codes(
    site: Site,
    bench: Bench,
    order: Instruction,
    form: StatisticsForm,
    patients: Patients,
    least: int,
) -> dict[str, Tensor]:
    """By the autoencoder of the round's weights, a code for each channel of each patch.

    Raises:
        ExchangeError: the autoencoder learns still, so that codes could not be compared later.
    """
    study = site.study
    if order.round <= study.style_rounds:
        raise ExchangeError(
            f"style codes are asked for in round {order.round}; they are given after round "
            f"{study.style_rounds}, when the autoencoder rests"
        )
    images = (
        (patient, _patches(site, case, STYLE_PATCHES, labelled=False)[0])
        for patient, cases in patients.items()
        for case in cases
    )
    draw = numpy_generator(study.seed, site.name, "codes")
    found = measured_codes(bench.network, bench.shared, images, study.task, draw, least)
    return form.codes_of(found.state()).state()


def _prototypes(site: Site, bench: Bench, order: Instruction, form: StatisticsForm) -> bytes | None:
    """Prototypes under the round's weights with what the site carries into the round."""
    study, network = site.study, bench.network
    least = least_patients(site.config.policy, study)
    data = site.training_data()
    # A case whose label may not be used is another object there.
    taught = {id(volume) for volume in data.volumes}
    patients = _by_patient([c for c in site.split("train") if id(site.volumes[c.case]) in taught])
    if len(patients) < least:
        return None
    assert form.prototypes is not None  # noqa: S101 - as the study asks for them
    carried = local_parameters(carried_after(site, order.round - 1))
    network.load_state_dict(bench.partition.merge(bench.shared, carried))
    total = PrototypeSum.zero(*form.prototypes)
    with evaluating(network), torch.no_grad():
        for cases in patients.values():
            total = total + PrototypeSum.of_patient([_piece(site, bench, case) for case in cases])
    found = total.prototypes(least)
    if not bool(found.present.any()):
        return None
    schema = form.schema("prototypes")
    return encode(
        kind=Kind.STATISTICS,
        study=study.digest,
        round=order.round,
        site=site.name,
        base=bench.base,
        schema=schema,
        values={PATIENTS: least},
        flat=flatten(form.prototypes_of(found.tensors()).tensors(), schema),
    )


def _piece(site: Site, bench: Bench, case: Case) -> tuple[Tensor, Tensor]:
    """Features (B, C, ...) of a case's patches, and which class each place is of (B, J', ...)."""
    task, device = site.study.task, next(bench.network.parameters()).device
    image, label = _patches(site, case, PROTOTYPE_PATCHES, labelled=True)
    if task.presence:
        present = torch.tensor([list(site.volumes[case.case].present)] * len(image))
        image = with_presence(image, present, task)
    domain = torch.full((len(image),), site.domains.index(case.domain), device=device)
    with deepest_features(bench.network) as seen:
        bench.network(image.to(device), domain)
    features = seen.features
    members = class_members(label.to(device), task, features.shape[2:], site.annotated)
    return features, members


def _patches(site: Site, case: Case, count: int, *, labelled: bool) -> tuple[Tensor, Tensor]:
    """Patches (count, C, D, H, W) of one case, unchanged, with their labels; always the same."""
    study, stored = site.study, site.volumes[case.case]
    volume = stored if labelled else without_label(stored)
    size = study.training.patch
    image = np.empty((count, study.task.channels, *size), dtype=np.float32)
    label = np.empty((count, *size), dtype=np.uint8)
    for number in range(count):
        draw = numpy_generator(study.seed, site.name, case.case, number, "statistics")
        aimed = labelled and is_foreground_patch(number, study.training.foreground)
        plan = plan_patch([volume], study.task, size, draw, foreground=aimed)
        cut(volume, plan.start, image[number], label[number])
    return torch.from_numpy(image), torch.from_numpy(label)


def _by_patient(cases: Sequence[Case]) -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: (case.patient, case.case)):
        found.setdefault(case.patient, []).append(case)
    return found


def _not_of(order: Instruction, got: str) -> ExchangeError:
    return ExchangeError(
        f"got {got}; the instruction for round {order.round} names {order.given[:12] or 'none'} "
        f"with weights {order.base[:12]}; send both anew"
    )
