"""A site without all modalities: from the table to what the network is given."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.nifti_files import nifti_bytes
from tests.unit.client.check_site import codes, image_of, write_site
from uharmony_client.case_table import Case, CaseTable
from uharmony_client.check import run_check
from uharmony_client.evaluate import predict_masks
from uharmony_client.predict import segment
from uharmony_client.site import Site
from uharmony_client.site_data import prepare
from uharmony_client.volume_store import VolumeStore, entry_key, file_digest
from uharmony_model.bundle import Model
from uharmony_model.errors import ConfigError, DataError
from uharmony_model.networks import build_network
from uharmony_model.study import Study

SHAPE = (3, 4, 5)
FIRST = np.random.default_rng(0).normal(100, 20, SHAPE).astype("f4")
SECOND = np.random.default_rng(1).normal(-50, 9, SHAPE).astype("f4")


def scaled(image: np.ndarray) -> np.ndarray:
    return np.asarray((image - image.mean(dtype=float)) / image.std(dtype=float))


@pytest.fixture
def masked(study) -> Study:
    """Three modalities, each a channel: CT, MR, PT."""
    task = study.task.model_dump() | {
        "channels": 3,
        "presence": True,
        "intensity": {name: {"policy": "zscore"} for name in ("PT", "MR", "CT")},
    }
    return Study.model_validate(study.model_dump() | {"task": task})


def case_of(images, modality):
    return Case(
        case="c", patient="p", site="north", domain="north", modality=modality,
        image=tuple(images),
    )  # fmt: skip


def read(tmp_path, image, modality):
    path = tmp_path / "table.csv"
    path.write_text(f"case,patient,modality,image\nc,p,{modality},{image}\n")
    return CaseTable.read_csv(path)


def test_an_empty_place_of_the_table_is_a_channel_that_is_not_there(tmp_path):
    table = read(tmp_path, "a.nii||c.nii", "CT|MR|PT")
    (case,) = table.cases
    assert case.modality == ("CT", "PT")
    assert [path.name for path in case.image] == ["a.nii", "c.nii"]
    table.write_csv(tmp_path / "again.csv")
    assert CaseTable.read_csv(tmp_path / "again.csv") == table
    assert read(tmp_path, "a.nii|", "CT|MR").cases[0].modality == ("CT",)


@pytest.mark.parametrize(
    ("image", "modality"), [("a.nii|", "CT"), ("|", "CT|MR"), ("a||", "CT|MR")]
)
def test_an_empty_place_needs_a_modality_and_another_image(tmp_path, image, modality):
    with pytest.raises(DataError, match="the place of an image is empty"):
        read(tmp_path, image, modality)


@pytest.mark.parametrize("together", [True, False])
def test_channels_go_to_the_place_of_their_modality(write_nifti, masked, config, together):
    both = [write_nifti("both.nii", np.stack([FIRST, SECOND], axis=-1))]
    apart = [write_nifti("0.nii", FIRST), write_nifti("1.nii", SECOND)]
    case = case_of(both if together else apart, ("PT", "CT"))
    volume = prepare(case, masked.task, config)
    assert volume.image.shape == (3, *SHAPE)
    np.testing.assert_allclose(volume.image[0], scaled(SECOND), atol=1e-5)
    assert not volume.image[1].any()
    np.testing.assert_allclose(volume.image[2], scaled(FIRST), atol=1e-5)
    # The site gives no CT: the channel may hold anything, zeros among it.
    blank = case_of(
        [write_nifti("b.nii", FIRST), write_nifti("z.nii", np.zeros_like(SECOND))], ("PT", "CT")
    )
    with pytest.raises(DataError, match="every voxel has the value 0"):
        prepare(blank, masked.task, config)
    lacking = config.model_copy(update={"missing": ("CT",)})
    alone = prepare(blank, masked.task, lacking)
    assert [bool(channel.any()) for channel in alone.image] == [False, False, True]
    np.testing.assert_array_equal(alone.image[2], volume.image[2])


def test_what_does_not_fit_is_refused(write_nifti, masked, study, config):
    one = write_nifti("one.nii", FIRST)

    def refused(case, chosen=masked, missing=()):
        site = config.model_copy(update={"missing": missing})
        with pytest.raises((DataError, ConfigError)) as caught:
            prepare(case, chosen.task, site)
        return str(caught.value)

    assert "named twice" in refused(case_of([one, one], ("CT", "CT")))
    assert "1 channels; 2 modalities are named" in refused(case_of([one], ("CT", "MR")))
    assert "no channel is left" in refused(case_of([one], ("CT",)), missing=("CT",))
    assert "missing names US" in refused(case_of([one], ("CT",)), missing=("US",))
    assert "task.presence is false" in refused(case_of([one], ("T1",)), study, ("T1",))


def test_the_store_keeps_what_is_there_and_knows_it(write_nifti, tmp_path, masked, config):
    store = VolumeStore(tmp_path / "volumes")
    case = case_of([write_nifti("0.nii", FIRST), write_nifti("1.nii", SECOND)], ("PT", "CT"))
    volume = store.open(case, masked.task, config)
    assert volume.present == (True, False, True)
    np.testing.assert_array_equal(volume.image, prepare(case, masked.task, config).image)
    lacking = store.open(case, masked.task, config.model_copy(update={"missing": ("CT",)}))
    assert lacking.present == (False, False, True)
    assert lacking.key != volume.key
    assert not lacking.image[0].any()
    again = VolumeStore(store.folder, on_build=lambda _: pytest.fail("prepared again"))
    assert again.open(case, masked.task, config).present == volume.present


def test_without_masks_a_stored_volume_keeps_its_name(write_nifti, study, config):
    case = case_of([write_nifti("i.nii", FIRST)], ("T1",))
    content = {
        "version": 1,
        "images": [file_digest(case.image[0])],
        "label": None,
        "intensity": [{"policy": "zscore", "nonzero": False}],
        "spacing_mm": None,
        "label_map": [],
        "label_values": [0, 1, 2, 3],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert entry_key(case, study.task, config) == hashlib.sha256(text.encode()).hexdigest()


class Recorder(nn.Module):
    """Remembers what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        self.seen.append(x)
        return x[:, :3]


