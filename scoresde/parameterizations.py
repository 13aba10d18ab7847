"""What a network may predict. Score, eps, v and velocity are affine in (x, x0): these are the only conversions, both ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear import LinearSDE

__all__ = ["Prediction", "edm", "eps", "score", "v", "velocity", "x0"]

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor]
Inverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Parameterization = Callable[[LinearSDE, Tensor], Coefficients]
_Late = Callable[[], Tensor]


class Prediction:
    """What a denoiser says at (x, t): `x0` and, from x = alpha x0 + sigma eps, every other name of it (shape of x).

    alpha, sigma: the coefficients at t, or functions that find them when they are first asked for.
    """

    __slots__ = ("_alpha", "_sigma", "x", "x0")

    def __init__(self, x: Tensor, x0: Tensor, alpha: Tensor | _Late, sigma: Tensor | _Late) -> None:
        self.x, self.x0, self._alpha, self._sigma = x, x0, alpha, sigma

    @property
    def alpha(self) -> Tensor:
        """Signal scale at t."""
        if not isinstance(self._alpha, Tensor):
            self._alpha = self._alpha()
        return self._alpha

    @property
    def sigma(self) -> Tensor:
        """Noise scale at t."""
        if not isinstance(self._sigma, Tensor):
            self._sigma = self._sigma()
        return self._sigma

    @property
    def eps(self) -> Tensor:
        """Noise: (x - alpha x0) / sigma."""
        return (self.x - self.alpha * self.x0) / self.sigma

    @property
    def score(self) -> Tensor:
        """Gradient of log p_t at x: -eps / sigma."""
        return -self.eps / self.sigma

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0. Salimans & Ho 2022 (ICLR)."""
        return self.alpha * self.eps - self.sigma * self.x0

    @property
    def velocity(self) -> Tensor:
        """eps - x0 = d[x / (alpha + sigma)] / d tau with tau = sigma / (alpha + sigma)."""
        return self.eps - self.x0


# The inverse maps x0 = a x + b q, one a quantity: each reads its line in `Prediction` backwards, with x = alpha x0 + sigma eps.
def from_x0(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 itself."""
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def from_eps(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = (x - sigma eps) / alpha."""
    return 1 / alpha, -sigma / alpha


def from_score(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = (x + sigma^2 score) / alpha: Tweedie's formula (Efron 2011)."""
    return 1 / alpha, sigma**2 / alpha


def from_v(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = (alpha x - sigma v) / (alpha^2 + sigma^2)."""
    return alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)


def from_velocity(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 = (x - sigma velocity) / (alpha + sigma)."""
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def _unit_input(sde: LinearSDE, t: Tensor, inverse: Inverse) -> Coefficients:
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return *inverse(alpha, sigma), (alpha**2 + sigma**2).rsqrt(), -sde.logsnr(t) / 8


def eps(sde: LinearSDE, t: Tensor) -> Coefficients:
    """The net predicts eps. (c_skip, c_out, c_in, c_noise) with c_in = 1 / sqrt(alpha^2 + sigma^2), c_noise = log(rho) / 4."""
    return _unit_input(sde, t, from_eps)


def x0(sde: LinearSDE, t: Tensor) -> Coefficients:
    """The net predicts x0."""
    return _unit_input(sde, t, from_x0)


def v(sde: LinearSDE, t: Tensor) -> Coefficients:
    """The net predicts v. Salimans & Ho 2022 (ICLR)."""
    return _unit_input(sde, t, from_v)


def score(sde: LinearSDE, t: Tensor) -> Coefficients:
    """The net predicts the score itself, of size 1 / sigma."""
    return _unit_input(sde, t, from_score)


def velocity(sde: LinearSDE, t: Tensor) -> Coefficients:
    """The net predicts eps - x0, the velocity of rectified flow. Liu et al. 2023 (ICLR)."""
    return _unit_input(sde, t, from_velocity)


def edm(sde: LinearSDE, t: Tensor, sigma_data: float = 0.5) -> Coefficients:
    """Unit-variance input and target for data of deviation `sigma_data`. Karras et al. 2022 (NeurIPS), table 1, in x / alpha.

    c_skip = sd^2 / (rho^2 + sd^2), c_out = rho sd / sqrt(rho^2 + sd^2), c_in = 1 / sqrt(rho^2 + sd^2), c_noise = log(rho) / 4.
    """
    alpha, rho, sd = sde.alpha(t), sde.rho(t), sigma_data
    n = rho**2 + sd**2
    return sd**2 / n / alpha, rho * sd / n.sqrt(), 1 / n.sqrt() / alpha, -sde.logsnr(t) / 8
