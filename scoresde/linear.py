"""What a forward SDE is: dx = f(t) x dt + g(t) dw, whose marginals are x_t = alpha(t) x_0 + sigma(t) eps.

Either pair, (f, g) or (alpha, sigma), gives the other:
f = (log alpha)',  g^2 = (sigma^2)' - 2 f sigma^2 = -sigma^2 logsnr',  logsnr = 2 log(alpha / sigma).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.polynomial import chebyshev
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from .checks import check_callable, check_number, check_state, check_time, shape_of

__all__ = ["SDE", "DiscreteVP", "LinearSDE", "Tabulated"]


def cast(c: Tensor, x: Tensor) -> Tensor:
    """Coefficient `c`, computed in float64, as `x` can use it: a 0-dim one never promotes, a per-sample one is cast once."""
    return c.to(x.dtype) if c.ndim else c


def derivative(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d fn / dt, elementwise, by autograd (also under no_grad and inference_mode); zero where fn does not depend on t."""
    with torch.inference_mode(False), torch.enable_grad():
        u = t.detach().clone().requires_grad_()
        y = fn(u)
        return torch.autograd.grad(y.sum(), u)[0].detach() if y.requires_grad else torch.zeros_like(u)


_REGULAR: WeakValueDictionary[int, LinearSDE] = WeakValueDictionary()


def check_regular(sde: LinearSDE) -> LinearSDE:
    """Return `sde` when logsnr is finite and falls all the way (257 times, and the ends); raise a ValueError otherwise.

    An SDE is looked at once: denoisers are made again for every selection of rows.
    """
    if _REGULAR.get(id(sde)) is sde:
        return sde
    ends = sde.logsnr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)).tolist()
    if not math.inf > ends[0] > ends[1] > -math.inf:
        raise ValueError(
            f"{sde!r} has logsnr {ends[0]:.6g} at t_min and {ends[1]:.6g} at t_max; wanted finite numbers that fall: choose t_min and "
            "t_max where alpha and sigma are positive and sigma / alpha grows"
        )
    t = torch.linspace(sde.t_min, sde.t_max, 257, dtype=torch.float64)
    falls = sde.logsnr(t).diff() < 0  # False for NaN too
    if not bool(falls.all()):
        i = int((~falls).int().argmax())
        raise ValueError(
            f"the logsnr of {sde!r} is not finite or does not fall between t = {t[i]:.6g} and {t[i + 1]:.6g}; wanted alpha, sigma > 0 "
            "with sigma / alpha growing on all of [t_min, t_max]"
        )
    _REGULAR[id(sde)] = sde
    return sde


class SDE(ABC):
    """A forward SDE dx = drift(x, t) dt + diffusion(t) dw on [t_min, t_max], the times where it is regular."""

    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        check_number(self.t_min, "t_min", 0.0, open_low=True)
        check_number(self.t_max, "t_max", self.t_min, open_low=True)

    @abstractmethod
    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(x, t), of the shape of x `[B, *shape]`; t is () or `[B, 1, ..., 1]`."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), of the shape of t."""


