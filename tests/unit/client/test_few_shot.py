"""A new domain from a few labelled cases: what moves, what rests, and what is kept."""

from __future__ import annotations

import csv
import tempfile
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import published as support
from uharmony_client import evaluate
from uharmony_client import few_shot as module
from uharmony_client.domain_choice import DomainChooser
from uharmony_client.few_shot import fit_domain, save_fitted
from uharmony_client.site_config import SiteConfig
from uharmony_model.bundle import load_bundle, save_bundle
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.exchange.partition import Partition
from uharmony_model.networks import build_network

CPU = torch.device("cpu")


def load(folder):
    return load_bundle(folder, None)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def chooser(tmp_path, study):
    return DomainChooser.of(load(support.write_model(tmp_path / "model", study)), None)


@pytest.fixture
def write_cases(tmp_path, write_nifti):
    """Cases in which `core` (2) is bright, and `edema` (1) around it less so."""

    def write(count=4, *, labelled=None, name="cases", reverse=False, **columns):
        rows = []
        for number in range(count):
            rng = np.random.default_rng(number)
            label = np.zeros((8, 8, 8), np.uint8)
            label[1:6, 2:7, 2:6], label[2:5, 3:6, 3:5] = 1, 2
            image = (100 + 40 * label + rng.normal(0, 5, label.shape)).astype("f4")
            write_nifti(f"{name}/images/c{number}.nii.gz", image)
            row = {"case": f"c{number}"}
            if labelled is None or number < labelled:
                write_nifti(f"{name}/labels/c{number}.nii.gz", label)
                row["label"] = f"labels/c{number}.nii.gz"
            else:
                row["label"] = ""
            rows.append(row | {k: values[number] for k, values in columns.items()})
        with (tmp_path / name / "cases.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(reversed(rows) if reverse else rows)
        return tmp_path / name

    return write


def fit(chooser, folder, steps=2, **options):
    return fit_domain(chooser, folder, name="here", device=CPU, steps=steps, **options)


def test_shared_weights_rest_and_every_kind_of_residual_moves(
    chooser, write_cases, tmp_path, study, temporary
):
    state = torch.get_rng_state()
    seen = []
    fitted = fit(
        chooser, write_cases(2), steps=3, on_step=lambda step, loss: seen.append((step, loss))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(np.isfinite(loss) for _, loss in seen)
    assert all(key.endswith("@here") for key in fitted.local)
    kinds = {key.partition("@")[0].rpartition(".")[2] for key, t in fitted.local.items() if t.any()}
    assert {"gain", "shift", "weight_residual"} <= kinds
    assert (fitted.kept, fitted.held_out, fitted.trained_on) == ("fitted", (), ("c0", "c1"))
    assert "2 cases trained on, too few to keep one" in fitted.summary
    save_fitted(tmp_path / "new", chooser, fitted)
    before = load_file(tmp_path / "model" / "shared.safetensors")
    after = load_file(tmp_path / "new" / "shared.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    model = load_bundle(tmp_path / "new", "here")
    assert model.domains == ("here",)
    local = Partition.of(model.network, study.plan.local).split(model.network.state_dict())[1]
    assert local.keys() == fitted.local.keys()
    assert all(torch.equal(local[key], fitted.local[key]) for key in local)
    assert list(temporary.glob("uharmony*")) == []


def test_the_same_cases_give_the_same_bits_in_any_order(chooser, write_cases):
    first = fit(chooser, write_cases(3))
    again = fit(chooser, write_cases(3, reverse=True))
    assert first.local.keys() == again.local.keys()
    assert all(torch.equal(first.local[key], again.local[key]) for key in first.local)
    other = fit_domain(chooser, write_cases(3), name="there", device=CPU, steps=2)
    assert any(
        not torch.equal(tensor, other.local[key.replace("@here", "@there")])
        for key, tensor in first.local.items()
    )


def test_it_learns_what_the_cases_show(write_cases, study, tmp_path):
    # The shared weights are drawn: with a head of its own a domain can make something of them.
    content = study.model_dump()
    content["network"]["harmonization"]["residuals"] = ("phi", "stem", "head")
    study = type(study).model_validate(content)
    training = study.training.model_copy(update={"learning_rate": 0.05, "augment": False})
    model = load(support.write_model(tmp_path / "model", study))
    folder = write_cases(5)
    faster = DomainChooser(
        model=type(model)(
            model.network,
            study.model_copy(update={"training": training}),
            model.domains,
            model.modalities,
            model.digest,
        )
    )
    fitted = fit(faster, folder, steps=60)
    assert len(fitted.held_out) == 1
    assert fitted.held_out[0] not in fitted.trained_on
    assert len(fitted.trained_on) == 4
    assert fitted.kept == "fitted"
    assert fitted.dice["fitted"] > 0.6
    assert fitted.dice["fitted"] > fitted.dice["zero"] + 0.2
    assert fitted.facts == {
        "cases": 5,
        "held_out": 1,
        "steps": 60,
        "kept": "fitted",
        "dice": dict(fitted.dice),
    }


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({"zero": 0.6, "start": 0.5, "fitted": 0.4}, "zero"),
        ({"zero": 0.3, "start": 0.5, "fitted": 0.4}, "start"),
        ({"zero": 0.5, "start": 0.5, "fitted": 0.5}, "zero"),
        ({"zero": None, "start": 0.1, "fitted": 0.2}, "fitted"),
        ({"zero": None, "start": None, "fitted": None}, "fitted"),
    ],
)
def test_the_best_on_the_held_out_patient_is_kept(
    tmp_path, study, write_cases, monkeypatch, scores, kept
):
    model = load(support.write_model(tmp_path / "model", study))
    published = support.publication(study)
    chooser = DomainChooser.of(model, published)
    measured = []

    def scripted(network, volumes, model, device, annotated):
        partition = Partition.of(network, study.plan.local)
        local = partition.split(network.state_dict())[1]
        measured.append({key: tensor.clone() for key, tensor in local.items()})
        assert [volume.case.case for volume in volumes] == list(held)
        return list(scores.values())[len(measured) - 1]

    monkeypatch.setattr(module, "_mean_dice", scripted)
    folder = write_cases(4)
    patients = [f"c{number}" for number in range(4)]
    labelled = module._labelled(folder, "here", ())
    chosen = module._without_one_patient(labelled, study.seed, "here")[1]
    held = [case.case for case in chosen]
    assert set(held) < set(patients)
    fitted = fit(chooser, folder)
    assert fitted.dice == scores
    assert fitted.kept == kept
    by_kind = dict(zip(scores, measured, strict=True))
    assert not any(tensor.any() for tensor in by_kind["zero"].values())
    assert all(torch.equal(fitted.local[key], t) for key, t in by_kind[kept].items())
    # The start: the experts' residuals, by the gate's weights for the trained cases' mean.
    volumes = [
        support.normalised(np.asanyarray(image)) for image in _images(folder, fitted.trained_on)
    ]
    rows = np.mean([chooser.describe(volume) for volume in volumes], axis=0)
    assert chooser.gate is not None
    weights = chooser.gate.choose(rows).weights
    local = support.tensors(study)[1]
    places = [("north", "n1"), ("north", "n2"), ("south", "s")]
    for key, tensor in by_kind["start"].items():
        base = key.partition("@")[0]
        expected = sum(
            float(w) * local[site][f"{base}@{domain}"]
            for w, (site, domain) in zip(weights, places, strict=True)
        )
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(by_kind["start"][k], t) for k, t in by_kind["fitted"].items())


