"""In which letters the probability flow is integrated: dy/du = q, y = x / m, for a variable q; and the clocks to interpolate q in.

With lam = logsnr / 2 and rho = sigma / alpha = e^-lam, these choices make the linear part of the flow exact:

eps:      d(x / alpha) = eps d(rho)
x0:       d(x / sigma) = x0 d(1 / rho)
velocity: d(x / (alpha + sigma)) = (eps - x0) d(tau), tau = sigma / (alpha + sigma)
v:        d(x / m) = (v / m) d(atan rho), m^2 = alpha^2 + sigma^2; `V(sigma_data)` for data of another deviation

and `time` is the flow as it stands, dx = (f x - g^2/2 score) dt. Lu et al. 2022 (DPM-Solver, eq. 3.4; DPM-Solver++, eq. 8), Zhang & Chen
2023 (DEIS, eq. 10), Liu et al. 2023 (rectified flow) in one form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_number
from .linear import LinearSDE
from .parameterizations import from_eps, from_score, from_velocity, from_x0

__all__ = ["Angle", "Clock", "V", "Variable", "eps", "lam", "rho", "snr", "t", "tau", "time", "v", "velocity", "x0"]


class Clock(ABC):
    """A strictly monotone function of lam = log(alpha / sigma), to measure steps in. Subclass it with three lines for another one."""

    @abstractmethod
    def of_lam(self, lam: Tensor) -> Tensor:
        """The clock where log(alpha / sigma) is lam."""

    @abstractmethod
    def to_lam(self, w: Tensor) -> Tensor:
        """The inverse of `of_lam`."""

    @abstractmethod
    def rate(self, lam: Tensor) -> Tensor:
        """d of_lam / d lam."""

    def at(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """The clock at times t."""
        return self.of_lam(sde.logsnr(t) / 2)

    def time(self, sde: LinearSDE, w: Tensor) -> Tensor:
        """The times at which the clock reads w."""
        return sde.time(2 * self.to_lam(w))

    def along(self, sde: LinearSDE, lam: Tensor) -> Tensor:
        """`of_lam`, for a clock that may know the schedule."""
        return self.of_lam(lam)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)  # a plain subclass may hold numbers of its own

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return type(self).__name__.strip("_").lower()


class _Lam(Clock):
    def of_lam(self, lam: Tensor) -> Tensor:
        return lam

    def to_lam(self, w: Tensor) -> Tensor:
        return w

    def rate(self, lam: Tensor) -> Tensor:
        return torch.ones_like(lam)


class _Rho(Clock):
    def of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)

    def to_lam(self, w: Tensor) -> Tensor:
        return -torch.log(w)

    def rate(self, lam: Tensor) -> Tensor:
        return -torch.exp(-lam)


class _Snr(Clock):
    def of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(lam)

    def to_lam(self, w: Tensor) -> Tensor:
        return torch.log(w)

    def rate(self, lam: Tensor) -> Tensor:
        return torch.exp(lam)


class _Tau(Clock):
    def of_lam(self, lam: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(lam))  # torch.sigmoid rounds by an element's place in the tensor

    def to_lam(self, w: Tensor) -> Tensor:
        return -torch.logit(w)

    def rate(self, lam: Tensor) -> Tensor:
        return -self.of_lam(lam) * self.of_lam(-lam)


@dataclass(frozen=True, eq=False)
class Angle(Clock):
    """atan(rho / sigma_data)."""

    sigma_data: float = 1.0

    def of_lam(self, lam: Tensor) -> Tensor:
        """atan(e^-lam / sigma_data)."""
        return torch.atan(torch.exp(-lam) / self.sigma_data)

    def to_lam(self, w: Tensor) -> Tensor:
        """-log(sigma_data tan w)."""
        return -torch.log(self.sigma_data * torch.tan(w))

    def rate(self, lam: Tensor) -> Tensor:
        """-r / (1 + r^2), r = e^-lam / sigma_data."""
        r = torch.exp(-lam) / self.sigma_data
        return -r / (1 + r**2)


class _T(_Lam):
    """Time itself, the one clock that knows the schedule. As the u of a variable it is its coordinate too, and needs no rate."""

    def at(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return t

    def time(self, sde: LinearSDE, w: Tensor) -> Tensor:
        return w

    def along(self, sde: LinearSDE, lam: Tensor) -> Tensor:
        return sde.time(2 * lam)


lam, rho, snr, tau, t = _Lam(), _Rho(), _Snr(), _Tau(), _T()


@dataclass(frozen=True, eq=False)
class Variable(ABC):
    """dy/du = q with y = x / m, q = p x + r x0. `clock` is u, `coordinate` the clock in which solvers interpolate q by default.

    Subclass it with `scale` and `read` for another one, and every solver here takes it.
    """

    clock: Clock
    coordinate: Clock

    @abstractmethod
    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """m, at times where the SDE has these coefficients."""

    @abstractmethod
    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, r) of q = p x + r x0 at times t."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return type(self).__name__.strip("_").lower()


def _backwards(inverse: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    a, b = inverse
    return -a / b, 1 / b


class _Eps(Variable):
    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha

    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return _backwards(from_eps(sde.alpha(t), sde.sigma(t)))


class _X0(Variable):
    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma

    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return _backwards(from_x0(sde.alpha(t), sde.sigma(t)))


class _Velocity(Variable):
    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha + sigma

    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return _backwards(from_velocity(sde.alpha(t), sde.sigma(t)))


class _Time(Variable):
    """dx/dt = f x - g^2/2 score."""

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)

    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        p, r = _backwards(from_score(sde.alpha(t), sde.sigma(t)))
        half = sde.diffusion(t) ** 2 / 2
        return sde.drift_coefficient(t) - half * p, -half * r


@dataclass(frozen=True, repr=False, eq=False)
class V(Variable):
    """d(x / m) = q d(angle), m^2 = (alpha sigma_data)^2 + sigma^2, q = cos(angle) eps - sin(angle) x0 / sigma_data: EDM's network output.

    q vanishes for Gaussian data of deviation sigma_data, whose flow every solver here then follows exactly. With sigma_data = 1 it is
    v (Salimans & Ho 2022, ICLR, eq. 11, over m) for any schedule.
    """

    clock: Clock = field(init=False)
    coordinate: Clock = field(init=False)
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        angle = Angle(check_number(self.sigma_data, "sigma_data", 0.0, open_low=True))
        object.__setattr__(self, "clock", angle)
        object.__setattr__(self, "coordinate", angle)

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Deviation of x when the data are N(0, sigma_data^2)."""
        return ((alpha * self.sigma_data) ** 2 + sigma**2).sqrt()

    def read(self, sde: LinearSDE, t: Tensor) -> tuple[Tensor, Tensor]:
        """q = (alpha sd / (m sigma)) x - (m / (sigma sd)) x0."""
        alpha, sigma, sd = sde.alpha(t), sde.sigma(t), self.sigma_data
        m = self.scale(alpha, sigma)
        return alpha * sd / (m * sigma), -m / (sigma * sd)

    def __repr__(self) -> str:
        return "v" if self == v else f"V({self.sigma_data})"


def check_variable(value: Any) -> Variable:
    """Return a Variable; raise a TypeError that says where they are otherwise."""
    if not isinstance(value, Variable):
        raise TypeError(
            f"variable is {value!r}; wanted one of scoresde.variables (eps, x0, velocity, v, V(sigma_data), time) or a Variable of your own"
        )
    return value


eps, x0, velocity, time = _Eps(rho, rho), _X0(snr, lam), _Velocity(tau, tau), _Time(t, t)
v = V()
