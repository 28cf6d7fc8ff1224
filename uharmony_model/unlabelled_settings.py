"""How a study learns from cases without labels (UST-RUN, FixMatch and their relatives)."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from uharmony_model.frozen import Frozen

Rule = Literal["none", "mean-teacher", "fixmatch", "entropy-min", "adabn", "ust-run", "glua"]
RULES: tuple[Rule, ...] = get_args(Rule)
Statistic = Literal["amplitude", "prototypes", "codes", "discriminator"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)


class Unlabelled(Frozen):
    """The rule by which unlabelled cases are learned from, and its numbers.

    `rule` is for methods that do not bring their own (`Method.unlabelled`). `weight` is that of
    the unlabelled losses at the end of training; it rises as `exp(-5 (1 - t/T)^2)`. A pseudo-label
    counts where its probability is `threshold` or more. The teacher moves with `teacher_decay`.

    Of UST-RUN each part can be switched off: `copy_paste`, `symmetric` (symmetric guidance),
    `amplitude` (`ramp`: mixing grows with training as in the source; `full` mixes at full strength
    from the start), `queue` (reliable samples stand in for labelled ones), `hardest` (foreground
    to foreground for the hardest sample). `half_width` is that of the low-frequency box in bins
    (None: one hundredth of the patch's shortest edge, at least 1).

    Of Global-Local Union Alignment `style` says how labelled patches are shown as a target's: by
    low `amplitude`, or by `codes` of a style autoencoder that is trained in the first
    `style_rounds` rounds (None: a quarter of them) and rests then; `amplitude: off` means neither.
    `align` says what draws features together: class `prototypes`, a `discriminator` (one step of it
    a training step in one place, one a round where sites train it together), or nothing (`off`).

    Statistics that sites share are averages over at least `min_patients` patients each. In the
    first `warm_up` rounds only sites with labels count in the federation's mean.
    """

    rule: Rule = "none"
    weight: NonNegativeFloat = 1.0
    threshold: Annotated[float, Field(gt=0.5, le=1)] = 0.95
    teacher_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    copy_paste: bool = True
    symmetric: bool = True
    amplitude: Literal["ramp", "full", "off"] = "ramp"
    half_width: Annotated[int, Field(ge=1, le=4)] | None = None
    queue: bool = True
    queue_size: PositiveInt = 10
    queue_threshold: Annotated[float, Field(gt=0, le=1)] = 0.1
    hardest: bool = True
    style: Literal["amplitude", "codes"] = "amplitude"
    style_rounds: PositiveInt | None = None
    align: Literal["prototypes", "discriminator", "off"] = "prototypes"
    min_patients: Annotated[int, Field(ge=2)] = 10
    warm_up: NonNegativeInt = 2
