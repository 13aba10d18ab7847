"""Denoising score matching: its minimum, its weights, its times."""

import functools
import math

import pytest
import torch
from laws import SIX, D, every_sde, mixture
from scipy import stats

import scoresde as s
from scoresde import loss, parameterizations
from scoresde.noise import seeded

SDES = every_sde()
WEIGHTS = {"simple": loss.simple, "capped": loss.capped, "edm": loss.edm, "likelihood": loss.likelihood}
TIMES = {"uniform": loss.uniform, "log_normal": loss.log_normal}


def uniforms(n, first=0):
    return seeded(range(first, first + n)).uniform(torch.zeros(n, 1, dtype=D), 0).flatten()


def normals(*shape, first=0):
    return seeded(range(first, first + shape[0])).initial(shape, D)


class Perturbed(s.Denoiser):
    """The exact mean, moved by `size` min(rho, 1) along a smooth field: an error of eps of order one at every time."""

    def __init__(self, inner, size):
        super().__init__(inner.sde)
        self.inner, self.size = inner, size

    def field(self, x, t):
        y = x / self.sde.alpha(t).hypot(self.sde.sigma(t))
        return self.sde.rho(t).clamp(max=1) * torch.stack([torch.tanh(y[:, 1]), torch.sin(y[:, 0]) + 0.5], 1)

    def forward(self, x, t):
        return self.inner(x, t) + self.size * self.field(x, t)


def test_every_weight_and_distribution_is_tried():
    exported = {getattr(loss, name) for name in loss.__all__}
    assert exported == {*WEIGHTS.values(), *TIMES.values(), loss.dsm_loss, loss.stratified}


# --- the minimum ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_exact_denoiser_is_the_minimum(weight, name):
    """On the same data, times and noise: each perturbation costs more, and the derivative along it is zero to 5 sigma."""
    law, n = mixture(SDES[name]), 20_000
    x0, noise = law.sample(n, seeds=range(n)), normals(n, 2, first=n)
    t = loss.stratified(loss.log_normal)(law.sde, uniforms(n, 2 * n))
    evaluate = lambda size: s.dsm_loss(Perturbed(law, size), x0, t, WEIGHTS[weight], noise)
    exact = s.dsm_loss(law, x0, t, WEIGHTS[weight], noise)
    assert torch.equal(exact, evaluate(0.0))
    for size in (0.3, -0.3, 1.0, -1.0):
        gap = evaluate(size) - exact
        assert gap.mean() > 5 * gap.std() / n**0.5
    h = 1e-4  # the loss is a parabola in size: its central difference is exact
    slope = (evaluate(h) - evaluate(-h)) / (2 * h)
    assert slope.mean().abs() < 5 * slope.std() / n**0.5
    assert slope.std() > 0


@pytest.mark.parametrize("name", SIX)
def test_the_excess_is_the_weighted_distance_to_the_exact_denoiser(name):
    """E[loss(D') - loss(D)] = E[w |D' - D|^2 / D]: what makes score matching work."""
    law, n = mixture(SDES[name]), 20_000
    x0, noise = law.sample(n, seeds=range(n)), normals(n, 2, first=n)
    t = loss.log_normal(law.sde, uniforms(n, 2 * n))
    wrong = Perturbed(law, 0.5)
    gap = s.dsm_loss(wrong, x0, t, loss.edm, noise) - s.dsm_loss(law, x0, t, loss.edm, noise)
    x = law.sde.perturb(x0, t[:, None], noise)
    distance = loss.edm(law.sde, t) * (0.5 * wrong.field(x, t[:, None])).square().mean(1)
    difference = gap - distance
    assert difference.mean().abs() < 5 * difference.std() / n**0.5
    assert distance.mean() > 0


# --- the weights ---------------------------------------------------------------------------------------------------------
@pytest.fixture(params=SIX)
def errors(request):
    """(sde, t, loss with a weight, Prediction of a wrong model, true eps, true score of the pair) at 40 points."""
    law = mixture(SDES[request.param])
    model, n = Perturbed(law, 0.7), 40
    x0, noise, t = law.sample(n, seeds=range(n)), normals(n, 2, first=n), loss.uniform(law.sde, uniforms(n))[:, None]
    p = model.predict(law.sde.perturb(x0, t, noise), t)
    return law.sde, t, lambda weight: s.dsm_loss(model, x0, t, weight, noise), p, x0, noise


