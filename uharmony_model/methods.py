"""The methods by name: which network, what of it stays at the site, how a round is trained.

A method is a handful of choices and nothing else; training, exchange and aggregation are the same
code for all of them. A part that is local never enters a payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal

from uharmony_model.unlabelled_settings import Rule


class Part(StrEnum):
    """What a tensor of the model is, decided by the type of the module that owns it."""

    BACKBONE = "backbone"  # convolutions, linear layers, attention
    NORM_AFFINE = "norm_affine"  # weight and bias of a plain norm layer
    NORM_STATISTICS = "norm_statistics"  # running mean, variance and their counter
    POLYNOMIAL = "polynomial"  # a_p of the harmonisation layer
    PHI = "phi"  # g, b, rho, lambda of the harmonisation layer
    STEM_RESIDUAL = "stem_residual"
    DEPTHWISE_RESIDUAL = "depthwise_residual"
    HEAD_RESIDUAL = "head_residual"
    DOMAIN = "domain"  # a domain's own tensors, with nothing shared beneath (3D U2-Net)
    STYLE = "style_autoencoder"  # learns styles beside the network; makes no logit
    INDEX = "index"  # constant integer buffers that a network computes when it is built


class Place(StrEnum):
    """Where in the network a tensor lies; for methods that keep whole blocks at the site."""

    FIRST_BLOCK = "first_block"  # before the first downsampling, or that block itself
    LAST_BLOCK = "last_block"  # the one that makes the logits


RESIDUALS = frozenset({Part.PHI, Part.STEM_RESIDUAL, Part.DEPTHWISE_RESIDUAL, Part.HEAD_RESIDUAL})
EVERYTHING: frozenset[Part | Place] = frozenset(Part)
_NORMS = frozenset({Part.NORM_AFFINE, Part.NORM_STATISTICS})

Norm = Literal["study", "batch", "harmonic", "perxan"]


@dataclass(frozen=True)
class Method:
    """`local` parts and places stay at the site.

    `norm` is the network's: the study's own choice, or one the method needs. `backbone` replaces
    the study's. `settings` replace fields of the study's harmonisation. `training` says how a
    site spends its steps: all alike, with a pull to the global weights, on the last block first
    and then on the rest, or on a model of its own beside the shared one. `server` says what
    becomes of the mean update. `pooled`: all cases in one place, which no hospital can run.
    `unlabelled` is the rule by which cases without labels are learned from; None leaves it to the
    study, which says `none` where it says nothing.
    """

    meaning: str
    norm: Norm = "study"
    local: frozenset[Part | Place] = frozenset()
    pooled: bool = False
    backbone: str | None = None
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    training: Literal["plain", "proximal", "alternating", "twin"] = "plain"
    server: Literal["mean", "adam"] = "mean"
    unlabelled: Rule | None = None

    @property
    def harmonized(self) -> bool:
        """Whether the network's norms are replaced by the harmonisation layer."""
        return self.norm == "harmonic"

    @property
    def serves_unseen(self) -> bool:
        """Whether the shared tensors alone make a model: whatever is local is a residual."""
        return self.local <= RESIDUALS

    @property
    def keeps_residuals(self) -> bool:
        """Whether a site keeps residuals of the harmonisation layer, and nothing else."""
        return self.harmonized and bool(self.local) and self.serves_unseen


_REVIN = MappingProxyType(
    {"stage2": "revin", "residuals": (), "domain_dropout": 0.0, "unseen_view": "plain"}
)

_UNLABELLED: dict[Rule, str] = {
    "mean-teacher": "Mean Teacher (Tarvainen & Valpola 2017, arXiv:1703.01780)",
    "fixmatch": "FixMatch (Sohn et al. 2020, arXiv:2001.07685)",
    "entropy-min": "entropy minimisation (Grandvalet & Bengio 2005)",
    "ust-run": "UST-RUN (after Ma et al. 2025, arXiv:2505.24567)",
    "glua": "Global-Local Union Alignment (after the abstract of Su et al. 2022, arXiv:2205.11888)",
}
_PLACES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "all cases in one place", {"local": EVERYTHING, "pooled": True}),
    ("-fed", "federated", {}),
)

