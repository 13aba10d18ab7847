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

_LEAST = 0.2  # to what part a step may shrink from one try to the next
_BACK_OFF, _TRIES = 0.1, 8  # after a try that was not finite, and how many in a row a sample is given
_STRETCH = 1.01  # a step that would leave less than a hundredth of itself goes to the end
_ULPS = 8 * 2.0**-52  # steps below this part of t are not resolved
_LEAST_ERROR = 1e-10


@dataclass
class Run:
    """What a solve carries from one output time to the next, a row a sample, float64 on the CPU but for the state.

    step: the next step in the clock, nan before the first; before: errors of the last two steps taken; used: evaluations counted when
    the solve began; x, last: the state that was left, and what was evaluated there; taken: where asked for, the times that were reached,
    as (rows, times) in order.
    """

    step: Tensor
    before: Tensor
    used: Tensor
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
    pid: tuple[float, float, float] = field(default=(0.4, 0.3, 0.0), kw_only=True)
    max_nfe: int = field(default=10_000, kw_only=True)
    growth: ClassVar[float] = 10.0  # what a step may be of the one before,
    safety: ClassVar[float] = 0.8  # and how much is dared of the step that would just do
    grid = staticmethod(interval)
    adaptive = True

    def __post_init__(self) -> None:
        check_number(self.rtol, "rtol", 0.0, 1.0)
        check_number(self.atol, "atol", 0.0, open_low=True)
        if not isinstance(self.pid, tuple) or len(self.pid) != 3:
            raise TypeError(f"pid is {self.pid!r}; wanted three numbers (p, i, d), as (0.4, 0.3, 0.0)")
        for c in self.pid:
            check_number(c, "pid", 0.0)
        if not self.pid[1] > 0:
            raise ValueError(f"pid is {self.pid}; wanted i > 0: without it the error does not come back to the tolerance")
        check_count(self.max_nfe, "max_nfe")

    def evaluations(self, steps: int) -> int:
        """Unknown before the solve: TypeError."""
        raise TypeError("an adaptive solver chooses its steps: read .nfe of the solution; max_nfe= bounds it")

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

        x `[B, *shape]`; t, s `[B]` float64 on the CPU; first: what was evaluated at (x, t), if anything.
        """

    def begin(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor | None, Tensor]:
        """What is evaluated at (x, t), if anything, and a first step in the clock `[B]`."""
        return None, ((self.clock.at(oracle.sde, s) - self.clock.at(oracle.sde, t)).abs() * 0.01).expand(len(x))

    def land(self, sde: LinearSDE, t: Tensor, s: Tensor) -> Tensor:
        """Where a step from t that aims at s ends: a time near s, on the same side of t."""
        return s

    def run(self, oracle: Oracle, rows: int) -> Run:
        """The state a solve of so many rows begins with."""
        return Run(torch.full((rows,), math.nan, dtype=torch.float64), torch.ones(rows, 2, dtype=torch.float64), oracle.nfe)

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
        run = state or self.run(oracle, len(x))
        if len(x):
            x = self._cross(oracle, run, x, t, s)
        run.x = x
        return x, run

    def _cross(self, oracle: Oracle, run: Run, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        sde, clock, out = oracle.sde, self.clock, x
        end = clock.at(sde, s)
        sign = float((end - clock.at(sde, t)).sign())
        first = run.last if run.x is x else None
        if first is None:
            first, step = self.begin(oracle, x, t, s)
            run.step = torch.where(run.step.isnan(), step, run.step)
        run.last = first
        fine = x if first is None else x + first  # NaN or infinity in an entry shows in the sum
        keep = fine.detach().flatten(1).sum(1).isfinite().cpu()[: oracle.kept]
        if not bool(keep.all()):
            out = self._lose(oracle, out, torch.arange(len(keep))[~keep], Status.DONE, t.expand(len(keep))[~keep])
        b = _Block(torch.arange(len(x)), x, t.expand(len(x)), run.step, run.before, first)
        part, n = oracle, 0
        while bool(keep.any()):
            if n != int(keep.sum()):  # fewer than in the last try
                places = keep.nonzero().flatten()
                n, b = len(places), b.take(oracle.pad(places))
                part = oracle.select(b.rows)
            w = clock.at(sde, b.t)
            last = b.h * _STRETCH >= (end - w).abs()
            aim = clock.time(sde, w + sign * b.h)
            aim = torch.where(last, s, self.land(sde, b.t, aim).clamp(torch.minimum(b.t, s), torch.maximum(b.t, s)))
            last |= aim == s
            lost = torch.where((aim - b.t).abs() > _ULPS * b.t.abs(), 0, int(Status.MIN_STEP))
            lost[oracle.nfe[b.rows] - run.used[b.rows] + self.cost > self.max_nfe] = int(Status.MAX_NFE)
            lost[(b.tries >= _TRIES) | (lost < 0) & (b.tries > 0)] = 1
            if bool(lost.any()):
                keep = lost[:n] == 0
                for code in lost[:n][~keep].unique().tolist():
                    these = lost[:n] == code
                    out = self._lose(oracle, out, b.rows[:n][these], Status(min(code, 0)), b.t[:n][these])
                continue
            y, ratio, end_value = self.attempt(part, b.x, b.t, aim, b.first)
            error = part.denoiser.error_norm(ratio.detach()).to("cpu", torch.float64)
            ok, rows = error <= 1, b.rows[:n]
            took = (clock.at(sde, aim) - w).abs()
            h = self._next(error, ok, took, b)
            if run.taken is not None:
                run.taken.append((rows[ok[:n]], aim[:n][ok[:n]]))
            if not bool(ok.all()):
                oracle.reject(rows[~ok[:n]], self.cost)
            on = ok.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
            first = None if end_value is None else torch.where(on, end_value, end_value if b.first is None else b.first)
            before = torch.where(ok[:, None], torch.stack([error.clamp(min=_LEAST_ERROR), b.before[:, 0]], 1), b.before)
            b = _Block(
                b.rows, torch.where(on, y, b.x), torch.where(ok, aim, b.t), torch.where(ok & last, torch.maximum(b.h, h), h), before,
                first, torch.where(error.isfinite(), 0, b.tries + 1), ~ok,
            )  # fmt: skip
            keep = ~(ok & last)[:n]
            if not bool(keep.all()):
                done = (~keep).nonzero().flatten()
                there, done_x = rows[done].to(x.device), done.to(x.device)
                out = out.index_copy(0, there, b.x[done_x])
                run.last = None if b.first is None or run.last is None else run.last.index_copy(0, there, b.first[done_x])
                run.step = run.step.index_copy(0, rows[done], b.h[done])
                run.before = run.before.index_copy(0, rows[done], b.before[done])
        return out

    def _next(self, error: Tensor, ok: Tensor, took: Tensor, b: _Block) -> Tensor:
        """The steps to try next."""
        p, i, d = (c / self.error_order for c in self.pid)
        e, (e1, e2) = error.clamp(min=_LEAST_ERROR), b.before.T
        longer = (self.safety * e ** -(p + i + d) * e1 ** (p + 2 * d) * e2**-d).clamp(_LEAST, self.growth)
        longer = torch.where(b.again, longer.clamp(max=1.0), longer)  # what was too long once is not tried again at once
        shorter = (self.safety * e**-i).clamp(_LEAST, self.safety)
        return took * torch.where(ok, longer, torch.where(error.isfinite(), shorter, _BACK_OFF))

    def _lose(self, oracle: Oracle, out: Tensor, rows: Tensor, status: Status, t: Tensor) -> Tensor:
        where = f"at t = {', '.join(f'{v:.6g}' for v in t[:4].tolist())}"
        if status is Status.MAX_NFE:
            problem = (
                f"have used max_nfe = {self.max_nfe} evaluations and are {where}; loosen rtol and atol, or allow more with max_nfe="
            )
        elif status is Status.MIN_STEP:
            problem = (
                f"are {where}, where the error is above the tolerance in the smallest step that time resolves; loosen rtol and atol, solve "
                "in float64, or check that the denoiser is smooth"
            )
        else:
            problem = (
                f"are not finite {where}: the denoiser returned NaN or infinity there, or the step overflowed; check the network at that "
                "time, or use throw=False and read .status"
            )
        oracle.lose(rows, status, problem)
        return out.index_fill(0, rows.to(out.device), math.nan)


@dataclass
class _Block:
    """The samples still under way, a row each: their places in the batch, state, time, next step, last errors, what is known at (x, t),

    how many tries in a row were not finite, and whether the last try failed.
    """

    rows: Tensor
    x: Tensor
    t: Tensor
    h: Tensor
    before: Tensor
    first: Tensor | None
    tries: Tensor = field(default_factory=lambda: torch.zeros(()))
    again: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        if not self.tries.ndim:
            self.tries = torch.zeros(len(self.rows), dtype=torch.int64)
            self.again = torch.zeros(len(self.rows), dtype=torch.bool)

    def take(self, places: Tensor) -> _Block:
        """These rows."""
        there = places.to(self.x.device)
        first = None if self.first is None else self.first[there]
        rows, t, h, before, tries, again = (v[places] for v in (self.rows, self.t, self.h, self.before, self.tries, self.again))
        return _Block(rows, self.x[there], t, h, before, first, tries, again)
