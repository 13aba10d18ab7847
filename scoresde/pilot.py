"""A pilot: one adaptive run, and from it a fixed grid with the steps where it took them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_count
from .denoiser import Denoiser
from .grid import check_times
from .linear import LinearSDE
from .oracle import Oracle
from .sample import sample
from .solve import Solution, check_solver, steps_within
from .solvers import Controlled, Dopri5, Solver
from .variables import Clock

__all__ = ["Frozen", "FrozenGrid", "freeze"]

_NODES = 4096  # at most, of the times reached, at which the mean number of steps taken is kept


@dataclass(frozen=True, eq=False)
class FrozenGrid:
    """A grid rule (sde, n) -> times with the density of steps of a pilot: n steps hold equal parts of it. For the pilot's SDE alone."""

    sde: LinearSDE
    clock: Clock = field(repr=False)
    w: Tensor = field(repr=False)  # the clock from t_max to t_min `[nodes]`
    share: Tensor = field(repr=False)  # of all steps, those taken before w: from 0 to 1

    def __call__(self, sde: LinearSDE, n: int) -> Tensor:
        """n + 1 times, t_max first."""
        if sde != self.sde:
            raise ValueError(f"this grid is frozen for {self.sde!r} and was asked for {sde!r}; freeze another run under it")
        parts = torch.linspace(0, 1, check_count(n, "n") + 1, dtype=torch.float64)
        i = torch.searchsorted(self.share, parts[1:-1]).clamp(1, len(self.share) - 1)
        low, high = self.share[i - 1], self.share[i]
        w = torch.lerp(self.w[i - 1], self.w[i], ((parts[1:-1] - low) / (high - low)).clamp(0, 1))
        ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
        return check_times(torch.cat([ends[:1], self.clock.time(sde, w), ends[1:]]), sde)


@dataclass(frozen=True, eq=False)
class Frozen:
    """What `freeze` makes of an adaptive run: `sample(denoiser, shape, frozen.solver, times=frozen.times)` repeats it on fixed steps.

    solver: who runs on it; grid: the rule for any n; times: the grid that costs the pilot's mean evaluations; pilot: the run itself.
    """

    solver: Solver
    grid: FrozenGrid
    times: Tensor = field(repr=False)
    pilot: Solution = field(repr=False)


@dataclass(frozen=True)
class _Recorded(Solver):
    """An adaptive solver, noting the times it reaches."""

    inner: Controlled
    log: list[list[tuple[Tensor, Tensor]]]
    adaptive = True
    order = 0

    @property
    def brownian(self) -> bool:  # type: ignore[override]
        return self.inner.brownian

    @property
    def grid(self) -> Any:  # type: ignore[override]
        return self.inner.grid

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        run = self.inner.run(len(x))
        run.taken = []
        self.log.append(run.taken)
        return self.inner.step(oracle, x, t, s, run)


def freeze(
    denoiser: Denoiser, shape: Sequence[int], solver: Controlled | None = None, *, fixed: Solver | None = None,
    seeds: Sequence[int] | Tensor | None = None, x: Tensor | None = None, microbatch: int | None = None,
    dtype: torch.dtype = torch.float32, device: torch.device | str | None = None,
) -> Frozen:  # fmt: skip
    """One adaptive run of `shape` = [B, *event] from t_max to t_min, turned into a fixed grid for other noise. solver: default Dopri5().

    The grid has the pilot's mean density of steps: n steps hold equal parts of the mean number of steps taken before t. fixed: who runs on
    it; None: of a flow, AdamsMoulton(5), with or without its start-up, or the single steps themselves, whichever ends on the grid of the
    pilot's mean cost nearest to a run of the pilot at a tenth of its tolerance; of the SDE, ImprovedEuler(). The pilot then costs five
    solves. The other arguments are those of `sample`; some 64 samples will do.
    Raises TypeError for a solver without steps of its own; as `sample`.
    """
    solver = Dopri5() if solver is None else solver
    if not isinstance(solver, Controlled):
        raise TypeError(
            f"solver is {solver!r}; wanted an adaptive solver with steps of its own, as Dopri5(), DPMAdaptive() or AdaptiveSDE()"
        )
    choices = solver.fixed if fixed is None else (check_solver(fixed),)
    if choices[0].adaptive:
        raise TypeError(f"fixed is {fixed!r}, which chooses its own steps; wanted a solver on a grid, as AdamsMoulton(5)")
    log: list[list[tuple[Tensor, Tensor]]] = []
    run = partial(sample, denoiser, shape, x=x, denoise=False, microbatch=microbatch, dtype=dtype, device=device)
    pilot = run(_Recorded(solver, log), seeds=seeds)
    if not len(pilot.x):
        raise ValueError(f"shape is {list(shape)}; wanted at least one sample for the pilot")
    sde, clock = denoiser.sde, solver.clock
    ends = clock.at(sde, pilot.times).numpy()
    sign, paths = np.sign(ends[1] - ends[0]), []
    for taken in log:
        rows, times = (torch.cat(column) for column in zip(*taken, strict=True))
        reached = clock.at(sde, times).numpy()
        paths += [np.concatenate([ends[:1], reached[(rows == row).numpy()]]) for row in rows.unique()]
    every = np.unique(np.concatenate(paths))[:: int(sign)]
    w = every[np.unique(np.linspace(0, len(every) - 1, min(len(every), _NODES)).round().astype(int))]
    count = np.sum([np.interp(sign * w, sign * path, np.arange(len(path))) for path in paths], axis=0)
    grid = FrozenGrid(sde, clock, torch.from_numpy(w), torch.from_numpy(count / count[-1]))
    budget = round(float(pilot.nfe_each.double().mean()))
    grids = [grid(sde, steps_within(choice, max(choice.evaluations(1), budget))) for choice in choices]
    best = 0
    if len(choices) > 1:  # the pilot itself would not do: its error is its own single steps'
        least = 16 * torch.finfo(pilot.x.dtype).eps
        finer = replace(solver, rtol=max(solver.rtol / 10, least), atol=max(solver.atol / 10, least), max_nfe=100 * solver.max_nfe)
        truth = run(finer, seeds=pilot.seeds, throw=False)
        fine = truth.status == 0
        ends_at = [run(choice, times=times, seeds=pilot.seeds, throw=False).x for choice, times in zip(choices, grids, strict=True)]
        far = [float((end - truth.x)[fine].double().square().sum()) for end in ends_at]
        best = min(range(len(choices)), key=lambda k: far[k] if math.isfinite(far[k]) else math.inf)
    return Frozen(choices[best], grid, grids[best], replace(pilot, solver=solver))