METHODS: dict[str, Method] = {
    "local": Method("each site alone", local=EVERYTHING),
    "pooled": Method("all cases in one place", local=EVERYTHING, pooled=True),
    "pooled-uharmony": Method(
        "all cases in one place, harmonisation layer, a domain for each site",
        norm="harmonic",
        local=EVERYTHING,
        pooled=True,
    ),
    "fedavg": Method("everything shared (McMahan et al. 2017, arXiv:1602.05629)"),
    "fedavg-bn": Method("BatchNorm, everything shared, statistics averaged", norm="batch"),
    "fedavg-revin": Method(
        "harmonisation layer that restores each instance's own statistics, everything shared "
        "(after RevIN, Kim et al. 2022)",
        norm="harmonic",
        settings=_REVIN,
    ),
    "fedprox": Method(
        "FedAvg with a pull to the global weights (Li et al. 2020, arXiv:1812.06127)",
        training="proximal",
    ),
    "fedadam": Method(
        "FedAvg with Adam at the server (Reddi et al. 2021, arXiv:2003.00295)", server="adam"
    ),
    "fedbn": Method(
        "BatchNorm, all of it local (Li et al. 2021, arXiv:2102.07623)", norm="batch", local=_NORMS
    ),
    "fedbn-in": Method("FedBN's rule on the study's norms: weight and bias local", local=_NORMS),
    "silobn": Method(
        "BatchNorm, statistics local, weight and bias shared "
        "(Andreux et al. 2020, arXiv:2008.07424)",
        norm="batch",
        local=frozenset({Part.NORM_STATISTICS}),
    ),
    "gperxan": Method(
        "shared InstanceNorm mixed with local BatchNorm (after gPerXAN, Le et al. 2024)",
        norm="perxan",
        local=_NORMS,
    ),
    "fedper": Method(
        "last block local (Arivazhagan et al. 2019, arXiv:1912.00818)",
        local=frozenset({Place.LAST_BLOCK}),
    ),
    "fedrep": Method(
        "last block local, trained first, then the rest (Collins et al. 2021, arXiv:2102.07078)",
        local=frozenset({Place.LAST_BLOCK}),
        training="alternating",
    ),
    "lg-fedavg": Method(
        "first block local (Liang et al. 2020, arXiv:2001.01523)",
        local=frozenset({Place.FIRST_BLOCK}),
    ),
    "ditto": Method(
        "FedAvg, and beside it a model of the site's own that is pulled to it "
        "(Li et al. 2021, arXiv:2012.04221)",
        training="twin",
    ),
    "u2net": Method(
        "3D U2-Net: depthwise convolutions, norms, stem and heads of a domain local, the rest "
        "shared (after Huang et al. 2019, arXiv:1909.06012)",
        backbone="u2net",
        local=frozenset({Part.DOMAIN}),
    ),
    "u2net-pooled": Method(
        "3D U2-Net, all cases in one place (Huang et al. 2019, arXiv:1909.06012)",
        backbone="u2net",
        local=EVERYTHING,
        pooled=True,
    ),
    "uharmony": Method("harmonisation layer; the residuals stay local", "harmonic", RESIDUALS),
    "uharmony-averaged": Method(
        "as uharmony, but the residuals are shared and averaged: a control", norm="harmonic"
    ),
    "labelled-only": Method(
        "labelled cases alone, in one place", local=EVERYTHING, pooled=True, unlabelled="none"
    ),
    "labelled-only-fed": Method(
        "FedAvg of the sites with labels; the others receive", unlabelled="none"
    ),
    **{
        f"{rule}{suffix}": Method(f"{meaning}, {where}", unlabelled=rule, **settings)
        for rule, meaning in _UNLABELLED.items()
        for suffix, where, settings in _PLACES
    },
    "adabn": Method(
        "source model whose BatchNorm statistics are the target's own (Li et al. 2016, "
        "arXiv:1603.04779)",
        norm="batch",
        local=frozenset({Part.NORM_STATISTICS}),
        unlabelled="adabn",
    ),
}
