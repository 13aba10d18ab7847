"""One-step solvers of the reverse SDE, dx = (f x - g^2 score) dt + g dw with dt < 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import check_number
from ..denoiser import reverse_drift
from ..grid import logsnr
from ..linear import LinearSDE, cast
from ..oracle import Oracle
from .base import StochasticSolver

__all__ = ["SRA1", "SRA3", "Ancestral", "EulerMaruyama", "ImprovedEuler", "ReverseDiffusion"]


@dataclass(frozen=True)
class EulerMaruyama(StochasticSolver):
    """x_s = x + (s - t) (f x - g^2 score) + g sqrt(t - s) z. Strong order 1 (the noise is additive), weak order 1.

    Kloeden & Platen 1992, ch. 10; the reverse SDE of Song et al. 2021 (ICLR), eq. 6.
    """

    grid = staticmethod(logsnr)
    invariant = False
    weak_order = 1.0
    strong_order = 1.0

    def start(self, sde: LinearSDE, times: Tensor) -> None:
        """Nothing; ValueError where a step is too long for the drift: |f| h > 2."""
        check_stable(self, sde, times)

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        h = s - t
        spread = oracle.sde.diffusion(t) * (-h).sqrt()
        return x + cast(h, x) * reverse_drift(oracle, x, t) + cast(spread, x) * oracle.noise(x, t, s), None


def check_stable(solver: StochasticSolver, sde: LinearSDE, times: Tensor) -> None:
    """Raise where a step is too long for the drift of an Euler step: |f| h > 2."""
    size = (sde.drift_coefficient(times[:-1]) * times.diff()).abs().expand(len(times) - 1)
    if bool((size > 2).any()):
        i = int((size > 2).int().argmax())
        raise ValueError(
            f"{solver!r} is unstable in step {i + 1} of {len(size)}, t = {times[i]:.6g} -> {times[i + 1]:.6g}: |f| h = {size[i]:.3g}, "
            "wanted at most 2; take more steps, another grid, or a solver that is exact in f, such as Ancestral()"
        )


@dataclass(frozen=True)
class ImprovedEuler(StochasticSolver):
    """x_s = (x1 + x + h drift(x1, s) + g_s dW) / 2 with x1 = x + h drift(x, t) + g_t dW, h = s - t: Heun's method, one dW for both halves.

    Weak order 2 and strong order 1 (the noise is additive), two evaluations a step. Roberts 2012 (arXiv:1210.0933).
    """

    grid = staticmethod(logsnr)
    invariant = False
    weak_order = 2.0
    strong_order = 1.0

    def evaluations(self, steps: int) -> int:
        """Two a step."""
        return 2 * steps

    def start(self, sde: LinearSDE, times: Tensor) -> None:
        """Nothing; ValueError where a step is too long for the drift: |f| h > 2."""
        check_stable(self, sde, times)

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        return improved_euler(oracle, x, t, s)[1], None


def improved_euler(oracle: Oracle, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(x1, x_s) of `ImprovedEuler`; t, s () or `[B, 1, ..., 1]`."""
    sde, h = oracle.sde, s - t
    z, root = oracle.noise(x, t, s), (-h).sqrt()
    drift = reverse_drift(oracle, x, t)
    x1 = x + cast(h, x) * drift + cast(sde.diffusion(t) * root, x) * z
    spread = (sde.diffusion(t) + sde.diffusion(s)) / 2 * root
    return x1, x + cast(h / 2, x) * (drift + reverse_drift(oracle, x1, s)) + cast(spread, x) * z


