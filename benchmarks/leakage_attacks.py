"""Attacks on statistics that a site shares: pure functions of tensors, for `benchmarks.leakage`.

    reconstruction   argmin_x |s(x) - S|^2 + prior(x); or a linear decoder of s learned on others
    membership       log N(S; (a + (n-1) mu) / n, (n-1) C / n^2) - log N(S; mu, C / n)
    differencing     a = n S - (n-1) S'

S is a mean over n patients, a the statistic of one, mu and C mean and covariance of the statistic
over patients that the attacker has. The likelihood ratio is after the tests of membership in a
published mean (Homer et al. 2008; Sankararaman et al. 2009), Gaussian and with the shrunk
covariance of Ledoit and Wolf 2004; the choice and all of the reconstruction are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Misfit = Callable[[Tensor], Tensor]

RESAMPLES = 2000
ROUNDING = 1e-5
"""Deviation of rounding in a shared float32, in standard deviations of patients."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Population:
    """What the attacker's own patients tell of a statistic.

    Mean (d,), deviation (d,), and shrunk correlation of those that vary. A number that is equal in
    all of them has deviation 0 and is left out.
    """

    mean: Floats
    deviation: Floats
    correlation: Floats

    @classmethod
    def of(cls, rows: Floats) -> Population:
        """From one row a patient (P, d)."""
        mean, deviation = rows.mean(0), rows.std(0, ddof=1)
        deviation = np.where(deviation > 1e-9 * (1 + np.abs(mean)), deviation, 0.0)
        kept = (rows[:, deviation > 0] - mean[deviation > 0]) / deviation[deviation > 0]
        return cls(mean, deviation, shrunk_covariance(kept))

    def standard(self, rows: Floats) -> Floats:
        """Rows (..., d) in standard deviations from the mean, without what never varies."""
        kept = self.deviation > 0
        return np.asarray((rows[..., kept] - self.mean[kept]) / self.deviation[kept])


def shrunk_covariance(rows: Floats) -> Floats:
    """(1 - l) S + l m I of centred rows (P, d), l after Ledoit and Wolf 2004, equation 14."""
    count, width = rows.shape
    sample = rows.T @ rows / count
    level = float(np.trace(sample)) / width
    apart = float(((sample - level * np.eye(width)) ** 2).sum()) / width
    squares = float(((rows**2).sum(1) ** 2).sum())
    noise = (squares / count - float((sample**2).sum())) / count / width
    share = min(1.0, max(0.0, noise / apart)) if apart > 0 else 1.0
    return np.asarray((1 - share) * sample + share * level * np.eye(width))


