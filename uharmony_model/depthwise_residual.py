"""A convolution whose input passes a domain's own depthwise kernel first: `conv(x + d_k * x)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from uharmony_model.depthwise_conv import depthwise_conv
from uharmony_model.domains import DomainSwitch, Selection
from uharmony_model.methods import Part

EDGE = 3  # voxels; depthwise kernels of 3D U2-Net are 3 x 3 x 3 everywhere


class DepthwiseResidual(nn.Module):
    """Wraps a convolution as `.shared`; the kernels `(K, C, 1, 3, 3, 3)` are zero at start.

    After 3D U2-Net (arXiv:1909.06012), where a domain's spatial correlations are its own depthwise
    convolutions and the correlations between channels are shared. That it stands as a residual
    before a shared convolution of any size, and is zero at an unseen domain, is ours.
    """

    kernel_residual: nn.Parameter

    def __init__(self, shared: nn.Conv3d, *, domains: int, switch: DomainSwitch) -> None:
        super().__init__()
        self.shared, self.part, self.switch = shared, Part.DEPTHWISE_RESIDUAL, switch
        zero = shared.weight.new_zeros(domains, shared.in_channels, 1, EDGE, EDGE, EDGE)
        self.kernel_residual = nn.Parameter(zero)

    @property
    def stacked(self) -> tuple[str, ...]:
        """Names of the parameters with a leading axis of domains."""
        return ("kernel_residual",)

    @property
    def weight(self) -> Tensor:
        """The shared kernel."""
        return self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, D, H, W), every sample after the kernel of its domain."""
        selection = self.switch.selection
        if selection is not None:
            x = x + self._filtered(x, selection)
        y: Tensor = self.shared(x)
        return y

    def _filtered(self, x: Tensor, selection: Selection) -> Tensor:
        rows = selection.weights.to(self.kernel_residual.dtype)
        if selection.uniform:
            kernel = torch.einsum("k,kcoxyz->coxyz", rows[0], self.kernel_residual)
            return depthwise_conv(x, kernel)
        # Samples become groups of one convolution, as a channel is one already.
        kernels = torch.einsum("bk,kcoxyz->bcoxyz", rows, self.kernel_residual).flatten(0, 1)
        wide = x.reshape(1, -1, *x.shape[2:])
        return depthwise_conv(wide, kernels).view_as(x)