def test_simple_is_the_error_of_eps(errors):
    _, _, value, p, _, noise = errors
    assert torch.allclose(value(loss.simple), (p.eps - noise).square().mean(1), rtol=1e-6)


def test_likelihood_is_the_error_of_the_score_times_g_squared(errors):
    sde, t, value, p, _, noise = errors
    score = -noise / sde.sigma(t)
    truth = sde.diffusion(t).square().flatten() * (p.score - score).square().mean(1)
    assert torch.allclose(value(loss.likelihood), truth, rtol=1e-6)


def test_edm_is_the_unit_error_of_the_network(errors):
    """lambda = 1 / c_out^2 of the parameterization: the error of what the network itself is asked for."""
    sde, t, value, p, x0, _ = errors
    for sd in (0.5, 0.1):
        c_skip, c_out, _, _ = parameterizations.edm(sde, t, sd)
        asked, answered = (x0 - c_skip * p.x) / c_out, (p.x0 - c_skip * p.x) / c_out
        weight = functools.partial(loss.edm, sigma_data=sd)
        assert torch.allclose(value(weight), (answered - asked).square().mean(1), rtol=1e-6)


def test_capped_is_the_lesser_of_snr_and_its_cap(errors):
    sde, t, value, p, x0, _ = errors
    snr = (sde.alpha(t) / sde.sigma(t)).square().flatten()
    for cap, weight in ((5.0, loss.capped), (1.0, functools.partial(loss.capped, cap=1.0))):
        assert torch.allclose(value(weight), snr.clamp(max=cap) * (p.x0 - x0).square().mean(1), rtol=1e-6)


def test_a_weight_may_be_any_function():
    x0, t = normals(4, 2), torch.full((4,), 0.3, dtype=D)
    law, noise = mixture(s.VP()), normals(4, 2, first=9)
    plain = (law(law.sde.perturb(x0, t[:, None], noise), t[:, None]) - x0).square().mean(1)
    for weight in (lambda sde, u: 1.0, lambda sde, u: torch.ones_like(u), lambda sde, u: torch.ones(())):
        assert torch.allclose(s.dsm_loss(law, x0, t, weight, noise), plain)


