"""THE loop, and the three ways to run it: noise to data, data to its latent, latent back to data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .checks import STATE_DTYPES, check_callable, check_count, check_finite, check_rows, check_state, shape_of
from .denoiser import Denoiser, Preconditioned, check_denoiser
from .grid import Grid, check_times, karras, logsnr, rectified
from .linear import LinearSDE
from .noise import Noise, brownian, entropy_seeds, gaussian, seeded
from .oracle import Oracle
from .solvers import AdamsMoulton, Dopri5, DPMSolverPP, Solver, UniPC, bh1
from .variables import V, eps, lam, velocity

__all__ = ["Solution", "decode", "encode", "sample", "trajectory"]


def trajectory(oracle: Oracle, solver: Solver, x: Tensor, times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (t, x) at every time of `times`, the first included: the only loop that drives a solver.

    x `[B, *shape]` at times[0]; times strictly monotone inside [t_min, t_max], down to sample, up to encode (deterministic solvers).
    Run to its end, it raises NonFiniteError for a state that was not finite (unless the oracle has throw=False).
    """
    if not isinstance(oracle, Oracle):
        raise TypeError(f"oracle is {shape_of(oracle)}; wanted an Oracle of it: Oracle(denoiser, len(x), noise)")
    times = check_times(times, oracle.sde)
    yield from _steps(oracle, solver, x, times)
    oracle.check(times)


def _steps(oracle: Oracle, solver: Solver, x: Tensor, times: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """`trajectory` on checked times, before its last look at the states."""
    if check_solver(solver).stochastic and times[1] > times[0]:
        raise ValueError(f"{solver!r} is stochastic and runs down in time; a deterministic solver can run up")
    check_state(x)
    oracle.begin(x)
    if solver.brownian and oracle.noise and not oracle.noise.path:
        raise ValueError(
            f"{solver!r} is driven by one Brownian path a sample and the noise is {type(oracle.noise).__name__.strip('_')}; wanted "
            "noise.brownian(seeds, sde.t_min, sde.t_max)"
        )
    state = solver.start(oracle.sde, times)
    shape, dtype, step, watch = x.shape, x.dtype, solver.step, oracle.watch
    yield times[0], x
    for t, s in pairwise(times.clone().unbind()):  # its own: a denoiser may write into t
        found = step(oracle, x, t, s, state)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"{solver!r}.step returned {shape_of(found)}; wanted (x_s, state): return x_s, None")
        y, state = found
        if not isinstance(y, Tensor) or y.shape != shape or y.dtype != dtype:
            raise ValueError(f"{solver!r}.step returned x_s {shape_of(y)} for x {shape_of(x)}; wanted the same shape and dtype")
        x = y
        watch(x)
        yield s, x


@dataclass(frozen=True)
class Solution:
    """What a solve returns.

    x `[B, *shape]`; nfe: denoiser evaluations a sample (the largest over samples), `nfe_each` `[B]` all of them; ledger: the cost of
    a sample by kind (see Oracle); status `[B]`: 0, or the first step that left the sample non-finite, or a `Status`, negative, of one
    that an adaptive solver gave up; times: the grid; solver: what
    ran; seeds: what to pass to get the same x again (None with a generator, or where
    nothing is drawn).
    """

    x: Tensor
    nfe_each: Tensor
    ledger: dict[str, float]
    status: Tensor
    times: Tensor
    solver: Solver
    seeds: Sequence[int] | None = field(default=None, repr=False)

    @property
    def nfe(self) -> int:
        """Counted denoiser evaluations a sample; the largest, where samples differ."""
        return int(self.nfe_each.max()) if len(self.nfe_each) else 0


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


def steps_within(solver: Solver, nfe: int, extra: int = 0) -> int:
    """The largest number of steps whose evaluations and `extra` fit in `nfe`; ValueError naming the least nfe when one does not."""
    one = solver.evaluations(1)
    if one + extra > nfe:
        mean = f" and the final mean {extra}" if extra else ""
        raise ValueError(f"nfe is {nfe}; one step of {solver!r} costs {one}{mean}: the least is nfe={one + extra}")
    nfe -= extra
    low, high = 1, nfe  # a step costs at least one evaluation, and more steps never cost less
    while low < high:
        mid = (low + high + 1) // 2
        low, high = (mid, high) if solver.evaluations(mid) <= nfe else (low, mid - 1)
    return low


