"""A trained model for a study that has grown: one class, one modality or one domain more.

What was trained is copied to its place. What is new starts so that the old is not touched:

    a class        a new row of the head as a fresh network has it, behind the old ones
    a modality     a new input channel with a zero kernel
    a domain       local parameters as a fresh network has them: residuals are zero
    residuals      of one kind more, zero at the old domains: W + 0 computes as W did

Then the new entries alone are trained (`hold_old`). Logits of the old classes at the old sites stay
as they were, for they use no new entry but on a channel that is zero there: with `task.presence`
the masks see to that, without it an old site gives zeros. `keep_apart` makes that so to the bit.

Overlapping classes: the same masks. Exclusive ones: softmax gives the new class a share of every
probability, so that the old ones keep their ratios to each other, and a voxel changes its class
only where the new one wins it. In the loss of a site that does not draw it, its share belongs to
background (`merge_unannotated`). All of this is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from uharmony_model.errors import ConfigError
from uharmony_model.exchange.partition import Partition
from uharmony_model.exchange.parts import place_of
from uharmony_model.grown_conv import Convolution, Parts, grown, is_grown, kernel_shape
from uharmony_model.methods import Place
from uharmony_model.network_settings import Network
from uharmony_model.networks import build_network
from uharmony_model.study import Study
from uharmony_model.task import Task
from uharmony_model.u2net import U2Net

_ANY = "any"  # shared tensors do not depend on the number of domains

_OLD, _FRESH, _ZERO, _APART = range(4)  # roles: kept; new; new and zero at first; zero for good


@dataclass(frozen=True)
class _Grown:
    """Where the old ones of an axis stand in the new one of `size`; the role of the new ones."""

    old: tuple[int, ...]
    size: int
    start: int


_NOWHERE = _Grown((), 0, _OLD)


def extend_state(
    old: Study, new: Study, state: Mapping[str, Tensor], *, domains: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The state of `new` that continues a trained `state` of `old`.

    Both are by name as `Partition.split` gives them, shared and local together (KEY or
    KEY@DOMAIN), or a part of that; `domains` are new ones, whose local parameters are added.

    Raises:
        ConfigError: the new study is not the old one grown, or the state is not of the old one.
    """
    axes = _grown_places(old, new)
    known = tuple(sorted({name.partition("@")[2] for name in state if "@" in name}))
    again = sorted(set(known) & set(domains))
    if again or len(set(domains)) != len(domains):
        raise ConfigError(
            f"the domains {again or list(domains)} are not new; name each new one once"
        )
    after, network = _fresh(new, (*known, *domains))
    state = {_within(name, after): tensor for name, tensor in state.items()}
    before = {_within(name, after): tensor for name, tensor in _fresh(old, known)[0].items()}
    for name, tensor in state.items():
        if name not in before or before[name].shape != tensor.shape or name not in after:
            raise ConfigError(
                f"{name} {tuple(tensor.shape)} is no tensor of the old study's network; give the "
                "state of a model that was trained with it"
            )
    theirs = domains if old.network == new.network else (*known, *domains)
    added = {name for name in after.keys() - before.keys() if name.partition("@")[2] in theirs}
    if before.keys() != after.keys() - added:
        raise ConfigError(
            f"{', '.join(sorted(before.keys() ^ (after.keys() - added))[:3])}: the network of the "
            "new study is built otherwise with so many channels; train one anew"
        )
    places = _places(network)
    result = {}
    for name, tensor in state.items():
        where = axes.get(places.get(_key(name)), _NOWHERE)
        roles = _roles(name, tensor.shape, after[name].shape, where)
        fresh = after[name].to(tensor)
        result[name] = torch.where(roles == _FRESH, fresh, torch.zeros_like(fresh))
        # The old ones keep their order, so the flat ones do too.
        result[name][roles == _OLD] = tensor.reshape(-1)
    return result | {name: after[name] for name in added}


