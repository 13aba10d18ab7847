"""The variational bound: each term against its closed form on Gaussians, and against the entropy of discrete laws."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from laws import SIX, D, every_sde, gaussian_law, mixture
from torch import nn

import scoresde as s
from scoresde import EDM, VP, Gaussian, Mixture, Quantized, Wrapped
from scoresde.bounds import FLOOR, _decoder, elbo
from scoresde.checks import NonFiniteError
from scoresde.grid import logsnr
from scoresde.noise import seeded

SDES = every_sde()
FIELDS = ("value", "stderr", "prior", "matching", "reconstruction", "variance")
NODES = torch.linspace(0, 1, 4001, dtype=D)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.1], [0.6, 0.5, 0.05], [0.1, 0.05, 0.03]], dtype=D)
MEAN = torch.tensor([0.4, -0.2, 0.1], dtype=D)


def gaussian(name):
    return Gaussian(SDES[name], MEAN, covariance=COVARIANCE)


def ends(sde):
    """(t_max, t_min)."""
    return torch.tensor([sde.t_max, sde.t_min], dtype=D)


def axis(sde):
    """logsnr from t_max to t_min, finely."""
    a, b = sde.logsnr(ends(sde))
    return a + NODES * (b - a)


def simpson(y, x):
    """Of y `[..., n]` on even x `[n]`, n odd."""
    w = torch.full_like(x, 2.0)
    w[1::2], w[0], w[-1] = 4.0, 1.0, 1.0
    return (y * w).sum(-1) * (x[1] - x[0]) / 3


def error_law(law, x, lam):
    """Mean and variance `[B, n]` of |x0 - x0_hat(x_t)|^2 over eps, of a Gaussian's exact x0: the error is (1 - g) y - g rho eps."""
    spectrum = law.spectrum[0] if law.spectrum.numel() else law.tail[0].expand(law.means.shape[1])
    basis = law.basis[0] if law.spectrum.numel() else torch.eye(len(spectrum), dtype=D)
    y = ((x.flatten(1) - law.means[0]) @ basis)[:, None]
    snr = lam.exp()[:, None]
    g = spectrum * snr / (1 + spectrum * snr)
    a, b = ((1 - g) * y) ** 2, g**2 / snr
    return (a + b).sum(2), (2 * b**2 + 4 * a * b).sum(2)


def matching(law, x):
    """The matching term in continuous time."""
    lam = axis(law.sde)
    return simpson(error_law(law, x, lam)[0] * lam.exp() / 2, lam)


def chain_matching(law, x, times):
    """The matching term of the ancestral chain."""
    lam = law.sde.logsnr(times)
    return (error_law(law, x, lam[:-1])[0] * lam.exp().diff() / 2).sum(1)


def closed(law, x, last=None):
    """(prior, reconstruction) as written on paper."""
    first, t_min = ends(law.sde)
    sde, last, d = law.sde, t_min if last is None else last, x[0].numel()
    a, v, w = sde.alpha(first), sde.sigma(first) ** 2, sde.prior_std() ** 2
    prior = (a**2 * x.flatten(1).square().sum(1) / w + d * (v / w - 1 - (v / w).log())) / 2
    return prior, torch.full_like(prior, d / 2 * float((2 * math.pi * math.e * sde.rho(last) ** 2).log()))


def model_law(law):
    """Mean and covariance of the decoded model: N(0, prior_std^2 I) at t_max, the exact reverse SDE, and the decoder at t_min."""
    sde = law.sde
    first, last = ends(sde)
    (m1, v1), (m0, v0) = gaussian_law(law, first), gaussian_law(law, last)
    scale, _ = sde.transition(last, first)
    gain = scale * v0 @ torch.linalg.inv(v1)  # x_0 = m0 + gain (x_1 - m1) + noise, under the exact law
    cov = v0 + gain @ (sde.prior_std() ** 2 * torch.eye(len(m0), dtype=D) - v1) @ gain.T
    a = sde.alpha(last)
    return (m0 - gain @ m1) / a, (cov + cov.T) / (2 * a**2) + sde.rho(last) ** 2 * torch.eye(len(m0), dtype=D)


def constant(sde, value=0.3):
    """A network that always says the same: the error has no randomness."""
    return Wrapped.from_x0(lambda x, t: torch.full_like(x, value), sde)


def unet(sde=None, classes=0):
    """A network of images (1, 4, 4) in float64, away from its zero start."""
    net = s.UNet((1, 4, 4), channels=8, classes=classes).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * seeded([i]).initial((1, *p.shape), D)[0])
    return s.Preconditioned(net, sde or VP())