def plan(
    sde: LinearSDE, solver: Solver, *, nfe: int | None, steps: int | None, times: Tensor | None, grid: Grid | None, extra: int
) -> Tensor:
    """Times, t_max first (or as given), from exactly one of nfe, steps and times; `extra` evaluations are kept out of nfe."""
    given = {"nfe": nfe, "steps": steps, "times": times}
    names = [name for name, value in given.items() if value is not None]
    if grid is not None:
        check_callable(grid, "grid", "a rule (sde, n) -> times, as scoresde.grid.karras")
    if times is not None and len(names) == 1:
        if grid is not None:
            raise ValueError("times and grid are both given; times already is the grid: drop one")
        return check_times(times, sde)
    if solver.adaptive:
        if names := names + ["grid"] * (grid is not None):
            raise ValueError(
                f"{solver!r} is adaptive and chooses its steps: drop {' and '.join(names)}; max_nfe= of it bounds it, times= may be given"
            )
        return solver.grid(sde, 1)
    if len(names) != 1:
        raise ValueError(f"got {' and '.join(names) or 'none'} of nfe, steps, times; wanted exactly one")
    if nfe is not None:
        steps = steps_within(solver, check_count(nfe, "nfe"), extra)
    steps = check_count(steps, "steps")
    found = check_times((grid or solver.grid)(sde, steps), sde)
    if len(found) != steps + 1:
        raise ValueError(f"the grid returned {len(found)} times for {steps} steps; wanted n + 1 = {steps + 1}")
    return found


def chunks(rows: int, microbatch: int | None) -> Iterator[tuple[Tensor, int]]:
    """(indices, how many of them count): all rows, or pieces of exactly `microbatch`, the last padded with copies of its last row."""
    if microbatch is None:
        yield torch.arange(rows), rows
        return
    size = check_count(microbatch, "microbatch")
    for start in range(0, rows, max(1, size)):
        index = torch.arange(start, min(start + size, rows))
        yield torch.cat([index, index[-1:].expand(size - len(index))]), len(index)
    if rows == 0:
        yield torch.arange(0), 0


def noise_of(
    rows: int, seeds: Any, generator: torch.Generator | None, path: tuple[float, float] | None = None
) -> tuple[Noise, Any]:
    """The noise source of a call, one Brownian path a row over `path` where that is given, and the seeds that repeat it."""
    if generator is not None:
        if seeds is not None:
            raise ValueError("seeds and generator are both given; wanted one")
        noise = gaussian(generator)
        if path is None:
            return noise, None
        seeds = torch.randint(2**63 - 1, (rows,), generator=generator, device=generator.device)
    if seeds is None:
        seeds = entropy_seeds(rows)
    seeds = seeds if isinstance(seeds, (Sequence, Tensor)) or not isinstance(seeds, Iterable) else list(seeds)
    noise = seeded(seeds) if path is None else brownian(seeds, *path)
    check_rows(seeds, rows, "seeds")
    return noise, seeds


Finish = Callable[[Oracle, Tensor, Tensor], Tensor]


def solve(
    denoiser: Denoiser, x: Tensor, solver: Solver, times: Tensor, noise: Noise | None, microbatch: int | None, *,
    throw: bool = True, finish: Finish | None = None, seeds: Sequence[int] | None = None,
    wrap: Callable[[Denoiser, Noise | None], Denoiser] = lambda d, _: d,
) -> Solution:  # fmt: skip
    """Run the loop over x `[B, *shape]` in pieces of `microbatch` rows and put the pieces together; `finish` maps the last state."""
    rows = x.shape[0]
    for m in denoiser.modules():
        if isinstance(m, Preconditioned) and m.cond is not None and len(m.cond) != rows:
            raise ValueError(
                f"the denoiser holds {len(m.cond)} labels for {rows} samples; wanted one a sample: condition(labels [B])"
            )
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    ledger: dict[str, float] = {}
    for index, kept in chunks(rows, microbatch):
        size = index.shape[0]
        whole = size == kept == rows
        part_noise = noise if noise is None or whole else noise.select(index)
        part = denoiser if whole else denoiser.select(index)
        oracle = Oracle(wrap(part, part_noise), size, part_noise, names=index, throw=throw, kept=kept, exact=microbatch is not None)
        with oracle:
            last = x.clone() if whole else x[index.to(x.device)]  # its own: a solver may write into it
            for _, state in _steps(oracle, solver, last, times):
                last = state
            if finish is not None and not bool(oracle.lost.any()):
                last = finish(oracle, last, times[-1])
                oracle.watch(last)
            elif finish is not None:  # nothing is asked of the samples given up
                going = (~oracle.lost[:kept]).nonzero().flatten()
                if len(going):
                    rows_on, there = oracle.pad(going), going.to(last.device)
                    found = finish(oracle.select(rows_on), last[rows_on.to(last.device)], times[-1])
                    last = last.index_copy(0, there, found[: len(going)])
                    oracle.watch(last)
            status = oracle.check(times)
        parts.append((last, oracle.nfe, status) if kept == size else (last[:kept], oracle.nfe[:kept], status[:kept]))
        for name, amount in oracle.ledger.items():
            ledger[name] = ledger.get(name, 0.0) + amount * kept / max(1, rows)
    xs, nfe, status = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    return Solution(xs, nfe, ledger, status, times, solver, seeds)


