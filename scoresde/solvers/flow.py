"""One-step solvers of the probability flow ODE, dx/dt = alpha' x0 + sigma' eps, or d(x / alpha) = eps d(rho)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..denoiser import flow
from ..grid import karras, uniform
from ..linear import cast
from ..oracle import Oracle
from .base import Solver

__all__ = ["Euler", "Heun"]


@dataclass(frozen=True)
class Euler(Solver):
    """Euler in t: x_s = x + (s - t) dx/dt. Order 1; Song et al. 2021 (ICLR), eq. 13 discretised."""

    grid = staticmethod(uniform)
    invariant = False
    order = 1

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        return x + cast(s - t, x) * flow(oracle, x, t), None


@dataclass(frozen=True)
class Heun(Solver):
    """Heun in rho: x / alpha moves by the mean of eps at both ends times d(rho). Order 2, two evaluations a step.

    With the mean at the last time this is Karras et al. 2022 (NeurIPS), algorithm 1.
    """

    grid = staticmethod(karras)
    order = 2

    def evaluations(self, steps: int) -> int:
        """2 steps."""
        return 2 * steps

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        sde = oracle.sde
        a, b, h = cast(sde.alpha(t), x), cast(sde.alpha(s), x), cast(sde.rho(s) - sde.rho(t), x)
        e = oracle(x, t).eps
        e_next = oracle(b * (x / a + h * e), s).eps
        return b * (x / a + h * (e + e_next) / 2), None
