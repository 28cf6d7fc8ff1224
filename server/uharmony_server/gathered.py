"""What sites gave and a checkpoint keeps: the newest of each, and what is handed out of it.

Where a site gives no codes, one wide style about those of the others is handed out with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from uharmony_model.alignment.class_prototypes import MEAN, PRESENT, VARIANCE, Prototypes, merged
from uharmony_model.alignment.code_style import codes_around
from uharmony_model.alignment.shared_discriminator import SharedDiscriminator, SideGradient
from uharmony_model.alignment.style_codes import CENTROIDS, SPREAD, StyleCodes
from uharmony_model.errors import StoreError
from uharmony_model.exchange.canonical import Digest
from uharmony_model.exchange.combined import MAX_STYLES, Combined
from uharmony_model.exchange.statistics import Said
from uharmony_model.frozen import Frozen
from uharmony_model.unlabelled_settings import STATISTICS, Statistic

SaidBySite = dict[str, dict[Statistic, Said]]
_TOGETHER = "discriminator/"


@dataclass(frozen=True, eq=False)
class Gathered:
    """The newest of each site: styles (C, 2b+1, 2b+1, 2b+1) or codes, prototypes, what it said.

    `gradients` are those of a round that is not closed yet; `discriminator` is what came of them.
    """

    styles: Mapping[str, Tensor] = field(default_factory=dict)
    prototypes: Mapping[str, Prototypes] = field(default_factory=dict)
    said: SaidBySite = field(default_factory=dict)
    codes: Mapping[str, StyleCodes] = field(default_factory=dict)
    gradients: Mapping[str, SideGradient] = field(default_factory=dict)
    discriminator: SharedDiscriminator | None = None

    def combined(self) -> Combined:
        """What is handed out of it."""
        # In the order of their bytes: that of the sites' names would tell whose each is.
        styles = sorted(self.styles.values(), key=lambda style: _digest(style))[:MAX_STYLES]
        together = self.merged()
        some = together is not None and bool(together.present.any())
        weights = None if self.discriminator is None else self.discriminator.weights
        return Combined(tuple(styles), together if some else None, self._codes(), weights)

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


def _digest(style: Tensor) -> str:
    return hashlib.sha256(style.contiguous().numpy().tobytes()).hexdigest()


class Facts(Frozen):
    """What the state of a checkpoint says of the file of tensors beside it."""

    sha256: Digest
    said: SaidBySite


def packed(gathered: Gathered) -> tuple[Facts, bytes]:
    """The tensors as safetensors, named KIND/SITE[/TABLE], and what is said of them.

    The discriminator is nobody's own: discriminator/TABLE/NAME. Gradients are not kept.

    Raises:
        StoreError: they cannot be written.
    """
    named = {f"amplitude/{site}": style for site, style in gathered.styles.items()}
    for site, found in gathered.prototypes.items():
        named |= {f"prototypes/{site}/{k}": tensor for k, tensor in found.tensors().items()}
    for site, codes in gathered.codes.items():
        named |= {f"codes/{site}/{k}": tensor for k, tensor in codes.state().items()}
    if gathered.discriminator is not None:
        named |= {f"{_TOGETHER}{k}": v for k, v in gathered.discriminator.tensors().items()}
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
        together = {n.removeprefix(_TOGETHER): named[n] for n in _of(named, "discriminator")}
        return Gathered(
            {site: named[f"amplitude/{site}"] for site in sites["amplitude"]},
            {site: _prototypes(named, f"prototypes/{site}") for site in sites["prototypes"]},
            facts.said,
            {site: _codes(named, f"codes/{site}") for site in sites["codes"]},
            discriminator=SharedDiscriminator.of(together) if together else None,
        )
    except (SafetensorError, KeyError) as error:
        raise StoreError(f"statistics: not readable: {error}") from None


def _of(named: Mapping[str, Tensor], kind: Statistic) -> list[str]:
    return [name for name in named if name.startswith(f"{kind}/")]


def _prototypes(named: Mapping[str, Tensor], place: str) -> Prototypes:
    return Prototypes(
        mean=named[f"{place}/{MEAN}"],
        variance=named[f"{place}/{VARIANCE}"],
        voxels=named[f"{place}/{PRESENT}"],
    )


def _codes(named: Mapping[str, Tensor], place: str) -> StyleCodes:
    centroids, spread = (named[f"{place}/{k}"].double().numpy() for k in (CENTROIDS, SPREAD))
    return StyleCodes(centroids, spread)
