"""Exact likelihood by the probability flow. In y = x / alpha, rho = sigma / alpha: dy/drho = eps and dl/drho = tr(d eps / dy)."""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_callable, check_count, check_finite, check_number, check_state, shape_of
from .denoiser import Denoiser, check_denoiser
from .grid import Grid
from .linear import cast
from .noise import DEQUANTIZE, PROBE, Noise
from .sample import Solution, noise_of, ode_plan, solve
from .solvers import Solver

__all__ = ["BitsPerDim", "LogProb", "Quantized", "bits_per_dim", "log_prob"]


class Augmented(Denoiser):
    """State [x, w alpha l] `[B, D + k]`, "noise" [eps, w tr(d eps / dy)]: any solver linear in (x, x0) integrates the likelihood too.

    The divergence is exact (probes = 0, k = 1; D vector-Jacobian products, `chunk` at a time) or sum_j p_j' (d eps / dy) p_j with k
    Rademacher probes, one l-channel each. One network pass serves value and divergence. fresh: new probes at every evaluation
    (unbiased; fixed grids) or one set for the solve (adaptive solvers, whose error estimate must not see noise). The weight
    w = 1 / alpha(t_max) puts an adaptive solver's tolerance on l in nats.
    """

    def __init__(self, denoiser: Denoiser, shape: torch.Size, probes: int, chunk: int, noise: Noise | None, fresh: bool) -> None:
        super().__init__(denoiser.sde)
        self.denoiser, self.shape, self.probes, self.chunk = denoiser, shape, probes, chunk
        self.noise, self.fresh = noise, fresh
        self.frozen: Tensor | None = None
        self.batched = True
        self.weight = 1 / float(self.sde.alpha(torch.tensor(self.sde.t_max, dtype=torch.float64)))

    def _signs(self, x: Tensor) -> Tensor:
        if self.noise is None:
            raise ValueError("probes need a noise source; pass seeds= or generator=")
        if self.frozen is None or self.fresh:
            self.frozen = torch.stack([self.noise.signs(x, PROBE) for _ in range(self.probes)])
        return self.frozen

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[x0, l - sigma/alpha tr] in the weighted coordinates."""
        alpha, sigma = cast(self.sde.alpha(t), x), cast(self.sde.sigma(t), x)
        alpha, sigma = (c.reshape(-1, 1) if c.ndim else c for c in (alpha, sigma))
        d = self.shape.numel()
        track = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            event = x[:, :d].reshape(-1, *self.shape)
            event = event if track else event.detach().requires_grad_()
            x0 = self.denoiser.predict(event, t.reshape(-1, *[1] * len(self.shape)) if t.ndim else t).x0
            if self.probes:
                signs = self._signs(event)
                traces = (self._products(x0, event, signs, track) * signs).flatten(2).sum(2).T  # [B, k]
            else:
                basis = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *self.shape).expand(d, *event.shape)
                parts = [(self._products(x0, event, v, track) * v).flatten(2).sum((0, 2)) for v in basis.split(self.chunk)]
                traces = torch.stack(parts).sum(0)[:, None]
        traces = alpha * (d - alpha * traces) / sigma  # of d eps / dy, y = x / alpha, from that of d x0 / dx
        x0 = (x0 if track else x0.detach()).flatten(1)
        return torch.cat([x0, (x[:, d:] - sigma * self.weight * traces) / alpha], 1)

    def _products(self, x0: Tensor, x: Tensor, vectors: Tensor, track: bool) -> Tensor:
        """v' d x0 / dx for vectors v `[k, B, *shape]`, counted as k VJPs: one batched pass back, or a loop where an op cannot."""
        self.record("divergence", 2.0 * len(vectors))
        if not x0.requires_grad:  # a denoiser that ignores x
            return torch.zeros_like(vectors)
        back = functools.partial(torch.autograd.grad, x0, x, retain_graph=True, create_graph=track, materialize_grads=True)
        if self.batched:
            try:
                return back(vectors, is_grads_batched=True)[0]
            except RuntimeError:  # some ops have no batching rule (pooling, custom kernels)
                self.batched = False
        return torch.stack([back(v)[0] for v in vectors])

    def tolerance(self, size: Tensor, t: Tensor, rtol: float, atol: float) -> Tensor:
        """That of x times sigma / (alpha + sigma): log p is as steep as 1 / sigma. Of an l-channel in nats, its scale w alpha taken out."""
        d, shape = self.shape.numel(), (-1, *[1] * len(self.shape))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        x = self.denoiser.tolerance(size[:, :d].reshape(-1, *self.shape), t.reshape(shape), rtol, atol).flatten(1)
        channels = atol * (self.weight * alpha).to(size) + rtol * size[:, d:]
        return torch.cat([x * (sigma / (alpha + sigma)).to(size), channels], 1)

    def error_norm(self, ratio: Tensor) -> Tensor:
        """The larger of that of x and that of the l-channels, which would drown among D others in one mean."""
        d = self.shape.numel()
        return torch.maximum(self.denoiser.error_norm(ratio[:, :d].reshape(-1, *self.shape)), super().error_norm(ratio[:, d:]))

    def select(self, index: Any) -> Augmented:
        """These rows, with their own probes."""
        noise = None if self.noise is None else self.noise.select(index)
        part = Augmented(self.denoiser.select(index), self.shape, self.probes, self.chunk, noise, self.fresh)
        part.frozen = None if self.frozen is None else self.frozen[:, index]
        part.recorders = self.recorders
        return part


