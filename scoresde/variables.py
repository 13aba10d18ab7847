"""In which letters the probability flow is integrated: dy/du = q, y = x / m, for a variable q; and the clocks to interpolate q in.

With lam = logsnr / 2 and rho = sigma / alpha = e^-lam, three choices make the linear part of the flow exact:

eps:      d(x / alpha) = eps d(rho)
x0:       d(x / sigma) = x0 d(1 / rho)
velocity: d(x / (alpha + sigma)) = (eps - x0) d(tau), tau = sigma / (alpha + sigma)

and `time` is the flow as it stands, dx = (f x - g^2/2 score) dt. Lu et al. 2022 (DPM-Solver, eq. 3.4; DPM-Solver++, eq. 8), Zhang & Chen
2023 (DEIS, eq. 10), Liu et al. 2023 (rectified flow) in one form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .linear import LinearSDE
from .parameterizations import Inverse, from_eps, from_score, from_velocity, from_x0

__all__ = ["Clock", "Variable", "eps", "lam", "rho", "snr", "t", "tau", "time", "velocity", "x0"]

_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Clock:
    """A strictly monotone function of lam = log(alpha / sigma): `of_lam`, its inverse `to_lam` and its derivative `rate`."""

    name: str
    of_lam: _Map = field(repr=False)
    to_lam: _Map = field(repr=False)
    rate: _Map = field(repr=False)

    def at(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """The clock at times t."""
        return self.of_lam(sde.logsnr(t) / 2)

    def time(self, sde: LinearSDE, w: Tensor) -> Tensor:
        """The times at which the clock reads w."""
        return sde.time(2 * self.to_lam(w))

    def along(self, sde: LinearSDE, lam: Tensor) -> Tensor:
        """The clock where log(alpha / sigma) is lam."""
        return self.of_lam(lam)


@dataclass(frozen=True)
class _Time(Clock):
    """t itself: the one clock that knows the schedule."""

    def at(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return t

    def time(self, sde: LinearSDE, w: Tensor) -> Tensor:
        return w

    def along(self, sde: LinearSDE, lam: Tensor) -> Tensor:
        return sde.time(2 * lam)


def _no_rate(lam: Tensor) -> Tensor:
    raise TypeError("t has no rate in lam that is the same for every SDE: the variable `time` is interpolated in t")


lam = Clock("lam", lambda lam: lam, lambda w: w, torch.ones_like)
rho = Clock("rho", lambda lam: torch.exp(-lam), lambda w: -torch.log(w), lambda lam: -torch.exp(-lam))
snr = Clock("snr", torch.exp, torch.log, torch.exp)
tau = Clock("tau", lambda lam: torch.sigmoid(-lam), lambda w: -torch.logit(w), lambda lam: -torch.sigmoid(lam) * torch.sigmoid(-lam))
t = _Time("t", lambda lam: lam, lambda w: w, _no_rate)


@dataclass(frozen=True)
class Variable:
    """dy/du = q with y = x / m and q = p x + r x0: `scale` is m(alpha, sigma), `clock` is u, `inverse` gives x0 = a x + b q.

    coordinate: the clock in which solvers interpolate q by default.
    """

    name: str
    inverse: Inverse = field(repr=False)
    scale: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    clock: Clock = field(repr=False)
    coordinate: Clock = field(repr=False)

    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, r) of q = p x + r x0 at times t."""
        a, b = self.inverse(sde.alpha(t), sde.sigma(t))
        return -a / b, 1 / b

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class _Flow(Variable):
    """dx/dt, affine in the score with the coefficients of the SDE."""

    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        p, r = super().read(sde, t)
        half = sde.diffusion(t) ** 2 / 2
        return sde.drift_coefficient(t) - half * p, -half * r


eps = Variable("eps", from_eps, lambda alpha, sigma: alpha, rho, rho)
x0 = Variable("x0", from_x0, lambda alpha, sigma: sigma, snr, lam)
velocity = Variable("velocity", from_velocity, lambda alpha, sigma: alpha + sigma, tau, tau)
time = _Flow("time", from_score, lambda alpha, sigma: torch.ones_like(alpha), t, t)
