"""Class prototypes and the gap to them: formulas, sums over sites, and what may travel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from uharmony_model.alignment.class_prototypes import (
    MAX_MEAN,
    MAX_MERGED,
    MAX_VARIANCE,
    Prototypes,
    PrototypeSum,
    check_prototypes,
    class_members,
    merged,
    prototype_schema,
)
from uharmony_model.alignment.prototype_gap import EPS, SEEN, alignment_loss, gap, gap_mask
from uharmony_model.errors import ExchangeError, TrainingError
from uharmony_model.exchange.schema import flatten, unflatten
from uharmony_model.prototypes import MIN_PATIENTS
from uharmony_model.randomness import torch_generator
from uharmony_model.task import Task

INTENSITY = {"ct": {"policy": "window"}}
EXCLUSIVE = Task.model_validate({"classes": {"liver": [4, 9], "spleen": 2}, "intensity": INTENSITY})
OVERLAPPING = Task.model_validate(
    {"classes": {"whole": [1, 4], "core": 4}, "overlapping": True, "intensity": INTENSITY}
)
CLASSES, CHANNELS = 3, 4
Piece = tuple[Tensor, Tensor]


def piece(where: str, *, whole: bool = False, batch: int = 2) -> Piece:
    """Features (B, C, 3, 4, 2) and a class for each voxel; `whole` numbers sum without rounding."""
    generator = torch_generator(0, "test prototypes", where)
    grid = (3, 4, 2)
    features = 3 * torch.randn(batch, CHANNELS, *grid, generator=generator) + 1
    index = torch.randint(0, CLASSES, (batch, *grid), generator=generator)
    members = torch.stack([index == j for j in range(CLASSES)], 1)
    return features.round() if whole else features, members


def reference(pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, biased variances and counts by class, voxel after voxel, in float64."""
    rows: list[list[np.ndarray]] = [[] for _ in range(CLASSES)]
    for features, members in pieces:
        f, m = features.double().numpy(), members.numpy()
        for b, j in itertools.product(range(f.shape[0]), range(CLASSES)):
            for at in zip(*np.nonzero(m[b, j]), strict=True):
                rows[j].append(f[(b, slice(None), *at)])
    stacked = [np.stack(r) for r in rows]
    return (
        np.stack([r.mean(0) for r in stacked]),
        np.stack([r.var(0) for r in stacked]),
        np.array([len(r) for r in stacked]),
    )


def patients(*names: str, whole: bool = False) -> list[PrototypeSum]:
    return [PrototypeSum.of_patient([piece(name, whole=whole)]) for name in names]


def by_hand() -> Prototypes:
    return Prototypes(
        mean=torch.tensor([[0.0, 1.0], [2.0, -1.0], [0.0, 0.0]]),
        variance=torch.tensor([[1.0, 4.0], [0.25, 1.0], [0.0, 0.0]]),
        voxels=torch.tensor([50.0, 20.0, 0.0]),
    )


def some(requires_grad: bool = False) -> tuple[Tensor, Tensor, Prototypes]:
    features, _ = piece("features")
    logits, _ = piece("logits")
    first, second = patients("a", "b")
    prototypes = (first + second).prototypes(1, 1)
    probabilities = logits[:, :CLASSES].softmax(1)
    return features.requires_grad_(requires_grad), probabilities, prototypes


def test_prototypes_are_mean_and_variance_of_a_class():
    pieces = [piece(name) for name in "abc"]
    total = PrototypeSum.of_patient(pieces[:1]) + PrototypeSum.of_patient(pieces[1:])
    mean, variance, voxels = reference(pieces)
    found = total.prototypes(min_patients=2, min_voxels=1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-6)
    assert found.voxels.tolist() == voxels.tolist()
    assert found.present.all()
    assert {t.dtype for t in found.tensors().values()} == {torch.float32}


def test_merged_sites_are_the_pooled_sum_to_the_bit():
    a, b, c, d = patients(*"abcd", whole=True)
    pooled = a + b + c + d
    together = (d + b) + (PrototypeSum.zero(CLASSES, CHANNELS) + (c + a))
    for name in ("sums", "squares", "voxels", "patients"):
        assert getattr(pooled, name).dtype == torch.float64
        assert torch.equal(getattr(pooled, name), getattr(together, name))
    assert pooled.patients.tolist() == [4, 4, 4]
    rough = patients(*"abcd")
    one, other = (
        rough[0] + rough[1] + rough[2] + rough[3],
        (rough[3] + rough[1]) + (rough[2] + rough[0]),
    )
    torch.testing.assert_close(one.squares, other.squares, rtol=1e-14, atol=0)


