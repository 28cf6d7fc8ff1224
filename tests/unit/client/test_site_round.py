"""The finale's candidates on disk: gone when it is over, and never those of another beginning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.bench import bench_of
from tests.support.tiny import tiny_study, write_folder
from uharmony_client.local_store import RoundKey
from uharmony_client.site import Site
from uharmony_client.site_config import SiteConfig
from uharmony_client.site_round import Bench, finale_metrics, round_update
from uharmony_client.workbench import carried_after

STEPS = 2


class Killed(BaseException):
    """Stands for a kill."""


def kill(*given: object, **named: object) -> None:
    raise Killed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "volumes", {"alpha": 4}, 8)


@pytest.fixture
def opened(data: Path, tmp_path: Path) -> Callable[[str], tuple[Site, Bench]]:
    """A site after its only round, and what it works with."""

    def open_for(method: str) -> tuple[Site, Bench]:
        study = tiny_study(
            method=method,
            training={"rounds": 1, "local_steps": 1, "batch_size": 1, "patch": [8, 8, 8]},
            evaluation={"validation": 0.25, "test": 0.25, "bootstrap": 1, "metrics": ["dice"]},
            finale={"steps": STEPS, "candidates": ["whole"]},
        )
        site = Site.open(SiteConfig(name="alpha", cases=data, store=tmp_path / "store"), study)
        bench = bench_of(site)
        round_update(site, bench, 1)
        return site, bench

    return open_for


def steps_of(site: Site, bench: Bench) -> int:
    """The steps that the finale took."""
    steps: list[int] = []
    finale_metrics(site, bench, on_step=lambda step, loss: steps.append(step))
    return len(steps)


def names(site: Site) -> set[str]:
    return {path.name for path in site.store.folder.iterdir()}


def test_candidates_go_also_when_the_kill_came_between_the_choice_and_that(opened, monkeypatch):
    site, bench = opened("fedavg")
    with monkeypatch.context() as patch:
        patch.setattr("uharmony_client.site_round.clear_shelf", kill)
        with pytest.raises(Killed):
            finale_metrics(site, bench)
    assert names(site) > {"round-000001", "round-000002"}  # or nothing would be shown here
    assert steps_of(site, bench) == 0
    assert names(site) == {"round-000001", "round-000002"}


@pytest.mark.parametrize("method", ["local", "fedper"])
def test_candidates_of_another_beginning_are_not_taken(opened, monkeypatch, method):
    """A method without shared weights has one base for ever, whatever the site carries."""
    site, bench = opened(method)
    with monkeypatch.context() as patch:
        patch.setattr("uharmony_client.site_round.evaluate_split", kill)
        with pytest.raises(Killed):
            finale_metrics(site, bench)
    again = {name: torch.full_like(t, 0.01) for name, t in carried_after(site, 1).items()}
    site.store.write(RoundKey(site.study.digest, 1, bench.base), b"again", again)
    assert steps_of(site, bench) == STEPS


def test_candidates_of_the_same_beginning_are(opened, monkeypatch):
    site, bench = opened("fedper")
    with monkeypatch.context() as patch:
        patch.setattr("uharmony_client.site_round.evaluate_split", kill)
        with pytest.raises(Killed):
            finale_metrics(site, bench)
    assert steps_of(site, bench) == 0
