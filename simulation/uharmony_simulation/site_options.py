"""What some simulated sites do not draw or do not have, as a hospital would say it in site.yaml.

Few labels or none: the site says so, and what other labels it has are there to measure by.

Label loss: the site names the classes it annotates, and its `label_map` makes background of every
other label value, so that volumes and labels stay where they lie. The other classes are then
neither learned from nor measured at that site. Modality loss: the site declares a modality missing,
and its channel counts as not there.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from uharmony_client.site_config import SiteConfig
from uharmony_model.errors import ConfigError
from uharmony_model.task import Task
from uharmony_simulation.config import SiteOptions


def site_options(
    task: Task, source: SiteOptions, sites: Collection[str]
) -> dict[str, dict[str, Any]]:
    """What stands in the site.yaml of sites that do not draw or have everything.

    Raises:
        ConfigError: a site, class or modality is unknown, or a site would be left with nothing.
    """
    for name in ("annotated", "missing", "labels"):
        unknown = sorted(set(getattr(source, name)) - set(sites))
        if unknown:
            raise ConfigError(
                f"simulation.source.{name} names {unknown}; the sites are {sorted(sites)}"
            )
    options: dict[str, dict[str, Any]] = {}
    for site in sorted({*source.annotated, *source.missing, *source.labels}):
        here = SiteConfig(
            name=site,
            cases=Path("cases.csv"),
            store=Path("store"),
            annotated=source.annotated.get(site),
            missing=source.missing.get(site, ()),
            labels=source.labels.get(site, "all"),
        )
        here.lacks(task)
        drawn = here.label_values(task)
        every = {value for values in task.classes.values() for value in values}
        content = {
            "annotated": list(here.annotated or ()),
            "label_map": dict.fromkeys(sorted(every - drawn), 0),
            "missing": list(here.missing),
            "labels": "" if here.labels == "all" else here.labels,
        }
        options[site] = {key: value for key, value in content.items() if value}
    return options
