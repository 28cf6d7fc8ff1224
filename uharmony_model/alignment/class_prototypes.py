"""Class prototypes: mean and variance of features by class, summed over patients and sites.

    mu_c = sum n_c f / n_c,    var_c = sum f^2 / n_c - mu_c^2        over the voxels of class c

Features change with the weights, so prototypes belong to the weights they were made with. What
leaves a site says which classes exist, and not of how many voxels: from these the number of its
cases follows, and the size of a class that was withheld. So each site's prototypes weigh the same
in those of all. B samples, C channels of the features, J' classes as channels of the logits
(background first when they are exclusive); a voxel is one place of the features' grid. How they
pull target features is said by `prototype_gap`. After the idea of Global-Local Union Alignment
(arXiv:2205.11888) that class-wise features of domains are brought together; these formulas are
ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from uharmony_model.errors import ExchangeError, TrainingError
from uharmony_model.exchange.schema import Schema, TensorSpec
from uharmony_model.prototypes import MIN_PATIENTS
from uharmony_model.targets import Annotated, annotated_classes, to_targets
from uharmony_model.task import Task

MIN_VOXELS = 100
"""Fewer voxels make no class: their variance says little, and their mean much of each."""

MAX_MEAN, MAX_VARIANCE = 500.0, 5e5
"""The largest that a site may give; features are normalised, honest ones are far smaller."""

MAX_MERGED = MAX_VARIANCE + MAX_MEAN**2
"""No variance of several sites is larger: the means' own is MAX_MEAN^2 at most."""

