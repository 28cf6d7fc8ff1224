"""What sites give for others to learn with: asked for, admitted, kept, and handed out together.

    round r    each site that has given no style yet is asked for one, for codes of styles when
               their autoencoder has come to rest; all are for prototypes, or for a gradient
               -> admitted one by one beside the updates, the newest of each site is kept
    round r+1  styles without the sites' names; prototypes merged; the discriminator a step on

A statistic that does not count is a refusal of its own, and the update beside it counts all the
same. What is handed out depends on the checkpoint alone, so that a round that is asked again is
asked with the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from uharmony_model.alignment.class_prototypes import Prototypes
from uharmony_model.alignment.shared_discriminator import SharedDiscriminator, SideGradient
from uharmony_model.alignment.style_codes import StyleCodes
from uharmony_model.errors import ExchangeError, PayloadError
from uharmony_model.exchange.combined import encode_combined
from uharmony_model.exchange.payload import Kind
from uharmony_model.exchange.schema import unflatten
from uharmony_model.exchange.statistics import (
    ONCE,
    TARGET,
    Said,
    StatisticsForm,
    patients_told,
)
from uharmony_model.study import Study
from uharmony_model.unlabelled_settings import Statistic
from uharmony_server.admission import Expected, Refusal, RefusalReason, open_expected
from uharmony_server.gathered import Gathered

_MAX_SAID = 4096
Judged = Tensor | Prototypes | StyleCodes | SideGradient
_SAID: TypeAdapter[dict[Statistic, Said]] = TypeAdapter(dict[Statistic, Said])


@dataclass(frozen=True)
class Answer:
    """What a site sent, before it is judged: payloads by kind, and its codes as text."""

    payloads: Mapping[Statistic, bytes]
    said: str

    @property
    def bytes(self) -> int:
        """What its payloads weigh."""
        return sum(map(len, self.payloads.values()))


class Gathering:
    """The statistics of one study while its rounds run.

    A site that gives no style is asked once more only by the next process of the coordinator.
    """

    def __init__(self, study: Study) -> None:
        """For a study that asks for some.

        Raises:
            NetworkError: the study's network has no deepest level to take features of.
        """
        self._study, self._due = study, study.statistics
        self._form = StatisticsForm.of(study)
        self._declined: set[str] = set()

    def asked(self, site: str, held: Gathered, round_: int = 1) -> tuple[Statistic, ...]:
        """What a site is asked for in a round."""
        rests = site in held.styles or site in held.codes or site in self._declined
        early = round_ <= self._study.style_rounds
        once = () if rests else ("amplitude", *(() if early else ("codes",)))
        return tuple(what for what in self._due if what not in ONCE or what in once)

    def payload(self, held: Gathered, round_: int, base: str) -> bytes | None:
        """What is handed out with the weights of a round; None where nothing was given yet."""
        combined = held.combined()
        if combined.empty:
            return None
        return encode_combined(
            combined, self._form, study=self._study.digest, round_=round_, base=base
        )

    def take(
        self, held: Gathered, answer: Answer, expected: Expected
    ) -> tuple[Gathered, list[Refusal]]:
        """Judge what a site gives and add what counts; nothing that it holds raises an error."""
        try:
            said = _SAID.validate_json(answer.said[:_MAX_SAID])
        except ValidationError:
            detail = "what it says of its statistics cannot be read"
            return held, [expected.refuse(RefusalReason.DAMAGED, detail)]
        site, refusals = expected.site, []
        held = replace(held, said={**held.said, site: {**held.said.get(site, {}), **said}})
        for what, payload in sorted(answer.payloads.items()):
            if what not in self._due:
                detail = f"{what} were not asked for"
                refusals.append(expected.refuse(RefusalReason.WRONG_KIND, detail))
                continue
            verdict = self._admit(payload, expected, what)
            if isinstance(verdict, Refusal):
                refusals.append(verdict)
            elif isinstance(verdict, Prototypes):
                held = replace(held, prototypes={**held.prototypes, site: verdict})
            elif isinstance(verdict, StyleCodes):
                held = replace(held, codes={**held.codes, site: verdict})
            elif isinstance(verdict, SideGradient):
                held = replace(held, gradients={**held.gradients, site: verdict})
            else:
                held = replace(held, styles={**held.styles, site: verdict})
        return held, refusals

    def closed(self, held: Gathered) -> Gathered:
        """At the end of a round that counts: the discriminator takes its step; no gradient is kept.

        Who was asked for a style and is not among those that gave one is not asked again: it would
        say the same, or its style, made once, would be refused as it was.
        """
        asked = {site for site, said in held.said.items() if any(what in ONCE for what in said)}
        self._declined |= asked - held.styles.keys() - held.codes.keys()
        if self._form.discriminator is None:
            return held
        before = held.discriminator
        if before is None:
            before = SharedDiscriminator.first(self._form.discriminator, self._study.seed)
        # In the order of the sites' names, so that the sum is the same to the bit.
        after = before.stepped([held.gradients[site] for site in sorted(held.gradients)])
        return replace(held, gradients={}, discriminator=after if after.steps else None)

    def _admit(self, payload: object, expected: Expected, what: Statistic) -> Judged | Refusal:
        own = replace(expected, schema=self._form.schema(what), codec="fp32")
        if what in ONCE:
            own = replace(own, round=0, base="")  # it is made once, before or after any weights
        opened = open_expected(payload, own, Kind.STATISTICS)
        if isinstance(opened, Refusal):
            return expected.refuse(opened.reason, f"{what}: {opened.detail}")
        manifest, flat = opened
        least, most = self._study.unlabelled.min_patients, expected.max_cases
        try:
            patients = patients_told(manifest.values, what)
        except PayloadError as error:
            return expected.refuse(RefusalReason.BAD_CASE_COUNT, f"{what}: {error}")
        if not least <= patients <= most:
            detail = f"{what}: of {patients} patients, expected {least} to {most}"
            return expected.refuse(RefusalReason.BAD_CASE_COUNT, detail)
        if not bool(torch.isfinite(flat).all()):
            detail = f"{what}: NaN or infinite numbers"
            return expected.refuse(RefusalReason.NOT_FINITE, detail)
        # Copied: a view would keep the whole payload, and tensors are stored apart.
        tensors = {k: t.clone() for k, t in unflatten(flat, self._form.schema(what)).items()}
        try:
            if what == "amplitude":
                return self._form.style_of(tensors)
            if what == "codes":
                return self._form.codes_of(tensors)
            if what == "discriminator":
                gradient = self._form.discriminator_of(tensors)
                return SideGradient(gradient, target=bool(manifest.values[TARGET]))
            return self._form.prototypes_of(tensors)
        except ExchangeError as error:
            return expected.refuse(RefusalReason.WRONG_SCHEMA, f"{what}: {error}")
