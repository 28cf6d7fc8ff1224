"""The models that stay at a site: the federation's with the site's own part, or one of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import NonNegativeInt
from torch import Tensor, nn

from uharmony_client.personal import from_names, local_parameters, own_model
from uharmony_client.predictor import predictor, undrawn_classes
from uharmony_client.site import Site
from uharmony_client.workbench import carried_after
from uharmony_model.bundle import save_bundle
from uharmony_model.errors import ConfigError, StoreError
from uharmony_model.exchange.partition import Partition
from uharmony_model.frozen import Frozen, parse
from uharmony_model.networks import training_network
from uharmony_model.schedule import finale_round
from uharmony_model.training_settings import Candidate

_ROUND_FILE = "round.json"
_FINALE_FILE = "finale.json"
_MAX_NOTE_BYTES = 1 << 12

log = logging.getLogger(__name__)
_Note = TypeVar("_Note", bound=Frozen)


class ModelNote(Frozen):
    """The round after which a model was kept; after a finale also which candidate it is."""

    round: NonNegativeInt
    kept: Candidate | None = None


class _Finale(Frozen):
    """evaluations/finale.json, as `site_round` writes it."""

    round: NonNegativeInt
    kept: Candidate
    validation_dice: dict[Candidate, float | None]


def federated_model(site: Site) -> Path:
    """Where the model that this site has from its study is kept, with this site's entry."""
    return site.config.store / "models" / site.study.digest


def keep_federated_model(site: Site, shared: Mapping[str, Tensor], round_: int) -> Path:
    """Keep the model after a round with what the site carries, whole or not at all.

    Raises:
        StoreError: the disk is full, or the site's generation of the round is damaged.
    """
    folder = federated_model(site)
    save_site_model(folder, site, shared, carried_after(site, round_), round_)
    return folder


def keep_personal_model(site: Site, shared: Mapping[str, Tensor]) -> Path:
    """Keep what the site chose at its finale in the place of the federation's model.

    Raises:
        StoreError: as `keep_federated_model`.
    """
    folder, round_ = federated_model(site), finale_round(site.study)
    try:
        kept = _read(site.evaluations / _FINALE_FILE, _Finale).kept
    except (ConfigError, StoreError) as error:
        log.warning("what was kept is not noted beside the model: %s", error)
        kept = None
    save_site_model(folder, site, shared, carried_after(site, round_), round_, kept=kept)
    return folder


def save_site_model(
    folder: Path,
    site: Site,
    shared: Mapping[str, Tensor],
    carried: Mapping[str, Tensor],
    round_: int,
    *,
    kept: Candidate | None = None,
) -> None:
    """Write a model with this site's entry alone; `carried` is what the site has after `round_`.

    Raises:
        StoreError: the disk is full.
    """
    entry, own = site_entry(site, carried)
    save_bundle(
        folder,
        site.study,
        shared,
        {site.name: entry},
        {site.name: site.domains},
        {site.name: site.modalities},
        own={} if own is None else {site.name: own},
        undrawn={site.name: undrawn_classes(site, entry)},
        notes={_ROUND_FILE: ModelNote(round=round_, kept=kept).model_dump_json().encode()},
    )


def site_entry(site: Site, carried: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str | None]:
    """A site's tensors for a model's folder, and the method of a whole model of its own."""
    return own_model(carried, site.study.method) or (local_parameters(carried), None)


def site_network(
    site: Site, shared: Mapping[str, Tensor], carried: Mapping[str, Tensor]
) -> nn.Module:
    """The network that the site measures and predicts with, on its device."""
    entry, own = site_entry(site, carried)
    study = site.study if own is None else site.study.with_method(own)
    network = training_network(study, site.domains, seed=study.seed).to(site.device)
    if own is None:
        state = Partition.of(network, study.plan.local).merge(shared, entry)
    else:
        state = from_names(network, entry)
    network.load_state_dict(state)
    return predictor(site, network, entry, None if own is None else shared)


def model_note(folder: Path) -> ModelNote:
    """After which round a model was kept, and what a finale made of it.

    Raises:
        ConfigError: there is no such model yet.
        StoreError: its note is damaged.
    """
    path = folder / _ROUND_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no model of this study yet; it is kept after the last round")
    return _read(path, ModelNote)


def _read(path: Path, note: type[_Note]) -> _Note:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_NOTE_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not readable ({type(error).__name__}); restore it") from None
    return parse(note, content, str(path))
