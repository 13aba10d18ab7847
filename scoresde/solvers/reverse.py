"""The linear solvers of the reverse SDE: those of the flow, in another frame and with its noise. All draw along one Brownian path.

With z = x / alpha, lam = -log rho, every dz = (1 + tau^2) eps d(rho) + tau dB(rho^2), down in rho, has the marginals of the forward
SDE: tau = 0 is the flow, tau = 1 the reverse SDE. In data letters, with k = 1 + tau^2 and phi = rho^k,

    z_s = (phi_s / phi_t) z_t + phi_s int D d(1 / phi) + sqrt(rho_s^2 - (rho_t phi_s / phi_t)^2) xi

exactly, and any phi that grows faster than rho will do, k = d log phi / d log rho (ER-SDE). Only D = x0 is interpolated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_callable, check_number, shape_of
from ..grid import logsnr
from ..linear import LinearSDE, derivative
from ..variables import Clock, Variable, eps, lam, rho, x0
from .base import Solver, StochasticSolver
from .exponential import Multistep, SingleStep
from .families import DPMSolver, DPMSolverPP, Heun, check_order, suffix
from .tableau import OF_ORDER, TRAPEZOID
from .weights import Frame, Segment, Weights, bh1, bh2, segment, taylor

__all__ = [
    "ERSDE", "SEEDS", "Band", "NoisyMultistep", "NoisySingleStep", "Phi", "SASolver", "SDEDPMSolverPP", "StochasticHeun", "Tau",
]  # fmt: skip


@dataclass(frozen=True)
class Band:
    """A noise level for `tau=`: `tau` where low <= rho <= high (rho = sigma / alpha), else 0."""

    low: float
    high: float
    tau: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.low, "low", 0.0)
        if check_number(self.high, "high", 0.0) <= self.low:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; wanted low < high")
        check_number(self.tau, "tau", 0.0)

    def __call__(self, rho: Tensor) -> Tensor:
        """tau at rho."""
        return torch.where((rho >= self.low) & (rho <= self.high), torch.full_like(rho, self.tau), torch.zeros_like(rho))


def _ask(fn: Any, name: str, rho: Tensor, low: float, wanted: str) -> Tensor:
    """fn(rho), a float64 tensor of the shape of rho, finite and above `low`."""
    try:
        values = fn(rho)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}(rho) failed on a tensor {shape_of(rho)}: {error}; wanted a torch function, as {wanted}"
        ) from error
    if not isinstance(values, Tensor) or values.shape != rho.shape or values.dtype != rho.dtype:
        raise ValueError(f"{name}(rho) gave {shape_of(values)} for rho {shape_of(rho)}; wanted its shape and dtype, as {wanted}")
    if not bool((values.isfinite() & (values >= low)).all()):
        raise ValueError(
            f"{name}(rho) gave {values.min():.6g} to {values.max():.6g}; wanted finite numbers >= {low:.3g}, as {wanted}"
        )
    return values


class Level(ABC):
    """How much noise: phi over a step that starts at lam = a; both arguments are `[n, 1]` or `[n, points]`."""

    fn: Any  # what the caller gave: a number, or a function of rho

    @abstractmethod
    def rate(self, a: Tensor, at: Tensor) -> Tensor:
        """k = 1 + tau^2 at lam = at."""

    @abstractmethod
    def decay(self, a: Tensor, at: Tensor) -> Tensor:
        """log(phi_a / phi) = int_a k dlam."""


@dataclass(frozen=True)
class Tau(Level):
    """tau is a number, or a function of rho read at the start of each step and held over it."""

    tau: float | Callable[[Tensor], Tensor]
    fn = property(lambda self: self.tau)

    def rate(self, a: Tensor, at: Tensor) -> Tensor:
        """1 + tau^2."""
        if not callable(self.tau):
            return torch.full_like(at, 1 + self.tau**2)
        tau = _ask(self.tau, "tau", torch.exp(-a), 0.0, "Band(0.05, 1.0)")
        return (1 + tau**2).expand_as(at)

    def decay(self, a: Tensor, at: Tensor) -> Tensor:
        """(1 + tau^2) (lam - a)."""
        return self.rate(a, at) * (at - a)


@dataclass(frozen=True)
class Phi(Level):
    """phi(rho) as given, a torch function; only its ratios matter."""

    phi: Callable[[Tensor], Tensor]
    fn = property(lambda self: self.phi)

    def _log(self, at: Tensor) -> Tensor:
        values = _ask(self.phi, "phi", torch.exp(-at), torch.finfo(at.dtype).tiny, "lambda rho: rho**2")
        return values.log()

    def rate(self, a: Tensor, at: Tensor) -> Tensor:
        """d log phi / d log rho."""
        rate = -derivative(self._log, at)
        if not bool((rate >= 1 - 1e-9).all()):
            i = int(rate.flatten().argmin())
            raise ValueError(
                f"d log phi / d log rho is {rate.flatten()[i]:.6g} at rho = {torch.exp(-at).flatten()[i]:.6g}; wanted at least 1: phi must "
                "grow as fast as rho, the flow, or faster, as rho**2, the reverse SDE"
            )
        return rate

    def decay(self, a: Tensor, at: Tensor) -> Tensor:
        """log phi_a - log phi."""
        return self._log(a) - self._log(at)


class DataFrame(Frame):
    """y = z / phi, dy = x0 d(1 / phi) + noise; phi is 1 at the end of each step, so that nothing overflows that matters."""

    levels: ClassVar[type[Level]] = Level  # those it can take

    def __init__(self, variable: Variable, level: Level, sde: LinearSDE, t: Tensor, s: Tensor) -> None:
        super().__init__(variable, sde, t, s)
        self.level, self.a, self.b = level, self._lam(t), self._lam(s)
        self.whole = level.decay(self.a, self.b)

    def _lam(self, t: Tensor) -> Tensor:
        return self.sde.logsnr(t)[:, None] / 2

    def scale(self, at: Tensor) -> list[float]:
        """alpha phi."""
        return (self.sde.alpha(at) * torch.exp(self.whole - self.level.decay(self.a, self._lam(at)))[:, 0]).tolist()

    def rate(self, at: Tensor) -> Tensor:
        """d(1 / phi) / dlam."""
        return self.level.rate(self.a, at) * torch.exp(self.level.decay(self.a, at) - self.whole)

    def segments(self, coordinate: Clock | None, at: Tensor) -> list[Segment]:
        """From t to times `at` in u = 1 / phi."""
        return segment(self.variable, coordinate, self.sde, self.t, at, self.rate).each()

    def spread(self, a: Tensor, b: Tensor) -> list[float]:
        """rho_s e^(T_b - T_s) sqrt(1 - e^(-2 (T_b - T_a))), T = int tau^2 dlam from t."""
        first, last = (self._lam(v) for v in (a, b))
        low, high, end = (self.level.decay(self.a, v) - (v - self.a) for v in (first, last, self.b))
        gap = torch.where(
            high - low > 1e-14 * (1 + last.abs()), high - low, 0.0
        )  # what is less is rounding: phi = rho has no noise
        return (torch.exp(high - end - self.b) * (-torch.expm1(-2 * gap)).sqrt())[:, 0].tolist()


class NoiseFrame(DataFrame):
    """y = z, dy = eps d(k rho) + noise."""

    levels = Tau

    def scale(self, at: Tensor) -> list[float]:
        """alpha."""
        return self.sde.alpha(at).expand(at.shape).tolist()

    def rate(self, at: Tensor) -> Tensor:
        """d(k rho) / dlam."""
        return -self.level.rate(self.a, at) * torch.exp(-at)

    def spread(self, a: Tensor, b: Tensor) -> list[float]:
        """tau sqrt(rho_a^2 - rho_b^2)."""
        first, last = (self._lam(v) for v in (a, b))
        tau = (self.level.rate(self.a, first) - 1).sqrt()
        return (tau * torch.exp(-first) * (-torch.expm1(2 * (first - last))).sqrt())[:, 0].tolist()


_FRAMES = {x0: DataFrame, eps: NoiseFrame}


@dataclass(frozen=True, repr=False, kw_only=True)
class _Noisy:
    """What makes a linear solver one of the reverse SDE: `level`, and the frame of its variable (x0 or eps)."""

    level: Level
    order = StochasticSolver.order

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.variable not in _FRAMES or self.coordinate is None:  # type: ignore[attr-defined]
            raise ValueError(f"variable is {self.variable!r}, coordinate {self.coordinate!r}; wanted x0 or eps, and a Clock")  # type: ignore[attr-defined]
        if not isinstance(self.level, _FRAMES[self.variable].levels):  # type: ignore[attr-defined]
            raise TypeError(f"level is {self.level!r}; wanted a scoresde.solvers.Tau (or, with x0, Phi)")

    @property
    def strong_order(self) -> float:
        """1; 1/2 for a tau that is a function, which is held over a step: where it jumps inside one, the jump comes late."""
        return 0.5 if isinstance(self.level, Tau) and callable(self.level.tau) else 1.0

    @property
    def remembers(self) -> bool:
        """Not where tau or phi is an object or a closure, which may change."""
        fn = self.level.fn
        return not callable(fn) or isinstance(fn, Band) or getattr(fn, "__closure__", fn) is None

    def frame(self, sde: LinearSDE, t: Tensor, s: Tensor) -> Frame:
        """y and u at this noise level."""
        return _FRAMES[self.variable](self.variable, self.level, sde, t, s)  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False)
class NoisyMultistep(_Noisy, Multistep, StochasticSolver):
    """Stochastic Adams: x0 extrapolated through its last `nodes` values, the corrector (PEC) keeping the noise of its step."""

    @property
    def weak_order(self) -> float:
        """Of the noise in the past no more than 2 comes back."""
        return float(min(2, max(self.nodes, self.corrector)))


@dataclass(frozen=True, repr=False)
class NoisySingleStep(_Noisy, SingleStep, StochasticSolver):
    """Stochastic (exponential) Runge-Kutta for additive noise: each evaluation feels the noise up to its own time."""

    @property
    def weak_order(self) -> float:
        """2 from two evaluations on."""
        return float(min(2, self.tableau.order))


def _level(tau: Any) -> Tau | None:
    """The level of `tau=`; None is the flow."""
    if callable(tau) and not isinstance(tau, type):
        return Tau(tau)
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise TypeError(f"tau is {tau!r}; wanted a number, or a function of rho = sigma / alpha as Band(0.05, 1.0)")
    tau = check_number(tau, "tau", 0.0, 1e6)
    return Tau(tau) if tau > 0 else None


def SDEDPMSolverPP(degree: int = 2, tau: Any = 1.0, singlestep: bool = False, weights: Weights = bh2) -> Solver:
    """SDE-DPM-Solver++: z_s = r z + sum_j c_j D_j + rho_s sqrt(1 - e^(-2 tau^2 h)) xi, r = e^(-(1 + tau^2) h), h the step of lam.

    c_j integrates the polynomial in lam through the last `degree` D (1 to 3) against (1 + tau^2) e^(-(1 + tau^2)(lam_s - u)); with
    `bh2` its slope is taken at the middle (2M as published), `exact` integrates it. Degree 1 is `Ancestral()`. singlestep: D at 1/2, or
    1/3 and 2/3, of the step instead, `degree` evaluations. tau: a number or a function of rho; 0 is `DPMSolverPP`. Weak order 1 or 2
    (more nodes than two do not raise it), strong 1, or 1/2 where tau is a function, which may jump between two times. Lu et al. 2022
    (DPM-Solver++), eq. 16-18; k-diffusion's eta is tau^2.
    """
    flow = DPMSolverPP(check_order(degree, 1, 3, "degree"), singlestep, weights, None if singlestep else False)
    level = _level(tau)
    if level is None:
        return flow
    tail = suffix(tau=None if tau == 1 else tau, singlestep=singlestep or None, weights=None if weights is bh2 else weights)
    name = f"SDEDPMSolverPP(degree={degree}{tail})"
    if singlestep:
        return _single(x0, degree, level, name)
    return NoisyMultistep(x0, lam, degree, weights, startup=False, level=level, name=name)


def _single(variable: Variable, degree: int, level: Level, name: str) -> Solver:
    return NoisySingleStep(variable, lam, OF_ORDER[degree], level=level, name=name)


def SEEDS(degree: int = 3, tau: Any = 1.0) -> Solver:
    """SEEDS: z_s = z + (1 + tau^2) int eps d(rho) + tau sqrt(rho_t^2 - rho_s^2) xi, eps in lam at 0, 1/2 or 0, 1/3, 2/3 of the step.

    `degree` evaluations; those inside the step feel the noise drawn up to them, and the end the sum of all. Weak order 1, 2, 2, strong
    1, or 1/2 where tau is a function of rho, which may jump between two times. tau = 0 is `DPMSolver(degree)`. Gonzalez et al. 2023
    (NeurIPS), algorithms 1-3.
    """
    level, name = _level(tau), f"SEEDS(degree={check_order(degree, 1, 3, 'degree')}{suffix(tau=None if tau == 1 else tau)})"
    return DPMSolver(degree) if level is None else _single(eps, degree, level, name)


def StochasticHeun(tau: Any = 1.0) -> Solver:
    """Heun with additive noise: z' = z + k (rho_s - rho_t) eps_t + xi', z_s = z + k (rho_s - rho_t) (eps_t + eps') / 2 + xi'.

    k = 1 + tau^2, xi' = tau sqrt(rho_t^2 - rho_s^2) xi the same in both. Two evaluations a step; weak order 2, strong 1, or 1/2 where
    tau is a function of rho, which may jump between two times. tau = 0 is `Heun()`. Kloeden & Platen 1992, eq. 15.1.4 for additive
    noise, in z and rho.
    """
    level = _level(tau)
    name = f"StochasticHeun({suffix(tau=None if tau == 1 else tau).removeprefix(', ')})"
    if level is None:
        return Heun()
    return NoisySingleStep(eps, rho, TRAPEZOID, level=level, name=name)


def SASolver(
    predictor: int = 3, corrector: int | None = None, tau: Any = 1.0, weights: Weights = bh1, lower_final: bool = False
) -> Solver:
    """SA-Solver: stochastic Adams-Bashforth through `predictor` nodes in lam, stochastic Adams-Moulton through `corrector`, PEC.

    z_s = e^(-k h) z + int k e^(-k (lam_s - u)) D(u) du + rho_s sqrt(1 - e^(-2 tau^2 h)) xi, k = 1 + tau^2; predictor and corrector share
    xi, and the corrector's evaluation is kept: one a step. corrector: its nodes, the new one counted; 0: none; None: predictor + 1, and
    none for predictor 1, which is `Ancestral()`. tau: a number, or a function of rho held over each step (`Band(0.05, 1.0)`). weights:
    `bh1` is the published exception for two nodes, `exact` has none. Weak order 2 at most, strong 1, or 1/2 where tau is a function, which
    may jump between two times. Xue et al. 2023 (NeurIPS), eq. 13-15.
    """
    check_order(predictor, 1, 4, "predictor")
    if corrector is None:
        corrector = predictor + 1 if predictor > 1 else 0
    tail = suffix(tau=None if tau == 1 else tau, weights=None if weights is bh1 else weights, lower_final=lower_final or None)
    name = f"SASolver(predictor={predictor}, corrector={corrector}{tail})"
    level, settings = _level(tau), dict(corrector=corrector, startup=False, lower_final=lower_final, name=name)
    if level is None:
        return Multistep(x0, lam, predictor, weights, **settings)  # type: ignore[arg-type]
    return NoisyMultistep(x0, lam, predictor, weights, level=level, **settings)  # type: ignore[arg-type]


def er_phi(rho: Tensor) -> Tensor:
    """rho (e^(rho^0.3) + 10): the noise scale ER-SDE recommends. Cui et al. 2023, section 4."""
    return rho * (torch.exp(rho**0.3) + 10)


def ERSDE(degree: int = 3, phi: Callable[[Tensor], Tensor] = er_phi, weights: Weights = taylor) -> NoisyMultistep:
    """ER-SDE: z_s = (phi_s / phi_t) z + phi_s int D d(1 / phi) + sqrt(rho_s^2 - (rho_t phi_s / phi_t)^2) xi, D of degree - 1 in rho.

    phi: a torch function of rho, only ratios matter; rho**2 is the reverse SDE (degree 1: `Ancestral()`), rho the flow, at least as steep
    as which it must be. The integrals are by Gauss-Legendre. weights: `taylor` as published, whose slope at degree 3 is that of two
    nodes; `exact` goes through all three. Weak order 2 at most, strong 1. Cui et al. 2023 (ER-SDE-Solver), eq. 17-18.
    """
    check_callable(phi, "phi", "a torch function of rho, as lambda rho: rho**2")
    tail = suffix(phi=None if phi is er_phi else phi, weights=None if weights is taylor else weights)
    name = f"ERSDE(degree={check_order(degree, 1, 3, 'degree')}{tail})"
    return NoisyMultistep(x0, rho, degree, weights, startup=False, level=Phi(phi), name=name, recommended=logsnr)