class LinearSDE(SDE):
    """dx = f(t) x dt + g(t) dw. A subclass writes `alpha` and `sigma` (torch functions of t); the rest is derived once.

    Closed forms of `drift_coefficient`, `diffusion`, `logsnr` and `time` may be added; `from_coefficients` starts from (f, g).
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale: E[x_t | x_0] = alpha(t) x_0."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale: Var[x_t | x_0] = sigma(t)^2 I."""

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """f(t) = d log alpha / dt."""
        return derivative(lambda u: self.alpha(u).log(), t)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = sigma sqrt(-d logsnr / dt)."""
        return self.sigma(t) * (-derivative(self.logsnr, t)).sqrt()

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(t) x, of the shape of x."""
        check_time(t, check_state(x))
        return cast(self.drift_coefficient(t.double()), x) * x

    def logsnr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma), strictly decreasing in t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def rho(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha, the `sigma` of Karras et al. (2022)."""
        return self.sigma(t) / self.alpha(t)

    def time(self, logsnr: Tensor) -> Tensor:
        """The inverse of `logsnr`, by bisection on [t_min, t_max] (64 halvings, float64); out of range gives the nearer end."""
        lo = torch.full_like(logsnr, self.t_min, dtype=torch.float64)
        hi = torch.full_like(lo, self.t_max)
        for _ in range(64):
            mid = (lo + hi) / 2
            noisy = self.logsnr(mid) < logsnr
            lo, hi = torch.where(noisy, lo, mid), torch.where(noisy, mid, hi)
        return (lo + hi) / 2

    def transition(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, std) of x_s | x_t for s >= t: scale = alpha_s / alpha_t, std^2 = sigma_s^2 (1 - e^(logsnr_s - logsnr_t)).

        The usual sigma_s^2 - scale^2 sigma_t^2 cancels for close times; expm1 does not. Raises ValueError when s < t.
        """
        if s.device.type == t.device.type == "cpu" and bool((s < t).any()):
            raise ValueError(f"transition runs forward: s={s.min():g} is before t={t.max():g}; wanted s >= t: swap them?")
        gap = self.logsnr(s) - self.logsnr(t)
        return self.alpha(s) / self.alpha(t), self.sigma(s) * (-torch.expm1(gap)).sqrt()

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) noise; x0, noise `[B, *shape]`, t () or `[B, 1, ..., 1]`."""
        t = check_time(t, check_state(x0, "x0")).double()
        if noise.shape != x0.shape:
            raise ValueError(f"noise is {list(noise.shape)}; wanted the shape of x0, {list(x0.shape)}")
        return cast(self.alpha(t), x0) * x0 + cast(self.sigma(t), x0) * noise

    def prior_std(self) -> float:
        """Standard deviation of the prior N(0, std^2 I) that stands for p_{t_max}: sigma(t_max)."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def prior_kl(self, square: Tensor, d: int) -> Tensor:
        """KL(N(alpha x0, sigma^2 I) || N(0, s^2 I)) at t_max, s = prior_std, of x0 of d numbers whose |x0|^2 is `square`, nats.

        d / 2 (sigma^2 / s^2 - 1 - log sigma^2 / s^2) + alpha^2 |x0|^2 / (2 s^2). Ho et al. 2020 (NeurIPS), eq. 5, L_T.
        """
        last = torch.tensor(self.t_max, dtype=torch.float64)
        ratio = float((self.sigma(last) / self.prior_std()) ** 2)
        return d / 2 * (ratio - 1 - math.log(ratio)) + float(self.alpha(last) / self.prior_std()) ** 2 * square / 2

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior N(0, prior_std^2 I) in nats, `[B]`; the true p_{t_max} has mean alpha(t_max) E[x_0]."""
        d, std = x[0].numel() if len(x) else 0, self.prior_std()
        return -x.flatten(1).square().sum(1) / (2 * std**2) - d / 2 * math.log(2 * math.pi * std**2)

    @staticmethod
    def from_coefficients(
        f: Any, g: Any, t_min: float = 1e-3, t_max: float = 1.0, sigma_0: float = 0.0, breaks: tuple[float, ...] = ()
    ) -> Tabulated:
        """The SDE of callables f(t), g(t): alpha and sigma by quadrature; see `Tabulated`."""
        return Tabulated(f, g, t_min, t_max, sigma_0, tuple(breaks))

    def __str__(self) -> str:
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        a, snr = self.alpha(ends).tolist(), self.logsnr(ends).exp().tolist()
        return f"{self!r}: alpha(t_max) = {a[1]:.4g}, SNR(t_min) = {snr[0]:.4g}, SNR(t_max) = {snr[1]:.4g}"


@dataclass(frozen=True, repr=False)
class DiscreteVP(LinearSDE):
    """The continuous VP path through a DDPM chain: logsnr is the monotone cubic (Fritsch & Carlson 1980) through its.

    Index i = 0 .. N-1 of `betas` is time t = (i + 1) / N, where alpha^2 = prod_{j <= i} (1 - beta_j) exactly: t_min = 1/N,
    t_max = 1. `nodes()` are those times: ancestral sampling on them is the DDPM update (Ho et al. 2020, eq. 6-7).
    """

    betas: tuple[float, ...]
    t_min: float = field(init=False)
    t_max: float = field(init=False, default=1.0)
    _cubic: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.betas, tuple):
            raise TypeError(f"betas is {shape_of(self.betas)}; wanted a tuple of floats: VP.from_betas takes any sequence")
        if len(self.betas) < 2:
            raise ValueError(f"betas has {len(self.betas)} entries; wanted at least two")
        for i, beta in enumerate(self.betas):
            check_number(beta, f"betas[{i}]", 0.0, 1 - 1e-12, open_low=True)
        log_abar = np.cumsum(np.log1p(-np.asarray(self.betas)))
        logsnr = log_abar - np.log(-np.expm1(log_abar))
        cubic = PchipInterpolator(np.arange(1, len(logsnr) + 1) / len(logsnr), logsnr)
        last = [[0.0], [0.0], [float(cubic(1.0, nu=1))], [logsnr[-1]]]  # t = 1 opens its own panel: exact there
        object.__setattr__(self, "_cubic", np.concatenate([cubic.c, last], axis=1))
        object.__setattr__(self, "t_min", 1 / len(self.betas))
        super().__post_init__()

    def __repr__(self) -> str:
        return f"DiscreteVP(N={len(self.betas)}, betas={self.betas[0]:.4g} ... {self.betas[-1]:.4g})"

    def nodes(self) -> Tensor:
        """The chain as a grid: times N/N, ..., 2/N, 1/N, float64 `[N]`."""
        return torch.arange(len(self.betas), 0, -1, dtype=torch.float64) / len(self.betas)

    def logsnr(self, t: Tensor) -> Tensor:
        """The cubic's value, exact at the nodes."""
        n = len(self.betas)
        knots = torch.arange(1, n + 1, dtype=torch.float64, device=t.device) / n
        i = (torch.searchsorted(knots, t.detach().double().contiguous(), right=True) - 1).clamp(0, n - 1)
        a, b, c, d = torch.as_tensor(self._cubic, device=t.device)[:, i]
        u = t - knots[i]
        return ((a * u + b) * u + c) * u + d

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(sigmoid(logsnr))."""
        return torch.exp(torch.nn.functional.logsigmoid(self.logsnr(t)) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(sigmoid(-logsnr))."""
        return torch.exp(torch.nn.functional.logsigmoid(-self.logsnr(t)) / 2)


