"""The folder of a model that is extended: what is in it, what becomes of it, and the comparison.

At an old site a new class is off: a bias of its own makes its logit so low that its probability is
zero, so segmentations and probabilities of the old classes are the same too, not the logits alone.
With all residuals zero there is no such bias: the class is on there, and only the logits of the old
classes are the same. Ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from uharmony_model.bundle import Model, SiteEntry, known_sites, load_bundle
from uharmony_model.errors import ConfigError, StoreError, TrainingError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.parts import place_of
from uharmony_model.extension import extend_state
from uharmony_model.extension_line import read_line
from uharmony_model.frozen import parse
from uharmony_model.inference import predict_logits
from uharmony_model.methods import EVERYTHING, Place
from uharmony_model.networks import build_network
from uharmony_model.patches import StoredVolume
from uharmony_model.presence import with_presence
from uharmony_model.randomness import torch_generator
from uharmony_model.residual_conv import ResidualConv
from uharmony_model.study import Study
from uharmony_model.targets import to_masks
from uharmony_model.u2net_blocks import DomainConv

OFF = -1e4
"""The logit of a class that is off: its probability is zero, and it fits into half precision."""

_MAX_JSON_BYTES = 1 << 20
State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class OldSite:
    """A site's entry: its tensors by KEY or KEY@DOMAIN; the others as in `SiteEntry`."""

    local: State
    domains: tuple[str, ...]
    modalities: tuple[str, ...] = ()
    own: str | None = None
    undrawn: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class OldModel:
    """A finished model; `line` are the studies that it was of before its own."""

    folder: Path
    study: Study
    line: tuple[Study, ...]
    shared: State
    sites: dict[str, OldSite]

    @classmethod
    def read(cls, folder: Path) -> OldModel:
        """Read and check the folder.

        Raises:
            ConfigError: there is no model, or its method keeps nothing of a domain at a site.
            StoreError: a file is damaged.
            PartitionError: the tensors are not those of the study's network.
        """
        if not (folder / "study.json").is_file():
            raise ConfigError(f"{folder}: no study.json in it; give the folder of a model")
        study = parse(Study, _json(folder / "study.json"), str(folder / "study.json"))
        names = Partition.of(build_network(study, ("x",), seed=0), study.plan.local).local_names
        if not any("@" in name for name in names):
            raise ConfigError(
                f"{folder}: a model of method {study.method} keeps nothing of a domain at its "
                "sites, so nothing could learn while the rest is held; extend a model of uharmony "
                "with residuals, or of u2net"
            )
        models = {site: load_bundle(folder, site) for site in known_sites(folder)}
        path = folder / "shared.safetensors"
        try:
            shared = safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"{path}: not readable ({type(error).__name__}); copy the model again"
            ) from None
        sites = {site: _site(folder, site, model) for site, model in models.items()}
        return cls(folder, study, read_line(folder), shared, sites)

    def require_new(self, name: str) -> None:
        """Refuse a name that is a site's or a domain's already.

        Raises:
            ConfigError: it is.
        """
        for site, entry in self.sites.items():
            if name == site or name in entry.domains:
                raise ConfigError(
                    f"--name {name}: the model has site {site} with the domains "
                    f"{', '.join(entry.domains)}; choose another name"
                )

    def bare(self) -> State:
        """Tensors that stay at a site and belong to no domain: all of a pooled model.

        Raises:
            ConfigError: it is not clear whose a new site would start from.
        """
        partition = Partition.of(build_network(self.study, ("x",), seed=0), self.study.plan.local)
        names = [name for name in partition.local_names if "@" not in name]
        having = [site for site in self.sites.values() if site.own is None]
        if names and len(having) != 1:
            raise ConfigError(
                f"{self.folder}: method {self.study.method} keeps tensors such as {names[0]} at "
                f"{len(having)} sites; a new domain needs one site to take them from"
            )
        return {name: having[0].local[name] for name in names}


def grown_site(site: OldSite, old: OldModel, new: Study) -> OldSite:
    """An old site's entry in the new model: what is new is zero, at rest, or off."""
    before = old.study if site.own is None else old.study.with_method(site.own)
    after = new if site.own is None else new.with_method(site.own)
    given = site.local if site.own is not None else {**old.shared, **site.local}
    state = extend_state(before, after, given)
    network = build_network(after, site.domains, seed=0)
    own = Partition.of(network, after.plan.local if site.own is None else EVERYTHING).local_names
    local = {name: state[name] for name in own}
    if new.task.outputs > old.study.task.outputs:
        local = _off(local, network, before.task.outputs)
    # With one modality nobody had to name it; with two, old sites have to.
    only = tuple(old.study.task.intensity) if len(old.study.task.intensity) == 1 else ()
    return replace(site, local=local, modalities=site.modalities or only)


def merged(partition: Partition, state: State) -> State:
    """A full state dict from tensors by name.

    Raises:
        PartitionError: a tensor is missing or has another shape.
    """
    return partition.merge(
        {key: state[key] for key in partition.shared_keys if key in state},
        {name: state[name] for name in partition.local_names if name in state},
    )


