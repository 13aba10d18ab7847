"""The published names: each is one setting of the core, no formula of its own.

Two that agree are equal: `DPMSolverPP(2, weights=exact) == AdamsBashforth(2, x0)`.
"""

from __future__ import annotations

from ..checks import check_count
from ..grid import Grid, karras, logsnr, quadratic, rectified, uniform
from ..variables import Clock, Variable, check_variable, eps, lam, t, time, velocity, x0
from .base import Solver
from .exponential import Multistep, SingleStep
from .stochastic import NoisyDDIM
from .tableau import CLASSIC, OF_ORDER, TRAPEZOID
from .weights import Weights, bh2

__all__ = [
    "DDIM", "DEIS", "IPNDM", "RK4", "AdamsBashforth", "AdamsMoulton", "DPMSolver", "DPMSolverPP", "Euler", "Heun", "UniPC",
]  # fmt: skip


def check_order(order: int, low: int, high: int, name: str = "order") -> int:
    """Return an integer in [low, high]; raise otherwise."""
    if check_count(order, name, low) > high:
        raise ValueError(f"{name} is {order}; wanted an integer from {low} to {high}")
    return order


def suffix(**settings: object) -> str:
    """The settings that are not the default, as the caller wrote them."""
    return "".join(f", {k}={getattr(v, '__name__', v)}" for k, v in settings.items() if v is not None)


def _one_step_grid(variable: Variable) -> Grid:
    return uniform if variable == time else karras


def _in(variable: Variable) -> str:
    return "" if variable == eps else f"variable={variable}"


def Euler(variable: Variable = eps) -> Multistep:
    """Euler: y_s = y_t + (u_s - u_t) q_t; in eps, x0 and velocity alike DDIM; `Euler(time)` steps dx/dt. Order 1.

    Karras et al. 2022 (NeurIPS), algorithm 1 without its second half; Song et al. 2021 (ICLR), eq. 13 discretised, in time.
    """
    return Multistep(
        check_variable(variable), variable.coordinate, 1, name=f"Euler({_in(variable)})", recommended=_one_step_grid(variable)
    )


