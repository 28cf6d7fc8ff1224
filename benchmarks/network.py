"""One training step of a whole network, harmonised against the same with InstanceNorm3d."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.rows import Row, at_most, interleaved
from uharmony_model.losses import segmentation_loss
from uharmony_model.networks import build_network
from uharmony_model.study import Study

PATCH = (64, 64, 64)


def study(method: str, name: str) -> Study:
    """A small study whose network is measured."""
    return Study.model_validate(
        {
            "name": "bench",
            "method": method,
            "task": {"classes": {"a": 1, "b": 2}, "intensity": {"MR": {"policy": "zscore"}}},
            "network": {"name": name, "features": [16, 32, 64, 128], "residual_units": 2},
        }
    )


def train_step(method: str, name: str) -> Callable[[], None]:
    """Forward, loss, backward and an SGD step on one batch of two patches."""
    chosen = study(method, name)
    network: nn.Module = build_network(chosen, ("a", "b"), seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((2, 1, *PATCH), generator=generator)
    label = torch.randint(0, 3, (2, *PATCH), generator=generator, dtype=torch.uint8)
    domain, annotated = torch.tensor([0, 0]), torch.tensor([True, True])

    def work() -> None:
        loss = segmentation_loss(network(image, domain), label, chosen.task, annotated)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return work


def rows() -> list[Row]:
    """UNet and SegResNet; the local residuals are part of the cost."""
    found = []
    for name in ("unet", "segresnet"):
        works = {m: train_step(m, name) for m in ("fedavg", "uharmony")}
        times = interleaved(works, repeats=7)
        ratio = times["uharmony"] / times["fedavg"]
        label = f"step of {name}: harmonised v. InstanceNorm3d"
        found.append(at_most(label, times["uharmony"], "ms", ratio, 1.03))
    return found
