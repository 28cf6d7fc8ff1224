"""Make any MONAI network a harmonised one: replace its norms, add residuals to its kernels.

Layers are found by their type, never by their name: rules such as `'bn' in key` match nothing in
MONAI's networks and then share everything without a word.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from uharmony_model.depthwise_residual import DepthwiseResidual
from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.errors import NetworkError
from uharmony_model.harmonic_layer import HarmonicNorm
from uharmony_model.methods import Part
from uharmony_model.network_settings import Harmonization
from uharmony_model.residual_conv import Convolution, ResidualConv
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.u2net_blocks import DomainConv, DomainNorm

CHANNEL_AXIS: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 1,
    nn.InstanceNorm3d: 1,
    nn.BatchNorm3d: 1,
    nn.GroupNorm: 1,
    nn.LayerNorm: -1,
}
"""The norm layers that are replaced, and which axis of their input holds the channels."""

FUNCTIONAL_NORMS: dict[type[nn.Module], str] = {
    SwinTransformer: "proj_out: torch.nn.functional.layer_norm over channels, without parameters",
}
"""Norms that are calls and no layers. They stay, and `HarmonizedNetwork.kept_norms` lists them."""

# The modules with tensors of domains; each says by `stacked` which they are.
_CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
_LOCAL_MODULES = (HarmonicNorm, ResidualConv, DepthwiseResidual, DomainConv, DomainNorm)

# Every norm layer of torch; one of these that is not in CHANNEL_AXIS is an error.
_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
    nn.RMSNorm,
)


class HarmonizedNetwork(SegmentationNetwork):
    """A backbone whose residuals follow the domain of each sample."""

    def __init__(
        self,
        network: nn.Module,
        *,
        domains: Sequence[str],
        switch: DomainSwitch,
        kept_norms: Sequence[str] = (),
        multiple: int | None = None,
    ) -> None:
        super().__init__(network, domains=domains, multiple=multiple)
        self.kept_norms = tuple(kept_norms)
        self._switch = switch

    def forward(self, x: Tensor, domain: Tensor | None = None, *, drop: bool = False) -> Tensor:
        """Logits (B, J, D, H, W) of x (B, C, D, H, W); `domain (B,)` indexes `domains`.

        Without a domain, or with `drop`, all residuals are zero and get no gradient; a sample of
        index -1 is unseen, among others that are not. A floating-point `domain (B, K)` gives each
        sample its mixture of the domains' residuals.

        Raises:
            NetworkError: x does not fit the backbone, an index is no domain, or a row no mixture.
        """
        if domain is not None and domain.shape[:1] != x.shape[:1]:
            raise NetworkError(
                f"domain has shape {tuple(domain.shape)} for {x.shape[0]} samples; give one index "
                "for each, or one row of weights"
            )
        # It stays set afterwards: activation checkpointing asks again during the backward pass.
        self._switch.selection = (
            None if domain is None or drop else _selected(domain, len(self.domains))
        )
        return super().forward(x)


def harmonize(
    network: nn.Module,
    *,
    domains: Sequence[str],
    settings: Harmonization,
    encoder: Sequence[str] = (),
    stem: Sequence[str] = (),
    depthwise: Sequence[str] = (),
    head: Sequence[str] = (),
    multiple: int | None = None,
) -> HarmonizedNetwork:
    """Harmonise `network` in place and wrap it.

    A new layer starts as the old one: its weight and bias become a_1 and a_0, residuals are zero.
    So a network of instance norms computes what it did, except with `stage2: revin`. `stem`,
    `depthwise` and `head` are paths of convolutions, or of modules whose convolutions are all
    meant; `encoder` are the paths of the encoder's modules, for `settings.layers`.

    Raises:
        NetworkError: a norm is of a type that is not known, a path leads to no convolution, or the
            network has no norm at all.
    """
    _check_domains(domains)
    norms = _norms_of(network)
    if not norms:
        raise NetworkError(
            f"{type(network).__name__} has no norm layer to harmonise; build it with instance norms"
        )
    switch = DomainSwitch()
    kept = [
        f"{path or type(network).__name__}.{FUNCTIONAL_NORMS[type(module)]}"
        for path, module in network.named_modules()
        if type(module) in FUNCTIONAL_NORMS
    ]
    paths = {
        Part.STEM_RESIDUAL: stem if "stem" in settings.residuals else (),
        Part.DEPTHWISE_RESIDUAL: depthwise if "depthwise" in settings.residuals else (),
        Part.HEAD_RESIDUAL: head if "head" in settings.residuals else (),
    }
    like = next(network.parameters(), torch.empty(0))  # device and type of norms without weights
    replacements: dict[nn.Module, nn.Module] = {
        norm: _harmonic(norm, len(domains), switch, settings, like)
        for norm in _carrying(norms, settings, encoder)
    }
    for convolution, part in _convolutions_of(network, paths).items():
        replacements[convolution] = _residual(convolution, part, len(domains), switch)
    model = HarmonizedNetwork(
        network, domains=domains, switch=switch, kept_norms=kept, multiple=multiple
    )
    _replace(model, replacements)
    return model


def stacked_keys(model: nn.Module) -> frozenset[str]:
    """State-dict keys whose first axis is the domains; none in a network that is a plain one."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _LOCAL_MODULES)
        for name in module.stacked
    )


