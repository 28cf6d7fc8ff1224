"""What leaves a site and what stays, decided once per model: `split` before sending, `merge` after.

Local tensors with a leading axis over the K domains of a site leave `split` one by one as
`KEY@DOMAIN`, without that axis: domains are stored and loaded by name, never by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from uharmony_model.errors import PartitionError
from uharmony_model.exchange.parts import part_of, place_of
from uharmony_model.exchange.schema import Schema
from uharmony_model.harmonize import stacked_keys
from uharmony_model.methods import Part, Place
from uharmony_model.task import Name

__all__ = ["Partition", "part_of"]


@dataclass(frozen=True, eq=False)
class Partition:
    """The fate of every tensor of one model; made by `Partition.of`.

    `shared_keys` and `local_keys` are state-dict keys, sorted. Constants that a network computes
    when it is built are in neither. `parts` says what each is.
    """

    domains: tuple[str, ...]
    shared_keys: tuple[str, ...]
    local_keys: tuple[str, ...]
    shared_schema: Schema
    parts: Mapping[str, Part]
    _stacked: frozenset[str]
    _layout: Mapping[str, tuple[torch.Size, torch.dtype]]
    _constants: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, local: frozenset[Part | Place]) -> Partition:
        """Classify every tensor of a model; `local` are parts and places that stay at the site.

        Integer statistics (a norm's batch counter) always stay: they cannot be averaged.

        Raises:
            PartitionError: a tensor has no declared fate, or a name would be ambiguous.
        """
        state, parts, places = model.state_dict(), part_of(model), place_of(model)
        domains = _checked_domains(getattr(model, "domains", ()))
        shared: list[str] = []
        kept: list[str] = []
        for key, part in sorted(parts.items()):
            if "@" in key:
                raise PartitionError(f"{key}: '@' separates key and domain; rename the module")
            if part is Part.INDEX:
                continue
            counter = part is Part.NORM_STATISTICS and not state[key].is_floating_point()
            stays = part in local or places.get(key) in local or counter
            (kept if stays else shared).append(key)
        stacked = stacked_keys(model) & set(kept)
        for key in stacked:
            if state[key].shape[:1] != (len(domains),):
                raise PartitionError(
                    f"{key}: {tuple(state[key].shape)}, expected {len(domains)} domains in front"
                )
        return cls(
            domains=domains,
            shared_keys=tuple(shared),
            local_keys=tuple(kept),
            shared_schema=Schema.of({key: state[key] for key in shared}),
            parts=parts,
            _stacked=frozenset(stacked),
            _layout={key: (tensor.shape, tensor.dtype) for key, tensor in state.items()},
            _constants={
                key: state[key].detach().cpu().clone()
                for key, part in parts.items()
                if part is Part.INDEX
            },
        )

    @property
    def local_names(self) -> tuple[str, ...]:
        """The names of the local tensors as `split` gives them, sorted."""
        return tuple(sorted(self._local_layout))

    @property
    def _local_layout(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        layout = {}
        for key in self.local_keys:
            shape, dtype = self._layout[key]
            if key in self._stacked:
                layout.update({f"{key}@{name}": (shape[1:], dtype) for name in self.domains})
            else:
                layout[key] = (shape, dtype)
        return layout

    def split(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cut a state dict into (shared, local); the tensors are views of the given ones.

        Raises:
            PartitionError: the state dict is not one of the model this was made for.
        """
        _check(state, self._layout, "state dict")
        shared = {key: state[key] for key in self.shared_keys}
        local = {}
        for key in self.local_keys:
            if key in self._stacked:
                slices = state[key].unbind(0)
                local.update(
                    {f"{key}@{d}": piece for d, piece in zip(self.domains, slices, strict=True)}
                )
            else:
                local[key] = state[key]
        return shared, local

    def merge(self, shared: Mapping[str, Tensor], local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put a full state dict together, for `load_state_dict(strict=True)`.

        Raises:
            PartitionError: a tensor is missing, is one too many, or has another shape or type.
        """
        _check(shared, {key: self._layout[key] for key in self.shared_keys}, "shared")
        _check(local, self._local_layout, "local")
        whole = {**self._constants, **shared}
        for key in self.local_keys:
            if key in self._stacked:
                whole[key] = torch.stack([local[f"{key}@{name}"] for name in self.domains])
            else:
                whole[key] = local[key]
        return {key: whole[key] for key in self._layout}


def _check(
    state: Mapping[str, Tensor],
    layout: Mapping[str, tuple[torch.Size, torch.dtype]],
    what: str,
) -> None:
    if state.keys() != layout.keys():
        missing, extra = sorted(layout.keys() - state.keys()), sorted(state.keys() - layout.keys())
        raise PartitionError(
            f"{what}: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} too many {extra[:3]}; is it of the same study and site?"
        )
    for key, (shape, dtype) in layout.items():
        if state[key].shape != shape or state[key].dtype != dtype:
            raise PartitionError(
                f"{what}: {key} is {tuple(state[key].shape)} {state[key].dtype}, "
                f"expected {tuple(shape)} {dtype}"
            )


def _checked_domains(domains: object) -> tuple[str, ...]:
    try:
        names = TypeAdapter(tuple[Name, ...]).validate_python(domains)
    except ValidationError:
        raise PartitionError(
            f"domains {domains!r:.200}: expected names of letters, digits, '.', '_' and '-'"
        ) from None
    if len(set(names)) != len(names):
        raise PartitionError(f"domains {names!r:.200}: each name may occur once")
    return names
