from __future__ import annotations

import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from safetensors.torch import load_file, save_file

from tests.support import published as support
from tests.support.nifti_files import read_nifti
from uharmony_client import predict as module
from uharmony_client.domain_choice import DomainChooser
from uharmony_model.atomic import write_atomic
from uharmony_model.bundle import load_bundle, save_bundle
from uharmony_model.errors import StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.networks import build_network
from uharmony_model.publication import read_publication

IMAGE = np.random.default_rng(0).normal(100, 20, (7, 8, 5)).astype("f4")
OBLIQUE = {
    "srow_x": (0.1, -2.0, 0.0, 14.0),
    "srow_y": (0.0, 0.1, 3.0, -9.0),
    "srow_z": (-1.5, 0.0, 0.1, 4.0),
}


@pytest.fixture
def bundle(tmp_path, study):
    """A folder of a model with random weights that give varied labels."""

    def write(name="model", **task):
        chosen = study.model_copy(update={"task": study.task.model_copy(update=task)})
        domains = {"north": ("n1", "n2"), "south": ("s",)}
        local = {}
        for site, names in domains.items():
            network = build_network(chosen, names, seed=5)
            draw = torch.Generator().manual_seed(len(names))
            state = {
                key: tensor + 0.5 * torch.randn(tensor.shape, generator=draw)
                for key, tensor in network.state_dict().items()
            }
            shared, local[site] = Partition.of(network, chosen.plan.local).split(state)
        save_bundle(tmp_path / name, chosen, shared, local, domains)
        return tmp_path / name

    return write


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command; gives exit code, stdout and stderr."""

    def run(*arguments):
        words = [str(a) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["uharmony-predict", *words])
        with pytest.raises(SystemExit) as ended:
            module.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def expected_probabilities(model, path, domain):
    """Softmax (J + 1, ...) on the file's axes, made with nibabel, numpy and one forward pass."""
    image = read_nifti(path)
    canonical = nib.as_closest_canonical(image)
    values = canonical.get_fdata()
    scaled = ((values - values.mean()) / values.std()).astype(np.float32)
    padded = np.full((8, 8, 8), scaled.min(), np.float32)
    start = [(8 - n) // 2 for n in scaled.shape]
    inside = tuple(slice(s, s + n) for s, n in zip(start, scaled.shape, strict=True))
    padded[inside] = scaled
    index = None if domain is None else torch.tensor([model.domains.index(domain)])
    with torch.no_grad():
        logits = model.network(torch.from_numpy(padded)[None, None], index)[0]
    probabilities = logits.softmax(dim=0).numpy()[(slice(None), *inside)]
    back = ornt_transform(axcodes2ornt("RAS"), io_orientation(image.affine))
    return np.stack([apply_orientation(p, back) for p in probabilities])


@pytest.mark.parametrize(("site", "domain"), [(None, None), ("south", "s"), ("north", "n2")])
def test_the_segmentation_lies_on_the_input_and_is_the_networks(
    bundle, command, write_nifti, tmp_path, site, domain
):
    path = write_nifti("scan.nii.gz", IMAGE, **OBLIQUE)
    choice = [] if site is None else ["--site", site, "--domain", domain]
    code, out, err = command(
        bundle(), path, *choice, "--out", tmp_path / "out", "--probabilities", "--device", "cpu"
    )
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'out' / 'scan_seg.nii.gz'}\n"
    probabilities = expected_probabilities(load_bundle(tmp_path / "model", site), path, domain)
    values = np.array([0, 1, 2])[probabilities.argmax(axis=0)]
    assert len(np.unique(values)) > 1
    segmentation = read_nifti(tmp_path / "out" / "scan_seg.nii.gz")
    np.testing.assert_array_equal(segmentation.affine, read_nifti(path).affine)
    assert segmentation.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(segmentation.get_fdata(), values)
    written = read_nifti(tmp_path / "out" / "scan_prob.nii.gz")
    np.testing.assert_array_equal(written.affine, read_nifti(path).affine)
    np.testing.assert_allclose(
        written.get_fdata(), np.moveaxis(probabilities[1:], 0, -1), atol=1e-5
    )
    facts = json.loads((tmp_path / "out" / "scan_seg.json").read_text())
    assert facts["site"] == site
    assert facts["domain"] == domain
    assert facts["classes"] == [
        {"name": "edema", "values": [1, 3]},
        {"name": "core", "values": [2]},
    ]
    assert facts["model"] == load_bundle(tmp_path / "model", site).digest


