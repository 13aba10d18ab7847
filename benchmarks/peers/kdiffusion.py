"""k-diffusion (MIT): Karras-space samplers, run in z with its own sigma grids in float64.

Only `k_diffusion.sampling` is loaded: the package's own __init__ wants models and metrics that no sampler needs. Samplers that
end with a jump to sigma = 0 do so from t_min, which is the mean D there; `lms` extrapolates over that jump instead and `dpm_fast`
has none, so they stop at t_min and D is asked. eta = 0 where a sampler has one. Left out as the same numbers: euler_ancestral and
dpm_2_ancestral at eta = 0 (euler, dpm_2), 2m_sde of type midpoint (dpmpp_2m), dpmpp_sde at eta = 0 (dpmpp_2s), lms 1 (euler).
"""

import importlib
import math
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib.metadata import distribution
from typing import Any

import torch
from torch import Tensor

from . import Ask, Setting, double


def load() -> Any:
    """The module k_diffusion.sampling, its package an empty one and its utils the single function that it uses."""
    if "k_diffusion" not in sys.modules:
        package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
        package.__path__ = [str(distribution("k-diffusion").locate_file("k_diffusion"))]
        utils.append_dims = lambda x, n: x.reshape(x.shape + (1,) * (n - x.ndim))
        package.utils = utils
        sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")


def vp(k: Any, ask: Ask, n: int) -> Tensor:
    """get_sigmas_vp with the beta that meets both ends (19.9 and 0.1 for VP itself)."""
    eps = ask.sde.t_min if ask.bottom > 0.01 else 1e-3
    low, high = math.log1p(ask.bottom**2), math.log1p(ask.top**2)
    beta_d = 2 * (low / eps - high) / (eps - 1)
    return k.get_sigmas_vp(n, beta_d, high - beta_d / 2, eps)


def grids(k: Any) -> dict[str, Callable[[Ask, int], Tensor]]:
    """Grid name -> n noise levels and a zero."""

    def between(rule: Callable[..., Tensor], **options: float) -> Callable[[Ask, int], Tensor]:
        return lambda ask, n: rule(n, ask.bottom, ask.top, **options)

    return {
        "karras rho=7": between(k.get_sigmas_karras),
        "karras rho=3": between(k.get_sigmas_karras, rho=3.0),
        "exponential": between(k.get_sigmas_exponential),
        "polyexponential rho=0.75": between(k.get_sigmas_polyexponential, rho=0.75),
        "polyexponential rho=1.5": between(k.get_sigmas_polyexponential, rho=1.5),
        "vp": partial(vp, k),
    }


def run(sampler: Callable[..., Tensor], nodes: Callable[[int], int], jump: bool, grid: Any, ask: Ask, x: Tensor) -> Tensor:
    """One sampler on one grid; nodes: how many noise levels nfe pays for."""
    with double():
        sigmas = grid(ask, nodes(ask.nfe))
        z = sampler(lambda z, s: ask(z, s[0]), ask.start(x), sigmas if jump else sigmas[:-1], disable=True)
    return z if jump else ask.finish(z)


def fast(k: Any, ask: Ask, x: Tensor) -> Tensor:
    """DPM-Solver-fast chooses its own nodes, uniform in log sigma."""
    with double():
        z = k.sample_dpm_fast(lambda z, s: ask(z, s[0]), ask.start(x), ask.bottom, ask.top, ask.nfe - 1, disable=True)
    return ask.finish(z)


def samplers(k: Any) -> dict[str, tuple[Callable[..., Tensor], Callable[[int], int], bool]]:
    """Name -> (sampler, noise levels that nfe pays for, whether it ends with the jump to zero)."""
    still = {"noise_sampler": lambda *_: 0.0}
    one, two = (lambda nfe: nfe), (lambda nfe: (nfe + 1) // 2)
    return {
        "euler": (k.sample_euler, one, True),
        "heun": (k.sample_heun, two, True),
        "dpm_2": (k.sample_dpm_2, two, True),
        "lms 2": (partial(k.sample_lms, order=2), one, False),
        "lms 3": (partial(k.sample_lms, order=3), one, False),
        "lms 4": (partial(k.sample_lms, order=4), one, False),
        "dpmpp_2s": (partial(k.sample_dpmpp_2s_ancestral, eta=0.0, **still), two, True),
        "dpmpp_2m": (k.sample_dpmpp_2m, one, True),
        "dpmpp_2m_sde heun": (partial(k.sample_dpmpp_2m_sde, eta=0.0, solver_type="heun", **still), one, True),
        "dpmpp_3m_sde": (partial(k.sample_dpmpp_3m_sde, eta=0.0, **still), one, True),
    }


def crossed(k: Any, grids: dict[str, Callable[[Ask, int], Tensor]]) -> list[Setting]:
    """Every sampler on these grids."""
    return [
        Setting("k-diffusion", name, label, partial(run, *how, grid))
        for name, how in samplers(k).items()
        for label, grid in grids.items()
    ]


def settings() -> list[Setting]:
    """Every sampler on every grid."""
    k = load()
    return [*crossed(k, grids(k)), Setting("k-diffusion", "dpm_fast", "exponential", partial(fast, k))]


def lent(nodes: dict[str, Callable[[Ask, int], Tensor]]) -> list[Setting]:
    """Every sampler on noise levels of others."""
    k = load()
    return crossed(k, {label: lambda ask, n, rule=rule: k.append_zero(rule(ask, n)) for label, rule in nodes.items()})


torch.manual_seed(0)  # sample_euler and its kin draw noise that they multiply by zero