@dataclass(frozen=True)
class Tabulated(LinearSDE):
    """An SDE given by f(t) and g(t): log alpha = int_0^t f, sigma^2 = alpha^2 (sigma_0^2 + int_0^t g^2 / alpha^2).

    f, g: callables from a float64 tensor of times to its shape, regular on [0, t_max]. The integrals are those of Chebyshev
    interpolants of degree 15 on panels graded towards both ends: exact to rounding for smooth coefficients. A jump or a kink is named
    in `breaks`; one that is not raises ValueError.
    """

    f: Callable[[Tensor], Any]
    g: Callable[[Tensor], Any]
    t_min: float = 1e-3
    t_max: float = 1.0
    sigma_0: float = 0.0
    breaks: tuple[float, ...] = ()
    _edges: np.ndarray = field(init=False, repr=False, compare=False)
    _table: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.sigma_0, "sigma_0", 0.0)
        ends = np.geomspace(self.t_min / 4, self.t_max, 64)
        inner = [check_number(b, "a break", 0.0, self.t_max) for b in self.breaks]
        edges = np.unique(np.concatenate([[0.0, self.t_max], inner, ends[:-1], self.t_max - ends[:-1]]).round(15))
        u = chebyshev.chebpts1(16)
        half = np.diff(edges)[:, None] / 2
        t = torch.as_tensor(edges[:-1, None] + half * (u + 1))
        f, g = (self._values(fn, name, t) for fn, name in ((self.f, "f"), (self.g, "g")))
        self._check_smooth(f, "f", t)
        self._check_smooth(g**2, "g", t)  # the square: g may start like sqrt(t)
        log_alpha = self._integrals(f, half, 0.0)
        integrand = g**2 * np.exp(-2 * np.stack([chebyshev.chebval(u, c) for c in log_alpha]))
        object.__setattr__(self, "_edges", edges)
        object.__setattr__(self, "_table", np.stack([log_alpha, self._integrals(integrand, half, self.sigma_0**2)]))
        check_regular(self)

    @staticmethod
    def _values(fn: Callable[[Tensor], Any], name: str, t: Tensor) -> np.ndarray:
        check_callable(fn, name, "a callable of a tensor of times")
        y = fn(t)
        if not isinstance(y, (Tensor, np.ndarray, float, int)):
            raise TypeError(f"{name}(t) is {shape_of(y)}; wanted a tensor of the shape of t, or a number")
        y = torch.as_tensor(y, dtype=torch.float64)
        if y.shape not in (t.shape, ()):
            raise ValueError(f"{name}(t) is {list(y.shape)} for t {list(t.shape)}; wanted the shape of t")
        if not torch.isfinite(y).all():
            raise ValueError(f"{name}(t) is not finite somewhere in (0, {float(t.max()):g}]; wanted a regular coefficient")
        return y.expand(t.shape).detach().numpy()

    @staticmethod
    def _check_smooth(values: np.ndarray, name: str, t: Tensor) -> None:
        """Raise where the Chebyshev series of a panel has not converged: the integral would be wrong in silence."""
        tails = np.abs(chebyshev.chebfit(chebyshev.chebpts1(16), values.T, 15))[-2:].max(0)
        rough = tails > 1e-7 * max(float(np.abs(values).max()), 1e-300)
        if rough.any():
            i = int(rough.argmax())
            raise ValueError(
                f"{name}(t) is not smooth between t = {t[i].min():.6g} and {t[i].max():.6g}; name its jumps and kinks, as in breaks=(0.5,)"
            )

    @staticmethod
    def _integrals(values: np.ndarray, half: np.ndarray, start: float) -> np.ndarray:
        """Chebyshev coefficients, a row a panel, of the running integral of `values` at the nodes of each panel."""
        rows = []
        for y, h in zip(values, half, strict=True):
            row = chebyshev.chebint(chebyshev.chebfit(chebyshev.chebpts1(16), y, 15), lbnd=-1, scl=h[0])
            row[0] += start
            start = chebyshev.chebval(1.0, row)
            rows.append(row)
        return np.stack(rows)

    def _eval(self, which: int, t: Tensor) -> Tensor:
        edges, table = (torch.as_tensor(a, device=t.device) for a in (self._edges, self._table[which]))
        i = (torch.searchsorted(edges, t.detach().double().contiguous(), right=True) - 1).clamp(0, len(table) - 1)
        u = 2 * (t - edges[i]) / (edges[i + 1] - edges[i]) - 1
        c = table[i].unbind(-1)
        b1 = b2 = torch.zeros_like(u)  # Clenshaw
        for ck in reversed(c[1:]):
            b1, b2 = ck + 2 * u * b1 - b2, b1
        return c[0] + u * b1 - b2

    def alpha(self, t: Tensor) -> Tensor:
        """exp(int_0^t f)."""
        return self._eval(0, t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """alpha sqrt(sigma_0^2 + int_0^t g^2 / alpha^2)."""
        return self.alpha(t) * self._eval(1, t).sqrt()

    def drift_coefficient(self, t: Tensor) -> Tensor:
        """f(t), as given."""
        return torch.as_tensor(self.f(t), dtype=t.dtype, device=t.device).expand(t.shape)

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), as given."""
        return torch.as_tensor(self.g(t), dtype=t.dtype, device=t.device).expand(t.shape)
