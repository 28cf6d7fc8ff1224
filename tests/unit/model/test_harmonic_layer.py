"""The layer against a slow reference of its formula, sample by sample and channel by channel."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.errors import NetworkError
from uharmony_model.harmonic_layer import HarmonicNorm, Stage2

K = 3
READINGS: tuple[Stage2, ...] = ("free", "affine", "revin", "off")
DOMAINS = {
    "unselected": None,
    "uniform": [1, 1, 1],
    "mixed": [2, 0, 1],
    "some unseen": [0, -1, 2],
}


def make(channels: int = 4, seed: int = 0, **options) -> HarmonicNorm:
    """A layer whose every parameter is random, in float64."""
    layer = HarmonicNorm(channels, domains=K, switch=DomainSwitch(), **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return layer


def draw(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 + 1


def select(layer: HarmonicNorm, domain: list[int] | None) -> None:
    layer.switch.selection = None if domain is None else Selection.of(torch.tensor(domain), K)


def reference(layer: HarmonicNorm, x: Tensor, domain: list[int] | None) -> Tensor:
    """y of x (B, C, ...) by the formula; Hermite polynomials by their recurrence."""
    samples = []
    for b, sample in enumerate(x):
        channels = []
        for c, values in enumerate(sample):
            mean = values.mean()
            sigma = ((values - mean).square().mean() + layer.eps).sqrt()
            z = (values - mean) / sigma
            hermite = [torch.ones_like(z), z]
            for p in range(1, layer.order):
                hermite.append(z * hermite[p] - p * hermite[p - 1])
            h = sum(a * he for a, he in zip(layer.polynomial[:, c], hermite, strict=True))
            log_s = torch.zeros((), dtype=x.dtype)
            m = torch.zeros((), dtype=x.dtype)
            # The statistics of stage 2 are constants to the gradient.
            log_sigma, mu = sigma.detach().log(), mean.detach()
            if layer.stage2 == "revin":
                log_s, m = log_s + log_sigma, m + mu
            k = -1 if domain is None else domain[b]
            if k >= 0 and layer.stage2 != "off":
                log_s, m = log_s + layer.gain[k, c], m + layer.shift[k, c]
            if k >= 0 and layer.stage2 == "free":
                log_s, m = log_s + layer.rho[k, c] * log_sigma, m + layer.lam[k, c] * mu
            channels.append(log_s.exp() * h + m)
        samples.append(torch.stack(channels))
    return torch.stack(samples)


def gradients(layer: HarmonicNorm, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    """Of a random projection of y, by name; x is `x`."""
    named = {"x": x, **dict(layer.named_parameters())}
    found = torch.autograd.grad(
        (y * draw(*y.shape, seed=2)).sum(), list(named.values()), allow_unused=True
    )
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("shape", [(3, 4, 3, 5, 2), (3, 4, 1, 1, 3), (3, 4, 7)])
@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
@pytest.mark.parametrize("stage2", READINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_the_formula_and_its_gradients(order, stage2, domain, shape):
    layer, x = make(order=order, stage2=stage2), draw(*shape).requires_grad_()
    select(layer, domain)
    y, expected = layer(x), reference(layer, x, domain)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    got, wanted = gradients(layer, x, y), gradients(layer, x, expected)
    assert got.keys() == wanted.keys()
    for name in got:
        a, b = got[name], wanted[name]
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("stage2", READINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradcheck(order, stage2):
    """Finite differences; x only where stage 2 has no statistics, which count as constants."""
    layer, x = make(2, order=order, stage2=stage2, eps=1e-3), draw(2, 2, 2, 1, 3)
    names = [name for name, _ in layer.named_parameters()]
    select(layer, [1, 0])

    def run(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return y

    x.requires_grad_(stage2 in ("affine", "off"))
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_starts_as_an_instance_norm():
    x = draw(2, 5, 3, 4, 3).float()
    layer = HarmonicNorm(5, domains=K, switch=DomainSwitch())
    torch.testing.assert_close(layer(x), nn.InstanceNorm3d(5)(x), rtol=1e-5, atol=1e-5)


def test_revin_without_residuals_is_the_identity():
    """sigma * (x - mu) / sigma + mu = x."""
    layer = HarmonicNorm(5, domains=K, switch=DomainSwitch(), stage2="revin").double()
    x = draw(2, 5, 3, 4, 3)
    torch.testing.assert_close(layer(x), x)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("stage2", READINGS)
def test_mixed_batch_equals_each_sample_alone(stage2, order):
    layer, x, domain = make(order=order, stage2=stage2), draw(4, 4, 3, 3, 2), [2, -1, 0, 2]
    select(layer, domain)
    together = layer(x)
    for b, k in enumerate(domain):
        select(layer, [k])
        torch.testing.assert_close(together[b : b + 1], layer(x[b : b + 1]))


@pytest.mark.parametrize("stage2", ["free", "affine", "revin"])
def test_domains_differ_and_the_unseen_has_no_residual(stage2):
    layer, x = make(stage2=stage2), draw(1, 4, 3, 3, 3)
    outputs = []
    for domain in ([0], [1], [-1], None):
        select(layer, domain)
        outputs.append(layer(x))
    for first, second in pairwise(outputs[:3]):
        assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(outputs[2], outputs[3])
    with torch.no_grad():
        for name in layer.stacked:
            getattr(layer, name).zero_()
    select(layer, [1])
    torch.testing.assert_close(layer(x), outputs[3])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stage2", READINGS)
def test_unselected_residuals_keep_no_gradient(stage2, order):
    layer = make(order=order, stage2=stage2)
    layer(draw(2, 4, 3, 3, 3)).sum().backward()
    assert layer.polynomial.grad is not None
    assert all(getattr(layer, name).grad is None for name in layer.stacked)


def test_only_the_selected_domain_gets_a_gradient():
    layer = make()
    select(layer, [1, 1])
    layer(draw(2, 4, 3, 3, 3)).square().sum().backward()
    for name in layer.stacked:
        rows = getattr(layer, name).grad.abs().amax(1)
        assert rows[1] > 0, name
        assert rows[0] == rows[2] == 0, name


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stage2", READINGS)
def test_channels_last_axis_equals_channels_first(stage2, order):
    first = make(order=order, stage2=stage2)
    last = make(order=order, stage2=stage2, channel_axis=-1)
    for layer in (first, last):
        select(layer, [0, 2])
    x = draw(2, 4, 3, 5, 2)
    y = last(x.movedim(1, -1))
    assert y.is_contiguous()
    torch.testing.assert_close(y, first(x).movedim(1, -1))


@pytest.mark.parametrize("order", [1, 2])
def test_memory_format_does_not_matter(order):
    layer, x = make(order=order), draw(2, 4, 3, 5, 2)
    select(layer, [0, 2])
    other = x.to(memory_format=torch.channels_last_3d).requires_grad_()
    x.requires_grad_()
    torch.testing.assert_close(layer(other), layer(x))
    torch.testing.assert_close(
        gradients(layer, other, layer(other))["x"], gradients(layer, x, layer(x))["x"]
    )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stage2", READINGS)
def test_autocast_and_half_precision_compute_in_float32(stage2, order):
    layer, x = make(order=order, stage2=stage2), draw(2, 4, 3, 5, 2)
    select(layer, [0, 2])
    exact = layer(x)
    layer.float()
    plain = layer(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, half = layer(x.float()), layer(x.bfloat16())
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    torch.testing.assert_close(plain.double(), exact, rtol=1e-5, atol=1e-5)
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: one rounding of x and one of y; s, z and z^2 are a few units here.
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("stage2", READINGS)
def test_in_place_activation_behind_it(stage2, order):
    """MONAI's activations work in place; a view made inside a Function would not allow that."""
    layer, x = make(order=order, stage2=stage2), draw(2, 4, 3, 5, 2).requires_grad_()
    select(layer, [0, 2])
    inside = gradients(layer, x, nn.functional.leaky_relu(layer(x), 0.1, inplace=True))
    beside = gradients(layer, x, nn.functional.leaky_relu(layer(x), 0.1))
    for name in inside:
        torch.testing.assert_close(inside[name], beside[name])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("stage2", READINGS)
