"""Bits a dimension of quantised data: the cells, the noise that fills them, and the bound that a density gives."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_callable, check_count, check_number, check_state, shape_of
from .denoiser import Denoiser, check_denoiser
from .divergence import Divergence
from .grid import Grid
from .likelihood import Prior, divergence_of, log_prob
from .noise import DEQUANTIZE, Noise
from .solve import noise_of
from .solvers import Solver

__all__ = ["BitsPerDim", "Importance", "Quantized", "TruncatedNormal", "Uniform", "bits_per_dim"]

# (noise, cell centres [N, *shape] in the model's range, width of a cell, rho at the time of the density) ->
# (u in [0, 1] like them, log q(u) [N])
Dequantization = Callable[[Noise, Tensor, float, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Quantized:
    """Images of `levels` integers 0 .. levels-1 as cells of [low, high]: x0 = low + (k + u) (high - low) / levels, u in [0, 1)."""

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.levels, "levels", 2)
        check_number(self.high, "high", check_number(self.low, "low"), open_low=True)

    def to_model(self, images: Tensor, u: Tensor | float = 0.5) -> Tensor:
        """Integers to the model's range, at u of their cell (its centre by default)."""
        if not isinstance(images, Tensor) or images.is_floating_point() or images.is_complex() or images.dtype is torch.bool:
            raise TypeError(
                f"images is {shape_of(images)}; wanted integers 0 .. {self.levels - 1}: bits/dim needs quantised data, as read from the "
                "file; of floats k / 255 they are (255 * x).round().byte()"
            )
        if images.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch can store and little more
            images = images.long()
        if images.numel() and not 0 <= int(images.min()) <= int(images.max()) < self.levels:
            raise ValueError(
                f"images span {int(images.min())} .. {int(images.max())}; wanted 0 .. {self.levels - 1}: check levels="
            )
        dtype = u.dtype if isinstance(u, Tensor) else torch.get_default_dtype()
        return (self.low + (images.double() + u) * self.width).to(dtype)  # float32 would round u away at many levels

    def to_levels(self, x0: Tensor) -> Tensor:
        """The model's range to integers (uint8 up to 256 levels): the cell that x0 lies in."""
        k = ((x0 - self.low) / self.width).floor().clamp(0, self.levels - 1)
        return k.to(torch.uint8 if self.levels <= 256 else torch.int32)

    @property
    def width(self) -> float:
        """Of a cell, in the model's range."""
        return (self.high - self.low) / self.levels

    @property
    def log_det(self) -> float:
        """Log of |d x0 / d k| a dimension, nats: what carries a density of x0 to one of k, and bits/dim with it."""
        return math.log(self.width)


@dataclass(frozen=True)
class Uniform:
    """u ~ U[0, 1), log q = 0: right for a model that was trained with the same noise. Theis, van den Oord & Bethge 2016 (ICLR)."""

    def __call__(self, noise: Noise, centres: Tensor, cell: float, rho: float) -> tuple[Tensor, Tensor]:
        """u and log q `[N]`."""
        return noise.uniform(centres, DEQUANTIZE), centres.new_zeros(len(centres))


@dataclass(frozen=True)
class TruncatedNormal:
    """x_{t_min} = alpha centre + sigma e, e ~ N(0, 1) within the cell, |e| < tau = cell / (2 rho): the law of a state of the clean image.

    log q(u) = sum_i [-e^2 / 2 - log(2 pi) / 2 - log erf(tau / sqrt 2) + log(cell / rho)]. For a model trained on the images themselves:
    with it the bound holds for the discrete data, the gap [0, t_min] included. Zheng, Lu, Chen & Zhu 2023 (ICML), eq. 15.
    """

    def __call__(self, noise: Noise, centres: Tensor, cell: float, rho: float) -> tuple[Tensor, Tensor]:
        """u and log q `[N]`."""
        inside = math.erf(cell / (2 * rho) / math.sqrt(2))
        v = noise.uniform(torch.empty_like(centres, dtype=torch.float64), DEQUANTIZE)
        e = math.sqrt(2) * torch.erfinv((2 * v - 1) * inside)
        log_q = -e.square() / 2 - math.log(2 * math.pi) / 2 - math.log(inside) + math.log(cell / rho)
        return (0.5 + e * (rho / cell)).clamp(0, 1).to(centres.dtype), log_q.flatten(1).sum(1)


