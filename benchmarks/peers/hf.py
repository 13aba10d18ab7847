"""diffusers (Apache-2.0): every scheduler that has a deterministic sampler, on every grid it offers, asked at continuous times.

set_timesteps makes the state; then the scheduler's own `sigmas` (or alphas_cumprod, or betas) are replaced by float64 nodes from t_max
to t_min, so that nothing is rounded to the integers of a beta schedule. The state is the one the scheduler is written for: VP
(z / sqrt(1 + rho^2)), VE (z) or flow (z / (1 + rho)). Its grids: Karras and exponential by its own conversion functions (its "lu" of
log sigma is the exponential one), beta likewise, linspace (uniform in the SDE's t), flow sigmas with shift 1 and 3; and uniform in
sqrt(t), which UniPC's authors use. `zero`: final_sigmas_type="zero", whose last step is the mean D at t_min; `min`: "sigma_min", which
stops there, and D is asked; `full`: lower_order_final=False. DPMSolverMultistep, FlowMatchHeun and EDMEuler cast their state to float32
each step; the others stay in float64. "trailing" is diffusers' own end: uniform in t down to t_max / n, and to zero from there.
Left out as the same numbers: Euler, EDMEuler, FlowMatchEuler and order 1 of the others (all DDIM); LMS (k-diffusion's lms 4);
EDMDPMSolverMultistep (DPMSolverMultistep's formulas on Karras and exponential sigmas); use_flow_sigmas' own state (a rescaling).
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor

from . import Ask, D, Run, Setting, quadratic, shifted, uniform

logging.set_verbosity_error()

Grid = Callable[[Ask, int], Tensor]


def converted(name: str, ask: Ask, n: int) -> Tensor:
    """The noise levels of a conversion function of diffusers."""
    scheduler = diffusers.UniPCMultistepScheduler()
    ends = torch.tensor([ask.top, ask.bottom], dtype=D)
    return torch.as_tensor(getattr(scheduler, f"_convert_to_{name}")(in_sigmas=ends, num_inference_steps=n), dtype=D)


def trailing(ask: Ask, n: int) -> Tensor:
    """Uniform in t, ending at t_max / n."""
    return ask.sde.rho(ask.sde.t_max * torch.arange(n, 0, -1, dtype=D) / n)


def arcs(ask: Ask, n: int) -> Tensor:
    """IPNDMScheduler's own: rho / sqrt(1 + rho^2) = sin^2, uniform in its angle."""
    ends = [torch.tensor(r / (1 + r * r) ** 0.5, dtype=D).sqrt().asin() for r in (ask.top, ask.bottom)]
    s = torch.linspace(float(ends[0]), float(ends[1]), n, dtype=D).sin() ** 2
    rho = s / (1 - s * s).sqrt()
    rho[0], rho[-1] = ask.top, ask.bottom
    return rho


GRIDS: dict[str, Grid] = {
    "karras": partial(converted, "karras"),
    "exponential": partial(converted, "exponential"),
    "beta": partial(converted, "beta"),
    "linspace": uniform,
    "quadratic": quadratic,
    "flow": shifted,
    "flow shift=3": partial(shifted, shift=3.0),
}


