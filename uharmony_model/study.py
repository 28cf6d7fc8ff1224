"""The study: what all places agree on. It is sent as canonical JSON and known by its SHA-256.

The same object drives the in-process federation, processes on one machine, and hospitals.
Nothing here names a folder, a machine or a case; that belongs to a site's own file. The sections
have files of their own: `task.py` and the settings of network, training, exchange and evaluation.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, field_validator, model_validator

from uharmony_model.evaluation_settings import Evaluation
from uharmony_model.exchange_settings import Codec, Federation, Publication
from uharmony_model.frozen import Frozen, parse, read_yaml
from uharmony_model.methods import EVERYTHING, METHODS, Method, Part
from uharmony_model.network_settings import Harmonization, Network, Residual
from uharmony_model.task import Name, Task
from uharmony_model.training_settings import Finale, Training
from uharmony_model.unlabelled_settings import Rule, Statistic, Unlabelled

_NEWER = ("style", "style_rounds", "align")  # keys of `unlabelled` that older studies lack
_RESIDUAL_PARTS: dict[Residual, Part] = {
    "phi": Part.PHI,
    "stem": Part.STEM_RESIDUAL,
    "depthwise": Part.DEPTHWISE_RESIDUAL,
    "head": Part.HEAD_RESIDUAL,
}


class Study(Frozen):
    """Everything a site consents to. Its digest is what it stores when it approves."""

    name: Name
    method: str = "uharmony"
    seed: NonNegativeInt = 0
    split_seed: NonNegativeInt = 0
    task: Task
    network: Network = Network()
    training: Training = Training()
    finale: Finale = Finale()
    federation: Federation = Federation()
    codec: Codec = Codec()
    evaluation: Evaluation = Evaluation()
    publication: Publication = Publication()
    unlabelled: Unlabelled = Unlabelled()

    @field_validator("method")
    @classmethod
    def _known_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"unknown method; known: {', '.join(METHODS)}")
        return name

    @model_validator(mode="after")
    def _hides_what_it_shows(self) -> Study:
        if self.training.modality_dropout and not self.task.presence:
            raise ValueError("training.modality_dropout needs task.presence: true")
        return self

    @model_validator(mode="after")
    def _statistics_take_the_mean(self) -> Study:
        plan, statistics = self.plan, Part.NORM_STATISTICS
        shared = statistics in self.parts and statistics not in plan.local
        if shared and plan.server == "adam":
            raise ValueError("fedadam would step running variances below zero; use norm: instance")
        if shared and self.federation.momentum:
            raise ValueError(
                f"federation.momentum would step the running variances that {self.method} shares "
                "below zero; use norm: instance, or a method without BatchNorm"
            )
        return self

    @model_validator(mode="after")
    def _rule_fits_the_network(self) -> Study:
        strange = self.plan.harmonized and self.harmonization.unseen_view != "plain"
        if strange and self.training.views != "plain":
            raise ValueError(
                "training.views show unknown scanners in all steps, those without residuals too; "
                "leave network.harmonization.unseen_view at plain, or training.views"
            )
        if strange and self.rule in ("ust-run", "glua"):
            raise ValueError(
                f"network.harmonization.unseen_view: {self.rule} makes its own views; leave it at "
                "plain"
            )
        if self.rule == "glua" and self.plan.backbone is not None:
            raise ValueError(
                f"{self.method} does not say where its deepest level is, as glua needs"
            )
        statistics = Part.NORM_STATISTICS
        if self.rule == "adabn" and not (statistics in self.parts and self._keeps(statistics)):
            raise ValueError(
                "adabn adapts running statistics that stay at each site; use the arm adabn, or "
                "norm: batch and a method that keeps them (fedbn, silobn)"
            )
        return self

    @model_validator(mode="after")
    def _unlabelled_cases_can_teach(self) -> Study:
        shared = self.plan.local != EVERYTHING
        queued = self.unlabelled.copy_paste and self.unlabelled.queue
        if self.rule == "ust-run" and shared and self.task.overlapping and queued:
            raise ValueError(
                "unlabelled.queue: patches of overlapping classes are not queued, and a site "
                "without labels would have nothing to paste and learn nothing; set it to false, "
                "or make the classes exclusive"
            )
        return self

    def _keeps(self, part: Part) -> bool:
        return self.plan.local == EVERYTHING or part in self.plan.local

    @model_validator(mode="after")
    def _alignment_can_be_followed(self) -> Study:
        if self.rule != "glua":
            return self
        shared = self.plan.local != EVERYTHING
        if self.style_rounds >= self.training.rounds:
            raise ValueError(
                f"unlabelled.style: codes trains its autoencoder in {self.style_rounds} of "
                f"{self.training.rounds} rounds, so that no round is left to use it; set "
                "unlabelled.style_rounds or training.rounds"
            )
        if (
            self.learns_styles
            and shared
            and (self.plan.server == "adam" or self.federation.momentum)
        ):
            raise ValueError(
                f"unlabelled.style: codes under {self.method}: momentum at the server would move "
                "the autoencoder after it came to rest; use federation.momentum: 0 and no fedadam"
            )
        return self

    @model_validator(mode="after")
    def _style_is_small(self) -> Study:
        width, patch = self.unlabelled.half_width, self.training.patch
        if width is not None and 2 * width + 1 > min(patch):
            raise ValueError(
                f"unlabelled.half_width {width} needs {2 * width + 1} bins along every edge of "
                f"training.patch {list(patch)}; take a smaller one"
            )
        return self

    @property
    def plan(self) -> Method:
        """What the study's method makes of the network and the partition."""
        return METHODS[self.method]

    def with_method(self, name: str) -> Study:
        """The same study under another method.

        What a site trains alone depends on no setting of the layer or of the exchange, so these
        go back to their defaults: variants of a study then share one local-only model.
        """
        content = {**self.model_dump(), "method": name}
        if METHODS.get(name) == METHODS["local"]:
            plain = {"proximal": Training().proximal, "head_share": Training().head_share}
            content["network"] = {**content["network"], "harmonization": Harmonization()}
            content["training"] = {**content["training"], **plain}
            own = {"server_rate": Federation().server_rate, "momentum": 0.0}
            content["federation"] = {**content["federation"], **own}
            content["unlabelled"] = Unlabelled()  # alone it learns from its labels
        return Study.model_validate(content)

    @property
    def harmonization(self) -> Harmonization:
        """The harmonisation settings under the study's method."""
        changed = {**self.network.harmonization.model_dump(), **self.plan.settings}
        return Harmonization.model_validate(changed)

    @property
    def keeps_residuals(self) -> bool:
        """Whether sites keep residuals of the harmonisation layer: what experts are made of."""
        return self.plan.keeps_residuals and bool(self.harmonization.residuals)

    @property
    def parts(self) -> frozenset[Part]:
        """What the tensors of the method's network can be."""
        plan = self.plan
        if plan.backbone == "u2net":
            return frozenset({Part.BACKBONE, Part.DOMAIN})
        style = {Part.STYLE} if self.learns_styles else set()
        plain = {Part.BACKBONE, Part.NORM_AFFINE} | style
        if not plan.harmonized:
            batch = plan.norm in ("batch", "perxan") or self.network.norm == "batch"
            return frozenset(plain | ({Part.NORM_STATISTICS} if batch else set()))
        settings = self.harmonization
        found = {Part.BACKBONE, Part.POLYNOMIAL} | style
        found |= {Part.NORM_AFFINE} if settings.layers != "all" else set()
        return frozenset(found | {_RESIDUAL_PARTS[name] for name in settings.residuals})

    @property
    def rule(self) -> Rule:
        """How cases without labels are learned from: the method's rule, or else the study's."""
        own = self.plan.unlabelled
        return self.unlabelled.rule if own is None else own

    @property
    def takes_unlabelled(self) -> bool:
        """Whether cases without a label take part: they teach, or their site receives."""
        return self.rule != "none" or self.plan.unlabelled is not None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What sites are asked to share of their domains, under their own policies.

        None is needed where all cases lie in one place, or where nothing is shared.
        """
        if self.plan.local == EVERYTHING:
            return ()
        settings = self.unlabelled
        found: tuple[Statistic, ...] = ()
        if self.rule in ("ust-run", "glua") and settings.amplitude != "off":
            found = ("codes",) if self.learns_styles else ("amplitude",)
        if self.rule == "glua" and settings.align != "off":
            found += (settings.align,)
        return found

    @property
    def warm_up(self) -> int:
        """The first rounds, in which only sites with labels count; never the last one too."""
        return min(self.unlabelled.warm_up, self.training.rounds - 1)

    @property
    def learns_styles(self) -> bool:
        """Whether styles are codes of an autoencoder that this study trains."""
        settings = self.unlabelled
        return self.rule == "glua" and settings.style == "codes" and settings.amplitude != "off"

    @property
    def style_rounds(self) -> int:
        """The first rounds, in which the style autoencoder learns; 0 without one."""
        if not self.learns_styles:
            return 0
        return self.unlabelled.style_rounds or math.ceil(self.training.rounds / 4)

    @property
    def asks(self) -> tuple[str, ...]:
        """What leaves a site as named values: metrics, `cases` as the weight, the mean `loss`.

        Where cases without labels are learned from, `taught` is the share of their voxels that
        taught something, growing with training.
        """
        weight = ("cases",) if self.federation.weighting == "cases" else ()
        taught = ("taught",) if self.rule != "none" and self.plan.local != EVERYTHING else ()
        return (*self.evaluation.metrics, *weight, "loss", *taught)

    def canonical_json(self) -> str:
        """Keys in their declared order, no spaces: equal studies give equal text.

        Sorting would hide the order of the classes, which is the order of the outputs. A study
        that asks for no publication, or has no cases without labels, says nothing of it, as before
        there was any; nor of forms of alignment, or of views of unknown scanners, that it leaves at
        their defaults.
        """
        silent: dict[str, Any] = {}
        if self.training.views == Training().views:
            silent["training"] = {"views", "view_share"}
        if self.network.harmonization.unseen_view == Harmonization().unseen_view:
            silent["network"] = {"harmonization": {"unseen_view"}}
        if self.publication == Publication():
            silent["publication"] = True
        default = Unlabelled()
        if self.unlabelled == default:
            silent["unlabelled"] = True
        else:
            same = {n for n in _NEWER if getattr(self.unlabelled, n) == getattr(default, n)}
            silent["unlabelled"] = same
        content = self.model_dump(mode="json", exclude=silent)
        return json.dumps(content, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def load_study(path: Path) -> tuple[Study, dict[str, Any]]:
    """Read study.yaml. The second value is its `simulation:` section, which no site consents to.

    Raises:
        ConfigError: the file is missing or says something that cannot be followed.
    """
    content = read_yaml(path)
    simulation = content.pop("simulation", None) or {}
    return parse(Study, content, str(path)), simulation