# --- each term against its closed form -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SDES)
def test_every_term_is_the_closed_form(name):
    law = gaussian(name)
    x = torch.cat([law.sample(62, seeds=range(62)), torch.tensor([[0.0, 0.0, 0.0], [3.0, -2.0, 1.0]], dtype=D)])
    found = elbo(law, x, samples=100, seeds=range(64))
    prior, reconstruction = closed(law, x)
    assert torch.allclose(found.prior, prior, rtol=1e-10)
    assert torch.allclose(found.reconstruction, reconstruction, rtol=1e-10)
    truth = matching(law, x)
    error = found.matching - truth
    print(f"{name}: z {float((error / found.stderr).abs().max()):.2f}, of the mean {float(error.sum() / found.stderr.norm()):.2f}")
    assert (error / found.stderr).abs().max() < 5
    assert abs(float(error.sum() / found.stderr.norm())) < 5
    assert torch.equal(found.value, -(found.prior + found.matching + found.reconstruction))


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("samples", [1, 5])
def test_unbiased_at_any_number_of_draws(name, samples):
    law = gaussian(name)
    x = torch.tensor([[0.9, -0.7, 0.3]], dtype=D).expand(4000, 3)
    found = elbo(law, x, samples=samples, seeds=range(4000))
    assert abs(float(found.matching.mean() - matching(law, x[:1]))) < 5 * float(found.matching.std()) / 4000**0.5


def test_the_prior_of_an_sde_with_its_own_deviation():
    """KL with prior_std different from sigma(t_max): the variance's part too."""

    class Wide(VP):
        def prior_std(self):
            return 1.7

    x = seeded(range(5)).initial((5, 2), D)
    sde = Wide()
    a, sd = float(sde.alpha(ends(sde)[0])), float(sde.sigma(ends(sde)[0]))
    q = torch.distributions.Normal(a * x, torch.full_like(x, sd))
    p = torch.distributions.Normal(torch.zeros_like(x), torch.full_like(x, 1.7))
    truth = torch.distributions.kl_divergence(q, p).sum(1)
    assert torch.allclose(elbo(constant(sde), x, samples=1, seeds=range(5)).prior, truth, rtol=1e-10)


# --- it is a bound -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
def test_it_bounds_the_log_density_of_the_decoded_model(name):
    """Point by point, for likely and for unlikely data, in closed form and as estimated."""
    law = gaussian(name)
    x = torch.cat([law.sample(48, seeds=range(48)), 2 * seeded(range(16)).initial((16, 3), D)])
    mean, cov = model_law(law)
    log_p = torch.distributions.MultivariateNormal(mean, cov).log_prob(x)
    prior, reconstruction = closed(law, x)
    assert (log_p + prior + matching(law, x) + reconstruction).min() > -1e-8
    found = elbo(law, x, samples=100, seeds=range(64))
    assert ((found.value - log_p) / found.stderr).max() < 5


def short(name):
    """The Gaussian under an SDE cut to logsnr -2 .. 2.5, where what is lost at both ends shows."""
    t_max, t_min = SDES[name].time(torch.tensor([-2.0, 2.5], dtype=D)).tolist()
    return Gaussian(dataclasses.replace(SDES[name], t_max=t_max, t_min=t_min), MEAN, covariance=COVARIANCE)


def test_its_gap_is_that_of_prior_and_decoder():
    """With the exact x0, E -elbo = entropy + KL(p_T || prior) + E KL(p(x0 | x) || decoder) over the data: nothing else is lost.

    -elbo is quadratic in x0, so six points with the data's moments are its mean exactly.
    """
    law = short("VP")
    first, last = ends(law.sde)
    normal = torch.distributions.MultivariateNormal
    start = normal(torch.zeros(3, dtype=D), law.sde.prior_std() ** 2 * torch.eye(3, dtype=D))
    decoder = (law.sde.rho(last) ** 2 / law.spectrum[0]).log1p().sum() / 2
    gap = float(torch.distributions.kl_divergence(normal(*gaussian_law(law, first)), start) + decoder)
    entropy = float(normal(MEAN, COVARIANCE).entropy())
    arms = (3 * law.spectrum[0]).sqrt() * law.basis[0]
    x = MEAN + torch.cat([arms.T, -arms.T])
    assert float((sum(closed(law, x)) + matching(law, x)).mean()) == pytest.approx(entropy + gap, abs=1e-9)
    found = elbo(law, x.repeat(200, 1), samples=200, seeds=range(1200))
    stderr = float(found.stderr.norm()) / 1200
    z = (float(-found.value.mean()) - entropy - gap) / stderr
    print(f"gap {gap:.4f}, stderr {stderr:.4f}, z {z:.2f}")
    assert abs(z) < 5
    assert gap > 50 * stderr