def test_site_and_domain_change_the_result(bundle, tmp_path, write_nifti):
    folder, path = bundle(), write_nifti("scan.nii.gz", IMAGE)
    results = [
        module.segment(
            load_bundle(folder, site), [path], ["T1"], domain, torch.device("cpu")
        ).probabilities
        for site, domain in ((None, None), ("south", "s"), ("north", "n1"), ("north", "n2"))
    ]
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            assert np.abs(first - second).max() > 1e-3


def test_overlapping_classes_are_one_mask_each(bundle, command, write_nifti, tmp_path):
    path = write_nifti("scan.nii.gz", IMAGE)
    code, _, err = command(
        bundle(overlapping=True), path, "--out", tmp_path, "--probabilities", "--site", "south"
    )
    assert (code, err) == (0, "")
    masks = read_nifti(tmp_path / "scan_seg.nii.gz").get_fdata()
    probabilities = read_nifti(tmp_path / "scan_prob.nii.gz").get_fdata()
    assert masks.shape == probabilities.shape == (7, 8, 5, 2)
    np.testing.assert_array_equal(masks, probabilities > 0.5)
    assert set(np.unique(masks)) == {0, 1}


def test_a_resampled_volume_comes_back_on_its_own_grid(bundle, command, write_nifti, tmp_path):
    path = write_nifti("scan.nii", IMAGE, **OBLIQUE)
    folder = bundle(spacing_mm=(1.3, 2.2, 2.9))
    code, _, err = command(folder, path, "--out", tmp_path, "--probabilities")
    assert (code, err) == (0, "")
    segmentation = read_nifti(tmp_path / "scan_seg.nii.gz")
    assert segmentation.shape == IMAGE.shape
    np.testing.assert_array_equal(segmentation.affine, read_nifti(path).affine)
    foreground = read_nifti(tmp_path / "scan_prob.nii.gz").get_fdata()
    everything = np.concatenate([1 - foreground.sum(-1, keepdims=True), foreground], axis=-1)
    sure = np.sort(everything, axis=-1)
    sure = sure[..., -1] - sure[..., -2] > 1e-5
    np.testing.assert_array_equal(
        segmentation.get_fdata()[sure], np.array([0, 1, 2])[everything.argmax(-1)][sure]
    )


def test_channels_of_a_case_are_joined_by_commas(bundle, command, write_nifti, tmp_path):
    files = [write_nifti(f"case_000{i}.nii.gz", IMAGE + i * IMAGE**2) for i in range(2)]
    folder = bundle(channels=2)
    code, _, err = command(folder, f"{files[0]},{files[1]}", "--out", tmp_path)
    assert (code, err) == (0, "")
    assert (tmp_path / "case_seg.nii.gz").is_file()
    code, _, err = command(folder, files[0], "--out", tmp_path)
    assert code == 3
    assert "1 channels" in err


def test_several_volumes_are_named_one_a_line(bundle, command, write_nifti, tmp_path):
    paths = [write_nifti(f"{name}.nii.gz", IMAGE) for name in "ab"]
    code, out, _ = command(bundle(), *paths, "--out", tmp_path)
    assert code == 0
    assert [line.rsplit("/")[-1] for line in out.splitlines()] == ["a_seg.nii.gz", "b_seg.nii.gz"]


def written_files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--site", "west"], 2, "it has north, south"),
        (["--site", "north"], 2, "the site has the domains n1, n2; choose one with --domain"),
        (["--site", "north", "--domain", "x"], 2, "there are: n1, n2"),
        (["--domain", "s"], 2, "none without --site"),
        (["--modality", "CT"], 3, "'CT' is not in the study, which has T1"),
        (["--device", "tpu"], 2, "expected auto, cpu, cuda"),
        (["--max-voxels", "10"], 3, "at most 10"),
        (["--surprise"], 2, "--surprise"),
    ],
)
def test_wrong_choices_end_in_one_line(
    bundle, command, write_nifti, tmp_path, arguments, code, expected
):
    path = write_nifti("scan.nii.gz", IMAGE)
    found, out, err = command(bundle(), path, "--out", tmp_path / "out", *arguments)
    assert found == code
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert expected in err
    assert written_files(tmp_path / "out") == []


