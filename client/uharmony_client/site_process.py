"""The warm process of a site: it opens the site once and answers the coordinator's instructions.

It is a child of the service. Killed at any moment and started again, it goes on from the site's
store: a round that is stored is sent again, one that is not goes on from its step checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Sequence

import torch

from uharmony_client.check import run_check
from uharmony_client.executor import execute_tasks
from uharmony_client.flower_app import Listeners, make_client_app
from uharmony_client.home import Home
from uharmony_client.ledger import Ledger
from uharmony_client.outgoing import Outgoing
from uharmony_client.policy import require_allowed
from uharmony_client.site import Site
from uharmony_client.site_board import SiteBoard, SiteBoardWriter
from uharmony_client.site_config import SiteConfig
from uharmony_model.allocator import keep_freed_pages
from uharmony_model.errors import DataError
from uharmony_model.study import Study
from uharmony_service.command_line import run_process
from uharmony_service.keys import load_ledger_key
from uharmony_service.loopback import read_secret
from uharmony_service.runtime import require_flower
from uharmony_service.supervision import end_with_parent

log = logging.getLogger(__name__)
_DELIVERY_SECONDS = 5.0


def work(home: Home, port: int) -> None:
    """Answer instructions that come through the SuperNode at this loopback port, to the end.

    Raises:
        ConfigError: the site has not joined, or its policy does not allow the study any more.
        DataError: nothing is left to train on.
        StoreError: the ledger is damaged, or the disk is full.
    """
    study, membership, config = home.study(), home.membership(), home.config
    require_allowed(config.policy, study)
    training = study.training
    board = SiteBoardWriter(
        home.run / "status.json",
        SiteBoard(
            state="preparing",
            rounds=training.rounds,
            steps=training.local_steps,
            finale_steps=study.finale.steps,
        ),
    )
    keep_freed_pages()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(config.resources.threads or cores or 1)

    site = _open(config, study)
    board.change(cases=len(site.table.cases), quarantined=site.quarantined)
    ledger = Ledger(home.ledger, load_ledger_key(home.identity.ledger_key))
    outgoing = Outgoing(ledger, config.policy, to=membership.address)
    finished: list[bool] = []
    app = make_client_app(
        lambda context: site,
        outgoing=lambda opened: outgoing,
        listeners=Listeners(
            instruction=board.instruction,
            step=board.step,
            alone=board.step,
            finished=lambda: finished.append(True),
        ),
    )
    execute_tasks(
        app,
        f"127.0.0.1:{port}",
        read_secret(home.run / "secret"),
        done=lambda: bool(finished),
        idle=board.idle,
    )
    time.sleep(_DELIVERY_SECONDS)  # the SuperNode still has the last answer to hand on
    board.change(state="finished")


def _open(config: SiteConfig, study: Study) -> Site:
    """The site; if a case cannot be used, the doctor is asked which, and the others are opened."""
    try:
        return Site.open(config, study)
    except DataError as error:
        log.warning("%s; looking at all cases, to go on without those that are refused", error)
    report = run_check(config, study)
    log.warning("%d of %d cases are in quarantine", report.quarantined, len(report.cases))
    return Site.open(config, study)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m uharmony_client.site_process`: started by the service, not by hand."""
    end_with_parent()
    require_flower()
    parser = argparse.ArgumentParser()
    parser.add_argument("site")
    parser.add_argument("port", type=int)
    given = parser.parse_args(arguments)
    work(Home.find(given.site), given.port)


if __name__ == "__main__":
    run_process(main)
