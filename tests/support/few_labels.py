"""A site in memory with labelled and unlabelled cases, and rounds of it by any rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.support.blobs import Stored, volumes
from tests.support.tiny import tiny_study
from uharmony_client.learning import NOTHING, Given
from uharmony_client.local_store import RoundKey
from uharmony_client.local_train import RoundResult, train_round
from uharmony_client.objective import LocalData
from uharmony_client.step_checkpoint import StepCheckpoint
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import flatten
from uharmony_model.networks import training_network
from uharmony_model.patches import without_label
from uharmony_model.randomness import numpy_generator
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study
from uharmony_model.unlabelled.strong import strong_change

TRAINED = ("mean-teacher", "fixmatch", "entropy-min", "ust-run", "glua")
RULES = (*TRAINED, "adabn")
# An untrained network is sure of nothing: with these numbers it has something to say.
LAX = {"threshold": 0.51, "queue_threshold": 1.0, "warm_up": 0}
OVERLAPPING = {"classes": {"whole": [1, 2], "core": 2}, "overlapping": True}


class Cut(BaseException):
    """Stands for the power cut."""


def study_of(rule: str, method: str = "fedavg", **changes: object) -> Study:
    """The tiny study with patches of 8 voxels; `unlabelled`, `training` and others are merged."""
    unlabelled = {"rule": rule, **LAX, **changes.pop("unlabelled", {})}  # type: ignore[dict-item]
    training = {"patch": [8, 8, 8], **changes.pop("training", {})}  # type: ignore[dict-item]
    return tiny_study(method=method, unlabelled=unlabelled, training=training, **changes)


def stored(count: int, seed: int = 0, channels: int = 1) -> list[Stored]:
    """Bright blocks of one or two classes in noise, other ones for another seed."""
    rng = np.random.default_rng(seed)
    made = []
    for volume in volumes(count):
        label = volume.label.copy()
        label[7:10, 5:11, 6:12] = 1 + seed % 2
        noise = rng.normal(size=(channels, 16, 16, 16))
        image = (noise + 2 * (label > 0) + seed % 3).astype(np.float32)
        points = np.argwhere(label)
        rows = np.column_stack([points, label[tuple(points.T)]]).astype(np.int32)
        made.append(replace(volume, image=image, label=label, foreground=rows))
    return made


def garbage(case: Stored, value: int = 1) -> Stored:
    """The same images with another label: a corner."""
    label = np.zeros_like(case.label)
    label[:3, :2, :5] = value
    points = np.argwhere(label)
    rows = np.column_stack([points, np.full(len(points), value)]).astype(np.int32)
    return replace(case, label=label, foreground=rows)


def data_of(
    labelled: Sequence[Stored] | None = None,
    unlabelled: Sequence[Stored] | None = None,
    *,
    domains: int = 1,
    annotated: Sequence[bool] = (True,),
) -> LocalData:
    """Two labelled and two unlabelled cases, or those given; domains in turn."""
    own = stored(2) if labelled is None else labelled
    others = stored(2, seed=1) if unlabelled is None else unlabelled
    return LocalData(
        "alpha",
        own,
        [i % domains for i in range(len(own))],
        torch.tensor(list(annotated)),
        [without_label(case) for case in others],
        [(i + 1) % domains for i in range(len(others))],
    )


@dataclass
class Place:
    """One site without a disk: what it starts from, and rounds of it, each in a new process."""

    study: Study
    domains: tuple[str, ...] = ("x",)

    def __post_init__(self) -> None:
        self.partition = Partition.of(self.network(), self.study.plan.local)
        shared, local = self.partition.split(self.network().state_dict())
        self.base = flatten(shared, self.partition.shared_schema)
        self.before: Mapping[str, Tensor] = local

    def network(self) -> SegmentationNetwork:
        return training_network(self.study, self.domains, seed=0).train()

    def round(
        self,
        data: LocalData,
        number: int = 1,
        *,
        before: Mapping[str, Tensor] | None = None,
        base: Tensor | None = None,
        given: Given = NOTHING,
        checkpoint: StepCheckpoint | None = None,
        cut_at: int | None = None,
        taken: list[int] | None = None,
    ) -> RoundResult:
        def on_step(step: int, loss: float) -> None:
            if taken is not None:
                taken.append(step)
            if step == cut_at:
                raise Cut

        return train_round(
            self.network(),
            data,
            study=self.study,
            partition=self.partition,
            base=self.base if base is None else base,
            before=self.before if before is None else before,
            round_=number,
            given=given,
            on_step=on_step,
            checkpoint=checkpoint,
        )


def checkpoint(folder: Path, every: int, round_: int = 1) -> StepCheckpoint:
    """Where the middle of a round is kept."""
    return StepCheckpoint(folder, RoundKey("5" * 64, round_, "b"), every)


def same(one: RoundResult, other: RoundResult) -> bool:
    """Whether two rounds end in the same bits."""
    return (
        torch.equal(one.update, other.update)
        and (one.loss, one.share) == (other.loss, other.share)
        and one.local.keys() == other.local.keys()
        and all(torch.equal(one.local[k], other.local[k]) for k in one.local)
    )


def strong_of(study: Study, image: Tensor, round_: int, step: int, site: str = "alpha") -> Tensor:
    """The strong view, drawn anew: masks of presence stay."""
    count = study.task.channels
    seeds = [(study.seed, site, round_, step, f"strong-{i}") for i in range(len(image))]
    changed = strong_change(image[:, :count], [numpy_generator(*seed) for seed in seeds])
    return torch.cat((changed, image[:, count:]), 1)
