"""A trained model with one class, modality or domain more: the old outputs stay to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from uharmony_model.errors import ConfigError
from uharmony_model.exchange.partition import Partition
from uharmony_model.extension import extend_state, frozen_keys, hold_old, keep_apart, new_entries
from uharmony_model.losses import segmentation_loss
from uharmony_model.networks import build_network
from uharmony_model.presence import with_presence
from uharmony_model.study import Study
from uharmony_model.targets import to_masks

FEATURES = {"unet": (4, 8), "dynunet": (5, 6, 8)}
EACH = pytest.mark.parametrize("name", list(FEATURES))
CLASSES = {"liver": 1, "spleen": 2}
MODALITIES = ("ct", "pt")


def study(
    name: str,
    method: str = "uharmony",
    *,
    classes: dict[str, int] | None = None,
    modalities: tuple[str, ...] = MODALITIES,
    overlapping: bool = False,
    presence: bool = True,
    **network,
) -> Study:
    return Study.model_validate(
        {
            "name": "test",
            "method": method,
            "task": {
                "classes": classes or CLASSES,
                "overlapping": overlapping,
                "channels": len(modalities),
                "presence": presence,
                "intensity": {m: {"policy": "zscore"} for m in modalities},
            },
            "network": {"name": name, **({"features": FEATURES[name]} | network)},
        }
    )


def named(network: nn.Module, chosen: Study) -> dict[str, Tensor]:
    shared, local = Partition.of(network, chosen.plan.local).split(network.state_dict())
    return {**shared, **local}


def loaded(
    old: Study, chosen: Study, state: dict[str, Tensor], domains: tuple[str, ...] = ("a", "b")
) -> nn.Module:
    network = build_network(chosen, domains, seed=3)
    keep_apart(network, old, chosen)
    partition = Partition.of(network, chosen.plan.local)
    shared = {key: state[key] for key in partition.shared_keys}
    local = {key: state[key] for key in partition.local_names}
    network.load_state_dict(partition.merge(shared, local))
    return network.eval()


def trained(chosen: Study, domains: tuple[str, ...] = ("a", "b")) -> nn.Module:
    """A network whose tensors are all away from where they started."""
    network = build_network(chosen, domains, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    return network


def images(channels: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 16, 16, 16, generator=generator)


def given(chosen: Study, image: Tensor, missing: tuple[str, ...] = ()) -> Tensor:
    """The input of an old site: images by name, zero and masked where it has none."""
    names = list(chosen.task.intensity)
    whole = torch.zeros(len(image), len(names), *image.shape[2:])
    have = [name for name in names if name not in missing]
    for source, name in enumerate(have):
        whole[:, names.index(name)] = image[:, source]
    return with_presence(whole, [[name in have for name in names]] * len(image), chosen.task)


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits without a domain and of each old domain; of both samples together and of one."""
    with torch.no_grad():
        choices = [None, torch.tensor([0, 0]), torch.tensor([1, 1])]
        together = [network(x, choice) for choice in choices]
        return together + [network(x[:1], None if c is None else c[:1]) for c in choices]


def learn(network: nn.Module, chosen: Study, x: Tensor, entries: dict[str, Tensor]) -> None:
    """Some steps with weight decay on a label of the last class; only the new may move."""
    label = torch.zeros(2, 16, 16, 16, dtype=torch.uint8)
    label[:, 4:12, 4:12, 4:12] = max(v for (v,) in chosen.task.classes.values())
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05, weight_decay=0.1)
    hold_old(network, optimizer, entries)
    network.train()
    domain = torch.tensor([len(network.domains) - 1] * 2)  # type: ignore[arg-type]
    for _ in range(3):
        optimizer.zero_grad()
        segmentation_loss(network(x, domain), label, chosen.task).backward()
        optimizer.step()
    network.eval()


