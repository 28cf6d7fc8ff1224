"""What sites give for others to learn with: asked for, admitted, kept, and handed out together.

    round r    each site that has given no style yet is asked for one, for codes of styles when
               their autoencoder has come to rest; all are for prototypes
               -> admitted one by one beside the updates, the newest of each site is kept
    round r+1  styles in the order of the sites' names, without them; prototypes merged

Where a site gives no codes, one wide style about those of the others is handed out with them.
A statistic that does not count is a refusal of its own, and the update beside it counts all the
same. What is handed out depends on the checkpoint alone, so that a round that is asked again is
asked with the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from uharmony_model.alignment.class_prototypes import COUNT, MEAN, VARIANCE, Prototypes, merged
from uharmony_model.alignment.code_style import codes_around
from uharmony_model.alignment.style_codes import CENTROIDS, SPREAD, StyleCodes
from uharmony_model.errors import ExchangeError, PayloadError, StoreError
from uharmony_model.exchange.canonical import Digest
from uharmony_model.exchange.payload import Kind
from uharmony_model.exchange.schema import unflatten
from uharmony_model.exchange.statistics import (
    MAX_STYLES,
    PROTOTYPE_PATCHES,
    Combined,
    Said,
    StatisticsForm,
    encode_combined,
    patients_told,
)
from uharmony_model.frozen import Frozen
from uharmony_model.study import Study
from uharmony_model.unlabelled_settings import STATISTICS, Statistic
from uharmony_server.admission import Expected, Refusal, RefusalReason, open_expected

_MAX_SAID = 4096
_ONCE: tuple[Statistic, ...] = ("amplitude", "codes")  # made once, and asked for until given
SaidBySite = dict[str, dict[Statistic, Said]]
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


@dataclass(frozen=True, eq=False)
class Gathered:
    """The newest of each site: styles (C, 2b+1, 2b+1, 2b+1) or codes, prototypes, what it said."""

    styles: Mapping[str, Tensor] = field(default_factory=dict)
    prototypes: Mapping[str, Prototypes] = field(default_factory=dict)
    said: SaidBySite = field(default_factory=dict)
    codes: Mapping[str, StyleCodes] = field(default_factory=dict)

    def combined(self) -> Combined:
        """What is handed out of it."""
        # In the order of their bytes: that of the sites' names would tell whose each is.
        styles = sorted(self.styles.values(), key=lambda style: _digest(style))[:MAX_STYLES]
        together = self.merged()
        some = together is not None and bool(together.present.any())
        return Combined(tuple(styles), together if some else None, self._codes())

    def _codes(self) -> tuple[StyleCodes, ...]:
        given = [self.codes[site] for site in sorted(self.codes)]
        silent = any("codes" in said and site not in self.codes for site, said in self.said.items())
        found = [*given, codes_around(given)] if given and silent else given
        state = {id(codes): codes.state() for codes in found}
        ordered = sorted(found, key=lambda codes: [_digest(v) for v in state[id(codes)].values()])
        return tuple(ordered[:MAX_STYLES])

    def merged(self) -> Prototypes | None:
        """All sites' prototypes together; None where there are none."""
        given = [self.prototypes[site] for site in sorted(self.prototypes)]
        return merged(given) if given else None

    def of_next_round(self) -> Gathered:
        """Without prototypes: they belong to the weights they were made with."""
        return replace(self, prototypes={})


