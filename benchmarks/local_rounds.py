"""Rounds with real local training, in the engine and as a plain serial loop of the same steps."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.rows import Row, at_most
from tests.support.tiny import tiny_study, write_folder
from uharmony_client.flower_app import make_client_app
from uharmony_client.local_train import train_round
from uharmony_model.exchange.partition import Partition
from uharmony_model.initial import initial_local, initial_weights
from uharmony_model.networks import build_network
from uharmony_server.rounds import run_rounds
from uharmony_simulation.arms import Arm, Machine, SiteOpener
from uharmony_simulation.config import Simulation
from uharmony_simulation.engine import InProcessGrid
from uharmony_simulation.sites import make_sites

SOURCE = {"source": {"kind": "folder", "sites_from": "column"}}


def rows() -> list[Row]:
    """Four rounds of three sites, four steps on 64^3 patches: exchange, stores and checkpoints."""
    study = tiny_study(
        network={"features": [16, 32, 64, 128], "residual_units": 2},
        training={"rounds": 4, "local_steps": 4, "patch": [64, 64, 64]},
        evaluation={"validation": 0.0, "test": 0.0, "every": 0},
    )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        data = write_folder(home / "data", size=64)
        names = make_sites(study, Simulation.model_validate(SOURCE), data, home / "sites")
        arm = Arm.of(study, "uharmony", 0, names)
        opener = SiteOpener(arm, home / "sites", Machine(torch.get_num_threads(), "cpu"))
        sites = [opener.named(name) for name in arm.sites]
        schema, initial = initial_weights(arm.study)
        network = build_network(arm.study, sites[0].domains, seed=0)

        def loop() -> None:
            weights = initial.clone()
            local = {s.name: initial_local(arm.study, s.domains) for s in sites}
            for round_ in range(1, 5):
                updates = []
                for site in sites:
                    network.domains = site.domains
                    partition = Partition.of(network, arm.study.plan.local)
                    result = train_round(
                        network,
                        site.training_data(),
                        study=arm.study,
                        partition=partition,
                        base=weights,
                        before=local[site.name],
                        round_=round_,
                    )
                    local[site.name] = result.local
                    updates.append(result.update)
                weights = weights + torch.stack(updates).mean(0)

        loop()  # the first pass loads and starts what neither side is to pay for
        start = time.perf_counter()
        loop()
        serial = time.perf_counter() - start
        app = make_client_app(opener)
        start = time.perf_counter()
        run_rounds(arm.study, schema, initial, InProcessGrid(app, arm.sites), home / "server")
        ours = time.perf_counter() - start
    name = "4 rounds x 3 sites of real training v. serial loop"
    added = Row("the same, added to each site's round", round((ours - serial) / 12, 3), "s")
    return [at_most(name, ours, "s", ours / serial, 1.05), added]