def ready(make: Callable[[], Any], n: int) -> Any:
    """A scheduler after set_timesteps(n)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that dpmsolver (eps) is deprecated
        scheduler = make()
    scheduler.set_timesteps(n)
    return scheduler


def drive(scheduler: Any, sigmas: Tensor, count: int) -> None:
    """Give it its noise levels, and distinct times to tell the steps by."""
    scheduler.sigmas = sigmas
    scheduler.timesteps = torch.arange(count, 0, -1, dtype=D)
    scheduler.set_begin_index(0)


def vp(make: Callable[[], Any], zero: bool, grid: Grid, ask: Ask, x: Tensor) -> Tensor:
    """A scheduler of VP states that is told x_0."""
    rho = grid(ask, ask.nfe)
    steps = ask.nfe if zero else ask.nfe - 1
    scheduler = ready(make, steps)
    drive(scheduler, torch.cat([rho, rho.new_zeros(1)]) if zero else rho, steps)
    scale = (1 + rho**2).sqrt()
    x = ask.start(x) / scale[0]
    for i in range(steps):
        x = scheduler.step(ask(x * scale[i], rho[i]), scheduler.timesteps[i], x, return_dict=False)[0]
    return x if zero else ask.finish(x * scale[-1])


def ddim(grid: Grid, ask: Ask, x: Tensor) -> Tensor:
    """DDIM: its cumulative alphas are 1 / (1 + rho^2)."""
    n, rho = ask.nfe, grid(ask, ask.nfe)
    scheduler = ready(lambda: diffusers.DDIMScheduler(n, clip_sample=False, prediction_type="sample"), n)
    scheduler.alphas_cumprod = (1 / (1 + rho**2)).flip(0)
    scale = (1 + rho**2).sqrt()
    x = ask.start(x) / scale[0]
    for i in range(n):
        x = scheduler.step(ask(x * scale[i], rho[i]), n - 1 - i, x, return_dict=False)[0]
    return x


def ipndm(grid: Grid, ask: Ask, x: Tensor) -> Tensor:
    """IPNDM: its betas and alphas are the two scales of a VP state, and it is told v."""
    rho = grid(ask, ask.nfe)
    scheduler = ready(lambda: diffusers.IPNDMScheduler(), ask.nfe - 1)
    scale = (1 + rho**2).sqrt()
    scheduler.betas, scheduler.alphas = rho / scale, 1 / scale
    scheduler.set_begin_index(0)
    x = ask.start(x) / scale[0]
    for i in range(ask.nfe - 1):
        x0 = ask(x * scale[i], rho[i])
        v = (x - x0 * scheduler.alphas[i]) / scheduler.betas[i] * scheduler.alphas[i] - scheduler.betas[i] * x0
        x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
    return ask.finish(x * scale[-1])


def pndm(skip: bool, grid: Grid, ask: Ask, x: Tensor) -> Tensor:
    """PNDM with its Runge-Kutta start or without: node j of its chain is 2 j, the odd ones lie halfway along the grid."""
    n = ask.nfe - 1 if skip else ask.nfe - 9  # the start asks 12 times for 3 steps; without it, twice at the second node
    if n < (3 if skip else 4):
        raise ValueError(f"{ask.nfe} evaluations are too few")
    rho = grid(ask, 2 * n - 1).flip(0)
    make = lambda: diffusers.PNDMScheduler(2 * n, skip_prk_steps=skip, timestep_spacing="leading")
    scheduler = ready(make, n)
    scheduler.alphas_cumprod = torch.cat([1 / (1 + rho**2), rho.new_ones(1)])
    scale = (1 + rho**2).sqrt()
    x = ask.start(x) / scale[-1]
    for t in scheduler.timesteps[:-1].tolist():
        eps = (x * scale[t] - ask(x * scale[t], rho[t])) / rho[t]
        x = scheduler.step(eps, t, x, return_dict=False)[0]
    return ask.finish(x * scale[0])


def ve(make: Callable[[], Any], grid: Grid, ask: Ask, x: Tensor) -> Tensor:
    """Heun and KDPM2: VE states, two stages a step; the last step is one stage, to zero."""
    n = (ask.nfe + 1) // 2
    rho = torch.cat([grid(ask, n), torch.zeros(1, dtype=D)])
    scheduler = ready(make, n)
    asked = [float(r) for r in rho[:1]]
    if hasattr(scheduler, "sigmas_interpol"):
        middle = rho.log().lerp(rho.roll(1).log(), 0.5).exp()
        scheduler.sigmas_interpol = torch.cat([middle[:1], middle[1:].repeat_interleave(2), middle[-1:]])
        drive(scheduler, torch.cat([rho[:1], rho[1:].repeat_interleave(2), rho[-1:]]), 2 * n - 1)
        asked += torch.stack([middle[1:-1], rho[1:-1]], 1).flatten().tolist()
    else:
        drive(scheduler, torch.cat([rho[:1], rho[1:-1].repeat_interleave(2), rho[-1:]]), 2 * n - 1)
        asked += rho[1:-1].repeat_interleave(2).tolist()
    z = ask.start(x)
    for t, r in zip(scheduler.timesteps, asked, strict=True):
        z = scheduler.step((z - ask(z, r)) / r, t, z, return_dict=False)[0]
    return z


def flow(grid: Grid, ask: Ask, x: Tensor) -> Tensor:
    """FlowMatchHeun: states z / (1 + rho) at sigma = rho / (1 + rho), told eps - x_0."""
    n = (ask.nfe + 1) // 2
    rho = grid(ask, n)
    s = torch.cat([rho / (1 + rho), rho.new_zeros(1)])
    scheduler = ready(lambda: diffusers.FlowMatchHeunDiscreteScheduler(), n)
    drive(scheduler, torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]]), 2 * n - 1)
    asked = torch.cat([rho[:1], rho[1:].repeat_interleave(2)])
    x = ask.start(x) / (1 + rho[0])
    for t, r in zip(scheduler.timesteps, asked, strict=True):
        x0 = ask(x * (1 + r), r)
        x = scheduler.step((x * (1 + r) - x0) / r - x0, t, x, return_dict=False)[0]
    return x


def multistep() -> dict[str, tuple[Callable[[], Any], bool]]:
    """Name -> (scheduler, whether it ends at zero) of the schedulers of VP states."""
    found: dict[str, tuple[Callable[[], Any], bool]] = {}

    def add(name: str, kind: str, zero: bool, **options: Any) -> None:
        if kind in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep"):
            options["final_sigmas_type"] = "zero" if zero else "sigma_min"
        make = partial(getattr(diffusers, f"{kind}Scheduler"), prediction_type="sample", **options)
        found[f"{name} {'zero' if zero else 'min'}{'' if options.get('lower_order_final', True) else ' full'}"] = (make, zero)

    multi, single = "DPMSolverMultistep", "DPMSolverSinglestep"
    for kind in ("midpoint", "heun"):
        for zero in (True, False):
            add(f"DPM++ 2M {kind}", multi, zero, solver_type=kind)
            add(f"DPM++ 2S {kind}", single, zero, solver_type=kind, lower_order_final=True)
            add(f"DPM++ 3S {kind}", single, zero, solver_type=kind, solver_order=3, lower_order_final=True)
        for full in (True, False):
            add(f"DPM 2M {kind}", multi, False, solver_type=kind, algorithm_type="dpmsolver", lower_order_final=not full)
        for order in (2, 3):
            options = dict(solver_type=kind, solver_order=order, algorithm_type="dpmsolver", lower_order_final=True)
            add(f"DPM {order}S {kind}", single, False, **options)
    add("DPM++ 3M", multi, True, solver_order=3)
    add("DPM++ 3M", multi, False, solver_order=3)
    add("DPM++ 3M", multi, True, solver_order=3, lower_order_final=False)
    for full in (True, False):
        add("DPM 3M", multi, False, solver_order=3, algorithm_type="dpmsolver", lower_order_final=not full)
        for order in (2, 3):
            add(f"DEIS {order}", "DEISMultistep", False, solver_order=order, lower_order_final=not full)
    for order in (2, 3):
        for kind in ("bh1", "bh2"):
            options = dict(solver_order=order, solver_type=kind)
            if kind == "bh2":
                add(f"UniPC {order} {kind} x0", "UniPCMultistep", True, **options)
            for predict in ("x0", "eps"):
                options["predict_x0"] = predict == "x0"
                add(f"UniPC {order} {kind} {predict}", "UniPCMultistep", False, **options)
                add(f"UniPC {order} {kind} {predict}", "UniPCMultistep", False, **options, lower_order_final=False)
    for kind in ("data", "noise"):
        for p, c in ((2, 2), (3, 3), (3, 4)):
            options = dict(predictor_order=p, corrector_order=c, algorithm_type=f"{kind}_prediction", tau_func=lambda _: 0)
            add(f"SA {p}-{c} {kind} tau=0", "SASolver", False, **options)
    return found


def refused() -> dict[str, tuple[Callable[[], Any], bool]]:
    """Options that diffusers offers and that cannot work; kept on one grid, so that a table says so."""
    make = partial(diffusers.UniPCMultistepScheduler, solver_order=3, prediction_type="sample", final_sigmas_type="zero")
    return {
        "UniPC 3 bh1 x0 zero": (partial(make, solver_type="bh1"), True),
        "UniPC 3 bh2 eps zero": (partial(make, predict_x0=False), True),
        "UniPC 3 bh2 x0 zero full": (partial(make, lower_order_final=False), True),
        "DPM 2M midpoint zero": (
            partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="dpmsolver", prediction_type="sample"),
            True,
        ),
    }


def crossed(schedulers: dict[str, tuple[Callable[[], Any], bool]], grids: dict[str, Grid]) -> list[tuple[str, str, Run]]:
    """Every scheduler on these grids."""
    runs: dict[str, Callable[[Grid, Ask, Tensor], Tensor]] = {
        "DDIM": ddim,
        "IPNDM": ipndm,
        "PNDM skip_prk": partial(pndm, True),
        "PNDM": partial(pndm, False),
        "Heun": partial(ve, partial(diffusers.HeunDiscreteScheduler, 100)),
        "KDPM2": partial(ve, partial(diffusers.KDPM2DiscreteScheduler, 100)),
        "FlowMatchHeun": flow,
    }
    runs |= {name: partial(vp, *how) for name, how in schedulers.items()}
    return [(name, label, partial(run, grid)) for name, run in runs.items() for label, grid in grids.items()]


def settings() -> list[Setting]:
    """Every scheduler on every grid."""
    schedulers = multistep()
    found = crossed(schedulers, GRIDS)
    found.append(("IPNDM", "its own", partial(ipndm, arcs)))
    for name in ("DPM++ 2M midpoint zero", "DPM++ 3M zero", "UniPC 2 bh2 x0 zero", "UniPC 3 bh2 x0 zero"):
        found.append((name, "trailing", partial(vp, *schedulers[name], trailing)))
    found += [(name, "exponential", partial(vp, *how, GRIDS["exponential"])) for name, how in refused().items()]
    return [Setting("diffusers", *one) for one in found]


def lent(nodes: dict[str, Grid]) -> list[Setting]:
    """Every scheduler on noise levels of others."""
    return [Setting("diffusers", *one) for one in crossed(multistep(), nodes)]
