"""The one core of the deterministic linear solvers, x_s = (m_s / m_t) x + m_s sum_j c_j q_j: weights once a grid, host floats in the loop.

Whatever the variable q = p x + r x0, the past, the stages and the corrector, a step is a linear map of tensors at hand: the state, the
past q and the x0 evaluated inside the step. `start` multiplies everything out in float64; `step` adds scaled tensors, a pass each.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..checks import check_callable, check_count, shape_of
from ..grid import Grid, logsnr
from ..linear import LinearSDE
from ..oracle import Oracle
from ..variables import Clock, Variable, check_variable
from ..variables import t as time_clock
from .base import Solver
from .tableau import OF_ORDER, Tableau
from .weights import Array, Frame, Weights, bh1, exact

__all__ = ["Multistep", "SingleStep"]


@dataclass(frozen=True)
class Row:
    """One step from t to s, ready to run. Coefficients are of [x, `past` earlier q (newest first), noises, the x0 evaluated so far]."""

    t: float
    s: float
    past: int
    stages: tuple[tuple[Tensor, tuple[float, ...]], ...]  # (time, coefficients of the state to evaluate there)
    final: tuple[float, ...]
    keep: tuple[float, float] = (0.0, 0.0)  # (p, r) of this step's q
    hold: int = 0  # how many q later steps will read: this one's, if any, and the last before it
    draws: tuple[tuple[Tensor, Tensor], ...] = ()  # the intervals that noise is drawn for


def combine(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j c_j v_j as a new tensor; one pass where it is a mean of two, as every Euler step with alpha = 1 is."""
    if len(tensors) == 2 and abs(coefficients[0] + coefficients[1] - 1.0) < 1e-15:
        less = int(coefficients[1] < coefficients[0])  # lerp takes 1 - weight in float32: the lesser weight is given
        return torch.lerp(tensors[1 - less], tensors[less], coefficients[less])
    out: Tensor | None = None
    for c, v in zip(coefficients, tensors):  # noqa: B905 - the inner loop: `strict` has a price
        if c:
            out = v * c if out is None else out.add_(v, alpha=c)
    return torch.zeros_like(tensors[0]) if out is None else out


