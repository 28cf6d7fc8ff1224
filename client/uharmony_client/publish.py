"""What a site publishes when it is asked, after everything else: its experts and prototypes.

Only what the study asks for and the site's own policy allows, of domains with enough patients,
once. Experts are the residuals as they stand after the last round. Prototypes are means over
patients (one row a patient) of descriptors under the last shared weights, with noise: they are
(epsilon, delta)-private given those weights; for experts no privacy is claimed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uharmony_client.personal import local_parameters
from uharmony_client.policy import Policy
from uharmony_client.releases import Releases
from uharmony_client.site import Site
from uharmony_client.site_round import Bench
from uharmony_client.small_cells import withheld
from uharmony_client.workbench import carried_after
from uharmony_model.descriptor import Vector, describe
from uharmony_model.errors import ExchangeError, NetworkError
from uharmony_model.exchange.payload import Value, encode
from uharmony_model.exchange.published import (
    DELTA,
    EPSILON,
    KINDS,
    PROTOTYPE,
    PublicationForm,
    Reason,
    patient_values,
    patients_of,
    published_name,
)
from uharmony_model.exchange.schema import Schema, flatten
from uharmony_model.exchange_settings import Publication, Publishable
from uharmony_model.presence import with_presence
from uharmony_model.prototypes import MIN_PATIENTS, PublicFrame, release_prototype
from uharmony_model.schedule import publication_due, publication_round
from uharmony_model.segmentation_network import SegmentationNetwork

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """One sealed payload with its schema."""

    what: Publishable
    data: bytes
    schema: Schema


@dataclass(frozen=True)
class Answer:
    """What leaves, and for all that was asked why it does or does not, by code."""

    releases: tuple[Release, ...]
    said: Mapping[Publishable, tuple[Reason, ...]]


def publish(site: Site, bench: Bench) -> Answer:
    """Make what the site publishes, or take it from the store when it was published before.

    Raises:
        ExchangeError: the site has published for this study from other weights.
        StoreError: a release is damaged, or the disk is full.
    """
    study, policy = site.study, site.config.policy
    form = PublicationForm.of(study)
    kept = Releases(site.config.store, study.digest)
    releases: list[Release] = []
    said: dict[Publishable, tuple[Reason, ...]] = {}
    for what in publication_due(study):
        if what not in policy.publish:
            said[what] = (Reason.NOT_OPTED_IN,)
            continue
        earlier = kept.get(what, max_bytes=form.max_bytes(what))
        if earlier is not None:
            data, manifest = earlier
            if manifest.base != bench.base:
                raise ExchangeError(
                    f"{what} were published from weights {manifest.base[:12]}, asked for "
                    f"{bench.base[:12]}; a study has one release: start a new study"
                )
            also = (EPSILON, DELTA) if what == "prototypes" else ()
            domains = patients_of(manifest.values, also=also)
            releases.append(Release(what, data, form.schema(what, domains)))
            said[what] = (Reason.PUBLISHED,)
            continue
        reasons = reasons_of(site, what)
        said[what] = tuple(sorted(set(reasons.values())))
        for domain, reason in reasons.items():
            log.info("%s of domain %s: %s", what, domain, reason.value)
        patients = {
            domain: count
            for domain, count in patients_by_domain(site).items()
            if reasons[domain] is Reason.PUBLISHED
        }
        if patients:
            made = _made(site, bench, form, what, patients)
            kept.keep(what, made.data)
            releases.append(made)
    return Answer(tuple(releases), said)


def patients_by_domain(site: Site) -> dict[str, int]:
    """Different patients among the training cases of each of the site's domains."""
    found: dict[str, set[str]] = {domain: set() for domain in site.domains}
    for case in site.split("train"):
        found[case.domain].add(case.patient)
    return {domain: len(patients) for domain, patients in found.items()}


