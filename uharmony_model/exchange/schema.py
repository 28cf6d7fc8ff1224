"""What a flat buffer consists of: the names and shapes of its tensors, in the order of the names.

Weights travel as one flat float32 buffer. Names never become positions silently: both sides hold
the schema, and its digest is in every manifest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.canonical import canonical_json
from uharmony_model.frozen import Frozen


class TensorSpec(Frozen):
    """One float32 tensor, by the key it has in the state dict."""

    name: Annotated[str, Field(min_length=1)]
    shape: tuple[NonNegativeInt, ...]

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


class Schema(Frozen):
    """The tensors of a flat buffer, sorted by name."""

    tensors: tuple[TensorSpec, ...]

    @model_validator(mode="after")
    def _sorted(self) -> Schema:
        names = [spec.name for spec in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("the tensors must be sorted by name, each name once")
        return self

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Schema:
        """The schema of the given tensors.

        Raises:
            ExchangeError: a tensor is not float32, which is all that can travel.
        """
        for name, tensor in state.items():
            if tensor.dtype != torch.float32:
                raise ExchangeError(f"{name}: is {tensor.dtype}; only torch.float32 can be shared")
        return cls(
            tensors=tuple(
                TensorSpec(name=name, shape=tuple(state[name].shape)) for name in sorted(state)
            )
        )

    @property
    def numel(self) -> int:
        """Elements of the flat buffer."""
        return sum(spec.numel for spec in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(canonical_json(self).encode()).hexdigest()


def flatten(state: Mapping[str, Tensor], schema: Schema) -> Tensor:
    """Copy the tensors into one flat buffer `(n,)` on the CPU.

    Raises:
        ExchangeError: a tensor is missing, not in the schema, or of another shape or type.
    """
    names = [spec.name for spec in schema.tensors]
    if set(names) != set(state):
        missing, extra = sorted(set(names) - set(state)), sorted(set(state) - set(names))
        raise ExchangeError(f"tensors do not match the schema: missing {missing}, extra {extra}")
    for spec in schema.tensors:
        tensor = state[spec.name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != torch.float32:
            raise ExchangeError(
                f"{spec.name}: {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {spec.shape} torch.float32"
            )
    if not names:
        return torch.empty(0)
    return torch.cat([state[name].detach().reshape(-1) for name in names]).cpu()


def unflatten(flat: Tensor, schema: Schema) -> dict[str, Tensor]:
    """Cut a flat buffer `(n,)` into its tensors, which are views of it.

    Raises:
        ExchangeError: the buffer is not a flat float32 one of the schema's length.
    """
    if flat.shape != (schema.numel,) or flat.dtype != torch.float32:
        raise ExchangeError(
            f"flat buffer is {tuple(flat.shape)} {flat.dtype}, "
            f"expected ({schema.numel},) torch.float32"
        )
    pieces = torch.split(flat, [spec.numel for spec in schema.tensors])
    return {
        spec.name: piece.view(spec.shape)
        for spec, piece in zip(schema.tensors, pieces, strict=True)
    }
