"""Variational bound on log-likelihood: -log p(x0) <= prior + matching + reconstruction, each a KL or an expectation, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bits import Quantized
from .checks import Status, check_count, check_finite, check_state, shape_of
from .denoiser import Denoiser, check_denoiser
from .grid import check_times
from .linear import LinearSDE
from .loss import FLOOR
from .oracle import Oracle
from .solve import check_labels, chunks, noise_of

__all__ = ["Elbo", "elbo"]

TIMES, NOISE = 8, 9  # streams of a seed: where the matching term is looked at, and the noise there


@dataclass(frozen=True)
class Elbo:
    """A bound from below on log p, nats; tensors are float64 `[B]`. value = -(prior + matching + reconstruction).

    stderr: of value, from pairs of neighbouring draws of matching (nan for one): what it is or more, as the draws are stratified;
    variance: of one draw, so that independent ones, for which stderr^2 = variance / samples, are the worst case; nfe, ledger: an
    image's; levels: None for a density; dims: D.
    """

    value: Tensor
    stderr: Tensor
    prior: Tensor = field(repr=False)
    matching: Tensor = field(repr=False)
    reconstruction: Tensor = field(repr=False)
    variance: Tensor = field(repr=False)
    nfe: int
    ledger: dict[str, float]
    samples: int
    levels: int | None
    dims: int

    @property
    def bits_per_dim(self) -> Tensor:
        """-value / (D log 2), `[B]`: bits a dimension of integer images, from above; ValueError for a density, which has none."""
        if self.levels is None:
            raise ValueError(
                "the bound is of a density of float data, which has no bits without quantisation: pass integer images and levels="
            )
        return -self.value / (self.dims * math.log(2))


@torch.no_grad()
def elbo(
    denoiser: Denoiser, x: Tensor, *, samples: int | None = None, times: Tensor | None = None, levels: int | None = None,
    low: float = -1.0, high: float = 1.0, seeds: Sequence[int] | Tensor | None = None, generator: torch.Generator | None = None,
    microbatch: int | None = None, dtype: torch.dtype = torch.float32,
) -> Elbo:  # fmt: skip
    """Bound log p of CLEAN data from below: x `[B, *shape]` floats x0, or with `levels` integer images as cells of [low, high].

    prior = KL(N(alpha x0, sigma^2 I) || N(0, prior_std^2 I)) at t_max; matching = 1/2 int E|x0 - x0_hat(x_t, t)|^2 d snr, snr =
    1 / rho^2, of the reverse SDE, or with `times` (from t_max, to any end) of its ancestral chain, 1/2 sum_i (snr_{i+1} - snr_i)
    E|x0 - x0_hat(x_i, t_i)|^2; reconstruction = E -log p(x0 | x) at the last time (t_min): p is N(x / alpha, rho^2 I) for floats,
    softmax_j -(x - alpha c_j)^2 / (2 sigma^2) over the centres c_j a dimension for images. Only matching is sampled: `samples` draws
    an image (64), stratified over a density of logsnr, an evaluation each; or (1) runs of the whole chain. seeds: B integers, image i
    depends on its own alone; generator: instead; neither: fresh entropy. microbatch: rows the network sees; dtype: that of images.

    Raises ValueError and TypeError for what it cannot use, NonFiniteError for a network's NaN. Ho et al. 2020 (NeurIPS), eq. 5;
    Kingma et al. 2021 (VDM, NeurIPS), sections 3.5, 4 and 5; Song et al. 2021 (maximum likelihood, NeurIPS), theorem 3.
    """
    sde = check_denoiser(denoiser).sde
    x0, cells = _clean(x, levels, low, high, dtype)
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    if times is not None:
        times = check_times(times, sde).sort(descending=True).values
        if times[0] != sde.t_max:
            raise ValueError(
                f"times begin at {times[0]:.6g}, below t_max = {sde.t_max:g}, where no prior is known; wanted times from t_max on"
            )
        ends = times[[0, -1]]
    samples = check_count((64 if times is None else 1) if samples is None else samples, "samples")
    rows, d = len(x0), x0.shape[1:].numel()
    check_labels(denoiser, rows)
    noise, _ = noise_of(rows, seeds, generator)
    rho = float(sde.rho(ends[-1]))
    table = None if cells is None else _decoder(cells, rho).to(x.device)
    centre, half = (0.0, 1.0) if cells is None else ((low + high) / 2, (high - low) / 2)
    parts: list[Tensor] = []
    ledger: dict[str, float] = {}
    nfe = 0
    for index, kept in chunks(rows, microbatch):
        whole, here = len(index) == kept == rows, index.to(x.device)
        part = denoiser if whole else denoiser.select(index)
        oracle = Oracle(part, len(index), noise.select(index), names=index, kept=kept, exact=microbatch is not None)
        data = x0[here]
        v = (data - centre).double().square().flatten(1).mean(1, keepdim=True) + half**2
        with oracle:
            draws = _draws(oracle, data, v, samples, times) if rows else v.expand(0, samples)
        prior = sde.prior_kl(data.double().square().flatten(1).sum(1), d)
        closed = torch.full_like(prior, d / 2 * (1 + math.log(2 * math.pi * rho**2)))
        reconstruction = closed if table is None else table[x[here].long()].flatten(1).sum(1)
        variance = error = torch.full_like(prior, math.nan)
        if samples > 1 and rows:  # neighbours differ by the variance in their strata, and by more where the means of those differ
            pairs = draws.diff(dim=1).square()
            error = (pairs[:, ::2].sum(1) + samples % 2 * pairs[:, -1]).sqrt() / samples
            variance = draws.var(1)
        parts.append(torch.stack([error, prior, draws.mean(1), reconstruction, variance])[:, :kept])
        nfe = max(nfe, int(oracle.nfe[:kept].max()) if kept else 0)
        for name, amount in oracle.ledger.items():
            ledger[name] = ledger.get(name, 0.0) + amount * kept / max(1, rows)
    stderr, prior, matching, reconstruction, variance = torch.cat(parts, 1)
    value = -(prior + matching + reconstruction)
    return Elbo(value, stderr, prior, matching, reconstruction, variance, nfe, ledger, samples, levels, d)


def _clean(x: Tensor, levels: int | None, low: float, high: float, dtype: torch.dtype) -> tuple[Tensor, Quantized | None]:
    """x0 as the model sees it, and its cells where it is images."""
    floats = isinstance(x, Tensor) and x.is_floating_point()
    if levels is None:
        if isinstance(x, Tensor) and not floats:
            raise TypeError(
                f"x is {shape_of(x)} without levels; wanted floats for a density, or the number of grey levels: levels=256"
            )
        return check_finite(check_state(x)), None
    cells = Quantized(levels, low, high)
    if floats:
        raise TypeError(
            f"x is {shape_of(x)} with levels={levels}; wanted integers 0 .. {levels - 1}: leave levels out for a density"
        )
    check_state(torch.empty(x.shape if isinstance(x, Tensor) else (0, 0), dtype=dtype), "x (in dtype=)")
    return cells.to_model(x, torch.full((), 0.5, dtype=dtype)), cells


def _decoder(cells: Quantized, rho: float) -> Tensor:
    """E -log p(k | x) a dimension, for each level k: float64 `[levels]`, to rounding.

    With j = k + m and h = cell / rho, -log p = log sum_m exp(m h eps - (m h)^2 / 2), whatever alpha. The sums over the neighbours
    above and below are cumulative; E over eps is the trapezoid rule, which converges exponentially for what is analytic.
    """
    m = torch.arange(1, cells.levels, dtype=torch.float64) * (cells.width / rho)
    side = lambda eps: torch.cat([m.new_zeros(1), (m * eps - m**2 / 2).exp().cumsum(0)])
    nodes = torch.arange(-160, 161, dtype=torch.float64) / 16
    table = m.new_zeros(cells.levels)
    for eps, share in zip(nodes.tolist(), (-(nodes**2) / 2).softmax(0).tolist(), strict=True):
        table += share * (side(eps).flip(0) + side(-eps)).log1p()  # level k has k below and levels - 1 - k above
    return table


def _draws(oracle: Oracle, x0: Tensor, v: Tensor, samples: int, times: Tensor | None) -> Tensor:
    """Draws of the matching term, float64 `[B, samples]`; v `[B, 1]`: see `_importance`."""
    sde, draws = oracle.sde, []
    if times is None:
        u = oracle.noise.uniform(x0.new_empty(len(x0), samples, dtype=torch.float64), TIMES)
        t, weight = _importance(sde, v, (torch.arange(samples, device=u.device) + u) / samples)
        for t_j, weight_j in zip(t.unbind(1), weight.unbind(1), strict=True):
            draws.append(weight_j * _error(oracle, x0, t_j.reshape(-1, *[1] * (x0.ndim - 1))))
    else:
        logsnr = sde.logsnr(times)
        weights = (logsnr[:-1].exp() * logsnr.diff().expm1() / 2).tolist()
        for _ in range(samples):
            total = torch.zeros_like(v[:, 0])
            for t, weight in zip(times[:-1].clone(), weights, strict=True):  # its own: a denoiser may write into t
                total += weight * _error(oracle, x0, t)
            draws.append(total)
    return torch.stack(draws, 1)


def _importance(sde: LinearSDE, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Times and weights snr / (2 q), `[B, n]`, of logsnr on [a, b] drawn from q: its distribution function inverted at u, by halving.

    q = (1 - FLOOR) V snr / (1 + V snr) / Z + FLOOR / (b - a): the first is the shape of the integrand for Gaussian data of variance
    V and the exact x0, and V snr / (1 + V snr) = V / (V + rho^2) integrates to log(1 + V snr). V is an image's own mean square about
    the centre of the range plus the square of half the range (for floats 0 and 1): too large a V wastes draws where the integrand is
    nothing, too small a one leaves to FLOOR what counts. The density of `loss.importance`, with a V an image and in closed form.
    """
    a, b = sde.logsnr(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)).tolist()
    bottom, top = ((v * math.exp(end)).log1p() for end in (a, b))
    low, high = torch.full_like(u, a), torch.full_like(u, b)
    for _ in range(52):
        logsnr = (low + high) / 2
        shaped, even = ((v * logsnr.exp()).log1p() - bottom) / (top - bottom), (logsnr - a) / (b - a)
        below = (1 - FLOOR) * shaped + FLOOR * even < u
        low, high = torch.where(below, logsnr, low), torch.where(below, high, logsnr)
    logsnr = (low + high) / 2
    snr = logsnr.exp()
    q = (1 - FLOOR) * v * snr / (1 + v * snr) / (top - bottom) + FLOOR / (b - a)
    return sde.time(logsnr).clamp(sde.t_min, sde.t_max), snr / (2 * q)


def _error(oracle: Oracle, x0: Tensor, t: Tensor) -> Tensor:
    """|x0 - x0_hat(x_t, t)|^2 at one draw of x_t, float64 `[B]`, t () or `[B, 1, ..., 1]`; NonFiniteError when it is none."""
    found = oracle.mean(oracle.sde.perturb(x0, t, oracle.noise.draw(x0, NOISE)), t)
    error = (found.double() - x0.double()).square().flatten(1).sum(1)
    bad = (~error.isfinite()).nonzero().flatten().cpu()
    if len(bad):
        at = float(t.flatten()[int(bad[0]) if t.ndim else 0])
        problem = (
            f"have a mean x0 that is not finite (the first at t = {at:.6g}): the denoiser returned NaN or infinity; check it there"
        )
        oracle.lose(bad, Status.DONE, problem)
    return error