def test_saves_x_and_statistics_only(stage2, order):
    layer, x = make(order=order, stage2=stage2), draw(2, 4, 8, 8, 8).requires_grad_()
    select(layer, [0, 2])
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    large = [size for size in sizes.values() if size > 16 * K * 4]
    assert large == [x.numel()]


@pytest.mark.parametrize("order", [1, 2])
def test_without_gradients(order):
    layer, x = make(order=order), draw(2, 4, 3, 5, 2)
    select(layer, [0, 2])
    with torch.no_grad():
        y = layer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, layer(x))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), y)


def test_frozen_input_or_frozen_polynomial():
    """What needs no gradient gets none, and the rest is as before."""
    layer, x = make(), draw(2, 4, 3, 5, 2)
    select(layer, [0, 2])
    layer(x).square().sum().backward()
    assert layer.gain.grad is not None
    expected = layer.gain.grad.clone()
    layer.zero_grad()
    layer.polynomial.requires_grad_(False)
    layer(x).square().sum().backward()
    assert layer.polynomial.grad is None
    torch.testing.assert_close(layer.gain.grad, expected)


def test_constant_channel_stays_finite():
    layer = make()
    select(layer, [0, 1])
    x = torch.full((2, 4, 3, 3, 3), -1000.0, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 4, 1, 1, 1)), (-1, (2, 1, 1, 1, 4))])