def require_same_outputs(
    old: OldModel, grown: Path, new: Study, volume: StoredVolume
) -> tuple[str, ...]:
    """Compare all old domains of both models on noise and on a given case, on the processor.

    Gives what was compared. Volumes are of one patch.

    Raises:
        TrainingError: a logit of an old class is another, or an old segmentation is.
    """
    pairs = list(_inputs(old.study, new, volume))
    unseen = (None,) if old.study.plan.serves_unseen else ()
    compared = []
    for site in (*unseen, *old.sites):
        theirs, ours = load_bundle(old.folder, site), load_bundle(grown, site)
        for domain, name in enumerate(theirs.domains or ("all residuals zero",)):
            label = name if site is None else f"{site}/{name}"
            index = None if site is None else domain
            same = [_same(theirs, ours, *pair, index) for pair in pairs]
            if not all(logits for logits, _ in same):
                raise TrainingError(
                    f"{label}: logits of the old classes are not the same to the bit; nothing "
                    "was written"
                )
            masks = all(found for _, found in same)
            compared.append(label if masks else f"{label} (logits; the new class is on there)")
    return tuple(compared)


def _same(
    theirs: Model, ours: Model, x: Tensor, grown: Tensor, domain: int | None
) -> tuple[bool, bool]:
    """Whether logits of the old classes are the same, and whether segmentations are."""
    task, more = theirs.study.task, ours.study.task
    before, after = (_logits(m, given, domain) for m, given in ((theirs, x), (ours, grown)))
    masks = to_masks(after[None], more)[:, : len(task.classes)]
    found = torch.equal(masks, to_masks(before[None], task))
    rest = to_masks(after[None], more)[:, len(task.classes) :]
    return torch.equal(after[: task.outputs], before), found and not bool(rest.any())


def _logits(model: Model, image: Tensor, domain: int | None) -> Tensor:
    study = model.study
    return predict_logits(
        model.predictor,
        image,
        patch=study.training.patch,
        overlap=study.evaluation.overlap,
        domain=domain,
        device="cpu",
    )


def _inputs(old: Study, new: Study, volume: StoredVolume) -> Iterator[tuple[Tensor, Tensor]]:
    """One patch as both networks take it, without the channels that an old site cannot have."""
    patch, task = new.training.patch, new.task
    draw = torch_generator(new.seed, "extension", "comparison")
    noise = torch.randn((task.channels, *patch), generator=draw)
    starts = [(n - p) // 2 for n, p in zip(volume.image.shape[1:], patch, strict=True)]
    middle = tuple(slice(max(a, 0), max(a, 0) + p) for a, p in zip(starts, patch, strict=True))
    case = torch.from_numpy(np.array(volume.image[(slice(None), *middle)]))
    for image, present in ((noise, [True] * task.channels), (case, list(volume.present))):
        if not task.presence:
            yield image, image
            continue
        names = list(task.intensity)
        there = [p and n in old.task.intensity for n, p in zip(names, present, strict=True)]
        chosen = [place for place, name in enumerate(names) if name in old.task.intensity]
        if any(there):
            before = with_presence(image[None, chosen], [[there[i] for i in chosen]], old.task)
            yield before[0], with_presence(image[None], [there], task)[0]


def _off(local: State, network: nn.Module, outputs: int) -> State:
    """Switch off the classes behind `outputs`, where the logits have a bias of the site's own."""
    key = _logit_bias(network)
    return {
        name: torch.cat((t[:outputs], torch.full_like(t[outputs:], OFF)))
        if name.partition("@")[0] == key
        else t
        for name, t in local.items()
    }


def _logit_bias(network: nn.Module) -> str | None:
    """The key of the last bias, a domain's own where there is one."""
    last = {k.rpartition(".")[0] for k, p in place_of(network).items() if p is Place.LAST_BLOCK}
    found, inside = None, None
    for path, module in network.named_modules():
        if path not in last or path == inside:
            continue
        if isinstance(module, ResidualConv):
            found, inside = f"{path}.bias_residual", f"{path}.shared"
            if module.bias_residual is None:
                found = f"{inside}.bias"
        elif isinstance(module, nn.Conv3d | nn.ConvTranspose3d | DomainConv):
            found = f"{path}.bias"
    return found


def _site(folder: Path, site: str, model: Model) -> OldSite:
    entry = _entry(folder, site)
    parts = model.study.plan.local if entry.own is None else EVERYTHING
    local = Partition.of(model.network, parts).split(model.network.state_dict())[1]
    return OldSite(dict(local), entry.domains, entry.modalities, entry.own, entry.undrawn)


def _entry(folder: Path, site: str) -> SiteEntry:
    path = folder / "sites" / f"{site}.json"
    return parse(SiteEntry, _json(path), str(path))


def _json(path: Path) -> object:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise StoreError(f"{path}: larger than {_MAX_JSON_BYTES} bytes; copy the model again")
        value: object = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: not readable ({type(error).__name__}); copy the model again"
        ) from None
    return value