def test_a_study_of_several_modalities_wants_one(bundle, command, write_nifti, tmp_path, study):
    policy = study.task.intensity["T1"]
    folder = bundle(intensity={"CT": policy, "T1": policy})
    path = write_nifti("scan.nii.gz", IMAGE)
    code, _, err = command(folder, path, "--out", tmp_path)
    assert code == 3
    assert "names no modality; the study has CT, T1" in err
    assert command(folder, path, "--out", tmp_path, "--modality", "CT")[0] == 0
    assert json.loads((tmp_path / "scan_seg.json").read_text())["modalities"] == ["CT"]


def test_bad_inputs_write_nothing(bundle, command, write_nifti, tmp_path):
    good = write_nifti("good.nii.gz", IMAGE)
    bad = write_nifti("bad.nii.gz", IMAGE)
    bad.write_bytes(bad.read_bytes()[:-20])
    out = tmp_path / "out"
    code, _, err = command(bundle(), bad, "--out", out)
    assert (code, err.count("\n")) == (3, 1)
    assert written_files(out) == []
    code, _, err = command(bundle(), tmp_path / "absent.nii", "--out", out)
    assert (code, err.count("\n")) == (3, 1)
    code, _, err = command(tmp_path / "nowhere", good, "--out", out)
    assert code == 2
    assert "give the folder of a model" in err


def test_results_are_overwritten_only_when_forced(bundle, command, write_nifti, tmp_path):
    path, folder, out = write_nifti("scan.nii.gz", IMAGE), bundle(), tmp_path / "out"
    assert command(folder, path, "--out", out)[0] == 0
    before = (out / "scan_seg.nii.gz").read_bytes()
    code, _, err = command(folder, path, "--out", out, "--site", "south")
    assert code == 2
    assert "--force" in err
    assert (out / "scan_seg.nii.gz").read_bytes() == before
    assert command(folder, path, "--out", out, "--site", "south", "--force")[0] == 0
    assert (out / "scan_seg.nii.gz").read_bytes() != before


def test_an_input_is_never_overwritten(bundle, command, write_nifti, tmp_path):
    path, tricky = write_nifti("a.nii.gz", IMAGE), write_nifti("a_seg.nii.gz", IMAGE)
    content = tricky.read_bytes()
    code, _, err = command(bundle(), path, tricky, "--out", tmp_path, "--force")
    assert code == 2
    assert "one of the inputs" in err
    assert tricky.read_bytes() == content


def test_two_inputs_of_one_name_are_refused(bundle, command, write_nifti, tmp_path):
    first, second = write_nifti("x/scan.nii", IMAGE), write_nifti("y/scan.nii.gz", IMAGE)
    code, _, err = command(bundle(), first, second, "--out", tmp_path)
    assert code == 2
    assert "two volumes" in err


def test_a_failed_write_leaves_nothing_of_the_case(
    bundle, command, write_nifti, tmp_path, monkeypatch
):
    def fails_at_the_end(path, content):
        if path.suffix == ".json":
            raise StoreError("disk full")
        write_atomic(path, content)

    monkeypatch.setattr("uharmony_client.predict.write_atomic", fails_at_the_end)
    path = write_nifti("scan.nii.gz", IMAGE)
    code, _, err = command(bundle(), path, "--out", tmp_path / "out", "--probabilities")
    assert (code, err) == (5, "error: disk full\n")
    assert written_files(tmp_path / "out") == []


def test_a_model_that_gives_nan_is_refused(bundle, command, write_nifti, tmp_path):
    folder = bundle()
    tensors = load_file(folder / "shared.safetensors")
    key = next(key for key in tensors if key.endswith("weight"))
    tensors[key] = torch.full_like(tensors[key], float("nan"))
    save_file(tensors, folder / "shared.safetensors")
    code, _, err = command(folder, write_nifti("scan.nii.gz", IMAGE), "--out", tmp_path / "out")
    assert code == 3
    assert "not finite" in err
    assert written_files(tmp_path / "out") == []


