"""A site, opened: its cases in their splits, its preprocessed volumes, its own store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from uharmony_client.case_table import Case, CaseTable
from uharmony_client.check.quarantine import load_quarantine, require_enough, without_quarantined
from uharmony_client.device import choose_device
from uharmony_client.finale_plan import NOTHING_TO_LEARN_FROM
from uharmony_client.local_store import LocalStore
from uharmony_client.objective import LocalData
from uharmony_client.readers import read_cases
from uharmony_client.site_config import Labels, SiteConfig, load_cases
from uharmony_client.volume_store import StoredVolume, VolumeStore
from uharmony_model.errors import DataError
from uharmony_model.evaluation_settings import Split
from uharmony_model.patches import without_label
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study

Opened = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Site:
    """One institution's side of one study. `domains` are its own, in a fixed order."""

    config: SiteConfig
    study: Study
    table: CaseTable
    domains: tuple[str, ...]
    volumes: dict[str, StoredVolume]
    store: LocalStore
    device: torch.device
    quarantined: int = 0
    labels: Mapping[str, Labels] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        config: SiteConfig,
        study: Study,
        *,
        own_cases_only: bool = True,
        labels: Mapping[str, Labels] | None = None,
        on_case: Opened | None = None,
    ) -> Site:
        """Read the case table, split it by patient, and preprocess what is not yet preprocessed.

        `own_cases_only=False` takes the cases of every site in the table: pooled training. Cases
        that `check` has put into quarantine are left out; the splits of the others stay. `labels`
        says by site which labels are trained on, where cases of several are taken.

        Raises:
            DataError: a case cannot be used, or nothing is left to train on.
            ConfigError: the site annotates a class the study does not have.
        """
        config.annotates(study.task)
        cases = load_cases(config) if own_cases_only else read_cases(config.cases)
        table = cases.with_splits(study.evaluation, study.split_seed)
        if study.takes_unlabelled:
            table = table.with_unlabelled()
        held = load_quarantine(config.store, study.digest)
        require_enough(table, held)
        whole, table = table, without_quarantined(table, held)
        if not table.of(split="train").cases:
            raise DataError(
                f"site {config.name}: no case is left to train on; {NOTHING_TO_LEARN_FROM}"
            )
        shelf = VolumeStore(config.volumes or config.store / "volumes")
        volumes: dict[str, StoredVolume] = {}
        for index, case in enumerate(table.cases):
            if on_case is not None:
                on_case(config.name, index, len(table.cases))
            volumes[case.case] = shelf.open(case, study.task, config)
        return cls(
            config=config,
            study=study,
            table=table,
            domains=tuple(sorted({case.domain for case in table.cases})),
            volumes=volumes,
            store=LocalStore(config.store / "generations" / study.digest),
            device=choose_device(config.resources.device),
            quarantined=len(whole.cases) - len(table.cases),
            labels=labels or dict.fromkeys(table.sites, config.labels),
        )

    @property
    def name(self) -> str:
        """The site's name in the federation."""
        return self.config.name

    @property
    def annotated(self) -> torch.Tensor:
        """Which classes this site annotates, (J,) bool."""
        return torch.tensor(self.config.annotates(self.study.task))

    @property
    def modalities(self) -> tuple[str, ...]:
        """The study's names of this site's modalities, channel by channel; empty when they vary."""
        rename, lacking = self.config.modality_map, self.config.lacks(self.study.task)
        named = ([rename.get(m, m) for m in case.modality] for case in self.table.cases)
        found = {tuple(m for m in names if m not in lacking) for names in named}
        return found.pop() if len(found) == 1 else ()

    @property
    def evaluations(self) -> Path:
        """Where per-case results stay; they never leave a hospital."""
        return self.config.store / "evaluations" / self.study.digest

    def split(self, split: Split) -> Sequence[Case]:
        """The cases of one split, in table order."""
        return self.table.of(split=split).cases

    def training_data(self) -> LocalData:
        """The training split as a round takes it: cases with a label, and those without."""
        cases, taught = self.split("train"), self._labelled()
        labelled = [case for case in cases if case.case in taught]
        rest = [case for case in cases if case.case not in taught]
        return LocalData(
            site=self.name,
            volumes=[self.volumes[case.case] for case in labelled],
            domains=[self.domains.index(case.domain) for case in labelled],
            annotated=self.annotated,
            unlabelled=[without_label(self.volumes[case.case]) for case in rest],
            unlabelled_domains=[self.domains.index(case.domain) for case in rest],
            names=[self.volumes[case.case].key for case in rest],
        )

    def _labelled(self) -> frozenset[str]:
        """The training cases whose labels are there and may be used."""
        found: set[str] = set()
        for name in self.table.sites:
            cases = [case for case in self.split("train") if case.site == name]
            may = self.labels.get(name, "all")
            # Of those who have a label: the same ones, whether a rule takes the others or not.
            patients = sorted({case.patient for case in cases if case.label is not None})
            if may == "none":
                continue
            if may != "all":
                draw = numpy_generator(self.study.split_seed, name, "labelled")
                patients = [patients[i] for i in draw.permutation(len(patients))[:may]]
            found |= {case.case for case in cases if case.patient in patients}
        return frozenset(name for name in found if self.volumes[name].label is not None)

    def with_study(self, study: Study) -> Site:
        """The same opened data under another arm of the same study (same task, same splits)."""
        store = LocalStore(self.config.store / "generations" / study.digest)
        return dataclasses.replace(self, study=study, store=store)
