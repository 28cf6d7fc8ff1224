"""What a site publishes by opt-in: the form of its experts and of its prototypes on the wire.

    expert      one tensor KEY@DOMAIN for each residual of each domain
    prototype   one tensor prototype@DOMAIN (d,) for each domain, with noise
    values      patients/DOMAIN for each; epsilon and delta with prototypes

Both sides make the schema from the study and the names of the domains, which are the only thing
that a receiver takes from the sender; so their names and number are bounded here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from pydantic import TypeAdapter, ValidationError

from uharmony_model.descriptor import describe
from uharmony_model.errors import PayloadError
from uharmony_model.exchange.payload import Kind, Value, max_payload_bytes
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.exchange_settings import Publishable
from uharmony_model.initial import initial_local
from uharmony_model.networks import build_network
from uharmony_model.presence import input_channels
from uharmony_model.prototypes import PublicFrame
from uharmony_model.schedule import publication_due
from uharmony_model.study import Study
from uharmony_model.task import Name

MAX_DOMAINS = 64
PROTOTYPE = "prototype"
EPSILON, DELTA = "epsilon", "delta"
KINDS: Mapping[Publishable, Kind] = {"experts": Kind.EXPERT, "prototypes": Kind.PROTOTYPE}
_PATIENTS = "patients/"
_NAME = TypeAdapter[str](Name)


class Reason(StrEnum):
    """Why a domain of a site is published or not. Codes are stable: records hold them."""

    PUBLISHED = "published"
    NOT_OPTED_IN = "not_opted_in"  # the site's policy does not name it
    NOT_TRAINED = "not_trained"  # the site has done no round
    UNDRAWN_CLASSES = "undrawn_classes"  # an expert of a site that does not draw every class
    TOO_FEW_PATIENTS = "too_few_patients"
    TELLS_OF_ANOTHER = "tells_of_another"  # its count would give away one that is too small
    TOO_MANY_PATIENTS = "too_many_patients"  # delta must stay below one in so many
    NAME_TOO_LONG = "name_too_long"  # SITE.DOMAIN is no name


def published_name(site: str, domain: str) -> str | None:
    """How a site's domain is called outside, `SITE.DOMAIN`; None where that is no name."""
    try:
        return _NAME.validate_python(f"{site}.{domain}")
    except ValidationError:
        return None


def patient_values(patients: Mapping[str, int]) -> dict[str, Value]:
    """The numbers of training patients by domain as named values."""
    return {f"{_PATIENTS}{domain}": count for domain, count in sorted(patients.items())}


def patients_of(values: Mapping[str, Value], *, also: Iterable[str] = ()) -> dict[str, int]:
    """The numbers of patients by domain again; `also` are the other values there have to be.

    Raises:
        PayloadError: there is no domain, too many, one that is no name, a count that is no whole
            number, or another value.
    """
    names = [name for name in values if name.startswith(_PATIENTS)]
    if set(values) - set(names) != set(also) or not 1 <= len(names) <= MAX_DOMAINS:
        raise PayloadError(
            f"{len(values)} values, {len(names)} of them patients of a domain; expected "
            f"{', '.join((*also, '1'))} to {MAX_DOMAINS} domains and nothing else"
        )
    found: dict[str, int] = {}
    for name in sorted(names):
        domain, count = name.removeprefix(_PATIENTS), values[name]
        try:
            _NAME.validate_python(domain)
        except ValidationError:
            raise PayloadError(f"{ascii(domain)[:80]} is no name of a domain") from None
        if type(count) is not int:
            raise PayloadError(f"{domain}: {count!r:.40} patients, expected a whole number")
        found[domain] = count
    return found


@dataclass(frozen=True, eq=False)
class PublicationForm:
    """What a study's experts and prototypes look like.

    `residuals` are the shapes of one domain's by key; `frame` is that of its prototypes, None where
    none are asked for.
    """

    residuals: Mapping[str, tuple[int, ...]]
    frame: PublicFrame | None

    @classmethod
    def of(cls, study: Study) -> PublicationForm:
        """The form of a study that asks for a publication.

        Raises:
            ConfigError: the study's center or scale do not fit its network's descriptors.
        """
        local = initial_local(study, ("any",))
        settings = study.publication
        frame = None
        if "prototypes" in publication_due(study):
            frame = PublicFrame.of(
                descriptor_length(study),
                seed=study.seed,
                coordinates=settings.coordinates,
                center=settings.center or 0.0,
                scale=settings.scale or 1.0,
            )
        return cls({name.rpartition("@")[0]: tuple(t.shape) for name, t in local.items()}, frame)

    def schema(self, what: Publishable, domains: Iterable[str]) -> Schema:
        """The tensors of a payload with these domains."""
        shapes = self._shapes(what)
        specs = [
            TensorSpec(name=f"{key}@{domain}", shape=shape)
            for key, shape in shapes.items()
            for domain in domains
        ]
        return Schema(tensors=tuple(sorted(specs, key=lambda spec: spec.name)))

    def max_bytes(self, what: Publishable) -> int:
        """The longest payload that can be honest."""
        numbers = sum(math.prod(shape) for shape in self._shapes(what).values())
        return max_payload_bytes(None) + 4 * numbers * MAX_DOMAINS

    def _shapes(self, what: Publishable) -> Mapping[str, tuple[int, ...]]:
        if what == "experts":
            return self.residuals
        return {} if self.frame is None else {PROTOTYPE: (len(self.frame.projection),)}


def descriptor_length(study: Study) -> int:
    """Numbers of a descriptor of the study's network, from a pass of an empty volume."""
    network = build_network(study, ("any",), seed=study.seed)
    edge = 2 * (network.multiple or 1)
    return len(describe(network, torch.zeros(input_channels(study.task), edge, edge, edge)))
