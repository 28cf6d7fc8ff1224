"""site.yaml: what only the hospital knows. Nothing in it is ever sent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from uharmony_client.case_table import CaseTable
from uharmony_client.nifti import MAX_VOXELS
from uharmony_client.policy import Policy
from uharmony_client.readers import read_cases
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.frozen import Frozen, parse, read_yaml
from uharmony_model.task import Name, Task

DeviceName = Literal["auto", "cpu", "cuda"]
LabelValue = Annotated[int, Field(ge=0, le=65535)]
StudyValue = Annotated[int, Field(ge=0, le=255)]
Labels = Literal["all", "none"] | PositiveInt


class Resources(Frozen):
    """What this machine may spend.

    `max_voxels` bounds one channel of one volume; a power cut costs at most `checkpoint_steps`
    steps of training.
    """

    threads: PositiveInt | None = None
    device: DeviceName = "auto"
    max_voxels: PositiveInt = MAX_VOXELS
    checkpoint_steps: PositiveInt = 50


class SiteConfig(Frozen):
    """One site. `cases` is a table or a folder, `store` is where everything of its own is kept.

    `volumes` is where prepared volumes are kept (None: in the store); several studies may share it.
    `labels` says whose labels are trained on: `all`, `none`, or those of so many training patients,
    which the study's split seed chooses; without its label a case is one to learn from unlabelled.
    `annotated` names the study's classes that this site draws (None: all of them).
    `missing` names the study's modalities that this site does not have or does not give: where the
    study takes presence masks (`task.presence`), a channel of theirs counts as not there.
    `modality_map` renames the site's modalities to the study's, `label_map` its label values;
    a value that is not in the map stays, and 0 is background.
    """

    name: Name
    cases: Path
    store: Path
    volumes: Path | None = None
    labels: Labels = "all"
    annotated: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    missing: tuple[Name, ...] = ()
    modality_map: dict[str, Name] = Field(default_factory=dict)
    label_map: dict[LabelValue, StudyValue] = Field(default_factory=dict)
    policy: Policy = Policy()
    resources: Resources = Resources()

    def annotates(self, task: Task) -> tuple[bool, ...]:
        """Whether this site annotates each of the study's classes, in their order.

        Raises:
            ConfigError: `annotated` names a class that the study does not have.
        """
        if self.annotated is None:
            return (True,) * len(task.classes)
        unknown = [name for name in self.annotated if name not in task.classes]
        if unknown:
            raise ConfigError(
                f"site {self.name}: annotated names {', '.join(unknown)}; "
                f"the study's classes are {', '.join(task.class_names)}"
            )
        return tuple(name in self.annotated for name in task.class_names)

    def lacks(self, task: Task) -> frozenset[str]:
        """The study's modalities that are declared missing here.

        Raises:
            ConfigError: the study has no such modality or no presence masks, or nothing is left.
        """
        lacking = frozenset(self.missing)
        known = f"the study has {', '.join(task.intensity)}"
        if not lacking <= task.intensity.keys():
            wrong = ", ".join(sorted(lacking - task.intensity.keys()))
            raise ConfigError(f"site {self.name}: missing names {wrong}; {known}")
        if lacking and not task.presence:
            raise ConfigError(
                f"site {self.name}: missing names {', '.join(sorted(lacking))}, but every site of "
                "this study needs all its channels (task.presence is false); take missing out"
            )
        if lacking == task.intensity.keys():
            raise ConfigError(f"site {self.name}: missing names every modality; {known}")
        return lacking

    def label_values(self, task: Task) -> frozenset[int]:
        """The label values that may occur here after `label_map`, background included."""
        groups = zip(task.classes.values(), self.annotates(task), strict=True)
        return frozenset({0}.union(*(values for values, drawn in groups if drawn)))


def load_site(path: Path) -> SiteConfig:
    """Read site.yaml; paths in it are relative to its folder.

    Raises:
        ConfigError: the file is missing or says something that cannot be followed.
    """
    config = parse(SiteConfig, read_yaml(path), str(path))
    folder = path.resolve().parent
    places = {"cases": config.cases, "store": config.store, "volumes": config.volumes}
    return config.model_copy(
        update={name: None if path is None else folder / path for name, path in places.items()}
    )


def load_cases(config: SiteConfig) -> CaseTable:
    """The site's own cases. A table of several sites is narrowed to this one.

    Raises:
        DataError: the table or folder is incomplete, or has no case of this site.
    """
    table = read_cases(config.cases, site=config.name)
    own = table.of(site=config.name)
    if not own.cases:
        raise DataError(
            f"{config.cases}: no case of site {config.name}; it has {', '.join(table.sites)}"
        )
    return own
