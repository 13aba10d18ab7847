"""What a denoiser may be trained on beside `dsm_loss`: each (denoiser, x0, t, weight, noise) -> `[B]`, with the weights of `scoresde.loss`.

The mean of each is that of `dsm_loss` at the same weight, for every denoiser, except of `Uncertainty`, which learns a weight, and
`kernel_loss`, whose noise is not Gaussian. All take the arguments of `dsm_loss` and raise what it raises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_callable, check_count, check_even, check_number, check_state, shape_of
from .denoiser import Denoiser, check_denoiser
from .divergence import Divergence, Jacobian, Mode, exact, rademacher
from .linear import cast
from .loss import Objective, Times, Weight, begin, dsm_loss, edm, log_normal, regression, stratified, weighted
from .nets.embed import fourier
from .noise import PROBE, Noise, entropy_seeds, seeded

__all__ = [
    "GradientVariance", "Kernel", "Uncertainty", "antithetic", "controlled", "gradient_variance", "implicit_score_matching",
    "kernel_loss", "logistic", "normal", "sliced_score_matching", "student",
]  # fmt: skip

_OBJECTIVE = "an objective (denoiser, x0, t, weight, noise) -> [B], as scoresde.dsm_loss"


def own_noise(noise: Tensor) -> Noise:
    """More randomness for each row, a function of its noise alone (and the same for -noise): it repeats where the noise does."""
    bits = noise.detach().flatten(1).double().view(torch.int64)
    odd = 2 * torch.arange(bits.shape[1], device=bits.device) + 0x9E3779B97F4A7C1  # rows that differ in order differ in the sum
    return seeded((bits * odd).sum(1).bitwise_and(2**63 - 1))


# --- a learned weight ----------------------------------------------------------------------------------------------------
class Uncertainty(nn.Module):
    """objective exp(-u(t)) + u(t), with u a linear map of Fourier features of log(rho) / 4, learned with the denoiser.

    At the optimum exp(u) is the mean of `objective` at that noise level, so that every level counts as much; the minimum over denoisers
    is the objective's own. u starts at 0, and its rate of learning is that of the optimizer it is given to. channels: an even number of
    features; objective: any whose mean is positive. Karras et al. 2024 (EDM2, CVPR), after Kendall et al. 2018 (CVPR).
    """

    def __init__(self, channels: int = 128, objective: Objective = dsm_loss) -> None:
        super().__init__()
        check_even(channels, "channels")
        self.objective = check_callable(objective, "objective", _OBJECTIVE)
        self.linear = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(()))

    def u(self, logsnr: Tensor) -> Tensor:
        """Log of the expected loss at log-SNRs `[n]`."""
        features = fourier(-logsnr.double() / 8, len(self.linear)).to(self.linear)
        return features @ self.linear / len(self.linear) ** 0.5 + self.bias

    def forward(self, denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None) -> Tensor:
        """The loss `[B]`."""
        loss = self.objective(denoiser, x0, t, weight, noise)
        u = self.u(denoiser.sde.logsnr(t.double()).flatten()).to(loss)
        return loss * (-u).exp() + u


# --- less variance -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class antithetic:
    """The mean of an objective at noise and at -noise: what is odd in the noise cancels. Two passes; no second derivative.

    At small rho that is all but rho^2 of the variance of `dsm_loss` at the exact mean. Hammersley & Morton 1956.
    """

    objective: Objective = dsm_loss

    def __post_init__(self) -> None:
        check_callable(self.objective, "objective", _OBJECTIVE)

    def __call__(self, denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None) -> Tensor:
        """The loss `[B]`."""
        t, noise = begin(denoiser, x0, t, weight, noise)
        return (self.objective(denoiser, x0, t, weight, noise) + self.objective(denoiser, x0, t, weight, -noise)) / 2


@dataclass(frozen=True)
class controlled:
    """`dsm_loss` + 2 c weight rho <noise, x0 - denoiser(alpha x0, t)> / D: a control variate of mean 0. Two passes; no second derivative.

    |denoiser(x_t, t) - x0|^2 holds -2 rho <noise, x0 - denoiser> of size rho and mean rho^2; with the same at the noiseless alpha x0
    taken out, a difference of size rho^2 is left: at the exact mean the gradient's variance is less by a factor that grows as 1 / rho^2.
    c = V / (V + rho^2), V the `variance` of the data a dimension, turns it off where the noise is larger than the data. Wang et al. 2020
    (Wasserstein minimum velocity, AISTATS), with c = 1; Jeha et al. 2024, whose Taylor expansion has this as its first term.
    """

    variance: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.variance, "variance", 0.0, open_low=True)

    def __call__(self, denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None) -> Tensor:
        """The loss `[B]`, which may be negative; its mean is not."""
        t, noise = begin(denoiser, x0, t, weight, noise)
        sde, clean = denoiser.sde, denoiser.predict(denoiser.sde.perturb(x0, t, torch.zeros_like(noise)), t).x0
        rho = sde.rho(t.double())
        share = cast(2 * rho * self.variance / (self.variance + rho**2), x0)
        variate = (share * noise * (x0 - clean)).flatten(1).mean(1)
        return dsm_loss(denoiser, x0, t, weight, noise) + weighted(weight, sde, t, variate)


# --- without the noise as a target ---------------------------------------------------------------------------------------
class _Twice(Jacobian):
    """A Jacobian whose products can be differentiated; ValueError where they cannot, which torch would find out in backward alone."""

    def __call__(self, vectors: Tensor) -> Tensor:
        """Their products."""
        if not self.track:
            return super().__call__(vectors)
        products = super().__call__(vectors.detach().requires_grad_())  # else once_differentiable functions pass for constants
        left: list[Any] = [products.grad_fn]
        seen: set[Any] = {None}
        while left:
            node = left.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.name() in ("torch::autograd::NotImplemented", "torch::autograd::Error"):
                raise ValueError(
                    "the denoiser has an operation without a second derivative, and this objective needs a double backward; wanted "
                    "plain torch operations (attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), no "
                    "once_differentiable function), or scoresde.dsm_loss"
                )
            parents = node.next_functions  # of stacked products the first shows what the others are made of
            left.extend(parent for parent, _ in (parents[:1] if node is products.grad_fn else parents))
        return products


def _stein(denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None, divergence: Divergence) -> Tensor:
    """weight (|x0_hat - x / alpha|^2 + 2 sigma^2 / alpha tr J - D rho^2) / D, J = d x0_hat / dx: Stein's unbiased estimate of risk."""
    t, noise = begin(denoiser, x0, t, weight, noise)
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence is {shape_of(divergence)}; wanted one of scoresde.divergence, as rademacher(1)")
    sde, x, t = denoiser.sde, denoiser.sde.perturb(x0, t, noise), t.double()
    jacobian = _Twice(lambda z: denoiser.predict(z, t).x0, x, Mode(divergence.mode, x.device), denoiser.record)
    trace = divergence.trace(jacobian, x, divergence.probes(own_noise(noise), x)).mean(0)
    gap, d = (jacobian.x0 - x / cast(sde.alpha(t), x)).square().flatten(1).sum(1), x.shape[1:].numel()
    alpha, rho = sde.alpha(t).flatten().to(x), sde.rho(t).flatten().to(x)
    return weighted(weight, sde, t, (gap + rho**2 * (2 * alpha * trace - d)) / d)