def test_the_bound_is_one_whatever_the_schedule():
    """Kingma et al. 2021: in continuous time only the ends of logsnr matter. With one eps and one q even the draws are the same."""
    x = gaussian("VP").sample(9, seeds=range(9))
    found = [elbo(short(name), x, samples=20, seeds=range(9)) for name in SIX]
    for other in found[1:]:
        for field in FIELDS:
            assert torch.allclose(getattr(other, field), getattr(found[0], field), rtol=1e-8), field


# --- importance sampling -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
def test_variance_is_that_of_a_draw_and_below_the_uniform_one(name):
    """Both variances by quadrature over logsnr; the reported one is the importance-weighted one's."""
    law = Gaussian(SDES[name], torch.zeros(16, dtype=D), 0.5)
    x, n, samples = law.sample(1, seeds=[3]).expand(500, 16), 500, 64
    lam = axis(law.sde)
    mean, spread = (c[0] for c in error_law(law, x[:1], lam))
    integrand, length = (lam.exp() / 2) ** 2 * (mean**2 + spread), float(lam[-1] - lam[0])
    v, snr = 1 + float(x[0].square().mean()), lam.exp()
    shape = v * snr / (1 + v * snr)
    q = (1 - FLOOR) * shape / simpson(shape, lam) + FLOOR / length
    mu = float(matching(law, x[:1]))
    chosen, uniform = (float(simpson(integrand / d, lam)) - mu**2 for d in (q, torch.full_like(q, 1 / length)))
    found = elbo(law, x, samples=samples, seeds=range(n))
    print(f"{name}: variance {chosen:.1f}, reported {float(found.variance.mean()):.1f}, uniform {uniform:.1f}")
    assert chosen < 0.8 * uniform
    # stratified draws differ more among themselves, by at most n / (n - 1)
    slack = 5 * float(found.variance.std()) / n**0.5
    assert chosen - slack < float(found.variance.mean()) < chosen * samples / (samples - 1) + slack
    error, stderr = float(found.value.std()), float(found.stderr.square().mean().sqrt())
    assert 0.5 < error / stderr < 1.1  # honest, and not idle
    assert stderr < float((found.variance.mean() / samples).sqrt())


@pytest.mark.parametrize("samples", [2, 17, 64])
@pytest.mark.parametrize("name", SIX)
def test_strata_leave_little_of_the_variance_of_times(name, samples):
    """A network whose error is rho, without noise: the integrand is 1/2 a dimension, and all that varies is where it is looked at."""
    sde, x = SDES[name], seeded(range(1)).initial((1, 5), D).expand(400, 5)
    wrong = Wrapped.from_x0(lambda y, t: x[: len(y)] + sde.rho(t), sde)
    found = elbo(wrong, x, samples=samples, seeds=range(400))
    error, stderr = float(found.matching.std()), float(found.stderr.square().mean().sqrt())
    independent = float((found.variance.mean() / samples).sqrt())
    print(f"{name} {samples}: error {error:.3g}, stderr {stderr:.3g}, of independent draws {independent:.3g}")
    assert abs(float(found.matching.mean()) - 5 / 2 * float(sde.logsnr(ends(sde)).diff())) < 5 * error / 400**0.5
    assert error < 1.1 * stderr < 1.3 * independent
    assert samples < 16 or error < 11 / samples * independent


def test_runs_of_a_chain_without_noise_agree():
    sde, x = EDM(), seeded(range(3)).initial((3, 5), D)
    found = elbo(Wrapped.from_x0(lambda y, t: x + sde.rho(t), sde), x, times=logsnr(sde, 7), samples=2)
    truth = 5 / 2 * float(sde.logsnr(logsnr(sde, 7)).diff().expm1().sum())
    assert torch.allclose(found.matching, torch.full((3,), truth, dtype=D), rtol=1e-9)
    assert found.stderr.max() < 1e-9 * truth


