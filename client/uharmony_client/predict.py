"""uharmony-predict: a segmentation from a volume, on exactly the grid of the volume.

For an input NAME.nii.gz it writes, readable by the user alone:
    NAME_seg.nii.gz    uint8. Exclusive classes: (D, H, W), each class by the first of its label
                       values. Overlapping classes: (D, H, W, J), one 0/1 mask a class.
    NAME_prob.nii.gz   with --probabilities: (D, H, W, J) float32, foreground classes only.
    NAME_seg.json      the classes in the order of J and their values, site, domain, model digest,
                       and how the domain was found (see `domain_choice`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from uharmony_client.device import choose_device
from uharmony_client.domain_choice import AbstainedError, Chosen
from uharmony_client.few_shot import STEPS
from uharmony_client.nifti import MAX_VOXELS
from uharmony_client.readers import stem
from uharmony_client.segmentation import (
    Segmentation,
    decide,
    prepare_case,
    segment,
    segment_prepared,
)
from uharmony_client.serving import fit_serving, open_serving, refuse_conflicts
from uharmony_client.site_data import channel_modalities
from uharmony_client.volume_header import encode_volume
from uharmony_model.atomic import write_atomic
from uharmony_model.errors import ConfigError, DataError, StoreError
from uharmony_model.test_time import MixtureSearch
from uharmony_service.command_line import run

__all__ = ["Segmentation", "app", "decide", "main", "plan_requests", "predict", "segment"]

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Request:
    """One case to segment: its channels' files, and the name of what is written."""

    images: tuple[Path, ...]
    name: str


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a model (study.json and weights).")],
    volumes: Annotated[
        list[str] | None,
        typer.Argument(help="NIfTI files; several channels of one case joined by commas."),
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Whose own parameters to use. Default: all residuals zero.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="Which of the site's domains, where it has several. Without --site: 'auto' "
            "weighs the experts that were published with the model, for each volume."
        ),
    ] = None,
    test_time: Annotated[
        bool,
        typer.Option(
            "--test-time",
            help="With --domain auto: move the weights on each volume by its entropy, guarded.",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="With --domain auto: no segmentation of a volume that is unlike all that the "
            "model has learned from; the exit code is then 9.",
        ),
    ] = False,
    few_shot: Annotated[
        Path | None,
        typer.Option(help="Fit a domain of its own to the labelled cases in this folder or table."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of --few-shot.")] = STEPS,
    save_model: Annotated[
        Path | None,
        typer.Option(help="Keep the model of --few-shot in this folder, with --name as its site."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the site that --few-shot makes.")] = "few-shot",
    annotated: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS,...",
            help="The classes that are drawn in the cases of --few-shot; the others are then no "
            "background. Default: all.",
        ),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(help="The study's name of the modality; one for each channel, by commas."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(),
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write the classes' probabilities too.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    memory_gib: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GiB of the device's memory to use: a volume that is expected to fit takes one "
            "pass, others go window by window. Expected is twice what the layers put out, "
            "measured on one window. Norms then see the whole volume, in training they saw "
            "patches: results differ. Default: windows of the study's patch.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite earlier results.")] = False,
    max_voxels: Annotated[int, typer.Option(help="Largest accepted volume.")] = MAX_VOXELS,
) -> None:
    """Segment volumes with a trained model, on the grid of each volume.

    MODEL is the folder of a model (study.json and weights), VOLUMES are .nii or .nii.gz files;
    several channels of one case are joined by commas.
    """
    if not volumes and save_model is None:
        raise ConfigError("no volume to segment; give one or more NIfTI files after the model")
    requests = plan_requests(volumes or [])
    _refuse_existing(requests, out, force=force, probabilities=probabilities)
    refuse_conflicts(
        site, domain, few_shot, save_model, test_time=test_time, strict=strict, annotated=annotated
    )
    where = choose_device(device)
    named: Sequence[str] = modality.split(",") if modality else ()
    if few_shot is not None:
        serving = fit_serving(
            model,
            few_shot,
            save_model,
            name=name,
            steps=steps,
            modalities=named,
            annotated=annotated.split(",") if annotated is not None else (),
            device=where,
            max_voxels=max_voxels,
            force=force,
            say=_say,
        )
    else:
        serving = open_serving(model, site, domain, strict=strict, say=_say)
    task = serving.model.study.task
    named = named or serving.model.modalities
    if modality is None and len(named) > 1 and len(named) != task.channels and not task.presence:
        raise ConfigError(f"site {site} has {', '.join(named)}; choose one with --modality")
    modalities = channel_modalities(named, task, {}, "--modality") if requests else ()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: {error.strerror}; give another --out folder") from None
    serving.model.predictor.to(where)
    search, refused = (MixtureSearch() if test_time else None), []
    for request in requests:
        case = prepare_case(request.images, modalities, task, max_voxels)
        chosen = serving.choose(case.image, request.name, search)
        facts = {**serving.facts, "modalities": modalities, **chosen.facts}
        contents = {_path(out, request, "seg.json"): json.dumps(facts, indent=1).encode()}
        if chosen.abstained:
            _say(_warning(request, chosen))
        elif chosen.familiar is False:
            _say(
                f"note: {request.name}: like none of the known domains, so no expert serves it; a "
                "few labelled cases of its scanner would help (--few-shot)"
            )
        if chosen.abstained and strict:
            for ending in ("seg.nii.gz", "prob.nii.gz"):  # of an earlier call, with --force
                _path(out, request, ending).unlink(missing_ok=True)
            refused.append(request.name)
            _write_all(contents)
            continue
        index = None if serving.domain is None else serving.model.domains.index(serving.domain)
        use = index if serving.chooser is None else chosen.weights
        result = segment_prepared(serving.model, case, use, where, memory_gib)
        if probabilities:
            probability = _encode(result.probabilities, result)
            contents = {_path(out, request, "prob.nii.gz"): probability, **contents}
        contents = {_path(out, request, "seg.nii.gz"): _encode(result.label, result), **contents}
        _write_all(contents)
        typer.echo(str(next(iter(contents))))
    if refused:
        raise AbstainedError(
            f"{len(refused)} of {len(requests)} volumes not segmented ({', '.join(refused):.200}): "
            "unlike all that the model has learned from; label a few cases for --few-shot, or "
            "leave --strict out"
        )


def plan_requests(volumes: Sequence[str]) -> list[Request]:
    """What to segment, by the names on the command line.

    Raises:
        DataError: a file is not there.
        ConfigError: two inputs would be written under one name.
    """
    requests: list[Request] = []
    for volume in volumes:
        # A file whose own name has a comma is one file.
        parts = [volume] if Path(volume).is_file() else volume.split(",")
        paths = tuple(Path(part) for part in parts)
        for path in paths:
            if not path.is_file():
                raise DataError(f"{path}: no such volume")
        name = stem(paths[0].name)
        if len(paths) > 1:
            name = name.removesuffix("_0000")  # the first channel as nnU-Net names it
        if name in {request.name for request in requests}:
            raise ConfigError(f"two volumes would be written as {name}_seg.nii.gz; run them apart")
        requests.append(Request(paths, name))
    return requests


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _warning(request: Request, chosen: Chosen) -> str:
    assert chosen.gate is not None  # noqa: S101 - or it would not have abstained
    assert chosen.limit is not None  # noqa: S101 - likewise
    return (
        f"warning: {request.name}: the model abstains: unlike all that it has learned from; the "
        f"nearest is {chosen.gate.nearest} at {chosen.gate.distance:.3g}, the limit is "
        f"{chosen.limit.limit:.3g}; do not rely on a segmentation of this volume"
    )


def _path(out: Path, request: Request, ending: str) -> Path:
    return out / f"{request.name}_{ending}"


def _encode(array: NDArray[np.uint8] | NDArray[np.float32], result: Segmentation) -> bytes:
    return encode_volume(array, result.grid.header)


def _refuse_existing(
    requests: Sequence[Request], out: Path, *, force: bool, probabilities: bool
) -> None:
    endings = ["seg.nii.gz", "seg.json", *(["prob.nii.gz"] if probabilities else [])]
    for request in requests:
        for path in (_path(out, request, ending) for ending in endings):
            if path.exists() and not force:
                raise ConfigError(f"{path}: is there already; use --force to overwrite it")
            if path.resolve() in {image.resolve() for r in requests for image in r.images}:
                raise ConfigError(f"{path}: is one of the inputs; give another --out folder")


def _write_all(contents: dict[Path, bytes]) -> None:
    """Write a case's files; if one fails, those of this case are taken away again."""
    written: list[Path] = []
    try:
        for path, content in contents.items():
            write_atomic(path, content)
            written.append(path)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def main() -> None:
    """The console command."""
    run(app)
