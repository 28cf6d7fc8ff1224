"""What the coordinator hands out when rounds are done: results, report, model."""

from __future__ import annotations

import platform
from importlib.metadata import version

from uharmony_model import __version__
from uharmony_server.checkpoint import Checkpoint
from uharmony_server.export import export_model
from uharmony_server.records import Record, write_results
from uharmony_server.report import ArmRefusal, write_report
from uharmony_server.server_folder import ServerFolder

PACKAGES = ("torch", "monai", "flwr", "numpy", "cryptography")


def publish(folder: ServerFolder, state: Checkpoint) -> None:
    """results.json, report.html and the model, from a checkpoint; what is there is replaced.

    Raises:
        StoreError: the folder cannot be written.
    """
    write_outcome(folder, state)
    export_model(state, folder.study, folder.model / folder.study.name)


def write_outcome(folder: ServerFolder, state: Checkpoint) -> None:
    """results.json and report.html alone.

    Raises:
        StoreError: the folder cannot be written.
    """
    study = folder.study
    records = [Record.model_validate(record) for record in state.records]
    write_results(folder.path / "results.json", records)
    write_report(
        folder.path / "report.html",
        title=study.name,
        study=study,
        records=records,
        refusals=[
            ArmRefusal(arm=study.method, seed=study.seed, **r.model_dump()) for r in state.refusals
        ],
        run_info=run_facts(folder, state),
    )


def run_facts(folder: ServerFolder, state: Checkpoint) -> dict[str, object]:
    """Under what the figures were made."""
    return {
        "uharmony": __version__,
        "study": folder.study.name,
        "study_digest": folder.study.digest,
        "weights": state.digest,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "rounds": [
            {"round": number, "sites": ", ".join(sites), "bytes_up": sent}
            for number, (sites, sent) in enumerate(
                zip(state.counted, state.bytes_up, strict=True), start=1
            )
        ],
    }
