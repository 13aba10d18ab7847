"""Noise added to the path of any solver, and taken out again by it: EDM's churn and Restart. Noise levels are rho = sigma / alpha.

A stretch of time is crossed again, so that a stochastic solver inside wants fresh noise there: not one Brownian path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..grid import between
from ..linear import LinearSDE, cast
from ..noise import CORRECTOR
from ..oracle import Oracle
from .base import Around, Solver

__all__ = ["Churn", "Restart"]


def _cut(solver: Any) -> Solver:
    """The solver as it runs in pieces."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is {solver!r}; wanted a Solver, as in Heun()")
    if solver.brownian:
        raise ValueError(
            f"{solver!r} is driven by one Brownian path, which cannot be crossed twice; wanted a solver with fresh noise"
        )
    pieces = solver.in_pieces()
    wrong = [n for n in range(2, 41) if not pieces.adaptive and pieces.evaluations(n) != n * pieces.evaluations(1)]
    if wrong:
        n = wrong[0]
        raise ValueError(
            f"{solver!r} costs {pieces.evaluations(n)} evaluations in {n} steps, {n * pieces.evaluations(1)} in {n} pieces of one; wanted "
            "a solver whose evaluations add up: see Solver.in_pieces"
        )
    return pieces


def _check_grid(wrapper: Around, times: Tensor) -> None:
    if wrapper.adaptive and len(times) == 2:
        raise ValueError(f"{wrapper!r} is on the two points of its adaptive solver, with no time to add noise at; pass times=")


def _noised(oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, s_noise: float) -> Tensor:
    """x_s given x_t for s > t, by the forward SDE, its noise times s_noise."""
    scale, std = oracle.sde.transition(t, s)
    return cast(scale, x) * x + cast(s_noise * std, x) * oracle.noise.draw(x, CORRECTOR)


def _top(sde: LinearSDE) -> Tensor:
    """rho at t_max."""
    return sde.rho(torch.tensor(sde.t_max, dtype=torch.float64))


@dataclass(frozen=True)
class _Cutting(Around):
    """A wrapper whose noise cuts the path of `solver` in pieces."""

    solver: Solver

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", _cut(self.solver))

    @property
    def inner(self) -> Solver:
        """The solver."""
        return self.solver


@dataclass(frozen=True)
class Churn(_Cutting):
    """EDM's stochastic sampler around any solver: before each step with s_min <= rho <= s_max, noise up to rho (1 + gamma).

    gamma = min(s_churn / N, sqrt 2 - 1), N the number of times; the noise is the forward SDE's, so that the law stays p_t up to the
    solver's error, times s_noise; the solver then goes from there to s. Noise never goes above t_max, where EDM's does: at rho(t_max)
    there is none, and none before the final mean (EDM has some where s_min is 0). A solver with a past starts it afresh after noise
    (`Solver.in_pieces`). Weak order the solver's, 1 with a past; strong order 0. Karras et al. 2022 (NeurIPS), algorithm 2, with Heun().
    """

    s_churn: float
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.s_churn, "s_churn", 0.0)
        check_number(self.s_min, "s_min", 0.0)
        if self.s_max != math.inf and check_number(self.s_max, "s_max") <= self.s_min:
            raise ValueError(
                f"s_min is {self.s_min:g} and s_max {self.s_max:g}; wanted s_min < s_max, levels of rho = sigma / alpha"
            )
        check_number(self.s_noise, "s_noise", 0.0)

    def in_pieces(self) -> Solver:
        """Refused: gamma depends on the whole grid."""
        raise ValueError(f"{self!r} sets its noise by the number of times in the whole grid; wrappers do not nest: choose one")

    def evaluations(self, steps: int) -> int:
        """The solver's."""
        return self.solver.evaluations(steps)

    def start(self, sde: LinearSDE, times: Tensor) -> Any:
        """(number of the step, the time that noise leads up to or None, a step; what starts a piece or None, a step; the state)."""
        _check_grid(self, times)
        gamma = min(self.s_churn / len(times), math.sqrt(2) - 1)
        level = sde.rho(times[:-1])
        high = torch.minimum(level * (1 + gamma), _top(sde))
        add = (level >= self.s_min) & (level <= self.s_max) & (high > level * (1 + 1e-12))
        up = sde.time(-2 * high.log()).clamp(sde.t_min, sde.t_max)
        ups = [u if yes and u > t else None for u, t, yes in zip(up, times, add.tolist(), strict=False)]
        begins = [k for k, u in enumerate(ups) if k == 0 or u is not None]  # a piece runs to the next noise
        heads = [times[k] if ups[k] is None else up[k] for k in begins]
        pieces = [
            torch.cat([t[None], times[a + 1 : b + 1]]) for t, (a, b) in zip(heads, pairwise([*begins, len(ups)]), strict=True)
        ]
        states = dict(zip(begins, self.solver.starts(sde, pieces), strict=True))
        return 0, ups, states, None

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        k, ups, states, inner = self.start(oracle.sde, torch.stack([t, s])) if state is None else state
        if k == len(ups):
            raise ValueError(f"{self!r} has made the {k} steps it was started for; start the solver on the grid it runs on")
        if ups[k] is not None:
            x, t = _noised(oracle, x, t, ups[k], self.s_noise), ups[k]
        x, inner = self.solver.step(oracle, x, t, s, states.get(k, inner))
        return x, (k + 1, ups, states, inner)


