"""Which domain a volume of no known site gets: `uharmony-predict --domain auto`.

    U0   all residuals zero               a volume like none of the domains, or no publication
    U1   w = gate(descriptor)             mixes the published experts, in one pass
    U2   w moved by entropy               optional, guarded (`uharmony_model.test_time`)
    U4   distance beyond the limit        the model says that it does not know

U3, a few labelled cases, is `few_shot`. The steps and their order are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from uharmony_model.abstention import AbstentionLimit
from uharmony_model.bundle import Model
from uharmony_model.descriptor import describe
from uharmony_model.errors import StoreError, UHarmonyError
from uharmony_model.exchange.partition import Partition
from uharmony_model.experts import Expert, expert_network
from uharmony_model.gate import Choice, Gate
from uharmony_model.harmonize import HarmonizedNetwork
from uharmony_model.prototypes import PublicFrame
from uharmony_model.publication import Publication
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.test_time import MixtureSearch, Outcome, search_mixture

AUTO = "auto"
SHARED = "shared"
"""The place in a mixture of prototypes whose site published no expert: residuals of zero. No expert
is named so, since the names of experts have a dot."""

Adaptation = Literal["gate", "test-time", "few-shot", "none"]


class AbstainedError(UHarmonyError):
    """A volume is unlike all that the model has learned from, and `--strict` wants no result."""

    exit_code = 9


@dataclass(frozen=True, eq=False)
class Chosen:
    """How one volume is served.

    `weights (K,)` mix the domains of the chooser's network; None sets all residuals to zero.
    Without prototypes there is no `gate`, and without a `limit` no abstention.
    """

    weights: Tensor | None = None
    adaptation: Adaptation = "none"
    gate: Choice | None = None
    limit: AbstentionLimit | None = None
    mixture: Mapping[str, float] | None = None
    search: Outcome | None = None

    @property
    def abstained(self) -> bool:
        """Whether the nearest prototype is farther than the limit."""
        if self.gate is None or self.limit is None:
            return False
        return self.limit.abstains(self.gate.distance)

    @property
    def familiar(self) -> bool | None:
        """Whether it is like a known domain's, so that experts serve it; None: not known."""
        if self.gate is None or self.limit is None or self.limit.familiar is None:
            return None
        return self.limit.knows(self.gate.distance)

    @property
    def facts(self) -> dict[str, Any]:
        """The same for the JSON beside a segmentation; null is what cannot be said."""
        facts: dict[str, Any] = dict.fromkeys(
            ("gate", "distances", "nearest", "distance", "mixture", "test_time")
        )
        facts |= {"adaptation": self.adaptation, "abstained": self.abstained}
        facts["familiar"] = self.familiar
        facts |= {
            name: None if self.limit is None else getattr(self.limit, name)
            for name in ("limit", "margin", "false_rate")
        }
        if self.gate is not None:
            facts["gate"] = _named(self.gate.domains, self.gate.weights)
            facts["distances"] = _named(self.gate.domains, self.gate.distances)
            facts |= {"nearest": self.gate.nearest, "distance": self.gate.distance}
        if self.mixture is not None:
            facts["mixture"] = dict(self.mixture)
        if self.search is not None:
            facts["test_time"] = {
                "verdict": self.search.verdict,
                "entropy": list(self.search.entropy),
                "voxels": [list(side) for side in self.search.voxels],
            }
        return facts