def new_entries(
    old: Study, new: Study, known: Sequence[str], domains: Sequence[str] = ()
) -> dict[str, Tensor]:
    """What may be trained with the old outputs kept: a mask (True: new) for every tensor.

    The keys are those of the state dict of `build_network(new, (*known, *domains))`.

    Raises:
        ConfigError: the new study is not the old one grown.
    """
    axes = _grown_places(old, new)
    after, network = _fresh(new, (*known, *domains))
    before = {_within(name, after): tensor for name, tensor in _fresh(old, known)[0].items()}
    places = _places(network)
    masks = {}
    for name, fresh in after.items():
        if name not in before:
            learns = name.partition("@")[2] not in known
            masks[name] = torch.full_like(fresh, float(learns))
            continue
        where = axes.get(places.get(_key(name)), _NOWHERE)
        roles = _roles(name, before[name].shape, fresh.shape, where)
        masks[name] = ((roles == _FRESH) | (roles == _ZERO)).to(fresh.dtype)
    partition = Partition.of(network, new.plan.local)
    whole = partition.merge(
        {key: masks[key] for key in partition.shared_keys},
        {name: masks[name] for name in partition.local_names},
    )
    classified = {*partition.shared_keys, *partition.local_keys}
    return {
        key: mask.bool() if key in classified else torch.zeros_like(mask, dtype=torch.bool)
        for key, mask in whole.items()
    }


def keep_apart(network: nn.Module, *line: Study) -> None:
    """Let a network compute what it has from earlier studies with their shapes, in place.

    The last study of the `line` is the network's own, each of the others was grown to the next.
    Without it the old outputs stay as they were up to rounding (1e-5 of a logit was seen), for a
    convolution of another size sums in another order; with it they stay to the bit. Keys, tensors
    and their gradients are the same. A batch that mixes domains is equal up to rounding all the
    same where residuals of several domains become one convolution.

    Raises:
        ConfigError: a study is not the one before it grown.
    """
    places = _places(network)
    modules = {key: module for key, module in _kernels(network).items() if not is_grown(module)}
    earlier = [_kernels(build_network(study, (_ANY,), seed=study.seed)) for study in line[:-1]]
    shapes = [
        {_within(key, modules): kernel_shape(m) for key, m in made.items()}
        for made in (*earlier, modules)
    ]
    parts: dict[str, Parts] = {}
    for studies, (before, after) in zip(
        itertools.pairwise(line), itertools.pairwise(shapes), strict=True
    ):
        axes = _grown_places(*studies)
        for key in modules.keys() & before.keys():
            ours, theirs = before[key], after[key]
            if ours == theirs:
                continue
            where = axes.get(places.get(key), _NOWHERE)
            _roles(key, ours, theirs, where)  # refuses what is no extension
            columns, rows = (0, 1) if isinstance(modules[key], nn.ConvTranspose3d) else (1, 0)
            old_in = where.old if ours[columns] != theirs[columns] else range(theirs[columns])
            sizes = theirs[columns], theirs[rows]
            parts[key] = Parts(*sizes, old_in, ours[rows], inner=parts.get(key))
    found: dict[nn.Module, nn.Module] = {modules[k]: grown(modules[k], p) for k, p in parts.items()}
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in found:
                setattr(parent, name, found[child])


def frozen_keys(entries: Mapping[str, Tensor]) -> frozenset[str]:
    """The tensors without a new entry."""
    return frozenset(key for key, mask in entries.items() if not bool(mask.any()))


def hold_old(
    network: nn.Module, optimizer: torch.optim.Optimizer, entries: Mapping[str, Tensor]
) -> RemovableHandle:
    """Let a network learn its new entries alone: after every step the others are put back.

    Gradients alone would not do: weight decay moves what has none, and running statistics move in
    the forward pass. The handle ends it.
    """
    live = network.state_dict()  # the tensors of the network itself
    masks = {key: entries[key].to(tensor.device) for key, tensor in live.items()}
    kept = {key: tensor.clone() for key, tensor in live.items() if not bool(masks[key].all())}

    def put_back(*_: object) -> None:
        for key, tensor in kept.items():
            live[key].copy_(torch.where(masks[key], live[key], tensor))

    return optimizer.register_step_post_hook(put_back)