def test_a_file_name_with_a_comma_is_one_file(write_nifti):
    path = write_nifti("a,b.nii.gz", IMAGE)
    requests = module.plan_requests([str(path)])
    assert [(r.images, r.name) for r in requests] == [((path,), "a,b")]


@pytest.fixture
def published(tmp_path, study):
    """A model with published experts and prototypes."""
    return lambda **choices: support.published_model(tmp_path / "published", study, **choices)


def facts_of(folder, name="scan"):
    return json.loads((folder / f"{name}_seg.json").read_text())


def test_auto_segments_with_the_mixture_of_published_experts(
    published, command, write_nifti, tmp_path, study
):
    folder, path = published(), write_nifti("scan.nii.gz", support.scan(1))
    out = tmp_path / "out"
    code, printed, err = command(
        folder, path, "--domain", "auto", "--out", out, "--probabilities", "--device", "cpu"
    )
    assert (code, err, printed) == (0, "", f"{out / 'scan_seg.nii.gz'}\n")
    facts = facts_of(out)
    assert facts["nearest"] == "north.n2"
    assert facts["gate"]["north.n2"] == max(facts["gate"].values())
    assert sum(facts["gate"].values()) == pytest.approx(1)
    assert facts["mixture"] == facts["gate"]
    assert facts["distances"]["north.n2"] == facts["distance"] == pytest.approx(0, abs=1e-5)
    assert (facts["abstained"], facts["adaptation"]) == (False, "gate")
    assert (facts["limit"], facts["margin"], facts["false_rate"]) == (1.0, 0.1, 0.25)
    assert (facts["site"], facts["domain"], facts["few_shot"]) == (None, None, None)
    found = read_publication(folder)
    assert found is not None
    assert facts["publication"] == found.digest
    network = DomainChooser.of(load_bundle(folder, None), found).model.network
    row = torch.tensor([[facts["mixture"][name] for name in support.NAMES]])
    image = nib.as_closest_canonical(read_nifti(path)).get_fdata()
    with torch.no_grad():
        expected = network(support.normalised(image)[None], row)[0].softmax(0)[1:].numpy()
    written = read_nifti(out / "scan_prob.nii.gz").get_fdata()
    np.testing.assert_allclose(written, np.moveaxis(expected, 0, -1), atol=1e-4)


def test_auto_and_test_time_say_so(published, command, write_nifti, tmp_path):
    path = write_nifti("scan.nii.gz", support.scan(3))
    arguments = (published(), path, "--domain", "auto", "--test-time", "--out", tmp_path / "out")
    assert command(*arguments)[0] == 0
    facts = facts_of(tmp_path / "out")
    taken = facts["test_time"]["verdict"] == "taken"
    assert facts["adaptation"] == ("test-time" if taken else "gate")
    assert (facts["mixture"] != facts["gate"]) == taken


def test_without_a_publication_auto_says_that_residuals_are_zero(
    bundle, command, write_nifti, tmp_path
):
    folder, path = bundle(), write_nifti("scan.nii.gz", IMAGE)
    code, _, err = command(folder, path, "--domain", "auto", "--out", tmp_path / "auto")
    assert code == 0
    assert err.startswith("note: ")
    assert err.count("\n") == 1
    assert "all residuals are zero" in err
    assert command(folder, path, "--out", tmp_path / "plain")[0] == 0
    results = [(tmp_path / n / "scan_seg.nii.gz").read_bytes() for n in ("auto", "plain")]
    assert results[0] == results[1]
    facts = facts_of(tmp_path / "auto")
    assert (facts["gate"], facts["limit"], facts["abstained"]) == (None, None, False)
    assert facts["adaptation"] == facts_of(tmp_path / "plain")["adaptation"] == "none"


