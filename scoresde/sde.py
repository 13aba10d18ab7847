"""The forward SDEs of the field, each a few lines: (alpha, sigma) and, where there is one, the closed form of the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_finite, check_number, check_state, shape_of
from .linear import SDE, DiscreteVP, LinearSDE, Tabulated

__all__ = ["EDM", "SDE", "VE", "VP", "Cosine", "DiscreteVP", "LinearSDE", "Rectified", "SubVP", "Tabulated"]


@dataclass(frozen=True)
class VP(LinearSDE):
    """Variance preserving, DDPM in continuous time: dx = -beta/2 x dt + sqrt(beta) dw.

    beta = beta_min + t (beta_max - beta_min), alpha = exp(-B/2), sigma^2 = 1 - exp(-B), B = int_0^t beta.
    Song et al. 2021 (ICLR), eq. 32-33.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.beta_min, "beta_min", 0.0)
        if check_number(self.beta_max, "beta_max") <= self.beta_min:
            raise ValueError(f"beta_min={self.beta_min}, beta_max={self.beta_max}; wanted beta_min < beta_max: swap them?")

    def beta(self, t: Tensor) -> Tensor:
        """Noise rate beta(t)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def B(self, t: Tensor) -> Tensor:
        """int_0^t beta(u) du."""
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-B/2)."""
        return torch.exp(-self.B(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - exp(-B)), by expm1: the plain form is 0.6 % off at t = 1e-5 in float32."""
        return (-torch.expm1(-self.B(t))).sqrt()

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """-beta/2."""
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        """sqrt(beta)."""
        return self.beta(t).sqrt()

    def _time_of_B(self, B: Tensor) -> Tensor:
        d = self.beta_max - self.beta_min
        return 2 * B / (self.beta_min + (self.beta_min**2 + 2 * d * B).sqrt())

    def time(self, logsnr: Tensor) -> Tensor:
        """B = log(1 + e^-logsnr), then the quadratic B(t)."""
        return self._time_of_B(-torch.nn.functional.logsigmoid(logsnr))

    @staticmethod
    def from_betas(betas: Sequence[float] | Tensor) -> DiscreteVP:
        """The continuous SDE through a discrete DDPM chain; see `DiscreteVP`."""
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1:
            raise ValueError(f"betas is {shape_of(betas)}; wanted one dimension, the chain's steps in order")
        return DiscreteVP(tuple(betas.tolist()))


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP: the drift of VP, sigma = 1 - exp(-B), g^2 = beta (1 - exp(-2B)). Song et al. 2021 (ICLR), eq. 28-29."""

    def sigma(self, t: Tensor) -> Tensor:
        """1 - exp(-B)."""
        return -torch.expm1(-self.B(t))

    def diffusion(self, t: Tensor) -> Tensor:
        """sqrt(beta (1 - exp(-2B)))."""
        return (self.beta(t) * -torch.expm1(-2 * self.B(t))).sqrt()

    def time(self, logsnr: Tensor) -> Tensor:
        """sigma solves e^logsnr sigma^2 + sigma = 1; B = -log(1 - sigma), written without cancellation at either end."""
        sigma = 2 / (1 + (1 + 4 * logsnr.exp()).sqrt())
        return self._time_of_B(torch.where(sigma < 0.5, -torch.log1p(-sigma), -logsnr - 2 * sigma.log()))


@dataclass(frozen=True)
class VE(LinearSDE):
    """Variance exploding, NCSN in continuous time: sigma = sigma_min (sigma_max / sigma_min)^t, alpha = 1.

    x(0) is NOT clean data: it carries noise sigma_min, so sigma(t)^2 = sigma_min^2 + int_0^t g^2 with
    g = sigma sqrt(2 log(sigma_max / sigma_min)). Song et al. 2021 (ICLR), eq. 30-31.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.sigma_min, "sigma_min", 0.0, open_low=True)
        if check_number(self.sigma_max, "sigma_max") <= self.sigma_min:
            raise ValueError(f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}; wanted sigma_min < sigma_max")

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * torch.exp(self._rate * t)

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        """sigma sqrt(2 log(sigma_max / sigma_min))."""
        return self.sigma(t) * math.sqrt(2 * self._rate)

    def time(self, logsnr: Tensor) -> Tensor:
        """log(sigma / sigma_min) / log(sigma_max / sigma_min), sigma = e^(-logsnr/2)."""
        return (-logsnr / 2 - math.log(self.sigma_min)) / self._rate

    @classmethod
    def from_data(cls, x: Tensor, sigma_min: float = 0.01, rows: int = 5000) -> VE:
        """VE whose sigma_max is the largest distance between two data points (Song & Ermon 2020, technique 1).

        For images; in few dimensions that is a narrow prior: 10 to 20 standard deviations of the data serve better. x `[N, *shape]`;
        of more than `rows` points, `rows` evenly spaced ones are compared. `print` shows the estimate.
        """
        x = check_finite(check_state(x)).flatten(1).double()
        if len(x) < 2:
            raise ValueError(f"x has {len(x)} rows; wanted at least two data points")
        x = x[torch.linspace(0, len(x) - 1, min(rows, len(x))).round().long().to(x.device)]
        return cls(sigma_min=sigma_min, sigma_max=max(float(torch.cdist(c, x).max()) for c in x.split(512)))


@dataclass(frozen=True)
class EDM(LinearSDE):
    """sigma(t) = t, alpha = 1: time is the noise level. Karras et al. 2022 (NeurIPS), table 1."""

    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """t, as a tensor of its own: the caller may write into it."""
        return t.clone()

    def time(self, logsnr: Tensor) -> Tensor:
        """e^(-logsnr/2)."""
        return torch.exp(-logsnr / 2)


@dataclass(frozen=True)
class Cosine(LinearSDE):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): Nichol & Dhariwal 2021 without the offset."""

    t_min: float = 1e-3
    t_max: float = 1 - 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """cos(pi t / 2)."""
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def time(self, logsnr: Tensor) -> Tensor:
        """2/pi atan(e^(-logsnr/2))."""
        return 2 / math.pi * torch.atan(torch.exp(-logsnr / 2))


@dataclass(frozen=True)
class Rectified(LinearSDE):
    """alpha = 1 - t, sigma = t: the straight path of rectified flow. Liu et al. 2023 (ICLR)."""

    t_min: float = 1e-3
    t_max: float = 1 - 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """t, as a tensor of its own: the caller may write into it."""
        return t.clone()

    def time(self, logsnr: Tensor) -> Tensor:
        """1 / (1 + e^(logsnr/2))."""
        return 1 / (1 + torch.exp(logsnr / 2))
