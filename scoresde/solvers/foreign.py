"""Other libraries' solvers as solvers here: torchdiffeq and scipy on the probability flow, torchsde on the reverse SDE.

Each step hands one interval t -> s over. The state is theirs in float64 (torchdiffeq casts times to its dtype, scipy knows no other),
the denoiser sees x's own dtype, and no time outside the interval.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import scipy.integrate
import torch
from torch import Tensor
from torchdiffeq import odeint, odeint_adjoint
from torchsde import BaseBrownian, sdeint

from ..checks import Status, UnfinishedError, check_count, check_number, shape_of
from ..denoiser import flow, reverse_drift
from ..grid import interval, logsnr
from ..linear import LinearSDE, cast
from ..oracle import Oracle
from ..variables import Variable, check_variable, time
from .base import Solver, StochasticSolver
from .stochastic import check_stable

__all__ = ["ScipyIVP", "TorchDiffEq", "TorchSDE"]

_ADAPTIVE = {"dopri8": 8, "dopri5": 5, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}  # orders
_FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # orders, and evaluations a step
_SCIPY = {"RK45": 5, "RK23": 3, "DOP853": 8, "Radau": 5, "BDF": 5, "LSODA": 12}  # orders; of the last two the highest they rise to
_SDE = {  # (sde_type, noise_type, evaluations a step, weak order, strong order)
    "euler": ("ito", "diagonal", 1, 1.0, 1.0),
    "milstein": ("ito", "additive", 1, 1.0, 1.0),
    "srk": ("ito", "additive", 2, 2.0, 1.5),
    "heun": ("stratonovich", "diagonal", 2, 2.0, 1.0),
    "midpoint": ("stratonovich", "diagonal", 2, 2.0, 1.0),
    "reversible_heun": ("stratonovich", "diagonal", 1, 2.0, 1.0),
}


def _check_method(method: Any, known: dict[str, Any]) -> None:
    if method not in known:
        raise ValueError(f"method is {method!r}; wanted one of {sorted(known)}")


class _Stopped(Exception):
    """The solve cannot go on: (the status of its samples, why)."""


class _Field:
    """dy/du = q of a variable, as a library calls it: (u, y `[B, *shape]` float64). Counted, bounded, finite, at times in [t, s]."""

    library = "scipy"

    def __init__(self, oracle: Oracle, variable: Variable, x: Tensor, t: Tensor, s: Tensor, used: int, bound: float) -> None:
        self.oracle, self.variable, self.dtype = oracle, variable, x.dtype
        self.ends, self.at = (float(t), float(s)), float(t)
        self.letters = variable.clock.at(oracle.sde, torch.stack([t, s]))  # u at the ends
        self.calls = self.settled = used  # evaluations, and those when the last step was taken or refused
        self.bound, self.again, self.over = bound, 0, False  # the bound; the calls of a backward pass, when the solve is over
        # samples that met NaN stand still from there, and end as NaN; on a grid it stays in its row, and x is not read on the host
        self.lost = self.of_rows(~x.isfinite()) if bound < math.inf else x.new_zeros((), dtype=torch.bool)

    def __call__(self, u: Tensor, y: Tensor) -> Tensor:
        oracle, (a, b) = self.oracle, self.ends
        u = u.detach().to("cpu", torch.float64).clamp(self.letters.min(), self.letters.max())  # a guess outside may have no time
        t = self.variable.clock.time(oracle.sde, u).clamp(min(a, b), max(a, b))
        if bool(t.isnan()):
            self.underflow()
        self.at = float(t)
        if (self.again if self.over else self.calls) >= self.bound:
            self.stop(
                Status.MAX_NFE,
                f"the solve from t = {a:.6g} to {b:.6g} has used max_nfe = {self.bound} evaluations and is at t = {self.at:.6g}; loosen "
                "rtol and atol, or allow more with max_nfe=",
            )
        if self.over:  # no part of the solve, nor of its ledger
            self.again += 1
            before = dict(oracle._counts)
            dy = self.rate(oracle.denoiser, t, y)
            oracle._counts.update(before)
            return dy.masked_fill(self.lost, 0.0)
        self.calls += 1
        dy = self.rate(oracle, t, y)
        if self.bound == math.inf:
            return dy
        bad = self.of_rows(~dy.isfinite()) & ~self.lost
        if bool(bad.any()):
            oracle.lose(
                bad.flatten().nonzero().flatten().cpu(),
                Status.DONE,
                f"have a derivative that is not finite at t = {self.at:.6g}, evaluation {self.calls}: the denoiser returned NaN or "
                "infinity there; check the network at that time, or use throw=False and read .status",
            )
            self.lost = self.lost | bad
        return dy.masked_fill(self.lost, 0.0)

    def rate(self, oracle: Any, t: Tensor, y: Tensor) -> Tensor:
        """q at y = x / m; `oracle`, or a denoiser alone."""
        if self.variable == time:
            return flow(oracle, y.to(self.dtype), t).double()
        x = self.scale(t) * y
        p, r = self.variable.read(oracle.sde, t)
        return p * x + r * oracle.predict(x.to(self.dtype), t).x0.double()

    def scale(self, t: Tensor) -> Tensor:  # m
        return self.variable.scale(self.oracle.sde.alpha(t), self.oracle.sde.sigma(t))

    def underflow(self) -> NoReturn:
        """Time no longer moves."""
        self.stop(
            Status.MIN_STEP,
            f"{self.library} gave up between t = {self.ends[0]:.6g} and {self.ends[1]:.6g} after {self.calls} evaluations (underflow at "
            f"t = {self.at:.6g}): its step size is too small to move time there, or is not finite; loosen rtol and atol, solve in "
            "float64, or check that the denoiser is smooth",
        )

    def stop(self, status: Status, problem: str) -> NoReturn:
        raise UnfinishedError(f"on the way back of an adjoint: {problem}") if self.over else _Stopped(status, problem)

    def run(self, x: Tensor, solve: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """x_s of the y_s that a solve returns, NaN for the samples lost, and the evaluations so far."""
        y, why = x, ()
        try:
            y = solve()
        except _Stopped as stopped:
            why = stopped.args
        self.over = True
        if why:
            self.oracle.lose((~self.lost).flatten().nonzero().flatten().cpu(), why[0], f"are unfinished: {why[1]}")
            return torch.full_like(x, math.nan), self.calls
        y = self.scale(torch.tensor(self.ends[1], dtype=torch.float64)) * y
        return y.to(x.dtype).masked_fill(self.lost, math.nan), self.calls

    @staticmethod
    def of_rows(where: Tensor) -> Tensor:  # whether any entry is marked, [B, 1, ..., 1]
        return where.flatten(1).any(1).reshape(-1, *[1] * (where.ndim - 1))


class _Watched(_Field):
    """What torchdiffeq's adaptive methods tell and ask besides."""

    library = "torchdiffeq"

    def norm(self, ratio: Tensor) -> Tensor:
        """Largest over the samples not lost: the tolerance holds for each, whoever its mates are. Of steps, so that none has a gradient."""
        size = self.oracle.denoiser.error_norm(ratio.detach().masked_fill(self.lost, 0.0).to(self.dtype))
        return size.nan_to_num(nan=math.inf, posinf=math.inf).max()  # an overflow asks for a smaller step

    def callback_step(self, u: Tensor, y: Any, du: Tensor) -> None:
        """Whether time moves and y is finite: torchdiffeq asserts it, which is nothing under `python -O`."""
        if not self.over and bool(self.lost.any()):
            y.data.masked_fill_(self.lost, 0.0)  # what overflowed would stop the others
        if not bool((u + du > u) & (du - u > -u)) or not (self.over or bool(y.isfinite().all())):  # it may be -u
            self.underflow()

    callback_step_adjoint = callback_step

    def callback_accept_step(self, *_: Tensor) -> None:
        self.settled = self.calls

    def callback_reject_step(self, *_: Tensor) -> None:
        self.oracle.record("rejected", self.calls - self.settled)
        self.settled = self.calls


