"""Closed-form denoisers with densities: the ground truth of the tests and the benchmarks. Everything is computed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_count, check_finite, check_number, check_state, check_time, shape_of
from .denoiser import Denoiser
from .linear import LinearSDE
from .noise import DATA, Noise, entropy_seeds, seeded

__all__ = ["Empirical", "Gaussian", "Mixture"]

_BLOCK = 1 << 22  # entries of the largest intermediate tensor: rows of x are handled in blocks of this size


def _data(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} is {shape_of(value)}; wanted a float tensor: torch.as_tensor({name}, dtype=torch.float64)")
    return check_finite(value.detach().double(), name)


class _Density(Denoiser):
    """A denoiser whose p_t is known: blocks, dtypes and sampling, shared by the laws below. Event shape `shape`, D numbers."""

    def __init__(self, sde: LinearSDE, shape: torch.Size) -> None:
        super().__init__(sde)
        self.shape = shape

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Density:
        # .to(device) moves the constants; .half() and .float() must not round them
        return super()._apply(lambda b: b.to(fn(torch.empty(0, dtype=b.dtype, device=b.device)).device), recurse)

    def _width(self) -> int:
        """Entries of the largest intermediate a row of x costs."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def _solve(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(x0 `[b, D]`, log p_t `[b]`) at x `[b, D]`, alpha and sigma () or `[b, 1]`."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def _blocks(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1:] != self.shape:
            raise ValueError(f"x is {shape_of(x)}; wanted [B, {', '.join(map(str, self.shape))}]")
        size = max(1, _BLOCK // self._width())
        rows = x.flatten(1).double()
        each = [(c.flatten(1).split(size) if c.ndim else [c] * -(-len(x) // size)) for c in (alpha, sigma)]
        parts = [self._solve(*part) for part in zip(rows.split(size), *each, strict=False)]
        if not parts or not len(x):
            return rows, rows.sum(1)
        x0, log_p = zip(*parts, strict=True)
        return torch.cat(x0), torch.cat(log_p)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x], of the shape and dtype of x."""
        t = check_time(t, x).double()
        return self._blocks(x, self.sde.alpha(t), self.sde.sigma(t))[0].to(x.dtype).reshape(x.shape)

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Log p_t(x) in nats, `[B]`, float64; t None is the data's own density (no noise)."""
        check_state(x)
        one = torch.ones((), dtype=torch.float64)
        t = t if t is None else check_time(t, x).double()
        alpha, sigma = (one, 0 * one) if t is None else (self.sde.alpha(t), self.sde.sigma(t))
        log_p = self._blocks(x, alpha, sigma)[1]
        if t is None and bool((log_p.isnan() | (log_p == math.inf)).any()):
            raise ValueError(
                f"{type(self).__name__} has a component of zero variance and no density of its own; pass t= for that of x_t"
            )
        return log_p

    def sample(self, n: int, t: Tensor | None = None, seeds: Any = None) -> Tensor:
        """`n` draws of x_t, float64 `[n, *shape]`; t None draws clean data. seeds: one a draw (default: fresh)."""
        check_count(n, "n", 0)
        noise = seeded(entropy_seeds(n) if seeds is None else seeds)
        like = torch.zeros(n, *self.shape, dtype=torch.float64, device=next(self.buffers()).device)
        x0 = self._draw(noise, like)
        return x0 if t is None else self.sde.perturb(x0, t, noise.draw(like, DATA))

    def _draw(self, noise: Noise, like: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is abstract")


class Mixture(_Density):
    """Mixture of K Gaussians N(m_k, C_k), isotropic to full: C_k = Q_k diag(l_k) Q_k' + (I - Q_k Q_k') diag(c_k).

    With v = alpha^2 C + sigma^2 I, component k says x0 = m_k + alpha C_k v_k^-1 (x - alpha m_k) and weighs N(x; alpha m_k, v_k).

    means `[K, *shape]`; std: a number, `[K]` or `[K, *shape]` (> 0), or None with covariance `[K, D, D]`; weights `[K]` > 0.
    Raises ValueError for shapes that disagree, non-finite numbers, and covariances that are not positive semi-definite.
    """

    means: Tensor
    tail: Tensor
    spectrum: Tensor
    basis: Tensor
    log_weights: Tensor

    def __init__(
        self, sde: LinearSDE, means: Tensor, std: Tensor | float | None = None, *, covariance: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:  # fmt: skip
        means = check_state(_data(means, "means"), "means")
        k, shape = len(means), means.shape[1:]
        if not k:
            raise ValueError(f"means is {shape_of(means)}; wanted at least one component")
        super().__init__(sde, shape)
        d = shape.numel()
        if (std is None) == (covariance is None):
            raise ValueError(f"std is {shape_of(std)}, covariance is {shape_of(covariance)}; wanted exactly one of them")
        if covariance is not None:
            covariance = _data(covariance, "covariance")
            if covariance.shape != (k, d, d):
                raise ValueError(f"covariance is {shape_of(covariance)}; wanted [{k}, {d}, {d}] for means {list(means.shape)}")
            if float((gap := covariance - covariance.mT).abs().max()) > 1e-6 * float(covariance.abs().max()):
                raise ValueError(
                    f"covariance differs from its transpose by {gap.abs().max():.3g}; a Cholesky factor? wanted L @ L.mT"
                )
            spectrum, basis = torch.linalg.eigh((covariance + covariance.mT) / 2)
            if bool((spectrum < -1e-10 * spectrum.abs().amax(1, keepdim=True)).any()):
                raise ValueError(f"covariance has the eigenvalue {spectrum.min():.3g}; wanted positive semi-definite matrices")
            floor = d * torch.finfo(torch.float64).eps * spectrum.amax(1, keepdim=True)  # below is rounding of zero
            self._fill(means, torch.zeros(k, 1), torch.where(spectrum > floor, spectrum, 0.0), basis, weights)
        else:
            std = (
                torch.tensor(check_number(std, "std", 0.0), dtype=torch.float64)
                if not isinstance(std, Tensor)
                else _data(std, "std")
            )
            if std.shape not in ((), (k,), (k, *shape)) or bool((std < 0).any()):
                least = f", least {std.min():.3g}" if std.numel() else ""
                raise ValueError(f"std is {shape_of(std)}{least}; wanted (), [{k}] or {[k, *shape]}, all >= 0")
            tail = (std.double() ** 2).reshape(k, -1) if std.ndim else (std.double() ** 2).expand(k, 1)
            self._fill(means, tail, torch.zeros(k, 0), torch.zeros(k, d, 0), weights)

    def _fill(self, means: Tensor, tail: Tensor, spectrum: Tensor, basis: Tensor, weights: Tensor | None) -> None:
        k = len(means)
        weights = torch.ones(k) if weights is None else _data(weights, "weights")
        if weights.shape != (k,) or bool((weights <= 0).any()):
            least = f", least {weights.min():.3g}" if weights.numel() else ""
            raise ValueError(f"weights is {shape_of(weights)}{least}; wanted [{k}] positive numbers")
        buffers = {"means": means.flatten(1), "tail": tail, "spectrum": spectrum, "basis": basis, "log_weights": weights.log()}
        for name, value in buffers.items():
            self.register_buffer(name, value.double().to(means.device).clone())  # never the caller's own tensor
        self.log_weights = self.log_weights.log_softmax(0)

    def _width(self) -> int:
        return self.means.numel()

    def _solve(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        diff = x[:, None] - alpha * self.means  # [b, K, D]
        d, r = diff.shape[2], self.spectrum.shape[1]
        along = torch.einsum("kdr,bkd->bkr", self.basis, diff)
        rest = diff - torch.einsum("kdr,bkr->bkd", self.basis, along) if r else diff
        var, var_rest = alpha**2 * self.spectrum + sigma**2, alpha**2 * self.tail + sigma**2
        log_p = self.log_weights - d / 2 * math.log(2 * math.pi)
        mean = self.means.expand_as(diff)
        if r:
            log_p = log_p - (along**2 / var + var.log()).sum(2) / 2
            mean = mean + torch.einsum("kdr,bkr->bkd", self.basis, alpha * self.spectrum / var * along)
        if r < d:  # the directions outside the basis share one variance (or, with no basis, each has its own)
            log_p = log_p - ((rest**2 / var_rest).sum(2) + var_rest.log().sum(2) * ((d - r) / var_rest.shape[2])) / 2
            mean = mean + alpha * self.tail / var_rest * rest
        return (log_p.softmax(1)[:, :, None] * mean).sum(1), log_p.logsumexp(1)

    def _draw(self, noise: Noise, like: Tensor) -> Tensor:
        u = noise.uniform(like[:, :1].flatten(1)[:, :1], DATA).flatten()
        k = torch.searchsorted(self.log_weights.exp().cumsum(0), u).clamp(max=len(self.means) - 1)
        z = noise.draw(like, DATA).flatten(1)
        basis, tail, spectrum = self.basis[k], self.tail[k], self.spectrum[k]
        along = torch.einsum("bdr,bd->br", basis, z)
        rest = tail.sqrt() * (z - torch.einsum("bdr,br->bd", basis, along))
        x = self.means[k] + rest + torch.einsum("bdr,br->bd", basis, spectrum.sqrt() * along)
        return x.reshape(like.shape)


class Gaussian(Mixture):
    """One Gaussian N(mean, C): `Gaussian(sde, mean, std)` diagonal, `covariance=` full, `Gaussian.low_rank(...)` for many D.

    mean `[*shape]`; std a number or `[*shape]`; covariance `[D, D]`.
    """

    def __init__(
        self, sde: LinearSDE, mean: Tensor, std: Tensor | float | None = None, *, covariance: Tensor | None = None
    ) -> None:
        if isinstance(mean, Tensor) and mean.ndim == 0:
            raise ValueError("mean is (); wanted an event of at least one dimension: mean[None]")
        std = std[None] if isinstance(std, Tensor) and std.ndim else std
        covariance = covariance[None] if isinstance(covariance, Tensor) else covariance
        super().__init__(sde, mean[None] if isinstance(mean, Tensor) else mean, std, covariance=covariance)

    @classmethod
    def low_rank(cls, sde: LinearSDE, mean: Tensor, factor: Tensor, std: float) -> Gaussian:
        """C = F F' + std^2 I; factor F `[*shape, r]`, r <= D: 3072 dimensions cost r, not 3072^2."""
        law = cls(sde, mean, check_number(std, "std", 0.0))
        factor = _data(factor, "factor")
        if factor.shape[:-1] != mean.shape or factor.shape[-1] > mean.numel():
            raise ValueError(f"factor is {shape_of(factor)}; wanted [*{list(mean.shape)}, r] with r <= {mean.numel()}")
        basis, singular, _ = torch.linalg.svd(factor.flatten(0, -2), full_matrices=False)
        law._fill(mean.double()[None], law.tail, (singular**2 + std**2)[None], basis[None], None)
        return law


class Empirical(_Density):
    """The law of a data set: a Gaussian of deviation `std` (0: a point) on each of N points. 60,000 images of 784 pixels fit.

    x0 = sum_i w_i (m_i + alpha std^2 / v (x - alpha m_i)), w_i = softmax(-|x - alpha m_i|^2 / 2v), v = alpha^2 std^2 + sigma^2,
    by matrix products: no `[B, N, D]` tensor is ever made. points `[N, *shape]`.
    """

    points: Tensor
    centre: Tensor
    squares: Tensor

    def __init__(self, sde: LinearSDE, points: Tensor, std: float = 0.0) -> None:
        points = check_state(_data(points, "points"), "points")
        if not len(points):
            raise ValueError("points has no rows; wanted at least one data point")
        super().__init__(sde, points.shape[1:])
        self.std = check_number(std, "std", 0.0)
        self.register_buffer("points", points.flatten(1))
        self.register_buffer("centre", self.points.mean(0))  # distances from here do not cancel when the data lie far from 0
        self.points = self.points - self.centre
        self.register_buffer("squares", self.points.square().sum(1))

    def _width(self) -> int:
        return len(self.points)

    def _solve(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        y, v = x - alpha * self.centre, alpha**2 * self.std**2 + sigma**2
        distance = y.square().sum(1, keepdim=True) - 2 * alpha * (y @ self.points.T) + alpha**2 * self.squares
        logits = -distance / (2 * v)
        mean = logits.softmax(1) @ self.points
        x0 = self.centre + mean + alpha * self.std**2 / v * (y - alpha * mean)
        constant = math.log(len(self.points)) + y.shape[1] / 2 * torch.log(2 * math.pi * v).flatten()
        return x0, logits.logsumexp(1) - constant

    def _draw(self, noise: Noise, like: Tensor) -> Tensor:
        u = noise.uniform(like[:, :1].flatten(1)[:, :1], DATA).flatten()
        i = (u * len(self.points)).long().clamp(max=len(self.points) - 1)
        return (self.points[i] + self.centre).reshape(like.shape) + self.std * noise.draw(like, DATA)
