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


class Nodes(azula.noise.Schedule):
    """Given noise levels, in the state of rectified flow; t is their number from the end, over how many there are."""

    def __init__(self, rho: Tensor) -> None:
        self.rho = rho.flip(0)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma)."""
        rho = self.rho[(t * (len(self.rho) - 1)).round().long()]
        return 1 / (1 + rho), rho / (1 + rho)


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


def solve(
    sampler: Callable[..., Any], steps: int, schedule: azula.noise.Schedule, start: float, stop: float, ask: Ask, x: Tensor
) -> Tensor:
    """One sampler from t = start to stop, then the mean."""
    with double():
        first, last = (float(schedule(torch.tensor(t, dtype=D))[0]) for t in (start, stop))
        denoiser = Denoiser(ask, schedule, (start, stop))
        x = sampler(denoiser, start=start, stop=stop, steps=steps, silent=True, dtype=D)(first * ask.start(x))
    return ask.finish(x / last)


def run(sampler: Callable[..., Any], cost: int, make: Callable[[Ask], azula.noise.Schedule], ask: Ask, x: Tensor) -> Tensor:
    """One sampler on one schedule, `cost` evaluations a step."""
    schedule = make(ask)
    return solve(sampler, (ask.nfe - 1) // cost, schedule, when(schedule, ask.top), when(schedule, ask.bottom), ask, x)


def on(sampler: Callable[..., Any], cost: int, rule: Callable[[Ask, int], Tensor], ask: Ask, x: Tensor) -> Tensor:
    """One sampler on given noise levels."""
    steps = (ask.nfe - 1) // cost
    return solve(sampler, steps, Nodes(rule(ask, steps + 1)), 1.0, 0.0, ask, x)


def samplers() -> dict[str, tuple[Callable[..., Any], int]]:
    """Name -> (sampler, evaluations a step)."""
    found = {"Euler": (azula.sample.EulerSampler, 1), "Heun": (azula.sample.HeunSampler, 2)}
    for name, orders in {"zAB": (2, 3, 4), "vAB": (2, 3, 4), "zEAB": (2, 3, 4), "xEAB": (2, 3, 4), "REAB": (1, 2, 3, 4)}.items():
        for order in orders:
            found[f"{name} {order}"] = (partial(getattr(azula.sample, f"{name}Sampler"), order=order), 1)
    return found


def settings() -> list[Setting]:
    """Every sampler on every schedule."""
    return [
        Setting("azula", name, label, partial(run, *how, make))
        for name, how in samplers().items()
        for label, make in SCHEDULES.items()
    ]


def lent(nodes: dict[str, Callable[[Ask, int], Tensor]]) -> list[Setting]:
    """Every sampler on noise levels of others."""
    return [
        Setting("azula", name, label, partial(on, *how, rule)) for name, how in samplers().items() for label, rule in nodes.items()
    ]
