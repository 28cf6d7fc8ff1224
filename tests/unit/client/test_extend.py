"""A trained model with a class, a modality or a domain more: the old outputs stay to the bit."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import published as support
from tests.support.nifti_files import read_nifti
from uharmony_client import extend as module
from uharmony_client.app import main
from uharmony_client.extend_model import OFF, OldSite, grown_site
from uharmony_client.extend_options import grown_study
from uharmony_client.predict import main as predict_main
from uharmony_model.bundle import load_bundle, save_bundle
from uharmony_model.errors import StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.extension import new_entries
from uharmony_model.extension_line import LINE, read_line
from uharmony_model.methods import EVERYTHING
from uharmony_model.networks import build_network
from uharmony_model.publication import read_publication
from uharmony_model.study import Study

SITES = {"north": ("n1", "n2"), "south": ("s",)}
METHODS = ("uharmony", "u2net")
FEATURES = {"uharmony": (4, 8), "u2net": (4, 6, 8)}  # with an auxiliary head


def study_of(method: str, **task) -> Study:
    content = {
        "classes": {"edema": (1,), "core": (2,)},
        "intensity": {"T1": {"policy": "zscore"}},
        "channels": 1,
    }
    training = {"patch": (8, 8, 8), "learning_rate": 0.05, "weight_decay": 0.1, "augment": False}
    return Study.model_validate(
        {
            "name": "test",
            "method": method,
            "task": content | task,
            "network": {"features": FEATURES.get(method, (4, 8))},
            "training": training,
        }
    )


def drawn(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {k: t + 0.3 * torch.randn(t.shape, generator=draw) for k, t in state.items()}


def write_model(folder: Path, study: Study, sites=SITES, own=()) -> Path:
    """A finished model with random weights; the sites of `own` have a model of their own."""
    shared: dict[str, Tensor] = {}
    local = {}
    for number, (site, domains) in enumerate(sites.items()):
        chosen = study.with_method("local") if site in own else study
        parts = EVERYTHING if site in own else study.plan.local
        network = build_network(chosen, domains, seed=5)
        common, here = Partition.of(network, parts).split(network.state_dict())
        shared = shared or drawn(common, 9)
        local[site] = drawn(here, number)
    save_bundle(folder, study, shared, local, sites, own=dict.fromkeys(own, "local"))
    return folder


@pytest.fixture
def cases(tmp_path, write_nifti):
    """Cases with three blobs; the one of value 3 is by far the brightest."""

    def write(count=2, *, name="cases", values=(1, 2, 3), channels=1, **columns):
        rows = []
        for number in range(count):
            rng = np.random.default_rng(number)
            label = np.zeros((8, 8, 8), np.uint8)
            label[0:3], label[3:5], label[5:8] = 1, 2, 3
            image = (100 + 40 * label.astype("f4") ** 2 + rng.normal(0, 5, label.shape)).astype(
                "f4"
            )
            files = [f"images/c{number}_{channel}.nii" for channel in range(channels)]
            for place, file in enumerate(files):
                write_nifti(f"{name}/{file}", image if place == 0 else image[::-1].copy())
            kept = np.where(np.isin(label, values), label, 0).astype("u1")
            write_nifti(f"{name}/labels/c{number}.nii.gz", kept)
            row = {"case": f"c{number}", "image": "|".join(files)}
            rows.append(row | {"label": f"labels/c{number}.nii.gz"} | columns)
        with (tmp_path / name / "cases.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / name

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command as its console script does: exit code, lines of stdout, stderr."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out.splitlines(), said.err

    return run


@pytest.fixture
def extend(run):
    """Extend a model by the domain `here`, on one step."""

    def extend(model, cases, out, *words, steps=1, name="here"):
        given = ("--cases", cases, "--out", out, "--steps", steps, "--name", name)
        return run(main, "extend", model, *given, "--device", "cpu", *words)

    return extend


@pytest.fixture
def predict(run, tmp_path):
    """Segment a scan: exit code and stderr, results in tmp_path / NAME."""

    def predict(model, scan, site, name, *words):
        out = tmp_path / name
        given = ("--site", site, "--out", out, "--device", "cpu", *words)
        code, _, error = run(predict_main, model, scan, *given)
        return code, error

    return predict


def relabel(folder: Path, write_nifti, change) -> Path:
    """Change the label maps of a folder of cases."""
    for path in sorted((folder / "labels").iterdir()):
        label = np.asarray(read_nifti(path).dataobj).astype("u1")
        write_nifti(f"{folder.name}/labels/{path.name}", change(label))
    return folder


def random_image(channels: int, seed: int = 77) -> Tensor:
    return torch.randn(1, channels, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def logits(folder: Path, site: str | None, x: Tensor) -> list[Tensor]:
    model = load_bundle(folder, site)
    with torch.no_grad():
        if site is None:
            return [model.network(x)]
        return [model.network(x, torch.tensor([k])) for k in range(len(model.domains))]


@pytest.mark.parametrize("method", METHODS)
def test_a_new_class_is_learned_and_the_old_outputs_stay(tmp_path, cases, extend, method):
    model = write_model(tmp_path / "model", study_of(method))
    out = tmp_path / "out"
    code, said, error = extend(model, cases(2), out, "--class", "tumour=3", steps=25)
    assert (code, said[-1].startswith(f"wrote {out}")) == (0, True), error
    assert "same to the bit" in said[-2]
    assert "north/n1, north/n2, south/s" in said[-2]
    x = random_image(1)
    for site in SITES:
        for ours, theirs in zip(logits(out, site, x), logits(model, site, x), strict=True):
            assert ours.shape[1] == 4
            assert torch.equal(ours[:, :3], theirs)
            # It is off at the old sites, so their probabilities are the same too.
            assert torch.equal(ours.softmax(1)[:, :3], theirs.softmax(1))
            assert not ours.softmax(1)[:, 3].any()
    if method == "uharmony":
        ours, theirs = logits(out, None, x)[0], logits(model, None, x)[0]
        assert torch.equal(ours[:, :3], theirs)
        assert float(ours.softmax(1)[:, 3].max()) > 1e-3
    # An independent Dice of the new class on a training case.
    image = read_nifti(tmp_path / "cases/images/c0_0.nii").get_fdata()
    truth = read_nifti(tmp_path / "cases/labels/c0.nii.gz").get_fdata() == 3
    found = logits(out, "here", support.normalised(image)[None])[0][0].argmax(0).numpy() == 3
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.5
    assert f"tumour {dice:.3f}" in said[-3]
    assert [s.digest for s in read_line(out)] == [study_of(method).digest]


@pytest.mark.parametrize("method", METHODS)
def test_a_new_domain_leaves_every_old_file_and_segmentation(
    tmp_path, cases, extend, predict, method
):
    model = write_model(tmp_path / "model", study_of(method))
    folder, out = cases(5, values=(1, 2)), tmp_path / "out"
    code, said, error = extend(model, folder, out, steps=3)
    assert code == 0, error
    assert "4 cases trained on" in said[0]
    assert "1 held out" in said[0]
    same = ["study.json", "shared.safetensors", *(f"sites/{site}.safetensors" for site in SITES)]
    for name in same:
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert not (out / LINE).exists()
    fresh = write_model(tmp_path / "fresh", study_of(method), {"here": ("here",)})
    assert (
        load_file(out / "sites/here.safetensors").keys()
        == load_file(fresh / "sites/here.safetensors").keys()
    )
    scan = folder / "images" / "c0_0.nii"
    results = []
    for source in (model, out):
        name = f"{source.name}-seg"
        assert predict(source, scan, "south", name, "--probabilities") == (0, "")
        results.append(read_nifti(tmp_path / name / "c0_0_prob.nii.gz").get_fdata())
    np.testing.assert_array_equal(*results)
    assert predict(out, scan, "here", "new") == (0, "")


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_grew_twice_still_computes_what_it_did_first(
    tmp_path, cases, extend, write_nifti, method
):
    model = write_model(tmp_path / "model", study_of(method))
    first, second, folder = tmp_path / "first", tmp_path / "second", cases(2)
    assert extend(model, folder, first, "--class", "tumour=3")[0] == 0
    relabel(folder, write_nifti, lambda label: np.where(label == 1, 7, label).astype("u1"))
    code, _, error = extend(first, folder, second, "--class", "cyst=7", name="b")
    assert code == 0, error
    x = random_image(1)
    for site in SITES:
        lists = [logits(f, site, x) for f in (second, first, model)]
        for latest, grown, theirs in zip(*lists, strict=True):
            assert torch.equal(latest[:, :4], grown)
            assert torch.equal(latest[:, :3], theirs)
    for latest, grown in zip(logits(second, "here", x), logits(first, "here", x), strict=True):
        assert torch.equal(latest[:, :4], grown)
    assert len(read_line(second)) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_modality_more_is_a_channel_that_old_sites_lack(tmp_path, cases, extend, method):
    old = study_of(method, presence=True)
    model = write_model(tmp_path / "model", old)
    folder, out = cases(2, values=(1, 2), channels=2, modality="T1|PT"), tmp_path / "out"
    words = ["--modality", "PT=suv,high=300"]
    code, _, error = extend(model, folder, out, *words, steps=3)
    assert code == 0, error
    image, here, gone = random_image(1), torch.ones(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8)
    before, after = torch.cat((image, here), 1), torch.cat((gone, image, gone, here), 1)
    for site in SITES:
        for ours, theirs in zip(logits(out, site, after), logits(model, site, before), strict=True):
            assert torch.equal(ours, theirs)
    entry = json.loads((out / "sites/north.json").read_text())
    assert entry["modalities"] == ["T1"]
    assert json.loads((out / "sites/here.json").read_text())["modalities"] == ["T1", "PT"]
    study = load_bundle(out, "here").study
    assert (study.task.channels, study.task.intensity["PT"].model_dump()["high"]) == (2, 300.0)
    both = torch.cat((image, image, here, here), 1)
    with_pt, without = (logits(out, "here", x)[0] for x in (both, after))
    assert not torch.allclose(with_pt, without, atol=1e-3)


def test_a_modality_without_masks_is_another_look_of_the_same_channel(
    tmp_path, cases, extend, predict
):
    model = write_model(tmp_path / "model", study_of("u2net"))
    folder, out = cases(2, values=(1, 2), modality="CT"), tmp_path / "out"
    words = ["--modality", "CT=window,low=0,high=500"]
    assert extend(model, folder, out, *words)[0] == 0
    scan = folder / "images" / "c0_0.nii"
    for site in ("south", "here"):  # nobody has to name a modality
        assert predict(out, scan, site, site) == (0, "")
    several = cases(2, name="two", values=(1, 2), channels=2, modality="T1|CT")
    code, _, error = extend(model, several, tmp_path / "x", "--modality", "CT=zscore")
    assert code == 2
    assert "a channel more needs a model that was trained with task.presence: true" in error


def test_overlapping_classes_and_a_site_with_a_model_of_its_own(tmp_path, cases, extend):
    old = study_of("uharmony", overlapping=True)
    model = write_model(tmp_path / "model", old, own=("south",))
    out = tmp_path / "out"
    code, _, error = extend(model, cases(2), out, "--class", "whole=1,2,3")
    assert code == 0, error
    x = random_image(1)
    for site in SITES:
        for ours, theirs in zip(logits(out, site, x), logits(model, site, x), strict=True):
            assert torch.equal(ours[:, :2], theirs)
            assert float(ours[:, 2].max()) < OFF / 2
    assert json.loads((out / "sites/south.json").read_text())["own"] == "local"


@pytest.mark.parametrize("method", ["u2net-pooled", "pooled-uharmony"])
def test_a_pooled_network_takes_a_domain(tmp_path, cases, extend, method):
    model = write_model(tmp_path / "model", study_of(method), {"pooled": ("a", "b")})
    out = tmp_path / "out"
    code, said, error = extend(model, cases(2), out, "--class", "tumour=3")
    assert code == 0, error
    assert "pooled/a, pooled/b" in said[-2]
    tensors = [load_file(out / f"sites/{site}.safetensors") for site in ("pooled", "here")]
    bare = [name for name in tensors[0] if "@" not in name]
    assert bare
    for name in bare:
        theirs, ours = (each[name] for each in tensors)
        if method == "pooled-uharmony" and 4 in theirs.shape:  # the new class in a head for all
            place = theirs.shape.index(4)
            theirs, ours = (each.narrow(place, 0, 3) for each in (theirs, ours))
        assert torch.equal(theirs, ours), name


def test_a_model_without_entries_takes_a_site(tmp_path, cases, extend):
    study = study_of("u2net")
    model = write_model(tmp_path / "model", study)
    shared = load_file(model / "shared.safetensors")
    save_bundle(tmp_path / "bare", study, shared, {}, {})
    folder, out = cases(2, values=(1, 2)), tmp_path / "out"
    code, said, error = extend(tmp_path / "bare", folder, out)
    assert code == 0, error
    assert "no old site is in the folder to compare" in said[-2]
    assert load_bundle(out, "here").domains == ("here",)


@pytest.mark.parametrize("residuals", [("phi", "stem"), ("depthwise",), ("phi", "stem", "head")])
def test_a_class_brings_residuals_of_the_head_and_is_off_at_old_sites(
    tmp_path, cases, extend, write_nifti, residuals
):
    content = study_of("uharmony").model_dump()
    content["network"]["harmonization"]["residuals"] = residuals
    model = write_model(tmp_path / "model", Study.model_validate(content))
    out, twice = tmp_path / "out", tmp_path / "twice"
    code, said, error = extend(model, cases(2), out, "--class", "tumour=3", steps=20)
    assert code == 0, error
    new = load_bundle(out, "north").study.network.harmonization.residuals
    assert set(new) == {*residuals, "head"}
    # With all residuals zero there is no bias of a site's own to have it off.
    assert "all residuals zero (logits; the new class is on there), north/n1, " in said[-2]
    again = cases(2, name="again")
    relabel(again, write_nifti, lambda label: np.where(label == 3, 4, label))
    code, said, error = extend(out, again, twice, "--class", "cyst=4", name="there", steps=2)
    assert code == 0, error
    x = random_image(1)
    before = logits(model, "north", x)
    for folder in (out, twice):
        for ours, theirs in zip(logits(folder, "north", x), before, strict=True):
            assert torch.equal(ours[:, :3], theirs)
            assert not ours.softmax(1)[:, 3:].any()


def test_what_sites_published_goes_with_an_unchanged_network_alone(
    tmp_path, cases, extend, write_nifti, study
):
    model = support.published_model(tmp_path / "model", study)
    plain, grown = tmp_path / "plain", tmp_path / "grown"
    assert extend(model, cases(2, values=(1, 2)), plain)[0] == 0
    before, after = read_publication(model), read_publication(plain)
    assert before is not None
    assert after is not None
    assert before.digest == after.digest
    folder = cases(2, name="fourth")
    relabel(folder, write_nifti, lambda label: np.where(label == 3, 4, label).astype("u1"))
    code, _, error = extend(model, folder, grown, "--class", "tumour=4")
    assert code == 0, error
    assert read_publication(grown) is None
    assert "is left out of the new one" in error


@pytest.mark.parametrize(
    ("words", "expected", "exit_code"),
    [
        (("--name", "north"), "the model has site north", 2),
        (("--name", "n2"), "the model has site north with the domains n1, n2", 2),
        (("--name", "a/b"), "--name or --annotated: name", 2),
        (("--class", "core=3"), "the model has a class core", 2),
        (("--class", "tumour=2"), "value 2 belongs to core", 2),
        (("--class", "tumour=3", "--class", "cyst=3"), "value 3 belongs to tumour", 2),
        (("--class", "tumour"), "expected NAME=VALUE", 2),
        (("--class", "tumour=0"), "greater than or equal to 1", 2),
        (("--class", "tumour=9"), "label value 3 is no class", 3),
        (("--modality", "T1=zscore"), "the model has T1", 2),
        (("--modality", "CT"), "expected NAME=POLICY", 2),
        (("--modality", "CT=gamma"), "task.intensity.CT", 2),
        (("--modality", "CT=zscore", "--class", "tumour=3"), "names no modality", 3),
        (
            ("--modality", "CT=zscore", "--class", "tumour=3", "--channels", "T1"),
            "names the modality CT",
            3,
        ),
        (("--class", "tumour=3", "--annotated", "core"), "leaves out the new class tumour", 2),
        (("--class", "tumour=3", "--class", "cyst=4"), "no case that is trained on draws cyst", 3),
        (("--device", "tpu"), "device 'tpu'", 2),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    tmp_path, cases, extend, words, expected, exit_code
):
    model, out = write_model(tmp_path / "model", study_of("uharmony")), tmp_path / "out"
    code, _, error = extend(model, cases(2), out, *words)
    assert (code, expected in error) == (exit_code, True), error
    assert error.splitlines()[-1].startswith("error: ")
    assert not out.exists()


@pytest.mark.parametrize("method", ["fedavg", "fedbn", "local", "uharmony-averaged"])
def test_a_model_that_keeps_nothing_of_a_domain_is_refused(tmp_path, cases, extend, method):
    model = tmp_path / "model"
    save_bundle(model, study_of(method), {}, {}, {})
    code, _, error = extend(model, cases(2), tmp_path / "out", "--class", "tumour=3")
    assert code == 2
    assert f"method {method} keeps nothing of a domain" in error


def test_folders_are_not_overwritten_unasked(tmp_path, cases, extend):
    model, folder = write_model(tmp_path / "model", study_of("uharmony")), cases(2, values=(1, 2))
    assert "is the model itself" in extend(model, folder, model, "--force")[2]
    out = write_model(tmp_path / "out", study_of("uharmony"))
    assert "use --force" in extend(model, folder, out)[2]
    assert extend(model, folder, out, "--force")[0] == 0
    assert "no study.json" in extend(tmp_path, folder, tmp_path / "x")[2]


def test_other_commands_still_need_a_site(run):
    expected: tuple[int, list[str], str] = (2, [], "error: Missing option '--site'. See --help.\n")
    assert run(main, "status") == expected
    assert run(main) == expected
    assert run(main, "--site", "nowhere", "status")[0] == 2


def test_an_entry_that_moved_is_found(tmp_path, cases, extend, monkeypatch):
    model, out = write_model(tmp_path / "model", study_of("uharmony")), tmp_path / "out"
    nothing = torch.nn.Linear(1, 1).register_forward_hook(lambda *_: None)
    monkeypatch.setattr(module, "hold_old", lambda *_: nothing)
    code, _, error = extend(model, cases(2), out, "--class", "tumour=3")
    assert (code, "an old entry has moved" in error, out.exists()) == (8, True, False)


def test_another_logit_is_found(tmp_path, cases, extend, monkeypatch):
    model, out = write_model(tmp_path / "model", study_of("u2net")), tmp_path / "out"

    def damaged(site, *rest):
        made = grown_site(site, *rest)
        local = {
            k: t * (1 + 1e-6) if "stem.conv.weight@s" in k else t for k, t in made.local.items()
        }
        return OldSite(local, made.domains, made.modalities, made.own)

    monkeypatch.setattr(module, "grown_site", damaged)
    code, _, error = extend(model, cases(2), out, "--class", "tumour=3")
    assert code == 8
    assert "south/s: logits of the old classes are not the same to the bit" in error
    assert not out.exists()


def test_the_list_of_studies_is_bounded_and_checked(tmp_path):
    for content, expected in (
        (b"{", "not readable"),
        (b" " * (2 << 20), "larger than"),
    ):
        (tmp_path / LINE).write_bytes(content)
        with pytest.raises(StoreError, match=expected):
            read_line(tmp_path)


def test_a_study_that_grows_keeps_its_order():
    grown = grown_study(study_of("u2net"), ["tumour=3,5"], ["CT=window,low=-10,high=90"])
    assert list(grown.task.classes.items()) == [("edema", (1,)), ("core", (2,)), ("tumour", (3, 5))]
    assert grown.task.intensity["CT"].model_dump() == {"policy": "window", "low": -10, "high": 90}
    assert grown.task.channels == 1


def test_a_domain_of_any_name_is_new():
    study = study_of("u2net")
    for name in ("here", "any"):
        entries = new_entries(study, study, (), (name,))
        local = Partition.of(build_network(study, (name,), seed=0), study.plan.local).local_keys
        assert {key for key, mask in entries.items() if mask.all()} == set(local)
        assert not any(mask.any() for key, mask in entries.items() if key not in local)


def test_a_bundle_that_grew_is_opened_so_that_old_logits_stay(tmp_path, cases, extend):
    model, out = write_model(tmp_path / "model", study_of("uharmony")), tmp_path / "out"
    assert extend(model, cases(2), out, "--class", "tumour=3")[0] == 0
    x, domain = random_image(1), torch.tensor([0])
    with torch.no_grad():
        ours, theirs = (load_bundle(f, "south").network(x, domain) for f in (out, model))
    torch.testing.assert_close(ours[:, :3], theirs)
    assert torch.equal(ours[:, :3], theirs)
