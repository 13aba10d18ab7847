"""Problems whose denoiser is known exactly: functions sde -> denoiser, float64.

digits: 64-D full-covariance mixture fitted to the real 8x8 digits; toy: 2-D mixture of nine widths; image: 3072-D Gaussian with an
image-like power law. `Product` is all three at once, for solvers that treat every number of the state alike.
"""

import functools
import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import scoresde

D = torch.float64
RIDGE = 1e-3  # added to the covariance of each class of the digits: pixels that never vary get std 0.032
CLASSES, PIXELS, TOY, IMAGE = 10, 64, 2, 3072
FOLD = 8  # an image of the Product lies over this many rows
ROWS = 128  # of one seed set; the image has ROWS / FOLD rows of 3072 numbers


class Full(scoresde.Mixture):
    """A Mixture of full covariances with the same law and 3x the speed: one product into all eigenbases, one back."""

    def __init__(self, sde: scoresde.LinearSDE, means: Tensor, covariance: Tensor, weights: Tensor) -> None:
        super().__init__(sde, means, covariance=covariance, weights=weights)
        k, d = self.means.shape
        self.bases = self.basis.permute(1, 0, 2).reshape(d, k * d).contiguous()
        self.along = torch.einsum("kdr,kd->kr", self.basis, self.means).flatten()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] at one time t (), `[B, D]`."""
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        v = a**2 * self.spectrum + s**2
        u = torch.addmm(-a * self.along, x, self.bases).view(len(x), *v.shape).mul_(v.rsqrt())
        w = (self.log_weights - v.log().sum(1) / 2 - torch.linalg.vector_norm(u, dim=2).square() / 2).softmax(1)
        u = u.mul_(a * self.spectrum * v.rsqrt()).mul_(w[:, :, None])
        return torch.addmm(w @ self.means, u.flatten(1), self.bases.T)


class Round(scoresde.Mixture):
    """A Mixture of isotropic Gaussians with the same law, in matrix products."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] at one time t (), `[B, D]`."""
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        c = self.tail[:, 0]
        v = a**2 * c + s**2
        far = (x.square().sum(1, keepdim=True) + a**2 * self.means.square().sum(1)).addmm_(x, self.means.T, alpha=-2 * float(a))
        w = (self.log_weights - x.shape[1] / 2 * v.log()).addcdiv(far, v, value=-0.5).softmax(1)
        return torch.addmm((w @ (a * c / v))[:, None] * x, w * (s**2 / v), self.means)


class Diagonal(scoresde.Gaussian):
    """A Gaussian N(0, diag(std^2)) with the same law, in one product."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] at one time t ()."""
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        return x * (a * self.tail[0] / (a**2 * self.tail[0] + s**2))

    def flow(self, x: Tensor) -> Tensor:
        """The probability flow of x from t_max to t_min in closed form: x keeps its number of standard deviations."""
        t, s = (torch.tensor(t, dtype=D) for t in (self.sde.t_max, self.sde.t_min))
        std = [(self.sde.alpha(u) ** 2 * self.tail[0] + self.sde.sigma(u) ** 2).sqrt() for u in (t, s)]
        return x * std[1] / std[0]


@functools.cache
def fitted() -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariances and shares of the ten classes of sklearn's digits, pixels scaled from 0..16 to [-1, 1]."""
    data = load_digits()
    x, y = torch.as_tensor(data.data, dtype=D) / 8 - 1, torch.as_tensor(data.target)
    groups = [x[y == k] for k in range(CLASSES)]
    covariance = torch.stack([torch.cov(g.T) for g in groups]) + RIDGE * torch.eye(PIXELS, dtype=D)
    return torch.stack([g.mean(0) for g in groups]), covariance, torch.tensor([len(g) / len(x) for g in groups], dtype=D)


def digits(sde: scoresde.LinearSDE) -> Full:
    """One full-covariance component a class, weighted by its share, ridge RIDGE."""
    return Full(sde, *fitted())


def toy(sde: scoresde.LinearSDE) -> Round:
    """Eight on a ring of radius 1.5, std from 0.1 to 0.3, and a narrow one, std 0.03, at the centre."""
    angle = torch.arange(8, dtype=D) * math.pi / 4
    ring = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    means = torch.cat([ring, torch.zeros(1, 2, dtype=D)])
    std = torch.tensor([0.1, 0.2, 0.3, 0.2] * 2 + [0.03], dtype=D)
    return Round(sde, means, std, weights=torch.tensor([1.0, 1.0, 2.0, 1.0] * 2 + [1.0], dtype=D))


def image(sde: scoresde.LinearSDE) -> Diagonal:
    """std_i = c i^-1.25, i = 1..3072, 0.5 in the root mean square: from 24 down to 1.0e-3."""
    std = torch.arange(1, IMAGE + 1, dtype=D) ** -1.25
    return Diagonal(sde, torch.zeros(IMAGE, dtype=D), std * 0.5 / std.square().mean().sqrt())


PROBLEMS = {"digits": digits, "toy": toy, "image": image}
SDES = {"VP": scoresde.VP, "VE": scoresde.VE, "EDM": scoresde.EDM}


class Product(scoresde.Denoiser):
    """The three problems side by side, `[B, 64 + 2 + 384]`: eight rows hold one image. One solve of it is a solve of each.

    Right for solvers that treat every number of the state alike (no norm over the state, no step chosen from it).
    """

    def __init__(self, sde: scoresde.LinearSDE) -> None:
        super().__init__(sde)
        self.digits, self.toy, self.image = (make(sde) for make in PROBLEMS.values())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x] at one time t ()."""
        return join({name: getattr(self, name)(part, t) for name, part in split(x).items()})


def split(x: Tensor) -> dict[str, Tensor]:
    """The states of the three problems, in a state of the Product."""
    one, two, rest = x.split([PIXELS, TOY, IMAGE // FOLD], 1)
    return {"digits": one, "toy": two, "image": rest.reshape(-1, IMAGE)}


def join(parts: dict[str, Tensor]) -> Tensor:
    """A state of the Product from the states of the three problems."""
    return torch.cat([parts["digits"], parts["toy"], parts["image"].reshape(-1, IMAGE // FOLD)], 1)


def check() -> float:
    """Largest relative difference of the fast denoisers from scoresde's own."""
    worst = 0.0
    for kind in SDES.values():
        sde = kind()
        for make in PROBLEMS.values():
            law = make(sde)
            for t in torch.linspace(sde.t_min, sde.t_max, 7, dtype=D):
                x = law.sample(64, t, seeds=range(64))
                fast, plain = law(x, t), scoresde.Mixture.forward(law, x, t)
                worst = max(worst, float((fast - plain).abs().max() / plain.abs().max()))
    return worst


if __name__ == "__main__":
    print(f"fast denoisers against scoresde's: {check():.1e}")
