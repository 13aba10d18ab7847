"""The peers, and the one exact problem that they and ours are run on. A peer is told nothing but x0 at the sigma it really uses."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import azula.denoise
import pytest
import torch
from torch import Tensor

import scoresde
from scoresde import EDM, VE, VP

D = torch.float64
# wide enough for every sigma of a peer's default schedule (0.01 to 157)
SDES = {"VP": VP(t_min=1e-4, t_max=1.01), "VE": VE(sigma_min=0.005, sigma_max=200.0), "EDM": EDM(t_max=200.0)}
EXACT = 1e-8  # float64 against float64, samples of order 1
FLOAT32 = 5e-6  # relative, where the peer rounds its state to float32 at every step


def k_diffusion() -> types.ModuleType:
    """k_diffusion.sampling alone: the package's own __init__ imports its training side, whose dependencies no sampler needs."""
    if "k_diffusion" not in sys.modules:
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
        sys.modules["k_diffusion"] = package
        sys.modules["k_diffusion.utils"] = utils = types.ModuleType("k_diffusion.utils")
        utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # all that `sampling` takes from it
    return importlib.import_module("k_diffusion.sampling")


def karras(n: int, low: float = 0.02, high: float = 60.0) -> Tensor:
    """n + 1 sigmas, Karras et al. 2022, eq. 5, in float64."""
    u = torch.linspace(0, 1, n + 1, dtype=D)
    return (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7


class Problem:
    """A mixture with its exact denoiser, in 2-D (three isotropic Gaussians) or 6-D (five, each with its own deviations).

    Noise levels are rho = sigma / alpha, what k-diffusion, EDM and diffusers call sigma; x lives in the space of `sde`.
    """

    def __init__(self, sde: str, dims: int) -> None:
        self.name, self.sde = sde, SDES[sde]
        g = torch.Generator().manual_seed(dims)
        means = {2: torch.tensor([[1.0, 0.3], [-0.8, 0.9], [-0.2, -1.1]], dtype=D), 6: torch.randn(5, 6, generator=g, dtype=D)}
        std = {2: torch.tensor([0.35, 0.25, 0.5], dtype=D), 6: 0.15 + 0.5 * torch.rand(5, 6, generator=g, dtype=D)}
        self.denoiser = scoresde.Mixture(self.sde, means[dims], std[dims])

    def time(self, rho: Tensor) -> Tensor:
        return self.sde.time(-2 * torch.as_tensor(rho, dtype=D).log())

    def alpha(self, rho: Tensor) -> Tensor:
        return (1 + rho**2).rsqrt() if self.name == "VP" else torch.ones_like(rho)

    def sigma(self, rho: Tensor) -> Tensor:
        return rho * self.alpha(rho)

    def start(self, rho: Tensor) -> Tensor:
        """Sixteen exact draws of x at the first of `rho`."""
        return self.denoiser.sample(16, self.time(rho[0]), seeds=range(16))

    def x0(self, x: Tensor, rho: Tensor) -> Tensor:
        return self.denoiser(x, self.time(rho))

    def eps(self, x: Tensor, rho: Tensor) -> Tensor:
        return (x - self.alpha(rho) * self.x0(x, rho)) / self.sigma(rho)

    def ours(self, solver: scoresde.Solver, x: Tensor, rho: Tensor, denoise: bool = False) -> Tensor:
        """What scoresde makes of it: down `rho`, and then (denoise) the mean at the last."""
        return scoresde.sample(self.denoiser, x.shape, solver, times=self.time(rho), x=x, denoise=denoise, seeds=range(len(x))).x

    def x0_of_z(self, z: Tensor, rho: Tensor) -> Tensor:
        """For peers that live in z = x / alpha; k-diffusion has one rho a row, all the same."""
        return self.x0(self.alpha(rho.flatten()[0]) * z, rho.flatten()[0])


def scheduler_run(
    scheduler: Any, problem: Problem, x: Tensor, rho: Tensor, *, scaled: bool = True, steps: int = 0, before: Callable | None = None
) -> Tensor:
    """A diffusers scheduler's own loop on the sigmas `rho`, in float64; scaled: its state is VP's x, else x / alpha; before(i): a step.

    It is fed x0 at rho and not at its timestep, an integer in most of them: the sigma there is up to some per cent off the one in use.
    """
    scheduler.set_timesteps(steps or len(rho) - 1)
    scheduler.sigmas = rho
    scheduler.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps):
        if before is not None:
            before(i)
        x = scheduler.step((problem.x0 if scaled else problem.x0_of_z)(x, rho[i]), t, x).prev_sample
    return x


class AzulaDenoiser(azula.denoise.Denoiser):
    """Ours as azula's: its time is the time of our SDE, its schedule (alpha, sigma) of it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.denoiser = problem.denoiser

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.denoiser.sde.alpha(t), self.denoiser.sde.sigma(t)

    def forward(self, x: Tensor, t: Tensor) -> azula.denoise.DiracPosterior:
        return azula.denoise.DiracPosterior(mean=self.denoiser(x, t))


def azula_run(kind: type, problem: Problem, x: Tensor, rho: Tensor, **settings: object) -> Tensor:
    """An azula sampler on these times: it has no way to be given any but uniform ones, so `timesteps` is set from outside."""
    sampler = type(kind.__name__, (kind,), {"timesteps": problem.time(rho)})
    return sampler(AzulaDenoiser(problem), steps=len(rho) - 1, silent=True, **settings)(x)


def difference(a: Tensor, b: Tensor) -> float:
    """Max abs difference."""
    return float((a - b).abs().max())


def agree(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Fail unless a and b agree: EXACT is absolute, FLOAT32 relative to the largest entry. NaN fails."""
    scale = 1.0 if tolerance == EXACT else float(b.abs().max())
    assert difference(a, b) <= tolerance * scale


def ramp(n: int, order: int, lower_final: bool = False) -> list[int]:
    """Orders of n multistep steps: 1, 2, ... up to `order`, and (lower_final) back down to 1 at the end."""
    return [min(order, i + 1, n - i if lower_final else order) for i in range(n)]


PROBLEMS = [Problem("VP", 2), Problem("VP", 6), Problem("VE", 6), Problem("EDM", 2)]
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.name}-{p.denoiser.shape[0]}D")
