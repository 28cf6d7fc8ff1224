"""Every method on the backbones: what is shared is what the method says, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import tiny_study
from uharmony_model.errors import UHarmonyError
from uharmony_model.exchange.partition import Partition
from uharmony_model.methods import EVERYTHING, METHODS, Method, Part, Place
from uharmony_model.networks import build_network
from uharmony_model.segmentation_network import SegmentationNetwork
from uharmony_model.study import Study

DOMAINS = ("a", "b")
BUILT = [(backbone, name) for backbone in ("unet", "dynunet") for name in METHODS]
CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)


def study_of(backbone: str, method: str, **network: object) -> Study:
    return tiny_study(method=method, network={"name": backbone, "features": [4, 8, 16], **network})


def build(backbone: str, method: str, **network: object) -> tuple[SegmentationNetwork, Partition]:
    study = study_of(backbone, method, **network)
    try:
        model = build_network(study, DOMAINS, seed=0)
    except (UHarmonyError, KeyError, NotImplementedError):
        if METHODS[method].backbone is None:
            raise
        pytest.skip(f"{METHODS[method].backbone} is not built yet")
    return model, Partition.of(model, METHODS[method].local)


def keys_of(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> set[str]:
    """The state-dict keys of the modules' own tensors."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if wanted(module)
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }


def of(*kinds: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kinds)


def image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 16, 8, 8, generator=generator)


@pytest.mark.parametrize(("backbone", "method"), BUILT)
def test_every_method_builds_and_splits_completely(backbone, method):
    model, partition = build(backbone, method)
    generator = torch.Generator().manual_seed(1)
    state = {
        k: torch.rand(v.shape, generator=generator) if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    shared, local = set(partition.shared_keys), set(partition.local_keys)
    assert not shared & local
    assert shared | local == set(state)
    parts = partition.split(state)
    merged = partition.merge(*parts)
    assert list(merged) == list(state)
    assert all(torch.equal(merged[key], state[key]) for key in state)
    if METHODS[method].backbone is not None:
        return  # of another size
    logits = model.eval()(image(), torch.tensor([0, 1]))
    assert logits.shape == (2, 2, 16, 8, 8)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("backbone", ["unet", "dynunet"])
def test_what_is_kept_is_what_the_method_says(backbone):
    def kept(method: str) -> set[str]:
        return set(build(backbone, method)[1].local_keys)

    def of_norms(method: str, *kinds: type[nn.Module]) -> set[str]:
        return keys_of(build(backbone, method)[0], of(*kinds))

    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for method in ("fedavg", "fedprox", "fedadam", "ditto", "fedavg-revin", "uharmony-averaged"):
        assert kept(method) == set(), method
    assert kept("fedbn-in") == of_norms("fedbn-in", nn.InstanceNorm3d) != set()
    norms = of_norms("fedbn", nn.BatchNorm3d)
    assert kept("fedbn") == norms != set()
    assert {key.rpartition(".")[2] for key in norms} == {"weight", "bias", *statistics}
    assert kept("silobn") == {key for key in norms if key.endswith(statistics)}
    # A counter of batches is no mean of anything: it stays under every method.
    assert kept("fedavg-bn") == {key for key in norms if key.endswith("num_batches_tracked")}
    for method in ("local", "pooled", "pooled-uharmony"):
        assert kept(method) == set(build(backbone, method)[0].state_dict()), method
    names = {key.rpartition(".")[2] for key in kept("uharmony")}
    assert names == {"gain", "shift", "rho", "lam", "weight_residual", "kernel_residual"}


@pytest.mark.parametrize("backbone", ["unet", "dynunet", "segresnet"])
def test_layer_norms_see_channels_and_space_together(backbone):
    plain, partition = build(backbone, "fedbn-in", norm="layer")
    norms = [m for m in plain.modules() if isinstance(m, nn.GroupNorm)]
    others = of(nn.InstanceNorm3d, nn.BatchNorm3d)
    assert norms
    assert not any(others(m) for m in plain.modules())
    assert set(partition.local_keys) == keys_of(plain, of(nn.GroupNorm))
    x = image()[:, :, :8] * torch.arange(1.0, 9.0).view(1, 1, 8, 1, 1)
    wide = x.expand(-1, norms[0].num_channels, -1, -1, -1) * 3 + 1
    seen = norms[0](wide).detach()
    assert seen.mean((1, 2, 3, 4)) == pytest.approx(0.0, abs=1e-4)
    assert seen.var((1, 2, 3, 4), unbiased=False) == pytest.approx(1.0, abs=1e-3)
    assert not any(
        isinstance(m, nn.GroupNorm) for m in build(backbone, "uharmony", norm="layer")[0].modules()
    )


def order_of_use(model: SegmentationNetwork) -> list[str]:
    """Paths of the modules with parameters of their own, as a forward pass comes to them."""
    used: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: used.append(path))
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    model.eval()(image())
    for handle in handles:
        handle.remove()
    return used


