"""The study: what all places agree on. It is sent as canonical JSON and known by its SHA-256.

The same object drives the in-process federation, processes on one machine, and hospitals.
Nothing here names a folder, a machine or a case; that belongs to a site's own file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from uharmony_model.frozen import Frozen, parse, read_yaml
from uharmony_model.methods import METHODS, Method, Part

Triple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
Split = Literal["train", "validation", "test"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Residual = Literal["phi", "stem", "depthwise", "head"]
RESIDUAL_NAMES: tuple[Residual, ...] = get_args(Residual)
Metric = Literal["dice", "surface_dice", "hd95_mm", "lesion_recall", "fp_per_case"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Candidate = Literal["federated", "own", "whole", "between", "local"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)
Publishable = Literal["experts", "prototypes"]
PUBLISHABLE: tuple[Publishable, ...] = get_args(Publishable)


_RESIDUAL_PARTS: dict[Residual, Part] = {
    "phi": Part.PHI,
    "stem": Part.STEM_RESIDUAL,
    "depthwise": Part.DEPTHWISE_RESIDUAL,
    "head": Part.HEAD_RESIDUAL,
}


class Window(Frozen):
    """CT: clip to [low, high] HU and scale to [-1, 1]."""

    policy: Literal["window"]
    low: float = -160.0
    high: float = 240.0

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        return self


class ZScore(Frozen):
    """MR: subtract the mean, divide by the deviation, over all or over the non-zero voxels."""

    policy: Literal["zscore"]
    nonzero: bool = False


class Percentile(Frozen):
    """MR: clip to two percentiles of the volume and scale to [-1, 1]."""

    policy: Literal["percentile"]
    low: Annotated[float, Field(ge=0, lt=50)] = 0.5
    high: Annotated[float, Field(gt=50, le=100)] = 99.5


class Suv(Frozen):
    """PET: clip to [0, high] SUV and scale to [-1, 1]."""

    policy: Literal["suv"]
    high: PositiveFloat = 20.0


Intensity = Annotated[Window | ZScore | Percentile | Suv, Field(discriminator="policy")]


class Task(Frozen):
    """What is segmented, in which images.

    `classes` names the foreground classes and the label values each consists of. Exclusive
    classes (softmax) may not share a value; overlapping ones (sigmoid) may. Value 0 is background.
    `intensity` maps every modality that may occur to its policy. With `presence` each of them is
    one channel, in the order of their names, and a site may lack some (`uharmony_model.presence`).
    """

    classes: dict[Name, tuple[Annotated[int, Field(ge=1, le=255)], ...]]
    overlapping: bool = False
    channels: PositiveInt = 1
    presence: bool = False
    spacing_mm: Triple | None = None
    intensity: dict[Name, Intensity]

    @field_validator("classes", mode="before")
    @classmethod
    def _single_values(cls, classes: Any) -> Any:
        if isinstance(classes, dict):
            return {k: (v,) if isinstance(v, int) else v for k, v in classes.items()}
        return classes

    @field_validator("intensity")
    @classmethod
    def _ordered(cls, intensity: dict[str, Intensity]) -> dict[str, Intensity]:
        return dict(sorted(intensity.items()))

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if not self.classes:
            raise ValueError("at least one class is needed")
        if not self.intensity:
            raise ValueError("at least one modality is needed")
        values = [value for group in self.classes.values() for value in group]
        if not self.overlapping and len(set(values)) != len(values):
            raise ValueError("exclusive classes share a label value; set overlapping: true")
        if self.presence and self.channels != len(self.intensity):
            raise ValueError(
                f"with presence each modality is one channel: set channels: {len(self.intensity)}"
            )
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """The foreground classes in their order, the order of the network's outputs."""
        return tuple(self.classes)

    @property
    def outputs(self) -> int:
        """Channels of the logits: the classes, and background when they are exclusive."""
        return len(self.classes) + (0 if self.overlapping else 1)