def _selected(domain: Tensor, domains: int) -> Selection | None:
    if domain.ndim == 2 and domain.is_floating_point():
        return Selection.mixture(domain, domains)
    return Selection.of(domain, domains)


def _carrying(
    norms: dict[str, nn.Module], settings: Harmonization, encoder: Sequence[str]
) -> list[nn.Module]:
    """The norms that become harmonisation layers; what the first n are, the network's order says.

    Raises:
        NetworkError: the network has fewer than n, or none in the part that is asked for.
    """
    layers = settings.layers
    if layers == "all":
        return list(norms.values())
    if isinstance(layers, int):
        found = list(norms.values())[:layers]
        complete = len(found) == layers
    else:
        inside = tuple(f"{path}." for path in encoder)
        wanted = layers == "encoder"
        found = [m for p, m in norms.items() if f"{p}.".startswith(inside) == wanted]
        complete = bool(found)
    if not complete:
        raise NetworkError(
            f"harmonization.layers is {layers}, but the network has {len(norms)} norm layers, "
            f"{len(found)} of them there; choose all, encoder, decoder or a smaller number"
        )
    return found


def _residual(
    convolution: Convolution, part: Part, domains: int, switch: DomainSwitch
) -> nn.Module:
    made: nn.Module
    if part is Part.DEPTHWISE_RESIDUAL:
        assert isinstance(convolution, nn.Conv3d)  # noqa: S101 - as _convolutions_of made sure
        made = DepthwiseResidual(convolution, domains=domains, switch=switch)
    else:
        made = ResidualConv(convolution, domains=domains, part=part, switch=switch)
    return made.train(convolution.training)


def _check_domains(domains: Sequence[str]) -> None:
    if isinstance(domains, str) or len(set(domains)) != len(domains):
        raise NetworkError(f"domains are {domains!r}; give a sequence of different names")


def _norms_of(network: nn.Module) -> dict[str, nn.Module]:
    """The norm layers that can be replaced, by path; there must be no other kind."""
    norms = {}
    for path, module in network.named_modules():
        name = f"{type(network).__name__}: {path or '(the network itself)'}"
        if isinstance(module, _LOCAL_MODULES):
            raise NetworkError(f"{name} is harmonised already; harmonise a fresh network")
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            raise NetworkError(
                f"{name} is a LayerNorm over {len(module.normalized_shape)} axes, expected the "
                "channels alone; use an instance norm there"
            )
        if type(module) in CHANNEL_AXIS:
            norms[path] = module
        elif isinstance(module, _NORMS):
            known = ", ".join(kind.__name__ for kind in CHANNEL_AXIS)
            raise NetworkError(
                f"{name} is a {type(module).__name__}, which harmonisation does not know "
                f"(known: {known}); use one of these, or add its channel axis to CHANNEL_AXIS"
            )
    return norms


def _harmonic(
    norm: nn.Module, domains: int, switch: DomainSwitch, settings: Harmonization, like: Tensor
) -> HarmonicNorm:
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    layer = HarmonicNorm(
        _channels(norm),
        domains=domains,
        switch=switch,
        order=settings.order,
        stage2=settings.restoration,
        eps=float(getattr(norm, "eps")),  # noqa: B009 - every norm in CHANNEL_AXIS has it
        channel_axis=CHANNEL_AXIS[type(norm)],
        compiled=settings.compiled,
    ).to(like)
    with torch.no_grad():
        if isinstance(weight, Tensor):
            layer.polynomial[1] = weight
        if isinstance(bias, Tensor):
            layer.polynomial[0] = bias
    return layer.train(norm.training)


def _channels(norm: nn.Module) -> int:
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[0]
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    return int(getattr(norm, "num_features"))  # noqa: B009 - as all instance and batch norms


def _convolutions_of(
    network: nn.Module, paths: dict[Part, Sequence[str]]
) -> dict[Convolution, Part]:
    """The convolutions at or under the paths of each part."""
    found: dict[Convolution, Part] = {}
    name = type(network).__name__
    for part, tops in paths.items():
        for top in tops:
            try:
                modules = list(network.get_submodule(top).modules())
            except AttributeError:
                raise NetworkError(
                    f"{name} has no module '{top}'; print the network to see its paths"
                ) from None
            # A transposed convolution has another grid at its input, which a depthwise residual
            # does not know.
            kinds = (nn.Conv3d,) if part is Part.DEPTHWISE_RESIDUAL else _CONVOLUTIONS
            convolutions = [m for m in modules if isinstance(m, kinds)]
            if not convolutions:
                raise NetworkError(f"{name}: '{top}' holds no 3D convolution; name one that does")
            if any(found.get(convolution, part) is not part for convolution in convolutions):
                raise NetworkError(
                    f"{name}: '{top}' has residuals of two kinds; give it to one of them"
                )
            found |= dict.fromkeys(convolutions, part)
    return found


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    # A module can stand in several places (MONAI's DynUNet lists its blocks twice): all change.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