def final_mean(oracle: Oracle, x: Tensor, t: Tensor) -> Tensor:
    """The mean x0 at the last time: the jump to zero noise, one evaluation."""
    with oracle.counting("denoise"):
        return oracle.mean(x, t)


@torch.no_grad()
def sample(
    denoiser: Denoiser, shape: Sequence[int], solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, seeds: Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None, x: Tensor | None = None, denoise: bool = True, microbatch: int | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, throw: bool = True,
) -> Solution:  # fmt: skip
    """Draw samples: from x (default: the prior at t_max) down `times`, then (denoise) the mean at the last time.

    shape: [B, *event]; solver: None picks by nfe and by the size of the event. Exactly one of nfe (a ceiling on evaluations a sample,
    the final mean included), steps and times; an adaptive solver takes none of them or `times`. grid: rule (sde, n) -> times, default
    the solver's. seeds: B integers in [0, 2^64): sample i depends on seeds[i] alone, whatever the batch; generator: a torch.Generator
    instead; neither: fresh entropy, kept in `.seeds`. x: the state at times[0] (then dtype and device are x's). microbatch: the network
    sees exactly this many rows. device: default the denoiser's. throw: raise NonFiniteError (False: read `.status`).
    """
    sde = check_denoiser(denoiser).sde
    shape = shape.shape if isinstance(shape, Tensor) else shape
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if len(shape) < 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise ValueError(f"shape is {shape}; wanted [B, *event] of non-negative integers, as in (16, 3, 32, 32)")
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
    return solve(denoiser, x, solver, times, noise, microbatch, throw=throw, finish=final_mean if denoise else None, seeds=kept)


def check_solver(solver: Any) -> Solver:
    """Return a Solver; raise a TypeError that says how to make one otherwise."""
    if not isinstance(solver, Solver):
        name = getattr(solver, "__name__", "")
        called = f"{name}()" if name in solvers.__all__ else "Heun()"
        raise TypeError(f"solver is {solver!r}; wanted a Solver, as in {called}")
    return solver


def ode_plan(
    sde: LinearSDE, solver: Solver | None, *, nfe: int | None, steps: int | None, times: Tensor | None, grid: Grid | None
) -> tuple[Solver, Tensor]:
    """Solver and times of an encode, a decode or a likelihood: deterministic, uniform in logsnr whatever a solver recommends."""
    if solver is None:
        solver = Dopri5() if nfe is steps is times is None else DPMSolverPP(2)
    if check_solver(solver).stochastic:
        raise TypeError(f"{solver!r} is stochastic and has no inverse and no density; wanted a deterministic solver such as Heun()")
    grid = grid or (None if solver.adaptive or times is not None else logsnr)
    return solver, plan(sde, solver, nfe=nfe, steps=steps, times=times, grid=grid, extra=0)


@torch.no_grad()
def encode(
    denoiser: Denoiser, x: Tensor, solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, microbatch: int | None = None, throw: bool = True,
) -> Solution:  # fmt: skip
    """The latent of x: the probability flow from t_min up to t_max. x `[B, *shape]` is a state at t_min; nothing is clipped.

    Default: Dopri5() when no budget is given, else DPMSolverPP(2); the grid is uniform in logsnr.
    """
    solver, times = ode_plan(check_denoiser(denoiser).sde, solver, nfe=nfe, steps=steps, times=times, grid=grid)
    x = check_finite(check_state(x))
    return solve(denoiser, x, solver, times.sort().values, None, microbatch, throw=throw)


@torch.no_grad()
def decode(
    denoiser: Denoiser, x: Tensor, solver: Solver | None = None, *, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, microbatch: int | None = None, throw: bool = True,
) -> Solution:  # fmt: skip
    """The inverse of `encode`: the probability flow from x at t_max down to the state at t_min (no final mean)."""
    solver, times = ode_plan(check_denoiser(denoiser).sde, solver, nfe=nfe, steps=steps, times=times, grid=grid)
    x = check_finite(check_state(x))
    return solve(denoiser, x, solver, times.sort(descending=True).values, None, microbatch, throw=throw)
