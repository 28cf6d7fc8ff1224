"""Where a site computes."""

from __future__ import annotations

from typing import get_args

import torch

from uharmony_client.site_config import DeviceName
from uharmony_model.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device for a name; `auto` takes CUDA where there is some.

    Raises:
        ConfigError: the name is unknown, or `cuda` is asked for and there is none.
    """
    if name not in get_args(DeviceName):
        raise ConfigError(f"device {name!r:.40}; expected {', '.join(get_args(DeviceName))}")
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise ConfigError("device cuda: this machine has no usable CUDA device; use cpu or auto")
    return torch.device("cpu")