@dataclass(frozen=True)
class ReverseDiffusion(StochasticSolver):
    """x_s = (2 - r) x + v score + sqrt(v) z: the forward step x_t = r x_s + sqrt(v) z, turned. Weak and strong order 1.

    r = alpha_t / alpha_s and v = Var[x_t | x_s] are those of the SDE's own transition: on a DDPM chain's `nodes()` sqrt(1 - beta) and
    beta, under VE 1 and sigma_t^2 - sigma_s^2. Song et al. 2021 (ICLR), eq. 46 and appendix E.
    """

    grid = staticmethod(logsnr)
    invariant = False
    weak_order = 1.0
    strong_order = 1.0

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        r, std = oracle.sde.transition(s, t)  # of x_t | x_s
        score = oracle(x, t).score
        return cast(2 - r, x) * x + cast(std**2, x) * score + cast(std, x) * oracle.noise(x, t, s), None


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
        kept = b * (1 - self.eta**2 + (self.eta * sde.rho(s) / sde.rho(t)) ** 2).sqrt()  # sqrt(b^2 - w^2), without the difference
        return a * p.x0 + cast(kept, x) * p.eps + cast(w, x) * oracle.noise(x, t, s), None


@dataclass(frozen=True)
class SRA(StochasticSolver):
    """Stochastic Runge-Kutta for additive noise, dy = a dw + b dW, by `noise.pair`. Strong order 1.5, weak order 2.

    y = x / alpha, a = (g / sigma)^2 (x0 - y) = (g^2 / alpha) score, b = g / alpha, w = -t: the reverse SDE without its linear drift.
    With h = t - s and b of the ends of the step alone,
    H_i = y + h sum_j A_ij a_j + b-weighted dZ / h; y_s = y + h sum_i w_i a_i + b_s dW + (b_t - b_s) dZ / h, dZ = int (W_u - W_t) |du|.
    Rossler 2010 (SIAM J. Numer. Anal. 48), eq. 6.3-6.5 and tables 6.2, 6.3.
    """

    places: ClassVar[tuple[float, ...]]  # c: where in the step the evaluations sit
    inner: ClassVar[tuple[tuple[float, ...], ...]]  # A, a row an evaluation after the first
    felt: ClassVar[tuple[tuple[float, float], ...]]  # of dZ / h in them: the weights of b_s and b_t
    weights: ClassVar[tuple[float, ...]]
    grid = staticmethod(logsnr)
    invariant = False
    weak_order = 2.0
    strong_order = 1.5

    def evaluations(self, steps: int) -> int:
        """A tableau's worth a step."""
        return len(self.weights) * steps

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        sde, h = oracle.sde, t - s
        dw, dz = oracle.noise.pair(x, t, s)
        b_t, b_s = (sde.diffusion(u) / sde.alpha(u) for u in (t, s))
        y, a = x / cast(sde.alpha(t), x), []
        for c, row, (at_s, at_t) in zip(self.places, ((), *self.inner), ((0.0, 0.0), *self.felt), strict=True):
            u = t - c * h
            stage = y + cast((at_s * b_s + at_t * b_t) / h, x) * dz
            for weight, drift in zip(row, a, strict=True):
                stage = stage + cast(weight * h, x) * drift
            alpha, rate = sde.alpha(u), (sde.diffusion(u) / sde.sigma(u)) ** 2
            a.append(cast(rate, x) * (oracle(cast(alpha, x) * stage, u).x0 - stage))
        y = y + cast(b_s, x) * dw + cast((b_t - b_s) / h, x) * dz
        for weight, drift in zip(self.weights, a, strict=True):
            y = y + cast(weight * h, x) * drift
        return cast(sde.alpha(s), x) * y, None


@dataclass(frozen=True)
class SRA1(SRA):
    """Rossler's SRA1: two evaluations a step, of order 2 where there is no noise. Strong order 1.5, weak order 2; see `SRA`."""

    places = (0.0, 3 / 4)
    inner = ((3 / 4,),)
    felt = ((3 / 2, 0.0),)
    weights = (1 / 3, 2 / 3)


@dataclass(frozen=True)
class SRA3(SRA):
    """Rossler's SRA3: three evaluations a step, of order 3 where there is no noise. Strong order 1.5, weak order 2; see `SRA`."""

    places = (0.0, 1.0, 1 / 2)
    inner = ((1.0,), (1 / 4, 1 / 4))
    felt = ((0.0, 0.0), (1.0, 1 / 2))
    weights = (1 / 6, 1 / 6, 2 / 3)
