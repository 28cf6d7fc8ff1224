"""Which site gets which cases of a folder: by column, by modality, or by patient at random."""

from __future__ import annotations

from uharmony_client.case_table import Case
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study
from uharmony_simulation.config import FolderSource

POOLED = "pooled"  # where all cases of all sites lie together; no site may have this name


def divide(study: Study, source: FolderSource, cases: list[Case]) -> dict[str, list[Case]]:
    """The cases of every site, its name in them; drawn so that no patient is at two sites.

    Raises:
        ConfigError: a site has the name of all sites together.
        DataError: a site gets no case, or the cases cannot be told apart by modality.
    """
    if source.sites_from == "column":
        tables: dict[str, list[Case]] = {}
        for case in cases:
            tables.setdefault(case.site, []).append(case)
    elif source.sites_from == "modality":
        tables = _by_modality(study, cases)
    else:
        tables = {f"site-{i + 1}": [] for i in range(source.random_sites)}
        patients = sorted({c.patient for c in cases})
        order = numpy_generator(study.split_seed, "random-sites").permutation(len(patients))
        home = {patients[p]: f"site-{i % source.random_sites + 1}" for i, p in enumerate(order)}
        for case in cases:
            tables[home[case.patient]].append(case)
    if POOLED in tables:
        raise ConfigError(f"a site is called {POOLED}, the name of all sites together; rename it")
    empty = sorted(site for site, rows in tables.items() if not rows)
    if empty or not tables:
        raise DataError(f"no case for sites {empty}; check simulation.source.sites_from")
    return {
        site: [
            c.model_copy(update={"site": site, "domain": site if c.domain == c.site else c.domain})
            for c in rows[: _most(source, site)]
        ]
        for site, rows in sorted(tables.items())
    }


def _most(source: FolderSource, site: str) -> int | None:
    most = source.cases_per_site
    return most.get(site) if isinstance(most, dict) else most


def _by_modality(study: Study, cases: list[Case]) -> dict[str, list[Case]]:
    """A site for each modality. A patient scanned in several goes to the site that has fewest."""
    offers: dict[str, dict[str, Case]] = {}
    for case in cases:
        if len(case.modality) != 1:
            raise DataError(f"case {case.case}: sites by modality need one channel a case")
        offer = offers.setdefault(case.patient, {})
        if case.modality[0] in offer:
            raise DataError(
                f"patient {case.patient} has two cases of modality {case.modality[0]} "
                f"({offer[case.modality[0]].case}, {case.case}); leave one of them out"
            )
        offer[case.modality[0]] = case
    tables: dict[str, list[Case]] = {m: [] for m in sorted({c.modality[0] for c in cases})}
    patients = sorted(offers)
    order = numpy_generator(study.split_seed, "modality-sites").permutation(len(patients))
    # Patients with the fewest choices first, so that a rare modality is not left without.
    for patient in sorted((patients[i] for i in order), key=lambda p: len(offers[p])):
        site = min(offers[patient], key=lambda m: (len(tables[m]), m))
        tables[site].append(offers[patient][site])
    return tables
