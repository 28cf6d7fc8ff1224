"""3D U2-Net: its published counts, a slow reference of it, and what a domain has for itself."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.blobs import volumes
from tests.support.tiny import tiny_study
from uharmony_client.local_train import train_round
from uharmony_client.training_steps import LocalData
from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.errors import ConfigError, NetworkError
from uharmony_model.exchange.partition import Partition, part_of
from uharmony_model.exchange.schema import flatten
from uharmony_model.harmonize import stacked_keys
from uharmony_model.initial import initial_weights
from uharmony_model.methods import EVERYTHING, METHODS, Part
from uharmony_model.network_settings import Network
from uharmony_model.networks import build_network, check_patch, patch_multiple
from uharmony_model.study import Study
from uharmony_model.u2net import U2Net
from uharmony_model.u2net_blocks import DomainConv, DomainNorm

LOCAL = METHODS["u2net"].local
OUTPUTS = 3


def study(*features: int, channels: int = 2) -> Study:
    return Study.model_validate(
        {
            "name": "test",
            "method": "u2net",
            "task": {
                "classes": {"core": 1, "edge": 2},
                "channels": channels,
                "intensity": {"mr": {"policy": "zscore"}},
            },
            "network": {"features": features},
        }
    )


def build(*features: int, k: int = 2, seed: int = 0) -> U2Net:
    names = [f"domain-{index}" for index in range(k)]
    built = build_network(study(*(features or (2, 3, 5))), names, seed=seed)
    assert isinstance(built, U2Net)
    return built


def scrambled(*features: int, k: int = 2) -> U2Net:
    """In float64, all tensors different from their start, and every domain's from the others'."""
    model = build(*features, k=k).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    return model


def draw(batch: int, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, *(size or (12, 4, 4)), generator=generator).double()


# --- the counts ------------------------------------------------------------------------------


def test_the_published_counts_at_base_width_16_and_depth_6():
    """5,853,840 shared; about 144,600 a task; 6.58 M for five tasks of one channel, two outputs.

    By hand, for a unit from a to b channels: pointwise ab + b shared; depthwise 27a + a, norms
    2a + 2b of the domain. A strided convolution has 27ab + b shared, and a norm of 2b.
    """
    f = [16 * 2**level for level in range(6)]
    pairs = list(itertools.pairwise(f))
    units = [(a, a) for a in f] * 2
    units += [unit for a, b in pairs for unit in ((b, a), (2 * a, a), (a, a))]
    shared = sum(a * b + b for a, b in units) + sum(27 * a * b + b for a, b in pairs)
    domain = sum(30 * a + 2 * b for a, b in units) + sum(2 * b for _, b in pairs)
    domain += 27 * f[0] + 3 * f[0]  # stem of one channel, with its norm
    domain += 2 * f[0] + 2  # head
    domain += sum(2 * f[level] + 2 + 4 for level in (1, 2))  # auxiliary heads with their norms
    assert (shared, domain) == (5_853_840, 144_590)

    tasks = 5
    model = U2Net(channels=1, outputs=2, features=f, domains=[f"task-{n}" for n in range(tasks)])
    parts, state = part_of(model), model.state_dict()
    counted = dict.fromkeys(Part, 0)
    for key, part in parts.items():
        counted[part] += state[key].numel()
    assert counted.pop(Part.BACKBONE) == shared
    assert counted.pop(Part.DOMAIN) == tasks * domain
    assert not any(counted.values())
    assert round(sum(t.numel() for t in state.values()) / 1e6, 2) == 6.58


# --- what it computes ------------------------------------------------------------------------


class Reference:
    """The network of one domain, from the paper's blocks and plain functions, without a class."""

    def __init__(self, model: U2Net, domain: int) -> None:
        stacked = stacked_keys(model)
        self.state = {
            key.removeprefix("network."): tensor[domain] if key in stacked else tensor
            for key, tensor in model.state_dict().items()
        }

    def conv(self, name: str, x: Tensor, **options) -> Tensor:
        return F.conv3d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.mean((2, 3, 4), keepdim=True)
        variance = (x - mean).square().mean((2, 3, 4), keepdim=True)
        scale, shift = (self.state[f"{name}.{n}"].view(1, -1, 1, 1, 1) for n in ("weight", "bias"))
        y: Tensor = scale * (x - mean) / (variance + 1e-5).sqrt() + shift
        return y

    def act(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.01 * x)

    def own(self, name: str, x: Tensor, padding: int) -> Tensor:
        return self.act(self.norm(f"{name}.norm", self.conv(f"{name}.conv", x, padding=padding)))

    def unit(self, name: str, x: Tensor) -> Tensor:
        planes = [  # depthwise: every channel for itself
            F.conv3d(
                x[:, c : c + 1],
                self.state[f"{name}.depthwise.weight"][c : c + 1],
                self.state[f"{name}.depthwise.bias"][c : c + 1],
                padding=1,
            )
            for c in range(x.shape[1])
        ]
        inner = self.act(self.norm(f"{name}.inner", torch.cat(planes, 1)))
        return self.norm(f"{name}.outer", self.conv(f"{name}.pointwise", inner))

    def strided(self, name: str, x: Tensor) -> Tensor:
        grown = torch.zeros(*x.shape[:2], *(edge + 1 for edge in x.shape[2:]), dtype=x.dtype)
        grown[..., :-1, :-1, :-1] = x
        return self.act(self.norm(f"{name}.norm", self.conv(f"{name}.conv", grown, stride=2)))

    def doubled(self, x: Tensor) -> Tensor:
        for axis in (2, 3, 4):
            x = x.repeat_interleave(2, dim=axis)
        return x

    def logits(self, x: Tensor, levels: int) -> Tensor:
        x = self.own("stem", x, padding=1)
        skips = []
        for level in range(levels):
            inside = self.act(self.unit(f"encoder.{level}.first", x))
            x = self.act(x + self.unit(f"encoder.{level}.second", inside))
            if level < levels - 1:
                skips.append(x)
                x = self.strided(f"down.{level}", x)
        results = {}
        for level in range(levels - 2, -1, -1):
            x = self.act(self.unit(f"decoder.{level}.narrow", self.doubled(x)))
            x = self.act(self.unit(f"decoder.{level}.first", torch.cat((x, skips[level]), 1)))
            x = results[level] = self.act(self.unit(f"decoder.{level}.second", x))
        total = self.conv("head", x)
        if levels > 2:
            small = self.own("auxiliary.1", results[1], padding=0)
            if levels > 3:
                small = small + self.doubled(self.own("auxiliary.2", results[2], padding=0))
            total = total + self.doubled(small)
        return total