def _images(folder, cases):
    for case in cases:
        image = nib.as_closest_canonical(nib.load(folder / "images" / f"{case}.nii.gz"))
        yield image.get_fdata()


def test_cases_of_one_patient_stay_together(chooser, write_cases):
    patients = ["p0", "p0", "p1", "p1", "p2", "p3"]
    fitted = fit(chooser, write_cases(6, patient=patients))
    of = {f"c{number}": patient for number, patient in enumerate(patients)}
    assert len({of[case] for case in fitted.held_out}) == 1
    assert {of[c] for c in fitted.held_out}.isdisjoint(of[c] for c in fitted.trained_on)
    assert len(fitted.held_out) + len(fitted.trained_on) == 6
    few = fit(chooser, write_cases(6, patient=["p0", "p0", "p1", "p1", "p2", "p2"], name="few"))
    assert few.held_out == ()


@pytest.mark.parametrize("labelled", [0, 1])
def test_fewer_than_two_labelled_cases_are_refused(chooser, write_cases, temporary, labelled):
    with pytest.raises(DataError, match=f"{labelled} of 3 cases have a label; expected at least 2"):
        fit(chooser, write_cases(3, labelled=labelled))
    assert list(temporary.glob("uharmony*")) == []


def test_cases_without_a_label_are_not_used(chooser, write_cases):
    fitted = fit(chooser, write_cases(4, labelled=2))
    assert (fitted.trained_on, fitted.held_out) == (("c0", "c1"), ())


