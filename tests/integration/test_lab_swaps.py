"""Swapped parts: what is measured is the part, not who draws which class."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import tiny_study, write_folder
from uharmony_client.site import Site
from uharmony_client.site_config import SiteConfig
from uharmony_model.exchange.schema import unflatten
from uharmony_model.initial import initial_local, initial_weights
from uharmony_simulation import lab_swaps
from uharmony_simulation.lab_swaps import ALL_LOCAL, measure_swaps


@pytest.fixture
def opened(tmp_path):
    """Two sites that draw one class each."""
    study = tiny_study(
        task={"classes": {"blob": 1, "halo": 2}},
        training={"patch": [8, 8, 8]},
        evaluation={"metrics": ["dice"], "bootstrap": 1},
    )
    data = write_folder(tmp_path / "volumes", {"alpha": 4, "beta": 4}, 8)
    where = {name: {"cases": data, "store": tmp_path / name} for name in ("alpha", "beta")}
    return [
        Site.open(SiteConfig(name="alpha", annotated=("blob",), **where["alpha"]), study),
        Site.open(
            SiteConfig(name="beta", annotated=("halo",), label_map={1: 2}, **where["beta"]), study
        ),
    ]


def test_a_part_like_ones_own_costs_nothing_whatever_its_owner_draws(opened, monkeypatch):
    torch.manual_seed(0)
    study = opened[0].study
    noise = {
        key.partition("@")[0]: torch.randn_like(tensor)
        for key, tensor in initial_local(study, opened[0].domains).items()
    }

    def same_everywhere(site, round_):
        return {f"{key}@{site.domains[0]}": tensor for key, tensor in noise.items()}

    monkeypatch.setattr(lab_swaps, "carried_after", same_everywhere)
    schema, weights = initial_weights(study)
    matrix, swaps = measure_swaps(study, opened, unflatten(weights, schema), 1)
    parts = {row["part"] for row in swaps} - {ALL_LOCAL}
    assert parts == {"phi", "stem_residual", "depthwise_residual"}
    for row in swaps:
        if row["part"] in parts:
            assert row["own"] == row["swapped"], row
    assert matrix["alpha"]["alpha"] != matrix["beta"]["alpha"]  # a whole model says its own classes
