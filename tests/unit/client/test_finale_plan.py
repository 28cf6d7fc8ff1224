"""What a hospital is told of a finale before it takes part, held against what a finale does."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.support.tiny import tiny_study, write_folder
from uharmony_client import finale
from uharmony_client.alone import alone_candidate
from uharmony_client.check.leaving import generation_bytes, what_leaves
from uharmony_client.finale_plan import finale_steps, finale_view, stays_view, values_asked
from uharmony_client.home import Home
from uharmony_client.join import study_view
from uharmony_client.site import Site
from uharmony_client.site_round import Bench, finale_metrics, round_update
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.payload import digest
from uharmony_model.initial import initial_weights
from uharmony_model.methods import METHODS
from uharmony_model.networks import build_network
from uharmony_model.study import Study
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.sites import make_sites

TRAINING = {"rounds": 32, "local_steps": 6, "batch_size": 1, "patch": [8, 8, 8]}


def study_of(method: str = "uharmony", **changes: object) -> Study:
    return tiny_study(method=method, **{"training": TRAINING, "finale": {"steps": 48}, **changes})


def test_all_steps_of_a_finale_are_told():
    # 32 x 6 = 192 in the rounds; at home 48 for each way, and alone 192 + 48.
    assert finale_steps(study_of()) == {"own": 48, "whole": 48, "local": 240}
    assert sum(finale_steps(study_of()).values()) == 336
    assert finale_steps(study_of(finale={"steps": 0})) == {}


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["federated"], {}),
        (["own"], {"own": 48}),
        (["between"], {"whole": 48}),
        (["local"], {"local": 192}),
        (["whole", "local"], {"whole": 48, "local": 240}),
    ],
)
def test_only_what_the_candidates_need_is_trained(names, steps):
    assert finale_steps(study_of(finale={"steps": 48, "candidates": names})) == steps


@pytest.mark.parametrize("method", METHODS)
def test_ways_and_parts_are_those_of_the_network(method):
    study = study_of(method)
    network = build_network(study, ("north",), seed=0)
    partition = Partition.of(network, study.plan.local)
    steps = finale_steps(study)
    assert ("own" in steps) == finale._has_own_part(network, partition)
    alone = method != "local" and not study.plan.pooled
    assert ("local" in steps) == alone
    state = network.state_dict()  # a norm's counter, an integer, is never shared
    own = [key for key in partition.local_keys if state[key].is_floating_point()]
    nothing = not own and study.plan.training != "twin"
    assert (stays_view(study) == "no part of the model") == nothing


def test_only_parts_that_the_network_has_are_said_to_stay():
    assert stays_view(study_of()) == "depthwise_residual, phi, stem_residual"
    settings = {"name": "unet", "features": [4, 8], "harmonization": {"residuals": ["phi"]}}
    assert stays_view(study_of(network=settings)) == "phi"
    assert stays_view(study_of("ditto")) == "a whole model of the site's own"
    assert stays_view(study_of("fedper")) == "last_block"


def test_what_is_approved_names_the_finale(config, tmp_path):
    console = Console(width=200)
    with console.capture() as shown:
        console.print(study_view(study_of(), Home(config, tmp_path / "site.yaml")))
    text = " ".join(shown.get().split())
    for words in ("at home", "own 48 steps", "whole 48 steps", "local, 240 steps", "loss, kept"):
        assert words in text, words
    assert "the means leave once more" in text


def test_without_a_finale_nothing_of_it_is_asked():
    study = study_of(finale={"steps": 0})
    assert values_asked(study) == study.asks
    assert "no finale" in finale_view(study)
    assert values_asked(study_of()) == (*study.asks, "kept")


def test_the_doctor_says_the_same(config):
    leaving, _ = what_leaves(config, study_of(), ("north",))
    assert leaving is not None
    assert leaving.values[-1] == "kept"
    assert leaving.at_home == finale_view(study_of())


# --- the disk ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_there_is_room_for_all_that_a_finale_puts_on_disk(tmp_path: Path):
    """Every file of the store, at each step of the rounds and of the finale, and at the end."""
    training = {"rounds": 3, "local_steps": 1, "batch_size": 1, "patch": [8, 8, 8]}
    network = {"name": "unet", "features": [8, 16]}
    shares = {"validation": 0.25, "test": 0.25, "bootstrap": 1, "metrics": ["dice"]}
    study = study_of(
        "fedper", training=training, finale={"steps": 1}, network=network, evaluation=shares
    )
    volumes = write_folder(tmp_path / "volumes", {"alpha": 4}, 8)
    source = {"source": {"kind": "folder", "sites_from": "column"}}
    make_sites(study, Simulation.model_validate(source), volumes, tmp_path / "sites")
    arm = Arm.of(study, "fedper", 0, ("alpha",))
    site: Site = SiteOpener(arm, tmp_path / "sites", Machine(1, "cpu")).named("alpha")
    _, weights = initial_weights(arm.study)
    built = build_network(arm.study, site.domains, seed=0)
    bench = Bench(built, Partition.of(built, arm.study.plan.local), weights, digest(weights))
    sizes = []

    def look(*_: object) -> None:
        files = (site.config.store / "generations").rglob("*")
        sizes.append(sum(path.stat().st_size for path in files if path.is_file()))

    for round_ in (1, 2, 3):
        round_update(site, bench, round_, on_step=look)
    finale_metrics(site, bench, alone=alone_candidate(site, on_step=look), on_step=look)
    look()
    leaving, _ = what_leaves(site.config, arm.study, site.domains)
    assert leaving is not None
    whole = leaving.scalars + leaving.stays
    generations = 3 * 4 * (whole + 2 * whole)  # what there was room for without a finale
    assert generations < max(sizes) <= generation_bytes(leaving, arm.study)
    assert generation_bytes(leaving, arm.study) < 2.5 * max(sizes)


def test_a_twin_needs_room_for_its_second_model(config):
    """Ditto's own model and its moments are carried from round to round, three times over."""
    plain, twin = study_of("fedavg", finale={"steps": 0}), study_of("ditto", finale={"steps": 0})
    leaving, _ = what_leaves(config, plain, ("north",))
    beside, _ = what_leaves(config, twin, ("north",))
    assert leaving is not None
    assert beside is not None
    more = generation_bytes(beside, twin) - generation_bytes(leaving, plain)
    assert more == 3 * 4 * (1 + 2) * leaving.scalars