@dataclass(frozen=True)
class Linear(Solver):
    """A solver whose every step is a linear map, found by `rows` for a whole grid at once."""

    variable: Variable
    coordinate: Clock | None
    name: str = field(default="", compare=False, kw_only=True)
    recommended: Grid = field(default=logsnr, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_variable(self.variable)
        if self.coordinate is not None and not isinstance(self.coordinate, Clock):
            raise TypeError(f"coordinate is {self.coordinate!r}; wanted a Clock of scoresde.variables: lam, rho, snr, tau, t")
        if self.variable.clock == time_clock and self.coordinate not in (None, time_clock):
            raise ValueError(f"coordinate is {self.coordinate!r}; the variable {self.variable!r} is interpolated in t alone")
        check_callable(self.recommended, "recommended", "a rule (sde, n) -> times, as scoresde.grid.karras")

    @property
    def grid(self) -> Grid:
        """The grid it recommends."""
        return self.recommended

    @property
    def invariant(self) -> bool:
        """Whether the step knows the schedule through rho alone."""
        return time_clock not in (self.coordinate, self.variable.clock)

    def __repr__(self) -> str:
        if self.name:
            return self.name
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.compare]
        return f"{type(self).__name__}({', '.join(shown)})"

    remembers: ClassVar[bool] = True  # whether equal settings always give equal rows

    def frame(self, sde: LinearSDE, t: Tensor, s: Tensor) -> Frame:
        """What y and u are on the steps from times t to times s."""
        return Frame(self.variable, sde, t, s)

    @abstractmethod
    def rows(self, sde: LinearSDE, pieces: Sequence[Tensor]) -> list[tuple[Row, ...]]:
        """Every step of each grid."""

    def start(self, sde: LinearSDE, times: Tensor) -> Any:
        """(rows, the number of the next, past q newest first)."""
        return self.starts(sde, [times])[0]

    def starts(self, sde: LinearSDE, pieces: Sequence[Tensor]) -> list[Any]:
        """`start` on each of several grids, whose weights are found together."""
        return [(rows, 0, ()) for rows in _remembered(self, sde, pieces)]

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t `[B, *shape]`; t and s are those `start` was given, or any with state=None."""
        if t.ndim:
            raise ValueError(f"t is {shape_of(t)}; {self!r} steps on a grid, with one time () for the batch")
        rows, k, past = self.start(oracle.sde, torch.stack([t, s])) if state is None else state
        row = rows[min(k, len(rows) - 1)]
        if float(t) != row.t or float(s) != row.s:
            raise ValueError(
                f"step {k} of this grid runs from t = {row.t:.6g} to {row.s:.6g}, got {float(t):.6g} and {float(s):.6g}; start the "
                "solver on the grid it runs on"
            )
        known = [x, *past[: row.past]]
        if row.draws:
            known += [oracle.noise(x, a, b) for a, b in row.draws]
        known.append(x0 := oracle.mean(x, t))
        for time, coefficients in row.stages:
            known.append(oracle.mean(combine(coefficients, known), time.clone()))  # its own: a denoiser may write into it
        if row.hold:
            past = (x0 if row.keep == (0.0, 1.0) else combine(row.keep, (x, x0)), *past[: row.hold - 1])
        return combine(row.final, known), (rows, k + 1, past)


_MEMORY: OrderedDict[Any, tuple[weakref.ref[LinearSDE], list[tuple[Row, ...]]]] = OrderedDict()


def _remembered(solver: Linear, sde: LinearSDE, pieces: Sequence[Tensor]) -> list[tuple[Row, ...]]:
    """The rows of these grids, from memory when this very SDE was met on them before: every microbatch of a solve asks for the same.

    An SDE is known by identity (two that compare equal may differ in what is not compared), and only if its class is itself a frozen
    dataclass: any other could change between two solves.
    """
    params = vars(type(sde)).get("__dataclass_params__")
    values = [times.tolist() for times in pieces]
    key = (solver, id(sde), *map(tuple, values)) if solver.remembers and params is not None and params.frozen else None
    try:
        met = None if key is None else _MEMORY.get(key)
    except TypeError:  # a part of the solver cannot be hashed
        met = key = None
    if met is not None and met[0]() is sde:
        return met[1]
    with torch.inference_mode(False), torch.no_grad():  # rows outlive the mode they were made in
        pieces = [torch.tensor(times, dtype=torch.float64) for times in values]
        for times in pieces:
            check_levels(sde, times)
        rows = solver.rows(sde, pieces)
    for row in (row for piece in rows for row in piece):
        if not all(map(math.isfinite, (*row.final, *(c for _, part in row.stages for c in part)))):
            raise ValueError(
                f"the weights of {solver!r} overflow from t = {row.t:.6g} to {row.s:.6g}; take more steps or less noise"
            )
    if key is not None:
        _MEMORY[key] = (weakref.ref(sde), rows)
        while len(_MEMORY) > 256:
            _MEMORY.popitem(last=False)
    return rows


def check_levels(sde: LinearSDE, times: Tensor) -> None:
    """Raise where two neighbours of a grid have one noise level: the weights would divide by the step."""
    same = sde.logsnr(times).diff() == 0
    if bool(same.any()):
        i = int(same.int().argmax())
        raise ValueError(f"times {times[i]:.17g} and {times[i + 1]:.17g} have the same noise level to rounding; drop one of them")


def reads(variable: Variable, sde: LinearSDE, times: Tensor) -> list[tuple[float, float]]:
    """(p, r) at each time."""
    return list(zip(*(c.expand(times.shape).tolist() for c in variable.read(sde, times)), strict=True))


def split(values: Sequence[Any], pieces: Sequence[Tensor]) -> list[Any]:
    """One entry a step, dealt to the grids the steps are of."""
    ends = list(accumulate((len(times) - 1 for times in pieces), initial=0))
    return [values[a:b] for a, b in pairwise(ends)]


def single_rows(solver: Linear, sde: LinearSDE, pieces: Sequence[Tensor], tableau: Tableau) -> list[tuple[Row, ...]]:
    """The rows of a tableau on each step: evaluation i is of x_i = m_i (x / m_t + sum_j c_ij q_j + noise), q_j = p_j x_j + r_j x0_j."""
    t, s = torch.cat([times[:-1] for times in pieces]), torch.cat([times[1:] for times in pieces])
    variable, frame = solver.variable, solver.frame(sde, t, s)
    coordinate = solver.coordinate or variable.clock
    clock = coordinate if tableau.through else variable.clock
    w, h, last = clock.at(sde, t), clock.at(sde, s) - clock.at(sde, t), len(tableau.fractions)
    inner = [t if f == 0 else s if f == 1 else clock.time(sde, w + f * h) for f in (*tableau.fractions, 1.0)]
    nodes, scales = [clock.at(sde, at).tolist() for at in inner], [frame.scale(at) for at in inner]
    lines = [reads(variable, sde, at) for at in inner[:-1]]
    parts = [frame.segments(coordinate, at) for at in inner[1:]]
    ends = sorted({*tableau.fractions[1:], 1.0})  # noise is drawn up to each evaluation, and on to the end
    bounds = [t, *(inner[(*tableau.fractions, 1.0).index(f)] for f in ends)]
    spreads = [frame.spread(a, b) for a, b in pairwise(bounds)]
    made = []
    for k in range(len(t)):
        noises = [i for i in range(len(ends)) if spreads[i][k] > 0]
        unit = np.eye(1 + len(noises) + last)  # of x, the noises, the x0
        state, q, stages = unit[0], [], []
        for i in range(last):
            p, r = lines[i][k]
            q.append(p * state + r * unit[1 + len(noises) + i])
            if tableau.through:
                used = tableau.through[i]
                c = exact(parts[i][k], [nodes[j][k] for j in used])
            else:
                used, c = range(i + 1), np.array(tableau.shares[i]) * parts[-1][k].du.sum()
            m, end = scales[i + 1][k], (*tableau.fractions[1:], 1.0)[i]
            state = m / scales[0][k] * unit[0] + m * sum(cj * q[j] for cj, j in zip(c, used, strict=True))
            for place, j in enumerate(noises):
                state = state + m * spreads[j][k] * (ends[j] <= end) * unit[1 + place]
            stages.append((inner[i + 1][k], tuple(state[: 2 + len(noises) + i].tolist())))
        draws = tuple((bounds[j][k], bounds[j + 1][k]) for j in noises)
        made.append(Row(float(t[k]), float(s[k]), 0, tuple(stages[:-1]), stages[-1][1], lines[0][k], draws=draws))
    return [tuple(rows) for rows in split(made, pieces)]


@dataclass(frozen=True, repr=False)
class SingleStep(Linear):
    """Explicit (exponential) Runge-Kutta: dy/du = q with every evaluation inside the step, no past.

    variable: (m, u, q), see `scoresde.variables`; coordinate: the clock in which the tableau places and interpolates its evaluations.
    """

    tableau: Tableau

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tableau, Tableau):
            raise TypeError(f"tableau is {self.tableau!r}; wanted a scoresde.solvers.Tableau")

    @property
    def order(self) -> int:
        """The tableau's."""
        return self.tableau.order

    def evaluations(self, steps: int) -> int:
        """A tableau's worth a step."""
        return len(self.tableau.fractions) * steps

    def rows(self, sde: LinearSDE, pieces: Sequence[Tensor]) -> list[tuple[Row, ...]]:
        """Every step alike."""
        return single_rows(self, sde, pieces, self.tableau)