def test_several_domains_are_refused(chooser, write_cases):
    with pytest.raises(DataError, match="cases of 2 domains"):
        fit(chooser, write_cases(2, domain=["a", "b"]))


def test_a_case_that_does_not_fit_leaves_no_volumes_behind(
    chooser, write_cases, write_nifti, temporary
):
    folder = write_cases(3)
    write_nifti("cases/labels/c2.nii.gz", np.full((8, 8, 8), 7, np.uint8))
    with pytest.raises(DataError, match="label value 7"):
        fit(chooser, folder)
    assert list(temporary.glob("uharmony*")) == []


def test_cases_that_name_no_modality_get_the_given_one(chooser, write_cases):
    assert fit(chooser, write_cases(2), modalities=("T1",)).modalities == ("T1",)
    assert fit(chooser, write_cases(2)).modalities == ()
    with pytest.raises(DataError, match="'CT' is not in the study"):
        fit(chooser, write_cases(2), modalities=("CT",))


def test_a_class_that_is_not_annotated_is_no_background(chooser, write_cases):
    """`core` lies inside `edema`; with labels of `edema` alone it must not be unlearned."""
    folder = write_cases(2)
    for path in (folder / "labels").iterdir():
        label = nib.Nifti1Image.from_filename(path)
        drawn = np.where(np.asanyarray(label.dataobj) == 1, 1, 0).astype("u1")
        nib.save(nib.Nifti1Image(drawn, label.affine), path)

    def of(**said):
        config = SiteConfig(name="x", cases=folder, store=folder, **said)
        seen = []
        fitted = fit(chooser, folder, like=config, on_step=lambda step, loss: seen.append(loss))
        assert fitted.name == "here"
        return fitted, seen

    whole, partial = of(), of(annotated=("edema",))
    plain = []
    fit(chooser, folder, on_step=lambda step, loss: plain.append(loss))
    assert whole[1] == plain
    assert partial[1][0] != whole[1][0]
    assert any(not torch.equal(whole[0].local[k], t) for k, t in partial[0].local.items())
    with pytest.raises(ConfigError, match="annotated names liver; the study's classes are edema"):
        of(annotated=("liver",))


def test_what_it_is_chosen_by_is_what_is_served(chooser, write_cases, tmp_path, monkeypatch):
    """Where the shared model divides the rest, masks of drawn classes are others too."""
    folder = write_cases(4)
    values = {1: 1, 2: 0}
    config = SiteConfig(
        name="x", cases=folder, store=folder, annotated=("edema",), label_map=values
    )
    measured = []
    real = evaluate.measure_volume

    def remember(network, volume, *given, **named):
        measured.append((volume, given, named))
        return real(network, volume, *given, **named)

    monkeypatch.setattr(module, "measure_volume", remember)
    fitted = fit(chooser, folder, steps=20, like=config)
    assert fitted.undrawn == ("core",)
    save_fitted(tmp_path / "made", chooser, fitted)
    served = load_bundle(tmp_path / "made", "here").predictor
    volume, given, named = measured[-1]
    found = evaluate.mean_dice(real(served, volume, *given, **named))
    assert found == fitted.dice[fitted.kept]


