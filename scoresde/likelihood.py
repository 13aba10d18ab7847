"""Exact likelihood by the probability flow. In y = x / alpha, rho = sigma / alpha: dy/drho = eps and dl/drho = tr(d eps / dy)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from torch import Tensor
from torch.autograd import forward_ad

from . import divergence as divergences
from .checks import check_callable, check_finite, check_state, shape_of
from .denoiser import Denoiser, check_denoiser
from .divergence import Divergence, Jacobian, Mode
from .grid import Grid
from .linear import LinearSDE, cast
from .noise import Noise
from .oracle import Oracle
from .solve import LogProb, noise_of, ode_plan, solve
from .solvers import Solver

__all__ = ["log_prob"]

Prior = Callable[[Tensor], Tensor]


class Augmented(Denoiser):
    """State [x, w alpha l] `[B, D + chains]`, "noise" [eps, w tr(d eps / dy)]: what is linear in (x, x0) integrates the likelihood too.

    One network pass serves value and divergence; each chain of the `divergence` has an l-channel. The weight w = 1 / alpha(t_max) puts
    an adaptive solver's tolerance on l in nats. fresh: new probes at every evaluation (unbiased; fixed grids) or one set for the solve
    (adaptive solvers, whose error estimate must not see noise). times: those of a fixed grid; then the channels stand still, traces are
    taken at these times alone, and `integral` makes l of all of them at once.
    """

    def __init__(
        self, denoiser: Denoiser, shape: torch.Size, divergence: Divergence, noise: Noise | None, fresh: bool, mode: Mode,
        times: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(denoiser.sde)
        self.denoiser, self.shape, self.divergence, self.mode = denoiser, shape, divergence, mode
        self.noise, self.fresh = noise, fresh
        self.kept: Tensor | None = None
        self.times, self.traces = times, dict[int, Tensor]()  # the last evaluation at a time is that of its accepted state
        self.nodes = [] if times is None else times.tolist()
        self.weight = 1 / float(self.sde.alpha(torch.tensor(self.sde.t_max, dtype=torch.float64)))

    def _probes(self, x: Tensor) -> Tensor:
        if self.noise is None:
            return x.new_zeros(0, *x.shape)
        if self.kept is None or self.fresh:
            self.kept = self.divergence.probes(self.noise, x)
        return self.kept

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """[x0, l - sigma/alpha tr] in the weighted coordinates."""
        alpha, sigma = cast(self.sde.alpha(t), x), cast(self.sde.sigma(t), x)
        alpha, sigma = (c.reshape(-1, 1) if c.ndim else c for c in (alpha, sigma))
        d = self.shape.numel()
        event = x[:, :d].reshape(-1, *self.shape).contiguous()  # as in sampling: a network may take a view
        at = t.reshape(-1, *[1] * len(self.shape)) if t.ndim else t
        node = self._node(t)
        if self.times is not None and node is None:  # a stage within a step
            return torch.cat([self.denoiser.predict(event, at).x0.flatten(1), torch.zeros_like(x[:, d:])], 1)
        jacobian = Jacobian(lambda v: self.denoiser.predict(v, at).x0, event, self.mode, self.record)
        traces = self.divergence.trace(jacobian, event, self._probes(event)).T  # [B, chains]
        if node is not None:
            self.traces[node] = traces
            return torch.cat([jacobian.x0.flatten(1), torch.zeros_like(x[:, d:])], 1)
        traces = alpha * (d - alpha * traces) / sigma  # of d eps / dy, y = x / alpha, from that of d x0 / dx
        return torch.cat([jacobian.x0.flatten(1), (x[:, d:] - sigma * self.weight * traces) / alpha], 1)

    def _node(self, t: Tensor) -> int | None:
        if not self.nodes or t.ndim:
            return None
        now = float(t)  # a library's clock may have rounded it
        i = min(range(len(self.nodes)), key=lambda i: abs(self.nodes[i] - now))
        return i if abs(self.nodes[i] - now) <= 1e-9 * self.nodes[i] else None

    def integral(self, degree: int) -> Tensor | None:
        """l `[B, chains]` from the first time to the last, - int (D - alpha tr J) dlam, the integrand a spline through all times.

        None when a time was never asked for.
        """
        if self.times is None or len(self.traces) < len(self.times):
            return None
        weights = quadrature((self.sde.logsnr(self.times) / 2).numpy(), degree)
        d, alphas = self.shape.numel(), self.sde.alpha(self.times).tolist()
        return sum(
            (w * (alphas[i] * self.traces[i].double() - d) for i, w in enumerate(weights)), torch.zeros((), dtype=torch.float64)
        )

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
        part = Augmented(self.denoiser.select(index), self.shape, self.divergence, noise, self.fresh, self.mode, self.times)
        part.kept = None if self.kept is None else self.kept[:, index]
        part.traces = {i: trace[index] for i, trace in self.traces.items()}
        part.recorders = self.recorders
        return part


def quadrature(nodes: np.ndarray, degree: int) -> np.ndarray:
    """Weights of values at `nodes`, monotone, for the integral from the first to the last of the spline through them."""
    rising = nodes if nodes[-1] > nodes[0] else nodes[::-1]
    k = min(degree, (len(nodes) - 2) // 2 * 2 + 1)
    weights = make_interp_spline(rising, np.eye(len(nodes)), k=k).integrate(rising[0], rising[-1])
    return weights if nodes[-1] > nodes[0] else -weights[::-1]


def density(
    denoiser: Denoiser, x: Tensor, solver: Solver, times: Tensor, noise: Noise | None, microbatch: int | None, *,
    divergence: Divergence, prior: Prior | None, frozen: bool = False, throw: bool = True, seeds: Any = None,
) -> LogProb:  # fmt: skip
    """Carry x and its log-density along `times`: up from data (`latent` is the end) or down from the prior (`solution.x` is).

    Between a, the lower, and b, the upper end: log p_a = log prior(x_b) + l_b - l_a + D log(alpha_b / alpha_a).
    """
    sde, up = denoiser.sde, bool(times[-1] > times[0])
    low, high = (times[0], times[-1]) if up else (times[-1], times[0])
    if prior is None and high != sde.t_max:
        raise ValueError(f"times end at {high:.6g}, below t_max = {sde.t_max:g}, where the SDE states no prior: pass prior=")
    shape, d = x.shape[1:], x.shape[1:].numel()
    mode = Mode(divergence.mode, x.device)
    fresh = not (frozen or divergence.frozen or solver.adaptive or solver.replays)
    start = torch.cat([x.flatten(1), x.new_zeros(len(x), divergence.chains)], 1)
    parts: list[Augmented] = []

    def augmented(part: Denoiser, source: Noise | None) -> Augmented:
        source = source if divergence.random else None
        parts.append(Augmented(part, shape, divergence, source, fresh, mode, times if at_nodes else None))
        return parts[-1]

    def last(oracle: Oracle, x: Tensor, t: Tensor) -> Tensor:
        oracle.mean(x, t)  # the trace at the last time
        found = oracle.denoiser.integral(3 if solver.order <= 3 else 5)  # type: ignore[attr-defined]
        return x if found is None else torch.cat([x[:, :d], found.to(x)], 1)

    at_nodes = at_the_nodes(solver)
    carry = lambda finish: solve(
        denoiser, start, solver, times, noise, microbatch, throw=throw, seeds=seeds, wrap=augmented, finish=finish
    )
    solution = carry(last if at_nodes else None)
    if at_nodes and any(len(part.traces) < len(times) for part in parts):  # a solver that does not evaluate where its steps begin
        at_nodes = False
        solution = carry(None)
    end, gains = solution.x[:, :d].reshape(x.shape), solution.x[:, d:]
    if not at_nodes:  # the l-channels, unweighted
        gains = gains * (sde.alpha(torch.tensor(sde.t_max, dtype=torch.float64)) / sde.alpha(times[-1]))
    latent, data = (end, x) if up else (x, end)
    found = (sde.prior_log_prob if prior is None else prior)(latent)
    if not isinstance(found, Tensor) or found.shape != (len(x),):
        raise ValueError(f"prior returned {shape_of(found)} for {len(x)} samples; wanted their log-densities [{len(x)}]")
    value = found + (gains if up else -gains).mean(1) + d * (sde.alpha(high) / sde.alpha(low)).log()
    k = divergence.chains
    stderr = torch.full_like(value.detach(), math.nan if divergence.random else 0.0)
    if k > 1 and len(x):  # column by column: a reduction may round by a row's place
        chains = gains.detach().unbind(1)
        mean = sum(chains) / k
        stderr = (sum((c - mean).square() for c in chains) / (k - 1) / k).sqrt()  # type: ignore[union-attr]
    mismatch = prior_mismatch(sde, data.detach(), low) if prior is None else math.nan
    return LogProb(value, stderr, latent, mismatch, repr(divergence), mode.name, replace(solution, x=end))


def prior_mismatch(sde: LinearSDE, x: Tensor, t: Tensor) -> float:
    """Mean of `prior_kl` over the x0 behind x `[B, *shape]` at t, nats: by convexity at least KL(p_{t_max} || prior).

    E|x0|^2 is that of x / alpha less D rho^2.
    """
    d = x[0].numel() if len(x) else 0
    square = x.double().square().sum().cpu() / max(1, len(x)) / sde.alpha(t) ** 2 - d * sde.rho(t) ** 2
    return float(sde.prior_kl(square.clamp(min=0.0), d))  # clamp leaves nan


def divergence_of(divergence: Divergence | None, shape: torch.Size) -> Divergence:
    """The one given, or the default for such events."""
    if divergence is None:
        return divergences.default(shape)
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence is {divergence!r}; wanted one of scoresde.divergence, as exact(), rademacher(2) or coloured(4)"
        )
    return divergence


def log_prob(
    denoiser: Denoiser, x: Tensor, solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, prior: Prior | None = None, divergence: Divergence | None = None,
    solver_error: bool = False, differentiable: bool | None = None, seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None, microbatch: int | None = None, throw: bool = True,
) -> LogProb:  # fmt: skip
    """Log p_{t_min}(x) in nats, `[B]`: x `[B, *shape]` is a noised state, for clean data see `bits_per_dim`.

    log p(x) = log prior(z) + l + D log(alpha_T / alpha_0), z and l = int tr(d eps / dy) drho by `solver` (deterministic; default without
    a budget Dopri5(), or 64 steps where the divergence is random; with one DPMSolverPP(3), of order 2 below 20 evaluations)
    on a grid uniform in logsnr. On a fixed grid l is the integral of a spline
    through the traces at all times, the last of which costs an evaluation; adaptive solvers carry it in the state. prior: log-density
    at the last time, default `sde.prior_log_prob`. divergence: one of `scoresde.divergence`; default exact() up to 256 numbers an event.
    solver_error: estimate it, by a second solve in half the steps or at ten times the tolerance (with random probes two, which share
    frozen ones). differentiable: keep the graph to x and to the parameters; default: when x requires grad. Song et al. 2021 (ICLR),
    app. D; Grathwohl et al. 2019 (ICLR).
    """
    check_finite(check_state(x))
    sde = check_denoiser(denoiser).sde
    if forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            "x has a forward-mode tangent, which a likelihood does not carry on; use x.requires_grad_() and autograd.grad"
        )
    divergence = divergence_of(divergence, x.shape[1:])
    if prior is not None:
        check_callable(prior, "prior", "a callable z -> log-densities [B]")
    if differentiable and not torch.is_grad_enabled():
        raise ValueError("differentiable=True under no_grad or inference_mode, where there is no graph to keep; leave it")
    track = torch.is_grad_enabled() and (x.requires_grad if differentiable is None else differentiable)
    warn_of_a_lattice(x)
    # Out of inference mode, whose tensors have no gradient: the divergence would read zero. Leaving it turns gradients on.
    with torch.inference_mode(False), torch.set_grad_enabled(track):
        solver, times = likelihood_plan(sde, solver, divergence, nfe=nfe, steps=steps, times=times, grid=grid)
        times = times.sort().values
        rough = rougher(solver, times) if solver_error else None
        noise, kept = noise_of(len(x), seeds, generator) if divergence.random else (None, None)
        carry = lambda solver, times, noise, frozen: density(
            denoiser,
            x,
            solver,
            times,
            noise,
            microbatch,
            divergence=divergence,
            prior=prior,
            frozen=frozen,
            throw=throw,
            seeds=kept,
        )
        found = carry(solver, times, noise, False)
        if rough is None:
            return found
        with torch.no_grad():
            fine, spent, again = found, 0.0, lambda: None
            if divergence.random:  # the two must differ by the solver alone
                same = range(len(x)) if kept is None else kept
                again = lambda: noise_of(len(x), same, None)[0]
                fine = carry(solver, times, again(), True)
                spent += fine.nfe
            coarse = carry(*rough, again(), True)
        error = (fine.value - coarse.value).detach().abs() / (3.0 if solver.order > 1 else 1.0)
        ledger = {**found.ledger, "solver_error": spent + coarse.nfe}
        return replace(found, solver_error=error, solution=replace(found.solution, ledger=ledger))


def likelihood_plan(
    sde: LinearSDE, solver: Solver | None, divergence: Divergence, *, nfe: int | None, steps: int | None, times: Tensor | None,
    grid: Grid | None,
) -> tuple[Solver, Tensor]:  # fmt: skip
    """Solver and times of a likelihood: those of `ode_plan`, and 64 steps where nothing is said and the divergence is random."""
    if divergence.random and solver is nfe is steps is times is None:
        steps = 64  # the noise of the probes hides the solver's error, and averages out on a fixed grid
    return ode_plan(sde, solver, nfe=nfe, steps=steps, times=times, grid=grid, extra=lambda solver: int(at_the_nodes(solver)))


def at_the_nodes(solver: Solver) -> bool:
    """Whether l is a sum over the times of the grid, of which the last costs an evaluation, or a part of the state."""
    return not (solver.adaptive or solver.replays)


def rougher(solver: Solver, times: Tensor) -> tuple[Solver, Tensor]:
    """The solver and times whose result tells of the error of these: half the steps, or ten times the tolerances."""
    if solver.adaptive:
        if not {"rtol", "atol"} <= {f.name for f in fields(solver)}:  # type: ignore[arg-type]
            raise ValueError(f"{solver!r} has no rtol and atol to loosen, so solver_error=True cannot be had; use a fixed grid")
        loose: Any = {name: min(10 * getattr(solver, name), 0.5) for name in ("rtol", "atol")}
        return replace(solver, **loose), times  # type: ignore[type-var]
    if len(times) < 3:
        raise ValueError("solver_error=True halves the steps, and there is one step; wanted steps=2 or more")
    return solver, times[sorted({*range(0, len(times), 2), len(times) - 1})]


def warn_of_a_lattice(x: Tensor) -> None:
    """Warn when x looks like quantised data without dequantization: 2 to 1,024 values on a lattice, in events of 16 numbers or more."""
    x = x.detach().flatten(1)
    if x.shape[1] < 16 or len(x) == 0:
        return
    some = x.flatten()[:65536].double()
    values = some.unique()
    if not 2 <= len(values) <= 1024 or len(some) < 4 * min(len(values), 16):  # too many, or so few that chance might do it
        return
    gaps = values.diff()
    multiples = gaps / gaps.min()
    ulp = float(torch.finfo(x.dtype).eps * some.abs().max())  # the lattice of the numbers themselves is no finding
    if bool(((multiples - multiples.round()).abs() < 0.01).all()) and float(gaps.min()) > max(64 * ulp, float(gaps.sum()) / 65536):
        warnings.warn(
            f"x has {len(values)} values on a lattice of step {float(gaps.min()):.4g}: data without dequantization, whose density says "
            "nothing (it grows without bound with the model). Use bits_per_dim(denoiser, images, levels=...), which adds the noise",
            stacklevel=3,
        )