PRESENT, MEAN, VARIANCE = "present", "mean", "variance"


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Mean and variance (J', C) of the features of each class, float32, and its voxels (J',).

    A class with too few voxels or patients does not exist: all its numbers are 0.
    """

    mean: Tensor
    variance: Tensor
    voxels: Tensor

    @property
    def present(self) -> Tensor:
        """Which classes exist (J',), bool."""
        return self.voxels > 0

    def tensors(self) -> dict[str, Tensor]:
        """The form that travels, by the names of `prototype_schema`; 1 where a class exists."""
        return {PRESENT: self.present.float(), MEAN: self.mean, VARIANCE: self.variance}


@dataclass(frozen=True, eq=False)
class PrototypeSum:
    """Sums and sums of squares (J', C), voxels and patients (J',) of each class, all float64.

    `a + b` is the sum over both, of different patients, at one site or at several. These are raw
    sums: what may leave a site is made of them by `prototypes`.
    """

    sums: Tensor
    squares: Tensor
    voxels: Tensor
    patients: Tensor

    @classmethod
    def zero(cls, classes: int, channels: int) -> PrototypeSum:
        """The sum over nobody, for J' = `classes`."""
        empty = torch.zeros(classes, channels, dtype=torch.float64)
        counts = torch.zeros(classes, dtype=torch.float64)
        return cls(empty, empty, counts, counts)

    @classmethod
    def of_patient(cls, pieces: Iterable[tuple[Tensor, Tensor]]) -> PrototypeSum:
        """The sum over one patient's pieces: features (B, C, ...) and members (B, J', ...).

        It counts as one patient in each class that it has voxels of, however many pieces there
        are. Pieces that overlap count their common voxels twice.

        Raises:
            TrainingError: there is no piece, two do not fit, or a feature is not finite.
        """
        sums = [_moments(features, members) for features, members in pieces]
        if not sums:
            raise TrainingError("no features of a patient; expected at least one piece")
        total = sums[0]
        for other in sums[1:]:
            total = total + other
        return cls(total.sums, total.squares, total.voxels, (total.voxels > 0).double())

    def __add__(self, other: PrototypeSum) -> PrototypeSum:
        if self.sums.shape != other.sums.shape:
            raise ExchangeError(
                f"sums of shapes {tuple(self.sums.shape)} and {tuple(other.sums.shape)}; "
                "expected the same classes and channels"
            )
        return PrototypeSum(
            self.sums + other.sums,
            self.squares + other.squares,
            self.voxels + other.voxels,
            self.patients + other.patients,
        )

    def prototypes(
        self, min_patients: int = MIN_PATIENTS, min_voxels: int = MIN_VOXELS
    ) -> Prototypes:
        """Mean and biased variance of the classes with enough patients and enough voxels."""
        enough = (self.patients >= min_patients) & (self.voxels >= min_voxels) & (self.voxels > 0)
        return _normalised(self.sums, self.squares, torch.where(enough, self.voxels, 0.0))


def merged(sites: Sequence[Prototypes]) -> Prototypes:
    """The prototypes of all sites together, of what each site lets out of its own.

    sum_k n_k mu_k / sum_k n_k, and the law of total variance, n_k the voxels; of what came from
    sites these are 1 for all. A class exists where it does at a site. Summed in float64 in the
    order given.

    Raises:
        ExchangeError: there is none, or they differ in classes or channels.
    """
    shapes = sorted({tuple(site.mean.shape) for site in sites})
    if len(shapes) != 1:
        raise ExchangeError(f"prototypes of shapes {shapes}; expected some, all of one shape")
    counts = [site.voxels.double()[:, None] for site in sites]
    means = [site.mean.double() for site in sites]
    pairs = list(zip(counts, means, sites, strict=True))
    sums = torch.stack([n * mean for n, mean, _ in pairs]).sum(0)
    squares = torch.stack([n * (s.variance.double() + mean**2) for n, mean, s in pairs]).sum(0)
    return _normalised(sums, squares, torch.stack(counts).sum(0)[:, 0])


def class_members(
    label: Tensor, task: Task, size: Sequence[int], annotated: Annotated | None = None
) -> Tensor:
    """Which voxels belong to which class, bool (B, J', *size), of a label map (B, ...).

    The map is brought to the features' grid by nearest neighbour: the label at a cell's centre, or
    beside it. A class that is not annotated has no voxel, and then background has none either,
    since it may hold that class.
    """
    small = F.interpolate(label[:, None], size=tuple(size), mode="nearest-exact")[:, 0]
    masks = to_targets(small, task)
    background = masks[:, :0] if task.overlapping else ~masks.any(1, keepdim=True)
    kept = set(annotated_classes(annotated, task))
    if len(kept) < len(task.classes):
        background = torch.zeros_like(background)
        masks[:, [j for j in range(masks.shape[1]) if j not in kept]] = False
    return torch.cat((background, masks), 1)


def prototype_schema(classes: int, channels: int) -> Schema:
    """What travels of prototypes of J' = `classes` classes: `Prototypes.tensors`, float32."""
    table = (classes, channels)
    return Schema(
        tensors=(
            TensorSpec(name=MEAN, shape=table),
            TensorSpec(name=PRESENT, shape=(classes,)),
            TensorSpec(name=VARIANCE, shape=table),
        )
    )


def check_prototypes(
    tensors: Mapping[str, Tensor], classes: int, channels: int, *, together: bool = False
) -> Prototypes:
    """Prototypes again, from tensors that someone else made: a site, or all sites `together`.

    Raises:
        ExchangeError: names, shapes or types are not those of `prototype_schema`; a number is not
            finite or too large, a variance negative; or a class that is not there has a mean or a
            variance, which tells of voxels that were too few.
    """
    expected = prototype_schema(classes, channels)
    if Schema.of(tensors) != expected:
        got = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in sorted(tensors))
        wanted = ", ".join(f"{spec.name} {spec.shape}" for spec in expected.tensors)
        raise ExchangeError(f"prototypes of {got:.200}; expected {wanted}")
    found = Prototypes(mean=tensors[MEAN], variance=tensors[VARIANCE], voxels=tensors[PRESENT])
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ExchangeError("prototypes: a number is not finite; leave their site out")
    if (found.variance < 0).any():
        raise ExchangeError("prototypes: a variance is negative; leave their site out")
    if ((found.voxels != 0) & (found.voxels != 1)).any():
        raise ExchangeError("prototypes: a class is there, 1, or it is not, 0; got another number")
    most = MAX_MERGED if together else MAX_VARIANCE
    mean, variance = float(found.mean.abs().amax()), float(found.variance.amax())
    if mean > MAX_MEAN or variance > most:
        raise ExchangeError(
            f"prototypes: a mean of {mean:.3g} and a variance of {variance:.3g}; expected "
            f"{MAX_MEAN:g} and {most:g} at most"
        )
    absent = ~found.present
    if found.mean[absent].any() or found.variance[absent].any():
        raise ExchangeError("prototypes: a class that is not there has numbers; expected zeros")
    return found


def _moments(features: Tensor, members: Tensor) -> PrototypeSum:
    """Sums over the voxels of one piece, its patients left at 0."""
    if features.shape[0] != members.shape[0] or features.shape[2:] != members.shape[2:]:
        raise TrainingError(
            f"features of shape {tuple(features.shape)} and members of {tuple(members.shape)}; "
            "expected one batch and grid"
        )
    values = features.detach().movedim(1, 0).flatten(1).double()
    if not torch.isfinite(values).all():
        raise TrainingError("a feature is not finite; no prototype can be made of these weights")
    inside = members.movedim(1, 0).flatten(1).double()
    counts = inside.sum(1).cpu()
    return PrototypeSum(
        (inside @ values.T).cpu(),
        (inside @ values.square().T).cpu(),
        counts,
        torch.zeros_like(counts),
    )


def _normalised(sums: Tensor, squares: Tensor, voxels: Tensor) -> Prototypes:
    """Prototypes of float64 sums; a class of 0 voxels is left out."""
    count = voxels[:, None]
    exists = count > 0
    mean = torch.where(exists, sums / count.clamp_min(1), 0.0)
    variance = torch.where(exists, squares / count.clamp_min(1) - mean**2, 0.0).clamp_min(0)
    return Prototypes(mean=mean.float(), variance=variance.float(), voxels=voxels.float())
