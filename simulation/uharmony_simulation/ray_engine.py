"""The same federation through Flower's Ray engine, for studies one process is too small for.

Workers open their sites from disk with the code the in-process engine uses, at the same number
of threads, so the result is the same to the last bit.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from uharmony_model.errors import ConfigError, QuorumError, UHarmonyError

Result = TypeVar("Result")
START_SECONDS = 60


def run_with_ray(
    main: Callable[[Grid], Result],
    app: ClientApp,
    sites: int,
    *,
    threads: int,
    parallel: int,
    gpu_share: float = 0.0,
) -> Result:
    """Call `main` with a grid of `sites` nodes served by `parallel` Ray workers.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401 - only to say early and plainly that it is missing
    except ImportError:
        raise ConfigError(
            "--engine ray needs Ray; install the extra with: pip install 'uharmony[ray]'"
        ) from None
    from flwr.simulation.run_simulation import run_simulation

    # Everything Ray, Flower and their workers would say about themselves stays quiet.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("flwr").setLevel(logging.ERROR)
    server = ServerApp()
    outcome: list[Result] = []
    failure: list[UHarmonyError] = []

    @server.main()
    def _main(grid: Grid, context: Context) -> None:
        try:
            _wait_for_nodes(grid, sites)
            outcome.append(main(grid))
        except UHarmonyError as error:  # Flower would wrap it and print a traceback
            failure.append(error)

    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=sites,
        backend_config={
            "init_args": {"num_cpus": threads * parallel, "include_dashboard": False},
            "client_resources": {"num_cpus": threads, "num_gpus": gpu_share},
        },
    )
    if failure:
        raise failure[0]
    return outcome[0]


def _wait_for_nodes(grid: Grid, sites: int) -> None:
    """Flower starts the server before its nodes are registered; a fraction of a second later."""
    deadline = time.monotonic() + START_SECONDS
    while len(list(grid.get_node_ids())) < sites:
        if time.monotonic() > deadline:
            raise QuorumError(f"Ray started fewer than {sites} sites in {START_SECONDS} s")
        time.sleep(0.05)
