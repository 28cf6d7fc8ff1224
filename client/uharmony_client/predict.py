"""uharmony-predict: a segmentation from a volume, on exactly the grid of the volume.

For an input NAME.nii.gz it writes, readable by the user alone:
    NAME_seg.nii.gz    uint8. Exclusive classes: (D, H, W), each class by the first of its label
                       values. Overlapping classes: (D, H, W, J), one 0/1 mask a class.
    NAME_prob.nii.gz   with --probabilities: (D, H, W, J) float32, foreground classes only.
    NAME_seg.json      the classes in the order of J and their values, site, domain, model digest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from uharmony_client.device import choose_device
from uharmony_client.grids import Grid, to_input_grid
from uharmony_client.nifti import MAX_VOXELS
from uharmony_client.readers import stem
from uharmony_client.site_data import channel_modalities, prepare_image
from uharmony_client.volume_header import encode_volume
from uharmony_model.atomic import write_atomic
from uharmony_model.bundle import Model, load_bundle
from uharmony_model.errors import ConfigError, DataError, StoreError
from uharmony_model.inference import predict_logits
from uharmony_model.presence import present_channels, with_presence
from uharmony_model.study import Task
from uharmony_service.command_line import run

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Request:
    """One case to segment: its channels' files, and the name of what is written."""

    images: tuple[Path, ...]
    name: str


@dataclass(frozen=True)
class Segmentation:
    """A result on the input's grid: labels (D, H, W) or masks (J, D, H, W), probabilities (J, ...).

    Only probabilities of foreground classes are kept, in the study's order.
    """

    label: NDArray[np.uint8]
    probabilities: NDArray[np.float32]
    grid: Grid


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a model (study.json and weights).")],
    volumes: Annotated[
        list[str],
        typer.Argument(help="NIfTI files; several channels of one case joined by commas."),
    ],
    site: Annotated[
        str | None, typer.Option(help="Whose own parameters to use. Default: all residuals zero.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Which of the site's domains, where it has several.")
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
    force: Annotated[bool, typer.Option("--force", help="Overwrite earlier results.")] = False,
    max_voxels: Annotated[int, typer.Option(help="Largest accepted volume.")] = MAX_VOXELS,
) -> None:
    """Segment volumes with a trained model, on the grid of each volume.

    MODEL is the folder of a model (study.json and weights), VOLUMES are .nii or .nii.gz files;
    several channels of one case are joined by commas.
    """
    requests = plan_requests(volumes)
    _refuse_existing(requests, out, force=force, probabilities=probabilities)
    where = choose_device(device)
    loaded = load_bundle(model, site)
    chosen = choose_domain(loaded, domain)
    named = modality.split(",") if modality else loaded.modalities
    task = loaded.study.task
    if modality is None and len(named) > 1 and len(named) != task.channels and not task.presence:
        raise ConfigError(f"site {site} has {', '.join(named)}; choose one with --modality")
    modalities = channel_modalities(named, task, {}, "--modality")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: {error.strerror}; give another --out folder") from None
    loaded.network.to(where)
    facts = {
        "site": site,
        "domain": chosen,
        "modalities": modalities,
        "model": loaded.digest,
        "study": loaded.study.digest,
        "classes": [
            {"name": name, "values": list(values)}
            for name, values in loaded.study.task.classes.items()
        ],
        "overlapping": loaded.study.task.overlapping,
    }
    for request in requests:
        result = segment(loaded, request.images, modalities, chosen, where, max_voxels)
        contents = {_path(out, request, "seg.nii.gz"): _encode(result.label, result)}
        if probabilities:
            contents[_path(out, request, "prob.nii.gz")] = _encode(result.probabilities, result)
        contents[_path(out, request, "seg.json")] = json.dumps(facts, indent=1).encode()
        _write_all(contents)
        typer.echo(str(next(iter(contents))))


def segment(
    model: Model,
    images: Sequence[Path],
    modalities: Sequence[str],
    domain: str | None,
    device: torch.device,
    max_voxels: int = MAX_VOXELS,
) -> Segmentation:
    """Segment one case and bring the probabilities back to its grid before deciding.

    Raises:
        DataError: the volume is unusable or does not fit the study.
    """
    study = model.study
    image, grid = prepare_image(images, modalities, study.task, max_voxels)
    present = present_channels(study.task, modalities)
    logits = predict_logits(
        model.network,
        with_presence(torch.from_numpy(image)[None], [present], study.task)[0],
        patch=study.training.patch,
        overlap=study.evaluation.overlap,
        domain=None if domain is None else model.domains.index(domain),
        device=device,
    )
    everything = logits.sigmoid() if study.task.overlapping else logits.softmax(dim=0)
    del image, logits
    if not bool(torch.isfinite(everything).all()):
        raise DataError(f"{images[0]}: the network's output is not finite; is the model damaged?")
    there = to_input_grid(everything.numpy(), grid)
    foreground = there if study.task.overlapping else there[1:]
    return Segmentation(decide(there, study.task), foreground, grid)


def decide(probabilities: NDArray[np.float32], task: Task) -> NDArray[np.uint8]:
    """Label values (D, H, W) of the most probable class, or masks (J, D, H, W) above one half."""
    if task.overlapping:
        return (probabilities > 0.5).astype(np.uint8)
    values = np.array([0, *(group[0] for group in task.classes.values())], dtype=np.uint8)
    return np.asarray(values[probabilities.argmax(axis=0)], dtype=np.uint8)


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


def choose_domain(model: Model, name: str | None) -> str | None:
    """The domain to predict for; None where no site was chosen.

    Raises:
        ConfigError: the site has no such domain, or several and none was chosen.
    """
    if name is not None and name not in model.domains:
        known = ", ".join(model.domains) or "none without --site"
        raise ConfigError(f"no domain {name!r:.80}; there are: {known}")
    if name is None and len(model.domains) > 1:
        raise ConfigError(
            f"the site has the domains {', '.join(model.domains)}; choose one with --domain"
        )
    return name or (model.domains[0] if model.domains else None)


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