@pytest.mark.parametrize(
    "features", [(3, 4), (2, 3, 5), (2, 4, 3, 5)], ids=["two", "three", "four"]
)
def test_each_domain_computes_what_the_papers_blocks_say(features):
    model, edge = scrambled(*features), 2 ** (len(features) - 1)
    assert sorted(model.network.get_submodule("auxiliary")._modules) == {2: [], 3: ["1"]}.get(
        len(features), ["1", "2"]
    )
    x = draw(1, 3 * edge, edge, 2 * edge)
    for k in (0, 1):
        expected = Reference(model, k).logits(x, len(features))
        assert expected.shape == (1, OUTPUTS, *x.shape[2:])
        torch.testing.assert_close(model(x, torch.tensor([k])), expected)


def test_a_mixed_batch_is_its_samples_one_by_one():
    model, x, domain = scrambled(k=3), draw(4), torch.tensor([2, 0, 2, 1])
    direction = torch.linspace(-1, 1, 4 * OUTPUTS * x[0, 0].numel()).double()
    direction = direction.view(4, OUTPUTS, *x.shape[2:])
    y = model(x, domain)
    mixed = torch.autograd.grad((y * direction).sum(), list(model.parameters()))
    single = torch.cat([model(x[b : b + 1], domain[b : b + 1]) for b in range(4)])
    torch.testing.assert_close(y, single)
    summed = torch.autograd.grad((single * direction).sum(), list(model.parameters()))
    for (name, _), got, expected in zip(model.named_parameters(), mixed, summed, strict=True):
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-9), name


