from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from uharmony_model.errors import NetworkError
from uharmony_model.unlabelled.teacher import move_teacher, ramp_up

DECAY = 0.9


class _Network(nn.Module):
    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, channels, 1)
        self.norm = nn.BatchNorm3d(channels)
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.passing: torch.Tensor


def _filled(seed: int, **options: int) -> _Network:
    network = _Network(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.fill_(seed)
    return network


def _floats(network: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {n: t.detach().double() for n, t in tensors.items() if t.is_floating_point()}


def test_after_n_steps_it_is_the_closed_form():
    # theta'_n = a^n theta'_0 + (1 - a) sum_i a^(n - i) theta_i, far from the start.
    teacher = _filled(100)
    start = {name: tensor.clone() for name, tensor in _floats(teacher).items()}
    students = [_filled(seed) for seed in range(1, 8)]
    for i, student in enumerate(students):
        move_teacher(teacher, student, DECAY, step=1000 + i)
    n = len(students)
    for name, tensor in _floats(teacher).items():
        expected = DECAY**n * start[name]
        for i, student in enumerate(students, start=1):
            expected = expected + (1 - DECAY) * DECAY ** (n - i) * _floats(student)[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    assert set(start) == {
        "conv.weight", "conv.bias", "norm.weight", "norm.bias",
        "norm.running_mean", "norm.running_var", "passing",
    }  # fmt: skip


def test_at_first_it_is_the_mean_of_the_students():
    # 1 - 1 / (step + 1) <= 0.9 up to step 9; the decay takes over at step 10.
    teacher, students = _filled(100), [_filled(seed) for seed in range(11)]
    for step, student in enumerate(students[:10]):
        move_teacher(teacher, student, DECAY, step)
    for name, tensor in _floats(teacher).items():
        mean = torch.stack([_floats(student)[name] for student in students[:10]]).mean(0)
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)
    before = {name: tensor.clone() for name, tensor in _floats(teacher).items()}
    move_teacher(teacher, students[10], DECAY, 10)
    for name, tensor in _floats(teacher).items():
        expected = 0.9 * before[name] + 0.1 * _floats(students[10])[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_the_first_call_copies_to_the_bit():
    teacher, student = _filled(1), _filled(2)
    move_teacher(teacher, student, 0.999, step=0)
    for name, tensor in _floats(student).items():
        assert torch.equal(_floats(teacher)[name], tensor)


def test_counters_are_copied_and_the_student_stays():
    teacher, student = _filled(3), _filled(5)
    before = copy.deepcopy(student.state_dict())
    move_teacher(teacher, student, DECAY, step=50)
    assert teacher.norm.num_batches_tracked == 5
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_it_moves_in_place_without_a_graph():
    teacher, student = _filled(3), _filled(5)
    places = {name: p.data_ptr() for name, p in teacher.named_parameters()}
    teacher.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
    move_teacher(teacher, student, DECAY, step=50)
    assert {name: p.data_ptr() for name, p in teacher.named_parameters()} == places
    assert teacher.conv.weight.requires_grad
    assert teacher.conv.weight.is_leaf
    assert teacher.conv.weight.grad_fn is None


def test_the_teacher_keeps_its_precision():
    teacher, student = _filled(3).double(), _filled(5)
    before = _floats(teacher)["conv.weight"].clone()
    move_teacher(teacher, student, DECAY, step=50)
    assert teacher.conv.weight.dtype == torch.float64
    expected = 0.9 * before + 0.1 * student.conv.weight.detach().double()
    torch.testing.assert_close(teacher.conv.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_networks_that_differ_are_refused_and_nothing_moves():
    student, wider = _filled(5), _filled(5, channels=3)
    extended = _filled(5)
    extended.extra = nn.Linear(1, 1)  # sorts last, behind all that could have been moved
    buffered = _filled(5)
    buffered.register_buffer("seen", torch.zeros(1))
    for other, name in ((wider, "conv.bias"), (extended, "extra.bias"), (buffered, "seen")):
        for teacher, model in ((_filled(3), other), (other, student)):
            before = {n: tensor.clone() for n, tensor in _floats(teacher).items()}
            with pytest.raises(NetworkError, match=f"differ at '{name}'"):
                move_teacher(teacher, model, DECAY, step=0)
            assert all(torch.equal(tensor, before[n]) for n, tensor in _floats(teacher).items())


def test_the_ramp_is_its_formula():
    assert ramp_up(0) == pytest.approx(0.006737947)
    assert ramp_up(0.5) == pytest.approx(0.2865048)
    assert ramp_up(1) == 1.0
    assert ramp_up(-0.5) == ramp_up(0)
    assert ramp_up(1.5) == 1.0
