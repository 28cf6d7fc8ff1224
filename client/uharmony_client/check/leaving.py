"""What will leave this site in a round of a study, by name and in bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from uharmony_client.check.findings import Detail
from uharmony_client.finale_plan import (
    carried_patches,
    carried_view,
    finale_steps,
    finale_view,
    has_teacher,
    learning_view,
    values_asked,
)
from uharmony_client.policy import differences, publication_view, statistics_view
from uharmony_client.site_config import SiteConfig
from uharmony_model.errors import UHarmonyError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.parts import part_of
from uharmony_model.networks import check_patch, training_network
from uharmony_model.presence import input_channels
from uharmony_model.study import Study

_BYTES = {"fp32": 4, "bf16": 2}
_GENERATIONS = 3
_MOMENTS = 2  # of AdamW, one more copy of every parameter each


@dataclass(frozen=True)
class Leaving:
    """Scalars that leave by part of the model, bytes of a round, values, and what stays.

    Bytes are those of the weights before they are compressed without loss. Weights come down as
    fp32 whatever the codec. `learning` says what the study learns from here, `statistics` what
    would be given while training, `carries` what learning without labels keeps in the store,
    `at_home` what a finale asks of the site, `published` what would be given away at the end.
    """

    parts: dict[str, int]
    tensors: int
    scalars: int
    bytes_up: int
    bytes_down: int
    values: tuple[str, ...]
    min_cases: int
    stays: int
    learning: str
    statistics: str
    carries: str
    at_home: str
    published: str


def what_leaves(
    config: SiteConfig, study: Study, domains: Sequence[str], *, labelled: bool = True
) -> tuple[Leaving | None, list[tuple[str, Detail]]]:
    """What leaves, and why the study cannot be followed here if it cannot.

    `labelled` says whether the site trains on labels.
    """
    noted = [("U702", Detail(None, line)) for line in differences(config.policy, study)]
    try:
        check_patch(study.network, study.training.patch, study.plan.backbone)
        network = training_network(study, tuple(domains), seed=study.seed)
        partition = Partition.of(network, study.plan.local)
    except UHarmonyError as error:
        return None, [*noted, ("U701", Detail(None, str(error)))]
    parts, sizes = part_of(network), Counter[str]()
    for spec in partition.shared_schema.tensors:
        sizes[parts[spec.name].value] += spec.numel
    shared = partition.shared_schema.numel
    state = network.state_dict()
    leaving = Leaving(
        parts=dict(sizes),
        tensors=len(partition.shared_schema.tensors),
        scalars=shared,
        bytes_up=shared * _BYTES[study.codec.up],
        bytes_down=shared * _BYTES["fp32"],
        values=values_asked(study, labelled=labelled) if shared else (),
        min_cases=config.policy.min_cases,
        stays=sum(state[key].numel() for key in partition.local_keys),
        learning=learning_view(study, labelled=labelled),
        statistics=statistics_view(config.policy, study),
        carries=carried_view(study, labelled=labelled),
        at_home=finale_view(study, labelled=labelled),
        published=publication_view(config.policy, study),
    )
    return leaving, noted


def generation_bytes(leaving: Leaving, study: Study) -> int:
    """Room for what a site keeps of a study, at the most; the prepared volumes are counted apart.

    Three generations (the update, local parameters, moments), the checkpoint of a round, and the
    model that is handed out. A twin carries a second model with its moments. A finale keeps its
    finished candidates until the choice is made, then what was chosen, and the generations and
    the checkpoint of the local-only model. Three times, and in the checkpoint, there is what
    learning without labels carries.
    """
    whole = leaving.scalars + leaving.stays
    moments = _MOMENTS * whole if study.training.keep_optimizer else 0
    carried = leaving.stays + moments
    if study.plan.training == "twin":
        carried += whole + moments
    generations = _GENERATIONS * (leaving.scalars + carried)
    # In the middle of a round there are moments whether or not they are kept for the next.
    checkpoint = (1 + _MOMENTS) * whole
    numbers = generations + checkpoint + whole
    steps = finale_steps(study)
    if study.finale.steps:
        numbers += whole * (1 + len(steps.keys() - {"local"}))
    if "local" in steps:
        numbers += _GENERATIONS * (whole + moments) + checkpoint
    return 4 * numbers + (_GENERATIONS + 1) * carried_bytes(leaving, study)


def carried_bytes(leaving: Leaving, study: Study) -> int:
    """What learning without labels carries: a teacher, and patches with what is believed of them.

    A reliable patch has label values of one byte, the hardest one classes of eight, or two flags
    for each class that may overlap. Means of features by class are too small to count.
    """
    teacher = 4 * (leaving.scalars + leaving.stays) * has_teacher(study)
    queued, hardest = carried_patches(study)
    voxels, channels = math.prod(study.training.patch), input_channels(study.task)
    believed = 2 * len(study.task.classes) if study.task.overlapping else 8 + 1
    patches = queued * (4 * channels + 1) + hardest * (4 * channels + believed)
    return teacher + voxels * patches