@dataclass(frozen=True)
class _Handed(Solver):
    """A method of a library and its tolerances."""

    method: str
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 10_000
    known: ClassVar[dict[str, int]]  # orders
    least: ClassVar[float] = 0.0  # rtol

    def __post_init__(self) -> None:
        _check_method(self.method, self.known)
        check_number(self.rtol, "rtol", self.least, 1.0)
        check_number(self.atol, "atol", 0.0, open_low=True)
        check_count(self.max_nfe, "max_nfe")

    @property
    def order(self) -> int:
        """Order of the method's solution, the highest where it varies; the error of an adaptive one is set by the tolerances."""
        return self.known[self.method]

    def evaluations(self, steps: int) -> int:
        """The method's stages a step; of an adaptive one unknown before the solve: TypeError."""
        return super().evaluations(steps) * _FIXED[self.method]

    def field(self, kind: Any, oracle: Oracle, variable: Variable, x: Tensor, t: Tensor, s: Tensor, state: Any) -> Any:
        """The derivative to hand over; state: the evaluations so far."""
        if t.ndim:
            raise ValueError(f"t is {shape_of(t)}; {self!r} steps with one time () for the batch")
        return kind(oracle, variable, x, t, s, state or 0, self.max_nfe if self.adaptive else math.inf)