def test_a_row_of_weights_mixes_the_tensors_and_not_the_outputs():
    model, x = scrambled(k=2), draw(2)
    rows = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).double()
    y = model(x, rows)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for key in stacked_keys(average):
            tensor = average.get_parameter(key)
            tensor[0] = 0.25 * tensor[0] + 0.75 * tensor[1]
    first = torch.tensor([0])
    torch.testing.assert_close(y[:1], average(x[:1], first))
    torch.testing.assert_close(y[1:], model(x[1:], first))
    assert not torch.allclose(y[:1], model(x[:1], first))


def test_drop_changes_nothing_and_a_copy_has_a_switch_of_its_own():
    model, x = scrambled(), draw(1)
    domain, other = torch.tensor([0]), torch.tensor([1])
    y = model(x, domain)
    assert torch.equal(model(x, domain, drop=True), y)
    twin = copy.deepcopy(model)
    twin(x, other)
    assert torch.equal(model.network(x), y)  # still set to its own domain
    assert torch.equal(twin(x, domain), y)


def test_under_autocast_norms_stay_in_float32():
    model = build()
    x, domain = draw(2).float(), torch.tensor([0, 1])
    expected = model(x, domain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x, domain)
    assert y.dtype == torch.bfloat16
    # Eight bits of mantissa in each of some forty layers add up; anything wrong would be near 1.
    off = (y.float() - expected).detach()
    assert float(off.norm() / expected.detach().norm()) < 0.3

    switch = DomainSwitch()
    norm = DomainNorm(1, domains=2, switch=switch)
    switch.selection = Selection.of(torch.tensor([1]), 2)
    fine = 1 + 2**-10  # bfloat16 has steps of 2^-7 there
    with torch.no_grad():
        norm.bias.fill_(fine)
    ramp = torch.linspace(-1, 1, 8).view(1, 1, 2, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(norm(ramp).detach().mean()) == pytest.approx(fine, abs=1e-6)


# --- how it starts ---------------------------------------------------------------------------


def test_the_seed_alone_decides_the_start_and_all_domains_start_alike():
    first, same, more, other = build(), build(), build(k=5), build(seed=1)
    stacked, differing = stacked_keys(first), 0
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[key])
        many = more.state_dict()[key]
        wanted = tensor[:1].expand_as(many) if key in stacked else tensor
        assert torch.equal(many, wanted), key
        differing += not torch.equal(tensor, other.state_dict()[key])
    convolutions = [m for m in first.modules() if isinstance(m, nn.Conv3d | DomainConv)]
    assert differing == len(convolutions)


def test_kernels_start_normal_after_he_and_biases_at_zero():
    model = build(16, 32)
    for name, deviation in {
        "network.down.0.conv.weight": math.sqrt(2 / (27 * 16)),
        "network.encoder.1.first.pointwise.weight": math.sqrt(2 / 32),
        "network.encoder.1.first.depthwise.weight": math.sqrt(2 / 27),
    }.items():
        tensor = model.get_parameter(name)
        assert float(tensor.detach().std()) == pytest.approx(deviation, rel=0.1), name
    for key, tensor in model.state_dict().items():
        if key.endswith("bias"):
            assert not tensor.any(), key
        elif key.split(".")[-2] in ("inner", "outer", "norm"):
            assert bool((tensor == 1).all()), key


def test_building_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    build()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_server_and_every_site_start_from_equal_shared_weights():
    schema, weights = initial_weights(study(2, 3))
    site = build_network(study(2, 3), ("x", "y", "z"), seed=0)
    partition = Partition.of(site, LOCAL)
    assert partition.shared_schema == schema
    shared, _ = partition.split(site.state_dict())
    assert torch.equal(flatten(shared, schema), weights)