class Gathering:
    """The statistics of one study while its rounds run.

    A site that gives no style is asked once more only by the next process of the coordinator.
    """

    def __init__(self, study: Study) -> None:
        """For a study that asks for some.

        Raises:
            NetworkError: the study's network has no deepest level to take prototypes of.
        """
        self._study, self._due = study, study.statistics
        self._form = StatisticsForm.of(study)
        self._declined: set[str] = set()

    def asked(self, site: str, held: Gathered, round_: int = 1) -> tuple[Statistic, ...]:
        """What a site is asked for in a round."""
        rests = site in held.styles or site in held.codes or site in self._declined
        early = round_ <= self._study.style_rounds
        once = () if rests else ("amplitude", *(() if early else ("codes",)))
        return tuple(what for what in self._due if what == "prototypes" or what in once)

    def payload(self, held: Gathered, round_: int, base: str) -> bytes | None:
        """What is handed out with the weights of a round; None where nothing was given yet."""
        combined = held.combined()
        if not combined.styles and not combined.codes and combined.prototypes is None:
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
        if any(said.get(what, Said.GIVEN) is not Said.GIVEN for what in _ONCE):
            self._declined.add(site)
        held = replace(held, said={**held.said, site: {**held.said.get(site, {}), **said}})
        for what, payload in sorted(answer.payloads.items()):
            if what not in self._due:
                detail = f"{what} were not asked for"
                refusals.append(expected.refuse(RefusalReason.WRONG_KIND, detail))
                continue
            verdict = self._admit(payload, expected, what)
            if isinstance(verdict, Refusal):
                refusals.append(verdict)
                # Made once, a style would come again as it is.
                self._declined |= {site} if what in _ONCE else set()
            elif isinstance(verdict, Prototypes):
                grown = replace(held, prototypes={**held.prototypes, site: verdict})
                flaw = self._flaw_together(grown)
                if flaw is None:
                    held = grown
                else:
                    refusals.append(expected.refuse(RefusalReason.WRONG_SCHEMA, flaw))
            elif isinstance(verdict, StyleCodes):
                held = replace(held, codes={**held.codes, site: verdict})
            else:
                held = replace(held, styles={**held.styles, site: verdict})
        return held, refusals

    def _flaw_together(self, held: Gathered) -> str | None:
        """What the sites would refuse of all prototypes together, though each passes alone."""
        together = held.merged()
        assert together is not None  # noqa: S101 - one was just added
        try:
            self._form.prototypes_of(together.tensors())
        except ExchangeError as error:
            return f"prototypes, with those of the others: {error}"
        return None

    def _admit(
        self, payload: object, expected: Expected, what: Statistic
    ) -> Tensor | Prototypes | StyleCodes | Refusal:
        own = replace(expected, schema=self._form.schema(what), codec="fp32")
        if what in _ONCE:
            own = replace(own, round=0, base="")  # it is made once, before or after any weights
        opened = open_expected(payload, own, Kind.STATISTICS)
        if isinstance(opened, Refusal):
            return expected.refuse(opened.reason, f"{what}: {opened.detail}")
        manifest, flat = opened
        least, most = self._study.unlabelled.min_patients, expected.max_cases
        try:
            patients = patients_told(manifest.values)
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
            found = self._form.prototypes_of(tensors)
        except ExchangeError as error:
            return expected.refuse(RefusalReason.WRONG_SCHEMA, f"{what}: {error}")
        voxels = most * PROTOTYPE_PATCHES * math.prod(self._study.training.patch)
        if float(found.voxels.max()) > voxels:
            detail = f"{what}: a class of more than {voxels} voxels, which no patches hold"
            return expected.refuse(RefusalReason.WRONG_SCHEMA, detail)
        return found


def _digest(style: Tensor) -> str:
    return hashlib.sha256(style.contiguous().numpy().tobytes()).hexdigest()


class Facts(Frozen):
    """What the state of a checkpoint says of the file of tensors beside it."""

    sha256: Digest
    said: SaidBySite


def packed(gathered: Gathered) -> tuple[Facts, bytes]:
    """The tensors as safetensors, named KIND/SITE[/TABLE], and what is said of them.

    Raises:
        StoreError: they cannot be written.
    """
    named = {f"amplitude/{site}": style for site, style in gathered.styles.items()}
    for site, found in gathered.prototypes.items():
        named |= {f"prototypes/{site}/{k}": tensor for k, tensor in found.tensors().items()}
    for site, codes in gathered.codes.items():
        named |= {f"codes/{site}/{k}": tensor for k, tensor in codes.state().items()}
    try:
        data = save({name: named[name].contiguous() for name in sorted(named)})
    except (SafetensorError, RuntimeError) as error:
        raise StoreError(f"statistics: not written: {error}") from None
    return Facts(sha256=hashlib.sha256(data).hexdigest(), said=gathered.said), data


def unpacked(data: bytes, facts: Facts) -> Gathered:
    """The same again.

    Raises:
        StoreError: the bytes are not those that were written.
    """
    if hashlib.sha256(data).hexdigest() != facts.sha256:
        raise StoreError("the statistics differ from their digest")
    try:
        named = load(data)
        sites = {kind: sorted({n.split("/")[1] for n in _of(named, kind)}) for kind in STATISTICS}
        return Gathered(
            {site: named[f"amplitude/{site}"] for site in sites["amplitude"]},
            {site: _prototypes(named, f"prototypes/{site}") for site in sites["prototypes"]},
            facts.said,
            {site: _codes(named, f"codes/{site}") for site in sites["codes"]},
        )
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"statistics: not readable: {error}") from None


def _of(named: Mapping[str, Tensor], kind: Statistic) -> list[str]:
    return [name for name in named if name.startswith(f"{kind}/")]


def _prototypes(named: Mapping[str, Tensor], place: str) -> Prototypes:
    return Prototypes(
        mean=named[f"{place}/{MEAN}"],
        variance=named[f"{place}/{VARIANCE}"],
        voxels=named[f"{place}/{COUNT}"],
    )


def _codes(named: Mapping[str, Tensor], place: str) -> StyleCodes:
    centroids, spread = (named[f"{place}/{k}"].double().numpy() for k in (CENTROIDS, SPREAD))
    return StyleCodes(centroids, spread)