def DDIM(eta: float = 0.0) -> Solver:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) eps + w z, w^2 = eta^2 (sigma_s^2 / sigma_t^2) Var[x_t | x_s].

    eta = 0: the flow, order 1 (Euler in rho); eta = 1: `Ancestral()`, the reverse SDE. Song et al. 2021 (DDIM, ICLR), eq. 12, 16.
    """
    noisy = NoisyDDIM(eta)
    return noisy if eta > 0 else Multistep(eps, eps.coordinate, 1, name="DDIM()")


def Heun(variable: Variable = eps) -> SingleStep:
    """Heun: y_s = y_t + (u_s - u_t) (q_t + q_s) / 2, q_s from an Euler step. Order 2, two evaluations a step.

    In eps, with the mean at the last time, this is Karras et al. 2022 (NeurIPS), algorithm 1.
    """
    return SingleStep(
        check_variable(variable), variable.clock, TRAPEZOID, name=f"Heun({_in(variable)})", recommended=_one_step_grid(variable)
    )


def RK4(variable: Variable = eps) -> SingleStep:
    """The classical Runge-Kutta method of dy/du = q. Order 4, four evaluations a step. Kutta 1901."""
    return SingleStep(
        check_variable(variable), variable.clock, CLASSIC, name=f"RK4({_in(variable)})", recommended=_one_step_grid(variable)
    )


def DPMSolver(order: int = 3) -> SingleStep | Multistep:
    """DPM-Solver, single-step: eps interpolated in lam at 0, 1/2 (order 2) or 0, 1/3, 2/3 (order 3) of the step, `order` evaluations.

    x_s = (alpha_s / alpha_t) x - alpha_s int_lam e^-u eps(u) du. Lu et al. 2022 (NeurIPS), algorithms 1, 2. Order 2 is dpm_2 of Karras.
    """
    return _single(eps, order, f"DPMSolver(order={order})")


def _single(variable: Variable, order: int, name: str) -> SingleStep | Multistep:
    if check_order(order, 1, 3) == 1:
        return Multistep(variable, lam, 1, name=name)
    return SingleStep(variable, lam, OF_ORDER[order], name=name)


def DPMSolverPP(
    order: int = 2, singlestep: bool = False, weights: Weights = bh2, startup: bool | None = None, lower_final: bool = False
) -> SingleStep | Multistep:
    """DPM-Solver++: x_s = (sigma_s / sigma_t) x + sigma_s int e^u D(u) du, D the polynomial in lam through x0 at the last `order` nodes.

    weights: `bh2` is the published 2M, whose slope is taken at the middle of the step; `exact` integrates it. Three nodes are exact
    either way (two public versions halve the second difference). singlestep: x0 at 0, 1/2 or 0, 1/3, 2/3 of the step instead, `order`
    evaluations. startup, lower_final: see `Multistep`. Lu et al. 2022 (DPM-Solver++), algorithms 1, 2, eq. 8, 17.
    """
    if not isinstance(singlestep, bool):
        raise TypeError(f"singlestep is {singlestep!r}; wanted True or False")
    if singlestep and (weights is not bh2 or startup is not None or lower_final):
        raise ValueError("weights, startup and lower_final are of the multistep form; drop them, or singlestep=True")
    if singlestep:
        return _single(x0, order, f"DPMSolverPP(order={order}, singlestep=True)")
    tail = suffix(weights=None if weights is bh2 else weights, startup=startup, lower_final=lower_final or None)
    name = f"DPMSolverPP(order={check_order(order, 1, 3)}{tail})"
    return Multistep(x0, lam, order, weights, startup=startup, lower_final=lower_final, name=name)


def UniPC(
    order: int = 3, weights: Weights = bh2, variable: Variable = x0, startup: bool | None = None, lower_final: bool = False
) -> Multistep:
    """UniPC: predict through the last `order` nodes in lam, correct through one more, the evaluation kept. Order `order` + 1.

    weights: `bh1`, `bh2` or `exact`; they differ where two nodes are used. variable: x0, or eps. startup, lower_final: see `Multistep`.
    Zhao et al. 2023 (NeurIPS), algorithms 1, 2, 5, 6.
    """
    if check_variable(variable) not in (x0, eps):
        raise ValueError(f"variable is {variable}; wanted x0 or eps, which UniPC is written in: AdamsMoulton takes any")
    tail = suffix(weights=None if weights is bh2 else weights, startup=startup, lower_final=lower_final or None)
    tail += "" if variable == x0 else f", {_in(variable) or 'variable=eps'}"
    return Multistep(
        variable, lam, check_order(order, 1, 4), weights, corrector=order + 1, startup=startup, lower_final=lower_final,
        name=f"UniPC(order={order}{tail})",
    )  # fmt: skip


def DEIS(order: int = 3, coordinate: Clock = t, startup: bool | None = None, lower_final: bool = False) -> Multistep:
    """DEIS: x_s = (alpha_s / alpha_t) x + alpha_s int eps d(rho), eps a polynomial of degree `order` (0 to 3). Order `order` + 1.

    coordinate: of the polynomial: `t` is tAB-DEIS, `rho` rhoAB, `lam` that in log rho. Zhang & Chen 2023 (ICLR), eq. 14-15, 17.
    """
    check_order(order, 0, 3)
    if not isinstance(coordinate, Clock):
        raise TypeError(f"coordinate is {coordinate!r}; wanted a Clock of scoresde.variables: t, rho, lam")
    name = f"DEIS(order={order}, coordinate={coordinate}{suffix(startup=startup, lower_final=lower_final or None)})"
    return Multistep(
        eps, coordinate, order + 1, startup=startup, lower_final=lower_final, name=name,
        recommended=quadratic if coordinate == t else logsnr,
    )  # fmt: skip


def IPNDM(order: int = 4) -> Multistep:
    """iPNDM: y_s = y_t + (rho_s - rho_t) sum_j b_j eps_j with the Adams-Bashforth b of a uniform grid: (3, -1) / 2, (23, -16, 5) / 12, ...

    On a grid that is not uniform in rho its order is 2 whatever the past. Liu et al. 2022 (PNDM); Zhang & Chen 2023 (ICLR), eq. 19.
    """
    return Multistep(eps, None, check_order(order, 1, 4), name=f"IPNDM(order={order})", recommended=karras)


def AdamsBashforth(
    order: int = 3, variable: Variable = velocity, coordinate: Clock | None = None, startup: bool | None = None,
    lower_final: bool = False,
) -> Multistep:  # fmt: skip
    """Variable-step Adams-Bashforth: y_s = y_t + int q du, q the polynomial through its last `order` values. Order `order` (1 to 5).

    variable: eps, x0, velocity, v or time of `scoresde.variables`; coordinate: the clock of the polynomial, the variable's by default.
    startup, lower_final: see `Multistep`. Hairer, Norsett & Wanner 1993, III.5.
    """
    tail = suffix(coordinate=coordinate, startup=startup, lower_final=lower_final or None)
    name = f"AdamsBashforth(order={order}, variable={variable}{tail})"
    return _adams(name, check_order(order, 1, 5), 0, variable, coordinate, startup, lower_final)


def AdamsMoulton(
    order: int = 3, variable: Variable = velocity, coordinate: Clock | None = None, predictor: int | None = None,
    startup: bool | None = None, lower_final: bool = False,
) -> Multistep:  # fmt: skip
    """Variable-step Adams-Moulton, PEC: Adams-Bashforth through `predictor` nodes predicts, `order` nodes correct. Order 2 to 5.

    One evaluation a step, kept after the correction, as in UniPC: `UniPC(p, exact) == AdamsMoulton(p + 1, x0)`. predictor: `order` - 1
    (default) or `order`, which with x0 is SA-Solver without noise (Xue et al. 2023, NeurIPS). Hairer, Norsett & Wanner 1993, III.5.
    """
    check_order(order, 2, 5)
    if predictor not in (None, order - 1, order) or isinstance(predictor, bool):
        raise ValueError(f"predictor is {predictor!r}; wanted {order - 1}, {order} or None: other nodes lose or waste an order")
    tail = suffix(coordinate=coordinate, predictor=predictor, startup=startup, lower_final=lower_final or None)
    name = f"AdamsMoulton(order={order}, variable={variable}{tail})"
    return _adams(name, predictor or order - 1, order, variable, coordinate, startup, lower_final)


def _adams(
    name: str, nodes: int, corrector: int, variable: Variable, coordinate: Clock | None, startup: bool | None, lower_final: bool
) -> Multistep:
    return Multistep(
        check_variable(variable), variable.coordinate if coordinate is None else coordinate, nodes, corrector=corrector, startup=startup,
        lower_final=lower_final, name=name, recommended=rectified if variable == velocity else logsnr,
    )  # fmt: skip
