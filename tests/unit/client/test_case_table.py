from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from uharmony_client.case_table import Case, CaseTable
from uharmony_model.errors import DataError

FULL = """case,patient,site,domain,modality,image,label,split
c1,p1,north,scanner-1,T1|FLAIR,i/c1_0.nii|i/c1_1.nii,l/c1.nii,train
c2,p1,north,scanner-2,T1|FLAIR,/abs/c2_0.nii|/abs/c2_1.nii,,train
"""


@pytest.fixture
def table_of(tmp_path):
    def read(text, **keywords):
        path = tmp_path / "cases.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return CaseTable.read_csv(path, **keywords)

    return read


def test_all_columns_are_read(table_of, tmp_path):
    table = table_of(FULL)
    assert table.cases[0] == Case(
        case="c1",
        patient="p1",
        site="north",
        domain="scanner-1",
        modality=("T1", "FLAIR"),
        image=(tmp_path / "i/c1_0.nii", tmp_path / "i/c1_1.nii"),
        label=tmp_path / "l/c1.nii",
        split="train",
    )
    assert table.cases[1].image[0] == Path("/abs/c2_0.nii")
    assert table.cases[1].label is None
    assert table.sites == ("north",)
    assert table.domains == ("scanner-1", "scanner-2")


def test_writing_and_reading_is_the_same_table(table_of, tmp_path):
    table = table_of(FULL)
    table.write_csv(tmp_path / "again.csv")
    assert CaseTable.read_csv(tmp_path / "again.csv") == table
    assert ",i/c1_0.nii|i/c1_1.nii,l/c1.nii,train\n" in (tmp_path / "again.csv").read_text()


def test_defaults_and_one_warning_for_missing_patients(table_of, caplog):
    with caplog.at_level(logging.WARNING):
        table = table_of("case,image\nc1,a.nii\nc2,b.nii\n", site="south")
    assert [(c.patient, c.site, c.domain, c.modality, c.split) for c in table.cases] == [
        ("c1", "south", "south", (), None),
        ("c2", "south", "south", (), None),
    ]
    assert len(caplog.records) == 1
    assert "2 of 2 cases name no patient" in caplog.text


def test_a_full_table_warns_of_nothing(table_of, caplog):
    table_of(FULL)
    assert not caplog.records


def test_spreadsheet_habits_are_understood(table_of):
    text = "\ufeffcase;patient;image\r\n c1 ; p1 ;a.nii\r\n"
    assert table_of(text).cases[0].patient == "p1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no cases"),
        ("case,image\n", "no cases"),
        ("case,image,colour\nc,a.nii,red\n", "unknown or repeated columns colour"),
        ("case,image,image\nc,a.nii,b.nii\n", "repeated"),
        ("case,image\nc\n", "row 2 has not as many cells"),
        ("case,image\nc,a.nii,b.nii\n", "row 2 has not as many cells"),
        ("case,image\n,a.nii\n", "expected a name and an image"),
        ("case,image\nc,\n", "expected a name and an image"),
        ("case,image\nc,a.nii\nc,b.nii\n", "c occurs twice"),
        ("case,image\n../c,a.nii\n", "without / "),
        ("case,image\nc\x1b[31m,a.nii\n", "printable"),
        (f"case,image\n{'c' * 200},a.nii\n", "at most 128"),
        ("case,image,site\nc,a.nii,../../etc\n", "site"),
        ("case,image,domain\nc,a.nii,d@e\n", "domain"),
        ("case,image,split\nc,a.nii,tset\n", "split"),
        ('case,image\n"c,a.nii\n', "not readable as CSV"),
        ("case,image\nc,a\x00.nii\n", "printable"),
        (b"case,image\n\xff,a.nii\n", "UTF-8"),
        (
            "case,patient,image,split\nc,p,a.nii,train\nd,p,a.nii,test\n",
            "patient p is in train and in test",
        ),
    ],
)
def test_wrong_tables_are_refused_in_one_line(table_of, text, expected):
    with pytest.raises(DataError, match=expected) as caught:
        table_of(text)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_missing_table_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match="no such table; expected a CSV with the columns case, "):
        CaseTable.read_csv(tmp_path / "absent.csv")


def test_of_chooses_by_site_and_split(table_of):
    table = table_of("case,image,site,split\na,i,s,train\nb,i,s,test\nc,i,t,train\n")
    assert [c.case for c in table.of(site="s").cases] == ["a", "b"]
    assert [c.case for c in table.of(split="train").cases] == ["a", "c"]
    assert [c.case for c in table.of(split="train", site="t").cases] == ["c"]


def test_a_table_cannot_be_changed(table_of):
    with pytest.raises(ValidationError):
        table_of(FULL).cases[0].site = "elsewhere"
