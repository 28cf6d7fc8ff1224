"""The discriminator that sites train together: gradients of its terms up, its weights down.

    round r   a site   g_k = gradient of L_k under D_r, L_k the mean over its patients of the mean
                       over their places of D(f)^2 with labels, of (D(f) - 1)^2 without
              server   g = mean of g_k over sites with labels + mean over those without
                       D_{r+1} = one step of Adam from D_r by g / |g|; none where a side has no site

g is the gradient of the pooled L_D (`discriminator`) in which each patient of a site and each site
of a side weighs the same; sites do not say how many patients or places theirs is of. Its direction
alone moves D: Adam remembers squares for long, and one site's huge gradient would hold D still for
the rest of the study. D_1 follows from the study's seed, so that nobody has to send it. The
federated form is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uharmony_model.alignment.discriminator import (
    BETAS,
    RATE,
    FeatureDiscriminator,
    set_gradients,
    site_shares,
    sum_gradients,
)
from uharmony_model.errors import ExchangeError
from uharmony_model.exchange.schema import Schema, TensorSpec

PREFIX = "discriminator/"
MAX_VALUE = 1e4
"""No honest gradient or weight has a larger number: features are normalised, steps are small."""

Named = Mapping[str, Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False)
class SideGradient:
    """A site's gradient by the name of the parameter, and which side's term it is of."""

    tensors: Named
    target: bool


@dataclass(frozen=True, eq=False)
class SharedDiscriminator:
    """D before a round: weights by name, and what Adam keeps of the `steps` that led there."""

    weights: Named
    steps: int
    moments: Mapping[str, Named]

    @classmethod
    def first(cls, channels: int, seed: int) -> SharedDiscriminator:
        """The one that every place makes for itself, of features of so many channels.

        Raises:
            NetworkError: there are fewer than four channels.
        """
        weights = _state(FeatureDiscriminator(channels, seed=seed))
        zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        return cls(weights, 0, dict.fromkeys(_MOMENTS, zeros))

    def stepped(self, gradients: Sequence[SideGradient]) -> SharedDiscriminator:
        """After a step on the sum of these, in their order; the same where a side has none.

        Raises:
            ExchangeError: a gradient is of other parameters.
        """
        sides = [one.target for one in gradients]
        if set(sides) != {False, True}:
            return self
        module = discriminator_of(self.weights)
        adam = torch.optim.Adam(module.parameters(), lr=RATE, betas=BETAS)
        for name, parameter in module.named_parameters():
            kept = {moment: self.moments[moment][name].clone() for moment in _MOMENTS}
            adam.state[parameter] = {"step": torch.tensor(float(self.steps)), **kept}
        shares = site_shares([1] * len(sides), sides)
        set_gradients(module, _direction(sum_gradients([g.tensors for g in gradients], shares)))
        adam.step()
        moments = {
            moment: {n: adam.state[p][moment].clone() for n, p in module.named_parameters()}
            for moment in _MOMENTS
        }
        return SharedDiscriminator(_state(module), self.steps + 1, moments)

    def tensors(self) -> dict[str, Tensor]:
        """Everything of it by TABLE/NAME, for a store."""
        tables = {"weights": self.weights, **self.moments}
        found = {f"{table}/{k}": v for table, own in tables.items() for k, v in own.items()}
        return {**found, "steps": torch.tensor([float(self.steps)])}

    @classmethod
    def of(cls, tensors: Named) -> SharedDiscriminator:
        """The same again.

        Raises:
            KeyError: a table is missing.
        """
        weights, *moments = (_under(f"{table}/", tensors) for table in ("weights", *_MOMENTS))
        return cls(weights, int(tensors["steps"]), dict(zip(_MOMENTS, moments, strict=True)))


def discriminator_of(weights: Named) -> FeatureDiscriminator:
    """The module of these weights, which are copied.

    Raises:
        ExchangeError: they are of no discriminator.
        NetworkError: they are of fewer than four channels.
    """
    module = FeatureDiscriminator(channels_of(weights))
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ExchangeError(f"weights of no discriminator: {error}") from None
    return module


def channels_of(tensors: Named) -> int:
    """Channels of the features that such weights or gradients take: the widest input of a layer.

    Raises:
        ExchangeError: there is no convolution among them.
    """
    inputs = [int(tensor.shape[1]) for tensor in tensors.values() if tensor.ndim == 5]
    if not inputs:
        raise ExchangeError("tensors of no discriminator: none is a convolution's")
    return max(inputs)


def discriminator_schema(channels: int) -> Schema:
    """What travels, up and down: a tensor for each parameter, `discriminator/NAME`.

    Raises:
        NetworkError: there are fewer than four channels.
    """
    state = _state(FeatureDiscriminator(channels))
    specs = (TensorSpec(name=f"{PREFIX}{k}", shape=tuple(v.shape)) for k, v in state.items())
    return Schema(tensors=tuple(sorted(specs, key=lambda spec: spec.name)))


def travelling(tensors: Named) -> dict[str, Tensor]:
    """Weights or a gradient under the names of `discriminator_schema`."""
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def check_discriminator(tensors: Named, channels: int) -> dict[str, Tensor]:
    """Weights or a gradient by parameter, from tensors that someone else made.

    Raises:
        ExchangeError: names or shapes are not those of `discriminator_schema`, or a number is not
            finite or too large.
    """
    if Schema.of(tensors) != discriminator_schema(channels):
        names = ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(tensors.items()))
        raise ExchangeError(
            f"a discriminator of {names:.200}; expected that of {channels} channels"
        )
    for name, tensor in tensors.items():
        largest = float(tensor.abs().amax())
        if not largest <= MAX_VALUE:  # NaN is not, either
            raise ExchangeError(f"{name}: a value of {largest:.3g}; expected {MAX_VALUE:g} at most")
    return _under(PREFIX, tensors)


def _direction(gradient: Named) -> dict[str, Tensor]:
    """The gradient divided by its length; 0 stays."""
    length = torch.stack([tensor.double().square().sum() for tensor in gradient.values()]).sum()
    factor = 1.0 / max(float(length.sqrt()), 1e-12)
    return {name: (tensor.double() * factor).float() for name, tensor in gradient.items()}


def _state(module: FeatureDiscriminator) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _under(prefix: str, tensors: Named) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
