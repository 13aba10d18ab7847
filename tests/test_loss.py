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
WEIGHTS = {
    "simple": loss.simple, "capped": loss.capped, "edm": loss.edm, "likelihood": loss.likelihood, "truncated_snr": loss.truncated_snr,
    "snr_plus_one": loss.snr_plus_one,
}  # fmt: skip
MADE = {"min_snr": loss.min_snr(2.0), "importance": loss.importance(loss.likelihood).weight}
TIMES = {"uniform": loss.uniform, "log_normal": loss.log_normal}
SPREAD = {"stratified": loss.stratified, "low_discrepancy": loss.low_discrepancy}


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
    made = {loss.min_snr, loss.importance, loss.discrete}
    assert exported == {*WEIGHTS.values(), *TIMES.values(), *SPREAD.values(), *made, loss.dsm_loss}


# --- the minimum ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("weight", [*WEIGHTS, *MADE])
def test_the_exact_denoiser_is_the_minimum(weight, name):
    """On the same data, times and noise: each perturbation costs more, and the derivative along it is zero to 5 sigma."""
    law, n = mixture(SDES[name]), 20_000
    x0, noise = law.sample(n, seeds=range(n)), normals(n, 2, first=n)
    t = loss.stratified(loss.log_normal)(law.sde, uniforms(n, 2 * n))
    factor = {**WEIGHTS, **MADE}[weight]
    evaluate = lambda size: s.dsm_loss(Perturbed(law, size), x0, t, factor, noise)
    exact = s.dsm_loss(law, x0, t, factor, noise)
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


def test_the_names_of_snr(errors):
    """`snr` is `simple`; `truncated_snr` the larger of the errors of x0 and eps; `snr_plus_one` their sum; `min_snr` is `capped`."""
    sde, t, value, p, x0, noise = errors
    eps, plain = (p.eps - noise).square().mean(1), (p.x0 - x0).square().mean(1)
    assert loss.snr is loss.simple
    assert torch.allclose(value(loss.truncated_snr), torch.maximum(eps, plain), rtol=1e-6)
    assert torch.allclose(value(loss.snr_plus_one), eps + plain, rtol=1e-6)
    assert torch.allclose(loss.snr_plus_one(sde, t), loss.edm(sde, t, sigma_data=1.0), rtol=1e-9)
    for gamma in (0.5, 5.0):
        assert torch.equal(value(loss.min_snr(gamma)), value(functools.partial(loss.capped, cap=gamma)))
    assert torch.equal(loss.min_snr()(sde, t), loss.capped(sde, t))


@pytest.mark.parametrize("name", ["VP", "Cosine"])
def test_snr_plus_one_is_the_error_of_v(name):
    law, n = mixture(SDES[name]), 40
    x0, noise, t = law.sample(n, seeds=range(n)), normals(n, 2, first=n), loss.uniform(law.sde, uniforms(n))[:, None]
    model = Perturbed(law, 0.7)
    v = law.sde.alpha(t) * noise - law.sde.sigma(t) * x0
    error = (model.predict(law.sde.perturb(x0, t, noise), t).v - v).square().mean(1)
    assert torch.allclose(s.dsm_loss(model, x0, t, loss.snr_plus_one, noise), error, rtol=1e-6)


def test_a_weight_may_be_any_function():
    x0, t = normals(4, 2), torch.full((4,), 0.3, dtype=D)
    law, noise = mixture(s.VP()), normals(4, 2, first=9)
    plain = (law(law.sde.perturb(x0, t[:, None], noise), t[:, None]) - x0).square().mean(1)
    for weight in (lambda sde, u: 1.0, lambda sde, u: torch.ones_like(u), lambda sde, u: torch.ones(())):
        assert torch.allclose(s.dsm_loss(law, x0, t, weight, noise), plain)


# --- shapes and dtypes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", [*WEIGHTS, *MADE])
def test_the_shapes_of_t(weight):
    law = s.Gaussian(s.VP(), torch.zeros(1, 2, 2, dtype=D), 0.5)
    factor = {**WEIGHTS, **MADE}[weight]
    x0, noise = normals(5, 1, 2, 2), normals(5, 1, 2, 2, first=9)
    t = torch.tensor(0.3, dtype=D)
    value = s.dsm_loss(law, x0, t, factor, noise)
    assert value.shape == (5,)
    for same in (t.expand(5), t.expand(5, 1, 1, 1)):
        assert torch.allclose(s.dsm_loss(law, x0, same, factor, noise), value, rtol=1e-12)
    each = torch.linspace(0.1, 0.9, 5, dtype=D)
    rows = [s.dsm_loss(law, x0[i : i + 1], each[i], factor, noise[i : i + 1]) for i in range(5)]
    assert torch.allclose(s.dsm_loss(law, x0, each, factor, noise), torch.cat(rows), rtol=1e-12)


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