def test_an_unfamiliar_volume_is_served_without_experts_and_it_says_so(
    published, command, write_nifti, tmp_path
):
    paths = [write_nifti(f"{name}.nii.gz", support.scan(k)) for name, k in (("a", 1), ("b", 3))]
    model = published(limit=100.0, familiar=0.5)
    code, _, err = command(model, *paths, "--domain", "auto", "--out", tmp_path / "auto")
    assert code == 0
    assert err.startswith("note: b: like none of the known domains")
    assert err.count("\n") == 1
    assert facts_of(tmp_path / "auto", "a")["adaptation"] == "gate"
    facts = facts_of(tmp_path / "auto", "b")
    assert (facts["familiar"], facts["adaptation"], facts["mixture"]) == (False, "none", None)
    assert command(model, paths[1], "--out", tmp_path / "plain")[0] == 0
    same = [(tmp_path / name / "b_seg.nii.gz").read_bytes() for name in ("auto", "plain")]
    assert same[0] == same[1]


def test_it_abstains_with_a_warning_and_still_segments(published, command, write_nifti, tmp_path):
    paths = [write_nifti(f"{name}.nii.gz", support.scan(k)) for name, k in (("a", 1), ("b", 3))]
    code, out, err = command(
        published(limit=0.5), *paths, "--domain", "auto", "--out", tmp_path / "out"
    )
    assert code == 0
    assert err.startswith("warning: b: the model abstains")
    assert err.count("\n") == 1
    assert "the limit is 0.5" in err
    assert len(out.splitlines()) == 2
    assert facts_of(tmp_path / "out", "a")["abstained"] is False
    assert facts_of(tmp_path / "out", "b")["abstained"] is True


def test_strict_writes_no_segmentation_and_ends_with_9(published, command, write_nifti, tmp_path):
    paths = [write_nifti(f"{name}.nii.gz", support.scan(k)) for name, k in (("b", 3), ("a", 1))]
    folder, out = published(limit=0.5), tmp_path / "out"
    assert command(folder, *paths, "--out", out, "--probabilities")[0] == 0
    arguments = ["--domain", "auto", "--strict", "--probabilities", "--force", "--out", out]
    code, printed, err = command(folder, *paths, *arguments)
    assert code == 9
    assert printed == f"{out / 'a_seg.nii.gz'}\n"
    assert "error: 1 of 2 volumes not segmented (b)" in err
    # What lay there of an earlier call would be taken for the result.
    expected = ["a_prob.nii.gz", "a_seg.json", "a_seg.nii.gz", "b_seg.json"]
    assert written_files(out) == expected
    assert facts_of(out, "b")["abstained"] is True


def test_strict_needs_a_limit(published, bundle, command, write_nifti, tmp_path):
    path = write_nifti("scan.nii.gz", IMAGE)
    for folder in (published(limit=None), bundle()):
        code, _, err = command(folder, path, "--domain", "auto", "--strict", "--out", tmp_path)
        assert code == 2
        assert "cannot abstain" in err
    assert not (tmp_path / "scan_seg.nii.gz").exists()


