from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny import tiny_study
from uharmony_model.inference import evaluating, predict_logits
from uharmony_model.networks import build_network

PATCH = (8, 6, 4)


class Pointwise(nn.Module):
    """Two outputs per voxel that depend on this voxel alone; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.dropout = nn.Dropout(0.5)
        self.seen: list[Tensor] = []
        self.domains: list[Tensor | None] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor, domain: Tensor | None = None, *, drop: bool = False) -> Tensor:
        self.seen.append(x.clone())
        self.domains.append(domain)
        self.modes.append(self.training)
        logits: Tensor = self.dropout(torch.cat((self.weight * x[:, :1], x[:, 1:] - 1), dim=1))
        return logits


def _image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def _predict(network: nn.Module, image: Tensor, overlap: float = 0.5) -> Tensor:
    return predict_logits(network, image, patch=PATCH, overlap=overlap, domain=None, device="cpu")


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize(
    "shape", [(8, 6, 4), (5, 3, 1), (17, 13, 9), (8, 7, 4), (3, 20, 2), (16, 5, 11)]
)
def test_a_pointwise_network_gives_its_value_at_every_voxel(shape, overlap):
    image = _image(*shape)
    logits = _predict(Pointwise(), image, overlap)
    assert logits.shape == (2, *shape)
    assert logits.dtype == torch.float32
    expected = torch.stack((3 * image[0], image[1] - 1))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 6, 4), (5, 6, 3), (1, 1, 1)])
def test_a_volume_that_fits_takes_one_pass(shape):
    network, image = Pointwise(), _image(*shape)
    logits = _predict(network, image)
    assert [tuple(x.shape) for x in network.seen] == [(1, 2, *PATCH)]
    # Not a window among others: nothing is weighed, so nothing is rounded.
    assert torch.equal(logits, torch.stack((3 * image[0], image[1] - 1)))


def test_padding_is_each_channels_least_intensity_around_the_volume():
    network, image = Pointwise(), _image(5, 6, 2)
    _predict(network, image)
    seen = network.seen[0][0]
    inside = torch.zeros(PATCH, dtype=torch.bool)
    inside[1:6, :, 1:3] = True
    for channel in range(2):
        assert torch.equal(seen[channel][inside].reshape(5, 6, 2), image[channel])
        assert (seen[channel][~inside] == image[channel].min()).all()


def test_every_window_knows_the_domain():
    network = Pointwise()
    image = _image(17, 6, 4)
    predict_logits(network, image, patch=PATCH, overlap=0.25, domain=3, device="cpu")
    assert sum(len(x) for x in network.seen) == 3  # starts at 0, 6 and 9 (the last one moved in)
    for x, domain in zip(network.seen, network.domains, strict=True):
        assert domain is not None
        assert domain.dtype == torch.long
        assert domain.tolist() == [3] * len(x)
    blank = Pointwise()
    _predict(blank, image)
    assert blank.domains == [None] * len(blank.seen)


def test_windows_are_weighed_towards_their_centres():
    class Distance(nn.Module):
        """Each window's own coordinate along the first axis: nothing but blending shows."""

        def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
            ramp = torch.arange(x.shape[2], dtype=x.dtype)[None, None, :, None, None]
            return ramp.repeat(len(x), 1, 1, *x.shape[3:])

    image = torch.zeros(1, 12, 6, 4)
    blended = _predict(Distance(), image)[0, :, 3, 2]
    # Windows start at 0 and 4. MONAI's weight is a Gaussian of 1/8 of the window about its centre.
    weight = np.exp(-((np.arange(8) - 3.5) ** 2) / 2)
    weight = np.maximum(weight, weight[weight > 0].min())
    expected = [
        (weight[i] * i + weight[i - 4] * (i - 4)) / (weight[i] + weight[i - 4]) for i in range(4, 8)
    ]
    assert blended[:4].tolist() == pytest.approx([0, 1, 2, 3], abs=1e-5)
    assert blended[4:8].tolist() == pytest.approx(expected, rel=0.02)
    assert blended[8:].tolist() == pytest.approx([4, 5, 6, 7], abs=1e-5)


def test_modes_are_as_before_and_no_gradient_is_kept():
    network = Pointwise()
    network.train()
    network.dropout.eval()
    logits = _predict(network, _image(9, 9, 9))
    assert set(network.modes) == {False}
    assert network.training
    assert not network.dropout.training
    assert not logits.requires_grad
    network.eval()
    _predict(network, _image(4, 4, 4))
    assert not network.training


def _fail_inside(network: nn.Module) -> None:
    with evaluating(network):
        assert not network.training
        raise RuntimeError("inside")


def test_modes_are_as_before_after_an_error():
    network = Pointwise().train()
    with pytest.raises(RuntimeError, match="inside"):
        _fail_inside(network)
    assert network.training
    assert network.dropout.training


