"""A study twice: in one process, and as a coordinator and sites in processes of their own.

Both must end with the same weights to the last bit; anything else is a defect, and said so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from uharmony_model.errors import ConfigError
from uharmony_model.study import Study, load_study
from uharmony_server.records import Record, read_results
from uharmony_simulation.arms import Machine
from uharmony_simulation.deployed import Deployment
from uharmony_simulation.progress import Progress
from uharmony_simulation.run import run_study

_LONGEST_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Comparison:
    """Digests of the final weights, and what the deployed run left behind."""

    inprocess: str
    deployed: str
    seconds: float
    records: list[Record]
    report: Path

    @property
    def identical(self) -> bool:
        """Whether both runs ended with the same weights, to the last bit."""
        return self.inprocess == self.deployed


def compare(
    path: Path, out: Path, *, data: Path | None, progress: Progress, say: Callable[[str], None]
) -> Comparison:
    """Run a study both ways, or go on where a stop left it, and compare.

    Raises:
        ConfigError: the study cannot be followed, or is one that no hospital can run.
        ExchangeError: the deployed run did not come to its end.
    """
    study, _ = load_study(path)
    if study.plan.pooled:
        raise ConfigError(f"{path}: method {study.method} pools the cases; no hospital can run it")
    # Equal thread counts are part of the claim, and one is what every machine has.
    run_study(
        path,
        out / "inprocess",
        data=data,
        arms=(),
        seeds=(),
        machine=Machine(threads=1, device="cpu"),
        resume=True,
        progress=progress,
    )
    sites = out / "inprocess" / "sites"
    names = json.loads((sites / "sites.json").read_bytes())["sites"]
    begin = time.monotonic()
    deployment = Deployment(
        out / "deployed", study, {name: sites / name / "site.yaml" for name in names}
    )
    digest = _deploy(deployment, study, say)
    return Comparison(
        inprocess=_weights(out / "inprocess", study),
        deployed=digest,
        seconds=time.monotonic() - begin,
        records=read_results(deployment.server / "results.json"),
        report=deployment.server / "report.html",
    )


def _deploy(deployment: Deployment, study: Study, say: Callable[[str], None]) -> str:
    """Bring everything up, wait for the end, and leave no process behind."""
    rounds = study.training.rounds
    if deployment.finished():
        return deployment.weights()
    try:
        if not deployment.server.exists():
            deployment.init()
        say(f"starting a coordinator and {len(deployment.names)} sites")
        deployment.start()
        digest = deployment.finish(
            _LONGEST_SECONDS, on_round=lambda done: say(f"deployed: round {done} of {rounds}")
        )
        deployment.await_sites()
        return digest
    finally:
        deployment.stop()


def _weights(out: Path, study: Study) -> str:
    folder = out / "arms" / study.method / f"seed-{study.seed}"
    return str(json.loads((folder / "done.json").read_bytes())["weights"])
