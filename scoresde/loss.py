"""Denoising score matching, once: the weighted error of x0. Weights and time distributions are functions; write your own likewise.

Other objectives, which take the same weights and times: `scoresde.objectives`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_callable, check_number, check_state, check_time, shape_of
from .denoiser import Denoiser, check_denoiser
from .linear import LinearSDE
from .noise import entropy_seeds, seeded

__all__ = [
    "capped", "discrete", "dsm_loss", "edm", "importance", "likelihood", "log_normal", "low_discrepancy", "min_snr", "simple",
    "snr", "snr_plus_one", "stratified", "truncated_snr", "uniform",
]  # fmt: skip

Weight = Callable[[LinearSDE, Tensor], Tensor]
Times = Callable[[LinearSDE, Tensor], Tensor]
Objective = Callable[[Denoiser, Tensor, Tensor, Weight, Tensor | None], Tensor]

FLOOR = 0.1  # share of draws uniform in logsnr: no weight exceeds 1 / FLOOR of what it would be if all were
CELLS = 1024  # of a density of logsnr


def begin(denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """(t, noise) of a loss, t as () or `[B, 1, ..., 1]`, noise fresh where there is none; raise for what no loss can use."""
    check_denoiser(denoiser)
    check_state(x0, "x0")
    check_callable(weight, "weight", "a function (sde, t) -> factor on the x0 error, as scoresde.loss.edm")
    if isinstance(t, Tensor) and t.ndim == 1 and len(t) == len(x0):
        t = t.reshape(-1, *[1] * (x0.ndim - 1))
    sde, slack = denoiser.sde, 4 * torch.finfo(check_time(t, x0).dtype).eps * denoiser.sde.t_max
    if t.device.type == "cpu" and t.numel() and not sde.t_min - slack <= float(t.min()) <= float(t.max()) <= sde.t_max + slack:
        raise ValueError(f"t spans [{t.min():.6g}, {t.max():.6g}]; wanted times of {sde!r}, in [{sde.t_min:g}, {sde.t_max:g}]")
    if noise is None:
        return t, seeded(entropy_seeds(len(x0))).initial(x0.shape, x0.dtype, x0.device)
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise is {shape_of(noise)}; wanted unit noise of the shape of x0, {list(x0.shape)}, or None for fresh")
    if noise.shape != x0.shape:
        raise ValueError(f"noise is {list(noise.shape)}; wanted the shape of x0, {list(x0.shape)}")
    return t, noise


def weighted(weight: Weight, sde: LinearSDE, t: Tensor, error: Tensor) -> Tensor:
    """weight(t) error, `[B]`, in the dtype of the error."""
    return torch.as_tensor(weight(sde, t.double())).to(error).flatten() * error


def regression(denoiser: Denoiser, x: Tensor, t: Tensor, target: Tensor, weight: Weight) -> Tensor:
    """weight(t) |denoiser(x, t) - target|^2 / D, `[B]`: the least-squares core of every denoising loss."""
    error = (denoiser.predict(x, t).x0 - target).square().flatten(1).mean(1)
    return weighted(weight, denoiser.sde, t, error)


def dsm_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None) -> Tensor:
    """Denoising score matching: weight(t) |denoiser(alpha x0 + sigma noise, t) - x0|^2 / D, `[B]`. Vincent 2011; Song et al. 2021, eq. 7.

    x0 `[B, *shape]` clean data; t `[B]`, `[B, 1, ..., 1]` or (); weight: a function (sde, t) -> factor on the x0 error; noise: unit
    noise of the shape of x0 (None: fresh entropy). The minimum is E[x_0 | x_t] for any positive weight.
    """
    t, noise = begin(denoiser, x0, t, weight, noise)
    return regression(denoiser, denoiser.sde.perturb(x0, t, noise), t, x0, weight)


# --- weights: a factor on the x0 error -----------------------------------------------------------------------------------
def simple(sde: LinearSDE, t: Tensor) -> Tensor:
    """SNR = alpha^2 / sigma^2: the plain error of eps. Ho et al. 2020 (NeurIPS), eq. 14.

    `snr` is another name of it: the "SNR weighting" of x0 in Salimans & Ho 2022 (ICLR), section 4, is this function.
    """
    return sde.logsnr(t).exp()


snr = simple


def truncated_snr(sde: LinearSDE, t: Tensor) -> Tensor:
    """max(SNR, 1): the larger of the errors of x0 and eps. Salimans & Ho 2022 (ICLR), section 4."""
    return simple(sde, t).clamp(min=1)


def snr_plus_one(sde: LinearSDE, t: Tensor) -> Tensor:
    """SNR + 1: the error of x0 and that of eps; where alpha^2 + sigma^2 = 1, that of v. Salimans & Ho 2022 (ICLR), section 4."""
    return simple(sde, t) + 1


def capped(sde: LinearSDE, t: Tensor, cap: float = 5.0) -> Tensor:
    """min(SNR, cap). Hang et al. 2023 (ICCV), min-SNR-gamma; `min_snr(gamma)` for another cap."""
    return simple(sde, t).clamp(max=cap)


def min_snr(gamma: float = 5.0) -> Weight:
    """`capped` at gamma > 0, a number. Hang et al. 2023 (ICCV), section 3.4. Raises ValueError and TypeError for another gamma."""
    return functools.partial(capped, cap=check_number(gamma, "gamma", 0.0, open_low=True))


def edm(sde: LinearSDE, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(rho^2 + sd^2) / (rho sd)^2: unit loss of the EDM network at initialisation. Karras et al. 2022 (NeurIPS), table 1."""
    rho = sde.rho(t)
    return (rho**2 + sigma_data**2) / (rho * sigma_data) ** 2