@dataclass(frozen=True)
class Importance:
    """log 1/k sum_j p(u_j) / q(u_j), k draws u_j of `of`: between the bound of one draw and log P.

    Burda, Grosse & Salakhutdinov 2016 (ICLR), eq. 8. A proper log-mean-exp, with its - log k. It needs exact log-densities:
    the exponential of a noisy one is too large on average.
    """

    k: int = 20
    of: Dequantization = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        check_count(self.k, "k")
        if isinstance(check_callable(self.of, "of", "a dequantization, such as Uniform()"), Importance):
            raise TypeError(f"of is {self.of!r}; wanted what draws one u, such as Uniform(): Importance(k * k') is the same")

    def __call__(self, noise: Noise, centres: Tensor, cell: float, rho: float) -> tuple[Tensor, Tensor]:
        """One of the draws."""
        return self.of(noise, centres, cell, rho)


@dataclass(frozen=True)
class BitsPerDim:
    """A bound on -log2 P(image) / D, and its parts.

    value: mean over images; stderr: of it, over images; stderr_noise: of it, over the draws of u and of probes for these images (nan
    for one sample); each `[N]`, and each_stderr over its draws; log_prob `[N]`: mean log p(x0) in nats, x0 = low + (k + u) cell, and
    log_det the nats that carry it to k, D log cell; nfe, ledger: an image's, all draws; t_min: the time
    whose density it is; solver_error `[N]`: on request, bits/dim.
    """

    value: float
    stderr: float
    stderr_noise: float
    each: Tensor = field(repr=False)
    each_stderr: Tensor = field(repr=False)
    log_prob: Tensor = field(repr=False)
    log_det: float
    nfe: int
    ledger: dict[str, float]
    dequantization: str
    divergence: str
    samples: int
    t_min: float
    solver_error: Tensor | None = field(default=None, repr=False)


