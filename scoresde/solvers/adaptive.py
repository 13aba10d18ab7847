"""Adaptive solvers: any single-step solver with an embedded lower order, in steps of its own; and one of the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ..linear import LinearSDE
from ..oracle import Oracle
from ..variables import Clock, Variable, check_variable, eps, lam, velocity
from ..variables import t as time_clock
from .base import Solver, StochasticSolver
from .control import PI, PID, Controlled, column
from .exponential import SingleStep
from .families import AdamsMoulton, Heun, check_order
from .stochastic import ImprovedEuler, improved_euler
from .tableau import DOPRI5, DOPRI8, OF_ORDER, Tableau
from .weights import exact, segment

__all__ = ["Adaptive", "AdaptiveSDE", "DPMAdaptive", "Dopri5", "Dopri8"]


@dataclass(frozen=True, repr=False)
class Adaptive(Controlled):
    """A single-step solver in steps of its own: `Adaptive(Heun(), rtol=1e-3)`. Any whose tableau has a `lower` row.

    The error of a step is the distance of its two ends, of the tableau's order and of one less, and the better is kept. The rest as in
    `Controlled`. Hairer, Norsett & Wanner 1993, II.4.
    """

    solver: SingleStep = field(default_factory=Heun)
    name: str = field(default="", compare=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.solver, SingleStep) or not self.solver.tableau.lower:
            raise TypeError(
                f"solver is {self.solver!r}; wanted a single-step solver with an embedded lower order: Heun(), DPMSolver(2 or 3), or a "
                "SingleStep of your own tableau with lower="
            )

    def __repr__(self) -> str:
        head, inside = (self.name or f"Adaptive({self.solver!r})")[:-1].split("(", 1)
        shown = [f"{k}={getattr(self, k)!r}" for k in ("rtol", "atol")]
        shown += [f"{f.name}={getattr(self, f.name)!r}" for f in fields(Controlled)[2:] if getattr(self, f.name) != f.default]
        return f"{head}({', '.join([inside] * bool(inside) + shown)})"

    @property
    def fixed(self) -> tuple[Solver, ...]:
        """AdamsMoulton(5), to which on a given grid a past costs nothing, and the single steps themselves."""
        return AdamsMoulton(5), AdamsMoulton(5, startup=False), self.solver

    @property
    def order(self) -> int:
        """Order of the solution that is kept; the error is set by the tolerances."""
        return self.solver.order

    @property
    def invariant(self) -> bool:
        """Whether the steps know the schedule through rho alone."""
        return self.solver.invariant

    @property
    def error_order(self) -> int:
        """That of the lower solution's local error."""
        return self.solver.order

    @property
    def cost(self) -> int:
        """A tableau's worth a try: where it ends in an evaluation, the next step's first is it."""
        return len(self.solver.tableau.fractions)

    @property
    def clock(self) -> Clock:
        """The tableau's coordinate."""
        own = self.solver.variable.clock
        return self.solver.coordinate or own if self.solver.tableau.through else own

    def _q(self, oracle: Oracle, x: Tensor, t: Tensor) -> Tensor:
        p, r = self.solver.variable.read(oracle.sde, t)
        return column(p, x) * x + column(r, x) * oracle.mean(x, column(t, x, torch.float64))

    def _scale(self, sde: LinearSDE, x: Tensor, t: Tensor) -> Tensor:
        return column(self.solver.variable.scale(sde.alpha(t), sde.sigma(t)), x)

    def begin(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """q at (x, t), and a first step: that of a local error of 1 % of the tolerance were all derivatives of the size of the first,

        a tenth of the way at most.
        """
        sde, own, clock, t = oracle.sde, self.solver.variable.clock, self.clock, t.expand(len(x))
        q = self._q(oracle, x, t)
        span = (clock.at(sde, s) - clock.at(sde, t)).abs()
        lam = sde.logsnr(t) / 2
        rate = torch.ones_like(t) if clock == own else own.rate(lam) / clock.rate(lam)
        speed = (column(rate * span, x) * self._scale(sde, x, t) * q / self.tolerance(oracle, x.abs(), t)).detach()
        size = oracle.denoiser.error_norm(speed).to("cpu", torch.float64)
        return q, span * torch.exp((0.01 / size.clamp(min=1e-6)).log() / self.error_order).clamp(max=0.1).nan_to_num(0.1)

    def attempt(
        self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step of the tableau from times t to times s, and its error over the tolerance."""
        sde, variable, tableau, clock = oracle.sde, self.solver.variable, self.solver.tableau, self.clock
        w, h = clock.at(sde, t), clock.at(sde, s) - clock.at(sde, t)
        low, high = torch.minimum(t, s), torch.maximum(t, s)
        fractions = (*tableau.fractions, 1.0)
        within = [f for f in fractions if 0 < f < 1]  # their times in one call: of a tabulated SDE it is a search
        times = dict(zip(within, clock.time(sde, torch.cat([w + f * h for f in within] or [w])).split(len(t)), strict=False))
        inner = [t if f == 0 else s if f == 1 else times[f].clamp(low, high) for f in fractions]
        nodes = [clock.at(sde, at).numpy() for at in inner] if tableau.through else []
        du = variable.clock.at(sde, s) - variable.clock.at(sde, t)

        parts = [segment(variable, clock, sde, t, at) for at in inner[1:]] if tableau.through else []

        def weights(row: tuple[float, ...], i: int) -> list[tuple[int, Tensor]]:
            """Of the evaluations, in the increment of y up to inner[i]."""
            if tableau.shares:
                return [(j, share * du) for j, share in enumerate(row) if share]
            c = exact(parts[i - 1], [nodes[int(j)] for j in row])
            return [(int(j), torch.from_numpy(cj)) for j, cj in zip(row, c, strict=True)]

        def add(parts: list[tuple[int, Tensor]]) -> Tensor:
            out = torch.zeros_like(x)
            for j, c in parts:
                out = torch.addcmul(out, column(c, x), q[j])
            return out

        m, end = self._scale(sde, x, t), x
        y = x / m
        q = [self._q(oracle, x, t) if first is None else first]
        high_row: list[tuple[int, Tensor]] = []
        for i, at in enumerate(inner[1:], 1):
            high_row = weights((tableau.through or tableau.shares)[i - 1], i)
            m = self._scale(sde, x, at)
            end = m * (y + add(high_row))
            if i < len(tableau.fractions):
                q.append(self._q(oracle, end, at))
        last = self._q(oracle, end, s) if len(tableau.lower) > len(tableau.fractions) else None
        q += [] if last is None else [last]
        gap = dict(high_row)
        for j, c in weights(tableau.lower, len(tableau.fractions)):
            gap[j] = gap[j] - c if j in gap else -c
        size = torch.maximum(m * y.abs(), end.abs()).detach()
        return end, m * add(list(gap.items())) / self.tolerance(oracle, size, s), last


def Dopri5(
    rtol: float = 1e-5, atol: float = 1e-5, variable: Variable = velocity, *, pid: PID = PI, max_nfe: int = 10_000
) -> Adaptive:
    """Dormand-Prince 5(4) on dy/du = q, in each sample's own steps: six evaluations a try, the last of them the next step's first.

    variable: eps, x0, velocity, v, V(sigma_data) or time (dx/dt itself) of `scoresde.variables`; the rest as in `Controlled`.
    Dormand & Prince 1980 (J. Comput. Appl. Math. 6).
    """
    return _named("Dopri5", DOPRI5, rtol, atol, variable, pid, max_nfe)


def Dopri8(
    rtol: float = 1e-5, atol: float = 1e-5, variable: Variable = velocity, *, pid: PID = PI, max_nfe: int = 10_000
) -> Adaptive:
    """Dormand-Prince 8(7) on dy/du = q, in each sample's own steps, thirteen evaluations a try: for small tolerances. As `Dopri5`.

    Prince & Dormand 1981 (J. Comput. Appl. Math. 7), RK8(7)13M.
    """
    return _named("Dopri8", DOPRI8, rtol, atol, variable, pid, max_nfe)


def _named(name: str, tableau: Tableau, rtol: float, atol: float, variable: Variable, pid: PID, max_nfe: int) -> Adaptive:
    inside = "" if variable == velocity else f"variable={variable}"
    fixed = SingleStep(check_variable(variable), variable.clock, tableau, name=f"{name}({inside}).solver")
    return Adaptive(fixed, rtol=rtol, atol=atol, pid=pid, max_nfe=max_nfe, name=f"{name}({inside})")


def DPMAdaptive(order: int = 3, rtol: float = 0.05, atol: float = 0.0078, *, pid: PID = PI, max_nfe: int = 10_000) -> Adaptive:
    """DPM-Solver-12 (order 2) or -23 (order 3) in lam, in each sample's own steps, `order` evaluations a try.

    The two ends are those of DPM-Solver of this order and of the one below on the same evaluations; that of order 2 inside order 3
    integrates the line through them, where the published one takes its slope at half weight: the estimates differ by a factor of 1 to 2.
    The tolerances, the authors', are for images in [-1, 1]. The rest as in `Controlled`. Lu et al. 2022 (NeurIPS), appendix C.
    """
    solver = SingleStep(eps, lam, OF_ORDER[check_order(order, 2, 3)], name=f"DPMSolver(order={order})")
    return Adaptive(solver, rtol=rtol, atol=atol, pid=pid, max_nfe=max_nfe, name=f"DPMAdaptive(order={order})")


@dataclass(frozen=True)
class AdaptiveSDE(Controlled, StochasticSolver):
    """The reverse SDE in each sample's own steps: `ImprovedEuler`, its distance to the Euler-Maruyama step inside it the error.

    error / max(atol (alpha + sigma), rtol max(|x1|, |x|)) in root mean square; a step that fails is made again, shorter, on the SAME
    Brownian path: new noise would make the noise small where steps are accepted, and the law too wide. Steps end on dyadic parts of
    [t_min, t_max], where the path costs least, and grow by half at most. Jolicoeur-Martineau et al. 2021 (Gotta Go Fast), algorithm 1 but
    for the noise, that growth, alpha + sigma, and |x| for the Euler step before; the path: Gaines & Lyons 1997 (SIAM J. Appl. Math. 57).
    """

    rtol: float = field(default=0.02, kw_only=True)
    atol: float = field(default=0.0078, kw_only=True)
    pid: PID = field(default=(0.0, 0.9, 0.0), kw_only=True)
    safety = 0.9
    growth = 1.5  # in few dimensions an error may be small by luck: the next step is not ten times longer for it
    invariant = False
    brownian = True
    clock = time_clock
    cost = 2
    error_order = 1
    weak_order = 2.0
    strong_order = 1.0

    @property
    def fixed(self) -> tuple[Solver, ...]:
        """The same method on a grid."""
        return (ImprovedEuler(),)

    def land(self, sde: LinearSDE, t: Tensor, s: Tensor) -> Tensor:
        """The next multiple of 2^-d of the way from t_min to t_max, with 2^-d at most a quarter of the step: never a longer one."""
        span = sde.t_max - sde.t_min
        grain = torch.exp2(torch.floor(torch.log2((t - s).abs() / (4 * span)).clamp(min=-40)))
        return sde.t_min + span * grain * torch.ceil((s - sde.t_min) / (span * grain) - 1e-6)

    def attempt(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, None]:
        """One step from times t to times s, and its error over the tolerance."""
        x1, end = improved_euler(oracle, x, column(t, x, torch.float64), column(s, x, torch.float64))
        a, b = oracle.sde.alpha(s), oracle.sde.sigma(s)
        allowed = torch.maximum(self.rtol * torch.maximum(x1.abs(), x.abs()), self.atol * column(a + b, x))
        return end, (end - x1) / allowed, None
