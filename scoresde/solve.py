"""THE loop that drives a solver, the times it runs on, and what a solve returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import solvers
from .checks import check_callable, check_count, check_rows, check_state, shape_of
from .denoiser import Denoiser, Preconditioned
from .grid import Grid, check_times, logsnr
from .linear import LinearSDE
from .noise import Noise, brownian, entropy_seeds, gaussian, seeded
from .oracle import Oracle
from .solvers import Dopri5, DPMSolverPP, Solver

__all__ = ["LogProb", "Solution", "trajectory"]


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
    ran; seeds: what to pass to get the same x again (None with a generator, or where nothing is drawn); log_prob: the density of x
    where it was asked for; round_trip `[B]`: the root mean square over the event of the way back minus the start, on request.
    """

    x: Tensor
    nfe_each: Tensor
    ledger: dict[str, float]
    status: Tensor
    times: Tensor
    solver: Solver
    seeds: Sequence[int] | None = field(default=None, repr=False)
    log_prob: LogProb | None = field(default=None, repr=False)
    round_trip: Tensor | None = field(default=None, repr=False)

    @property
    def nfe(self) -> int:
        """Counted denoiser evaluations a sample; the largest, where samples differ."""
        return int(self.nfe_each.max()) if len(self.nfe_each) else 0


@dataclass(frozen=True)
class LogProb:
    """Log-densities and what is known of their errors, in nats.

    value `[B]`: log p_{t_min}(x); stderr `[B]`: of the mean over independent probe chains that ride in the one solve (0 exact, nan for
    one chain); solver_error `[B]`: an estimate, on request; prior_mismatch: what E_data[log p] may lack because a Gaussian stands for
    p_{t_max}, a bound on KL(p_{t_max} || prior) estimated from these x as if they were data (nan where prior= was given);
    latent: x at the last time; divergence: how it was found, mode: in forward or reverse mode; solution: the solve, with `nfe` and
    `ledger`, divergence in forward-equivalents, solver_error (evaluations that estimate took) in neither score nor nfe.
    """

    value: Tensor
    stderr: Tensor
    latent: Tensor = field(repr=False)
    prior_mismatch: float
    divergence: str
    mode: str
    solution: Solution = field(repr=False)
    solver_error: Tensor | None = None

    @property
    def nfe(self) -> int:
        """Counted denoiser evaluations a sample."""
        return self.solution.nfe

    @property
    def ledger(self) -> dict[str, float]:
        """Cost a sample by kind."""
        return self.solution.ledger


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


def check_labels(denoiser: Denoiser, rows: int) -> None:
    """ValueError unless the labels that a denoiser holds, if any, are one a row."""
    for m in denoiser.modules():
        if isinstance(m, Preconditioned) and m.cond is not None and len(m.cond) != rows:
            raise ValueError(
                f"the denoiser holds {len(m.cond)} labels for {rows} samples; wanted one a sample: condition(labels [B])"
            )


Finish = Callable[[Oracle, Tensor, Tensor], Tensor]


def solve(
    denoiser: Denoiser, x: Tensor, solver: Solver, times: Tensor, noise: Noise | None, microbatch: int | None, *,
    throw: bool = True, finish: Finish | None = None, seeds: Sequence[int] | None = None,
    wrap: Callable[[Denoiser, Noise | None], Denoiser] = lambda d, _: d,
) -> Solution:  # fmt: skip
    """Run the loop over x `[B, *shape]` in pieces of `microbatch` rows and put the pieces together; `finish` maps the last state."""
    rows = x.shape[0]
    check_labels(denoiser, rows)
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


def check_solver(solver: Any) -> Solver:
    """Return a Solver; raise a TypeError that says how to make one otherwise."""
    if not isinstance(solver, Solver):
        name = getattr(solver, "__name__", "")
        called = f"{name}()" if name in solvers.__all__ else "Heun()"
        raise TypeError(f"solver is {solver!r}; wanted a Solver, as in {called}")
    return solver


def ode_plan(
    sde: LinearSDE, solver: Solver | None, *, nfe: int | None, steps: int | None, times: Tensor | None, grid: Grid | None,
    extra: Callable[[Solver], int] = lambda _: 0,
) -> tuple[Solver, Tensor]:  # fmt: skip
    """Solver and times of an encode, a decode or a likelihood: deterministic, on a grid for this whatever a solver recommends."""
    if solver is None:
        budget = next((n for n in (nfe, steps, None if times is None else len(times)) if isinstance(n, int)), None)
        # the third order and its single-step start pay from 20 evaluations on: `benchmarks/likelihood.py`
        solver = Dopri5() if budget is None else DPMSolverPP(2 if budget < 20 else 3)
    if check_solver(solver).stochastic:
        raise TypeError(f"{solver!r} is stochastic and has no inverse and no density; wanted a deterministic solver such as Heun()")
    grid = grid or (None if solver.adaptive or times is not None else logsnr)
    return solver, plan(sde, solver, nfe=nfe, steps=steps, times=times, grid=grid, extra=extra(solver))
