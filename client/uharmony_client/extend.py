"""A trained model with a domain more, and if asked a class or a modality: `uharmony-client extend`.

    what was trained     copied to its place, put back after every step
    what is new          the domain's own tensors, the class's rows, the modality's kernels: trained
    the old sites        compared with the model before, to the bit; else nothing is written

Which entries are new, and how they start, is `uharmony_model.extension`; labelled cases are read,
and one patient is held out, as in `few_shot`. At the old sites a new class is off (see `_off`):
nobody has shown what it looks like there. All of this is ours; that a domain of 3D U2-Net is added
with what is shared frozen is the paper's (arXiv:1909.06012).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from uharmony_client.evaluate import mean_dice, measure_volume
from uharmony_client.extend_model import (
    OldModel,
    OldSite,
    State,
    grown_site,
    merged,
    require_same_outputs,
)
from uharmony_client.extend_options import grown_study, require_channels, require_shown
from uharmony_client.few_shot import (
    STEPS,
    _common_modalities,
    _labelled,
    _without_one_patient,
)
from uharmony_client.nifti import MAX_VOXELS
from uharmony_client.optimizer import make_optimizer
from uharmony_client.serving import _refuse_model_folder
from uharmony_client.site_config import SiteConfig
from uharmony_client.training_steps import LocalData, StepListener, cosine, run_steps
from uharmony_client.volume_store import StoredVolume, VolumeStore
from uharmony_model.bundle import save_bundle
from uharmony_model.errors import ConfigError, TrainingError
from uharmony_model.exchange.partition import Partition
from uharmony_model.extension import extend_state, frozen_keys, hold_old, keep_apart, new_entries
from uharmony_model.extension_line import LINE, encode_line
from uharmony_model.frozen import parse
from uharmony_model.metrics import CaseMetrics
from uharmony_model.networks import build_network
from uharmony_model.publication import read_publication, write_publication
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study
from uharmony_model.undrawn import undrawn_names, with_undrawn

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Extension:
    """What was added, on which cases, and the Dice of each class: on the held-out cases if any.

    `compared` are the old domains whose outputs are the same to the bit.
    """

    name: str
    study: Study
    trained_on: tuple[str, ...]
    held_out: tuple[str, ...]
    kept: str
    dice: Mapping[str, float | None]
    compared: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """What is said in the end."""
        scores = ", ".join(
            f"{name} {'-' if score is None else format(score, '.3f')}"
            for name, score in self.dice.items()
        )
        on = f"the {len(self.held_out)} held out" if self.held_out else "these, none is held out"
        same = f"old outputs are the same to the bit: {', '.join(self.compared)}"
        none = "no old site is in the folder to compare; what is shared is as it was"
        return (
            f"{len(self.trained_on)} cases trained on; kept: {self.kept}; Dice on {on}: {scores}",
            same if self.compared else none,
        )


def extend(
    folder: Path,
    cases: Path,
    out: Path,
    *,
    name: str,
    device: torch.device,
    classes: Sequence[str] = (),
    modalities: Sequence[str] = (),
    annotated: Sequence[str] = (),
    channels: Sequence[str] = (),
    steps: int = STEPS,
    max_voxels: int = MAX_VOXELS,
    force: bool = False,
    say: Say = lambda line: None,
) -> Extension:
    """Extend the model in `folder` by the domain `name`, fitted to labelled `cases`, as `out`.

    `classes` and `modalities` are as in `grown_study`; `annotated` names the classes that are drawn
    in the cases (none: all), `channels` the modalities of cases that name none. An earlier `out`
    goes only with `force`.

    Raises:
        ConfigError: the model keeps nothing of a domain, or what is asked for does not fit it.
        DataError: the cases are too few, do not fit, or do not show what is new.
        TrainingError: the loss is not finite, or an old output is another; nothing is written.
        StoreError: a file is damaged, or the disk is full.
    """
    _refuse_model_folder(out, folder, force=force)
    old = OldModel.read(folder)
    old.require_new(name)
    new = grown_study(old.study, classes, modalities)
    added = tuple(n for n in new.task.classes if n not in old.study.task.classes)
    with tempfile.TemporaryDirectory(prefix="uharmony-extend-") as place:
        drawn = {"annotated": list(annotated)} if annotated else {}
        resources = {"max_voxels": max_voxels}
        content = {"name": name, "cases": cases, "store": place, "resources": resources, **drawn}
        config = parse(SiteConfig, content, "--name or --annotated")
        if annotated and (lost := [n for n in added if n not in annotated]):
            raise ConfigError(f"--annotated leaves out the new class {lost[0]}; name it too")
        flags = torch.tensor(config.annotates(new.task))
        found = _labelled(cases, name, channels)
        require_channels(found, old.study, new)
        training, held = _without_one_patient(found, new.seed, name)
        store = VolumeStore(Path(place) / "volumes")
        volumes = {case.case: store.open(case, new.task, config) for case in found}
        shown = [volumes[case.case] for case in training]
        require_shown(shown, old.study, new)
        measured = [volumes[case.case] for case in held]
        fit = _Fit(old, new, name, device, flags)
        kept, state, dice = fit.run(shown, measured, steps, _tell(steps, say))
        sites = {site: grown_site(entry, old, new) for site, entry in old.sites.items()}
        modality = _common_modalities(found, config, new.task)
        sites[name] = OldSite(fit.local(state), (name,), modality, undrawn=fit.undrawn)
        shared = {key: state[key] for key in fit.partition.shared_keys}
        trial = Path(place) / "model"
        _write(trial, old, new, shared, sites)
        compared = require_same_outputs(old, trial, new, shown[0])
        _write(out, old, new, shared, sites)
    publication = read_publication(folder)
    if publication is not None and new == old.study:
        write_publication(out, publication)
    elif publication is not None:
        say("note: what sites published is of the model as it was, and is left out of the new one")
    return Extension(
        name=name,
        study=new,
        trained_on=tuple(case.case for case in training),
        held_out=tuple(case.case for case in held),
        kept=kept,
        dice=dice,
        compared=compared,
    )


class _Fit:
    """A network with the new domain alone, in which only what is new learns."""

    def __init__(
        self, old: OldModel, new: Study, name: str, device: torch.device, annotated: Tensor
    ) -> None:
        self.study, self.name, self.device, self.annotated = new, name, device, annotated
        self.network: SegmentationNetwork = build_network(new, (name,), seed=new.seed)
        keep_apart(self.network, *old.line, old.study, new)
        self.partition = Partition.of(self.network, new.plan.local)
        base = {**old.shared, **old.bare()}
        self.start = extend_state(old.study, new, base, domains=(name,))
        self.network.load_state_dict(merged(self.partition, self.start))
        self.network.to(device)
        self.entries = new_entries(old.study, new, (), (name,))
        self.grown = new.task != old.study.task
        self.undrawn = undrawn_names(annotated, new.task) if new.plan.serves_unseen else ()

    def run(
        self,
        volumes: Sequence[StoredVolume],
        held: Sequence[StoredVolume],
        steps: int,
        on_step: StepListener,
    ) -> tuple[str, State, dict[str, float | None]]:
        """What is kept, its tensors by name, and the Dice of each class on the held-out cases.

        A domain that is worse on them than it started is not kept; what else is new has no state
        to go back to. Without held-out cases those that were trained on are measured.
        """
        before = self._measured(held)
        optimizer = make_optimizer(self.network, self.study.training)
        kept_back = hold_old(self.network, optimizer, self.entries)
        learned = frozenset(self.entries) - frozen_keys(self.entries)
        named = {k: p for k, p in self.network.named_parameters() if k in learned}
        handles = [kept_back]
        for key, parameter in named.items():
            mask = self.entries[key].to(self.device)
            # Old rows must not count in the norm that gradients are clipped by.
            handles.append(parameter.register_hook(lambda grad, mask=mask: grad * mask))
        run_steps(
            self.network,
            optimizer,
            LocalData(
                site=self.name,
                volumes=volumes,
                domains=[0] * len(volumes),
                annotated=self.annotated,
            ),
            self.study,
            round_=0,
            count=steps,
            rate=lambda step: cosine(self.study.training.learning_rate, step / steps),
            learns=lambda step: named,
            on_step=on_step,
        )
        for handle in handles:
            handle.remove()
        state = self._state()
        self._require_old_kept()
        after = self._measured(held or volumes)
        if not self.grown and held and _at_least(before, after):
            return "start", self.start, self._by_class(before)
        return "fitted", state, self._by_class(after)

    def local(self, state: State) -> State:
        """The new site's own tensors."""
        return {name: state[name] for name in self.partition.local_names}

    def _state(self) -> State:
        shared, local = self.partition.split(self.network.state_dict())
        return {k: t.detach().cpu().clone() for k, t in {**shared, **local}.items()}

    def _require_old_kept(self) -> None:
        whole = merged(self.partition, self.start)
        for key, tensor in self.network.state_dict().items():
            old = ~self.entries[key]
            if not torch.equal(tensor.cpu()[old], whole[key][old]):
                raise TrainingError(f"{key}: an old entry has moved; nothing was written")

    def _measured(self, volumes: Sequence[StoredVolume]) -> list[tuple[CaseMetrics, ...]]:
        network = with_undrawn(self.network, self.undrawn, self.study.task)
        return [
            measure_volume(
                network,
                volume,
                self.study,
                domain=0,
                device=self.device,
                annotated=self.annotated,
            )
            for volume in volumes
        ]

    def _by_class(self, rows: Sequence[tuple[CaseMetrics, ...]]) -> dict[str, float | None]:
        columns = zip(self.study.task.class_names, zip(*rows, strict=True), strict=True)
        known = {name: [m.dice for m in column if m.dice is not None] for name, column in columns}
        return {name: statistics.fmean(dice) if dice else None for name, dice in known.items()}


def _at_least(first: list[tuple[CaseMetrics, ...]], second: list[tuple[CaseMetrics, ...]]) -> bool:
    """Whether the first are as good as the second, by the mean over cases; of equals the first."""
    means = [[d for row in rows if (d := mean_dice(row)) is not None] for rows in (first, second)]
    return all(means) and statistics.fmean(means[0]) >= statistics.fmean(means[1])


def _write(
    folder: Path, old: OldModel, new: Study, shared: State, sites: Mapping[str, OldSite]
) -> None:
    line = old.line if new == old.study else (*old.line, old.study)
    save_bundle(
        folder,
        new,
        shared,
        {name: site.local for name, site in sites.items()},
        {name: site.domains for name, site in sites.items()},
        {name: site.modalities for name, site in sites.items()},
        own={name: site.own for name, site in sites.items() if site.own is not None},
        undrawn={name: site.undrawn for name, site in sites.items()},
        notes={LINE: encode_line(line)} if line else None,
    )


def _tell(steps: int, say: Say) -> StepListener:
    def tell(step: int, loss: float) -> None:
        if (step + 1) * 10 // steps > step * 10 // steps:
            say(f"extend: step {step + 1} of {steps}, loss {loss:.4f}")

    return tell