@pytest.mark.parametrize("samples", [4, 5])
def test_stderr_of_independent_runs_of_a_chain(samples):
    law = gaussian("VP")
    x = law.sample(1, seeds=[2]).expand(3000, 3)
    found = elbo(law, x, times=logsnr(law.sde, 3), samples=samples, seeds=range(3000))
    assert 0.8 < float(found.matching.std() / found.stderr.square().mean().sqrt()) < 1.05
    assert float(found.variance.mean()) == pytest.approx(samples * float(found.matching.var()), rel=0.15)


def test_weights_are_bounded_whatever_the_network_does():
    """No weight exceeds 1 / FLOOR of the uniform one: a network that errs only where the data is noise is not missed."""
    sde = EDM()
    bad = Wrapped.from_x0(lambda x, t: x * 0 + (t > 5) * t, sde)  # |x0_hat| = rho where rho > 5: integrand 1/2 a dimension there
    x = torch.zeros(2000, 4, dtype=D)
    found = elbo(bad, x, samples=16, seeds=range(2000))
    truth = 4 * math.log(80 / 5)
    assert abs(float(found.matching.mean()) - truth) < 5 * float(found.matching.std()) / 2000**0.5
    a, b = sde.logsnr(ends(sde)).tolist()
    assert float(found.variance.mean()) < truth * 4 / 2 * (b - a) / FLOOR  # E w^2 <= max w E w


# --- chains --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
def test_a_short_chain_is_the_sum_of_its_gaussian_kls(name):
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) by Bayes' rule at every step, expected over x_t."""
    law, sde = gaussian(name), SDES[name]
    times = logsnr(sde, 4)
    x = law.sample(1, seeds=[5]).expand(3000, 3)
    errors, truth = error_law(law, x[:1], sde.logsnr(times))[0][0], 0.0
    for t, u, error in zip(times[:-1], times[1:], errors[:-1], strict=True):
        scale, std = sde.transition(u, t)
        precision = 1 / sde.sigma(u) ** 2 + scale**2 / std**2  # of x_u given x_t and x0
        slope = sde.alpha(u) / sde.sigma(u) ** 2 / precision  # of its mean in x0
        truth += slope**2 * error * precision / 2
    assert float(truth) == pytest.approx(float(chain_matching(law, x[:1], times)), rel=1e-9)
    found = elbo(law, x, times=times, seeds=range(3000))
    assert abs(float(found.matching.mean() - truth)) < 5 * float(found.matching.std()) / 3000**0.5
    assert found.nfe == 4
    assert found.samples == 1
    assert found.stderr.isnan().all()


@pytest.mark.parametrize("name", SIX)
def test_a_chain_comes_down_to_continuous_time(name):
    law = gaussian(name)
    x = law.sample(64, seeds=range(64))
    limit, sums = matching(law, x), []
    for n in (8, 32, 128, 512):
        times = logsnr(law.sde, n)
        truth = chain_matching(law, x, times)
        sums.append(float(truth.mean()))
        if n < 200:
            found = elbo(law, x, samples=2, times=times.flip(0), seeds=range(64))  # either way round
            assert torch.allclose(found.prior + found.reconstruction, sum(closed(law, x)), rtol=1e-10)
            assert abs(float((found.matching - truth).mean())) < 5 * float((found.matching - truth).std()) / 8
    gaps = [total - float(limit.mean()) for total in sums]
    assert all(a > 3 * b > 0 for a, b in pairwise(gaps))  # first order in the step
    assert gaps[-1] < 0.03 * float(limit.mean())


def test_a_chain_may_end_early():
    law = gaussian("VP")
    x = law.sample(8, seeds=range(8))
    times = torch.tensor([1.0, 0.6, 0.2], dtype=D)
    found = elbo(law, x, times=times, samples=100, seeds=range(8))
    prior, reconstruction = closed(law, x, torch.tensor(0.2, dtype=D))
    assert torch.allclose(found.prior, prior, rtol=1e-10)
    assert torch.allclose(found.reconstruction, reconstruction, rtol=1e-10)
    assert ((found.matching - chain_matching(law, x, times)) / found.stderr).abs().max() < 5
    assert found.nfe == 200