@dataclass(frozen=True, eq=False)
class DomainChooser:
    """A model with the published experts as its domains, and the gate over the prototypes.

    `notice` says what cannot be done with this model; None where all can.
    """

    model: Model
    experts: tuple[Expert, ...] = ()
    gate: Gate | None = None
    frame: PublicFrame | None = None
    limit: AbstentionLimit | None = None
    notice: str | None = None

    @classmethod
    def of(cls, model: Model, publication: Publication | None) -> DomainChooser:
        """For a model that was loaded without a site.

        Raises:
            ConfigError: the model's method has no experts, or the prototypes do not fit each other.
            PartitionError: the experts are not of this model's network.
        """
        if publication is None or publication.prototypes is None:
            what = "nothing" if publication is None else "no prototypes"
            return cls(
                model,
                notice=f"no choice of a domain: with this model {what} was published; all "
                "residuals are zero, and how far a volume is from the known domains is not known",
            )
        published = publication.prototypes
        gate = Gate.of(published.prototypes)
        experts = tuple(e for e in publication.all_experts if e.name in gate.domains)
        notice = None
        if published.abstention is None:
            notice = "no limit of abstention was published with this model: it never abstains"
        if not experts:
            nothing_to_mix = "no expert was published with this model: all residuals are zero"
            notice = nothing_to_mix if notice is None else f"{nothing_to_mix}; {notice}"
        else:
            if len(experts) < len(gate.domains):
                nothing = {k: torch.zeros_like(t) for k, t in experts[0].residuals.items()}
                experts = (*experts, Expert(SHARED, nothing))
            partition = Partition.of(model.network, model.study.plan.local)
            shared = partition.split(model.network.state_dict())[0]
            network = expert_network(model.study, shared, experts)
            model = dataclasses.replace(model, network=network, domains=network.domains)
        return cls(
            model, experts, gate, published.frame.public, published.abstention, notice=notice
        )

    def describe(self, image: Tensor) -> NDArray[np.float64]:
        """The descriptor of `image (C, D, H, W)` in the prototypes' frame, (d,).

        Raises:
            StoreError: the prototypes are of another network.
        """
        network, frame = self.model.network, self.frame
        assert frame is not None  # noqa: S101 - asked only where there is a gate
        assert isinstance(network, SegmentationNetwork)  # noqa: S101 - as build_network made it
        u = describe(network, image, window=self.model.study.training.patch)
        if u.shape != frame.center.shape:
            raise StoreError(
                f"the model's prototypes are of descriptors of {len(frame.center)} numbers, this "
                f"network gives {len(u)}; ask for the model again"
            )
        return frame.rows(u)

    def choose(
        self, image: Tensor, *, search: MixtureSearch | None = None, volume: str = ""
    ) -> Chosen:
        """Choose for one normalised `image (C, D, H, W)`; its name seeds the search.

        Raises:
            DataError: the image has voxels that are not finite.
            StoreError: the prototypes are of another network.
        """
        if self.gate is None:
            return Chosen()
        choice = self.gate.choose(self.describe(image))
        unserved = Chosen(gate=choice, limit=self.limit)
        if not self.experts or unserved.familiar is False:
            return unserved
        weights, outcome = self.mixture(choice), None
        network, study = self.model.network, self.model.study
        if search is not None and len(weights) > 1:
            assert isinstance(network, HarmonizedNetwork)  # noqa: S101 - as it has experts
            outcome = search_mixture(
                network,
                image,
                weights,
                patch=study.training.patch,
                overlapping=study.task.overlapping,
                settings=search,
                seed=study.seed,
                volume=volume,
            )
            weights = outcome.weights
        moved = outcome is not None and outcome.verdict == "taken"
        return Chosen(
            weights=torch.tensor(weights, dtype=torch.float32),
            adaptation="test-time" if moved else "gate",
            gate=choice,
            limit=self.limit,
            mixture=_named([expert.name for expert in self.experts], weights),
            search=outcome,
        )

    def mixture(self, choice: Choice) -> NDArray[np.float64]:
        """The gate's weights by expert, (K,): those of prototypes without one go to `SHARED`."""
        by_name = dict(zip(choice.domains, choice.weights.tolist(), strict=True))
        weights = [by_name.pop(expert.name, 0.0) for expert in self.experts]
        if self.experts[-1].name == SHARED:
            weights[-1] = sum(by_name.values())
        return np.array(weights, np.float64)


def _named(names: Sequence[str], numbers: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}