def reasons_of(site: Site, what: Publishable) -> dict[str, Reason]:
    """Why each domain is published or not, where the policy allows it."""
    # A site that came for the finale has a model, and no residuals that others have learned with.
    if not site.store.newest(site.study.digest, up_to=site.study.training.rounds):
        return dict.fromkeys(site.domains, Reason.NOT_TRAINED)
    # Its residuals have forgotten the other classes, and a mixture could not tell which.
    if what == "experts" and not bool(site.annotated.all()):
        return dict.fromkeys(site.domains, Reason.UNDRAWN_CLASSES)
    return domain_reasons(
        site.name, patients_by_domain(site), what, site.study.publication, site.config.policy
    )


def domain_reasons(
    site: str,
    patients: Mapping[str, int],
    what: Publishable,
    settings: Publication,
    policy: Policy,
) -> dict[str, Reason]:
    """The same from the numbers of patients.

    The total of a site's training cases may be known. So where one small number alone is missing
    from it, the next smallest domain stays too, as with all numbers that leave.
    """
    least = max(MIN_PATIENTS, settings.min_patients, policy.min_cases)
    told = withheld(patients, policy.min_cases)
    reasons = {}
    for domain, count in patients.items():
        if count < least:
            reason = Reason.TOO_FEW_PATIENTS
        elif domain in told:
            reason = Reason.TELLS_OF_ANOTHER
        elif what == "prototypes" and settings.delta * count >= 1:
            reason = Reason.TOO_MANY_PATIENTS
        elif published_name(site, domain) is None:
            reason = Reason.NAME_TOO_LONG
        else:
            reason = Reason.PUBLISHED
        reasons[domain] = reason
    return reasons


def _made(
    site: Site,
    bench: Bench,
    form: PublicationForm,
    what: Publishable,
    patients: Mapping[str, int],
) -> Release:
    study, schema = site.study, form.schema(what, patients)
    carried = local_parameters(carried_after(site, study.training.rounds))
    values: dict[str, Value] = patient_values(patients)
    if what == "experts":
        names = {spec.name for spec in schema.tensors}
        tensors = {name: tensor for name, tensor in carried.items() if name in names}
    else:
        bench.network.load_state_dict(bench.partition.merge(bench.shared, carried))
        assert form.frame is not None  # noqa: S101 - as prototypes are asked for
        tensors = _prototypes(site, bench, form.frame, patients)
        settings = study.publication
        values |= {EPSILON: settings.epsilon, DELTA: settings.delta}
    data = encode(
        kind=KINDS[what],
        study=study.digest,
        round=publication_round(study),
        site=site.name,
        base=bench.base,
        schema=schema,
        values=values,
        flat=flatten(tensors, schema),
    )
    return Release(what, data, schema)


def _prototypes(
    site: Site, bench: Bench, frame: PublicFrame, patients: Mapping[str, int]
) -> dict[str, Tensor]:
    network, settings = bench.network, site.study.publication
    if not isinstance(network, SegmentationNetwork):
        raise NetworkError(f"{type(network).__name__}: no network that can be described")
    network.eval()
    found = {}
    for domain in patients:
        rows: dict[str, list[Vector]] = {}
        for case in site.split("train"):
            if case.domain == domain:
                rows.setdefault(case.patient, []).append(_descriptor(site, network, case.case))
        released = release_prototype(
            domain,
            frame.rows(np.stack([np.mean(of_one, axis=0) for of_one in rows.values()])),
            epsilon=settings.epsilon,
            delta=settings.delta,
        )
        # The grid that it is rounded to is coarse enough for float32.
        found[f"{PROTOTYPE}@{domain}"] = torch.tensor(released.mean, dtype=torch.float32)
    return found


def _descriptor(site: Site, network: SegmentationNetwork, case: str) -> Vector:
    volume, study = site.volumes[case], site.study
    image = torch.from_numpy(np.array(volume.image))[None]
    seen = with_presence(image, [list(volume.present)], study.task)[0]
    return describe(network, seen, window=study.training.patch)