def implicit_score_matching(denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None) -> Tensor:
    """Hyvarinen's tr(grad s) + |s|^2 / 2 of the score s at x_t, times 2 weight sigma^4 / (alpha^2 D), plus weight rho^2, `[B]`.

    The noise makes x_t and is no target. With the constant the mean is that of `dsm_loss`, Stein's estimate of the x0 error, which
    may be negative. A DOUBLE BACKWARD: D products with the Jacobian a batch, each differentiated again, for small dimensions. Raises
    ValueError for a denoiser without a second derivative. Hyvarinen 2005 (JMLR), theorem 1; Stein 1981.
    """
    return _stein(denoiser, x0, t, weight, noise, exact())


def sliced_score_matching(
    denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None, divergence: Divergence | None = None
) -> Tensor:
    """`implicit_score_matching` with tr J from products with random probes: one, of signs, or those of `divergence`, `[B]`.

    The form with reduced variance, whose |s|^2 is exact. Probes are a function of the noise. A DOUBLE BACKWARD, through one product
    with the Jacobian a probe. `functools.partial(..., divergence=rademacher(4))` for more probes. Song et al. 2019 (UAI), section 3.
    """
    divergence = rademacher(1) if divergence is None else divergence
    return _stein(denoiser, x0, t, weight, noise, divergence)


