"""Which local-only model an arm is compared with: the one of its own training.

Arms of one study may differ in rounds, steps or rates. What a site gains by taking part then shows
only against a site alone under the same settings, and those are what `Study.with_method("local")`
leaves of an arm's settings.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from uharmony_model.study import Study
from uharmony_server.summary import LOCAL

Regimes = Mapping[str, str | None]


@dataclass(frozen=True)
class Alone:
    """The arm that stands for training alone; without `same_settings` it had other settings."""

    arm: str
    same_settings: bool = True

    @property
    def shown(self) -> str:
        """The arm's name, and what a reader must know of it."""
        return self.arm if self.same_settings else f"{self.arm}, other settings"


def local_of_regime(studies: Mapping[str, Study]) -> dict[str, str | None]:
    """For the study of every arm the local-only arm with the same settings; None without one.

    `studies` are of one seed and fold. Of two such arms the one called "local" counts, else the
    first by name.
    """
    found: dict[str, str] = {}
    for name in sorted(studies, key=lambda name: (name != LOCAL, name)):
        if studies[name].method == LOCAL:
            found.setdefault(studies[name].with_method(LOCAL).digest, name)
    return {name: found.get(study.with_method(LOCAL).digest) for name, study in studies.items()}


def alone_of(arm: str, there: Container[str], regimes: Regimes) -> Alone | None:
    """What `arm` is compared with among the arms that are `there`; None where there is nothing.

    An arm without a local-only arm of its own settings is compared with the one called "local". An
    arm that `regimes` does not know is of the same settings as that.
    """
    own = regimes.get(arm, LOCAL)
    if own is not None and own in there:
        return None if own == arm else Alone(own)
    if arm == LOCAL or LOCAL not in there:
        return None
    return Alone(LOCAL, same_settings=own == LOCAL)


def several(found: Iterable[Alone | None]) -> bool:
    """Whether training alone is not one and the same arm, of the same settings, for all."""
    return any(alone not in (None, Alone(LOCAL)) for alone in found)
