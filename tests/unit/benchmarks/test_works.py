"""What the benchmarks time can be built and run."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layer import layer
from benchmarks.network import train_step


@pytest.mark.parametrize("settings", [{}, {"stage2": "revin"}, {"order": 3}])
def test_the_layer_is_one_with_parameters_of_its_domains(settings: dict[str, object]) -> None:
    module = layer(4, **settings)
    module(torch.randn(2, 4, 4, 4, 4), torch.tensor([0, 2])).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("method", ["fedavg", "uharmony"])
def test_the_step_of_a_network_learns(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.network.PATCH", (16, 16, 16))
    train_step(method, "unet")()