def test_one_voxel_is_refused_with_what_to_do(axis, shape):
    layer = HarmonicNorm(4, domains=K, switch=DomainSwitch(), channel_axis=axis)
    with pytest.raises(NetworkError, match="patch is too small, it must be at least twice"):
        layer(torch.zeros(shape))


def test_wrong_channels_are_refused():
    layer = HarmonicNorm(4, domains=K, switch=DomainSwitch())
    with pytest.raises(NetworkError, match="expected 4 channels at axis 1"):
        layer(torch.zeros(2, 5, 3, 3, 3))


def test_parameters_of_each_reading():
    for stage2, names in {
        "free": {"gain", "shift", "rho", "lam"},
        "affine": {"gain", "shift"},
        "revin": {"gain", "shift"},
        "off": set(),
    }.items():
        layer = HarmonicNorm(4, domains=K, switch=DomainSwitch(), order=2, stage2=stage2)  # type: ignore[arg-type]
        assert {n for n, _ in layer.named_parameters()} == names | {"polynomial"}
        assert set(layer.stacked) == names
        assert layer.polynomial.tolist() == [[0.0] * 4, [1.0] * 4, [0.0] * 4]
        for name in names:
            assert torch.equal(getattr(layer, name), torch.zeros(K, 4))


def test_copies_share_nothing():
    layer, x = make(), draw(2, 4, 3, 3, 3)
    select(layer, [0, 1])
    twin = copy.deepcopy(layer)
    assert twin.switch is not layer.switch
    assert twin.switch.selection is None
    select(twin, [0, 1])
    torch.testing.assert_close(twin(x), layer(x))
    with torch.no_grad():
        twin.gain.add_(1)
    assert (twin(x) - layer(x)).abs().max() > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("stage2", READINGS)
def test_cuda_equals_the_processor(stage2, order):
    layer, x = make(order=order, stage2=stage2), draw(2, 4, 5, 5, 3).requires_grad_()
    select(layer, [0, 2])
    expected = gradients(layer, x, layer(x))
    layer.cuda()
    layer.switch.selection = Selection.of(torch.tensor([0, 2], device="cuda"), K)
    there = x.detach().cuda().requires_grad_()
    y = layer(there)
    named = {"x": there, **dict(layer.named_parameters())}
    found = torch.autograd.grad((y * draw(*y.shape, seed=2).cuda()).sum(), list(named.values()))
    for name, gradient in zip(named, found, strict=True):
        torch.testing.assert_close(gradient.cpu(), expected[name], rtol=1e-8, atol=1e-8)
