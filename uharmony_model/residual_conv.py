"""A convolution with a local residual: the effective kernel of domain k is `W + D_k`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from uharmony_model.domains import DomainSwitch
from uharmony_model.methods import Part

Convolution = nn.Conv3d | nn.ConvTranspose3d


class ResidualConv(nn.Module):
    """Wraps a convolution as `.shared`; the residuals of the K domains are zero at start.

    `weight_residual (K, ...)` stands beside the shared weight. `bias_residual (K, O)` exists in
    the head alone: a stem's bias is removed again by the normalisation behind it, so a residual of
    it would get no gradient, and `shift` of that layer does its work. After LG-FedAvg
    (arXiv:2001.01523), which replaces the layers; the residual form is ours.
    """

    weight_residual: nn.Parameter
    bias_residual: nn.Parameter | None

    def __init__(
        self, shared: Convolution, *, domains: int, part: Part, switch: DomainSwitch
    ) -> None:
        super().__init__()
        self.shared, self.part, self.switch = shared, part, switch
        weight, bias = shared.weight, shared.bias
        self.weight_residual = nn.Parameter(weight.new_zeros(domains, *weight.shape))
        residual = part is Part.HEAD_RESIDUAL and bias is not None
        self.register_parameter(
            "bias_residual",
            nn.Parameter(weight.new_zeros(domains, shared.out_channels)) if residual else None,
        )
        # What code around a convolution asks of it.
        self.in_channels, self.out_channels = shared.in_channels, shared.out_channels
        self.kernel_size, self.stride = shared.kernel_size, shared.stride
        self.padding, self.output_padding = shared.padding, shared.output_padding
        self.dilation, self.groups = shared.dilation, shared.groups
        self.padding_mode, self.transposed = shared.padding_mode, shared.transposed

    @property
    def weight(self) -> Tensor:
        """The shared kernel."""
        return self.shared.weight

    @property
    def bias(self) -> Tensor | None:
        """The shared bias."""
        return self.shared.bias

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the parameters with a leading axis of domains."""
        return ("weight_residual", *(() if self.bias_residual is None else ("bias_residual",)))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, D, H, W), every sample with the kernel of its domain."""
        selection = self.switch.selection
        if selection is None:
            y: Tensor = self.shared(x)
            return y
        if selection.uniform:
            return self._together(x, selection.weights[0])
        if self.padding_mode == "zeros":
            return self._grouped(x, selection.weights)
        samples = zip(x.unsqueeze(1), selection.weights, strict=True)
        return torch.cat([self._together(sample, row) for sample, row in samples])

    def _effective(self, row: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = self.shared.weight + _mix(row, self.weight_residual)
        bias = self.shared.bias
        if bias is not None and self.bias_residual is not None:
            bias = bias + _mix(row, self.bias_residual)
        return weight, bias

    def _together(self, x: Tensor, row: Tensor) -> Tensor:
        weight, bias = self._effective(row)
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        y: Tensor = functional_call(self.shared, parameters, (x,))
        return y

    def _grouped(self, x: Tensor, rows: Tensor) -> Tensor:
        # Samples become groups of one convolution. One by one they are slower, up to six times:
        # on a processor, torch leaves its fast kernels for a batch of one.
        weights, biases = zip(*(self._effective(row) for row in rows), strict=True)
        options: dict[str, Any] = {
            "weight": torch.cat(weights),
            "bias": None if self.bias is None else torch.cat(biases),
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": len(rows) * self.groups,
        }
        wide = x.reshape(1, -1, *x.shape[2:])
        if self.transposed:
            y = F.conv_transpose3d(wide, output_padding=self.output_padding, **options)
        else:
            y = F.conv3d(wide, **options)
        return y.reshape(x.shape[0], self.out_channels, *y.shape[2:])


def _mix(row: Tensor, stacked: Tensor) -> Tensor:
    # As a sum of products: under autocast a matrix product would round the kernel to half.
    weights = row.to(stacked.dtype).view(-1, *(1,) * (stacked.ndim - 1))
    return (weights * stacked).sum(0)
