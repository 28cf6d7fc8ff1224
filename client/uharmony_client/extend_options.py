"""What a model is extended by: classes and modalities as they are written, and as cases show them.

    NAME=VALUE[,VALUE...]           a class and its label values
    NAME=POLICY[,KEY=VALUE...]      a modality and its intensity policy

With `task.presence` a modality is a channel. Without it the model's channels stay, and a modality
is another look of theirs, as a CT domain beside MR ones in 3D U2-Net.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uharmony_client.case_table import Case
from uharmony_client.volume_store import StoredVolume
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.frozen import parse
from uharmony_model.study import Study


def grown_study(old: Study, classes: Sequence[str], modalities: Sequence[str]) -> Study:
    """The study with classes NAME=VALUE[,VALUE...] and modalities NAME=POLICY[,KEY=VALUE...] more.

    A class more brings residuals of the head, if domains have others: with a bias of its own an old
    site can have it off.

    Raises:
        ConfigError: one is there already, clashes with an old one, or is not written so.
    """
    task = old.task.model_dump(mode="json")
    for text in classes:
        name, values = _class(text)
        if name in task["classes"]:
            raise ConfigError(f"--class {text:.80}: the model has a class {name}; take another")
        used = {v: n for n, group in task["classes"].items() for v in group}
        clash = [v for v in values if v in used]
        if clash and not old.task.overlapping:
            raise ConfigError(
                f"--class {text:.80}: value {clash[0]} belongs to {used[clash[0]]}; "
                "give a value that no class has"
            )
        task["classes"][name] = values
    for text in modalities:
        name, policy = _policy(text)
        if name in task["intensity"]:
            raise ConfigError(f"--modality {text:.80}: the model has {name}; take another name")
        task["intensity"][name] = policy
    if old.task.presence:
        task["channels"] = len(task["intensity"])
    content = {**old.model_dump(mode="json"), "task": task}
    own = old.harmonization.residuals if old.plan.harmonized else ()
    if classes and own:
        content["network"]["harmonization"]["residuals"] = (*own, *{"head"}.difference(own))
    return parse(Study, content, "--class or --modality")


def require_channels(cases: Sequence[Case], old: Study, new: Study) -> None:
    """A modality more is a channel more only where masks tell old sites that they lack it.

    Raises:
        ConfigError: the cases have more channels than a model without masks takes.
    """
    more = set(new.task.intensity) - set(old.task.intensity)
    most = max(max(len(case.image), len(case.modality)) for case in cases)
    if more and not new.task.presence and most > old.task.channels:
        raise ConfigError(
            f"--modality: the cases have {most} channels, the model takes {old.task.channels} "
            "without presence masks; a channel more needs a model that was trained with "
            "task.presence: true"
        )


def require_shown(volumes: Sequence[StoredVolume], old: Study, new: Study) -> None:
    """What is new must occur in the cases that are trained on.

    Raises:
        DataError: it does not.
    """
    for name, values in new.task.classes.items():
        drawn = any(np.isin(volume.foreground[:, 3], values).any() for volume in volumes)
        if name not in old.task.classes and not drawn:
            raise DataError(
                f"no case that is trained on draws {name} (value "
                f"{', '.join(map(str, values))}); label some, or leave the class out"
            )
    used = {name for volume in volumes for name in volume.case.modality}
    unused = sorted(set(new.task.intensity) - set(old.task.intensity) - used)
    if unused:
        raise DataError(
            f"no case that is trained on names the modality {unused[0]}; name it in the table's "
            "column modality or with --channels"
        )


def _class(text: str) -> tuple[str, list[int]]:
    name, _, values = text.partition("=")
    try:
        return name, [int(value) for value in values.split(",")]
    except ValueError:
        raise ConfigError(
            f"--class {text:.80}: expected NAME=VALUE, with several values by commas"
        ) from None


def _policy(text: str) -> tuple[str, dict[str, str]]:
    name, _, written = text.partition("=")
    policy, *rest = written.split(",")
    settings = [part.partition("=") for part in rest]
    if not policy or not all(key and value for key, _, value in settings):
        raise ConfigError(
            f"--modality {text:.80}: expected NAME=POLICY, as MR=zscore or CT=window,low=-160"
        )
    return name, {"policy": policy, **{key: value for key, _, value in settings}}
