"""The model of one call of `uharmony-predict`: a site's, one that chooses, or one fitted first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uharmony_client.domain_choice import AUTO, Chosen, DomainChooser
from uharmony_client.few_shot import STEPS, FewShot, fit_domain, save_fitted
from uharmony_client.nifti import MAX_VOXELS
from uharmony_client.site_config import SiteConfig
from uharmony_model.bundle import Model, load_bundle
from uharmony_model.errors import ConfigError
from uharmony_model.frozen import parse
from uharmony_model.publication import read_publication
from uharmony_model.test_time import MixtureSearch


@dataclass(frozen=True, eq=False)
class Serving:
    """A model ready to predict: with a `chooser` each volume gets a domain of its own.

    `publication` is the digest of what the chooser chooses from.
    """

    model: Model
    site: str | None = None
    domain: str | None = None
    chooser: DomainChooser | None = None
    fitted: FewShot | None = None
    publication: str | None = None

    def choose(self, image: Tensor, name: str, search: MixtureSearch | None) -> Chosen:
        """How a volume (C, D, H, W) is served."""
        if self.chooser is not None:
            return self.chooser.choose(image, search=search, volume=name)
        return Chosen(adaptation="none" if self.fitted is None else "few-shot")

    @property
    def facts(self) -> dict[str, Any]:
        """What is the same for all volumes, for their JSON."""
        task = self.model.study.task
        return {
            "site": self.site,
            "domain": self.domain,
            "model": self.model.digest,
            "publication": self.publication,
            "study": self.model.study.digest,
            "classes": [{"name": n, "values": list(v)} for n, v in task.classes.items()],
            "overlapping": task.overlapping,
            "undrawn": list(self.model.undrawn),
            "few_shot": None if self.fitted is None else self.fitted.facts,
        }


def open_serving(
    folder: Path,
    site: str | None,
    domain: str | None,
    *,
    strict: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Serving:
    """The model for a site's domain, with all residuals zero, or for `--domain auto`.

    `say` is told once what cannot be done with this model.

    Raises:
        ConfigError: there is no such model, site or domain, or `strict` cannot be kept.
        StoreError: a file is damaged.
        PartitionError: tensors are not those of the study's network.
    """
    loaded = load_bundle(folder, site)
    if site is not None or domain != AUTO:
        return Serving(loaded, site, choose_domain(loaded, domain))
    published = read_publication(folder)
    chooser = DomainChooser.of(loaded, published)
    if strict and chooser.limit is None:
        raise ConfigError(
            f"{folder}: no limit of abstention was published with this model, so it cannot "
            "abstain; leave --strict out"
        )
    if chooser.notice is not None:
        say(f"note: {chooser.notice}")
    digest = None if published is None else published.digest
    return Serving(chooser.model, chooser=chooser, publication=digest)


def fit_serving(
    folder: Path,
    cases: Path,
    save_model: Path | None = None,
    *,
    name: str,
    device: torch.device,
    steps: int = STEPS,
    modalities: Sequence[str] = (),
    annotated: Sequence[str] = (),
    max_voxels: int = MAX_VOXELS,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Serving:
    """The model with a site of its own, fitted to a few labelled `cases` (see `few_shot`).

    `annotated` names the classes that are drawn in the cases, none means all of them. With
    `save_model` the model is kept there; an earlier one goes only with `force`.

    Raises:
        ConfigError: the model has no residuals or no such class, or `save_model` cannot be used.
        DataError: the cases are too few or do not fit the study.
        StoreError: a file is damaged, or the disk is full.
    """
    _refuse_model_folder(save_model, folder, force=force)
    chooser = DomainChooser.of(load_bundle(folder, None), read_publication(folder))
    chooser.model.network.to(device)
    like = None
    if annotated:
        drawn = {"name": name, "cases": cases, "store": cases, "annotated": list(annotated)}
        like = parse(SiteConfig, drawn, "--annotated")

    def tell(step: int, loss: float) -> None:
        if (step + 1) * 10 // steps > step * 10 // steps:
            say(f"few-shot: step {step + 1} of {steps}, loss {loss:.4f}")

    fitted = fit_domain(
        chooser,
        cases,
        name=name,
        device=device,
        steps=steps,
        modalities=modalities,
        max_voxels=max_voxels,
        on_step=tell,
        like=like,
    )
    say(fitted.summary)
    # Loaded again even where it is not kept, so that its digest is the one of a later --site.
    with tempfile.TemporaryDirectory(prefix="uharmony-few-shot-") as temporary:
        made = save_model or Path(temporary) / "model"
        save_fitted(made, chooser, fitted)
        if save_model is not None:
            say(f"few-shot: {save_model} has it; use --site {name} with it")
        return Serving(load_bundle(made, name), name, name, fitted=fitted)


def choose_domain(model: Model, name: str | None) -> str | None:
    """The domain to predict for; None where no site was chosen.

    Raises:
        ConfigError: the site has no such domain, or several and none was chosen.
    """
    if name is not None and name not in model.domains:
        known = ", ".join(model.domains) or f"none without --site, which wants a site, or {AUTO}"
        raise ConfigError(f"no domain {name!r:.80}; there are: {known}")
    if name is None and len(model.domains) > 1:
        raise ConfigError(
            f"the site has the domains {', '.join(model.domains)}; choose one with --domain"
        )
    return name or (model.domains[0] if model.domains else None)


def refuse_conflicts(
    site: str | None,
    domain: str | None,
    few_shot: Path | None,
    save_model: Path | None,
    *,
    test_time: bool,
    strict: bool,
    annotated: str | None = None,
) -> None:
    """Refuse options that say two things.

    Raises:
        ConfigError: they do.
    """
    auto = site is None and domain == AUTO and few_shot is None
    if few_shot is not None and (site is not None or domain is not None):
        raise ConfigError("--few-shot makes a site and a domain; leave --site and --domain out")
    if save_model is not None and few_shot is None:
        raise ConfigError("--save-model keeps what --few-shot makes; give --few-shot DIR too")
    if annotated is not None and few_shot is None:
        raise ConfigError("--annotated says what --few-shot learns from; give --few-shot DIR too")
    if test_time and not auto:
        raise ConfigError("--test-time belongs to --domain auto, without --site and --few-shot")
    if strict and not auto:
        raise ConfigError("--strict belongs to --domain auto, without --site and --few-shot")


def _refuse_model_folder(save_model: Path | None, model: Path, *, force: bool) -> None:
    if save_model is None or not save_model.exists():
        return
    if save_model.resolve() == model.resolve():
        raise ConfigError(f"{save_model}: is the model itself; give another folder")
    if not force:
        raise ConfigError(f"{save_model}: is there already; use --force to replace it")
    if not (save_model / "study.json").is_file():
        raise ConfigError(f"{save_model}: is no model's folder and is not replaced; give another")