@EACH
@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("method", ["uharmony", "fedavg"])
def test_a_new_class_leaves_the_logits_of_the_old_ones(name, overlapping, method):
    old = study(name, method, overlapping=overlapping)
    new = study(name, method, overlapping=overlapping, classes={**CLASSES, "tumour": 3})
    before = trained(old)
    network = loaded(old, new, extend_state(old, new, named(before, old)))
    x = given(old, images(2))
    expected, count = outputs(before, x), old.task.outputs
    for ours, theirs in zip(outputs(network, x), expected, strict=True):
        assert ours.shape[1] == count + 1
        assert torch.equal(ours[:, :count], theirs)
    entries = new_entries(old, new, ("a", "b"))
    first = outputs(network, x)
    learn(network, new, x, entries)
    for ours, theirs, start in zip(outputs(network, x), expected, first, strict=True):
        assert torch.equal(ours[:, :count], theirs)
        assert not torch.allclose(ours[:, count:], start[:, count:], atol=1e-3)
        if not overlapping:
            # The new class takes the same share from all: ratios of the old ones stay.
            shared, alone = ours.softmax(1)[:, :count], theirs.softmax(1)
            torch.testing.assert_close(shared / shared.sum(1, keepdim=True), alone)
        found, kept = to_masks(ours, new.task), to_masks(theirs, old.task)
        taken = torch.zeros_like(found[:, 2:]) if overlapping else found[:, 2:]
        assert torch.equal(found[:, :2], kept & ~taken)


@EACH
@pytest.mark.parametrize("modality", ["mr", "aa", "zz"])
def test_a_new_modality_leaves_the_old_sites_where_they_were(name, modality):
    old, new = study(name), study(name, modalities=(*MODALITIES, modality))
    before = trained(old)
    network = loaded(old, new, extend_state(old, new, named(before, old)))
    x = images(2)
    here, there = given(old, x), given(new, x, missing=(modality,))
    expected = outputs(before, here)
    for ours, theirs in zip(outputs(network, there), expected, strict=True):
        assert torch.equal(ours, theirs)
    start = outputs(network, given(new, images(3)))
    learn(network, new, given(new, images(3)), new_entries(old, new, ("a", "b")))
    for ours, theirs in zip(outputs(network, there), expected, strict=True):
        assert torch.equal(ours, theirs)
    moved = outputs(network, given(new, images(3)))
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(moved, start, strict=True))


@EACH
def test_a_channel_more_without_masks_starts_unseen(name):
    old = study(name, modalities=("ct", "pt"), presence=False)
    new = Study.model_validate(old.model_dump() | {"task": old.task.model_dump() | {"channels": 3}})
    before = trained(old)
    network = loaded(old, new, extend_state(old, new, named(before, old)))
    x = images(3)
    for ours, theirs in zip(outputs(network, x), outputs(before, x[:, :2]), strict=True):
        assert torch.equal(ours, theirs)