@dataclass(frozen=True)
class TorchDiffEq(_Handed):
    """A method of torchdiffeq on dy/du = q, y = x / m (`variable`; time: dx/dt): adaptive dopri5, dopri8, bosh3, fehlberg2, adaptive_heun;

    or euler, midpoint, heun2, heun3, rk4 (the 3/8 rule) in fixed steps, one an interval of the grid.
    rtol, atol bound the local error of y of each sample (root mean square over its entries; a likelihood's l-channels apart). An adaptive
    step is one for the whole batch (the worst sample's), so a sample's last digits depend on its batch mates; `microbatch=1` makes them
    independent. max_nfe bounds the evaluations of a solve of the batch, and the smallest step is that which moves float64 time:
    UnfinishedError, or a negative status; a fixed-step method needs neither. NonFiniteError names the samples and t. The state is float64
    inside. adjoint: gradients of x and of the parameters that the denoiser's modules hold by a second solve, back in time, in constant
    memory (first derivatives, exact as the tolerances are; up to max_nfe evaluations an interval, not counted). Chen et al. 2018 (NeurIPS).
    """

    method: str = "dopri5"
    variable: Variable = time
    adjoint: bool = False
    known = {**_ADAPTIVE, **_FIXED}
    adaptive: ClassVar[Any] = property(lambda self: self.method in _ADAPTIVE)
    independent: ClassVar[Any] = property(lambda self: not self.adaptive)
    replays: ClassVar[Any] = property(lambda self: self.adjoint)
    invariant: ClassVar[Any] = property(lambda self: self.variable != time)
    grid: ClassVar[Any] = property(lambda self: interval if self.adaptive else logsnr)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_variable(self.variable)
        if not isinstance(self.adjoint, bool):
            raise TypeError(f"adjoint is {self.adjoint!r}; wanted True or False")

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t and the evaluations so far: any number, or one step's."""
        field = self.field(_Watched if self.adaptive else _Field, oracle, self.variable, x, t, s, state)
        if not len(x) or (self.adaptive and bool(field.lost.all())):
            return x, state
        u = field.letters.to(x.device)
        y = x.double().masked_fill(field.lost, 0.0) / field.scale(t)
        solve: Any = odeint_adjoint if self.adjoint else odeint
        kwargs: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        if self.adaptive:
            kwargs["options"] = {"step_t": u[1:], "norm": field.norm}  # step_t: it would step past s and interpolate back
        if self.adjoint:
            kwargs["adjoint_params"] = tuple(p for p in oracle.denoiser.parameters() if p.requires_grad)
            # on the way back the end is t, in the time in which it went forward: -u where u falls
            kwargs["adjoint_options"] = {"step_t": u[:1] * (u[1] - u[0]).sign()} if self.adaptive else {}
        # the clock may not tell neighbouring times apart
        x, used = field.run(x, lambda: y if u[0] == u[1] else solve(field, y, u, **kwargs)[-1])
        if x.requires_grad:
            x.register_hook(lambda _: setattr(field, "again", 0))  # a way back begins
        return x, used


