"""The `simulation:` section of a study file: where volumes come from and how sites differ.

No site consents to it and no hospital needs it; it only says how to make the sites of a study
out of data that lies in one place.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from uharmony_client.site_config import Labels
from uharmony_model.frozen import Frozen
from uharmony_model.task import Name
from uharmony_simulation.scanners import EFFECTS, Effect


class ScannerSettings(Frozen):
    """How far a site's simulated scanner is from the original; 0 is the identity.

    `invert` turns the contrast round, `motion` adds the ghosts of a patient who moves. `effects`
    are those that the strength applies to.
    """

    strength: NonNegativeFloat = 1.0
    invert: bool = False
    motion: bool = False
    effects: tuple[Effect, ...] = EFFECTS


class AnatomySite(Frozen):
    """A hospital of the embedded default: how many cases, which scanner."""

    cases: PositiveInt
    scanner: ScannerSettings = ScannerSettings()


class SiteOptions(Frozen):
    """What some sites do not have; a site that is not named has everything.

    `annotated` names the classes that a site draws: of the others its labels say nothing. `missing`
    names the modalities that it does not give (`task.presence` in the study). `labels` says of how
    many training patients a site may learn from labels (`none`: of nobody); its other labels are
    there to measure by. All stand in the site's own site.yaml; nothing is copied for it.
    """

    annotated: dict[Name, Annotated[tuple[Name, ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    missing: dict[Name, Annotated[tuple[Name, ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    labels: dict[Name, Labels] = Field(default_factory=dict)


class AnatomySource(SiteOptions):
    """Real anatomy that ships inside a package, with lesions of known extent."""

    kind: Literal["anatomy"]
    spacing_mm: PositiveFloat = 3.0
    sites: dict[Name, AnatomySite]

    @model_validator(mode="after")
    def _some(self) -> AnatomySource:
        if not self.sites:
            raise ValueError("at least one site is needed")
        if "pooled" in self.sites:
            raise ValueError("pooled is the name of all sites together; rename that site")
        return self


class FolderSource(SiteOptions):
    """Volumes in the folder given by `--data`.

    `sites_from` says what makes a site: the case table's `site` column; the modality, every
    patient at one site only; or a `random` division of patients into `random_sites`.
    `cases_per_site` limits them, all alike or by name.
    `scanners` puts a simulated scanner on a site's volumes; a site without one is unchanged.
    """

    kind: Literal["folder"]
    sites_from: Literal["column", "modality", "random"] = "column"
    random_sites: Annotated[int, Field(ge=1, le=1000)] = 3
    cases_per_site: PositiveInt | dict[Name, PositiveInt] | None = None
    scanners: dict[Name, ScannerSettings] = Field(default_factory=dict)
    attribution: Annotated[str, Field(max_length=600)] = ""


class Simulation(Frozen):
    """The whole section."""

    source: Annotated[AnatomySource | FolderSource, Field(discriminator="kind")]