@pytest.mark.parametrize("kind", TIMES)
def test_low_discrepancy_times_have_the_same_distribution(kind):
    """Each draw alone is distributed as before; every run of rows is spread, of which `stratified` spreads the whole batch alone."""
    sde, batches, n = s.VP(), 200, 32
    u = uniforms(n * batches).reshape(batches, n)
    law, variable = cdf(kind, sde)
    means = {}
    for name, spread in {"plain": lambda times: times, **SPREAD}.items():
        t = torch.stack([spread(TIMES[kind])(sde, row) for row in u])
        level = torch.from_numpy(law(variable(t).numpy()))
        assert stats.kstest(level[:, 11].numpy(), stats.uniform.cdf).pvalue > 1e-3
        assert bool(((t >= sde.t_min) & (t <= sde.t_max)).all())
        means[name] = float(level.mean(1).var()), float(level[:, 8:16].mean(1).var())
    assert means["stratified"][0] < means["low_discrepancy"][0] < means["plain"][0] / 10
    assert means["low_discrepancy"][1] < means["plain"][1] / 4
    assert means["stratified"][1] > means["plain"][1]  # eight neighbours of 32 lie within a quarter


@pytest.mark.parametrize("spread", SPREAD)
def test_spread_times_take_any_batch_and_dtype(spread):
    for n in (0, 1, 2, 7):
        assert SPREAD[spread](loss.uniform)(s.VP(), uniforms(n)).shape == (n,)
    one = SPREAD[spread](loss.uniform)(s.VP(), uniforms(1))
    assert torch.equal(one, loss.uniform(s.VP(), uniforms(1)))
    assert SPREAD[spread](loss.uniform)(s.VP(), uniforms(4).float()).dtype == torch.float32


# --- importance ----------------------------------------------------------------------------------------------------------
def middles(n):
    return (torch.arange(n, dtype=D) + 0.5) / n


def ramp(sde, t):
    """A weight that is 0 over part of the range and has no name."""
    return (t - (sde.t_min + sde.t_max) / 3).clamp(min=0)


IMPORTANT = {
    "likelihood": loss.importance(loss.likelihood), "flat": loss.importance(loss.likelihood, math.inf),
    "simple": loss.importance(loss.simple, 0.25), "edm": loss.importance(loss.edm), "constant": loss.importance(lambda sde, t: 1.0),
    "ramp": loss.importance(ramp),
}  # fmt: skip


@pytest.mark.parametrize("kind", IMPORTANT)
@pytest.mark.parametrize("name", sorted(SDES))
def test_importance_changes_no_integral(name, kind):
    """The mean of weight(t) h(t) over its times is that of the given weight over uniform t, h anything: by quadrature over u."""
    sde, imp = SDES[name], IMPORTANT[kind]
    n = 6000 if name == "Tabulated" else 20_000  # its times are by bisection
    t = imp(sde, middles(n))
    assert t.dtype == D
    assert bool(((t >= sde.t_min) & (t <= sde.t_max)).all())
    assert bool((t.diff() >= 0).all())
    given_at = lambda t: torch.as_tensor(imp.of(sde, t)).expand(t.shape)
    share = torch.where(given_at(t) > 0, imp.weight(sde, t) / given_at(t), torch.zeros_like(t))  # density of uniform t over q
    h = lambda t: (given_at(t) > 0) * (2 + torch.sin(9 * t / sde.t_max))
    wanted = h(loss.uniform(sde, middles(n))).mean()
    assert float((share * h(t)).mean()) == pytest.approx(float(wanted), rel=2e-3)


@pytest.mark.parametrize("name", SIX)
def test_importance_makes_the_loss_of_a_gaussian_flat(name):
    """E[weight |x0_hat - x0|^2] of the exact mean of N(0, V) is the same at all its times, up to the share that is uniform."""
    sde, v = SDES[name], 0.25
    imp = loss.importance(loss.likelihood, v)
    t = imp(sde, middles(1000))
    mean = imp.weight(sde, t) * v / (1 + v * loss.simple(sde, t))
    assert float(mean.max()) < 1.02 * float(mean.median()) / (1 - loss.FLOOR)
    even = loss.uniform(sde, middles(100_000))
    spread = loss.likelihood(sde, even) * v / (1 + v * loss.simple(sde, even))
    assert float(mean.mean()) == pytest.approx(float(spread.mean()), rel=0.05)
    assert float(mean.square().mean()) < float(spread.square().mean())


