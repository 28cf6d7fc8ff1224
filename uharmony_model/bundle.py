"""The model that is handed out: the study, the shared weights, and each site's own parameters.

    model/study.json                  the study, canonical
          shared.safetensors          tensors by state-dict key
          sites/<site>.safetensors    local tensors by key, or by KEY@DOMAIN
          sites/<site>.json           {"domains": [...], "modalities": [...], ...}: `SiteEntry`
          experts/  prototypes.json   what sites published, where they did (`publication`)

A coordinator hands out the folder without entries in `sites/`; a hospital keeps one with its own
entry only. Other files in the folder are for readers and do not count in its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import safetensors.torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from uharmony_model.atomic import (
    make_directory,
    remove_directory,
    replace_directory,
    temporary_directory,
    write_atomic,
)
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.extension_line import keep_line_apart
from uharmony_model.frozen import Frozen, parse
from uharmony_model.methods import EVERYTHING, METHODS
from uharmony_model.networks import build_network, without_style
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study
from uharmony_model.task import Name
from uharmony_model.undrawn import with_undrawn

_MAX_JSON_BYTES = 1 << 20
_PLACEHOLDER = "unseen"


class SiteEntry(Frozen):
    """sites/<site>.json: the site's domains in the order of its case table, its modalities.

    `own`: its tensors are a whole model of the site's own, of the network that this method has.
    `undrawn`: classes that the site does not draw and the shared tensors say (see `undrawn`).
    """

    domains: Annotated[tuple[Name, ...], Field(min_length=1)]
    modalities: tuple[str, ...] = ()
    own: str | None = None
    undrawn: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model ready to predict with; `domains` is empty where no site was chosen.

    `network` has the site's own parameters. Of the classes in `undrawn` they know nothing: there
    the shared model has the word, which is `network` without residuals, or `shared` beside a whole
    model of the site's own. `digest` is the SHA-256 of the files that were used.
    """

    network: nn.Module
    study: Study
    domains: tuple[str, ...]
    modalities: tuple[str, ...]
    digest: str
    undrawn: tuple[str, ...] = ()
    shared: nn.Module | None = None

    @property
    def predictor(self) -> nn.Module:
        """What to predict with."""
        return with_undrawn(self.network, self.undrawn, self.study.task, self.shared)


def save_bundle(
    folder: Path,
    study: Study,
    shared: Mapping[str, Tensor],
    local: Mapping[str, Mapping[str, Tensor]],
    domains: Mapping[str, Sequence[str]],
    modalities: Mapping[str, Sequence[str]] | None = None,
    own: Mapping[str, str] | None = None,
    undrawn: Mapping[str, Sequence[str]] | None = None,
    notes: Mapping[str, bytes] | None = None,
) -> None:
    """Write the folder, whole or not at all; `local`, `domains` and `modalities` are by site.

    `own` is the method of those whose tensors are a whole model of their own, `undrawn` the classes
    that the shared tensors say at a site, see `SiteEntry`; `notes` are further
    files beside study.json, by name. A style autoencoder is left out: it predicts nothing, and a
    decoder of images is nothing to hand out.

    Raises:
        StoreError: the folder cannot be written.
    """
    make_directory(folder.parent)
    temporary = temporary_directory(folder)
    try:
        write_atomic(temporary / "study.json", study.canonical_json().encode())
        write_atomic(temporary / "shared.safetensors", _tensors(without_style(shared)))
        (temporary / "sites").mkdir(mode=0o700)
        for site, tensors in local.items():
            entry = SiteEntry(
                domains=tuple(domains[site]),
                modalities=tuple((modalities or {}).get(site, ())),
                own=(own or {}).get(site),
                undrawn=tuple((undrawn or {}).get(site, ())),
            )
            write_atomic(temporary / "sites" / f"{site}.json", entry.model_dump_json().encode())
            path = temporary / "sites" / f"{site}.safetensors"
            write_atomic(path, _tensors(without_style(tensors)))
        for name, content in (notes or {}).items():
            write_atomic(temporary / name, content)
    except BaseException:
        remove_directory(temporary)
        raise
    replace_directory(temporary, folder)


