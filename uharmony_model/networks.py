"""The network of a study, under the study's method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from uharmony_model.alignment.style_autoencoder import StyleAutoencoder, build_autoencoder
from uharmony_model.backbones import BACKBONES, BATCH, INSTANCE, LAYER, Backbone
from uharmony_model.errors import ConfigError, NetworkError
from uharmony_model.harmonize import harmonize
from uharmony_model.methods import Place
from uharmony_model.network_settings import Harmonization, Network
from uharmony_model.perxan import with_perxan
from uharmony_model.presence import input_channels
from uharmony_model.randomness import seed_for
from uharmony_model.segmentation_network import SegmentationNetwork, wrong_size
from uharmony_model.study import Study
from uharmony_model.u2net import U2Net

STYLE = "style."  # how the tensors of the autoencoder begin
DEPTHWISE_STAGES = slice(1, 3)  # the two below the stem, which has residuals of its own


def training_network(study: Study, domains: Sequence[str], *, seed: int) -> SegmentationNetwork:
    """What a study trains: its network and, where it learns styles, the autoencoder beside it.

    Raises:
        NetworkError: see `build_network`.
    """
    model = build_network(study, domains, seed=seed)
    if study.learns_styles:
        model.style = build_autoencoder(seed=seed)
    return model


def autoencoder_of(network: nn.Module) -> StyleAutoencoder:
    """The style autoencoder beside a network.

    Raises:
        NetworkError: there is none.
    """
    found = network.style if isinstance(network, SegmentationNetwork) else None
    if found is None:
        raise NetworkError(
            f"{type(network).__name__} has no style autoencoder; it is there under "
            "unlabelled.style: codes, while the network is trained"
        )
    return found


def without_style(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a training network, or some of them, that predict."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(STYLE)}


def build_network(study: Study, domains: Sequence[str], *, seed: int) -> SegmentationNetwork:
    """The study's network for these domains; equal seeds give equal shared weights, whatever K.

    It is what predicts; what is trained can be more (`training_network`).

    Raises:
        NetworkError: the backbone cannot be built from `study.network`.
    """
    network, task, plan = study.network, study.task, study.plan
    if plan.backbone == "u2net":
        return _u2net(study, domains, seed)
    backbone = BACKBONES[network.name]
    levels = len(network.features)
    if not backbone.min_levels <= levels <= backbone.max_levels:
        raise NetworkError(
            f"network.features has {levels} levels, but {network.name} takes "
            f"{backbone.min_levels} to {backbone.max_levels}; change the list"
        )
    own = {"instance": INSTANCE, "batch": BATCH, "layer": LAYER}[network.norm]
    # Harmonisation layers and perxan take the place of instance norms.
    norm = {"study": own, "batch": BATCH}.get(plan.norm, INSTANCE)
    with _drawn_from(seed):
        built = backbone.build(network, input_channels(task), task.outputs, norm)
    multiple = patch_multiple(network)
    if plan.harmonized:
        model: SegmentationNetwork = _harmonized(
            built, backbone, study.harmonization, levels, domains, multiple
        )
    else:
        if plan.norm == "perxan":
            built = with_perxan(built)
        model = SegmentationNetwork(built, domains=domains, multiple=multiple)
    model.places = {f"network.{path}": Place.FIRST_BLOCK for path in backbone.stages(levels)[0]}
    model.places[f"network.{backbone.head}"] = Place.LAST_BLOCK
    model.deepest = f"network.{backbone.stages(levels)[-1][-1]}"
    return model


def patch_multiple(network: Network, backbone: str | None = None) -> int:
    """Edges of a patch must be multiples of this many voxels; `backbone` is one a method brings."""
    halvings = BACKBONES[network.name].halvings if backbone is None else None
    return 1 << (len(network.features) - 1 if halvings is None else halvings)


def check_patch(network: Network, patch: Sequence[int], backbone: str | None = None) -> None:
    """Make sure that `patch` (D, H, W), in voxels, can pass through the network.

    `backbone` is the one that a method brings in place of the study's (`Method.backbone`).

    Raises:
        ConfigError: an edge is no multiple of the strides, or the deepest level is too small.
    """
    wrong = wrong_size(patch, patch_multiple(network, backbone))
    if wrong is not None:
        raise ConfigError(f"training.patch ({backbone or network.name}): a patch {wrong}")


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Layers that are made inside draw their first values from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(seed, "network"))  # leaves CUDA alone
        yield


def _u2net(study: Study, domains: Sequence[str], seed: int) -> U2Net:
    # It has its own norms and blocks: of `study.network` it takes the channels of the levels.
    with _drawn_from(seed):
        model = U2Net(
            channels=input_channels(study.task),
            outputs=study.task.outputs,
            features=study.network.features,
            domains=domains,
        )
    first = dict.fromkeys(("network.stem", "network.encoder.0"), Place.FIRST_BLOCK)
    model.places = {**first, "network.head": Place.LAST_BLOCK}
    return model


def _harmonized(
    built: nn.Module,
    backbone: Backbone,
    settings: Harmonization,
    levels: int,
    domains: Sequence[str],
    multiple: int,
) -> SegmentationNetwork:
    stages = backbone.stages(levels)
    early = [path for stage in stages[DEPTHWISE_STAGES] for path in stage]
    return harmonize(
        built,
        domains=domains,
        settings=settings,
        encoder=[path for stage in stages for path in stage],
        stem=_mixing(built, stages[0]),
        depthwise=_spatial(built, early),
        head=_convolutions(built, backbone.head)[-1:],
        multiple=multiple,
    )


def _mixing(network: nn.Module, tops: Sequence[str]) -> list[str]:
    # A kernel of one weight only scales its input, and the norm behind it takes that out again.
    return [
        path
        for top in tops
        for path in _convolutions(network, top)
        if network.get_parameter(f"{path}.weight")[0].numel() > 1
    ]


def _spatial(network: nn.Module, tops: Sequence[str]) -> list[str]:
    # Those that look at neighbours anyway; a transposed one has a grid of its own.
    paths = [path for top in tops for path in _convolutions(network, top)]
    modules = [(path, network.get_submodule(path)) for path in paths]
    return [p for p, m in modules if isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1]


def _convolutions(network: nn.Module, top: str) -> list[str]:
    return [
        f"{top}.{name}" if name else top
        for name, module in network.get_submodule(top).named_modules()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d)
    ]
