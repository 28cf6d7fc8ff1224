from __future__ import annotations

import stat

import pytest
import torch

from tests.support.tiny import tiny_study
from uharmony_model.bundle import known_sites, load_bundle
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.schema import unflatten
from uharmony_model.networks import build_network
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.export import export_model, model_card


def checkpoint(study, *, round_=3, records=(), counted=()) -> Checkpoint:
    network = build_network(study, ("any",), seed=study.seed)
    schema = Partition.of(network, study.plan.local).shared_schema
    flat = 0.1 * torch.randn(schema.numel, generator=torch.Generator().manual_seed(1))
    return Checkpoint(
        round=round_,
        global_=flat,
        schema=schema,
        study=study.digest,
        records=tuple(records),
        counted=counted,
    )


def record(site="alpha", n_cases=20, dice=0.5, **changes):
    return {
        "arm": "uharmony", "seed": 0, "round": 3, "site": site, "domain": site, "split": "test",
        "class": "blob", "n_cases": n_cases, "dice": dice, **changes,
    }  # fmt: skip


def test_the_model_is_the_checkpoints_weights_and_no_site(tmp_path):
    study = tiny_study()
    state = checkpoint(study)
    export_model(state, study, tmp_path / "model")
    model = load_bundle(tmp_path / "model", None)
    found, residuals = Partition.of(model.network, study.plan.local).split(
        model.network.state_dict()
    )
    expected = unflatten(state.global_, state.schema)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(tensor.any() for tensor in residuals.values())
    assert model.study == study
    assert known_sites(tmp_path / "model") == ()
    assert (tmp_path / "model" / "README.md").read_text() == model_card(state, study)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o700


def test_the_card_does_not_change_the_models_digest(tmp_path):
    study = tiny_study()
    export_model(checkpoint(study), study, tmp_path / "a")
    export_model(checkpoint(study, records=[record()]), study, tmp_path / "b")
    assert (tmp_path / "a/README.md").read_bytes() != (tmp_path / "b/README.md").read_bytes()
    assert load_bundle(tmp_path / "a", None).digest == load_bundle(tmp_path / "b", None).digest


def test_a_method_that_keeps_weights_at_the_sites_says_so(tmp_path):
    study = tiny_study(method="fedbn-in")
    export_model(checkpoint(study), study, tmp_path / "model")
    with pytest.raises(ConfigError, match="a site is needed"):
        load_bundle(tmp_path / "model", None)
    assert "these weights alone do not predict" in (tmp_path / "model/README.md").read_text()


def test_the_card_names_study_rounds_use_and_limits():
    study = tiny_study()
    state = checkpoint(study, round_=2)
    card = model_card(state, study)
    assert card.startswith("# tiny\n")
    for part in (study.digest, state.digest, "2 of 3", "not finished", "blob (1)", "uharmony"):
        assert part in card
    for part in ("## Intended use", "## Limits", "research only", "no compliance", "not a medical"):
        assert part in card
    assert "not finished" not in model_card(checkpoint(study), study)


def rows_of(card: str, first: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith(f"| {first} |")]


def test_a_class_has_the_mean_over_sites_of_their_means_over_domains():
    study = tiny_study()
    records = [
        record("alpha", 30, 0.9, domain="a1"),
        record("alpha", 10, 0.5, domain="a2"),
        record("beta", 12, 0.4, hd95_mm=3.0),
        record("beta", 12, 0.1, split="validation"),
        record("beta", 12, 0.2, round=2),
    ]
    card = model_card(checkpoint(study, records=records), study)
    # alpha: (30 * 0.9 + 10 * 0.5) / 40 = 0.8; with beta's 0.4 the mean is 0.6
    expected = "| blob | 2 | 0.600 | not stated | 3.0 | not stated | not stated |"
    assert rows_of(card, "blob") == [expected]
    assert rows_of(card, "alpha") == ["| alpha | 0 | 40 |"]
    assert rows_of(card, "beta") == ["| beta | 0 | 12 |"]


def test_small_numbers_are_not_told():
    study = tiny_study()
    records = [record("alpha", 10, 0.9), record("beta", 11, 0.4), record("gamma", 10, None)]
    card = model_card(checkpoint(study, records=records), study)
    assert rows_of(card, "alpha") == ["| alpha | 0 | <11 |"]
    assert rows_of(card, "beta") == ["| beta | 0 | 11 |"]
    assert rows_of(card, "gamma") == ["| gamma | 0 | <11 |"]
    alone = model_card(checkpoint(study, records=records[:1]), study)
    assert rows_of(alone, "blob") == [f"| blob | 0 |{' not stated |' * 5}"]
    assert "0.900" not in alone


def test_sites_that_took_part_are_named_with_their_rounds_and_what_they_withhold():
    study = tiny_study()
    records = [
        record("beta", "<11", None),
        record("gamma", 30, domain="g1"),
        record("gamma", "<11", None, domain="g2"),
    ]
    counted = (("alpha", "beta"), ("alpha", "gamma"), ("alpha", "beta"))
    card = model_card(checkpoint(study, records=records, counted=counted), study)
    assert rows_of(card, "alpha") == ["| alpha | 3 | not stated |"]
    assert rows_of(card, "beta") == ["| beta | 2 | <11 |"]
    assert rows_of(card, "gamma") == ["| gamma | 1 | not stated |"]


def test_a_card_without_results_says_so():
    study = tiny_study()
    card = model_card(checkpoint(study), study)
    assert "## Sites\n\nNot stated." in card
    assert "The test split has not been measured." in card


def test_names_of_sites_cannot_write_into_the_card():
    study = tiny_study()
    records = [record("a|b\n# <script>", 20)]
    card = model_card(checkpoint(study, records=records), study)
    assert rows_of(card, "a?b????script?") == ["| a?b????script? | 0 | 20 |"]
    assert "<script" not in card


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    study = tiny_study()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    with pytest.raises(ConfigError, match="no model"):
        export_model(checkpoint(study), study, tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    with pytest.raises(ConfigError, match="no model"):
        export_model(checkpoint(study), study, tmp_path / "link")


def test_an_earlier_model_is_replaced(tmp_path):
    study = tiny_study()
    export_model(checkpoint(study, round_=1), study, tmp_path / "model")
    export_model(checkpoint(study), study, tmp_path / "model")
    assert "3 of 3" in (tmp_path / "model/README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_of_another_study_and_a_damaged_record_are_refused(tmp_path):
    study = tiny_study()
    with pytest.raises(ConfigError, match="give the study that was trained"):
        export_model(checkpoint(study), tiny_study(seed=1), tmp_path / "model")
    with pytest.raises(StoreError, match="record is damaged"):
        export_model(checkpoint(study, records=[{"arm": "x"}]), study, tmp_path / "model")
    assert not (tmp_path / "model").exists()
