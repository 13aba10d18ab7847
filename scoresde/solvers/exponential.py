"""Exponential integrators: the linear part of the flow is exact, x0 or eps is extrapolated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import check_number
from ..grid import logsnr
from ..linear import cast
from ..oracle import Oracle
from .base import Solver

__all__ = ["DDIM", "DPMSolverPP"]


@dataclass(frozen=True)
class DDIM(Solver):
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) eps + w z, w^2 = eta^2 (sigma_s^2 / sigma_t^2) Var[x_t | x_s].

    eta = 0: the flow, order 1 (Euler in rho); eta = 1: `Ancestral()`, the reverse SDE. Song et al. 2021 (DDIM, ICLR), eq. 12, 16.
    """

    eta: float = 0.0
    grid = staticmethod(logsnr)

    def __post_init__(self) -> None:
        check_number(self.eta, "eta", 0.0, 1.0)

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise."""
        return self.eta > 0

    @property
    def order(self) -> int:
        """1 for the flow (eta = 0)."""
        if self.eta > 0:
            raise TypeError(f"DDIM(eta={self.eta}) is stochastic: read weak_order and strong_order")
        return 1

    weak_order = 1.0
    strong_order = 1.0

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        sde, p = oracle.sde, oracle(x, t)
        a, b = cast(sde.alpha(s), x), sde.sigma(s)
        if self.eta == 0:
            return a * p.x0 + cast(b, x) * p.eps, None
        w = self.eta * b / sde.sigma(t) * sde.transition(s, t)[1]
        return a * p.x0 + cast((b**2 - w**2).sqrt(), x) * p.eps + cast(w, x) * oracle.noise(x, t, s), None


@dataclass(frozen=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ multistep: x_s = (sigma_s / sigma_t) x - alpha_s (e^-h - 1) D, h = half the step in logsnr.

    order 1: D = x0 (DDIM); order 2 (2M): D = x0 + h / (2 h_last) (x0 - x0_last). Lu et al. 2022, algorithm 2 and eq. 17.
    """

    order: int = 2  # type: ignore[override]
    grid = staticmethod(logsnr)

    def __post_init__(self) -> None:
        if self.order not in (1, 2) or isinstance(self.order, bool):
            raise ValueError(f"order is {self.order!r}; wanted 1 or 2")

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t; the state is (x0_last, h_last)."""
        sde, x0 = oracle.sde, oracle(x, t).x0
        h = (sde.logsnr(s) - sde.logsnr(t)) / 2
        d = x0
        if self.order == 2 and state is not None:
            x0_last, h_last = state
            d = x0 + cast(h / (2 * h_last), x) * (x0 - x0_last)
        a, b = cast(-sde.alpha(s) * (-h).expm1(), x), cast(sde.sigma(s) / sde.sigma(t), x)
        return b * x + a * d, (x0, h)
