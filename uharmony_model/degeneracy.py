"""Find local parameters that cannot learn: those that a later normalisation takes out again.

`IN(s * z + m) = IN(z)` for any s > 0, so a second stage that stands directly before an instance
norm is dead weight: its gradient is zero and its values do not matter. Run this check on a network
of one's own before a study is spent on it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uharmony_model.errors import NetworkError
from uharmony_model.harmonize import HarmonizedNetwork, stacked_keys
from uharmony_model.randomness import torch_generator

THRESHOLD = 1e-6

# eps alone keeps a dead scale from being exactly dead, by about eps / var; below it is the truth.
_EPS_FACTOR = 1e-6


@dataclass(frozen=True)
class Sensitivity:
    """What one local tensor is worth to the logits.

    `gradient` is the norm of its gradient over that of a shared tensor (root mean square over all
    shared tensors), for a random projection of the logits. `change` is the largest change of a
    logit when the tensor grows by 10 %, over the largest logit; None when that was not measured.
    """

    name: str
    gradient: float
    change: float | None

    @property
    def degenerate(self) -> bool:
        """Whether it is below the threshold by either measure."""
        return self.gradient < THRESHOLD or (self.change is not None and self.change < THRESHOLD)


def local_sensitivities(
    network: HarmonizedNetwork,
    image: Tensor,
    *,
    domain: int = 0,
    changed: Collection[str] | None = None,
) -> list[Sensitivity]:
    """Measure every local tensor of `domain` on `image` (B, C, D, H, W), in float64 on a copy.

    The copy's residuals are set to small random values first, so that 10 % means something.
    Measuring the change takes a forward pass a tensor; `changed` limits it to these names.
    Take an image as they are in use: on one of mean zero, lambda has nothing to restore.

    Raises:
        NetworkError: the network has no local tensors.
    """
    names = stacked_keys(network)
    if not names:
        raise NetworkError("the network has no local tensors to check; harmonise it first")
    network = _prepared(network, names)
    image = image.double()
    index = torch.full(image.shape[:1], domain, device=image.device)

    logits = network(image, index)
    direction = torch.randn(logits.shape, generator=torch_generator(0, "direction")).to(logits)
    (logits * direction).sum().backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    shared = torch.stack([g.norm() for n, g in gradients.items() if n not in names])
    typical = shared.square().mean().sqrt()

    result = []
    for name, parameter in network.named_parameters():
        if name not in names:
            continue
        gradient = gradients[name][domain].norm() / typical
        change = None
        if changed is None or name in changed:
            with torch.no_grad():
                before = parameter[domain].clone()
                parameter[domain] *= 1.1
                change = (network(image, index) - logits).abs().max() / logits.abs().max()
                parameter[domain] = before
        result.append(Sensitivity(name, gradient.item(), None if change is None else change.item()))
    return result


def _prepared(network: HarmonizedNetwork, names: Collection[str]) -> HarmonizedNetwork:
    """A float64 copy with small residuals, a negligible eps, and no dropout."""
    prepared = copy.deepcopy(network).double().eval()
    for module in prepared.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = module.eps * _EPS_FACTOR  # type: ignore[assignment, operator]
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            if name in names:
                noise = torch.randn(parameter.shape, generator=torch_generator(0, name))
                scale = 0.1 * _size_of_shared(prepared, name)
                parameter.copy_(scale * noise.to(parameter))
            parameter.grad = None
    return prepared


def _size_of_shared(network: nn.Module, name: str) -> float:
    """The typical size of what a residual is added to: 1 for phi, the kernel's for a kernel."""
    owner = network.get_submodule(name.rpartition(".")[0])
    weight = getattr(owner, "weight", None)
    return weight.std().item() if isinstance(weight, Tensor) else 1.0