TWICE = (implicit_score_matching, sliced_score_matching)  # what needs a double backward, which FSDP2 has not


# --- other noise ---------------------------------------------------------------------------------------------------------
class Kernel(ABC):
    """The law k of z in x_t = alpha x0 + sigma z. A subclass makes z of unit normal noise and says grad log k."""

    @abstractmethod
    def draw(self, noise: Tensor) -> Tensor:
        """z of law k from unit normal noise `[B, *shape]`, of its shape and dtype, a function of the row's noise alone."""

    @abstractmethod
    def score(self, z: Tensor) -> Tensor:
        """grad log k(z), of the shape of z `[B, *shape]`."""


@dataclass(frozen=True)
class normal(Kernel):
    """The unit normal law: `kernel_loss(normal())` is `dsm_loss`."""

    def draw(self, noise: Tensor) -> Tensor:
        """Noise."""
        return noise

    def score(self, z: Tensor) -> Tensor:
        """-z."""
        return -z


@dataclass(frozen=True)
class logistic(Kernel):
    """Logistic numbers of variance 1, independent: k = sech^2(z / 2c) / 4c, c = sqrt 3 / pi. The tails of Laplace's law, and smooth."""

    def draw(self, noise: Tensor) -> Tensor:
        """c logit Phi(noise)."""
        n = noise.double()
        z = torch.special.log_ndtr(n) - torch.special.log_ndtr(-n)
        return (3**0.5 / torch.pi * z).to(noise.dtype)

    def score(self, z: Tensor) -> Tensor:
        """-tanh(z / 2c) / c."""
        c = 3**0.5 / torch.pi
        return -(z / (2 * c)).tanh() / c


@dataclass(frozen=True)
class student(Kernel):
    """Student's t in D dimensions: noise sqrt((dof - 2) / chi^2_dof), one chi^2 a sample; dof an integer > 2, variance 1 a dimension.

    grad log k = -(dof + D) z / (dof - 2 + |z|^2). Pandey et al. 2025 (heavy-tailed diffusion, ICLR); Deasy et al. 2021 for other laws.
    """

    dof: int = 5

    def __post_init__(self) -> None:
        check_count(self.dof, "dof", 3)

    def draw(self, noise: Tensor) -> Tensor:
        """z; its chi^2 comes from `own_noise`."""
        chi2 = own_noise(noise).draw(noise.new_empty(len(noise), self.dof, dtype=torch.float64), PROBE).square().sum(1)
        return noise * ((self.dof - 2) / chi2).sqrt().to(noise.dtype).reshape(-1, *[1] * (noise.ndim - 1))

    def score(self, z: Tensor) -> Tensor:
        """-(dof + D) z / (dof - 2 + |z|^2)."""
        square = z.flatten(1).square().sum(1).reshape(-1, *[1] * (z.ndim - 1))
        return -(self.dof + z.shape[1:].numel()) * z / (self.dof - 2 + square)