# --- shapes and dtypes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_shapes_of_t(weight):
    law = s.Gaussian(s.VP(), torch.zeros(1, 2, 2, dtype=D), 0.5)
    x0, noise = normals(5, 1, 2, 2), normals(5, 1, 2, 2, first=9)
    t = torch.tensor(0.3, dtype=D)
    value = s.dsm_loss(law, x0, t, WEIGHTS[weight], noise)
    assert value.shape == (5,)
    for same in (t.expand(5), t.expand(5, 1, 1, 1)):
        assert torch.allclose(s.dsm_loss(law, x0, same, WEIGHTS[weight], noise), value, rtol=1e-12)
    each = torch.linspace(0.1, 0.9, 5, dtype=D)
    rows = [s.dsm_loss(law, x0[i : i + 1], each[i], WEIGHTS[weight], noise[i : i + 1]) for i in range(5)]
    assert torch.allclose(s.dsm_loss(law, x0, each, WEIGHTS[weight], noise), torch.cat(rows), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_the_loss_has_the_dtype_of_the_data(dtype):
    law, x0 = mixture(s.VP()), normals(3, 2).to(dtype)
    for t_dtype in (torch.float32, D):
        for t in (torch.tensor(0.3, dtype=t_dtype), torch.full((3,), 0.3, dtype=t_dtype)):
            assert s.dsm_loss(law, x0, t, loss.edm).dtype == dtype


def test_times_at_the_ends_are_taken_in_float32_too():
    for sde in SDES.values():
        law = s.Gaussian(sde, torch.zeros(2, dtype=D), 0.5)
        for dtype in (torch.float32, D):
            t = torch.tensor([sde.t_min, sde.t_max], dtype=dtype)
            assert s.dsm_loss(law, normals(2, 2), t, loss.edm).isfinite().all()


def test_noise_is_fresh_unless_given():
    law, x0, t = mixture(s.VP()), normals(3, 2), torch.tensor(0.3, dtype=D)
    noise = normals(3, 2, first=5)
    assert not torch.equal(s.dsm_loss(law, x0, t, loss.edm), s.dsm_loss(law, x0, t, loss.edm))
    assert torch.equal(s.dsm_loss(law, x0, t, loss.edm, noise), s.dsm_loss(law, x0, t, loss.edm, noise))


def test_gradients_reach_the_network():
    model = s.Preconditioned(s.MLP(2, width=8, depth=1), s.VP())
    s.dsm_loss(model, normals(8, 2).float(), uniforms(8).clamp(min=0.01), loss.edm).mean().backward()
    assert model.net.leave.weight.grad.abs().sum() > 0


# --- times ---------------------------------------------------------------------------------------------------------------
def cdf(kind, sde):
    if kind == "uniform":
        return stats.uniform(sde.t_min, sde.t_max - sde.t_min).cdf, lambda t: t
    ends = sde.rho(torch.tensor([sde.t_min, sde.t_max], dtype=D)).log()
    low, high = ((ends + 1.2) / 1.2).tolist()
    return stats.truncnorm(low, high, loc=-1.2, scale=1.2).cdf, lambda t: sde.rho(t).log()


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("name", sorted(SDES))
def test_times_have_their_distribution(name, kind):
    sde, n = SDES[name], 5000
    t = TIMES[kind](sde, uniforms(n))
    assert t.shape == (n,)
    assert t.dtype == D
    assert bool(((t >= sde.t_min) & (t <= sde.t_max)).all())
    law, variable = cdf(kind, sde)
    assert stats.kstest(variable(t).numpy(), law).pvalue > 1e-3
    assert len(t.unique()) == n  # no atoms: truncated, not clamped


@pytest.mark.parametrize("kind", TIMES)
def test_stratified_times_have_the_same_distribution(kind):
    """Each draw of a batch alone is distributed as before, and their average varies less."""
    sde, batches = s.VP(), 400
    plain, spread = TIMES[kind], loss.stratified(TIMES[kind])
    law, variable = cdf(kind, sde)
    u = uniforms(32 * batches).reshape(batches, 32)
    t = torch.stack([spread(sde, row) for row in u])
    assert stats.kstest(variable(t[:, 11]).numpy(), law).pvalue > 1e-3
    assert t.shape == (batches, 32)
    assert bool(((t >= sde.t_min) & (t <= sde.t_max)).all())
    means = torch.stack([plain(sde, row) for row in u]).mean(1).var(), t.mean(1).var()
    assert means[1] < means[0] / 10
    ranks = torch.stack([(v.sort().values * 32).floor() for v in torch.from_numpy(law(variable(t).numpy()))])
    assert torch.equal(ranks, torch.arange(32.0, dtype=D).expand(batches, 32))  # one in each thirty-second


def test_stratified_times_reach_the_whole_range_for_any_batch():
    for n in (0, 1, 2, 7):
        assert loss.stratified(loss.uniform)(s.VP(), uniforms(n)).shape == (n,)
    one = loss.stratified(loss.uniform)(s.VP(), uniforms(1))
    assert torch.equal(one, loss.uniform(s.VP(), uniforms(1)))


@pytest.mark.parametrize("name", sorted(SDES))
def test_extreme_draws_stay_inside(name):
    """u of 0 and 1, and a log-normal that lies outside the range of the SDE."""
    sde = SDES[name]
    u = torch.tensor([0.0, 1e-300, 1e-17, 0.5, 1 - 1e-16, 1.0], dtype=D)
    for fn in (loss.uniform, loss.log_normal, *(functools.partial(loss.log_normal, mean=m, std=0.5) for m in (-9.0, 9.0))):
        t = fn(sde, u)
        assert t.isfinite().all()
        assert bool(((t >= sde.t_min) & (t <= sde.t_max)).all())
        assert bool((t.diff() >= 0).all())
    assert loss.log_normal(sde, u.float()).dtype == D


def test_log_normal_takes_a_mean_and_a_deviation():
    sde, n = s.EDM(), 20_000
    logs = loss.log_normal(sde, uniforms(n), mean=-0.5, std=0.8).log()
    assert abs(float(logs.mean()) + 0.5) < 5 * 0.8 / n**0.5
    assert abs(float(logs.std()) - 0.8) < 5 * 0.8 / math.sqrt(2 * n)
