"""azula (MIT): its samplers take a schedule (alpha, sigma)(t) and run uniformly in t; so a schedule is its time grid.

Each schedule's t runs between the times where its sigma / alpha is the SDE's at t_max and t_min (found by bisection), the state is
alpha z. float64. Its own schedules at their defaults, and two that a user would write: the SDE's own, and Karras'. They sample down
to t_min, where D is asked. Left out as the same numbers: DDIM at eta = 0 and order 1 of zAB, vAB, zEAB, xEAB (all EulerSampler).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import azula.noise
import azula.sample
import torch
from torch import Tensor

from . import Ask, D, Setting, double


class Karras(azula.noise.Schedule):
    """alpha = 1, sigma^(1/7) linear in t."""

    def __init__(self, low: float, high: float) -> None:
        self.ends = low ** (1 / 7), high ** (1 / 7)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma)."""
        return torch.ones_like(t), (self.ends[0] + t * (self.ends[1] - self.ends[0])) ** 7


class Own(azula.noise.Schedule):
    """The SDE's own alpha and sigma, t in [0, 1] for [t_min, t_max]."""

    def __init__(self, sde: Any) -> None:
        self.sde = sde

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma)."""
        t = self.sde.t_min + t * (self.sde.t_max - self.sde.t_min)
        return self.sde.alpha(t), self.sde.sigma(t)


class Posterior:
    """What a sampler reads."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean


class Denoiser:
    """ask in the schedule's own x = alpha z."""

    def __init__(self, ask: Ask, schedule: azula.noise.Schedule, ends: tuple[float, float]) -> None:
        self.ask, self.schedule, self.ends = ask, schedule, ends

    def __call__(self, x: Tensor, t: Tensor) -> Posterior:
        """The mean, counted by ask."""
        alpha, sigma = self.schedule(t)
        return Posterior(self.ask(x / alpha, sigma / alpha))


SCHEDULES: dict[str, Callable[[Ask], azula.noise.Schedule]] = {
    "VESchedule": lambda ask: azula.noise.VESchedule(ask.bottom, ask.top),
    "VPSchedule": lambda ask: azula.noise.VPSchedule(),
    "CosineSchedule": lambda ask: azula.noise.CosineSchedule(),
    "RectifiedSchedule": lambda ask: azula.noise.RectifiedSchedule(),
    "DecaySchedule": lambda ask: azula.noise.DecaySchedule(),
    "the SDE's": lambda ask: Own(ask.sde),
    "Karras rho=7": lambda ask: Karras(ask.bottom, ask.top),
}


def when(schedule: azula.noise.Schedule, rho: float) -> float:
    """T in [0, 1] where sigma / alpha is rho."""
    low, high = 0.0, 1.0
    for _ in range(60):
        mid = (low + high) / 2
        alpha, sigma = schedule(torch.tensor(mid, dtype=D))
        low, high = (mid, high) if float(sigma / alpha) < rho else (low, mid)
    return (low + high) / 2


def run(sampler: Callable[..., Any], cost: int, make: Callable[[Ask], azula.noise.Schedule], ask: Ask, x: Tensor) -> Tensor:
    """One sampler on one schedule, `cost` evaluations a step."""
    with double():
        schedule = make(ask)
        start, stop = when(schedule, ask.top), when(schedule, ask.bottom)
        first, last = (float(schedule(torch.tensor(t, dtype=D))[0]) for t in (start, stop))
        denoiser = Denoiser(ask, schedule, (start, stop))
        steps = (ask.nfe - 1) // cost
        x = sampler(denoiser, start=start, stop=stop, steps=steps, silent=True, dtype=D)(first * ask.start(x))
    return ask.finish(x / last)


def settings() -> list[Setting]:
    """Every sampler on every schedule."""
    samplers = {"Euler": (azula.sample.EulerSampler, 1), "Heun": (azula.sample.HeunSampler, 2)}
    for name, orders in {"zAB": (2, 3, 4), "vAB": (2, 3, 4), "zEAB": (2, 3, 4), "xEAB": (2, 3, 4), "REAB": (1, 2, 3, 4)}.items():
        for order in orders:
            samplers[f"{name} {order}"] = (partial(getattr(azula.sample, f"{name}Sampler"), order=order), 1)
    return [
        Setting("azula", name, label, partial(run, *how, make))
        for name, how in samplers.items()
        for label, make in SCHEDULES.items()
    ]