@dataclass(frozen=True)
class ScipyIVP(_Handed):
    """scipy.integrate's RK45, RK23, DOP853, Radau, BDF or LSODA on dx/dt, the batch as one float64 vector: score_sde's black box.

    rtol, atol bound the local error's root mean square over the whole batch, as scipy's norm has it, so that a hard sample hides among
    easy ones: `TorchDiffEq` holds a tolerance for each. Every call is counted; Radau, BDF and LSODA find the Jacobian of all B x D numbers
    by finite differences, one evaluation a number, which is for small problems. max_nfe bounds a solve: UnfinishedError, or a negative
    status, as where the step underflows. NaN never reaches scipy, whose RK45 would not return. No gradient: TypeError.
    Virtanen et al. 2020 (Nat. Methods 17); the use, Song et al. 2021 (ICLR), app. D.2.
    """

    method: str = "RK45"
    known = _SCIPY
    least = 100 * torch.finfo(torch.float64).eps  # scipy raises a smaller rtol to this
    grid = staticmethod(interval)
    adaptive = True
    independent = False
    invariant = False

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t and the evaluations so far, any number."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise TypeError(f"x requires a gradient and {self!r} has none; use TorchDiffEq(), or solve under torch.no_grad()")
        field = self.field(_Field, oracle, time, x, t, s, state)
        if bool(field.lost.all()):
            return x, state

        def fun(u: float, y: np.ndarray) -> np.ndarray:
            at = torch.tensor(float(u), dtype=torch.float64)
            with torch.no_grad():  # a copy of y, which is scipy's to write into
                return field(at, torch.tensor(y).reshape(x.shape).to(x.device)).flatten().cpu().numpy()

        def solve() -> Tensor:
            y = x.detach().double().masked_fill(field.lost, 0.0).flatten().cpu().numpy()
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.filterwarnings("ignore", module=r"scipy\.")  # it says in words what becomes an error here
                solver = getattr(scipy.integrate, self.method)(fun, field.ends[0], y, field.ends[1], rtol=self.rtol, atol=self.atol)
                while solver.status == "running":
                    solver.step()
            if solver.status == "failed":
                field.underflow()
            return torch.tensor(solver.y).reshape(x.shape).to(x.device)

        return field.run(x, solve)


class _Path(BaseBrownian):
    """The oracle's noise in torchsde's time -t: W_s - W_t and U = int (W_u - W_t) |du|, of the interval asked for, once."""

    shape: Any = None
    dtype: Any = None
    device: Any = None
    levy_area_approximation: Any = "space-time"

    def __init__(self, oracle: Oracle, x: Tensor) -> None:
        self.oracle, self.x = oracle, x
        self.shape, self.dtype, self.device = (len(x), x.shape[1:].numel()), x.dtype, x.device

    def __call__(self, ta: Tensor, tb: Tensor | None = None, return_U: bool = False, return_A: bool = False) -> Any:
        if tb is None or return_A:
            raise TypeError("the path gives W and U over an interval; it has no Levy area A, which additive noise does not need")
        w, u = (part.flatten(1) for part in self.oracle.noise.pair(self.x, -ta, -tb))
        return (w, u) if return_U else w

    __repr__ = object.__repr__


