"""One-step solvers of the reverse SDE, dx = (f x - g^2 score) dt + g dw with dt < 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import check_number
from ..denoiser import reverse_drift
from ..grid import logsnr, quadratic
from ..linear import cast
from ..oracle import Oracle
from .base import StochasticSolver

__all__ = ["Ancestral", "EulerMaruyama"]


@dataclass(frozen=True)
class EulerMaruyama(StochasticSolver):
    """x_s = x + (s - t) (f x - g^2 score) + g sqrt(t - s) z. Strong order 1 (the noise is additive), weak order 1.

    Kloeden & Platen 1992, ch. 10; the reverse SDE of Song et al. 2021 (ICLR), eq. 6.
    """

    grid = staticmethod(quadratic)
    invariant = False
    weak_order = 1.0
    strong_order = 1.0

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        h = s - t
        spread = oracle.sde.diffusion(t) * (-h).sqrt()
        return x + cast(h, x) * reverse_drift(oracle, x, t) + cast(spread, x) * oracle.noise(x, t, s), None


@dataclass(frozen=True)
class Ancestral(StochasticSolver):
    """DDPM: x_s ~ q(x_s | x_t, x0), from the marginals, so valid for any SDE and any number of steps. Weak and strong order 1.

    mean = r (sigma_s / sigma_t)^2 x + alpha_s (v / sigma_t^2) x0, with r = alpha_t / alpha_s, v = Var[x_t | x_s];
    log variance = (1 - upper) log(v sigma_s^2 / sigma_t^2) + upper log v: the two bounds of Ho et al. 2020 (NeurIPS), section 3.2,
    eq. 6-7 (beta tilde, beta) and between them Nichol & Dhariwal 2021, eq. 15.
    """

    upper: float = 0.0
    grid = staticmethod(logsnr)
    weak_order = 1.0
    strong_order = 1.0

    def __post_init__(self) -> None:
        check_number(self.upper, "upper", 0.0, 1.0)

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        sde, x0 = oracle.sde, oracle(x, t).x0
        r, std = sde.transition(s, t)  # of x_t | x_s
        ratio = sde.sigma(s) / sde.sigma(t)
        a, b = cast(r * ratio**2, x), cast(sde.alpha(s) * (std / sde.sigma(t)) ** 2, x)
        spread = std * ratio ** (1 - self.upper)
        return a * x + b * x0 + cast(spread, x) * oracle.noise(x, t, s), None


@dataclass(frozen=True)
class NoisyDDIM(StochasticSolver):
    """`DDIM(eta)` for eta > 0; its formula is there."""

    eta: float
    weak_order = 1.0
    strong_order = 1.0

    def __post_init__(self) -> None:
        check_number(self.eta, "eta", 0.0, 1.0)

    def __repr__(self) -> str:
        return f"DDIM(eta={self.eta})"

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        sde, p = oracle.sde, oracle(x, t)
        a, b = cast(sde.alpha(s), x), sde.sigma(s)
        w = self.eta * b / sde.sigma(t) * sde.transition(s, t)[1]
        return a * p.x0 + cast((b**2 - w**2).sqrt(), x) * p.eps + cast(w, x) * oracle.noise(x, t, s), None