# --- what is a domain's own ------------------------------------------------------------------


def test_a_domain_does_not_see_the_tensors_of_another():
    model, x = scrambled(k=3), draw(2)
    before = {k: model(x, torch.tensor([k, k])).detach() for k in range(3)}
    with torch.no_grad():
        for key in stacked_keys(model):
            model.get_parameter(key)[1] *= -1.5
    for k in (0, 2):
        assert torch.equal(model(x, torch.tensor([k, k])), before[k])
        mixed = model(x, torch.tensor([k, 1]))[:1]
        torch.testing.assert_close(mixed, before[k][:1])
    assert not torch.allclose(model(x, torch.tensor([1, 1])), before[1])


def test_shared_tensors_learn_from_every_domain_and_a_domains_own_from_it_alone():
    model, x = scrambled(k=2), draw(2)
    stacked = stacked_keys(model)
    gradients = []
    for k in (0, 1):
        model.zero_grad()
        y = model(x[k : k + 1], torch.tensor([k]))
        (y * torch.linspace(-1, 1, y.numel()).double().view_as(y)).sum().backward()
        named = model.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    assert len(gradients[0]) == len(list(model.parameters()))
    for name in gradients[0]:
        # The norm behind a convolution takes its bias out, in the source as here.
        owner, tensor = name.split(".")[-2:]
        dead = tensor == "bias" and owner in ("conv", "depthwise", "pointwise")
        for k in (0, 1):
            gradient = gradients[k][name]
            if name in stacked:
                assert not gradient[1 - k].any(), name
                gradient = gradient[k]
            assert bool(gradient.abs().max() > 1e-9) != dead, name


def test_the_partition_shares_pointwise_and_strided_convolutions_and_nothing_else():
    model = build(2, 3, 5, 4, k=2)
    partition = Partition.of(model, LOCAL)
    shared = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv3d)
        for name in ("weight", "bias")
    }
    units = 2 * 4 + 3 * 3
    assert set(partition.shared_keys) == shared
    assert len(shared) == 2 * (units + 3)
    assert all(key.split(".")[-2] in ("pointwise", "conv") for key in shared)
    assert set(partition.local_keys) == stacked_keys(model) == set(model.state_dict()) - shared
    assert len(partition.local_names) == 2 * len(partition.local_keys)

    state = model.state_dict()
    parts = partition.split(state)
    merged = partition.merge(*parts)
    assert all(torch.equal(merged[key], tensor) for key, tensor in state.items())
    assert Partition.of(model, EVERYTHING).shared_keys == ()
    assert not METHODS["u2net"].serves_unseen


def test_a_domain_added_later_changes_nothing_for_the_old_ones():
    """The new domain is trained with all that is shared frozen, then put beside the old ones."""
    trained, x = scrambled(k=2).float(), draw(2).float()
    before = [trained(x, torch.tensor([k, k])).detach() for k in (0, 1)]
    shared, local = Partition.of(trained, LOCAL).split(trained.state_dict())

    alone = build_network(study(2, 3, 5), ("new",), seed=0)
    partition = Partition.of(alone, LOCAL)
    start = partition.split(alone.state_dict())[1]
    start = {key: tensor.clone() for key, tensor in start.items()}
    alone.load_state_dict(partition.merge(shared, start))
    for name, parameter in alone.named_parameters():
        parameter.requires_grad_(name in stacked_keys(alone))
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(alone(x, torch.tensor([0, 0])), (x[:, 0] > 0).long())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    kept, new = partition.split(alone.state_dict())
    assert all(torch.equal(kept[key], shared[key]) for key in shared)

    grown = build_network(study(2, 3, 5), (*trained.domains, "new"), seed=0)
    grown.load_state_dict(Partition.of(grown, LOCAL).merge(shared, {**local, **new}))
    for k, expected in enumerate(before):
        assert torch.equal(grown(x, torch.tensor([k, k])), expected)
    added = torch.tensor([2, 2])
    torch.testing.assert_close(grown(x, added), alone(x, torch.tensor([0, 0])))


