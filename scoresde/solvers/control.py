"""The loop of adaptive steps: each sample has its own time, step, error and evaluations, and leaves the batch when it is done."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import Status, check_count, check_number, shape_of
from ..grid import interval
from ..linear import LinearSDE
from ..oracle import Oracle
from ..variables import Clock
from .base import Solver

__all__ = ["Controlled", "Run"]

PID = tuple[float, float, float]
PI: PID = (0.4, 0.3, 0.0)

_LEAST = 0.2  # to what part a step may shrink from one try to the next
_BACK_OFF, _TRIES = 0.1, 8  # after a try that was not finite, and how many in a row a sample is given
_STRETCH = 1.01  # a step that would leave less than a hundredth of itself goes to the end
_ULPS = 8 * 2.0**-52  # steps below this part of t are not resolved
_LEAST_ERROR = 1e-10


@dataclass
class Run:
    """What a solve carries from one output time to the next, a row a sample, float64 on the CPU but for the state.

    step: the next step in the clock, nan before the first; before: errors of the last two steps taken; x, last: the state that was left,
    and what was evaluated there; taken: where asked for, the times that were reached, as (rows, times) in order.
    """

    step: Tensor
    before: Tensor
    x: Tensor | None = None
    last: Tensor | None = None
    taken: list[tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Controlled(Solver):
    """A solver that goes from t to s in steps of its own, a sample each: a step whose error exceeds the tolerance is made again, shorter.

    rtol, atol: a step's error in x, entry by entry, over rtol |x| + atol (alpha + sigma), in root mean square over the sample, is kept
    below 1 (a likelihood's l-channels apart, in nats). pid: (p, i, d), the step is multiplied by
    0.8 e_n^-(p + i + d)/k e_{n-1}^(p + 2 d)/k e_{n-2}^-d/k for errors e of that size and an order k of the local error; (0, 1, 0) is the
    elementary controller. Söderlind 2003 (ACM TOMS 29). max_nfe: evaluations a sample may use in a solve.

    A sample's steps depend on it alone; those that are done leave the batch. Raises UnfinishedError for a sample that has used max_nfe
    or whose step is as small as time resolves, NonFiniteError for one that is lost to NaN; with throw=False these end as NaN, and
    `.status` says why. Gradients are those of the steps taken.
    """

    rtol: float = field(default=1e-5, kw_only=True)
    atol: float = field(default=1e-5, kw_only=True)
    pid: PID = field(default=PI, kw_only=True)
    max_nfe: int = field(default=10_000, kw_only=True)
    growth: ClassVar[float] = 5.0  # what a step may be of the one before: an estimate may be small by luck,
    safety: ClassVar[float] = 0.8  # and the part that is dared of the step that would just do
    grid = staticmethod(interval)
    adaptive = True

    def __post_init__(self) -> None:
        check_number(self.rtol, "rtol", 0.0, 1.0)
        check_number(self.atol, "atol", 0.0, open_low=True)
        if not isinstance(self.pid, tuple) or len(self.pid) != 3:
            raise TypeError(f"pid is {self.pid!r}; wanted three numbers (p, i, d), as {PI}")
        for c in self.pid:
            check_number(c, "pid", 0.0)
        if not self.pid[1] > 0:
            raise ValueError(f"pid is {self.pid}; wanted i > 0: without it the error does not come back to the tolerance")
        check_count(self.max_nfe, "max_nfe")

    # --- what a family says ------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def clock(self) -> Clock:
        """What steps are measured in."""

    @property
    @abstractmethod
    def cost(self) -> int:
        """Evaluations of one try."""

    @property
    @abstractmethod
    def error_order(self) -> int:
        """k: the local error is of this order in the step."""

    @property
    @abstractmethod
    def fixed(self) -> tuple[Solver, ...]:
        """Who may run on the grid of a run of this solver: `freeze` takes the best on its pilot."""

    @abstractmethod
    def attempt(
        self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One try: x_s, its error over the tolerance (like x), and what was evaluated at (x_s, s), if anything.

        x `[B, *shape]`; t, s `[B]` float64 on the CPU; first: what was evaluated at (x, t), if anything: what `attempt` returns last is
        kept for it only where `begin` gave the first.
        """

    def begin(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor | None, Tensor]:
        """What is evaluated at (x, t), if anything, and a first step in the clock `[B]`."""
        return None, ((self.clock.at(oracle.sde, s) - self.clock.at(oracle.sde, t)).abs() * 0.01).expand(len(x))

    def tolerance(self, oracle: Oracle, size: Tensor, t: Tensor) -> Tensor:
        """What is allowed of an error in x, of entries of this size `[B, *shape]`, at times t `[B]`: the denoiser says."""
        return oracle.denoiser.tolerance(size, column(t, size, t.dtype), self.rtol, self.atol)

    def land(self, sde: LinearSDE, t: Tensor, s: Tensor) -> Tensor:
        """Where a step from t that aims at s ends: a time near s, on the same side of t."""
        return s

    def run(self, rows: int) -> Run:
        """The state a solve of so many rows begins with."""
        return Run(torch.full((rows,), math.nan, dtype=torch.float64), torch.ones(rows, 2, dtype=torch.float64))

    # --- the loop ----------------------------------------------------------------------------------------------------------
    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Run]:
        """x_s from x_t, any number of evaluations; t, s ()."""
        if t.ndim:
            raise ValueError(f"t is {shape_of(t)}; {self!r} goes from one time () to another, each sample in steps of its own")
        resolved = 8 * torch.finfo(x.dtype).eps
        if max(self.rtol, self.atol) < resolved:
            raise ValueError(
                f"rtol is {self.rtol:g} and atol {self.atol:g}; {shape_of(x)} resolves {resolved:.2g}: loosen them, or solve in float64"
            )
        run = state or self.run(len(x))
        if len(x):
            x = self._cross(oracle, run, x, t, s)
        run.x = x
        return x, run

    def _cross(self, oracle: Oracle, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        sde, clock = oracle.sde, self.clock
        end = clock.at(sde, s)
        sign = float((end - clock.at(sde, t)).sign())
        way = _Way(self, oracle, run, x, t)
        way.leave(~_finite(way.b.x[: way.n]))  # lost before, and said so
        if way.b.first is None:
            self._bound(way, 1)
        if way.n and way.b.first is None:  # of the whole batch, unless samples were lost
            way.b.first, step = self.begin(way.part, way.b.x, t, s)
            way.b.h = torch.where(way.b.h.isnan(), step, way.b.h)
        if way.n and way.b.first is not None:
            way.lose(~_finite(way.b.first[: way.n]), Status.DONE)
        while way.n:
            b = way.b
            w = clock.at(sde, b.t)
            last = b.h * _STRETCH >= (end - w).abs()
            aim = self.land(sde, b.t, clock.time(sde, w + sign * b.h)).clamp(torch.minimum(b.t, s), torch.maximum(b.t, s))
            aim = torch.where(last, s, aim)
            last |= aim == s
            stuck = ~((aim - b.t).abs() > _ULPS * b.t.abs())
            if bool((stuck & last)[: way.n].any()):  # s itself is not told apart
                way.arrive((stuck & last)[: way.n])
                continue
            if way.lose(((b.tries >= _TRIES) | stuck & (b.tries > 0))[: way.n], Status.DONE):
                continue
            if way.lose(stuck[: way.n], Status.MIN_STEP) or self._bound(way, self.cost):
                continue
            n, rows = way.n, b.rows[: way.n]
            spent = oracle.spent(rows)
            y, ratio, end_value = self._checked(self.attempt(way.part, b.x, b.t, aim, b.first), b.x)
            error = way.part.denoiser.error_norm(ratio.detach().double()).cpu()
            error = torch.where(_finite(y), error, math.nan)  # an infinite y has a tolerance to match
            ok, took = error <= 1, (clock.at(sde, aim) - w).abs()
            h = self._next(error, ok, took, b)
            if run.taken is not None:
                run.taken.append((rows[ok[:n]], aim[:n][ok[:n]]))
            if not bool(ok[:n].all()):
                oracle.reject(rows[~ok[:n]], int((oracle.spent(rows) - spent)[0]))
            if y.requires_grad and bool(ok.any()) and not bool(error.isfinite().all()):
                y, end_value = self._alone(oracle, b, aim, ok, y, end_value)
            y, first = _choose(ok, y, b.x), _choose(ok, end_value, b.first)
            told = ok & ~(last & (took < b.h / 2))  # the error of a step cut short says nothing of the next
            before = torch.where(told[:, None], torch.stack([error.clamp(min=_LEAST_ERROR), b.before[:, 0]], 1), b.before)
            h = torch.where(ok & last, torch.maximum(b.h, h), h)  # nor is the next one shorter for it
            tries = torch.where(error.isfinite(), 0, b.tries + 1)
            way.b = _Block(b.rows, y, torch.where(ok, aim, b.t), h, before, first, tries, ~ok)
            way.arrive((ok & last)[:n])
        return way.end()

    def _checked(self, found: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if not isinstance(found, tuple) or [getattr(v, "shape", None) for v in found[:2]] != [x.shape] * 2 or len(found) != 3:
            raise TypeError(
                f"{self!r}.attempt returned {shape_of(found)}; wanted (x_s, its error over the tolerance, both like x {shape_of(x)}, and "
                "what was evaluated at x_s or None)"
            )
        return found

    def _alone(
        self, oracle: Oracle, b: _Block, aim: Tensor, ok: Tensor, y: Tensor, end_value: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The try again, of the rows that it was good for: on the way back of a gradient 0 times what is not finite is NaN."""
        places = ok.nonzero().flatten()
        padded, there = oracle.pad(places), places.to(y.device)
        few = b.take(padded)
        again, _, end_again = self.attempt(oracle.select(few.rows), few.x, few.t, aim[padded], few.first)
        put = lambda whole, part: whole.detach().index_copy(0, there, part[: len(places)])
        return put(y, again), None if end_value is None or end_again is None else put(end_value, end_again)

    def _bound(self, way: _Way, cost: int) -> bool:
        """Whether samples were lost that cannot afford as many evaluations more."""
        rows = way.b.rows[: way.n]
        return way.lose(way.oracle.spent(rows) + cost > self.max_nfe, Status.MAX_NFE)

    def _next(self, error: Tensor, ok: Tensor, took: Tensor, b: _Block) -> Tensor:
        """The steps to try next."""
        p, i, d = (c / self.error_order for c in self.pid)
        e, (e1, e2) = error.clamp(min=_LEAST_ERROR).log(), b.before.log().unbind(1)
        longer = (self.safety * torch.exp((p + 2 * d) * e1 - (p + i + d) * e - d * e2)).clamp(_LEAST, self.growth)
        longer = torch.where(b.again, longer.clamp(max=1.0), longer)  # what was too long once is not tried again at once
        shorter = (self.safety * torch.exp(-i * e)).clamp(_LEAST, self.safety)
        return took * torch.where(ok, longer, torch.where(error.isfinite(), shorter, _BACK_OFF))


def _choose(ok: Tensor, new: Any, old: Any) -> Any:
    """Row by row the new where it is taken, else the old; None where a row may have neither, whoever its mates are."""
    if new is None or old is None:
        return None
    if not bool(ok.any()):
        return old  # and the graph of the try is not kept
    return torch.where(column(ok, new, torch.bool), new, old)


def column(c: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`[B]` as a factor of x, in its dtype (or this one) and on its device."""
    return c.to(x.device, dtype or x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _finite(x: Tensor) -> Tensor:
    """Which rows are finite, `[B]` on the CPU: NaN or infinity in any entry shows in the sum."""
    return x.detach().flatten(1).sum(1, dtype=torch.float64).isfinite().cpu()


@dataclass
class _Block:
    """Rows: their places in the batch, state, time, next step, last errors, what is known at (x, t), tries in a row that were not

    finite, and whether the last one failed.
    """

    rows: Tensor
    x: Tensor
    t: Tensor
    h: Tensor
    before: Tensor
    first: Tensor | None
    tries: Tensor
    again: Tensor

    def take(self, places: Tensor) -> _Block:
        """These of them."""
        there = places.to(self.x.device)
        first = None if self.first is None else self.first[there]
        rows, t, h, before, tries, again = (v[places] for v in (self.rows, self.t, self.h, self.before, self.tries, self.again))
        return _Block(rows, self.x[there], t, h, before, first, tries, again)


class _Way:
    """The samples under way from t to s: the first `n` of the block `b` (the rest of it is padding), asked through `part`."""

    def __init__(self, solver: Controlled, oracle: Oracle, run: Run, x: Tensor, t: Tensor) -> None:
        self.solver, self.oracle, self.run, self.out = solver, oracle, run, x
        rows, none = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.int64)
        first, run.last = (run.last if run.x is x else None), None
        self.b = _Block(rows, x, t.expand(len(x)), run.step, run.before, first, none, none > 0)
        self.n, self.part = oracle.kept, oracle

    def leave(self, gone: Tensor) -> bool:
        """Go on without these, `[n]`, which end as NaN; whether there were any."""
        if not bool(gone.any()):
            return False
        self.out = self.out.index_fill(0, self.b.rows[: self.n][gone].to(self.out.device), math.nan)
        self._keep(~gone)
        return True

    def lose(self, gone: Tensor, status: Status) -> bool:
        """The same, with a status (DONE: they are not finite); raises what it means when the oracle throws."""
        if bool(gone.any()):
            where = f"at t = {', '.join(f'{v:.6g}' for v in self.b.t[: self.n][gone][:4].tolist())}"
            self.oracle.lose(
                self.b.rows[: self.n][gone], status, _PROBLEMS[status].format(where=where, max_nfe=self.solver.max_nfe)
            )
        return self.leave(gone)

    def arrive(self, done: Tensor) -> None:
        """These, `[n]`, are at s."""
        if not bool(done.any()):
            return
        b, run, rows, places = self.b, self.run, self.b.rows[: self.n][done], done.nonzero().flatten()
        there, here = rows.to(b.x.device), places.to(b.x.device)
        self.out = self.out.index_copy(0, there, b.x[here])
        if b.first is not None:
            run.last = (torch.zeros_like(b.x[:1]).expand(self.out.shape) if run.last is None else run.last).index_copy(
                0, there, b.first[here]
            )
        run.step, run.before = run.step.index_copy(0, rows, b.h[places]), run.before.index_copy(0, rows, b.before[places])
        self._keep(~done)

    def end(self) -> Tensor:
        """x at s; padding is again what it is a copy of."""
        run, kept = self.run, self.oracle.kept
        if kept == len(self.out):
            return self.out
        rows = torch.arange(len(self.out)).clamp(max=kept - 1)
        run.step, run.before = run.step[rows], run.before[rows]
        there = rows.to(self.out.device)
        run.last = None if run.last is None else run.last[there]
        return self.out[there]

    def _keep(self, stay: Tensor) -> None:
        places = stay.nonzero().flatten()
        self.n = len(places)
        if self.n:
            self.b = self.b.take(self.oracle.pad(places))
            self.part = self.oracle.select(self.b.rows)


_PROBLEMS = {
    Status.DONE: "are not finite {where}: the denoiser returned NaN or infinity there, or the step overflowed; check the network at that "
    "time, or use throw=False and read .status",
    Status.MAX_NFE: "have no evaluations for another step within max_nfe = {max_nfe} and are {where}; loosen rtol and atol, or allow more "
    "with max_nfe=",
    Status.MIN_STEP: "are {where}, where the error is above the tolerance in the smallest step that time resolves; loosen rtol and atol, "
    "solve in float64, or check that the denoiser is smooth",
}