@pytest.fixture
def cases(tmp_path, write_nifti):
    """Four labelled cases as a plain folder."""
    lines = ["case"]
    for number in range(4):
        label = np.zeros((8, 8, 8), np.uint8)
        label[1:5, 2:6, 2:7] = 2
        image = support.scan(1) + 40 * label
        write_nifti(f"cases/images/c{number}.nii.gz", image + number)
        write_nifti(f"cases/labels/c{number}.nii.gz", label)
        lines.append(f"c{number}")
    (tmp_path / "cases" / "cases.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "cases"


def test_a_few_labelled_cases_make_a_site_that_can_be_used_again(
    published, command, write_nifti, tmp_path, cases
):
    folder, path = published(), write_nifti("scan.nii.gz", support.scan(1))
    first, made = tmp_path / "first", tmp_path / "made"
    code, out, err = command(
        *(folder, path, "--few-shot", cases, "--steps", 10, "--save-model", made),
        *("--name", "west", "--out", first),
    )
    assert code == 0
    assert out == f"{first / 'scan_seg.nii.gz'}\n"
    assert err.count("few-shot: step ") == 10
    assert "3 cases trained on, 1 held out" in err
    assert "use --site west" in err
    facts = facts_of(first)
    assert (facts["adaptation"], facts["site"], facts["domain"]) == ("few-shot", "west", "west")
    assert facts["few_shot"]["cases"] == 4
    assert facts["few_shot"]["dice"].keys() == {"zero", "start", "fitted"}
    assert command(made, path, "--site", "west", "--out", tmp_path / "again")[0] == 0
    again = facts_of(tmp_path / "again")
    assert again["model"] == facts["model"]
    results = [f / "scan_seg.nii.gz" for f in (first, tmp_path / "again")]
    assert results[0].read_bytes() == results[1].read_bytes()
    # An earlier model goes only when that is asked for; a folder that is no model never does.
    repeat = [folder, "--few-shot", cases, "--steps", 1, "--save-model"]
    assert "--force" in command(*repeat, made)[2]
    assert "is no model's folder" in command(*repeat, cases, "--force")[2]
    assert "is the model itself" in command(*repeat, folder, "--force")[2]
    code, out, _ = command(*repeat, made, "--force", "--out", first)
    assert (code, out) == (0, "")
    assert load_bundle(made, "few-shot").domains == ("few-shot",)


def test_the_command_says_which_classes_are_drawn(bundle, command, cases, tmp_path, monkeypatch):
    """Told apart by what training is given: a loss without the classes that nobody drew."""
    seen = []

    def spy(network, optimizer, data, *given, **named):
        seen.append(data.annotated.tolist())

    monkeypatch.setattr("uharmony_client.few_shot.run_steps", spy)
    few = (bundle(), "--few-shot", cases, "--save-model", tmp_path / "made", "--force")
    for said, wanted in (([], [True, True]), (["--annotated", "core"], [False, True])):
        assert command(*few, *said)[0] == 0
        assert seen.pop() == wanted
    assert command(*few, "--annotated", "edema,core")[0] == 0
    assert seen.pop() == [True, True]
    code, _, err = command(*few, "--annotated", "liver")
    assert (code, seen) == (2, [])
    assert "annotated names liver; the study's classes are edema, core" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--few-shot", "x", "--site", "north"], "leave --site and --domain out"),
        (["--few-shot", "x", "--domain", "auto"], "leave --site and --domain out"),
        (["--save-model", "x"], "give --few-shot DIR too"),
        (["--annotated", "edema"], "give --few-shot DIR too"),
        (["--test-time"], "--test-time belongs to --domain auto"),
        (["--strict"], "--strict belongs to --domain auto"),
        (["--strict", "--domain", "auto", "--site", "south"], "--strict belongs to --domain auto"),
        (["--test-time", "--few-shot", "x"], "--test-time belongs to --domain auto"),
        (["--domain", "auto", "--site", "south"], "no domain 'auto'; there are: s"),
        (["--memory-gib", "-1"], "--memory-gib"),
    ],
)
def test_choices_that_contradict_each_other(
    bundle, command, write_nifti, tmp_path, arguments, expected
):
    path = write_nifti("scan.nii.gz", IMAGE)
    code, out, err = command(bundle(), path, "--out", tmp_path / "out", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err
    assert written_files(tmp_path / "out") == []


def test_without_a_volume_there_is_nothing_to_do(bundle, command):
    code, _, err = command(bundle())
    assert code == 2
    assert "no volume to segment" in err


def test_the_memory_decides_between_one_pass_and_windows(bundle, command, write_nifti, tmp_path):
    path = write_nifti("scan.nii.gz", support.scan(0, 16))
    folder = bundle()
    found = {}
    for name, budget in (("none", []), ("little", [0]), ("much", [8])):
        options = [option for value in budget for option in ("--memory-gib", value)]
        out = tmp_path / name
        assert command(folder, path, "--probabilities", "--out", out, *options)[0] == 0
        found[name] = read_nifti(out / "scan_prob.nii.gz").get_fdata()
    np.testing.assert_array_equal(found["little"], found["none"])
    network = load_bundle(folder, None).network
    image = nib.as_closest_canonical(read_nifti(path)).get_fdata()
    with torch.no_grad():
        whole = network(support.normalised(image)[None])[0].softmax(0)[1:].numpy()
    np.testing.assert_allclose(found["much"], np.moveaxis(whole, 0, -1), atol=1e-4)
    assert np.abs(found["much"] - found["none"]).max() > 1e-2