# --- in use ----------------------------------------------------------------------------------


@pytest.mark.parametrize("domains", [("alpha",), ("x", "y")])
def test_a_round_trains_both_parts_and_repeats_to_the_bit(domains):
    plan = tiny_study(method="u2net", network={"features": [2, 4]})

    def once():
        network = build_network(plan, domains, seed=plan.seed)
        partition = Partition.of(network, LOCAL)
        shared, before = partition.split(network.state_dict())
        before = {key: tensor.clone() for key, tensor in before.items()}
        result = train_round(
            network,
            LocalData("alpha", volumes(), [0, len(domains) - 1, 0], torch.tensor([True])),
            study=plan,
            partition=partition,
            base=flatten(shared, partition.shared_schema),
            before=before,
            round_=1,
        )
        return partition, before, result

    partition, before, first = once()
    again = once()[2]
    assert float(first.update.abs().max()) > 0
    assert torch.equal(first.update, again.update)
    assert all(torch.equal(first.local[key], again.local[key]) for key in first.local)
    heads = [f"network.head.weight@{name}" for name in domains]
    assert set(heads) <= set(partition.local_names) == set(before)
    assert all(not torch.equal(first.local[key], before[key]) for key in heads)


@pytest.mark.parametrize(
    ("domain", "what"),
    [
        (None, "got none"),
        (torch.tensor([-1, -1]), r"got -1 \(unseen\)"),
        (torch.tensor([0, -1]), r"got -1 \(unseen\)"),
        (torch.tensor([0, 2]), "domain index 2 with 2 domains"),
        (torch.tensor([0]), "for 2 samples"),
        (torch.tensor([[0.5, 0.5], [0.5, 0.2]]), "sum to less than 1"),
        (torch.zeros(2, 2), "sum to less than 1"),
    ],
)
def test_without_a_known_domain_there_is_nothing_to_compute_with(domain, what):
    with pytest.raises(NetworkError, match=what):
        build()(draw(2).float(), domain)


def test_a_layer_that_was_told_no_domain_says_so():
    with pytest.raises(NetworkError, match="3D U2-Net needs to know the domain"):
        build().network(draw(1).float())


def test_patches_are_multiples_of_its_own_strides():
    assert build(2, 3, 5).multiple == patch_multiple(Network(features=(2, 3, 5)), "u2net") == 4
    # Swin UNETR halves five times; where the method brings 3D U2-Net that does not count.
    network = Network(name="swinunetr", features=(12, 24))
    check_patch(network, (6, 2, 2), "u2net")
    with pytest.raises(ConfigError, match=r"training.patch \(swinunetr\).*multiple of 32"):
        check_patch(network, (6, 2, 2))
    with pytest.raises(ConfigError, match=r"training.patch \(u2net\).*multiple of 2"):
        check_patch(network, (6, 3, 2), "u2net")
    with pytest.raises(NetworkError, match="multiple of 4"):
        build(2, 3, 5)(draw(1, 12, 4, 6).float(), torch.tensor([0]))


def test_it_takes_of_the_studys_network_the_channels_alone():
    content = study(12, 24).model_dump()
    content["network"] = {**content["network"], "name": "swinunetr", "norm": "batch"}
    model = build_network(Study.model_validate(content), ("a", "b"), seed=0)
    expected = build(12, 24).state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in model.state_dict().items())
    assert set(part_of(model).values()) == study(12, 24).parts == {Part.BACKBONE, Part.DOMAIN}


def test_presence_masks_are_channels_of_the_stem():
    content = study(2, 3).model_dump()
    content["task"] |= {
        "presence": True,
        "intensity": {"ct": {"policy": "zscore"}, "mr": {"policy": "zscore"}},
    }
    model = build_network(Study.model_validate(content), ("a",), seed=0)
    assert model.get_parameter("network.stem.conv.weight").shape == (1, 2, 4, 3, 3, 3)
