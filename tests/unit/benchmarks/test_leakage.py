"""The command `python -m benchmarks.leakage` on real volumes, in few steps."""

from __future__ import annotations

import json

import pytest

from benchmarks import leakage
from uharmony_model.unlabelled_settings import STATISTICS

pytestmark = [pytest.mark.data, pytest.mark.slow]


def test_all_that_is_written_names_no_case_and_finds_who_is_alone(
    real_volumes, tmp_path, monkeypatch, capsys
):
    least = dict.fromkeys(STATISTICS, 1) | {"amplitude": 2}
    monkeypatch.setattr(leakage, "STEPS", least)
    monkeypatch.setattr(leakage, "GRADIENT_RELEASES", least)
    monkeypatch.setattr(leakage, "TRAINING_STEPS", 1)
    monkeypatch.setattr(leakage, "RELEASES", 10)
    out = tmp_path / "out"
    line = ["--data", str(real_volumes / "hippocampus"), "--out", str(out), "--patients", "1"]
    assert leakage.main(line) == 0
    texts = [(out / name).read_text() for name in ("leakage.json", "leakage.md")]
    assert not any("hippocampus_" in text for text in texts)  # how the cases are called
    assert capsys.readouterr().out.strip() == texts[1].strip()
    found = json.loads(texts[0])
    for statistic in STATISTICS:
        member = found[statistic]["membership"]["1"]
        assert member["likelihood ratio, patches known"]["value"] == 1.0
        assert member["distance, patches known"]["value"] == 1.0
        assert member["likelihood ratio, images known"]["value"] > 0.9
        assert found[statistic]["differencing"]["1"]["largest"] < 1e-3
    assert (out / "leakage.png").stat().st_mode & 0o077 == 0