class _Reverse:
    """The reverse SDE as torchsde wants it, on y `[B, D]` in time -t. What was evaluated is remembered: torchsde asks again."""

    def __init__(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, kind: tuple[Any, ...]) -> None:
        self.oracle, self.shape, self.ends = oracle, x.shape, (float(s), float(t))
        self.sde_type, self.noise_type = kind[:2]
        self.known: list[tuple[Tensor, Tensor, Tensor]] = []
        self.dice = ExitStack()  # closed by the first spread
        if self.noise_type == "diagonal":
            self.g = lambda time, y: self.spread(time, torch.ones_like(y))
        else:  # an additive g would be [B, D, D]: its product with a vector does
            self.g_prod = lambda time, y, v: self.spread(time, v)

    def f(self, time: Tensor, y: Tensor) -> Tensor:  # the drift
        for at, state, drift in self.known:
            if state is y and at == time:
                return drift
        drift = -reverse_drift(self.oracle, y.reshape(self.shape), (-time).clamp(*self.ends)).flatten(1)
        self.known.append((time, y, drift))
        return drift

    def spread(self, time: Tensor, v: Tensor) -> Tensor:
        """The diffusion times v."""
        self.dice.close()
        return cast(self.oracle.sde.diffusion((-time).clamp(*self.ends)), v) * v


@dataclass(frozen=True)
class TorchSDE(StochasticSolver):
    """A method of torchsde on the reverse SDE dx = (f x - g^2 score) dt + g dw: euler, milstein, srk, heun, midpoint or reversible_heun.

    One step of it an interval of the grid, on the Brownian path of the seed. g depends on t alone, so that Ito and Stratonovich are one:
    (weak, strong) orders are (1, 1) of euler and milstein, which is euler then, (2, 1.5) of srk, Rossler's SRA1, and (2, 1) of heun,
    midpoint and reversible_heun; evaluations a step 1, 1, 2, 2, 2 and 1 (one more to start). reversible_heun's second copy of the state
    is a mode that grows as the equation contracts: at 400 steps fair under VP, useless under VE and EDM. It retraces a *forward* path;
    the generative SDE is another equation with noise of its own, which this solver integrates: it does not turn a path back. No
    adaptive=True, whose one error is the whole batch's: `AdaptiveSDE` chooses steps a sample. Li et al. 2020 (AISTATS); Kidger et al.
    2021 (NeurIPS) for reversible_heun; Rossler 2010 (SIAM J. Numer. Anal. 48) for srk.
    """

    method: str = "euler"
    grid = staticmethod(logsnr)
    invariant = False
    weak_order: ClassVar[Any] = property(lambda self: _SDE[self.method][3])
    strong_order: ClassVar[Any] = property(lambda self: _SDE[self.method][4])
    past: ClassVar[Any] = property(lambda self: int(self.method == "reversible_heun"))  # its first evaluation of a step

    def __post_init__(self) -> None:
        _check_method(self.method, _SDE)

    def evaluations(self, steps: int) -> int:
        """The method's stages a step; reversible_heun's first needs one more."""
        return _SDE[self.method][2] * steps + self.past

    def start(self, sde: LinearSDE, times: Tensor) -> None:
        """Nothing; ValueError where a step is too long for the drift: |f| h > 2."""
        check_stable(self, sde, times)

    def step(self, oracle: Oracle, x: Tensor, t: Tensor, s: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x_s from x_t and what reversible_heun keeps: (x_s, its f, g and second copy of the state)."""
        y, span, extra = x.flatten(1), torch.stack([-t, -s]), None
        reverse = _Reverse(oracle, x, t, s, _SDE[self.method])
        if self.past and state is not None:
            last, (drift, spread, z) = state
            extra = (drift, spread, z if last is x else z + (y - last.flatten(1)))  # someone moved x: both copies go
            reverse.known.append((span[0], y, drift))  # only torchsde's check of shapes asks for it
        bm, dt = _Path(oracle, x), 2 * (t - s)  # anything above t - s is one step to s itself
        with reverse.dice as dice:
            if reverse.noise_type == "additive":  # to check shapes torchsde draws a v from the global generator
                reverse.f(span[0], y)
                dice.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
            ys, extra = sdeint(reverse, y, span, bm=bm, method=self.method, dt=dt, extra=True, extra_solver_state=extra)
        reverse.known.clear()  # torchsde's objects are circles: the tensors need not wait for the collector
        x = ys[-1].reshape(x.shape)
        return x, ((x, extra) if self.past else None)