@dataclass(frozen=True)
class LogProb:
    """Log-densities. value `[B]` nats; stderr `[B]`: over probes (0 exact, nan for one probe); latent: x carried to the last time.

    solution: the solve (its x is the augmented state), with `nfe` and `ledger`: divergence is in forward-equivalents.
    """

    value: Tensor
    stderr: Tensor
    latent: Tensor
    solution: Solution = field(repr=False)

    @property
    def nfe(self) -> int:
        """Counted denoiser evaluations a sample."""
        return self.solution.nfe

    @property
    def ledger(self) -> dict[str, float]:
        """Cost a sample by kind."""
        return self.solution.ledger


def log_prob(
    denoiser: Denoiser, x: Tensor, solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, prior: Callable[[Tensor], Tensor] | None = None,
    probes: int | None = None, chunk: int = 64, seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None, microbatch: int | None = None, throw: bool = True,
) -> LogProb:  # fmt: skip
    """Log p_{t_min}(x) in nats, `[B]`: x `[B, *shape]` is a noised state, for clean data see `bits_per_dim`.

    log p(x) = log prior(z) + l + D log(alpha_T / alpha_0), z and l = int tr(d eps / dy) drho by `solver` (deterministic; default
    Dopri5() without a budget, else DPMSolverPP(2)) on a grid uniform in logsnr. prior: log-density at the last time, default
    `sde.prior_log_prob`, which differs from the true p_T by the mismatch of the SDE. probes: None for the exact divergence (D
    vector-Jacobian products an evaluation, `chunk` at a time), k for k Rademacher probes. Gradients flow when x requires grad.
    Song et al. 2021 (ICLR), app. D; Grathwohl et al. 2019 (ICLR).
    """
    check_finite(check_state(x))
    sde = check_denoiser(denoiser).sde
    k = 0 if probes is None else check_count(probes, "probes")
    check_count(chunk, "chunk")
    # Out of inference mode, whose tensors have no gradient: the divergence would read zero. Leaving it turns gradients on.
    track = torch.is_grad_enabled() and x.requires_grad
    with torch.inference_mode(False), torch.set_grad_enabled(track):
        solver, times = ode_plan(sde, solver, nfe=nfe, steps=steps, times=times, grid=grid)
        times = times.sort().values
        if prior is None and times[-1] != sde.t_max:
            raise ValueError(
                f"times end at {times[-1]:.6g}, below t_max = {sde.t_max:g}, where the SDE states no prior: pass prior="
            )
        prior = sde.prior_log_prob if prior is None else check_callable(prior, "prior", "a callable z -> log-densities [B]")
        noise, kept = noise_of(len(x), seeds, generator) if k else (None, None)
        shape, d = x.shape[1:], x.shape[1:].numel()
        start = torch.cat([x.flatten(1), x.new_zeros(len(x), max(1, k))], 1)
        solution = solve(
            denoiser, start, solver, times, noise, microbatch, throw=throw, seeds=kept,
            wrap=lambda part, source: Augmented(part, shape, k, chunk, source, fresh=not (solver.adaptive or solver.replays)),
        )  # fmt: skip
        a, b = sde.alpha(times[0]), sde.alpha(times[-1])
        latent = solution.x[:, :d].reshape(x.shape)
        gains = solution.x[:, d:] * (sde.alpha(torch.tensor(sde.t_max, dtype=torch.float64)) / b)  # the l-channels, unweighted
        density = prior(latent)
        if not isinstance(density, Tensor) or density.shape != (len(x),):
            raise ValueError(f"prior returned {shape_of(density)} for {len(x)} samples; wanted their log-densities [{len(x)}]")
        value = density + gains.mean(1) + d * (b / a).log()
    stderr = gains.detach().std(1) / k**0.5 if k > 1 and len(x) else torch.full_like(value.detach(), math.nan if k else 0.0)
    return LogProb(value, stderr, latent, solution)


@dataclass(frozen=True)
class Quantized:
    """Images of `levels` integers 0 .. levels-1 as cells of [low, high]: x0 = low + (k + u) (high - low) / levels, u in [0, 1)."""

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.levels, "levels", 2)
        check_number(self.high, "high", check_number(self.low, "low"), open_low=True)

    def to_model(self, images: Tensor, u: Tensor | float = 0.5) -> Tensor:
        """Integers to the model's range, at u of their cell (its centre by default)."""
        if not isinstance(images, Tensor) or images.is_floating_point() or images.is_complex() or images.dtype is torch.bool:
            raise TypeError(f"images is {shape_of(images)}; wanted integers 0 .. {self.levels - 1}: bits/dim needs quantised data")
        if images.numel() and not 0 <= int(images.min()) <= int(images.max()) < self.levels:
            raise ValueError(
                f"images span {int(images.min())} .. {int(images.max())}; wanted 0 .. {self.levels - 1}: check levels="
            )
        return self.low + (images + u) * ((self.high - self.low) / self.levels)

    def to_levels(self, x0: Tensor) -> Tensor:
        """The model's range to integers (uint8 up to 256 levels): the cell that x0 lies in."""
        k = ((x0 - self.low) * (self.levels / (self.high - self.low))).floor().clamp(0, self.levels - 1)
        return k.to(torch.uint8 if self.levels <= 256 else torch.int32)

    @property
    def log_det(self) -> float:
        """Log of |d x0 / d k| a dimension, nats."""
        return math.log((self.high - self.low) / self.levels)