def bits_per_dim(
    denoiser: Denoiser, images: Tensor, solver: Solver | None = None, *, levels: int = 256, low: float = -1.0, high: float = 1.0,
    dequantization: Dequantization | None = None, samples: int = 1, nfe: int | None = None, steps: int | None = None,
    times: Tensor | None = None, grid: Grid | None = None, prior: Prior | None = None, divergence: Divergence | None = None,
    solver_error: bool = False, seeds: Sequence[int] | Tensor | None = None, generator: torch.Generator | None = None,
    microbatch: int | None = None, dtype: torch.dtype = torch.float32,
) -> BitsPerDim:  # fmt: skip
    """Bits a dimension of integer images `[N, *shape]` with `levels` grey levels under a model of x0 in [low, high].

    -log2 P(k) / D <= -E[log p(x0(k + u)) + D log|d x0 / d k| - log q(u)] / (D log 2), with log p(x0) = log p_{t_min}(alpha x0) +
    D log alpha at t_min and u ~ q (`dequantization`: Uniform(), TruncatedNormal(), Importance(k), or a function or module (noise,
    centres `[N, *shape]`, cell, rho) -> (u, log q `[N]`)), averaged over `samples` draws of u. P(k) is the mass that p_{t_min} gives to
    the cell times alpha: a law of the discrete image, whatever lies between 0 and t_min. The rest as in `log_prob`. The solver's error
    is not in stderr: solver_error=True estimates it. Warns of negative values and of images that use few of the levels.
    """
    cells, sde = Quantized(levels, low, high), check_denoiser(denoiser).sde
    centres = cells.to_model(images).to(dtype)  # refuses what is not images before anything is drawn
    check_state(centres, "images (in dtype=)")
    images = images.long()
    check_count(samples, "samples")
    dequantization = Uniform() if dequantization is None else dequantization
    check_callable(
        dequantization, "dequantization", wanted := "Uniform(), TruncatedNormal(), Importance(k) or a function like them"
    )
    if isinstance(dequantization, type):
        raise TypeError(f"dequantization is the class {dequantization.__name__}; wanted {wanted}: is it not yet called?")
    divergence = divergence_of(divergence, images.shape[1:])
    k = dequantization.k if isinstance(dequantization, Importance) else 1
    if k > 1 and divergence.random:
        warnings.warn(
            f"{dequantization!r} with {divergence!r}: the noise of probes makes it optimistic; exact() has none", stacklevel=2
        )
    if images.numel() >= 256 and int(images.max()) < levels // 8:
        warnings.warn(f"no pixel is above {int(images.max())} with levels={levels}: is that their number of levels?", stacklevel=2)
    if cells.width < 64 * torch.finfo(dtype).eps * max(abs(low), abs(high)):
        raise ValueError(f"cells of {cells.width:.3g} are as fine as the numbers of {dtype}; pass dtype=torch.float64")
    noise, kept = noise_of(len(images), seeds, generator)
    seeds = None if seeds is None else kept
    t = torch.tensor(sde.t_min, dtype=torch.float64) if times is None else times.min().double()
    alpha, rho, d = float(sde.alpha(t)), float(sde.rho(t)), centres[0].numel() if len(centres) else 1
    draws: list[Tensor] = []
    errors: list[Tensor] = []
    densities: list[Tensor] = []
    ledger, nfe_all = Counter[str](), 0
    for draw in range(samples * k):
        u, log_q = _checked(dequantization(noise, centres, cells.width, rho), centres)
        # every draw has probes of its own: the seeds move by the golden ratio's odd 64-bit multiple, and not at all for the first
        own = None if seeds is None else [(int(seed) + draw * 0x9E3779B97F4A7C15) % 2**64 for seed in seeds]
        found = log_prob(
            denoiser, alpha * cells.to_model(images, u.to(dtype)), solver, nfe=nfe, steps=steps, times=times, grid=grid, prior=prior,
            divergence=divergence, solver_error=solver_error, differentiable=False, seeds=own, generator=generator,
            microbatch=microbatch,
        )  # fmt: skip
        ledger.update(found.ledger)
        nfe_all += found.nfe
        densities.append(found.value.double() + d * math.log(alpha))
        if found.solver_error is not None:
            errors.append(found.solver_error.double() / (d * math.log(2)))
        draws.append(densities[-1] + d * cells.log_det - log_q.double())
    log_p = torch.stack(draws).reshape(samples, k, -1).logsumexp(1) - math.log(k)
    bits = -log_p / (d * math.log(2))
    each = bits.mean(0)
    if bool((each < 0).any()):
        warnings.warn(
            f"{int((each < 0).sum())} of {len(each)} images have negative bits/dim, which no discrete image can but by the luck of a "
            "draw of u: the solve is too coarse (double its steps until the value stands still), or the data are not the cells of "
            "[low, high], or the model puts its mass on points of the cells (TruncatedNormal())",
            stacklevel=2,
        )
    n, nan = len(each), float("nan")
    spread = bits.std(0) / samples**0.5 if samples > 1 else torch.full_like(each, nan)
    return BitsPerDim(
        value=float(each.mean()), stderr=float(each.std() / n**0.5) if n > 1 else nan,
        stderr_noise=float(spread.norm()) / n if n else nan, each=each, each_stderr=spread,
        log_prob=torch.stack(densities).mean(0), log_det=d * cells.log_det, nfe=nfe_all, ledger=dict(ledger),
        dequantization=getattr(dequantization, "__name__", repr(dequantization)), divergence=found.divergence, samples=samples,
        t_min=float(t), solver_error=torch.stack(errors).mean(0) if errors else None,
    )  # fmt: skip


def _checked(drawn: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """u and log q of a dequantization of the user's."""
    u, log_q = drawn if isinstance(drawn, tuple) and len(drawn) == 2 else (drawn, None)
    if not isinstance(u, Tensor) or u.shape != like.shape or not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"dequantization returned u {shape_of(u)}; wanted (u, log q), u in [0, 1] of the shape of images")
    if not isinstance(log_q, Tensor) or log_q.shape != (len(like),):
        raise ValueError(f"dequantization returned log q {shape_of(log_q)}; wanted log-densities [{len(like)}]")
    return u.detach(), log_q.detach()