@pytest.mark.parametrize("name", SIX)
def test_importance_with_infinite_variance_is_uniform_in_log_snr(name):
    """g^2 / sigma^2 = -d logsnr / dt. Song et al. 2021."""
    sde, n = SDES[name], 2000
    logsnr = sde.logsnr(IMPORTANT["flat"](sde, uniforms(n)))
    high, low = sde.logsnr(torch.tensor([sde.t_min, sde.t_max], dtype=D)).tolist()
    assert stats.kstest(logsnr.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_importance_remembers_no_other_sde():
    imp, u = loss.importance(loss.likelihood), uniforms(64)
    for sde in (s.VP(), s.VE(), s.VP(beta_max=10.0), s.VP()):
        fresh = loss.importance(loss.likelihood)
        assert torch.equal(imp(sde, u), fresh(sde, u))
        assert torch.equal(imp.weight(sde, fresh(sde, u)), fresh.weight(sde, fresh(sde, u)))
    assert imp == fresh

    class Moving(s.LinearSDE):  # no dataclass: it may change between two calls
        t_min, t_max, top = 0.01, 1.0, 1.0
        alpha, sigma = (lambda self, t: torch.ones_like(t)), (lambda self, t: self.top * t)

    sde = Moving()
    before = imp.weight(sde, imp(sde, u))
    sde.top = 5.0
    assert not torch.allclose(imp.weight(sde, imp(sde, u)), before)


def test_levels_take_a_variance_a_row():
    """As the bound on the likelihood asks for: a density for each row, drawn and weighed by itself."""
    sde, v, u = s.VP(), torch.tensor([[0.1], [1.0], [7.0]], dtype=D), uniforms(12).reshape(3, 4)
    found = loss.levels(sde, loss.likelihood, v)
    drawn = found.draw(u)
    for i in range(3):
        one = loss.levels(sde, loss.likelihood, float(v[i]))
        assert torch.allclose(one.draw(u[i]), drawn[i], rtol=1e-12)
        assert torch.allclose(one.density(drawn[i]), found.density(drawn)[i], rtol=1e-12)
    assert torch.allclose(found.heights.mean(1), torch.ones(3, dtype=D))
    snr = ((torch.arange(loss.CELLS, dtype=D) + 0.5) / loss.CELLS * (found.b - found.a) + found.a).exp()
    shape = v * snr / (1 + v * snr)  # the weight likelihood over logsnr
    assert torch.allclose(found.heights, (1 - loss.FLOOR) * shape / shape.mean(1, keepdim=True) + loss.FLOOR, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: loss.min_snr(0.0), ValueError, r"gamma is 0.0; wanted a finite number in \(0, inf\)"),
        (lambda: loss.min_snr("5"), TypeError, r"gamma is str; wanted a number"),
        (lambda: loss.importance(3.0), TypeError, r"weight is float; wanted a function \(sde, t\)"),
        (lambda: loss.importance(loss.edm, 0.0), ValueError, r"variance is 0.0"),
        (lambda: loss.importance(lambda sde, t: -t)(s.VP(), uniforms(2)), ValueError, r"no importance, as at t = "),
        (lambda: loss.importance(lambda sde, t: 0 * t)(s.VP(), uniforms(2)), ValueError, r"no importance; wanted .* not all 0"),
        (lambda: loss.importance(lambda sde, t: t / 0)(s.VP(), uniforms(2)), ValueError, r"no importance, as at t = "),
        (lambda: loss.discrete([]), ValueError, r"times is list; wanted \[N\] different times"),
        (lambda: loss.discrete(torch.tensor([0.1, 0.1])), ValueError, r"times is \[2\] float32; wanted \[N\] different"),
        (lambda: loss.discrete(torch.ones(2, 2)), ValueError, r"times is \[2, 2\] float32"),
        (lambda: s.dsm_loss(mixture(s.VP()), normals(2, 2), uniforms(2), loss.edm, 3.0), TypeError, r"noise is float; wanted unit noise"),
        (lambda: s.dsm_loss(mixture(s.VP()), normals(2, 2), uniforms(2), loss.edm, normals(3, 2)), ValueError, r"noise is \[3, 2\]"),
        (
            lambda: s.dsm_loss(mixture(s.VP()), normals(2, 2), loss.discrete([0.5, 2.0])(s.VP(), uniforms(2) * 0 + 0.9), loss.edm),
            ValueError, r"t spans \[2, 2\]; wanted times of VP",
        ),
    ],
)  # fmt: skip
def test_bad_choices_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


# --- the discrete chain --------------------------------------------------------------------------------------------------
def ddpm(n=50):
    """A short chain, its SDE, abar of its indices 0 .. n-1, a wrong model of the mixture, and its eps at an index."""
    betas = torch.linspace(1e-3, 0.2, n, dtype=D)
    chain = s.VP.from_betas(betas)
    model = Perturbed(mixture(chain), 0.5)
    eps = lambda x, index: model.predict(x, (index.double() + 1)[:, None] / n).eps
    return betas, chain, (1 - betas).cumprod(0), model, eps