@pytest.mark.parametrize("units", [0, 1, 2])
@pytest.mark.parametrize("norm", ["instance", "batch", "layer"])
@pytest.mark.parametrize("backbone", ["unet", "dynunet", "segresnet"])
def test_the_local_block_is_the_first_or_the_last_that_is_used(backbone, norm, units):
    for method, first in (("lg-fedavg", True), ("fedper", False), ("fedrep", False)):
        model, partition = build(backbone, method, norm=norm, residual_units=units)
        local = set(partition.local_keys)
        counters = {k for k in model.state_dict() if k.endswith("num_batches_tracked")}
        paths = {key.rpartition(".")[0] for key in local - counters}
        used = order_of_use(model)
        ends = used[: len(paths)] if first else used[-len(paths) :]
        assert set(ends) == paths, method
        assert 0 < len(paths) < len(used), method
        # Whole modules stay: weights, norms and their statistics alike.
        whole = {k for k in model.state_dict() if k.rpartition(".")[0] in paths}
        assert local == whole | counters, method
        ends_of = [model.get_submodule(path) for path in (used[0], used[-1])]
        if first:
            assert next(ends_of[0].parameters()).shape[1] == 1  # it sees the image
        else:
            assert any(
                isinstance(m := model.get_submodule(p), CONVOLUTIONS) and m.out_channels == 2
                for p in paths
            )


@pytest.mark.parametrize("backbone", ["unet", "dynunet"])
def test_the_arms_start_from_the_same_convolutions(backbone):
    def kernels(method: str) -> list[Tensor]:
        model, _ = build(backbone, method)
        return [m.weight for m in model.modules() if isinstance(m, CONVOLUTIONS)]

    wanted = kernels("fedavg")
    for method, plan in METHODS.items():
        if plan.backbone is None:
            found = kernels(method)
            assert len(found) == len(wanted), method
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True)), method


@pytest.mark.parametrize("backbone", ["unet", "dynunet"])
def test_a_harmonised_network_of_one_norm_computes_what_the_plain_one_does(backbone):
    plain, _ = build(backbone, "fedavg")
    for method in ("uharmony", "uharmony-averaged", "pooled-uharmony"):
        model, _ = build(backbone, method)
        found = model.eval()(image(), torch.tensor([0, 1]))
        torch.testing.assert_close(found, plain.eval()(image()), rtol=1e-3, atol=1e-4)


def test_methods_serve_unseen_sites_only_where_what_is_local_is_a_residual():
    def serves(method: Method) -> bool:
        return method.serves_unseen

    without = {name for name, method in METHODS.items() if not serves(method)}
    assert without == {
        *("local", "pooled", "pooled-uharmony", "fedbn", "fedbn-in", "silobn", "gperxan"),
        *("fedper", "fedrep", "lg-fedavg", "u2net", "u2net-pooled", "labelled-only", "adabn"),
        *("mean-teacher", "fixmatch", "entropy-min", "ust-run", "glua"),
    }
    assert all(METHODS[n].local == EVERYTHING for n in ("local", "pooled", "u2net-pooled"))


def test_no_part_and_no_place_share_a_name():
    """Both stand in one set of texts, where equal texts would be one thing."""
    assert not {str(part) for part in Part} & {str(place) for place in Place}
