"""What sites published by opt-in: gathered once, kept with the checkpoint, handed out.

A site's answer is admitted kind by kind; what does not count is a refusal with its reason, and
the others go on. An expert and a prototype of one domain have one name, SITE.DOMAIN.

The limit beyond which a volume is refused comes from released prototypes alone, so it tells no
more of patients than they do: no prototype has its nearest neighbour farther away,

    limit = (1 + margin) * max_j min_{k != j} ||p_j - p_k||
    familiar = 1/2 * max_j min_{k != j} ||p_j - p_k||           half-way to another domain at most

Both are ours and crude: they say how far the domains are apart and not how wide they are, and how
often they are wrong is not known. The limit of `uharmony_model.abstention` would need the patients'
own distances, which have no privacy claim; so they stay at the sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from uharmony_model.abstention import MARGIN, AbstentionLimit
from uharmony_model.errors import ConfigError, PartitionError, StoreError
from uharmony_model.exchange.published import (
    PROTOTYPE,
    PublicationForm,
    Reason,
    published_name,
)
from uharmony_model.exchange.schema import unflatten
from uharmony_model.exchange_settings import Publishable
from uharmony_model.prototypes import Prototype, noise_deviation, publishable, stacked_means
from uharmony_model.publication import (
    Frame,
    Prototypes,
    Publication,
    SiteExperts,
    write_publication,
)
from uharmony_model.schedule import publication_due
from uharmony_model.study import Study
from uharmony_server.admission import (
    AdmittedRelease,
    Expected,
    Refusal,
    RefusalReason,
    admit_release,
)

_MAX_SAID = 4096
Said = Mapping[Publishable, tuple[Reason, ...]]
_SAID: TypeAdapter[dict[Publishable, tuple[Reason, ...]]] = TypeAdapter(
    dict[Publishable, tuple[Reason, ...]]
)


@dataclass(frozen=True)
class Answer:
    """What a site sent, before it is judged: payloads by kind, and its codes as text."""

    payloads: Mapping[str, bytes]
    said: str


@dataclass(frozen=True, eq=False)
class Published:
    """What is known so far: `said` by site, experts by site, prototypes named SITE.DOMAIN."""

    said: Mapping[str, Said] = field(default_factory=dict)
    experts: Mapping[str, SiteExperts] = field(default_factory=dict)
    prototypes: tuple[Prototype, ...] = ()


def take(
    published: Published, answer: Answer, expected: Expected, study: Study, form: PublicationForm
) -> tuple[Published, list[Refusal]]:
    """Judge one site's answer and add what counts; nothing that it holds raises an error."""
    site = expected.site
    try:
        said = _SAID.validate_json(answer.said[:_MAX_SAID])
    except ValidationError:
        detail = "does not say by codes what it publishes and what not"
        return published, [expected.refuse(RefusalReason.DAMAGED, detail)]
    published = replace(published, said={**published.said, site: said})
    refusals = []
    for what, payload in sorted(answer.payloads.items()):
        if what not in publication_due(study):
            detail = f"{what!r:.40} were not asked for"
            refusals.append(expected.refuse(RefusalReason.WRONG_KIND, detail))
            continue
        kind: Publishable = "experts" if what == "experts" else "prototypes"
        verdict = admit_release(payload, expected, kind, study.publication, form)
        if not isinstance(verdict, Refusal):
            verdict = _misnamed(published, verdict, kind, expected) or verdict
        if isinstance(verdict, Refusal):
            refusals.append(verdict)
        elif kind == "experts":
            found = SiteExperts(verdict.patients, unflatten(verdict.flat.clone(), verdict.schema))
            published = replace(published, experts={**published.experts, site: found})
        else:
            made = _prototypes(verdict, study)
            published = replace(published, prototypes=(*published.prototypes, *made))
    return published, refusals


def publication_of(published: Published, study: Study, form: PublicationForm) -> Publication:
    """What is handed out: experts, and the prototypes that their noise does not hide."""
    prototypes = None
    kept = _worth_it(published.prototypes)
    if kept and form.frame is not None:
        prototypes = Prototypes(
            frame=frame_of(study, form), prototypes=kept, abstention=abstention_limit(kept)
        )
    return Publication(experts=dict(published.experts), prototypes=prototypes)


def hand_out(folder: Path, published: Published | None, study: Study) -> None:
    """Write what was published beside the model in `folder`; nothing where nothing was.

    Raises:
        StoreError: the folder cannot be written, or what was kept cannot be handed out.
    """
    if published is None or not (published.experts or published.prototypes):
        return
    try:
        found = publication_of(published, study, PublicationForm.of(study))
        write_publication(folder, found)
    except (ConfigError, PartitionError) as error:
        raise StoreError(f"{folder}: publication not written: {error}") from None


def abstention_limit(prototypes: Sequence[Prototype]) -> AbstentionLimit | None:
    """The limit from released prototypes; None for a single one, which has no neighbour."""
    if len(prototypes) < 2:
        return None
    means = stacked_means(prototypes)
    apart = np.linalg.norm(means[:, None] - means, axis=-1)
    np.fill_diagonal(apart, np.inf)
    farthest = float(apart.min(1).max())
    return AbstentionLimit(limit=(1 + MARGIN) * farthest, margin=MARGIN, familiar=farthest / 2)


def frame_of(study: Study, form: PublicationForm) -> Frame:
    """The study's frame as it is written down."""
    settings = study.publication
    assert form.frame is not None  # noqa: S101 - as prototypes were asked for
    return Frame(
        dimension=len(form.frame.center),
        seed=study.seed,
        coordinates=settings.coordinates,
        center=settings.center or (0.0,),
        scale=settings.scale or (1.0,),
    )


def _misnamed(
    published: Published, release: AdmittedRelease, what: Publishable, expected: Expected
) -> Refusal | None:
    """SITE.DOMAIN must be a name, and no other site's."""
    if what == "experts":
        taken = {
            published_name(site, domain)
            for site, found in published.experts.items()
            for domain in found.patients
        }
    else:
        taken = {prototype.domain for prototype in published.prototypes}
    for domain in release.patients:
        name = published_name(release.site, domain)
        if name is None:
            detail = f"{release.site}.{domain} is no name of at most 64 characters"
            return expected.refuse(RefusalReason.WRONG_SCHEMA, detail)
        if name in taken:
            detail = f"{name} is the name of what another site published"
            return expected.refuse(RefusalReason.DUPLICATE, detail)
    return None


def _prototypes(release: AdmittedRelease, study: Study) -> tuple[Prototype, ...]:
    settings = study.publication
    rows = unflatten(release.flat, release.schema)
    return tuple(
        Prototype(
            domain=f"{release.site}.{domain}",
            mean=tuple(rows[f"{PROTOTYPE}@{domain}"].double().tolist()),
            patients=count,
            noise=noise_deviation(count, epsilon=settings.epsilon, delta=settings.delta),
            epsilon=settings.epsilon,
            delta=settings.delta,
        )
        for domain, count in sorted(release.patients.items())
    )


def _worth_it(prototypes: Sequence[Prototype]) -> tuple[Prototype, ...]:
    """Those that are told apart in spite of their noise; the noisiest goes first.

    Judged all at once, one small site would hide all others. One alone would be the nearest to
    every volume, and there is no limit beyond which a volume is refused; so then there is none.
    """
    kept = list(prototypes)
    while kept and not all(publishable(kept)):
        kept.remove(max(kept, key=lambda prototype: prototype.noise_norm))
    return () if len(kept) < 2 else tuple(kept)
