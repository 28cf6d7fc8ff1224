"""The participation record: its text, its bounds, and what it says when it cannot be read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from uharmony_model.errors import ConfigError
from uharmony_model.participation import MAX_BYTES, Participation, dump, load

TEXT = (
    '{"format":1,"rounds":{"1":{"counted":["a","b"],"trained":["a","b"]},'
    '"2":{"counted":["a"],"trained":["a","b"]},"10":{"counted":["b"],"trained":["b"]}}}'
)


def record() -> Participation:
    made = Participation().with_round(10, ["b"]).with_round(2, ["a"], ["b"])
    return made.with_round(1, ["b", "a", "b"])


def test_it_is_written_as_specified_and_read_back(tmp_path):
    dump(tmp_path / "record", record())
    assert (tmp_path / "record").read_text() == TEXT
    assert load(tmp_path / "record") == record()
    assert load(tmp_path / "record").rounds[2].trained == ("a", "b")


def test_a_round_done_again_replaces_the_one_before():
    assert record().with_round(2, ["b"]).rounds[2].trained == ("b",)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"10"', '"0"'),
        ('"10"', '"-3"'),
        ('"10"', '"010"'),
        ('"10"', '"x"'),
        ('"10"', '"2"'),
        ('"format":1', '"format":2'),
        ('{"counted":["a"],"trained":["a","b"]}', '{"counted":["c"],"trained":["a"]}'),
        ('{"counted":["a"],"trained":["a","b"]}', '{"counted":["a"],"trained":["b","a"]}'),
        ('{"counted":["a"],"trained":["a","b"]}', '{"counted":["a"],"trained":["a","a"]}'),
        ('["b"]', '["../b"]'),
        ('["b"]', "[1]"),
        ('"format":1,', '"format": 1,'),
        ('"format":1,', '"format":1,"more":1,'),
        (TEXT, "[]"),
        (TEXT, "\x00"),
    ],
)
def test_what_is_no_record_is_refused_on_one_line(tmp_path, old, new):
    assert old in TEXT
    (tmp_path / "record").write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError, match="as the coordinator wrote it") as refused:
        load(tmp_path / "record")
    assert "\n" not in str(refused.value)


def test_a_missing_or_huge_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "record")
    with (tmp_path / "record").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="more than"):
        load(tmp_path / "record")


def test_who_counted_has_trained():
    with pytest.raises(ValidationError, match="must have trained"):
        Participation.model_validate({"rounds": {1: {"counted": ["a"], "trained": []}}})
