"""Patches that UST-RUN pastes and remembers, with what is believed of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from uharmony_model.unlabelled.pseudo_label import PseudoLabel


@dataclass(frozen=True)
class Sources:
    """What is pasted: images (B, C, D, H, W), label values (B, D, H, W), the truth, domains."""

    image: Tensor
    label: Tensor
    truth: PseudoLabel
    domain: Tensor


@dataclass(frozen=True)
class Sample:
    """Patches (B, C, D, H, W), what is believed of them, and their domains (B,)."""

    image: Tensor
    label: PseudoLabel
    domain: Tensor

    def to(self, device: torch.device) -> Sample:
        """The same on a device."""
        label = PseudoLabel(self.label.label.to(device), self.label.certain.to(device))
        return Sample(self.image.to(device), label, self.domain.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """By name, to be carried; `of` reads it again."""
        return {
            "image": self.image,
            "label": self.label.label,
            "certain": self.label.certain,
            "domain": self.domain,
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Sample:
        """From what was carried."""
        label = PseudoLabel(tensors["label"], tensors["certain"])
        return cls(tensors["image"], label, tensors["domain"])