def test_discrete_times_are_the_nodes_each_as_likely():
    _, chain, *_ = ddpm()
    times = loss.discrete(chain.nodes())
    t = times(chain, middles(500))
    assert torch.equal(t.unique(), chain.nodes().flip(0))
    assert torch.equal(t.unique(return_counts=True)[1], torch.full((50,), 10))
    assert times(chain, torch.tensor([0.0, 1.0], dtype=D)).tolist() == [chain.t_min, 1.0]
    assert times == loss.discrete(chain.nodes().flip(0))


def test_ddpm_is_a_special_case():
    """L_simple (Ho et al. 2020, algorithm 1) and eq. 12 with sigma_t^2 = beta_t, written out from the betas."""
    betas, chain, abar, model, eps = ddpm()
    n = 50
    x0, noise, u = mixture(chain).sample(n, seeds=range(n)), normals(n, 2, first=n), middles(n)
    times = loss.discrete(chain.nodes())
    t, index = times(chain, u), (u * n).long()
    a = abar[index][:, None]
    error = (noise - eps(a.sqrt() * x0 + (1 - a).sqrt() * noise, index)).square().sum(1)
    assert torch.allclose(s.dsm_loss(model, x0, t, loss.simple, noise), error / 2, rtol=1e-8)
    factor = betas**2 / (2 * betas * (1 - betas) * (1 - abar))
    found = s.dsm_loss(model, x0, t, times.weight, noise) * 2 / 2 * (chain.t_max - chain.t_min) / n
    assert torch.allclose(found, factor[index] * error, rtol=1e-8)


def test_the_chain_with_the_posterior_variance():
    """KL(q(x_{i-1} | x_i, x0) || the same with x0_hat), eq. 6-7; the lowest time belongs to the decoder, as in `elbo(times=)`."""
    betas, chain, abar, model, eps = ddpm()
    n = 50
    x0, noise, index = mixture(chain).sample(n, seeds=range(n)), normals(n, 2, first=n), torch.arange(n)
    times = loss.discrete(chain.nodes(), upper=False)
    before = torch.cat([torch.ones(1, dtype=D), abar[:-1]])
    a = abar[:, None]
    x = a.sqrt() * x0 + (1 - a).sqrt() * noise
    x0_hat = (x - (1 - a).sqrt() * eps(x, index)) / a.sqrt()
    share = (before.sqrt() * betas / (1 - abar))[:, None]  # of x0 in the posterior's mean
    kl = (share * (x0 - x0_hat)).square().sum(1) / (2 * (1 - before) / (1 - abar) * betas)
    kl[0] = 0
    found = s.dsm_loss(model, x0, (index + 1).double() / n, times.weight, noise) * 2 / 2 * (chain.t_max - chain.t_min) / n
    assert torch.allclose(found, kl, rtol=1e-8)
    sums = s.elbo(model, x0[:3].repeat(200, 1), times=chain.nodes(), seeds=range(600)).matching
    rows = x0[:3].repeat(200, 1).repeat_interleave(n, 0)
    t = (index + 1).double().repeat(600) / n
    draws = s.dsm_loss(model, rows, t, times.weight, normals(len(rows), 2)) * (chain.t_max - chain.t_min) / n
    mine = draws.reshape(600, n).sum(1)
    assert abs(float(mine.mean() - sums.mean())) < 5 * float((mine.var() / 600 + sums.var() / 600).sqrt())


@pytest.mark.parametrize("name", SIX)
def test_many_steps_are_the_continuous_likelihood(name):
    sde = SDES[name]
    times = loss.discrete(torch.linspace(sde.t_min, sde.t_max, 20_001, dtype=D), upper=False)
    t = loss.discrete(torch.linspace(sde.t_min, sde.t_max, 20_001, dtype=D)[1000:19_000:50])(sde, uniforms(100))
    assert torch.allclose(times.weight(sde, t), loss.likelihood(sde, t), rtol=5e-3)
    upper = loss.discrete(times.times, upper=True)
    assert torch.allclose(upper.weight(sde, t), loss.likelihood(sde, t), rtol=5e-3)
    assert torch.allclose(times.weight(sde, t.float().double()), times.weight(sde, t), rtol=1e-9)  # the nearest node


def test_the_discrete_minimum_is_the_exact_denoiser():
    _, chain, *_ = ddpm()
    law, n, times = mixture(chain), 20_000, loss.discrete(chain.nodes())
    x0, noise, t = law.sample(n, seeds=range(n)), normals(n, 2, first=n), times(chain, uniforms(n, 2 * n))
    slope = [s.dsm_loss(Perturbed(law, h), x0, t, times.weight, noise) for h in (1e-4, -1e-4)]
    slope = (slope[0] - slope[1]) / 2e-4
    assert 0 < slope.mean().abs() < 5 * slope.std() / n**0.5