class Harmonization(Frozen):
    """The harmonisation layer and the local residuals (see `uharmony_model.harmonize`).

    `layers` says which norms become harmonisation layers: all, those of the encoder or of the
    decoder, or the first n; the others stay as the backbone has them. `residuals` is the capacity
    of a domain: phi in every harmonisation layer, kernels of the stem, depthwise kernels in the
    first stages, the head.
    """

    order: Annotated[int, Field(ge=1, le=3)] = 1
    stage2: Literal["free", "affine", "revin", "off"] = "free"
    layers: Literal["all", "encoder", "decoder"] | PositiveInt = "all"
    residuals: tuple[Residual, ...] = ("phi", "stem", "head")
    domain_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    compiled: bool = False

    @field_validator("residuals")
    @classmethod
    def _in_one_order(cls, names: tuple[Residual, ...]) -> tuple[Residual, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a residual is named twice")
        return tuple(name for name in RESIDUAL_NAMES if name in names)  # one order, one digest

    @property
    def restoration(self) -> Literal["free", "affine", "revin", "restore", "off"]:
        """The second stage as it is built: without phi only RevIN's restores anything."""
        if "phi" in self.residuals:
            return self.stage2
        return "restore" if self.stage2 == "revin" else "off"


class Network(Frozen):
    """A MONAI backbone: `features` are the channels of its levels, finest first.

    `norm` is what methods that do not harmonise have; some bring their own.
    """

    name: Literal["unet", "dynunet", "segresnet", "swinunetr"] = "unet"
    features: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=7)] = (16, 32, 64)
    residual_units: NonNegativeInt = 1
    norm: Literal["instance", "batch"] = "instance"
    harmonization: Harmonization = Harmonization()


class Training(Frozen):
    """One site's round, and how many rounds there are.

    `proximal` is the weight of the pull of methods that have one, `head_share` the share of a
    round's steps that those with a local last block spend on it alone. `modality_dropout` is the
    chance of each channel of a sample to be hidden; at least one stays.
    """

    rounds: PositiveInt = 10
    local_steps: PositiveInt = 20
    batch_size: PositiveInt = 2
    patch: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 32, 32)
    foreground: Annotated[float, Field(ge=0, le=1)] = 0.5
    augment: bool = True
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    weight_decay: NonNegativeFloat = 1e-4
    residual_decay: NonNegativeFloat = 1e-3
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_clip: PositiveFloat = 12.0
    keep_optimizer: bool = True
    proximal: NonNegativeFloat = 0.01
    head_share: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Finale(Frozen):
    """What a site does at home after the last round; 0 steps: nothing.

    It trains `steps` more on its own cases from the federation's weights, at `rate` times the
    learning rate, falling to a hundredth of that. Then it keeps, by its own validation split, the
    best of the `candidates`: the federated model, the same with its own part trained further
    (`own`), with everything trained further (`whole`), half-way between (`between`), and the model
    that it trained alone with as many steps (`local`).
    """

    steps: NonNegativeInt = 0
    rate: Annotated[float, Field(gt=0, le=1)] = 0.3
    candidates: tuple[Candidate, ...] = CANDIDATES

    @field_validator("candidates")
    @classmethod
    def _some_each_once(cls, names: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one candidate, and each once")
        return tuple(name for name in CANDIDATES if name in names)  # one order, one digest


class Federation(Frozen):
    """When a round counts, how updates are weighed, and the server's own steps.

    `server_rate` is fedadam's; `momentum` is carried by the server of all other methods.
    """

    weighting: Literal["cases", "equal"] = "cases"
    min_sites: PositiveInt = 1
    min_cases: PositiveInt = 1
    norm_bound: PositiveFloat = 20.0
    max_cases: PositiveInt = 100_000
    server_rate: PositiveFloat = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Codec(Frozen):
    """How weights travel. Lossy codecs are applied in-process too, so all places agree."""

    up: Literal["fp32", "bf16"] = "fp32"
    down: Literal["fp32", "bf16"] = "fp32"


class Evaluation(Frozen):
    """Splits by patient, and what is measured when; `metrics` are the means a site is asked for.

    With `folds` the test split is fold number `fold` of so many, in the place of `test`: over all
    of them every patient is tested once.
    """

    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.3
    folds: Annotated[int, Field(ge=2, le=100)] | None = None
    fold: NonNegativeInt = 0
    every: NonNegativeInt = 5
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    surface_tolerance_mm: PositiveFloat = 2.0
    bootstrap: PositiveInt = 1000
    metrics: tuple[Metric, ...] = METRICS

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if len(set(metrics)) != len(metrics):
            raise ValueError("a metric is named twice")
        return tuple(name for name in METRICS if name in metrics)  # one order, one digest

    @model_validator(mode="after")
    def _leaves_training(self) -> Evaluation:
        if self.validation + self.test_share >= 1:
            raise ValueError("validation + test must be below 1; nothing is left to train on")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"fold is {self.fold}, expected a number below folds ({self.folds})")
        return self

    @property
    def test_share(self) -> float:
        """The share of a site's patients that is tested."""
        return self.test if self.folds is None else 1 / self.folds


