"""What each tensor of a network is, by the type of the module that owns it, never by its name.

Rules on names (`"bn" in key`) silently become plain averaging on a network that names its norms
otherwise. So every type is listed here, and a tensor of any other module is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from monai.networks.nets.swin_unetr import WindowAttention
from torch import nn

from uharmony_model.alignment.style_autoencoder import StyleAutoencoder
from uharmony_model.depthwise_residual import DepthwiseResidual
from uharmony_model.errors import PartitionError
from uharmony_model.harmonic_layer import HarmonicNorm
from uharmony_model.methods import Part, Place
from uharmony_model.perxan import PerxanNorm
from uharmony_model.residual_conv import ResidualConv
from uharmony_model.u2net_blocks import DomainConv, DomainNorm

_WEIGHTS = {"weight": Part.BACKBONE, "bias": Part.BACKBONE}
_NORM = {
    "weight": Part.NORM_AFFINE,
    "bias": Part.NORM_AFFINE,
    "running_mean": Part.NORM_STATISTICS,
    "running_var": Part.NORM_STATISTICS,
    "num_batches_tracked": Part.NORM_STATISTICS,
}
_HARMONIC = {
    "polynomial": Part.POLYNOMIAL,
    "gain": Part.PHI,
    "shift": Part.PHI,
    "rho": Part.PHI,
    "lam": Part.PHI,
}
_ATTENTION = {
    "relative_position_bias_table": Part.BACKBONE,
    "relative_position_index": Part.INDEX,
}
# Its batch norm is a module of its own, and a plain norm.
_PERXAN = {"weight": Part.BACKBONE, "bias": Part.BACKBONE, "mix": Part.BACKBONE}
_RULES: tuple[tuple[tuple[type[nn.Module], ...], Mapping[str, Part]], ...] = (
    ((HarmonicNorm,), _HARMONIC),
    ((DepthwiseResidual,), {"kernel_residual": Part.DEPTHWISE_RESIDUAL}),
    ((PerxanNorm,), _PERXAN),
    ((DomainConv, DomainNorm), {"weight": Part.DOMAIN, "bias": Part.DOMAIN}),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.PReLU), _WEIGHTS),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _WEIGHTS),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _NORM),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _NORM),
    ((nn.GroupNorm, nn.LayerNorm), _NORM),
    ((WindowAttention,), _ATTENTION),
)


def part_of(model: nn.Module) -> dict[str, Part]:
    """The part of every tensor in the model's state dict, by key.

    Raises:
        PartitionError: a tensor belongs to a module whose type has no rule here.
    """
    # A tied tensor has several keys, as in the state dict; each is classified by its own owner.
    owners = dict(_owners(model))
    beside = tuple(f"{p}." for p, m in model.named_modules() if isinstance(m, StyleAutoencoder))
    parts = {}
    for key in model.state_dict():
        # Whole, whatever it is made of: no logit depends on it.
        if key.startswith(beside):
            parts[key] = Part.STYLE
            continue
        module, name = owners.get(key, (model, key))
        part = _classify(module, name)
        if part is None:
            raise PartitionError(
                f"{key}: nobody said whether tensor '{name}' of a {type(module).__name__} may "
                "leave a site; add a rule for its type to uharmony_model/exchange/parts.py"
            )
        parts[key] = part
    return parts


def place_of(model: nn.Module) -> dict[str, Place]:
    """Where a tensor lies, by key; only those of the first and the last block have a place."""
    places: Mapping[str, Place] = getattr(model, "places", {})
    return {
        key: place
        for key in model.state_dict()
        for path, place in places.items()
        if key.startswith(f"{path}.")
    }


def _owners(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for tensors in (
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            for name, _ in tensors:
                yield prefix + name, (module, name)


def _classify(module: nn.Module, name: str) -> Part | None:
    if isinstance(module, ResidualConv):
        return module.part if name in {"weight_residual", "bias_residual"} else None
    for types, parts in _RULES:
        if isinstance(module, types):
            return parts.get(name)
    return None