def test_only_annotated_classes_are_measured_to_choose_by(chooser, write_cases, monkeypatch):
    """A class that nobody drew would count as found where there is none."""

    def measured(*given, annotated, **named):
        flags = zip((0.25, 0.75), annotated.tolist(), strict=True)
        return [SimpleNamespace(dice=dice if known else None) for dice, known in flags]

    monkeypatch.setattr(evaluate, "measure_case", measured)
    folder = write_cases(4)
    for said, wanted in ((("edema",), 0.25), (("core",), 0.75), (None, 0.5)):
        values = {1: 1, 2: 2} if said is None else {1: 0, 2: 2} if "core" in said else {2: 0}
        config = SiteConfig(name="x", cases=folder, store=folder, annotated=said, label_map=values)
        assert fit(chooser, folder, like=config).dice == {"zero": wanted, "fitted": wanted}


def test_labels_and_modalities_are_named_as_the_site_names_them(chooser, write_cases, write_nifti):
    folder = write_cases(2, modality=["t1w", "t1w"])
    for number in range(2):
        path = folder / "labels" / f"c{number}.nii.gz"
        label = np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj).astype("u1")
        write_nifti(f"cases/labels/c{number}.nii.gz", np.where(label == 2, 7, label).astype("u1"))
    with pytest.raises(DataError, match="'t1w' is not in the study"):
        fit(chooser, folder)
    config = SiteConfig(
        name="x", cases=folder, store=folder, label_map={7: 2}, modality_map={"t1w": "T1"}
    )
    assert fit(chooser, folder, like=config).modalities == ("T1",)


def test_a_modality_that_the_site_lacks_is_not_there_here(tmp_path, study, write_cases):
    """The second channel is in the files, but the site's own training never saw it."""
    task = {**study.task.model_dump(), "presence": True}
    task["intensity"] = {"T1": {"policy": "zscore"}, "T2": {"policy": "zscore"}}
    chosen = study.model_validate({**study.model_dump(), "task": {**task, "channels": 2}})
    network = build_network(chosen, ("x",), seed=1)
    shared = Partition.of(network, chosen.plan.local).split(network.state_dict())[0]
    save_bundle(tmp_path / "both", chosen, shared, {}, {})
    both = DomainChooser.of(load(tmp_path / "both"), None)
    folder = write_cases(
        2,
        image=[f"images/c{n}.nii.gz|images/c{n}.nii.gz" for n in range(2)],
        modality=["T1|T2", "T1|T2"],
    )
    assert fit(both, folder).modalities == ("T1", "T2")
    config = SiteConfig(name="x", cases=folder, store=folder, missing=("T2",))
    assert fit(both, folder, like=config).modalities == ("T1",)


def test_a_name_that_is_none(chooser, write_cases):
    with pytest.raises(ConfigError, match="--name"):
        fit_domain(chooser, write_cases(2), name="a/b", device=CPU, steps=1)


@pytest.mark.parametrize("method", ["fedavg", "uharmony-averaged"])
def test_a_method_without_residuals_cannot_be_fitted(tmp_path, study, write_cases, method):
    chosen = study.model_copy(update={"method": method})
    network = build_network(chosen, ("x",), seed=1)
    shared = Partition.of(network, chosen.plan.local).split(network.state_dict())[0]
    save_bundle(tmp_path / method, chosen, shared, {}, {})
    with pytest.raises(ConfigError, match="no residuals that a new site could fit"):
        fit(DomainChooser.of(load(tmp_path / method), None), write_cases(2))
