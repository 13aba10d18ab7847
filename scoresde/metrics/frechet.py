"""The Fréchet distance between Gaussians, the statistics it needs, and FID."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.metrics.inputs import Array, samples, tensor

__all__ = ["Statistics", "Terms", "check_covariance", "fid", "frechet_distance", "frechet_terms"]

TOLERANCE = 1e-4  # how far from symmetric and positive a covariance may be, relative: float32 sums reach 1e-5


@dataclass
class Statistics:
    """Mean and covariance of a stream of samples, in float64, to rounding whatever their offset.

    Kept are n, the mean and the scatter S = sum (x - mean)(x - mean)^T. Two parts a and b join by
    mean = mean_a + (n_b / n) d and S = S_a + S_b + (n_a n_b / n) d d^T, with d = mean_b - mean_a: the running mean is
    the shift, so nothing large is subtracted (raw sums of squares lose all digits at an offset of 1e8).

    Args:
        n: the number of samples so far.
        mean: [D] float64.
        scatter: [D, D] float64.

    Source: Chan, Golub and LeVeque 1979, the pairwise update, with an outer product in place of the square.
    """

    n: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))

    def update(self, features: Array) -> Statistics:
        """Add the rows of `features` and return self.

        Args:
            features: [N, D], N >= 1, any real dtype.

        Raises:
            TypeError, ValueError: not a finite [N, D], or another D than before.
        """
        x = samples(features, "features", least=1)
        mean = x.mean(0)
        centred = x - mean
        return self.merge(Statistics(len(x), mean, centred.T @ centred))

    def merge(self, other: Statistics) -> Statistics:
        """Add the samples that `other` has seen and return self; `other` is left as it is.

        Raises:
            ValueError: the dimensions differ.
        """
        if not other.n:
            return self
        if not self.n:
            self.n, self.mean, self.scatter = other.n, other.mean.clone(), other.scatter.clone()
            return self
        if self.mean.shape != other.mean.shape:
            a, b = len(self.mean), len(other.mean)
            raise ValueError(f"features have D = {b}; wanted D = {a}, as before: use one extractor for all samples")
        n = self.n + other.n
        d = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + (self.n * other.n / n) * torch.outer(d, d)
        self.mean = self.mean + d * (other.n / n)
        self.n = n
        return self

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance S / (n - 1), [D, D].

        Raises:
            ValueError: fewer than 2 samples.
        """
        if self.n < 2:
            raise ValueError(f"a covariance of {self.n} samples; wanted at least 2: update(features) with more")
        return self.scatter / (self.n - 1)


class Terms(NamedTuple):
    """A squared Fréchet distance and what it is made of: mean + trace1 + trace2 - 2 cross, not below 0."""

    distance: float
    mean: float  # |m1 - m2|^2
    trace1: float  # tr C1
    trace2: float
    cross: float  # tr (C1^{1/2} C2 C1^{1/2})^{1/2}


def frechet_terms(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> Terms:
    """Return the squared Fréchet distance with its terms: `frechet_distance` says of what."""
    m1, m2 = tensor(mean1, "mean1", 1), tensor(mean2, "mean2", 1)
    if m1.shape != m2.shape or not len(m1):
        raise ValueError(f"mean1 has D = {len(m1)} and mean2 D = {len(m2)}; wanted the same D >= 1: use one extractor")
    root1, trace1 = _root(tensor(cov1, "cov1", 2), "cov1", len(m1))
    root2, trace2 = _root(tensor(cov2, "cov2", 2), "cov2", len(m1))
    # Singular values, not roots of the eigenvalues of C1^{1/2} C2 C1^{1/2}: an eigenvalue that should be 0 comes out
    # as 1e-16 and its root as 1e-8, once for each of the D - N directions that a small sample leaves empty.
    cross = torch.linalg.svdvals(root1.T @ root2).sum()
    mean = (m1 - m2).square().sum()
    # Rounding can leave -1e-15, whose root would be NaN.
    return Terms(max(float(mean + trace1 + trace2 - 2 * cross), 0.0), *map(float, (mean, trace1, trace2, cross)))


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians, computed in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^{1/2} C2 C1^{1/2})^{1/2}). With C = V diag(l) V^T the last trace is the sum of the
    singular values of diag(l1)^{1/2} V1^T V2 diag(l2)^{1/2}.

    Args:
        mean1: [D].
        cov1: [D, D], symmetric and positive semi-definite; a singular one is fine.
        mean2: [D].
        cov2: [D, D], as cov1.

    Raises:
        TypeError, ValueError: not finite, shapes that differ, a matrix that is not a covariance.

    Source: Dowson and Landau 1982.
    """
    return frechet_terms(mean1, cov1, mean2, cov2).distance


def check_covariance(cov: Array, name: str) -> None:
    """Raise ValueError unless this is a covariance [D, D]: finite, symmetric, no eigenvalue below 0 but for rounding."""
    x = tensor(cov, name, 2)
    _root(x, name, len(x))


def _root(cov: Tensor, name: str, dim: int) -> tuple[Tensor, Tensor]:
    """Return R with cov = R R^T, and the trace; raise unless cov is a [dim, dim] covariance."""
    if cov.shape != (dim, dim):
        raise ValueError(f"{name} has shape {list(cov.shape)}; wanted [{dim}, {dim}], as the means say: np.atleast_2d(...)")
    if (asymmetry := float((cov - cov.T).abs().max())) > TOLERANCE * float(cov.abs().max()):
        raise ValueError(f"{name} differs from its transpose by {asymmetry:.3g}; wanted a covariance: ({name} + {name}.T) / 2")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    if float(values[0]) < -TOLERANCE * float(values.abs().max()):
        raise ValueError(f"{name} has the eigenvalue {float(values[0]):.3g}; wanted none below 0: a covariance has none")
    # What eigh cannot tell from 0 is 0: the root of its 1e-17 would be 3e-9 of noise a direction.
    values = values.where(values > dim * torch.finfo(values.dtype).eps * values[-1], 0)
    return vectors * values.sqrt(), values.sum()


def fid(samples_features: Array, reference_features: Array) -> float:
    """Return the Fréchet distance of the Gaussians fitted to two sets of features.

    FID proper is this with the Inception features of images; the number depends on the extractor and, by a bias of
    order 1 / N, on the number of samples: compare at equal N.

    Args:
        samples_features: [N, D].
        reference_features: [M, D].

    Raises:
        TypeError, ValueError: not finite, fewer than 2 rows, another D.

    Source: Heusel et al. 2017, eq. 6.
    """
    x, y = samples(samples_features, "samples_features"), samples(reference_features, "reference_features")
    a, b = Statistics().update(x), Statistics().update(y)
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)