def test_the_chain_of_ddpm():
    """On its nodes the bound is DDPM's: beta_t^2 / (2 var_t alpha_t (1 - abar_t)) |eps - eps_hat|^2, var_t of the posterior."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=D)
    sde = VP.from_betas(betas)
    x = seeded(range(3)).initial((3, 2), D)
    abar = (1 - betas).cumprod(0)
    before, beta, now = abar[:-1], betas[1:], abar[1:]
    var = beta * (1 - before) / (1 - now)
    eps = (now / (1 - now)) * (x - 0.3).square().sum(1, keepdim=True)  # of a network that always says 0.3
    truth = (beta**2 / (2 * var * (1 - beta) * (1 - now)) * eps).sum(1)
    found = elbo(constant(sde), x, times=sde.nodes(), seeds=range(3))
    assert torch.allclose(found.matching, truth, rtol=1e-8)
    assert found.nfe == 999
    assert torch.allclose(found.reconstruction, torch.full((3,), 1 + math.log(2 * math.pi * (1 - abar[0]) / abar[0]), dtype=D))


# --- integers ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("rho", [0.002, 0.1, 0.7, 30.0])
def test_the_decoder_is_the_softmax(levels, rho):
    """E -log softmax_j -(x - alpha c_j)^2 / (2 sigma^2) over x = alpha c_k + sigma eps, eps on a grid of its own."""
    cells = Quantized(levels, -1.0, 1.0)
    c = cells.to_model(torch.arange(levels), torch.tensor(0.5, dtype=D))
    alpha, eps = 0.7, torch.linspace(-9, 9, 1201, dtype=D)
    share = (-(eps**2) / 2).softmax(0)
    table = _decoder(cells, rho)
    assert table.shape == (levels,)
    for k in {0, 1, levels // 2, levels - 1}:
        x = alpha * c[k] + alpha * rho * eps
        log_p = (-((x[:, None] - alpha * c) ** 2) / (2 * (alpha * rho) ** 2)).log_softmax(1)[:, k]
        assert float(table[k]) == pytest.approx(-float((share * log_p).sum()), rel=1e-9, abs=1e-12)
    assert torch.allclose(table, table.flip(0), rtol=1e-10)
    assert table.min() >= 0
    assert float(table.max()) <= math.log(levels) + 1 or rho < 1


def test_reconstruction_of_images_is_a_sum_over_their_levels():
    images = torch.randint(0, 17, (5, 2, 3), generator=torch.Generator().manual_seed(0))
    sde = VP(t_min=0.02)
    found = elbo(constant(sde), images, levels=17, low=0.0, high=2.0, samples=2, seeds=range(5))
    table = _decoder(Quantized(17, 0.0, 2.0), float(sde.rho(ends(sde)[1])))
    assert torch.allclose(found.reconstruction, table[images].sum((1, 2)), rtol=1e-12)
    eps = torch.randn(5, 20000, 2, 3, 1, dtype=D, generator=torch.Generator().manual_seed(1))
    c = Quantized(17, 0.0, 2.0).to_model(torch.arange(17), torch.tensor(0.5, dtype=D))
    rho = sde.rho(ends(sde)[1])
    logits = -((c[images][:, None, :, :, None] + rho * eps - c) ** 2) / (2 * rho**2)
    drawn = -logits.log_softmax(4).gather(4, images[:, None, :, :, None].expand(5, 20000, 2, 3, 1)).sum((2, 3, 4))
    assert ((drawn.mean(1) - found.reconstruction) / drawn.std(1) * 20000**0.5).abs().max() < 5


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("sde", [EDM(), VP(t_min=1e-4)], ids=lambda sde: type(sde).__name__)
def test_bits_are_the_entropy_of_a_discrete_law_and_not_below_it(levels, sde):
    """Exact x0 of weighted points on the lattice: E -elbo - entropy lies between 0 and what prior and decoder lose at most."""
    images = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [levels - 1, 0]])[: 4 if levels == 2 else 5]
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=D)[: len(images)]
    p = p / p.sum()
    law = Mixture(sde, Quantized(levels).to_model(images, torch.tensor(0.5, dtype=D)), 0.0, weights=p)
    n = 200
    found = elbo(law, images.repeat(n, 1), levels=levels, samples=128, seeds=range(n * len(images)), dtype=D)
    bits = found.bits_per_dim.reshape(n, -1)
    mean, entropy = float((bits.mean(0) * p).sum()), -float((p * p.log2()).sum()) / 2
    stderr = float((bits.var(0) * p**2).sum() / n) ** 0.5
    most = float(((found.prior + found.reconstruction).reshape(n, -1).mean(0) * p).sum()) / (2 * math.log(2))
    print(f"{levels}: bits {mean:.4f} +- {stderr:.4f}, entropy {entropy:.4f}, {most:.5f} to lose")
    assert entropy - 5 * stderr < mean < entropy + most + 5 * stderr
    assert stderr < 0.02 * max(1.0, entropy)
    assert most < 0.01 or levels == 256


def test_bits_of_a_network_bound_the_entropy():
    images = torch.arange(8).repeat(64)[:, None]
    for law in (Gaussian(EDM(), torch.zeros(1, dtype=D), 0.6), Gaussian(EDM(), torch.tensor([0.5], dtype=D), 0.3)):
        assert elbo(law, images, levels=8, seeds=range(512)).bits_per_dim.mean() > 3.0


def test_the_range_of_the_data_does_not_matter():
    """The same model of [-1, 1] and of [0, 1] data: halve x and the noise levels. The prior is centred at 0, and stays out."""
    images = torch.arange(64).reshape(16, 4) % 8
    means, std = seeded(range(3)).initial((3, 4), D) / 2, 0.3
    wide = Mixture(EDM(), means, std)
    narrow = Mixture(EDM(t_min=0.001, t_max=40.0), (means + 1) / 2, std / 2)
    for times in (None, 12):
        a, b = (
            elbo(law, images, levels=8, low=low, samples=9, times=times and logsnr(law.sde, times), seeds=range(16), dtype=D)
            for law, low in ((wide, -1.0), (narrow, 0.0))
        )
        assert torch.allclose(a.matching, b.matching, rtol=1e-9)
        assert torch.allclose(a.reconstruction, b.reconstruction, rtol=1e-12)
        assert torch.allclose(a.variance, b.variance, rtol=1e-9)


def test_images_of_every_integer_type():
    law = Gaussian(EDM(), torch.zeros(2, dtype=D), 0.5)
    images = torch.tensor([[0, 255], [7, 130]])
    whole = elbo(law, images, levels=256, samples=4, seeds=[1, 2])
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(elbo(law, images.to(kind), levels=256, samples=4, seeds=[1, 2]).value, whole.value)


# --- batch mates, seeds, counts ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "times"), [*((name, None) for name in SDES), ("SubVP", 12)])
def test_rows_do_not_depend_on_their_mates_at_a_fixed_microbatch(name, times):
    """To the bit, in another place, beside others, alone: times a row go through every function of the SDE, and sums have tails."""
    sde = SDES[name]
    for law, x, kwargs in (
        (gaussian(name), gaussian(name).sample(13, seeds=range(13)), {"samples": 17 if name in SIX and not times else 2}),
        (mixture(sde), torch.arange(26).reshape(13, 2) % 5, {"samples": 3, "levels": 5}),
        (Wrapped.from_x0(lambda x, t: 0.9 * x, sde), seeded(range(13)).initial((13, 37), D), {"samples": 2}),
    )[: 3 if name in SIX else 1]:
        kwargs |= {"microbatch": 5, "times": times and logsnr(sde, times)}
        whole = elbo(law, x, seeds=range(13), **kwargs)
        order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
        shuffled = elbo(law, x[order], seeds=order, **kwargs)
        part, one = (elbo(law, x[i : i + n], seeds=range(i, i + n), **kwargs) for i, n in ((2, 6), (9, 1)))
        free = elbo(law, x, seeds=range(13), **{**kwargs, "microbatch": None})
        for field in FIELDS:
            of = getattr(whole, field)
            assert torch.equal(getattr(shuffled, field), of[order]), field
            assert torch.equal(getattr(part, field), of[2:8]), field
            assert torch.equal(getattr(one, field), of[9:10]), field
            assert torch.allclose(getattr(free, field), of, rtol=1e-10), field


def test_rows_of_a_network_do_not_depend_on_their_mates():
    model, x = unet(), seeded(range(9)).initial((9, 1, 4, 4), D)
    images = Quantized(16).to_levels(x / 3)
    for data, kwargs in ((x, {}), (images, {"levels": 16, "dtype": D}), (x, {"times": logsnr(model.sde, 4)})):
        kwargs |= {"samples": 5, "microbatch": 4}
        whole = elbo(model, data, seeds=range(9), **kwargs)
        assert whole.value.shape == (9,)
        assert whole.value.isfinite().all()
        assert whole.dims == 16
        backwards = elbo(model, data.flip(0), seeds=list(range(9))[::-1], **kwargs)
        part = elbo(model, data[:6], seeds=range(6), **kwargs)
        for field in FIELDS:
            assert torch.equal(getattr(backwards, field).flip(0), getattr(whole, field)), field
            assert torch.equal(getattr(part, field), getattr(whole, field)[:6]), field
        free = elbo(model, data, seeds=range(9), **{**kwargs, "microbatch": None})
        assert torch.allclose(free.value, whole.value, rtol=1e-10)
        assert not whole.value.requires_grad


def test_seeds_repeat_and_generators_too():
    law, x = gaussian("VP"), gaussian("VP").sample(4, seeds=range(4))
    a, b, c = (elbo(law, x, samples=3, seeds=seeds).value for seeds in (range(4), [0, 1, 2, 3], range(4, 8)))
    assert torch.equal(a, b)
    assert not (a == c).any()
    a, b = (elbo(law, x, samples=3, generator=torch.Generator().manual_seed(1)).value for _ in range(2))
    assert torch.equal(a, b)
    a, b = (elbo(law, x, samples=3).value for _ in range(2))
    assert not (a == b).any()
    found = elbo(law, x.expand(4, 3)[[0] * 4], samples=3, generator=torch.Generator().manual_seed(1)).value
    assert found.unique().numel() == 4


@pytest.mark.parametrize("rows", [0, 1, 4, 7])
@pytest.mark.parametrize("microbatch", [None, 4])
def test_evaluations_are_counted_and_padding_is_not(rows, microbatch):
    law = mixture(VP())
    for kwargs, nfe in (
        ({"samples": 5}, 5),
        ({}, 64),
        ({"times": logsnr(VP(), 6)}, 6),
        ({"times": logsnr(VP(), 6), "samples": 2}, 12),
    ):
        found = elbo(law, torch.zeros(rows, 2), seeds=range(rows), microbatch=microbatch, **kwargs)
        assert found.value.shape == found.stderr.shape == found.variance.shape == (rows,)
        assert found.value.dtype == D
        assert found.nfe == (nfe if rows else 0)
        assert found.ledger["score"] == found.ledger["network"] == pytest.approx(found.nfe)
        assert found.ledger["denoise"] == found.ledger["guidance"] == found.ledger["divergence"] == 0
    images = elbo(law, torch.zeros(rows, 2, dtype=torch.long), levels=2, microbatch=microbatch)
    assert images.bits_per_dim.shape == (rows,)


@pytest.mark.parametrize("name", SIX)
def test_float32_is_good_to_a_few_thousandths(name):
    law = gaussian(name)
    x = law.sample(16, seeds=range(16))
    a, b = (elbo(law, x.to(dtype), samples=20, seeds=range(16)) for dtype in (torch.float32, D))
    print(f"{name}: {float((a.value - b.value).abs().max()):.1e}")
    assert a.value.dtype == D
    assert (a.value - b.value).abs().max() < 5e-3
    images = torch.arange(48).reshape(16, 3) % 16
    a, b = (elbo(law, images, levels=16, samples=20, seeds=range(16), dtype=dtype) for dtype in (torch.float32, D))
    assert ((a.value - b.value) / b.value).abs().max() < 1e-3


def test_labels_follow_their_rows():
    model = unet(classes=3)
    x, labels = seeded(range(6)).initial((6, 1, 4, 4), D), torch.tensor([0, 1, 2, 0, 1, 2])
    kwargs = {"samples": 2, "microbatch": 4}
    whole = elbo(model.condition(labels), x, seeds=range(6), **kwargs)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    shuffled = elbo(model.condition(labels[order]), x[order], seeds=order, **kwargs)
    assert torch.equal(shuffled.value, whole.value[order])
    assert not torch.allclose(elbo(model.condition(labels.flip(0)), x, seeds=range(6), **kwargs).value, whole.value)


def test_the_network_always_sees_microbatch_rows_and_float64_times():
    seen = []

    def fn(x, t):
        seen.append((len(x), t.shape, t.dtype, bool((t >= VP().t_min).all() and (t <= VP().t_max).all())))
        return 0.5 * x

    elbo(Wrapped.from_x0(fn, VP()), torch.zeros(6, 1, 2, 2), samples=3, microbatch=4, seeds=range(6))
    assert seen == [(4, (4, 1, 1, 1), D, True)] * 6
    seen.clear()
    elbo(Wrapped.from_x0(fn, VP()), torch.zeros(6, 1, 2, 2), times=logsnr(VP(), 3), seeds=range(6))
    assert seen == [(6, (), D, True)] * 3


def test_a_denoiser_may_write_into_t():
    def rude(x, t):
        y = 0.5 * x * t.to(x)
        t.fill_(0.5)
        return y

    kind = lambda x, t: 0.5 * x * t.to(x)
    x, times = seeded(range(3)).initial((3, 2), D), logsnr(VP(), 3)
    for kwargs in ({"samples": 4}, {"times": times, "samples": 2}):
        a, b = (elbo(Wrapped.from_x0(fn, VP()), x, seeds=range(3), **kwargs).value for fn in (rude, kind))
        assert torch.equal(a, b)
    assert torch.equal(times, logsnr(VP(), 3))


# --- what is refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_networks_nan_is_named(value):
    x0 = torch.zeros(7, 2)
    marked = lambda x, t: torch.where((x[:, 1:] > 50) & (t < 0.5), value, 0 * x)
    x0[5, 1] = 100.0
    for kwargs in ({}, {"microbatch": 2}, {"times": logsnr(VP(), 5)}):
        with pytest.raises(NonFiniteError, match=r"samples \[5\] \(1 of .* t = 0\.[0-4].*check it there"):
            elbo(Wrapped.from_x0(marked, VP()), x0, seeds=range(7), **kwargs)


X, LAW = torch.zeros(4, 2), mixture(VP())
CASES = [
    ("denoiser", lambda: elbo(nn.Identity(), X), TypeError, "denoiser is Identity.*wanted a Denoiser"),
    ("x list", lambda: elbo(LAW, [[0.0]]), TypeError, "x is list; wanted a tensor"),
    ("x half", lambda: elbo(LAW, X.half()), TypeError, "x is .* float16; the state is float32 or float64"),
    ("x 1-D", lambda: elbo(LAW, X[0]), ValueError, "at least one event dimension"),
    ("x nan", lambda: elbo(LAW, X + math.nan), ValueError, r"x has NaN .* rows \[0, 1, 2, 3\]"),
    ("x shape", lambda: elbo(LAW, torch.zeros(4, 3)), ValueError, r"wanted \[B, 2\]"),
    ("integers", lambda: elbo(LAW, X.long()), TypeError, r"x is \[4, 2\] int64 without levels; wanted floats .* levels=256"),
    ("bool", lambda: elbo(LAW, X.bool(), levels=2), TypeError, "bool; wanted integers"),
    ("floats with levels", lambda: elbo(LAW, X, levels=4), TypeError, r"float32 with levels=4; wanted integers 0 .. 3: leave"),
    ("list with levels", lambda: elbo(LAW, [[1, 2]], levels=4), TypeError, "list; wanted integers"),
    ("images 1-D", lambda: elbo(LAW, X[0].long(), levels=4), ValueError, "at least one event dimension"),
    ("images range", lambda: elbo(LAW, X.long() + 4, levels=4), ValueError, "images span 4 .. 4; wanted 0 .. 3"),
    ("levels", lambda: elbo(LAW, X.long(), levels=1), ValueError, "levels is 1; wanted an integer of at least 2"),
    ("range", lambda: elbo(LAW, X.long(), levels=4, low=1.0, high=1.0), ValueError, "high is 1"),
    ("dtype", lambda: elbo(LAW, X.long(), levels=4, dtype=torch.float16), TypeError, "float16; the state is float32 or float64"),
    ("samples", lambda: elbo(LAW, X, samples=0), ValueError, "samples is 0; wanted an integer of at least 1"),
    ("samples float", lambda: elbo(LAW, X, samples=2.0), TypeError, "samples is 2.0"),
    ("times list", lambda: elbo(LAW, X, times=[1.0, 0.5]), ValueError, "times is list"),
    ("times outside", lambda: elbo(LAW, X, times=torch.tensor([2.0, 0.5])), ValueError, "outside"),
    ("times twice", lambda: elbo(LAW, X, times=torch.tensor([1.0, 0.5, 0.5])), ValueError, "not strictly monotone"),
    ("times late", lambda: elbo(LAW, X, times=torch.tensor([0.5, 0.1])), ValueError, "times begin at 0.5, below t_max = 1.*no prior"),
    ("seeds", lambda: elbo(LAW, X, seeds=range(3)), ValueError, "seeds has 3 entries for 4 rows"),
    ("both", lambda: elbo(LAW, X, seeds=range(4), generator=torch.Generator()), ValueError, "seeds and generator are both given"),
    ("microbatch", lambda: elbo(LAW, X, microbatch=0), ValueError, "microbatch is 0"),
    ("labels", lambda: elbo(unet(classes=3).condition(torch.zeros(9).long()), torch.zeros(4, 1, 4, 4), microbatch=2), ValueError,
     "holds 9 labels for 4 samples"),
    ("bits of floats", lambda: elbo(LAW, X, samples=1).bits_per_dim, ValueError, "no bits without quantisation: pass integer"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "pattern"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_refused_in_words(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