@dataclass(frozen=True)
class Restart(_Cutting):
    """Restart sampling around any solver: on reaching the level `low`, noise up to `high` and back down by the solver, again and again.

    intervals: (low, high, steps, repeats), levels rho = sigma / alpha, low rounded to the nearest time of the grid (in log rho) that is
    below high; each pass goes back in `steps` steps uniform in rho^(1/7) (the paper's N_restart less one; `repeats` is its K). s_noise
    multiplies the noise. A solver with a past starts it afresh in each pass (`Solver.in_pieces`). Weak order 0: the passes keep their
    steps however many the grid has; strong order 0. Xu et al. 2023 (NeurIPS), algorithm 1.
    """

    intervals: tuple[tuple[float, float, int, int], ...]
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = TypeError(f"intervals is {self.intervals!r}; wanted (low, high, steps, repeats) ones, as in [(0.06, 0.3, 2, 3)]")
        if isinstance(self.intervals, str) or not isinstance(self.intervals, Sequence) or not self.intervals:
            raise wrong
        if not all(isinstance(part, Sequence) and not isinstance(part, str) and len(part) == 4 for part in self.intervals):
            raise wrong
        object.__setattr__(self, "intervals", tuple(tuple(part) for part in self.intervals))
        for low, high, steps, repeats in self.intervals:
            check_number(low, "low", 0.0, open_low=True)
            if check_number(high, "high", 0.0) <= low:
                raise ValueError(f"the interval ({low:g}, {high:g}) is empty; wanted low < high, levels of rho = sigma / alpha")
            check_count(steps, "steps")
            check_count(repeats, "repeats")
        check_number(self.s_noise, "s_noise", 0.0)

    @property
    def weak_order(self) -> float:
        """0: the error of the passes does not vanish with more steps of the grid."""
        return 0.0

    def in_pieces(self) -> Solver:
        """Refused: the intervals belong to the whole grid."""
        raise ValueError(f"{self!r} belongs to the whole grid; wrappers do not nest: choose one")

    def evaluations(self, steps: int) -> int:
        """The solver's, on the grid and in every pass."""
        return self.solver.evaluations(steps) + sum(repeats * self.solver.evaluations(n) for _, _, n, repeats in self.intervals)

    def start(self, sde: LinearSDE, times: Tensor) -> Any:
        """(number of the step, {node: passes there, as (times, their starts)}, {node: start of a piece}, the state)."""
        _check_grid(self, times)
        found: dict[int, list[tuple[Tensor, int]]] = {}
        levels = sde.rho(times)
        top = float(_top(sde))
        for low, high, steps, repeats in self.intervals:
            if not levels[-1] * (1 - 1e-9) <= low <= levels[0] or high > top * (1 + 1e-9):
                raise ValueError(
                    f"the interval ({low:g}, {high:g}) leaves the levels rho of this grid and SDE, [{levels[-1]:.6g}, {levels[0]:.6g}] for "
                    f"low and at most {top:.6g} for high"
                )
            below = [k for k in range(1, len(times)) if levels[k] * (1 + 1e-9) < high]
            if not below:
                raise ValueError(f"no time of this grid is below high = {high:g} by more than rounding; wanted a wider interval")
            node = min(below, key=lambda k: abs(math.log(levels[k] / low)))
            found.setdefault(node, []).append((between(sde, steps, min(high, top), times[node]), repeats))
        nodes = sorted({0, *found} - {len(times) - 1})
        grids = [times[a : b + 1] for a, b in pairwise([*nodes, len(times) - 1])]
        back = [grid for part in found.values() for grid, repeats in part for _ in range(repeats)]
        starts = iter(self.solver.starts(sde, [*grids, *back]))
        pieces = {node: next(starts) for node in nodes}
        passes = {node: [(grid, [next(starts) for _ in range(repeats)]) for grid, repeats in part] for node, part in found.items()}
        return 0, passes, pieces, None

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t."""
        solver = self.solver
        k, passes, pieces, inner = self.start(oracle.sde, torch.stack([t, s])) if state is None else state
        x, inner = solver.step(oracle, x, t, s, pieces.get(k, inner))
        for grid, starts in passes.get(k + 1, ()):
            for back in starts:
                x = _noised(oracle, x, s, grid[0], self.s_noise)
                for a, b in pairwise(grid.unbind()):
                    x, back = solver.step(oracle, x, a, b, back)
        return x, (k + 1, passes, pieces, inner)
