"""Steps of training on one site's cases: the one loop that rounds and what follows them share.

Every step is seeded by site, round and step, so steps can be repeated to the last bit. What is in
the network before the first step is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from uharmony_client.objective import LocalData, Objective, Supervised
from uharmony_client.step_checkpoint import UnfinishedRound
from uharmony_model.errors import TrainingError
from uharmony_model.randomness import numpy_generator
from uharmony_model.study import Study

__all__ = ["LocalData", "Pull", "Rate", "StepListener", "cosine", "run_steps"]

StepListener = Callable[[int, float], None]
Rate = Callable[[int], float]


@dataclass(frozen=True)
class Pull:
    """The gradient of `strength / 2 * ||w - anchor||^2`, over the parameters that have an anchor.

    FedProx (arXiv:1812.06127, eq. 2) pulls a site's weights to the global ones, Ditto
    (arXiv:2012.04221, eq. 3) a site's own model.
    """

    strength: float
    anchor: Mapping[str, Tensor]

    def add_to(self, network: nn.Module) -> None:
        """Add it to the gradients of a network."""
        for name, parameter in network.named_parameters():
            if name in self.anchor and parameter.grad is not None:
                away = parameter.detach() - self.anchor[name]
                parameter.grad.add_(away, alpha=self.strength)


def run_steps(
    network: nn.Module,
    optimizer: Optimizer,
    data: LocalData | Objective,
    study: Study,
    *,
    round_: int,
    count: int,
    rate: Rate,
    learns: Callable[[int], Collection[str] | None] = lambda step: None,
    pull: Pull | None = None,
    unfinished: UnfinishedRound | None = None,
    on_step: StepListener | None = None,
) -> float:
    """Train `count` steps with the draws of `round_` and give the mean loss.

    `data` is what is learned from: labelled cases as they are, or an objective. `rate` is the
    learning rate of each step, `learns` the names of the parameters that it trains (None: all).
    With an `unfinished` round steps that were kept are not trained again.

    Raises:
        TrainingError: the loss is not finite.
    """
    objective = Supervised(data, study) if isinstance(data, LocalData) else data
    done, total = 0, 0.0
    if unfinished is not None:
        done, total = unfinished.take_up()
    network.train()
    for step in range(done, count):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        learned = learns(step)
        _let_learn(network, learned)
        where = (objective.site, round_, step)
        alone = numpy_generator(study.seed, *where, "domain-dropout").random()
        # The zero of the residuals is trained through what is shared; where that rests, it rests.
        drop = learned is None and alone < study.harmonization.domain_dropout

        loss = objective.loss(network, round_, step, drop=drop)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if pull is not None:
            pull.add_to(network)
        nn.utils.clip_grad_norm_(network.parameters(), study.training.gradient_clip)
        optimizer.step()
        objective.moved(network, round_, step)

        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"site {objective.site}, round {round_}, step {step}: the loss is {value}; "
                "check the intensity policy or lower training.learning_rate"
            )
        total += value
        if unfinished is not None and step + 1 < count:
            unfinished.keep(step + 1, total)
        if on_step is not None:
            on_step(step, value)
    _let_learn(network, None)
    return total / count


def cosine(start: float, share: float) -> float:
    """The rate when `share` of all steps is done: from `start` to a hundredth of it."""
    return start * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def _let_learn(network: nn.Module, names: Collection[str] | None) -> None:
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(names is None or name in names)