class Publication(Frozen):
    """What sites are asked to publish, once, at the end; a site does so only if it opts in too.

    `experts` are the residuals of each domain, `prototypes` its mean descriptor, made
    (epsilon, delta)-private by noise. Neither is made of fewer than `min_patients` training
    patients of a domain. A prototype has so many `coordinates`, in a frame of which `center` and
    `scale` are one number, or one for each number of a descriptor (see
    `uharmony_model.prototypes`). They come from public or phantom volumes: taken from patients,
    they would tell of them without any noise.
    """

    experts: bool = False
    prototypes: bool = False
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    min_patients: Annotated[int, Field(ge=10)] = 10
    coordinates: Annotated[int, Field(ge=1, le=16)] = 8
    center: Annotated[tuple[float, ...], Field(min_length=1, max_length=4096)] | None = None
    scale: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, max_length=4096)] | None = None

    @model_validator(mode="after")
    def _releasable(self) -> Publication:
        if self.prototypes and (self.center is None or self.scale is None):
            raise ValueError(
                "prototypes need center and scale of the descriptors, from public or phantom "
                "volumes; taken from patients they would tell of them"
            )
        if self.delta * self.min_patients >= 1:
            raise ValueError(f"delta must be below one in min_patients, 1/{self.min_patients}")
        return self

    @property
    def asked(self) -> tuple[Publishable, ...]:
        """What is asked for."""
        wanted: dict[Publishable, bool] = {
            "experts": self.experts,
            "prototypes": self.prototypes,
        }
        return tuple(name for name, asked in wanted.items() if asked)


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
        if self.plan.server == "adam" and self.network.norm == "batch":
            raise ValueError("fedadam would step running variances below zero; use norm: instance")
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
        return Study.model_validate(content)

    @property
    def harmonization(self) -> Harmonization:
        """The harmonisation settings under the study's method."""
        changed = {**self.network.harmonization.model_dump(), **self.plan.settings}
        return Harmonization.model_validate(changed)

    @property
    def parts(self) -> frozenset[Part]:
        """What the tensors of the method's network can be."""
        plan = self.plan
        if plan.backbone == "u2net":
            return frozenset({Part.BACKBONE, Part.DOMAIN})
        plain = {Part.BACKBONE, Part.NORM_AFFINE}
        if not plan.harmonized:
            batch = plan.norm in ("batch", "perxan") or self.network.norm == "batch"
            return frozenset(plain | ({Part.NORM_STATISTICS} if batch else set()))
        settings = self.harmonization
        found = {Part.BACKBONE, Part.POLYNOMIAL}
        found |= {Part.NORM_AFFINE} if settings.layers != "all" else set()
        return frozenset(found | {_RESIDUAL_PARTS[name] for name in settings.residuals})

    @property
    def asks(self) -> tuple[str, ...]:
        """What leaves a site as named values: metrics, `cases` as the weight, the mean `loss`."""
        weight = ("cases",) if self.federation.weighting == "cases" else ()
        return (*self.evaluation.metrics, *weight, "loss")

    def canonical_json(self) -> str:
        """Keys in their declared order, no spaces: equal studies give equal text.

        Sorting would hide the order of the classes, which is the order of the outputs. A study
        that asks for no publication says nothing of it, as before there was any.
        """
        silent = {"publication"} if self.publication == Publication() else None
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
