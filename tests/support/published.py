"""A tiny model with published experts and prototypes, and scans of a known look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uharmony_model.abstention import AbstentionLimit
from uharmony_model.bundle import save_bundle
from uharmony_model.descriptor import describe
from uharmony_model.exchange.partition import Partition
from uharmony_model.networks import build_network
from uharmony_model.prototypes import Prototype
from uharmony_model.publication import (
    Frame,
    Prototypes,
    Publication,
    SiteExperts,
    write_publication,
)
from uharmony_model.study import Study

SITES = {"north": ("n1", "n2"), "south": ("s",)}
NAMES = ("north.n1", "north.n2", "south.s")
LOOKS = dict(zip(NAMES, (0, 1, 2), strict=True))


def scan(look: int, size: int = 8) -> np.ndarray:
    """An image (D, H, W) whose grain is finer or coarser by its `look` 0, 1, 2; 3 is stripes."""
    if look == 3:
        return np.asarray(np.indices((size,) * 3)[0] % 2 * 90 + 10, "f4")
    image = np.random.default_rng(look).normal(100, 20, (size,) * 3)
    for _ in range(2 * look):
        for axis in range(3):
            image = image + np.roll(image, 1, axis)
    return np.asarray(image, "f4")


def normalised(image: np.ndarray) -> Tensor:
    """The z-score of a volume as (1, D, H, W), as a site's preprocessing makes it."""
    return torch.from_numpy(((image - image.mean()) / image.std()).astype("f4"))[None]


def tensors(study: Study) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Random shared weights, and residuals by site."""
    shared: dict[str, Tensor] = {}
    local = {}
    for number, (site, names) in enumerate(SITES.items()):
        network = build_network(study, names, seed=5)
        draw = torch.Generator().manual_seed(number)
        partition = Partition.of(network, study.plan.local)
        common, own = partition.split(network.state_dict())
        shared = shared or {
            k: t + 0.3 * torch.randn(t.shape, generator=draw) for k, t in common.items()
        }
        local[site] = {k: 0.5 * torch.randn(t.shape, generator=draw) for k, t in own.items()}
    return shared, local


def plain_network(study: Study):
    """The network of the shared weights, with residuals of zero."""
    network = build_network(study, ("x",), seed=1)
    partition = Partition.of(network, study.plan.local)
    zero = partition.split(network.state_dict())[1]
    network.load_state_dict(partition.merge(tensors(study)[0], zero))
    return network.eval()


def write_model(folder: Path, study: Study) -> Path:
    """The model without any site's entry, as a coordinator hands it out."""
    save_bundle(folder, study, tensors(study)[0], {}, {})
    return folder


def publication(
    study: Study,
    *,
    experts: Sequence[str] = tuple(SITES),
    limit: float | None = 1.0,
    familiar: float | None = None,
) -> Publication:
    """Experts of some sites; a prototype of each domain, which is the descriptor of its look."""
    network, local = plain_network(study), tensors(study)[1]
    rows = {name: describe(network, normalised(scan(look))) for name, look in LOOKS.items()}
    frame = Frame(dimension=len(rows[NAMES[0]]), seed=study.seed)
    return Publication(
        {site: SiteExperts(dict.fromkeys(SITES[site], 12), local[site]) for site in experts},
        Prototypes(
            frame=frame,
            prototypes=tuple(
                Prototype(
                    domain=name,
                    mean=tuple(frame.public.rows(row).tolist()),
                    patients=12,
                    noise=1e-9,
                    epsilon=1.0,
                    delta=1e-5,
                )
                for name, row in rows.items()
            ),
            abstention=None
            if limit is None
            else AbstentionLimit(limit=limit, margin=0.1, familiar=familiar, false_rate=0.25),
        ),
    )


def published_model(folder: Path, study: Study, **choices) -> Path:
    """The model with its publication."""
    write_publication(write_model(folder, study), publication(study, **choices))
    return folder
