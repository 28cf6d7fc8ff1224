"""A short slice of the fuzz run, and the proof that it sees crashes and hangs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_inputs import mutate, mutated_volume, payloads, volumes
from benchmarks.fuzz_worker import GROWTH_BYTES, draws


def run(state: Path, capsys: pytest.CaptureFixture[str], **options: float) -> tuple[int, str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    code = fuzz.main([*words, f"--state={state}"])
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_nothing_crashes_or_hangs(tmp_path: Path, capsys):
    state = tmp_path / "fuzz.json"
    code, out = run(state, capsys, payloads=1500, volumes=500, seed=11)
    assert code == 0, out
    kinds = json.loads(state.read_text())["kinds"]
    for kind, count in (("payloads", 1500), ("volumes", 500)):
        assert kinds[kind]["done"] == sum(kinds[kind]["outcomes"].values()) == count
        assert kinds[kind]["growth"] <= GROWTH_BYTES
    # A run in which all is refused at the door has tested the door only.
    reached = kinds["payloads"]["outcomes"]
    assert {"admitted", "wrong_kind", "not_finite", "wrong_schema", "join code: refused"} <= {
        *reached
    }
    assert {"read", "damaged", "grid", "voxel-type", "dimensions"} <= {
        *kinds["volumes"]["outcomes"]
    }


@pytest.mark.slow
def test_a_crash_and_a_hang_are_seen_and_the_run_goes_on(tmp_path: Path, capsys):
    state = tmp_path / "fuzz.json"
    code, out = run(state, capsys, payloads=0, volumes=0, control=6, hang_seconds=0.5)
    assert code == 1
    own = json.loads(state.read_text())["kinds"]["control"]
    assert [index for index, _ in own["crashes"]] == [2]
    assert own["hangs"] == [4]
    assert own["done"] == 6
    assert sum(own["outcomes"].values()) == 4
    assert "hang at control 4" in out
    # Nothing is done twice, and nothing is forgotten.
    assert run(state, capsys, payloads=0, volumes=0, control=6)[0] == 1
    assert json.loads(state.read_text())["kinds"]["control"] == own


def test_an_input_depends_on_its_number_only():
    content = payloads()[0]
    twice = [mutate(content, draws(3, "payloads", 77)) for _ in range(2)]
    assert twice[0] == twice[1] != mutate(content, draws(3, "payloads", 78))
    assert mutate(content, draws(4, "payloads", 77)) != twice[0]


def test_most_inputs_are_changed():
    draw = draws(0, "volumes", 0)
    for content in volumes():
        assert sum(mutated_volume(content, draw) != content for _ in range(20)) >= 15