@dataclass(frozen=True, repr=False)
class Multistep(Linear):
    """Adams methods: q is extrapolated through its last `nodes` values, one evaluation a step. y_s = y_t + sum_j c_j q_j.

    variable: (m, u, q), see `scoresde.variables`; coordinate: the clock of the polynomial (None: the number of the step, whose weights
    are those of a uniform grid); weights: `exact`, `bh1`, `bh2`; corrector: 0, or the nodes, the new one counted, through which x_t is
    made again once q is evaluated there, before it is stepped from (PEC: predict, evaluate, correct; the evaluation is kept, the last
    state stays uncorrected); startup: the first steps are single steps of the order the past cannot give yet (None: where the past is
    longer than one, from NFE 20 on; False: orders 1, 2, ..., which caps the global order at 2, with a corrector at 3); lower_final: no
    more nodes than steps left.
    """

    nodes: int
    weights: Weights = exact
    corrector: int = 0
    startup: bool | None = None
    lower_final: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.nodes, "nodes")
        if check_count(self.corrector, "corrector", 0) and not 2 <= self.corrector <= self.nodes + 1:
            raise ValueError(f"corrector is {self.corrector} with nodes={self.nodes}; wanted 0, or 2 to nodes + 1")
        if self._full_order > 5:
            raise ValueError(
                f"nodes is {self.nodes}, corrector {self.corrector}: order {self._full_order}; no start-up is beyond 5"
            )
        if not callable(self.weights):
            raise TypeError(f"weights is {self.weights!r}; wanted one of scoresde.solvers: exact, bh1, bh2")
        if self.weights is bh1 and self.coordinate == time_clock:
            raise ValueError("weights is bh1 in t; its B(h) = h wants a clock with a rate: lam, as UniPC has it")
        if not any(self.startup is c for c in (None, True, False)) or not isinstance(self.lower_final, bool):
            raise TypeError(f"startup is {self.startup!r}, lower_final {self.lower_final!r}; wanted True, False or (startup) None")

    @property
    def past(self) -> int:
        """How many earlier evaluations a step uses."""
        return max(self.nodes, self.corrector) - 1

    @property
    def _full_order(self) -> int:
        return self.corrector or self.nodes

    @property
    def order(self) -> int:
        """The corrector's nodes, or else the predictor's, as far as coordinate, start-up and end allow."""
        caps = [self._full_order]
        if self.startup is False:
            caps.append(3 if self.corrector else 2)
        if self.lower_final or self.coordinate is None:
            caps.append(2)
        return min(caps)

    def in_pieces(self) -> Multistep:
        """Without a start-up: each piece ramps its order up, 1, 2, ..."""
        if self.startup is False or self.past < 2:
            return self
        named = self.name and "startup=" not in self.name
        return replace(self, startup=False, name=f"{self.name[:-1]}, startup=False)" if named else "")

    def _single_steps(self, steps: int) -> tuple[int, Tableau]:
        """How many first steps are single steps, and which: their local order is that of the method, less one."""
        tableau = OF_ORDER[max(1, self._full_order - 1)]
        count = max(0, self.corrector - 3 if self.corrector else self.nodes - 2) if self.coordinate is not None else 0
        extra = count * (len(tableau.fractions) - 1)
        wanted = self.startup if self.startup is not None else steps + extra >= 19  # and the final mean: NFE 20
        return (min(count, steps) if wanted else 0), tableau

    def evaluations(self, steps: int) -> int:
        """One a step, and those inside the single steps of the start."""
        count, tableau = self._single_steps(steps)
        return steps + count * (len(tableau.fractions) - 1)

    def rows(self, sde: LinearSDE, pieces: Sequence[Tensor]) -> list[tuple[Row, ...]]:
        """The single steps of the start, then one evaluation a step."""
        t, s = torch.cat([times[:-1] for times in pieces]), torch.cat([times[1:] for times in pieces])
        frame = self.frame(sde, t, s)
        each = zip(
            frame.scale(t), frame.scale(s), reads(self.variable, sde, t), frame.segments(self.coordinate, s), frame.spread(t, s),
            strict=True,
        )  # fmt: skip
        return [self._rows(sde, times, list(part)) for times, part in zip(pieces, split(list(each), pieces), strict=True)]

    def _rows(self, sde: LinearSDE, times: Tensor, steps: list[Any]) -> tuple[Row, ...]:
        """One grid's; a step comes as (m_t, m_s, (p, r), segment, spread)."""
        n = len(times) - 1
        count, tableau = self._single_steps(n)
        made = list(single_rows(self, sde, [times[: count + 1]], tableau)[0]) if count else []
        w = list(range(n + 1)) if self.coordinate is None else self.coordinate.at(sde, times).tolist()
        before: Array | None = None  # the last step's weights, when the corrector may redo it
        for k in range(count, n):
            used = min(self.nodes, k + 1, n - k if self.lower_final else n)
            m_t, m_s, (p, r), part, spread = steps[k]
            c = self.weights(part, [w[k - j] for j in range(used)])
            q = np.zeros(max(used, 0 if before is None else 1 + len(before)))  # coefficients of q_k, q_{k-1}, ... in y_s
            q[:used] += c
            if before is not None:  # y_t + (corrected - predicted increment of the last step)
                old = range(1, min(len(before), self.corrector - 1))
                again = self.weights(steps[k - 1][3], [w[k - 1], w[k], *(w[k - 1 - j] for j in old)])
                carry = steps[k - 1][1] / m_t  # from the y of the last step
                q[0] += carry * again[1]
                q[1 : len(again)] += carry * np.delete(again, 1)
                q[1 : 1 + len(before)] -= carry * before
            q *= m_s
            noise, draws = ((m_s * spread,), ((times[k], times[k + 1]),)) if spread > 0 else ((), ())
            final = (m_s / m_t + q[0] * p, *q[1:].tolist(), *noise, q[0] * r)
            made.append(Row(float(times[k]), float(times[k + 1]), len(q) - 1, (), final, (p, r), draws=draws))
            before = c if self.corrector else None
        hold = 0
        for k in range(n - 1, -1, -1):
            made[k] = replace(made[k], hold=hold)
            hold = max(hold - 1, made[k].past)
        return tuple(made)