def load_bundle(folder: Path, site: str | None) -> Model:
    """Build the network with the site's own parameters, or with all residuals zero for None.

    Raises:
        ConfigError: there is no such model or site, or the method needs a site.
        StoreError: a file is damaged.
        PartitionError: the tensors are not those of the study's network.
    """
    if not (folder / "study.json").is_file():
        raise ConfigError(f"{folder}: no study.json in it; give the folder of a model")
    digest = hashlib.sha256()
    study = parse(Study, _read_json(folder / "study.json", digest), str(folder / "study.json"))
    shared = _read_tensors(folder / "shared.safetensors", digest)
    entry, plain = None, None
    if site is None:
        _require_no_site_needed(folder, study)
        network = shared_network(study, shared)
        keep_line_apart(network, folder, study)
    else:
        if site not in known_sites(folder):
            raise ConfigError(
                f"{folder}: no site {site!r:.80}; it has "
                f"{', '.join(known_sites(folder)) or 'none'}. Without --site all residuals are zero"
            )
        path = folder / "sites" / f"{site}.json"
        entry = parse(SiteEntry, _read_json(path, digest), str(path))
        local = _read_tensors(path.with_suffix(".safetensors"), digest)
        made_by = study if entry.own is None else _with_method(study, entry.own, path)
        network = build_network(made_by, entry.domains, seed=study.seed)
        parts = study.plan.local if entry.own is None else EVERYTHING
        partition = Partition.of(network, parts)
        merged = partition.merge(shared if entry.own is None else {}, local)
        network.load_state_dict(merged, strict=True)
        keep_line_apart(network, folder, made_by)
        if entry.undrawn:
            _require_known(entry.undrawn, study, path)
        if entry.undrawn and entry.own is not None:
            plain = shared_network(study, shared).eval()
            keep_line_apart(plain, folder, study)
    return Model(
        network=network.eval(),
        study=study,
        domains=entry.domains if entry else (),
        modalities=entry.modalities if entry else (),
        digest=digest.hexdigest(),
        undrawn=entry.undrawn if entry else (),
        shared=plain,
    )


def shared_network(study: Study, shared: Mapping[str, Tensor]) -> SegmentationNetwork:
    """The network of the shared tensors alone, with all residuals zero.

    Raises:
        PartitionError: the tensors are not those of the study's network.
    """
    network = build_network(study, (_PLACEHOLDER,), seed=study.seed)
    partition = Partition.of(network, study.plan.local)
    # A fresh network's residuals are zero, and a pass without a domain does not use them.
    local = partition.split(network.state_dict())[1]
    network.load_state_dict(partition.merge(shared, local), strict=True)
    return network


def known_sites(folder: Path) -> tuple[str, ...]:
    """The sites whose own parameters are in the folder, sorted."""
    return tuple(sorted(path.stem for path in (folder / "sites").glob("*.json")))


def _require_known(undrawn: Sequence[str], study: Study, path: Path) -> None:
    unknown = [name for name in undrawn if name not in study.task.classes]
    if unknown or not study.plan.serves_unseen:
        wrong = f"no classes {', '.join(unknown)}" if unknown else f"method {study.method}"
        raise StoreError(
            f"{path}: undrawn names {', '.join(undrawn):.200}, which the shared model cannot say: "
            f"the study has {wrong}; copy the model again"
        )


def _with_method(study: Study, method: str, path: Path) -> Study:
    if method not in METHODS:
        raise ConfigError(f"{path}: unknown method {method!r:.80}; ask for the model again")
    return study.with_method(method)


def _require_no_site_needed(folder: Path, study: Study) -> None:
    needed = frozenset() if study.plan.serves_unseen else study.plan.local
    if needed:
        raise ConfigError(
            f"{folder}: method {study.method} keeps {', '.join(sorted(needed))} at the sites, so "
            f"a site is needed; choose --site from {', '.join(known_sites(folder)) or 'none here'}"
        )


def _tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(
        {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    )


def _read_tensors(path: Path, digest: hashlib._Hash) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(
            f"{path}: not readable ({type(error).__name__}); copy the model again"
        ) from None
    digest.update(hashlib.sha256(content).digest())
    return tensors


def _read_json(path: Path, digest: hashlib._Hash) -> object:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise StoreError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
        content = path.read_bytes()
        value: object = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{path}: not readable ({type(error).__name__}); copy the model again"
        ) from None
    digest.update(hashlib.sha256(content).digest())
    return value