def uniform(noise: Noise, like: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform dequantization: u ~ U[0, 1) and its log-density, 0 `[B]`. Theis et al. 2016 (ICLR)."""
    return noise.uniform(like, DEQUANTIZE), like.new_zeros(len(like))


@dataclass(frozen=True)
class BitsPerDim:
    """value: mean over images of a bound on -log2 P(image) / D; stderr over images; each `[N]`; nfe, ledger: an image's, all draws."""

    value: float
    stderr: float
    each: Tensor = field(repr=False)
    nfe: int
    ledger: dict[str, float]
    dequantization: str
    samples: int


def bits_per_dim(
    denoiser: Denoiser, images: Tensor, solver: Solver | None = None, *, levels: int, low: float = -1.0, high: float = 1.0,
    dequantization: Callable[[Noise, Tensor], tuple[Tensor, Tensor]] = uniform, samples: int = 1, nfe: int | None = None,
    steps: int | None = None, times: Tensor | None = None, grid: Grid | None = None,
    prior: Callable[[Tensor], Tensor] | None = None, probes: int | None = None, chunk: int = 64,
    seeds: Sequence[int] | Tensor | None = None, generator: torch.Generator | None = None, microbatch: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> BitsPerDim:  # fmt: skip
    """Bits a dimension of integer images `[N, *shape]` with `levels` grey levels under a model of x0 in [low, high].

    -log2 P(k) / D <= -E[log p(x0(k + u)) + D log|d x0 / d k| - log q(u)] / (D log 2), with log p(x0) = log p_{t_min}(alpha x0) +
    D log alpha at t_min and u ~ q (`dequantization`: (noise, like) -> (u, log q)), averaged over `samples` draws of u. The rest as
    in `log_prob`. The solver's error is not in stderr: double the steps until the value stands still. Warns of negative values.
    """
    cells, sde = Quantized(levels, low, high), check_denoiser(denoiser).sde
    cells.to_model(images)  # refuses what is not images before anything is drawn
    check_count(samples, "samples")
    check_callable(dequantization, "dequantization", "a function (noise, like) -> (u, log q)")
    noise, _ = noise_of(len(images), seeds, generator)
    like = check_state(torch.zeros(images.shape, dtype=dtype, device=images.device), "images (in dtype=)")
    alpha, d = float(sde.alpha(torch.tensor(sde.t_min, dtype=torch.float64))), like[0].numel() if len(like) else 1
    draws, ledger, nfe_all = [], Counter[str](), 0
    for draw in range(samples):
        u, log_q = dequantization(noise, like)
        if not isinstance(u, Tensor) or u.shape != like.shape or bool(((u < 0) | (u > 1)).any()):
            raise ValueError(f"dequantization returned u {shape_of(u)}; wanted numbers in [0, 1] of the shape of images")
        if not isinstance(log_q, Tensor) or log_q.shape != (len(images),):
            raise ValueError(f"dequantization returned log q {shape_of(log_q)}; wanted log-densities [{len(images)}]")
        x0 = cells.to_model(images, u)
        # every draw has probes of its own: the seeds move by the golden ratio's odd 64-bit multiple, and not at all for the first
        own = None if seeds is None else [(int(seed) + draw * 0x9E3779B97F4A7C15) % 2**64 for seed in seeds]
        found = log_prob(
            denoiser, alpha * x0, solver, nfe=nfe, steps=steps, times=times, grid=grid, prior=prior, probes=probes, chunk=chunk,
            seeds=own, generator=generator, microbatch=microbatch,
        )  # fmt: skip
        ledger.update(found.ledger)
        nfe_all += found.nfe
        log_p = found.value.detach() + d * (math.log(alpha) + cells.log_det) - log_q
        draws.append(-log_p.double() / (d * math.log(2)))
    each = torch.stack(draws).mean(0)
    if bool((each < 0).any()):
        warnings.warn(
            f"{int((each < 0).sum())} of {len(each)} images have negative bits/dim, which no discrete image can: the solve is too coarse "
            "(double its steps until the value stands still), or the data are not the cells of [low, high]",
            stacklevel=2,
        )
    stderr = float(each.std() / len(each) ** 0.5) if len(each) > 1 else float("nan")
    name = getattr(dequantization, "__name__", repr(dequantization))
    return BitsPerDim(float(each.mean()), stderr, each, nfe_all, dict(ledger), name, samples)