def test_evaluation_gives_the_masks(config, masked):
    rows = {0: {"modality": "MR"}, 1: {"modality": "MR|CT", "image": "i1.nii|i0.nii"}}
    write_site(config, count=2, rows=rows)
    site = Site.open(config, masked)
    for case, flags in zip(site.table.cases, ([0, 1, 0], [1, 1, 0]), strict=True):
        network = Recorder()
        predict_masks(network, site, case)
        for x in network.seen:
            assert x.shape[1] == 6
            assert x[0, 3:].amin(dim=(1, 2, 3)).tolist() == flags
            assert x[0, 3:].amax(dim=(1, 2, 3)).tolist() == flags
            assert [bool(channel.any()) for channel in x[0, :3]] == [bool(flag) for flag in flags]


def test_prediction_takes_the_modalities_that_are_named(write_nifti, masked):
    network = build_network(masked, ("n",), seed=0).eval()
    path = write_nifti("scan.nii", np.resize(FIRST, (8, 8, 8)))
    model = Model(network, masked, ("n",), (), "digest")
    found = segment(model, (path,), ("MR",), "n", torch.device("cpu")).probabilities
    x = torch.zeros(1, 6, 8, 8, 8)
    x[0, 1] = torch.from_numpy(scaled(np.resize(FIRST, (8, 8, 8))))
    x[0, 4] = 1
    with torch.no_grad():
        expected = network(x, torch.tensor([0])).softmax(1)[0, 1:]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_check_wants_modalities_present_or_declared_missing(config, masked, study):
    rows = {number: {"modality": "MR"} for number in range(12)}
    write_site(config, rows=rows)
    report = run_check(config, masked)
    assert report.quarantined == 0
    absent = [f for f in report.findings if f.rule.code == "U407"]
    assert [detail.text for detail in absent[0].details] == ["CT", "PT"]
    declared = config.model_copy(update={"missing": ("CT", "PT")})
    assert "U407" not in codes(run_check(declared, masked))
    assert "U003" in codes(run_check(config.model_copy(update={"missing": ("US",)}), masked))
    assert "U003" in codes(run_check(config.model_copy(update={"missing": ("T1",)}), study))


def test_the_check_refuses_what_training_refuses(config, masked):
    blank = nifti_bytes(np.zeros_like(image_of(0)))
    rows = {number: {"modality": "MR"} for number in range(12)} | {
        0: {"modality": "CT"},
        1: {"modality": "MR|CT", "image": "i1.nii|blank.nii"},
        2: {"modality": "MR|MR", "image": "i1.nii|i2.nii"},
        3: {"modality": "MR|PT", "image": "i3.nii"},
    }
    write_site(config, {"blank.nii": blank}, rows=rows)
    report = run_check(config, masked)
    assert [row.refused for row in report.cases[:5]] == [None, "U110", "U113", "U111", None]
    lacking = config.model_copy(update={"missing": ("CT",)})
    report = run_check(lacking, masked)
    assert [row.refused for row in report.cases[:5]] == ["U111", None, "U113", "U111", None]
