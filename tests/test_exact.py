"""The closed forms that everything else is measured against, themselves measured against quadrature, autograd and each other."""

import math
import resource

import numpy as np
import pytest
import torch
from laws import SIX, D, every_sde, mixture
from scipy.integrate import quad

from scoresde import VP, Empirical, Gaussian, Mixture, exact
from scoresde.noise import seeded
from scoresde.sde import SDE

SDES = every_sde()


def normals(*shape, first=0):
    return seeded(range(first, first + shape[0])).initial(shape, D)


def at(sde, share):
    return torch.tensor(sde.t_min + share * (sde.t_max - sde.t_min), dtype=D)


POINTS = normals(5, 3, first=50)
COVARIANCES = torch.stack([m @ m.T + 0.1 * torch.eye(3, dtype=D) for m in normals(2, 3, 3, first=80)])
LAWS = {
    "isotropic": lambda sde: Mixture(sde, POINTS, torch.linspace(0.2, 0.9, 5, dtype=D), weights=torch.arange(1.0, 6.0, dtype=D)),
    "diagonal": lambda sde: Mixture(sde, POINTS, 0.2 + normals(5, 3).abs()),
    "full": lambda sde: Mixture(sde, POINTS[:2], covariance=COVARIANCES, weights=torch.tensor([0.3, 0.7], dtype=D)),
    "low_rank": lambda sde: Gaussian.low_rank(sde, POINTS[0], normals(3, 2, first=9), 0.4),
    "singular": lambda sde: Gaussian(sde, POINTS[0], covariance=torch.outer(POINTS[1], POINTS[1])),
    "points": lambda sde: Empirical(sde, POINTS),
    "smooth points": lambda sde: Empirical(sde, POINTS, std=0.3),
}


# --- score and mean ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(SDES))
@pytest.mark.parametrize("law", LAWS)
def test_score_is_the_gradient_of_log_p(law, name):
    sde = SDES[name]
    denoiser = LAWS[law](sde)
    for share in (0.0, 0.05, 0.5, 1.0):
        t = at(sde, share)
        x = (sde.alpha(t) * POINTS.mean(0) + sde.alpha(t).hypot(sde.sigma(t)) * normals(6, 3, first=20)).requires_grad_()
        gradient = torch.autograd.grad(denoiser.log_prob(x, t).sum(), x)[0]
        score = denoiser.score(x, t)
        # score = (alpha x0 - x) / sigma^2 subtracts numbers of size x: its rounding is x / sigma^2
        slack = 1e-13 * float(x.detach().abs().max() / sde.sigma(t) ** 2)
        assert torch.allclose(score, gradient, rtol=1e-9, atol=1e-9 + slack)