@dataclass(frozen=True)
class kernel_loss:
    """Score matching of x_t = alpha x0 + sigma z, z of law k: weight sigma^4 / alpha^2 |score - grad log k(z) / sigma|^2 / D, `[B]`.

    In x0: weight |denoiser(x_t, t) - x0 - rho (z + grad log k(z))|^2 / D. The minimum has `denoiser.score` = grad log p_t of the data
    blurred by that kernel; its x0 = (x + sigma^2 score) / alpha is E[x_0 | x_t] for a normal one alone. Samplers that use the score of
    p_t (Langevin) apply; those of the SDE, whose noise is Gaussian, do not. Vincent 2011; Deasy et al. 2021.
    """

    kernel: Kernel

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, Kernel):
            raise TypeError(f"kernel is {shape_of(self.kernel)}; wanted a Kernel such as logistic(): is it a class not yet called?")

    def __call__(self, denoiser: Denoiser, x0: Tensor, t: Tensor, weight: Weight, noise: Tensor | None = None) -> Tensor:
        """The loss `[B]`; noise is unit normal, and `kernel` makes z of it."""
        t, noise = begin(denoiser, x0, t, weight, noise)
        z = self.kernel.draw(noise)
        target = x0 + cast(denoiser.sde.rho(t.double()), x0) * (z + self.kernel.score(z))
        return regression(denoiser, denoiser.sde.perturb(x0, t, z), t, target, weight)


# --- what to compare them by ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GradientVariance:
    """What a training step's gradient g is made of: mean_square = |E g|^2, variance = tr Cov g, both without bias (so either may be < 0).

    stderr: of variance + mean_square = E |g|^2; draws: of g.
    """

    mean_square: float
    variance: float
    stderr: float
    draws: int

    @property
    def relative(self) -> float:
        """Variance / mean_square: batches of that many times the size have a gradient as large as its noise."""
        return self.variance / self.mean_square


def gradient_variance(
    denoiser: Denoiser, x0: Tensor, *, objective: Objective = dsm_loss, weight: Weight = edm, times: Times | None = None,
    batch: int | None = None, draws: int = 64, generator: torch.Generator | None = None,
) -> GradientVariance:  # fmt: skip
    """Measure how noisy a training step is: the gradient of the mean loss over parameters, for `draws` draws of what `fit` would draw.

    x0 `[N, *shape]`: the batch of every draw, or with batch= that many of its rows at random; objective, weight, times: as `fit` has
    them (edm and a stratified log-normal); generator: on the CPU (None: fresh entropy). No .grad is touched, and the denoiser stays in
    the mode it is in. Compare `variance` where the mean is one (times and objectives of one weighted integral), else `relative`.
    """
    check_denoiser(denoiser)
    check_callable(objective, "objective", _OBJECTIVE)
    times = (
        stratified(log_normal) if times is None else check_callable(times, "times", "a function (sde, u) -> times of u in (0, 1)")
    )
    check_count(draws, "draws", 2)
    rows = check_count(len(check_state(x0, "x0")) if batch is None else batch, "batch")
    generator = torch.Generator().manual_seed(entropy_seeds(1)[0]) if generator is None else generator
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {shape_of(generator)}; wanted a torch.Generator: torch.Generator().manual_seed(0)")
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"{type(denoiser).__name__} has no parameters that require a gradient; wanted the denoiser that is trained"
        )
    drawn: Callable[..., Any] = lambda f, *shape, dtype: f(*shape, generator=generator, dtype=dtype).to(x0.device)
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    squares = []
    for _ in range(draws):
        here = x0 if batch is None else x0[(drawn(torch.rand, rows, dtype=torch.float64) * len(x0)).long()]
        u, noise = drawn(torch.rand, rows, dtype=torch.float64), drawn(torch.randn, *here.shape, dtype=here.dtype)
        with torch.enable_grad():
            loss = objective(denoiser, here, times(denoiser.sde, u), weight, noise).mean()
            found = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        for sum_, g in zip(total, found, strict=True):
            sum_ += g
        squares.append(sum(float(g.double().square().sum()) for g in found))
    size = torch.tensor(squares, dtype=torch.float64)
    whole = sum(float(s.square().sum()) for s in total) / draws**2  # |mean g|^2 = |E g|^2 + variance / draws
    variance = (float(size.mean()) - whole) * draws / (draws - 1)
    return GradientVariance(whole - variance / draws, variance, float(size.std()) / draws**0.5, draws)