@EACH
def test_a_new_domain_changes_nothing_for_the_old_ones(name):
    old = study(name)
    before = trained(old)
    state = extend_state(old, old, named(before, old), domains=("c",))
    network = loaded(old, old, state, ("a", "b", "c"))
    x = given(old, images(2))
    expected = outputs(before, x)
    for ours, theirs in zip(outputs(network, x), expected, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        fresh = network(x, torch.tensor([2, 2]))
    torch.testing.assert_close(fresh, expected[0], rtol=1e-4, atol=1e-4)  # residuals are zero
    learn(network, old, x, new_entries(old, old, ("a", "b"), ("c",)))
    for ours, theirs in zip(outputs(network, x), expected, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert not torch.allclose(network(x, torch.tensor([2, 2])), fresh, atol=1e-3)


def test_a_domain_of_3d_u2net_is_added_with_everything_else_held():
    old = study("unet", "u2net")
    before = trained(old)
    state = extend_state(old, old, named(before, old), domains=("c",))
    network = loaded(old, old, state, ("a", "b", "c"))
    x = given(old, images(2))
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    learn(network, old, x, new_entries(old, old, ("a", "b"), ("c",)))
    with torch.no_grad():
        for domain in (torch.tensor([0, 0]), torch.tensor([1, 1])):
            assert torch.equal(network(x, domain), before(x, domain))
    state = network.state_dict()
    moved = {key for key, tensor in state.items() if not torch.equal(tensor, start[key])}
    partition = Partition.of(network, old.plan.local)
    assert moved
    assert moved <= set(partition.local_keys)


def test_running_statistics_are_held_too():
    old = study("unet", "fedavg-bn")
    new = study("unet", "fedavg-bn", classes={**CLASSES, "tumour": 3})
    before = trained(old)
    network = loaded(old, new, extend_state(old, new, named(before, old)))
    x = given(old, images(2))
    learn(network, new, x, new_entries(old, new, ("a", "b")))
    for ours, theirs in zip(outputs(network, x), outputs(before, x), strict=True):
        assert torch.equal(ours[:, :3], theirs)


def test_what_is_new_is_counted_by_hand():
    """A dynunet's head is one 1x1x1 convolution of 5 features; its residuals have K = 2 domains."""
    layer = {"residuals": ["phi", "stem", "head"]}
    old = study("dynunet", harmonization=layer)
    new = study("dynunet", harmonization=layer, classes={**CLASSES, "tumour": 3})
    entries = new_entries(old, new, ("a", "b"))
    network = build_network(new, ("a", "b"), seed=0)
    assert entries.keys() == network.state_dict().keys()
    # Weight and bias of one row, and of its residual in both domains.
    assert sum(int(mask.sum()) for mask in entries.values()) == 3 * (5 + 1)
    held = frozen_keys(entries)
    assert {key for key in entries if key not in held} == {
        key for key in entries if ".output_block." in f".{key}"
    }
    with_modality = study("dynunet", harmonization=layer, modalities=(*MODALITIES, "mr"))
    columns = new_entries(old, with_modality, ("a", "b"))
    stem = {key: mask for key, mask in columns.items() if mask.any()}
    for key, mask in stem.items():
        # Of ct, mr, pt and their masks, the second of each is new.
        axis = 2 if key.endswith("weight_residual") else 1
        assert mask.shape[axis] == 6
        flags = mask.movedim(axis, 0).flatten(1)
        assert flags.all(dim=1).tolist() == flags.any(dim=1).tolist()
        assert flags.all(dim=1).tolist() == [False, True, False, False, True, False]
    assert stem


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"classes": {"spleen": 2, "liver": 1, "tumour": 3}}, "have to come first"),
        ({"classes": {"liver": 1}}, "have to come first"),
        ({"modalities": ("ct",)}, "have to stay as they are"),
        ({"overlapping": True}, "task.overlapping was False and is True"),
        ({"method": "fedavg"}, "method was uharmony and is fedavg"),
        ({"residual_units": 0}, "network was"),
    ],
)
def test_another_study_is_no_extension(changes, expected):
    old = study("unet")
    with pytest.raises(ConfigError, match=expected):
        extend_state(old, study("unet", **changes), named(trained(old), old))


def test_a_state_of_another_model_and_a_known_domain_are_refused():
    old = study("unet")
    state = named(trained(old), old)
    with pytest.raises(ConfigError, match=r"\['a'\] are not new"):
        extend_state(old, old, state, domains=("a", "c"))
    with pytest.raises(ConfigError, match="no tensor of the old study's network"):
        extend_state(old, old, {**state, "other": torch.zeros(1)})


def test_a_network_that_would_be_built_otherwise_is_refused():
    # A residual block has a convolution in its skip only where the channels change: 4 to 4 has not.
    old = study("dynunet", features=(4, 6, 8))
    new = study("dynunet", modalities=(*MODALITIES, "mr"), features=(4, 6, 8))
    with pytest.raises(ConfigError, match=r"conv3.*built otherwise"):
        extend_state(old, new, named(trained(old), old))


def test_a_grown_convolution_is_the_plain_one_up_to_rounding():
    new = study("unet", classes={**CLASSES, "tumour": 3}, modalities=(*MODALITIES, "mr"))
    plain = build_network(new, ("a", "b"), seed=0).eval()
    network = build_network(new, ("a", "b"), seed=0).eval()
    entries = new_entries(study("unet"), new, ("a", "b"))
    with torch.no_grad():
        for key, tensor in plain.state_dict().items():
            if ".2.1." in key and tensor.ndim == 5:
                tensor[:3, 3] = 0  # what an old class takes of a new one
    keep_apart(network, study("unet"), new)
    assert network.state_dict().keys() == plain.state_dict().keys() == entries.keys()
    network.load_state_dict(plain.state_dict())
    x = given(new, images(3))
    for ours, theirs in zip(outputs(network, x), outputs(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