def test_sums_lose_nothing_that_float32_would():
    features = torch.tensor([4096.0, 4096.5]).view(1, 1, 2)  # squares need 26 bits
    members = torch.ones(1, 1, 2, dtype=torch.bool)
    found = PrototypeSum.of_patient([(features, members)]).prototypes(1, 1)
    assert found.mean.item() == 4096.25
    assert found.variance.item() == 0.0625


def test_a_patient_counts_once_in_the_classes_it_has():
    features, members = piece("a")
    members[:, 2] = False
    patient = PrototypeSum.of_patient([(features, members), piece_without(2, "b")])
    assert patient.patients.tolist() == [1, 1, 0]
    other = PrototypeSum.of_patient([piece("c")])
    assert (patient + other).patients.tolist() == [2, 2, 1]


def piece_without(absent: int, where: str) -> Piece:
    features, members = piece(where)
    members[:, absent] = False
    return features, members


def test_classes_of_too_few_patients_or_voxels_do_not_exist():
    features, members = piece("a", batch=1)
    members[:] = False
    members[0, 0] = True  # 24 voxels
    members[0, 1, 0, 0, 0] = True  # one voxel
    first = PrototypeSum.of_patient([(features, members)])
    second = PrototypeSum.of_patient([piece_without(1, "b")])
    total = first + second
    assert total.patients.tolist() == [2, 1, 1]
    assert total.prototypes(2, 1).present.tolist() == [True, False, False]
    assert total.prototypes(1, 2).present.tolist() == [True, False, True]
    at_limit = int(total.voxels[0])
    assert total.prototypes(1, at_limit).present.tolist()[0]
    assert not total.prototypes(1, at_limit + 1).present.tolist()[0]
    left_out = total.prototypes(2, 1)
    for tensor in left_out.tensors().values():
        assert not tensor[1:].any()  # not a bit of those few leaves
    nobody = PrototypeSum.zero(CLASSES, CHANNELS).prototypes(0, 0)
    assert not nobody.present.any()
    assert torch.isfinite(nobody.mean).all()


def test_by_default_the_least_number_of_patients_is_that_of_all_that_leaves():
    crowd = [PrototypeSum.of_patient([piece(f"crowd {n}", batch=4)]) for n in range(MIN_PATIENTS)]
    total = crowd[0]
    for patient in crowd[1:-1]:
        total = total + patient
    assert total.voxels.min() > 200
    assert not total.prototypes().present.any()
    assert (total + crowd[-1]).prototypes().present.all()


