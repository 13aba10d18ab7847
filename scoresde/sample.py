"""The ways to run a solver: noise to data, data to its latent, latent back to data, and from latent to latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checks import STATE_DTYPES, check_finite, check_state, shape_of
from .denoiser import Denoiser, check_denoiser
from .divergence import Divergence
from .grid import Grid, karras, rectified
from .likelihood import density, divergence_of, likelihood_plan
from .oracle import Oracle
from .solve import Solution, check_solver, noise_of, ode_plan, plan, solve
from .solvers import AdamsMoulton, Solver, UniPC, bh1
from .variables import V, eps, lam, velocity

__all__ = ["decode", "encode", "sample", "slerp"]


def _on(solver: Solver, grid: Grid) -> Solver:
    return replace(solver, recommended=grid)  # type: ignore[call-arg]


_EARLY, _LATE = partial(rectified, power=1.5), partial(rectified, power=2.0)
_DEFAULTS: dict[bool, tuple[tuple[float, Solver], ...]] = {  # by size; (below this NFE, the solver on its grid)
    False: (
        (12, _on(AdamsMoulton(2, velocity), _EARLY)),
        (math.inf, _on(AdamsMoulton(4, V(0.5), startup=False), _LATE)),
    ),
    True: (
        (14, _on(UniPC(1, bh1, eps), karras)),
        (math.inf, _on(AdamsMoulton(5, velocity, lam, startup=False), karras)),
    ),
}


def default_solver(nfe: int, size: int) -> Solver:
    """The solver of `solver=None`, on its grid: by nfe, for events of at least 512 numbers (images) or of fewer.

    Chosen on seed set A of `benchmarks/strong.py` and reported on B: docs/solvers.md, "How to choose".
    """
    return next(solver for below, solver in _DEFAULTS[size >= 512] if nfe < below)


def final_mean(oracle: Oracle, x: Tensor, t: Tensor) -> Tensor:
    """The mean x0 at the last time: the jump to zero noise, one evaluation."""
    with oracle.counting("denoise"):
        return oracle.mean(x, t)


@torch.no_grad()
def sample(
    denoiser: Denoiser, shape: Sequence[int], solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None, x: Tensor | None = None, denoise: bool | None = None, log_prob: bool = False,
    divergence: Divergence | None = None, microbatch: int | None = None, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None, throw: bool = True,
) -> Solution:  # fmt: skip
    """Draw samples: from x (default: the prior at t_max) down `times`, then (denoise) the mean at the last time.

    shape: [B, *event]; solver: None picks by nfe and by the size of the event. Exactly one of nfe (a ceiling on evaluations a sample,
    the final mean included), steps and times; an adaptive solver takes none of them or `times`. grid: rule (sde, n) -> times, default
    the solver's. seeds: B integers in [0, 2^64): sample i depends on seeds[i] alone, whatever the batch; generator: a torch.Generator
    instead; neither: fresh entropy, kept in `.seeds`. x: the state at times[0] (then dtype and device are x's). microbatch: the network
    sees exactly this many rows. device: default the denoiser's. throw: raise NonFiniteError (False: read `.status`). log_prob: the density
    of the samples too, in the same pass (`.log_prob`, a LogProb; divergence as in `scoresde.log_prob`): of the states at t_min, which are
    what is returned then, as the mean of a state has no density of its own. The solver must be deterministic, and its defaults are those
    of `scoresde.log_prob`.
    """
    sde = check_denoiser(denoiser).sde
    shape = shape.shape if isinstance(shape, Tensor) else shape
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if len(shape) < 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise ValueError(f"shape is {shape}; wanted [B, *event] of non-negative integers, as in (16, 3, 32, 32)")
    if log_prob and denoise:
        raise ValueError(
            "log_prob=True gives the density of the states at t_min, and denoise=True would return their means: drop one"
        )
    denoise = not log_prob if denoise is None else denoise
    if log_prob and x is not None and isinstance(times, Tensor) and times.numel() and times.max() != sde.t_max:
        raise ValueError(
            f"times start at {times.max():.6g}, below t_max = {sde.t_max:g}, where the density of x is not known: drop log_prob"
        )
    if divergence is not None and not log_prob:
        raise ValueError(f"divergence is {divergence!r} and log_prob is False; wanted log_prob=True, which it is for")
    if log_prob:
        divergence = divergence_of(divergence, torch.Size(shape[1:]))
        solver, times = likelihood_plan(sde, solver, divergence, nfe=nfe, steps=steps, times=times, grid=grid)
    else:
        if solver is None:
            budget = nfe
            if isinstance(steps, int):
                budget = steps + denoise
            elif isinstance(times, Tensor):
                budget = times.numel() - 1 + denoise
            solver = default_solver(budget if isinstance(budget, int) else 0, math.prod(shape[1:]))
        check_solver(solver)
        times = plan(sde, solver, nfe=nfe, steps=steps, times=times, grid=grid, extra=int(denoise))
    if times[1] > times[0]:
        raise ValueError(f"times run up, from {times[0]:.6g} to {times[-1]:.6g}; sampling runs down: times.flip(0)")
    path = (sde.t_min, sde.t_max) if solver.brownian else None
    noise, kept = noise_of(shape[0], seeds, generator, path)
    if x is None:
        if times[0] != sde.t_max:
            raise ValueError(
                f"times start at {times[0]:.6g}, below t_max = {sde.t_max:g}, where no prior is known: pass x= at that time"
            )
        if device is None:
            device = next((p.device for p in (*denoiser.parameters(), *denoiser.buffers())), torch.device("cpu"))
        if dtype not in STATE_DTYPES:
            raise TypeError(f"dtype is {dtype!r}; wanted torch.float32 or torch.float64: a network may run in another (net.half())")
        x = (sde.prior_std() * noise.initial(shape, torch.float64, device)).to(dtype)
    elif check_state(x).shape != shape:
        raise ValueError(f"x is {shape_of(x)}; wanted the shape given, {list(shape)}")
    check_finite(x)
    if divergence is None:
        return solve(denoiser, x, solver, times, noise, microbatch, throw=throw, finish=final_mean if denoise else None, seeds=kept)
    with torch.inference_mode(False), torch.no_grad():  # see `log_prob`
        found = density(
            denoiser, x.clone(), solver, times.clone(), noise, microbatch, divergence=divergence, prior=None, throw=throw, seeds=kept
        )  # fmt: skip
    return replace(found.solution, log_prob=found)


@torch.no_grad()
def encode(
    denoiser: Denoiser, x: Tensor, solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, round_trip: bool = False, microbatch: int | None = None, throw: bool = True,
) -> Solution:  # fmt: skip
    """The latent of x: the probability flow from t_min up to t_max. x `[B, *shape]` is a state at t_min; nothing is clipped.

    Default: Dopri5() when no budget is given, else DPMSolverPP(3) (of order 2 below 20 evaluations); the grid is uniform in logsnr.
    round_trip: go back too, on the same times, and report how far from x that ends: `.round_trip` `[B]`, the root mean square over the
    event; the ledger's "round_trip" is what that took, in neither score nor nfe.
    """
    return _flow(denoiser, x, solver, True, round_trip, microbatch, throw, nfe=nfe, steps=steps, times=times, grid=grid)


@torch.no_grad()
def decode(
    denoiser: Denoiser, x: Tensor, solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, round_trip: bool = False, microbatch: int | None = None, throw: bool = True,
) -> Solution:  # fmt: skip
    """The inverse of `encode`: the probability flow from x at t_max down to the state at t_min (no final mean). The rest as there."""
    return _flow(denoiser, x, solver, False, round_trip, microbatch, throw, nfe=nfe, steps=steps, times=times, grid=grid)


def _flow(
    denoiser: Denoiser, x: Tensor, solver: Solver | None, up: bool, round_trip: bool, microbatch: int | None, throw: bool, **budget: Any
) -> Solution:  # fmt: skip
    solver, times = ode_plan(check_denoiser(denoiser).sde, solver, **budget)
    times = times.sort(descending=not up).values
    x = check_finite(check_state(x))
    found = solve(denoiser, x, solver, times, None, microbatch, throw=throw)
    if not round_trip:
        return found
    back = solve(denoiser, found.x, solver, times.flip(0), None, microbatch, throw=throw)
    ledger = {**found.ledger, "round_trip": float(back.nfe)}
    return replace(found, ledger=ledger, round_trip=(back.x - x).flatten(1).square().mean(1).sqrt())


def slerp(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """Spherical interpolation of latents: sin((1 - share) w) / sin w a + sin(share w) / sin w b, w the angle between a and b.

    a, b `[B, *shape]`; share: a number, 0 for a and 1 for b, or several `[n]`, which give `[n, B, *shape]`. What a straight line would
    take through the thin middle of a Gaussian stays at its radius. Raises ValueError where a and b point in opposite directions, and no
    arc is the shortest. Shoemake 1985 (SIGGRAPH); of latents of the flow, Song, Meng & Ermon 2021 (DDIM, ICLR), app. D.5.
    """
    if check_state(b, "b").shape != check_state(a, "a").shape:
        raise ValueError(f"b is {shape_of(b)}; wanted the shape of a, {list(a.shape)}")
    u, v = (c.flatten(1).double() / c.flatten(1).double().norm(dim=1, keepdim=True).clamp(min=1e-300) for c in (a, b))
    # the angle by its half: acos of a cosine near 1 loses half the digits
    w = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    if bool((math.pi - w < 1e-6).any()):
        opposite = (math.pi - w < 1e-6).nonzero().flatten()[:8].tolist()
        raise ValueError(f"samples {opposite} of b are opposite to those of a: no arc between them is the shortest")
    s = torch.as_tensor(share, dtype=torch.float64, device=a.device)
    if s.ndim > 1 or not bool(s.isfinite().all()):
        raise ValueError(f"share is {shape_of(share)}; wanted a number or [n] finite ones")
    part = lambda p: torch.where(
        w > 1e-8, (p[..., None] * w).sin() / w.sin().clamp(min=1e-300), p[..., None].expand(*p.shape, len(w))
    )
    left, right = (part(p).reshape(*s.shape, -1, *[1] * (a.ndim - 1)).to(a) for p in (1 - s, s))
    return left * a + right * b