def _grown_places(old: Study, new: Study) -> dict[Place | None, _Grown]:
    """What has grown in the first block and in the last."""
    same = (
        ("network", _with_residuals_of(old, new), new.network),
        ("method", old.method, new.method),
        ("task.overlapping", old.task.overlapping, new.task.overlapping),
        ("task.presence", old.task.presence, new.task.presence),
        ("task.spacing_mm", old.task.spacing_mm, new.task.spacing_mm),
    )
    for name, ours, theirs in same:
        if ours != theirs:
            raise ConfigError(f"{name} was {ours!s:.200} and is {theirs!s:.200}; it has to stay")
    classes, more = list(old.task.classes.items()), list(new.task.classes.items())
    if more[: len(classes)] != classes:
        raise ConfigError(
            f"the classes were {', '.join(old.task.classes)} and are "
            f"{', '.join(new.task.classes)}; the old ones have to come first, with their values"
        )
    outputs = _Grown(tuple(range(old.task.outputs)), new.task.outputs, _FRESH)
    return {Place.FIRST_BLOCK: _inputs(old.task, new.task), Place.LAST_BLOCK: outputs}


def _with_residuals_of(old: Study, new: Study) -> Network:
    """The old network; residuals of one kind more change nothing as long as they are zero."""
    layer = old.network.harmonization
    more = new.network.harmonization.residuals
    if not set(layer.residuals) <= set(more):
        return old.network
    grown_layer = layer.model_copy(update={"residuals": more})
    return old.network.model_copy(update={"harmonization": grown_layer})


def _within(name: str, names: Container[str]) -> str:
    """A tensor's name, where a residual may have been put around its module since."""
    key, at, domain = name.partition("@")
    path, _, last = key.rpartition(".")
    inside = f"{path}.shared.{last}{at}{domain}"
    return inside if name not in names and inside in names else name


def _inputs(old: Task, new: Task) -> _Grown:
    lost = [name for name, policy in old.intensity.items() if new.intensity.get(name) != policy]
    if lost or new.channels < old.channels:
        raise ConfigError(
            f"the study had {old.channels} channels of {', '.join(old.intensity)} and has "
            f"{new.channels} of {', '.join(new.intensity)}; the old ones have to stay as they are"
        )
    if not old.presence:
        return _Grown(tuple(range(old.channels)), new.channels, _ZERO)
    names = list(new.intensity)  # sorted by name, so a new one may stand between old ones
    images = tuple(names.index(name) for name in old.intensity)
    masks = tuple(new.channels + place for place in images)
    return _Grown((*images, *masks), 2 * new.channels, _ZERO)


def _roles(name: str, ours: torch.Size, fresh: torch.Size, where: _Grown) -> Tensor:
    """What each entry of a tensor of the new network is, uint8."""
    axes = [i for i, (a, b) in enumerate(zip(ours, fresh, strict=True)) if a != b]
    if any(len(where.old) != ours[i] or where.size != fresh[i] for i in axes):
        raise ConfigError(
            f"{name} is {tuple(ours)} and would be {tuple(fresh)}: it mixes old and new, so this "
            "network cannot be extended; train one anew"
        )
    if not axes:
        return torch.full(fresh, _OLD, dtype=torch.uint8)
    index = [
        torch.tensor(where.old) if i in axes else torch.arange(size) for i, size in enumerate(ours)
    ]
    roles = torch.full(fresh, where.start, dtype=torch.uint8)
    if len(axes) > 1:
        # A kernel from classes to classes: what an old one would take of a new one stays zero.
        roles[index[0]] = _APART
    roles[torch.meshgrid(*index, indexing="ij")] = _OLD
    return roles


def _key(name: str) -> str:
    return name.partition("@")[0]


def _places(network: nn.Module) -> dict[str, Place]:
    places = place_of(network)
    if isinstance(network, U2Net):
        # Auxiliary heads give logits as the head does.
        heads = (key for key in network.state_dict() if key.startswith("network.auxiliary."))
        places |= dict.fromkeys(heads, Place.LAST_BLOCK)
    return places


def _kernels(network: nn.Module) -> dict[str, Convolution]:
    return {
        f"{path}.weight": module
        for path, module in network.named_modules()
        if isinstance(module, Convolution)
    }


def _fresh(study: Study, domains: Sequence[str]) -> tuple[dict[str, Tensor], nn.Module]:
    """A fresh network and its tensors by name; without domains only those of none."""
    network = build_network(study, domains or (_ANY,), seed=study.seed)
    shared, local = Partition.of(network, study.plan.local).split(network.state_dict())
    own = local if domains else {k: t for k, t in local.items() if "@" not in k}
    return {**shared, **own}, network