def reconstruct(
    misfit: Misfit,
    start: Tensor,
    *,
    prior: Tensor | None = None,
    near: float = 0.0,
    smooth: float = 0.0,
    steps: int = 100,
    rate: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """Patches (B, C, D, H, W) whose statistics are the shared ones, and the misfit left (B,).

    Adam on `misfit(x) + near * mean (x - prior)^2 + smooth * mean |grad (x - prior)|^2`, each
    sample by itself, from `start`; the rate falls to 0 as a cosine. No prior is one of zeros.
    """
    image = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([image], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(steps):
        apart = image if prior is None else image - prior
        loss = misfit(image).sum() + near * apart.square().mean((1, 2, 3, 4)).sum()
        if smooth:
            loss = loss + smooth * roughness(apart).sum()
        (image.grad,) = torch.autograd.grad(loss, [image])
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return image.detach(), misfit(image)


def roughness(image: Tensor) -> Tensor:
    """Mean squared difference of neighbours along each axis, summed over the axes (B,)."""
    total = torch.zeros(len(image))
    for axis in (2, 3, 4):
        total = total + image.diff(dim=axis).square().mean((1, 2, 3, 4))
    return total


def smooth_noise(generator: np.random.Generator, shape: tuple[int, ...], width: int = 5) -> Tensor:
    """Gaussian noise (B, C, D, H, W), averaged twice over `width` voxels, of deviation 1."""
    noise = torch.from_numpy(generator.standard_normal(shape)).float()
    for _ in range(2):
        noise = F.avg_pool3d(noise, width, stride=1, padding=width // 2, count_include_pad=False)
    return noise / noise.std((1, 2, 3, 4), keepdim=True)


@dataclass(frozen=True, eq=False)
class Decoder:
    """A linear map from a statistic to an image: the best linear guess under a ridge."""

    population: Population
    centre: Floats
    inputs: Floats
    dual: Floats
    penalty: float

    @classmethod
    def learned(cls, rows: Floats, images: Floats) -> Decoder:
        """From the attacker's statistics (P, d) and images (P, m), one of each a patient.

        The penalty has the least error on patients left out, by the hat matrix.
        """
        population, centre = Population.of(rows), images.mean(0)
        inputs, outputs = population.standard(rows), images - centre
        kernel = inputs @ inputs.T
        best: tuple[float, float, Floats] | None = None
        for penalty in np.logspace(-2, 8, 21) * np.trace(kernel) / len(rows):
            inverse = np.linalg.inv(kernel + penalty * np.eye(len(rows)))
            hat = kernel @ inverse + 1 / len(rows)
            left_out = (outputs - kernel @ inverse @ outputs) / (1 - np.diag(hat))[:, None]
            error = float((left_out**2).mean())
            if best is None or error < best[0]:
                best = (error, float(penalty), inverse @ outputs)
        assert best is not None
        return cls(population, centre, inputs, best[2], best[1])

    def __call__(self, statistic: Floats) -> Floats:
        """The images (..., m) of statistics (..., d)."""
        return np.asarray(
            self.centre + self.population.standard(statistic) @ self.inputs.T @ self.dual
        )


def likelihood_ratio(
    shared: Floats, of: Floats, population: Population, n: int, within: Floats | None = None
) -> Floats:
    """Log-likelihood ratio (P,) that each patient's statistic `of (P, d)` is in `shared (d,)`.

    For one patient the first density is that of rounding alone. `within`, in the population's
    standard deviations, is the covariance of the difference between two draws of one patient's
    statistic, for an attacker who has the patient's images but not the very patches.
    """
    z, own = population.standard(shared), population.standard(of)
    noise = ROUNDING**2 * np.eye(len(z))
    inside = (n - 1) / n**2 * population.correlation + noise
    if within is not None:
        inside = inside + within / n**2
    outside = population.correlation / n + noise
    return _log_density(z - own / n, inside) - _log_density(z[None], outside)


def nearness(shared: Floats, of: Floats, population: Population) -> Floats:
    """Minus the squared distance (P,) of each patient's statistic to the mean, in deviations."""
    apart = population.standard(of) - population.standard(shared)
    return np.asarray(-(apart**2).sum(1))


def _log_density(rows: Floats, covariance: Floats) -> Floats:
    lower = np.linalg.cholesky(covariance)
    white = np.linalg.solve(lower, rows.T)
    return np.asarray(-0.5 * (white**2).sum(0) - np.log(np.diag(lower)).sum())


def area_under_curve(scores: Floats, member: Bools, seed: np.random.Generator) -> Interval:
    """AUC of `scores (R, P)` for `member (R, P)`, of R releases over P patients.

    A member is compared with those outside of the same release. Patients are resampled, not
    releases: it is they whose number is limited.
    """
    above = scores[:, :, None] > scores[:, None, :]
    equal = scores[:, :, None] == scores[:, None, :]
    pair = member[:, :, None] & ~member[:, None, :]
    wins = (pair * (above + 0.5 * equal)).sum(0)
    pairs = pair.sum(0).astype(np.float64)
    patients = scores.shape[1]
    drawn = seed.multinomial(patients, np.full(patients, 1 / patients), size=RESAMPLES)
    weights = np.vstack([np.ones((1, patients)), drawn])
    total = ((weights @ pairs) * weights).sum(1)
    found = ((weights @ wins) * weights).sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return Interval(float(found[0]), float(low), float(high))


def mean_interval(values: Floats, seed: np.random.Generator) -> Interval:
    """The mean of one value a patient (P,), patients resampled."""
    drawn = seed.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    low, high = np.quantile(drawn @ values / len(values), (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def differenced(larger: Tensor, smaller: Tensor, n: int) -> Tensor:
    """The statistic of the patient who is in the mean over n and not in that over n - 1."""
    return n * larger.double() - (n - 1) * smaller.double()


def correlation(found: Tensor, truths: Tensor) -> float:
    """Largest correlation of a patch (C, D, H, W) with one of `truths (K, C, D, H, W)`.

    0 for a constant, which has none.
    """
    own = found.double().flatten() - found.double().mean()
    others = truths.double().flatten(1)
    others = others - others.mean(1, keepdim=True)
    lengths = own.norm() * others.norm(dim=1)
    if float(own.norm()) < 1e-6 * own.numel() ** 0.5:
        return 0.0
    return float((others @ own / lengths.clamp_min(1e-12)).max())


def psnr(found: Tensor, truths: Tensor) -> float:
    """Largest PSNR in dB of a patch with one of `truths`; the peak is the range of that one."""
    others = truths.double().flatten(1)
    error = (others - found.double().flatten()).square().mean(1).clamp_min(1e-20)
    span = others.amax(1) - others.amin(1)
    return float((10 * torch.log10(span**2 / error)).max())
