from __future__ import annotations

import json

import pytest

from uharmony_client.readers import (
    read_cases,
    read_decathlon,
    read_folder,
    read_nnunet,
)
from uharmony_model.errors import DataError


@pytest.fixture
def touch(tmp_path):
    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")

    return make


@pytest.fixture
def dataset(tmp_path):
    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "dataset.json").write_text(text)

    return write


def pairs(*names):
    return [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]


@pytest.fixture
def decathlon(touch, dataset):
    touch(*(f"{place}/{n}.nii.gz" for n in ("a", "b") for place in ("imagesTr", "labelsTr")))
    touch("imagesTs/t.nii.gz")
    dataset(
        {
            "modality": {"1": "T2", "0": "T1"},
            "training": pairs("b", "a"),
            "test": ["./imagesTs/t.nii.gz"],
        }
    )


def test_decathlon_keeps_the_order_and_leaves_out_test_images(decathlon, tmp_path):
    table = read_cases(tmp_path, site="here")
    assert [c.case for c in table.cases] == ["b", "a"]
    assert table.cases[0].image == (tmp_path / "imagesTr/b.nii.gz",)
    assert table.cases[0].label == tmp_path / "labelsTr/b.nii.gz"
    assert table.cases[0].modality == ("T1", "T2")
    assert table.sites == table.domains == ("here",)


def test_sites_csv_divides_the_cases(decathlon, tmp_path):
    (tmp_path / "sites.csv").write_text("case,site,domain,patient\na,s1,d1,p\nb,s2,,q\n")
    table = read_decathlon(tmp_path)
    assert {c.case: (c.site, c.domain, c.patient) for c in table.cases} == {
        "a": ("s1", "d1", "p"),
        "b": ("s2", "s2", "q"),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("case,site\na,s\n", "case 'b' is missing"),
        ("case,site\na,s\nb,s\nz,s\n", "case 'z' is not in dataset.json"),
        ("case,site,image\na,s,../x\nb,s,y\n", "unknown"),
    ],
)
def test_sites_csv_must_fit(decathlon, tmp_path, text, expected):
    (tmp_path / "sites.csv").write_text(text)
    with pytest.raises(DataError, match=expected):
        read_decathlon(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[]", "expected an object"),
        ({"training": pairs("a")}, "modalities like"),
        ({"modality": {"0": "T1"}}, "list 'training'"),
        ({"modality": {"0": "T1"}, "training": []}, "list 'training'"),
        ({"modality": {"0": "T1"}, "training": [3]}, "image and label"),
        ({"modality": {"0": "T1"}, "training": [{"image": "a"}]}, "image and label"),
        ({"modality": {"0": 1}, "training": pairs("a")}, "modalities like"),
        ({"modality": {"1": "T1"}, "training": pairs("a")}, "numbered 0, 1"),
        ({"modality": {"zero": "T1"}, "training": pairs("a")}, "modalities like"),
        ({"modality": {"0": "T1"}, "training": pairs("absent")}, "no image at"),
        (
            {"modality": {"0": "T1"}, "training": [{"image": "../a.nii", "label": "b.nii"}]},
            "leaves the folder",
        ),
        (
            {"modality": {"0": "T1"}, "training": [{"image": "/etc/passwd", "label": "b.nii"}]},
            "leaves the folder",
        ),
    ],
)
def test_wrong_dataset_json_is_refused_in_one_line(decathlon, dataset, tmp_path, content, expected):
    dataset(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_decathlon(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_image_without_its_label_is_refused(decathlon, tmp_path):
    (tmp_path / "labelsTr/a.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case a: no label at .*; add it"):
        read_decathlon(tmp_path)


@pytest.fixture
def nnunet(touch, dataset):
    touch(
        *(f"imagesTr/{n}_{c}.nii.gz" for n in ("case_01", "case_02") for c in ("0000", "0001")),
        "labelsTr/case_01.nii.gz",
        "labelsTr/case_02.nii.gz",
        "imagesTs/case_09_0000.nii.gz",
    )
    dataset(
        {
            "channel_names": {"0": "T1", "1": "FLAIR"},
            "labels": {"background": 0, "core": 1},
            "file_ending": ".nii.gz",
        }
    )


def test_nnunet_groups_channels(nnunet, tmp_path):
    table = read_cases(tmp_path)
    assert [c.case for c in table.cases] == ["case_01", "case_02"]
    assert table.cases[1].image == (
        tmp_path / "imagesTr/case_02_0000.nii.gz",
        tmp_path / "imagesTr/case_02_0001.nii.gz",
    )
    assert table.cases[1].label == tmp_path / "labelsTr/case_02.nii.gz"
    assert table.cases[1].modality == ("T1", "FLAIR")


def test_nnunet_refuses_a_missing_channel_or_label(nnunet, tmp_path):
    (tmp_path / "imagesTr/case_02_0001.nii.gz").unlink()
    with pytest.raises(DataError, match="case case_02: no image"):
        read_nnunet(tmp_path)
    (tmp_path / "labelsTr/case_01.nii.gz").unlink()
    with pytest.raises(DataError, match="case case_01: no label"):
        read_nnunet(tmp_path)


def test_nnunet_refuses_other_endings_and_empty_folders(nnunet, dataset, tmp_path):
    dataset({"channel_names": {"0": "T1"}, "file_ending": ".png"})
    with pytest.raises(DataError, match="file_ending"):
        read_nnunet(tmp_path)
    dataset({"channel_names": {"0": "T1"}, "file_ending": ".nii"})
    with pytest.raises(DataError, match="no files named"):
        read_nnunet(tmp_path)


def test_folder_finds_images_and_labels_by_the_cases_names(touch, tmp_path):
    touch("images/a.nii.gz", "labels/a.nii.gz", "images/b.nii", "labels/b.nii")
    (tmp_path / "cases.csv").write_text("case,patient,modality\na,p,CT\nb,q,PET\n")
    table = read_cases(tmp_path)
    assert [(c.image[0].name, c.label.name if c.label else "") for c in table.cases] == [
        ("a.nii.gz", "a.nii.gz"),
        ("b.nii", "b.nii"),
    ]


def test_folder_refuses_what_is_not_there(touch, tmp_path):
    touch("images/a.nii.gz")
    (tmp_path / "cases.csv").write_text("case\na\n")
    with pytest.raises(DataError, match=r"case a: no label at"):
        read_folder(tmp_path)
    (tmp_path / "cases.csv").write_text("case,label\na,\n")
    assert read_folder(tmp_path).cases[0].label is None
    (tmp_path / "cases.csv").write_text("case\nz\n")
    with pytest.raises(DataError, match="case z: no image at"):
        read_folder(tmp_path)


def test_a_table_is_read_where_it_lies(touch, tmp_path):
    touch("x.nii")
    (tmp_path / "any.csv").write_text("case,image\na,x.nii\n")
    assert read_cases(tmp_path / "any.csv").cases[0].image == (tmp_path / "x.nii",)
    (tmp_path / "any.csv").write_text("case,image\na,y.nii\n")
    with pytest.raises(DataError, match="no image at"):
        read_cases(tmp_path / "any.csv")


def test_unknown_places_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        read_cases(tmp_path / "absent")
    with pytest.raises(DataError, match=r"write a cases\.csv with the columns case, patient"):
        read_cases(tmp_path)