def test_merged_prototypes_of_sites_are_those_of_all_voxels():
    at_one, at_other = [piece("a"), piece_without(2, "b")], [piece_without(0, "c")]
    sites = [PrototypeSum.of_patient(p).prototypes(1, 1) for p in (at_one, at_other)]
    together = merged(sites)
    mean, variance, voxels = reference(at_one + at_other)
    np.testing.assert_allclose(together.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(together.variance, variance, rtol=1e-5)
    assert together.voxels.tolist() == voxels.tolist()
    assert not merged(
        [PrototypeSum.zero(2, 3).prototypes(), PrototypeSum.zero(2, 3).prototypes()]
    ).present.any()


def test_what_cannot_be_added():
    with pytest.raises(ExchangeError, match="same classes and channels"):
        PrototypeSum.zero(2, 3) + PrototypeSum.zero(2, 4)
    with pytest.raises(ExchangeError, match="of one shape"):
        merged([])
    with pytest.raises(ExchangeError, match="of one shape"):
        merged([by_hand(), PrototypeSum.zero(2, 2).prototypes()])
    with pytest.raises(TrainingError, match="at least one piece"):
        PrototypeSum.of_patient([])
    features, members = piece("a")
    with pytest.raises(TrainingError, match="one batch and grid"):
        PrototypeSum.of_patient([(features, members[..., :1])])
    features[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        PrototypeSum.of_patient([(features, members)])


def test_the_gap_by_hand():
    features = torch.tensor([[2.0, 3.0], [2.0, -1.0]]).T.reshape(1, 2, 2)  # voxels (2, 3), (2, -1)
    probabilities = torch.tensor([[0.5, 0.25], [0.25, 0.5], [0.25, 0.25]]).view(1, 3, 2)
    to_first = [(4 / 1 + 4 / 4) / 2, (4 / 1 + 4 / 4) / 2]  # mean_ch (f - mu_0)^2 / var_0
    to_second = [(0 / 0.25 + 16 / 1) / 2, 0.0]
    expected = [0.5 * to_first[0] + 0.25 * to_second[0], 0.25 * to_first[1] + 0.5 * to_second[1]]
    found = gap(features, probabilities, by_hand(), eps=0.0)
    assert found.shape == (1, 1, 2)
    assert found.flatten().tolist() == pytest.approx(expected)
    # The third class does not exist: its probability adds nothing, its zeros are no prototype.
    only = torch.zeros(1, 3, 2)
    only[:, 2] = 1
    assert not gap(features, only, by_hand()).any()


def test_the_gap_voxel_by_voxel():
    features, probabilities, prototypes = some()
    found = gap(features, probabilities, prototypes).numpy()
    f, p = features.double().numpy(), probabilities.double().numpy()
    mean, variance = prototypes.mean.double().numpy(), prototypes.variance.double().numpy()
    for b, x, y, z in itertools.product(range(2), range(3), range(4), range(2)):
        here = f[b, :, x, y, z]
        terms = [
            p[b, j, x, y, z] * np.mean((here - mean[j]) ** 2 / (variance[j] + EPS))
            for j in range(CLASSES)
        ]
        assert found[b, 0, x, y, z] == pytest.approx(sum(terms), rel=1e-5)


def test_half_precision_features_have_a_float32_gap():
    features = torch.full((1, 2, 1), 300.0, dtype=torch.float16)
    found = gap(features, torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1), by_hand(), eps=0.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx((300**2 + 299**2 / 4) / 2)


def test_what_has_no_gap():
    features, probabilities, prototypes = some()
    for wrong in (
        (features[:, :2], probabilities, prototypes),
        (features, probabilities[:, :2], prototypes),
        (features, probabilities[..., :1], prototypes),
        (features[:1], probabilities, prototypes),
    ):
        with pytest.raises(TrainingError, match="on one grid"):
            gap(*wrong)


def test_the_mask_is_one_from_the_quantile_on():
    values = torch.arange(101.0).view(1, 1, 101).requires_grad_()  # its 95 % quantile is 95
    mask = gap_mask(values)
    assert not mask.requires_grad
    assert mask.flatten().tolist() == pytest.approx([min(v / 95, 1) for v in range(101)])
    assert torch.equal(gap_mask(torch.zeros(1, 1, 4)), torch.zeros(1, 1, 4))
    lone = torch.zeros(1, 1, 100)
    lone[0, 0, 7] = 3
    assert torch.equal(gap_mask(lone), (lone > 0).float())


def masked_means(features, probabilities, prototypes, certain, strength):
    """The loss by its formula in float64, its mask a constant."""
    g = gap(features.detach(), probabilities, prototypes).double()
    mask = 1 + strength * (g / np.quantile(g.numpy(), 0.95)).clamp(max=1)
    terms = []
    for j in range(CLASSES):
        w = (mask * probabilities[:, j : j + 1].double())[certain]  # place after place
        f = torch.stack([features[:, c : c + 1].double()[certain] for c in range(CHANNELS)])
        mean, variance = prototypes.mean[j].double(), prototypes.variance[j].double()
        terms.append((((f * w).sum(1) / w.sum() - mean) ** 2 / (variance + EPS)).mean())
    return torch.stack(terms).mean()


def test_the_loss_is_of_masked_means_over_confident_places():
    features, probabilities, prototypes = some(requires_grad=True)
    certain = probabilities.amax(1, keepdim=True) > 0.6
    assert 0 < certain.sum() < certain.numel()
    assert bool(((probabilities * certain).sum((0, 2, 3, 4)) >= SEEN).all())
    loss = alignment_loss(features, probabilities, prototypes, certain, strength=0.5)
    expected = masked_means(features, probabilities, prototypes, certain, 0.5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.equal(gradient.abs().sum(1, keepdim=True) > 0, certain)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])


def test_features_spread_about_their_prototype_have_nothing_to_learn():
    prototypes = by_hand()
    spread = torch.tensor([[-1.0, 1.0], [2.0, -2.0]]).T  # places, channels
    features = (prototypes.mean[0] + spread).T.reshape(1, 2, 2).requires_grad_()
    certain = torch.ones(1, 1, 2, dtype=torch.bool)
    first = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1).expand(1, 3, 2)
    assert gap(features, first, prototypes).min() > 0
    loss = alignment_loss(features, first, prototypes, certain, strength=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert features.grad is not None
    assert not features.grad.any()


def test_a_class_that_is_hardly_seen_draws_nobody():
    features, _, prototypes = some(requires_grad=True)
    everywhere = torch.ones(2, 1, *features.shape[2:], dtype=torch.bool)
    size = everywhere.numel()
    rare = torch.zeros(2, CLASSES, *features.shape[2:])
    for mass, drawn in ((0.99, [0]), (1.01, [0, 1])):
        rare[:, 1], rare[:, 0] = mass / size, 1 - mass / size
        loss = alignment_loss(features, rare, prototypes, everywhere, strength=0.0)
        terms = []
        for j in drawn:
            weight = rare[:, j : j + 1]
            mean = (weight * features).sum((0, 2, 3, 4)) / weight.sum()
            terms.append(((mean - prototypes.mean[j]) ** 2 / (prototypes.variance[j] + EPS)).mean())
        assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


def test_nothing_confident_is_a_loss_of_zero():
    features, probabilities, prototypes = some(requires_grad=True)
    nowhere = torch.zeros(2, 1, *features.shape[2:], dtype=torch.bool)
    loss = alignment_loss(features, probabilities, prototypes, nowhere)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_no_class_at_all_is_a_loss_of_zero():
    features, probabilities, _ = some(requires_grad=True)
    unknown = PrototypeSum.zero(CLASSES, CHANNELS).prototypes()
    everywhere = torch.ones(2, 1, *features.shape[2:], dtype=torch.bool)
    loss = alignment_loss(features, probabilities, unknown, everywhere)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_the_gradient_flows_to_features_alone():
    features, probabilities, prototypes = some(requires_grad=True)
    for tensor in (probabilities, prototypes.mean, prototypes.variance):
        tensor.requires_grad_()
    everywhere = torch.ones(2, 1, *features.shape[2:], dtype=torch.bool)
    alignment_loss(features, probabilities, prototypes, everywhere).backward()
    assert features.grad is not None
    assert features.grad.any()
    assert [t.grad for t in (probabilities, prototypes.mean, prototypes.variance)] == [None] * 3


def test_a_step_down_the_loss_brings_the_classes_nearer():
    features, probabilities, prototypes = some(requires_grad=True)
    everywhere = torch.ones(2, 1, *features.shape[2:], dtype=torch.bool)
    before = alignment_loss(features, probabilities, prototypes, everywhere)
    (slope,) = torch.autograd.grad(before, features)
    after = alignment_loss(features - 0.1 * slope, probabilities, prototypes, everywhere)
    assert after < before


def test_the_loss_needs_flags_of_its_grid():
    features, probabilities, prototypes = some()
    for wrong in (torch.ones(2, *features.shape[2:], dtype=torch.bool), torch.ones(2, 1, 3, 4, 2)):
        with pytest.raises(TrainingError, match=r"expected \(2, 1, 3, 4, 2\) torch.bool"):
            alignment_loss(features, probabilities, prototypes, wrong)


def test_members_are_the_labels_at_the_centres_of_the_cells():
    label = torch.zeros(1, 6, 3, 3, dtype=torch.uint8)
    label[0, 1] = 9  # the middle of the first three slices
    label[0, 4, 1, 1] = 2
    members = class_members(label, EXCLUSIVE, (2, 3, 3))
    assert members.shape == (1, 3, 2, 3, 3)
    assert members.dtype == torch.bool
    assert torch.equal(members.sum(1), torch.ones(1, 2, 3, 3, dtype=torch.long))
    assert members[0, 1, 0].all()
    assert not members[0, 1, 1].any()
    assert members[0, 2].nonzero().tolist() == [[1, 1, 1]]
    label[0, 1], label[0, 0], label[0, 2] = 0, 9, 9  # beside the centres now
    assert not class_members(label, EXCLUSIVE, (2, 3, 3))[0, 1].any()


def test_overlapping_members_have_no_background():
    label = torch.tensor([0, 1, 4], dtype=torch.uint8).view(1, 1, 1, 3)
    members = class_members(label, OVERLAPPING, (1, 1, 3))
    assert members[0, :, 0, 0].tolist() == [[False, True, True], [False, False, True]]


def test_what_a_site_does_not_annotate_has_no_members():
    label = torch.tensor([0, 2, 4], dtype=torch.uint8).view(1, 1, 1, 3)
    members = class_members(label, EXCLUSIVE, (1, 1, 3), annotated=[True, False])
    # Background may hold the spleen, so it is no class of this site either.
    assert members[0, :, 0, 0].tolist() == [[False] * 3, [False, False, True], [False] * 3]


def test_the_wire_form_and_back():
    first, second = patients("a", "b")
    sent = (first + second).prototypes(2, 1)
    schema = prototype_schema(CLASSES, CHANNELS)
    assert schema.numel == CLASSES * (2 * CHANNELS + 1)
    received = check_prototypes(
        unflatten(flatten(sent.tensors(), schema), schema), CLASSES, CHANNELS
    )
    for name, tensor in sent.tensors().items():
        assert torch.equal(tensor, received.tensors()[name])
    absent = (first + second).prototypes(3, 1)
    assert not check_prototypes(absent.tensors(), CLASSES, CHANNELS).present.any()


def test_nothing_that_travels_has_a_spatial_axis():
    schema = prototype_schema(CLASSES, CHANNELS)
    shapes = {spec.name: spec.shape for spec in schema.tensors}
    table = (CLASSES, CHANNELS)
    assert shapes == {"present": (CLASSES,), "mean": table, "variance": table}


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("mean", (0, 1), float("nan"), "not finite"),
        ("variance", (1, 0), float("inf"), "not finite"),
        ("present", (1,), float("nan"), "not finite"),
        ("variance", (0, 0), -1e-6, "variance is negative"),
        ("present", (0,), -1.0, "another number"),
        ("present", (0,), 0.5, "another number"),
        ("present", (0,), 120.0, "another number"),
        ("mean", (0, 0), -1.01 * MAX_MEAN, "at most"),
        ("variance", (0, 0), 1.01 * MAX_VARIANCE, "at most"),
        ("mean", (2, 1), 0.5, "expected zeros"),
        ("variance", (2, 1), 0.5, "expected zeros"),
    ],
)
def test_refused_numbers(name: str, place: tuple[int, ...], value: float, said: str):
    tensors = by_hand().tensors()
    assert check_prototypes(tensors, 3, 2).present.tolist() == [True, True, False]
    tensors[name][place] = value
    with pytest.raises(ExchangeError, match=said):
        check_prototypes(tensors, 3, 2)


def test_refused_forms():
    tensors = by_hand().tensors()
    for classes, channels in ((2, 2), (3, 3)):
        with pytest.raises(ExchangeError, match="expected mean"):
            check_prototypes(tensors, classes, channels)
    with pytest.raises(ExchangeError, match="expected mean"):
        check_prototypes({"mean": tensors["mean"]}, 3, 2)
    with pytest.raises(ExchangeError, match="expected mean"):
        check_prototypes({**tensors, "more": torch.zeros(1)}, 3, 2)
    with pytest.raises(ExchangeError, match=r"only torch\.float32"):
        check_prototypes({**tensors, "mean": tensors["mean"].double()}, 3, 2)


def test_those_of_all_may_vary_more_than_those_of_one():
    tensors = by_hand().tensors()
    tensors["variance"][0, 0] = MAX_MERGED
    assert check_prototypes(tensors, 3, 2, together=True).present.tolist() == [True, True, False]
    tensors["variance"][0, 0] = 1.01 * MAX_MERGED
    with pytest.raises(ExchangeError, match="at most"):
        check_prototypes(tensors, 3, 2, together=True)