def test_the_same_again_to_the_last_bit():
    class Convolution(nn.Conv3d):
        def forward(self, input: Tensor, domain: Tensor | None = None) -> Tensor:
            return super().forward(input)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Convolution(2, 3, 3, padding=1)
    image = _image(13, 9, 7)
    assert torch.equal(_predict(network, image), _predict(network, image))


def test_a_memory_mapped_volume_is_read_as_it_is(tmp_path):
    image = _image(9, 7, 5)
    np.save(tmp_path / "image.npy", image.numpy())
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    logits = predict_logits(
        Pointwise(), mapped, patch=PATCH, overlap=0.5, domain=None, device="cpu"
    )
    assert torch.equal(logits, _predict(Pointwise(), image))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_holds_the_windows_and_the_cpu_the_volume():
    network, image = Pointwise().to("cuda"), _image(17, 13, 9)
    logits = predict_logits(network, image, patch=PATCH, overlap=0.5, domain=1, device="cuda")
    assert logits.device.type == "cpu"
    assert {x.device.type for x in network.seen} == {"cuda"}
    torch.testing.assert_close(logits, _predict(Pointwise(), image), rtol=1e-5, atol=1e-5)


def test_weights_of_a_mixture_go_to_every_window():
    network, weights = Pointwise(), torch.tensor([0.25, 0.75], dtype=torch.float64)
    predict_logits(
        network, _image(17, 6, 4), patch=PATCH, overlap=0.25, domain=weights, device="cpu"
    )
    for x, domain in zip(network.seen, network.domains, strict=True):
        assert domain is not None
        assert domain.dtype == torch.float32
        assert domain.tolist() == [[0.25, 0.75]] * len(x)


class Layers(nn.Module):
    """Per voxel 3 float32 of the first layer and an eighth of 2 of the second: 12.25 + 1 bytes."""

    multiple = 2

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 3, 1)
        self.second = nn.Conv3d(3, 2, 2, stride=2)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, domain: Tensor | None = None) -> Tensor:
        self.sizes.append(tuple(x.shape[2:]))
        coarse: Tensor = self.second(self.first(x))
        return coarse.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)


@pytest.mark.parametrize(("share", "whole"), [(1.0, True), (0.999, False)])
def test_a_volume_that_fits_the_memory_takes_one_pass(share, whole):
    # 9 x 7 x 4 voxels in a window of 10 x 8 x 4: multiples of the network's strides.
    needed = 2 * (3 * 4 + 2 * 4 / 8) * (10 * 8 * 4)
    network, image = Layers(), torch.randn(1, 9, 7, 4, generator=torch.Generator().manual_seed(1))
    logits = predict_logits(
        network,
        image,
        patch=PATCH,
        overlap=0.25,
        domain=None,
        device="cpu",
        memory_gib=share * needed / 2**30,
    )
    assert logits.shape == (2, 9, 7, 4)
    assert network.sizes[0] == PATCH  # the window that was measured
    assert (network.sizes[1:] == [(10, 8, 4)]) == whole
    if not whole:
        assert set(network.sizes[1:]) == {PATCH}
    assert not any(module._forward_hooks for module in network.modules())


def test_one_pass_over_the_whole_is_what_a_patch_of_that_size_gives():
    image = _image(17, 13, 9)
    whole = predict_logits(
        Pointwise(), image, patch=PATCH, overlap=0.5, domain=None, device="cpu", memory_gib=1.0
    )
    assert torch.equal(whole, torch.stack((3 * image[0], image[1] - 1)))


def test_a_volume_within_the_patch_is_not_measured():
    network = Layers()
    predict_logits(
        network,
        torch.zeros(1, 8, 6, 4),
        patch=PATCH,
        overlap=0.5,
        domain=None,
        device="cpu",
        memory_gib=0.0,
    )
    assert network.sizes == [PATCH]


@pytest.mark.parametrize("domain", [1, torch.tensor([0.25, 0.75])])
@pytest.mark.parametrize("memory_gib", [0.0, 1.0])
def test_a_network_that_needs_its_domain_is_measured_with_it(domain, memory_gib):
    """3D U2-Net has no pass without a domain."""
    network = build_network(tiny_study(method="u2net"), ("a", "b"), seed=0)
    image = torch.randn(1, 20, 16, 16, generator=torch.Generator().manual_seed(2))
    found = predict_logits(
        network, image, patch=(16, 16, 16), overlap=0.5, domain=domain, device="cpu",
        memory_gib=memory_gib,
    )  # fmt: skip
    wanted = predict_logits(
        network, image, patch=(20 if memory_gib else 16, 16, 16), overlap=0.5, domain=domain,
        device="cpu",
    )  # fmt: skip
    assert torch.equal(found, wanted)