def likelihood(sde: LinearSDE, t: Tensor) -> Tensor:
    """g^2 alpha^2 / sigma^4: g^2 |score error|^2 of the x0 error.

    With uniform t, (t_max - t_min) D / 2 times the loss bounds -log p up to a constant. Song et al. 2021 (NeurIPS), theorem 1.
    Its variance over uniform t is large: train with `importance(likelihood)`.
    """
    return (sde.diffusion(t) * sde.alpha(t) / sde.sigma(t) ** 2) ** 2


# --- times: from u ~ U(0, 1) `[B]` ---------------------------------------------------------------------------------------
def uniform(sde: LinearSDE, u: Tensor) -> Tensor:
    """Times uniform on [t_min, t_max] from u ~ U(0, 1) `[B]`."""
    return sde.t_min + u * (sde.t_max - sde.t_min)


def log_normal(sde: LinearSDE, u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Times whose log(sigma / alpha) ~ N(mean, std^2), kept inside [t_min, t_max]. Karras et al. 2022 (NeurIPS), table 1."""
    check_number(std, "std", 0.0, open_low=True)
    ends = -sde.logsnr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64, device=u.device)) / 2
    low, high = torch.special.ndtr((ends - mean) / std)  # truncated, not clamped: no atoms at the ends
    z = torch.special.ndtri((low + u.double() * (high - low)).clamp(1e-300, 1 - 1e-16))
    return sde.time(-2 * (mean + std * z).clamp(*ends.tolist())).clamp(sde.t_min, sde.t_max)


def stratified(times: Times) -> Times:
    """Another distribution with u_i = (i + u_0) / B mod 1: less variance at no cost. Kingma et al. 2021 (NeurIPS), app. I.1."""

    def draw(sde: LinearSDE, u: Tensor) -> Tensor:
        i = torch.arange(len(u), dtype=u.dtype, device=u.device)
        return times(sde, (u[:1] + i / max(1, len(u))) % 1)

    return draw


def low_discrepancy(times: Times) -> Times:
    """Another distribution with u_i = u_0 + i (sqrt 5 - 1) / 2 mod 1: every run of rows is spread over [0, 1].

    `stratified` spreads the whole batch more evenly, but k neighbouring rows of it span k / B of the range. Where a batch is used in
    parts (microbatches) or its rows are in some order (by class), this one decouples place and time. Niederreiter 1992 (SIAM), n alpha.
    """
    golden = (math.sqrt(5) - 1) / 2

    def draw(sde: LinearSDE, u: Tensor) -> Tensor:
        i = torch.arange(len(u), dtype=torch.float64, device=u.device)
        return times(sde, ((u[:1] + i * golden) % 1).to(u.dtype))

    return draw


@dataclass(frozen=True)
class Levels:
    """A density of logsnr on [a, b], constant on each of n equal cells: `heights` `[..., n]` are (b - a) times it, of mean 1."""

    a: float
    b: float
    heights: Tensor

    def draw(self, u: Tensor) -> Tensor:
        """Its quantiles at u `[..., m]` in [0, 1]: exact, so that a weight 1 / density is unbiased however coarse the cells."""
        n = self.heights.shape[-1]
        below = torch.nn.functional.pad(self.heights.cumsum(-1), (1, 0)) / n
        u = u.double() * below[..., -1:]  # 1 to rounding
        i = (torch.searchsorted(below.contiguous(), u.contiguous(), right=True) - 1).clamp(0, n - 1)
        inside = (u - below.gather(-1, i)) / self.heights.gather(-1, i)
        return (self.a + (self.b - self.a) * (i / n + inside)).clamp(self.a, self.b)

    def density(self, logsnr: Tensor) -> Tensor:
        """The density at logsnr `[..., m]`."""
        n = self.heights.shape[-1]
        i = ((logsnr - self.a) / (self.b - self.a) * n).long().clamp(0, n - 1)
        return self.heights.gather(-1, i) / (self.b - self.a)


def clock(sde: LinearSDE, t: Tensor) -> Tensor:
    """-dt / dlogsnr = sigma^2 / g^2."""
    return (sde.sigma(t) / sde.diffusion(t)) ** 2


def levels(sde: LinearSDE, weight: Weight, variance: Tensor | float) -> Levels:
    """(1 - FLOOR) e / int e + FLOOR / (b - a), e = weight / (1 / V + snr) sigma^2 / g^2: what a loss is at logsnr, uniform in t.

    V / (1 + V snr) is the x0 error of the exact mean for Gaussian data of variance V, a number > 0, inf or a tensor `[..., 1]`. Of the
    weight `likelihood`, whose e is V snr / (1 + V snr), inf makes it uniform in logsnr: sampling t by g^2 / sigma^2.
    """
    a, b = sde.logsnr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
    device = variance.device if isinstance(variance, Tensor) else None
    logsnr = a + (b - a) * (torch.arange(CELLS, dtype=torch.float64, device=device) + 0.5) / CELLS
    t = sde.time(logsnr).clamp(sde.t_min, sde.t_max)
    height = torch.as_tensor(weight(sde, t)).to(t).expand(t.shape) * clock(sde, t) / (1 / variance + logsnr.exp())
    mean = height.mean(-1, keepdim=True)
    if device is None and not (bool((height >= 0).all()) and math.inf > float(mean) > 0):
        bad = t[~((height >= 0) & height.isfinite())]
        at = f", as at t = {float(bad[0]):.6g}" if len(bad) else ""
        raise ValueError(f"weight {weight!r} has no importance{at}; wanted finite numbers >= 0, not all 0, on [t_min, t_max]")
    return Levels(a, b, (1 - FLOOR) * height / mean + FLOOR)


@dataclass(frozen=True)
class importance:
    """Times by the size of weighted errors, and `.weight` that makes up for it: the loss of `weight` over uniform t, with less variance.

    `imp = importance(likelihood)`, then `times=imp` (or `stratified(imp)`) with `weight=imp.weight`. The density of t is in proportion
    to weight(t) V / (1 + V snr), as x0 errs on Gaussian data of variance V; a tenth of the draws are uniform in logsnr, so that no error
    of another shape is missed. The mean of the loss is that of (uniform, weight) for any density. variance: V of the data a dimension,
    or inf: of the weight `likelihood`, g^2 / sigma^2. Raises ValueError for a weight that is negative, infinite or 0 on all times, for
    variance <= 0. Song et al. 2021 (maximum likelihood, NeurIPS), who take the last; Kingma et al. 2021 (VDM, NeurIPS).
    """

    of: Weight
    variance: float = 1.0
    _memory: dict[torch.device, tuple[LinearSDE, Levels]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_callable(self.of, "weight", "a function (sde, t) -> factor on the x0 error, as scoresde.loss.likelihood")
        if self.variance != math.inf:
            check_number(self.variance, "variance", 0.0, open_low=True)

    def __call__(self, sde: LinearSDE, u: Tensor) -> Tensor:
        """Times `[B]` from u ~ U(0, 1) `[B]`."""
        found = self._levels(sde, u.device)
        return sde.time(found.draw(1 - u)).clamp(sde.t_min, sde.t_max)

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """The given weight over (t_max - t_min) times the density of t."""
        found = self._levels(sde, t.device)
        density = found.density(sde.logsnr(t).flatten()).reshape(t.shape) / clock(sde, t)
        return torch.as_tensor(self.of(sde, t)).to(t) / ((sde.t_max - sde.t_min) * density)

    def _levels(self, sde: LinearSDE, device: torch.device) -> Levels:
        """The density under `sde`, remembered for the last frozen one: where `time` is by bisection it costs more than a step."""
        met = self._memory.get(device)
        if met is not None and met[0] is sde:
            return met[1]
        with torch.inference_mode(False), torch.no_grad():
            found = levels(sde, self.of, self.variance)
            found = Levels(found.a, found.b, found.heights.to(device))
        params = vars(type(sde)).get("__dataclass_params__")
        if params is not None and params.frozen:  # any other could change between two steps
            self._memory[device] = sde, found
        return found


@dataclass(frozen=True)
class discrete:
    """The N times of a discrete chain, each as likely, and `.weight`, that of its variational bound.

    DDPM's objective is `times=discrete(chain.nodes())`, chain a `DiscreteVP`, with `weight=simple` (L_simple, Ho et al. 2020, eq. 14) or
    with its own `.weight` (eq. 12). times: a tensor `[N]` or numbers, in any order, all different; upper: see `weight`.
    """

    times: Any
    upper: bool = True

    def __post_init__(self) -> None:
        times = torch.as_tensor(self.times, dtype=torch.float64)
        if times.ndim != 1 or not len(times) or not bool(times.isfinite().all()) or len(times.unique()) != len(times):
            raise ValueError(f"times is {shape_of(self.times)}; wanted [N] different times, as VP.from_betas(betas).nodes()")
        object.__setattr__(self, "times", tuple(times.sort().values.tolist()))

    def __call__(self, sde: LinearSDE, u: Tensor) -> Tensor:
        """Times `[B]`, the floor(N u)-th from below."""
        n = len(self.times)
        return torch.tensor(self.times, dtype=torch.float64, device=u.device)[(u.double() * n).long().clamp(0, n - 1)]

    def weight(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """(snr_s - snr_t) N / (t_max - t_min) of the nearest time t of the chain and the one below it, s: `likelihood` as N grows.

        So (t_max - t_min) D / 2 times the loss is the sum of KLs of a chain whose steps have the posterior's variance
        sigma_s^2 / sigma_t^2 std^2, std^2 = beta that of x_t given x_s; the lowest time belongs to the decoder and has weight 0, as in
        `elbo(times=)`. Kingma et al. 2021 (NeurIPS), eq. 13. With upper (the default) steps have variance std^2, the factor is
        sigma_s^2 / sigma_t^2, and s of the lowest time is the data: Ho et al. 2020 (NeurIPS), eq. 12 with sigma_t^2 = beta_t.
        """
        nodes = torch.tensor(self.times, dtype=torch.float64, device=t.device)
        alpha, sigma, logsnr = sde.alpha(nodes), sde.sigma(nodes), sde.logsnr(nodes)
        apart = -torch.expm1(logsnr.diff())  # 1 - snr_t / snr_s
        if self.upper:
            table = torch.cat([alpha[:1] ** 0, alpha[:-1] ** 2 * apart]) / sigma**2
        else:
            table = torch.cat([0 * alpha[:1], logsnr[:-1].exp() * apart])
        i = torch.searchsorted((nodes[1:] + nodes[:-1]) / 2, t.detach().double().contiguous())
        return table[i] * (len(nodes) / (sde.t_max - sde.t_min))