@pytest.mark.parametrize("name", SIX)
def test_posterior_mean_and_density_by_quadrature(name):
    """One dimension: E[x0 | x] = int x0 p(x0) N(x; alpha x0, sigma^2) dx0 / p_t(x), and p_t(x) is the denominator."""
    sde = SDES[name]
    means, std, weights = [-1.0, 0.4, 2.0], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3]
    law = Mixture(sde, torch.tensor(means, dtype=D)[:, None], torch.tensor(std, dtype=D), weights=torch.tensor(weights, dtype=D))

    def normal(x, m, s):
        return math.exp(-(((x - m) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))

    for share in (0.3, 0.6):
        t = at(sde, share)
        a, b = float(sde.alpha(t)), float(sde.sigma(t))
        for x in (-2.0 * (a + b), 0.3 * (a + b)):
            joint = lambda u: sum(w * normal(u, m, s) for w, m, s in zip(weights, means, std, strict=True)) * normal(x, a * u, b)
            peaks = sorted({*means, min(max(x / a, -4.0), 5.0)})
            p = quad(joint, -6, 7, points=peaks, epsrel=1e-12, limit=500)[0]
            mean = quad(lambda u: u * joint(u), -6, 7, points=peaks, epsrel=1e-12, limit=500)[0] / p
            state = torch.tensor([[x]], dtype=D)
            assert float(law(state, t)) == pytest.approx(mean, rel=1e-8, abs=1e-10)
            assert float(law.log_prob(state, t)) == pytest.approx(math.log(p), rel=1e-8, abs=1e-10)


def test_the_mean_of_points_is_their_weighted_sum():
    sde = VP()
    law = Empirical(sde, POINTS)
    for share in (0.01, 0.3, 0.9):
        t = at(sde, share)
        a, b = sde.alpha(t), sde.sigma(t)
        x = a * POINTS[:2] + b * normals(2, 3)
        weights = torch.exp(-((x[:, None] - a * POINTS) ** 2).sum(2) / (2 * b**2))
        assert torch.allclose(law(x, t), (weights / weights.sum(1, keepdim=True)) @ POINTS, rtol=1e-10)
        log_p = (weights.mean(1) / (2 * math.pi * b**2) ** 1.5).log()
        assert torch.allclose(law.log_prob(x, t), log_p, rtol=1e-10)


def test_the_conditional_mean_of_a_gaussian_is_the_textbook_one():
    """E[x0 | x] = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x - alpha m)."""
    sde, c, m = VP(), COVARIANCES[0], POINTS[0]
    law, t, x = Gaussian(sde, m, covariance=c), at(VP(), 0.2), normals(4, 3)
    a, b = sde.alpha(t), sde.sigma(t)
    v = a**2 * c + b**2 * torch.eye(3, dtype=D)
    assert torch.allclose(law(x, t), m + a * torch.linalg.solve(v, (x - a * m).T).T @ c, rtol=1e-12)
    truth = torch.distributions.MultivariateNormal(a * m, v).log_prob(x)
    assert torch.allclose(law.log_prob(x, t), truth, rtol=1e-12)
    clean = torch.distributions.MultivariateNormal(m, c).log_prob(x)
    assert torch.allclose(law.log_prob(x), clean, rtol=1e-12)


@pytest.mark.parametrize("name", SIX)
def test_denoising_is_the_identity_without_noise_and_the_mean_in_pure_noise(name):
    sde = SDES[name]
    law = Gaussian(sde, POINTS[0], 0.5)
    first, last = at(sde, 0.0), at(sde, 1.0)
    x0 = POINTS[0] + 0.5 * normals(4, 3)
    assert (law(sde.alpha(first) * x0, first) - x0).abs().max() < 10 * float(sde.rho(first))
    assert (law(sde.sigma(last) * normals(4, 3), last) - POINTS[0]).abs().max() < 3 / float(sde.rho(last))


# --- one law, many spellings ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
def test_isotropic_diagonal_full_and_low_rank_agree(name):
    sde, mean, std = SDES[name], POINTS[0], 0.7
    spellings = [
        Gaussian(sde, mean, std),
        Gaussian(sde, mean, torch.tensor(std, dtype=D)),
        Gaussian(sde, mean, torch.full((3,), std, dtype=D)),
        Gaussian(sde, mean, covariance=std**2 * torch.eye(3, dtype=D)),
        Gaussian.low_rank(sde, mean, torch.zeros(3, 2, dtype=D), std),
        Gaussian.low_rank(sde, mean, math.sqrt(std**2 - 0.01) * torch.eye(3, dtype=D), 0.1),
        Mixture(sde, mean[None], std),
        Mixture(sde, mean.expand(4, 3), std, weights=torch.arange(1.0, 5.0, dtype=D)),
        Empirical(sde, mean[None], std),
    ]
    for share in (0.0, 0.1, 0.6, 1.0):
        t = at(sde, share)
        x = sde.alpha(t) * mean + sde.alpha(t).hypot(sde.sigma(t)) * normals(5, 3)
        x0, log_p = spellings[0](x, t), spellings[0].log_prob(x, t)
        for law in spellings[1:]:
            # log p squares x / sigma, of which each spelling rounds another form
            assert (law(x, t) - x0).abs().max() <= 1e-12 * max(1.0, float(x0.abs().max()))
            assert (law.log_prob(x, t) - log_p).abs().max() <= 1e-12 * max(1.0, float(log_p.abs().max()))


@pytest.mark.parametrize("name", SIX)
def test_a_low_rank_covariance_is_its_full_matrix(name):
    sde, factor = SDES[name], normals(4, 2, first=30)
    mean = normals(1, 4, first=40)[0]
    full = factor @ factor.T + 0.3**2 * torch.eye(4, dtype=D)
    a, b = Gaussian.low_rank(sde, mean, factor, 0.3), Gaussian(sde, mean, covariance=full)
    for share in (0.0, 0.2, 0.9):
        t, x = at(sde, share), normals(5, 4)
        assert torch.allclose(a(x, t), b(x, t), rtol=1e-11, atol=1e-11)
        assert torch.allclose(a.log_prob(x, t), b.log_prob(x, t), rtol=1e-11)
    assert torch.allclose(a.log_prob(x), b.log_prob(x), rtol=1e-11)


@pytest.mark.parametrize("std", [0.0, 0.05, 0.8])
@pytest.mark.parametrize("name", SIX)
def test_empirical_is_the_isotropic_mixture_at_its_points(name, std):
    sde = SDES[name]
    points = 3.0 + normals(40, 2, 3, first=100)  # away from 0, where the expanded square would cancel
    a, b = Empirical(sde, points, std), Mixture(sde, points, std)
    for share in (0.0, 0.05, 0.5, 1.0):
        t = at(sde, share)
        x = sde.alpha(t) * points[:7] + sde.sigma(t) * normals(7, 2, 3)
        assert torch.allclose(a(x, t), b(x, t), rtol=1e-8, atol=1e-8)
        assert torch.allclose(a.log_prob(x, t), b.log_prob(x, t), rtol=1e-8, atol=1e-8)
    if std:
        assert torch.allclose(a.log_prob(points[:7]), b.log_prob(points[:7]), rtol=1e-10)


@pytest.mark.parametrize("law", LAWS)
def test_events_may_have_any_shape(law):
    """The event is flattened and restored: an image is a vector."""
    flat = LAWS[law](VP())
    t, x = at(VP(), 0.3), normals(4, 3)
    square = normals(4, 2, 2, first=7)
    assert flat(x, t).shape == x.shape
    for image in (Gaussian(VP(), square[0], 0.3), Empirical(VP(), square, 0.1), Mixture(VP(), square, 0.2 + square.abs())):
        assert image(square, t).shape == square.shape
        assert image.sample(3).shape == (3, 2, 2)
    vector = Mixture(VP(), square.flatten(1), (0.2 + square.abs()).flatten(1))
    assert torch.allclose(vector(square.flatten(1), t), image(square, t).flatten(1), rtol=1e-13)


# --- shapes, dtypes, blocks ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("law", LAWS)
def test_a_time_a_row_is_the_same_as_one_time(law, name):
    sde = SDES[name]
    denoiser, x = LAWS[law](sde), normals(6, 3)
    t = at(sde, 0.4)
    assert torch.allclose(denoiser(x, t.expand(6, 1)), denoiser(x, t), rtol=1e-13, atol=1e-13)
    assert torch.allclose(denoiser.log_prob(x, t.expand(6, 1)), denoiser.log_prob(x, t), rtol=1e-12)
    each = torch.stack([at(sde, share) for share in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)])
    rows = torch.cat([denoiser(x[i : i + 1], each[i]) for i in range(6)])
    assert torch.allclose(denoiser(x, each[:, None]), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_float32_comes_back_as_float32_and_is_computed_in_float64(law):
    sde = VP()
    denoiser, x, t = LAWS[law](sde), normals(6, 3).float(), at(VP(), 0.02)
    low, high = denoiser(x, t), denoiser(x.double(), t)
    assert low.dtype == torch.float32
    assert torch.equal(low, high.float())
    assert denoiser.log_prob(x, t).dtype == D
    assert torch.equal(denoiser.log_prob(x, t), denoiser.log_prob(x.double(), t))
    assert denoiser.predict(x, t.expand(6, 1)).eps.dtype == torch.float32
    assert denoiser.predict(x, t).score.dtype == torch.float32


@pytest.mark.parametrize("law", LAWS)
def test_blocks_give_the_same(law, monkeypatch):
    sde = VP()
    denoiser, x, t = LAWS[law](sde), normals(11, 3), at(VP(), 0.3)
    each = (t + torch.linspace(0, 0.5, 11, dtype=D))[:, None]
    whole = denoiser(x, t), denoiser(x, each), denoiser.log_prob(x, t), denoiser.log_prob(x, each)
    for size in (1, 40, 64):  # a row a block, and a ragged last block
        monkeypatch.setattr(exact, "_BLOCK", size)
        parts = denoiser(x, t), denoiser(x, each), denoiser.log_prob(x, t), denoiser.log_prob(x, each)
        for a, b in zip(whole, parts, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_half_does_not_round_the_constants_and_states_round_trip(law):
    x, t = normals(6, 3), at(VP(), 0.1)
    denoiser = LAWS[law](VP())
    before, density = denoiser(x, t), denoiser.log_prob(x, t)
    for cast in ("half", "bfloat16", "float"):
        getattr(denoiser, cast)()
        assert torch.equal(denoiser(x, t), before)
        assert torch.equal(denoiser.log_prob(x, t), density)
    denoiser.to(torch.float16)
    assert all(b.dtype == D for b in denoiser.buffers())
    other = LAWS[law](VP())
    for buffer in other.buffers():
        buffer.add_(1.0)
    other.load_state_dict(denoiser.state_dict())
    assert torch.equal(other(x, t), before)


@pytest.mark.parametrize("law", LAWS)
def test_a_law_does_not_hold_the_callers_tensors(law):
    points, covariances = POINTS.clone(), COVARIANCES.clone()
    denoiser = LAWS[law](VP())
    for buffer in denoiser.buffers():
        buffer.fill_(7.0)
    assert torch.equal(points, POINTS)
    assert torch.equal(covariances, COVARIANCES)


def test_a_number_for_std_is_not_rounded_to_float32():
    assert float(Gaussian(VP(), torch.zeros(1), 0.7).tail) == 0.7**2
    assert float(Gaussian.low_rank(VP(), torch.zeros(2), torch.ones(2, 1), 0.7).tail) == 0.7**2


# --- sampling ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_samples_have_the_moments_of_the_law(law, noisy):
    """Mean and covariance of 20,000 draws against quadrature-free closed forms: 5 sigma."""
    sde, n = VP(), 20_000
    denoiser = LAWS[law](sde)
    t = at(sde, 0.3) if noisy else None
    a, b = (sde.alpha(t), sde.sigma(t)) if noisy else (torch.tensor(1.0, dtype=D), torch.tensor(0.0, dtype=D))
    mean, second = moments(denoiser)
    mean, second = a * mean, a**2 * second + b**2 * torch.eye(3, dtype=D)
    x = denoiser.sample(n, t, seeds=range(n))
    error = (x.mean(0) - mean).abs()
    assert (error < 5 * x.std(0) / math.sqrt(n) + 1e-12).all()
    products = x[:, :, None] * x[:, None, :]
    assert ((products.mean(0) - second).abs() < 5 * products.std(0) / math.sqrt(n) + 1e-12).all()


def moments(law):
    """E[x0] and E[x0 x0'] from the components that a law holds."""
    if isinstance(law, Empirical):
        points = law.points + law.centre
        return points.mean(0), points.T @ points / len(points) + law.std**2 * torch.eye(3, dtype=D)
    w, eye = law.log_weights.exp(), torch.eye(3, dtype=D)
    inside = law.basis @ torch.diag_embed(law.spectrum) @ law.basis.mT
    outside = (eye - law.basis @ law.basis.mT) @ torch.diag_embed(law.tail.expand(-1, 3))
    second = inside + outside + law.means[:, :, None] * law.means[:, None, :]
    return w @ law.means, (w[:, None, None] * second).sum(0)


@pytest.mark.parametrize("law", LAWS)
def test_samples_are_a_function_of_their_seed_alone(law):
    denoiser, t = LAWS[law](VP()), at(VP(), 0.4)
    for when in (None, t):
        whole = denoiser.sample(9, when, seeds=range(9))
        assert torch.equal(whole, denoiser.sample(9, when, seeds=range(9)))
        assert torch.equal(whole[3:5], denoiser.sample(2, when, seeds=[3, 4]))
        assert torch.equal(whole.flip(0), denoiser.sample(9, when, seeds=list(range(9))[::-1]))
        assert not torch.equal(denoiser.sample(9, when), denoiser.sample(9, when))
    assert whole.dtype == D


def test_components_are_drawn_with_their_weights():
    weights = torch.tensor([0.05, 0.15, 0.8], dtype=D)
    law = Mixture(VP(), torch.tensor([[-10.0], [0.0], [10.0]], dtype=D), 0.1, weights=3 * weights)
    n = 20_000
    counts = torch.bincount((law.sample(n, seeds=range(n)).flatten() / 10).round().long() + 1, minlength=3) / n
    assert ((counts - weights).abs() < 5 * (weights * (1 - weights) / n).sqrt()).all()


def test_samples_follow_log_p():
    """E[log p(x)] over draws is minus the entropy: 1.5 (1 + log 2 pi) + log det / 2 for a Gaussian."""
    c, n = COVARIANCES[0], 20_000
    law = Gaussian(VP(), POINTS[0], covariance=c)
    log_p = law.log_prob(law.sample(n, seeds=range(n)))
    entropy = 1.5 * (1 + math.log(2 * math.pi)) + float(torch.logdet(c)) / 2
    assert abs(float(log_p.mean()) + entropy) < 5 * float(log_p.std()) / math.sqrt(n)


# --- densities -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
def test_densities_integrate_to_one(name):
    sde = SDES[name]
    laws = [mixture(sde), Gaussian(sde, POINTS[0, :2], covariance=COVARIANCES[0, :2, :2]), Empirical(sde, POINTS[:, :2], 0.4)]
    for law in laws:
        for t in (None, at(sde, 0.3), at(sde, 1.0)):
            a, b = (1.0, 0.0) if t is None else (float(sde.alpha(t)), float(sde.sigma(t)))
            half = 5 * a + 8 * math.hypot(a, b)
            axis = torch.linspace(-half, half, 401, dtype=D)
            grid = torch.cartesian_prod(axis, axis)
            total = law.log_prob(grid, t).exp().sum() * (axis[1] - axis[0]) ** 2
            assert abs(float(total) - 1) < 1e-6


# --- size ----------------------------------------------------------------------------------------------------------------
def test_3072_dimensions_of_low_rank_are_cheap():
    d, r = 3072, 16
    factor = seeded([0]).initial((1, d, r), D)[0]
    mean = seeded([1]).initial((1, d), D)[0]
    law, t, x = Gaussian.low_rank(VP(), mean, factor, 0.1), at(VP(), 0.2), normals(8, d)
    assert sum(b.numel() for b in law.buffers()) < 20 * d  # not d^2
    a, b = law.sde.alpha(t), law.sde.sigma(t)
    # Woodbury: v = a^2 F F' + s I with s = a^2 std^2 + b^2, whose inverse needs r x r alone
    s = float(a**2 * 0.01 + b**2)
    diff = x - a * mean
    small = s * torch.eye(r, dtype=D) + a**2 * factor.T @ factor
    solved = (diff - a**2 * (diff @ factor) @ torch.linalg.solve(small, factor.T)) / s
    assert torch.allclose(law.score(x, t), -solved, rtol=1e-8, atol=1e-10)
    log_det = (d - r) * math.log(s) + float(torch.logdet(small))
    log_p = -((diff * solved).sum(1) + log_det + d * math.log(2 * math.pi)) / 2
    assert torch.allclose(law.log_prob(x, t), log_p, rtol=1e-10)
    assert law.sample(2, t).shape == (2, d)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB


def test_sixty_thousand_images_fit_in_memory():
    """60,000 points of 784 pixels, a batch of 64: the data (0.35 GiB in float64) and [64, 60000] weights, never [B, N, D] (22 GiB)."""
    before = peak()
    points = torch.from_numpy(np.random.default_rng(0).random((60_000, 1, 28, 28)))
    law = Empirical(VP(), points, std=0.05)
    t = at(VP(), 0.05)
    x = law.sde.perturb(points[:64], t, normals(64, 1, 28, 28))
    x0 = law(x, t)
    assert x0.shape == x.shape
    assert (x0 - points[:64]).abs().max() < 0.5  # each is nearest to the image it came from
    assert peak() - before < 3.0


def test_every_law_here_is_a_denoiser_of_a_linear_sde():
    assert {"Empirical", "Gaussian", "Mixture"} == set(exact.__all__)
    assert all(isinstance(LAWS[law](VP()).sde, SDE) for law in LAWS)
