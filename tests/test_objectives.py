"""What may be trained on beside `dsm_loss`: its minimum, its mean, its variance, and what it refuses."""

import copy
import functools
import warnings

import pytest
import torch
from laws import SIX, D, every_sde, mixture
from scipy import stats
from test_loss import Perturbed, normals, uniforms
from torch import nn

import scoresde as s
from scoresde import divergence, loss, objectives
from scoresde.noise import seeded

SDES = every_sde()
SAME = {
    "controlled": objectives.controlled(), "antithetic": objectives.antithetic(),
    "implicit": objectives.implicit_score_matching, "sliced": objectives.sliced_score_matching,
    "sliced, three": functools.partial(objectives.sliced_score_matching, divergence=divergence.gaussian(3)),
}  # fmt: skip
KERNELS = {"normal": objectives.normal(), "logistic": objectives.logistic(), "student": objectives.student(9)}


class Ready(objectives.Uncertainty):
    """With a u that is not 0, and float64."""

    def __init__(self):
        super().__init__(8)
        with torch.no_grad():
            self.linear.copy_(normals(1, 8)[0])
        self.double()


EVERY = {
    **SAME, "uncertainty": Ready(), "kernel normal": objectives.kernel_loss(objectives.normal()),
    "kernel logistic": objectives.kernel_loss(objectives.logistic()), "kernel student": objectives.kernel_loss(objectives.student()),
}  # fmt: skip


def gaussian(sde):
    return s.Gaussian(sde, torch.tensor([0.6, -0.4], dtype=D), covariance=torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=D))


LAWS = {"mixture": mixture, "gaussian": gaussian}


def network(sde=None, width=16, dtype=D):
    """A small network whose output is not 0."""
    net = s.MLP(2, width=width, depth=1).to(dtype)
    with torch.no_grad():
        net.leave.weight.add_(0.3 * normals(2, width).to(dtype))
    return s.Preconditioned(net, s.VP() if sde is None else sde)


def test_every_objective_is_tried():
    tried = {type(o) for o in EVERY.values()} | {type(k) for k in KERNELS.values()} | set(SAME.values())
    tried |= {objectives.Kernel, objectives.Uncertainty, objectives.gradient_variance, objectives.GradientVariance}
    assert {getattr(objectives, name) for name in objectives.__all__} <= tried


# --- the minimum and the mean --------------------------------------------------------------------------------------------
def drawn(law, n):
    return law.sample(n, seeds=range(n)), loss.log_normal(law.sde, uniforms(n, 2 * n)), normals(n, 2, first=n)


@pytest.mark.parametrize("kind", [*SAME, "uncertainty"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", SIX)
def test_the_exact_denoiser_is_the_minimum(name, law, kind):
    """The derivative along a perturbation is zero to 5 sigma, and large perturbations cost more, on the same draws."""
    law, n = LAWS[law](SDES[name]), 8000
    x0, t, noise = drawn(law, n)
    with torch.no_grad():
        at = lambda size: EVERY[kind](Perturbed(law, size), x0, t, loss.capped, noise)
        exact, slope = at(0.0), (at(1e-4) - at(-1e-4)) / 2e-4
        assert slope.std() > 0
        assert slope.mean().abs() < 5 * slope.std() / n**0.5
        for size in (1.0, -1.0):
            gap = at(size) - exact
            assert gap.mean() > 5 * gap.std() / n**0.5


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", SIX)
def test_the_mean_is_that_of_dsm_loss(name, kind):
    """Value and derivative, at a denoiser that is wrong: no bias."""
    law, n = mixture(SDES[name]), 8000
    x0, t, noise = drawn(law, n)
    with torch.no_grad():
        at = lambda objective, size: objective(Perturbed(law, size), x0, t, loss.edm, noise)
        gap = at(SAME[kind], 0.7) - at(s.dsm_loss, 0.7)
        slopes = [(at(o, 0.7 + 1e-4) - at(o, 0.7 - 1e-4)) / 2e-4 for o in (SAME[kind], s.dsm_loss)]
    for difference in (gap, slopes[0] - slopes[1]):
        assert difference.std() > 0
        assert difference.mean().abs() < 5 * difference.std() / n**0.5
    assert slopes[1].mean() > 5 * slopes[1].std() / n**0.5  # and there is something to agree on


class Blurred(s.Denoiser):
    """The score of atoms blurred by alpha x0 + sigma z, by autograd of log sum_i w_i k((x - alpha a_i) / sigma)."""

    def __init__(self, sde, atoms, log_k):
        super().__init__(sde)
        self.atoms, self.log_k = atoms, log_k

    def forward(self, x, t):
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            z = (y[:, None] - alpha[..., None] * self.atoms) / sigma[..., None]
            (score,) = torch.autograd.grad(self.log_k(z).logsumexp(1).sum(), y)
        return (x + sigma**2 * score) / alpha


LOG_K = {  # up to constants, of z [..., 2]
    "normal": lambda z: -z.square().sum(-1) / 2,
    "logistic": lambda z: -2 * (z * torch.pi / 12**0.5).cosh().log().sum(-1),
    "student": lambda z: -(9 + 2) / 2 * (1 + z.square().sum(-1) / 7).log(),
}


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("name", SIX)
def test_the_minimum_under_a_kernel_is_the_score_of_the_blurred_law(name, kind):
    sde, n = SDES[name], 8000
    atoms = normals(5, 2)
    x0 = atoms[(uniforms(n, 7 * n) * 5).long()]
    noise = normals(n, 2, first=n)
    t = loss.log_normal(sde, uniforms(n, 2 * n), mean=0.0, std=0.7)
    law = Blurred(sde, atoms, LOG_K[kind])
    with torch.no_grad():
        at = lambda size: objectives.kernel_loss(KERNELS[kind])(Perturbed(law, size), x0, t, loss.capped, noise)
        exact, slope = at(0.0), (at(1e-4) - at(-1e-4)) / 2e-4
        assert slope.mean().abs() < 5 * slope.std() / n**0.5
        for size in (1.0, -1.0):
            gap = at(size) - exact
            assert gap.mean() > 5 * gap.std() / n**0.5
        if kind == "student":  # the check has teeth: the Gaussian's score is not that law's
            other = Blurred(sde, atoms, LOG_K["normal"])
            at = lambda size: objectives.kernel_loss(KERNELS[kind])(Perturbed(other, size), x0, t, loss.capped, noise)
            gap = at(0.0) - exact
            assert gap.mean() > 5 * gap.std() / n**0.5


@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_have_their_law_and_its_score(kind):
    kernel, n = KERNELS[kind], 20_000
    z = kernel.draw(normals(n, 3))
    cdf = {
        "normal": stats.norm.cdf, "logistic": stats.logistic(scale=3**0.5 / torch.pi).cdf,
        "student": stats.t(9, scale=(7 / 9) ** 0.5).cdf,
    }[kind]  # fmt: skip
    for column in z.T:
        assert stats.kstest(column.numpy(), cdf).pvalue > 1e-3
        assert float(column.var()) == pytest.approx(1, abs=0.06)
    if kind == "student":  # one radius for all dimensions: |z|^2 / 3 has an F law
        assert stats.kstest((z.square().sum(1) / 3 * 9 / 7).numpy(), stats.f(3, 9).cdf).pvalue > 1e-3
    z = z[:50, :2].clone().requires_grad_()
    (truth,) = torch.autograd.grad(LOG_K[kind](z).sum(), z)
    assert torch.allclose(kernel.score(z.detach()), truth, rtol=1e-9, atol=1e-12)
    far = torch.tensor([[-30.0, 30.0], [-8.0, 8.0]])
    assert KERNELS[kind].draw(far).isfinite().all()
    assert KERNELS[kind].score(KERNELS[kind].draw(far)).isfinite().all()


def test_a_kernel_of_normal_noise_is_dsm_loss():
    law, n = mixture(s.VP()), 40
    x0, t, noise = drawn(law, n)
    found = objectives.kernel_loss(objectives.normal())(Perturbed(law, 0.5), x0, t, loss.edm, noise)
    assert torch.equal(found, s.dsm_loss(Perturbed(law, 0.5), x0, t, loss.edm, noise))


# --- the formulas --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
def test_implicit_is_hyvarinens_objective(name):
    """2 sigma^4 / (alpha^2 D) (tr grad s + |s|^2 / 2) + rho^2, from the Jacobian of the score itself."""
    law = mixture(SDES[name])
    x0, t, noise = drawn(law, 6)
    model, sde = Perturbed(law, 0.5), law.sde
    found = objectives.implicit_score_matching(model, x0, t, lambda sde, t: 1.0, noise)
    for i in range(6):
        at = t[i].reshape(1, 1)
        x = sde.perturb(x0[i : i + 1], at, noise[i : i + 1])
        score = lambda y, at=at: model.score(y[None], at)[0]
        trace = torch.autograd.functional.jacobian(score, x[0]).diagonal().sum()
        a, sigma = sde.alpha(t[i]), sde.sigma(t[i])
        truth = sigma**4 / a**2 * (2 * trace + score(x[0]).square().sum()) / 2 + (sigma / a) ** 2
        assert torch.allclose(found[i], truth, rtol=1e-7, atol=1e-9)


def test_sliced_in_one_dimension_is_implicit_and_in_more_its_mean():
    law = s.Gaussian(s.VP(), torch.zeros(1, dtype=D), 0.5)
    x0, noise, t = normals(9, 1), normals(9, 1, first=9), uniforms(9).clamp(min=0.01)
    every = [o(law, x0, t, loss.edm, noise) for o in (objectives.implicit_score_matching, objectives.sliced_score_matching)]
    assert torch.allclose(*every)
    law = mixture(s.VP())
    x0, noise, t = normals(4, 2), normals(4, 2, first=9), uniforms(4).clamp(min=0.01)
    many = functools.partial(objectives.sliced_score_matching, divergence=divergence.rademacher(2000))
    with torch.no_grad():
        gap = many(law, x0, t, loss.capped, noise) - objectives.implicit_score_matching(law, x0, t, loss.capped, noise)
    assert 0 < float(gap.abs().max()) < 5e-3  # of one probe 3e-2


def test_antithetic_is_the_mean_over_signs():
    law = mixture(s.VP())
    x0, t, noise = drawn(law, 9)
    both = [s.dsm_loss(law, x0, t, loss.edm, sign * noise) for sign in (1, -1)]
    assert torch.equal(objectives.antithetic()(law, x0, t, loss.edm, noise), (both[0] + both[1]) / 2)


@pytest.mark.parametrize("kind", ["implicit", "sliced"])
def test_the_double_backward_is_the_derivative(kind):
    """The gradient in the parameters against central differences."""
    model = network()
    x0, t, noise = drawn(mixture(s.VP()), 5)
    value = lambda: SAME[kind](model, x0, t, loss.edm, noise).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p, g in zip(parameters, torch.autograd.grad(value(), parameters, materialize_grads=True), strict=True):
        direction = normals(1, *p.shape, first=3)[0]
        ends = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                p.add_(h * direction)
                ends.append(value())
                p.sub_(h * direction)
        assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float((g * direction).sum()), rel=1e-5, abs=1e-5)


# --- uncertainty ---------------------------------------------------------------------------------------------------------
def test_exp_u_becomes_the_mean_loss():
    """On N(0, V) the exact mean loses V snr / (1 + V snr) of eps: u is its log, at every noise level, after training u alone."""
    sde, v, n = s.VP(), 0.25, 4096
    law = s.Gaussian(sde, torch.zeros(4, dtype=D), v**0.5)
    objective = objectives.Uncertainty(16).double()
    times = loss.importance(lambda sde, t: torch.ones_like(t), 1.0)
    t = loss.stratified(times)(sde, uniforms(n))
    x0, noise = law.sample(n, seeds=range(n)), normals(n, 4, first=n)
    fixed = s.dsm_loss(law, x0, t, loss.simple, noise)
    assert torch.equal(objective(law, x0, t, loss.simple, noise), fixed)  # u starts at 0
    objective.objective = lambda *_: fixed
    optimizer = torch.optim.LBFGS(objective.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = objective(law, x0, t, loss.simple, noise).mean()
        value.backward()
        return value

    optimizer.step(closure)
    at = torch.linspace(0.05, 0.95, 19, dtype=D)
    snr = loss.simple(sde, at)
    truth = v * snr / (1 + v * snr)
    error = (objective.u(sde.logsnr(at)) - truth.log()).detach().abs()
    assert float(error.max()) < 0.3
    assert float(error.mean()) < 0.1


def test_uncertainty_trains_with_the_denoiser_and_draws_nothing():
    before = torch.random.get_rng_state()
    objective = objectives.Uncertainty()
    assert torch.equal(torch.random.get_rng_state(), before)
    model = network(dtype=torch.float32)
    x0, t, noise = drawn(mixture(s.VP()), 8)
    found = objective(model, x0.float(), t, loss.edm, noise.float())
    assert found.dtype == torch.float32
    found.mean().backward()
    assert model.net.leave.weight.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())
    assert objective.linear.shape == (128,)
    twin = objectives.Uncertainty()
    twin.load_state_dict(copy.deepcopy(objective.state_dict()))
    assert torch.equal(twin(model, x0.float(), t, loss.edm, noise.float()), found)
    around = objectives.Uncertainty(8, objectives.controlled())
    assert torch.equal(around(model, x0, t, loss.edm, noise), objectives.controlled()(model, x0, t, loss.edm, noise))


# --- variance ------------------------------------------------------------------------------------------------------------
class Tilted(s.Denoiser):
    """The exact mean and a learned error rho^2 theta f(x) of it: one of the score of order one at every noise level."""

    def __init__(self, inner):
        super().__init__(inner.sde)
        self.inner, self.theta = inner, nn.Parameter(torch.zeros((), dtype=D))

    def forward(self, x, t):
        return self.inner(x, t) + self.theta * self.sde.rho(t).square() * torch.tanh(x.flip(1))


def variance_at(model, data, rho, objective, draws=100):
    at = lambda sde, u: torch.full_like(u, rho)
    generator = torch.Generator().manual_seed(0)
    how = dict(weight=loss.simple, times=at, objective=objective, batch=64, draws=draws, generator=generator)
    return objectives.gradient_variance(model, data, **how).variance


@pytest.mark.parametrize("kind", ["controlled", "antithetic", "implicit", "sliced"])
def test_the_variance_of_small_noise_is_gone(kind):
    """At the exact score: 1 / rho^2 times less than that of `dsm_loss`, up to a constant."""
    law = mixture(s.EDM(t_min=1e-4))
    model, data = Tilted(law), law.sample(2000, seeds=range(2000))
    gains = {}
    for rho in (0.001, 0.01, 0.1):
        plain, less = (variance_at(model, data, rho, o) for o in (s.dsm_loss, SAME[kind]))
        gains[rho] = plain / less
    print(kind, gains)
    assert gains[0.1] > 2
    for small, large in ((0.001, 0.01), (0.01, 0.1)):
        assert 50 < gains[small] / gains[large] < 200


def test_the_control_variate_is_harmless_at_large_noise():
    model, data = network(s.EDM()), mixture(s.EDM()).sample(500, seeds=range(500))
    for rho in (1.0, 10.0):
        assert variance_at(model, data, rho, objectives.controlled(), 50) < 1.5 * variance_at(model, data, rho, s.dsm_loss, 50)


def test_importance_lowers_the_variance_of_the_likelihood():
    """The mean of one step is the same, the variance many times less: measured 6.6 under VP and 280 under EDM in docs/objectives.md."""
    for sde, factor in ((s.VP(), 3), (s.EDM(), 30)):
        model, data = network(sde), mixture(sde).sample(500, seeds=range(500))
        imp = loss.importance(loss.likelihood)
        of = lambda **how: objectives.gradient_variance(
            model, data, batch=64, draws=60, generator=torch.Generator().manual_seed(0), **how
        )
        plain, chosen = of(weight=loss.likelihood, times=loss.uniform), of(weight=imp.weight, times=imp)
        assert plain.variance > factor * chosen.variance
        assert abs(plain.mean_square - chosen.mean_square) < 5 * (plain.stderr + chosen.stderr)


class Constant(s.Denoiser):
    """x0 = theta, whatever x: the gradient of the mean loss is 2 (theta - mean of x0)."""

    def __init__(self):
        super().__init__(s.VP())
        self.theta = nn.Parameter(torch.tensor(0.5, dtype=D))

    def forward(self, x, t):
        return self.theta.expand(x.shape)


def test_gradient_variance_is_that_of_the_gradient():
    model, data = Constant(), normals(1000, 1)
    found = objectives.gradient_variance(
        model, data, weight=lambda sde, t: 1.0, batch=10, draws=2000, generator=torch.Generator().manual_seed(1)
    )
    truth = 4 * float(data.var(correction=0)) / 10
    square = 4 * (0.5 - float(data.mean())) ** 2
    assert found.draws == 2000
    assert abs(found.variance - truth) < 5 * found.stderr
    assert abs(found.mean_square - square) < 5 * found.stderr
    assert found.relative == found.variance / found.mean_square
    assert model.theta.grad is None
    whole = objectives.gradient_variance(model, data, weight=lambda sde, t: 1.0, draws=3)  # every draw has all the data
    assert whole.variance == pytest.approx(0, abs=1e-12)
    assert whole.mean_square == pytest.approx(square)


def test_gradient_variance_repeats_and_leaves_the_denoiser_as_it_is():
    model, data = network().eval(), normals(32, 2)
    state = torch.random.get_rng_state()
    of = lambda: objectives.gradient_variance(model, data, draws=3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert of() == of()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


# --- shapes, dtypes, repetition ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", EVERY)
def test_the_loss_is_a_function_of_its_row(kind):
    """The same draws give the same loss, a row's is its own whatever the batch, t takes three shapes, and a batch may be of one or none."""
    model, objective = network(), EVERY[kind]
    x0, noise = normals(5, 2), normals(5, 2, first=9)
    each = torch.linspace(0.1, 0.9, 5, dtype=D)
    value = objective(model, x0, each, loss.edm, noise)
    assert value.shape == (5,)
    assert torch.equal(objective(model, x0, each, loss.edm, noise), value)
    assert torch.equal(objective(model, x0, each[:, None], loss.edm, noise), value)
    rows = [objective(model, x0[i : i + 1], each[i], loss.edm, noise[i : i + 1]) for i in range(5)]
    assert torch.allclose(torch.cat(rows), value, rtol=1e-9)
    assert objective(model, x0[:0], each[:0], loss.edm, noise[:0]).shape == (0,)
    assert not torch.equal(objective(model, x0, each, loss.edm), objective(model, x0, each, loss.edm))
    with torch.no_grad():
        assert torch.allclose(objective(model, x0, each, loss.edm, noise), value, rtol=1e-9)
    assert x0.grad is None
    assert not x0.requires_grad


@pytest.mark.parametrize("kind", EVERY)
def test_the_loss_has_the_dtype_of_the_data_and_any_event_shape(kind):
    law = s.Gaussian(s.VP(), torch.zeros(1, 2, 2, dtype=D), 0.5)
    x0, noise, t = normals(3, 1, 2, 2), normals(3, 1, 2, 2, first=9), torch.full((3,), 0.3, dtype=D)
    double = EVERY[kind](law, x0, t, loss.edm, noise)
    single = EVERY[kind](law, x0.float(), t, loss.edm, noise.float())
    assert (double.dtype, single.dtype) == (D, torch.float32)
    if kind not in ("sliced", "sliced, three", "kernel student"):  # whose own draws follow the bits of the noise
        assert torch.allclose(single.double(), double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_draws_from_the_global_generator(kind):
    state = torch.random.get_rng_state()
    EVERY[kind](network(), normals(3, 2), uniforms(3).clamp(min=0.01), loss.edm)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", EVERY)
def test_gradients_reach_the_network(kind):
    model = network(dtype=torch.float32)
    EVERY[kind](model, normals(8, 2).float(), uniforms(8).clamp(min=0.01), loss.edm).mean().backward()
    assert model.net.leave.weight.grad.abs().sum() > 0
    assert model.net.enter.weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["implicit", "sliced"])
def test_images_and_labels_take_a_double_backward(kind):
    net = s.UNet((1, 4, 4), channels=8, classes=3)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * seeded([i]).initial((1, *p.shape), torch.float32)[0])
    model = s.Preconditioned(net, s.VP()).condition(torch.tensor([0, 2, -1]))
    SAME[kind](model, normals(3, 1, 4, 4).float(), uniforms(3).clamp(min=0.01), loss.edm).mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in net.parameters() if p.grad is not None) > 0


# --- what is refused -----------------------------------------------------------------------------------------------------
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


def attention(x):
    h = x[:, None, :, None] * torch.ones(1, 1, 1, 8)
    return torch.nn.functional.scaled_dot_product_attention(h, h, h)[:, 0, :, 0]


class Net(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn, self.layer = fn, nn.Linear(2, 2)

    def forward(self, x, c_noise):
        return self.fn(self.layer(x))


@pytest.mark.parametrize("kind", ["implicit", "sliced"])
@pytest.mark.parametrize("fn", [Once.apply, attention])
def test_a_network_without_a_second_derivative_is_refused(fn, kind):
    model = s.Preconditioned(Net(fn), s.VP())
    x0, t = normals(4, 2).float(), uniforms(4).clamp(min=0.01)
    with pytest.raises(ValueError, match=r"without a second derivative.*dsm_loss"):
        SAME[kind](model, x0, t, loss.edm)
    for other in ("controlled", "antithetic"):
        SAME[other](model, x0, t, loss.edm).mean().backward()
    with torch.no_grad():  # one derivative is enough to look at the loss
        assert SAME[kind](model, x0, t, loss.edm).isfinite().all()
    smooth = s.Preconditioned(Net(torch.tanh), s.VP())
    SAME[kind](smooth, x0, t, loss.edm).mean().backward()


def test_a_network_without_a_derivative_is_refused():
    model = s.Preconditioned(Net(lambda x: x.detach()), s.VP())
    with pytest.raises(ValueError, match="has no gradient to x"), warnings.catch_warnings():
        objectives.implicit_score_matching(model, normals(4, 2).float(), uniforms(4).clamp(min=0.01), loss.edm)


@pytest.mark.parametrize("kind", EVERY)
def test_every_objective_refuses_what_dsm_loss_refuses(kind):
    objective, law = EVERY[kind], mixture(s.VP())
    x0, t = normals(4, 2), torch.full((4,), 0.5, dtype=D)
    for args, error, message in (
        ((nn.Linear(2, 2), x0, t, loss.edm), TypeError, "denoiser is Linear; wanted a Denoiser"),
        ((law, x0.long(), t, loss.edm), TypeError, "x0 is .*int64; the state is float32 or float64"),
        ((law, x0, 3 * t, loss.edm), ValueError, r"t spans \[1.5, 1.5\]; wanted times of VP"),
        ((law, x0, 0.5, loss.edm), TypeError, "t is float; wanted a tensor"),
        ((law, x0, t[:3], loss.edm), ValueError, r"t is \[3\] float64; wanted \(\) or \[4, 1\]"),
        ((law, x0, t, 1.0), TypeError, "weight is float; wanted a function"),
        ((law, x0, t, loss.edm, x0[:3]), ValueError, r"noise is \[3, 2\]; wanted the shape of x0, \[4, 2\]"),
        ((law, x0, t, loss.edm, 1.0), TypeError, "noise is float; wanted unit noise"),
    ):
        with pytest.raises(error, match=message):
            objective(*args)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: objectives.Uncertainty(7), ValueError, "channels is 7; wanted an even number.*channels=8"),
        (lambda: objectives.Uncertainty(8, 3), TypeError, "objective is int; wanted an objective"),
        (lambda: objectives.antithetic(3), TypeError, "objective is int; wanted an objective"),
        (lambda: objectives.controlled(0.0), ValueError, r"variance is 0.0; wanted a finite number in \(0, inf\)"),
        (lambda: objectives.kernel_loss(objectives.logistic), TypeError, "wanted a Kernel such as logistic.*not yet called"),
        (lambda: objectives.student(2), ValueError, "dof is 2; wanted an integer of at least 3"),
        (lambda: objectives.student(5.0), TypeError, "dof is 5.0"),
        (
            lambda: objectives.sliced_score_matching(mixture(s.VP()), normals(2, 2), uniforms(2), loss.edm, None, 3), TypeError,
            "divergence is int; wanted one of scoresde.divergence",
        ),
        (lambda: objectives.gradient_variance(mixture(s.VP()), normals(2, 2)), ValueError, "Mixture has no parameters"),
        (lambda: objectives.gradient_variance(network(), normals(2, 2), draws=1), ValueError, "draws is 1"),
        (lambda: objectives.gradient_variance(network(), normals(2, 2), batch=0), ValueError, "batch is 0"),
        (lambda: objectives.gradient_variance(network(), normals(2, 2), times=3), TypeError, "times is int; wanted a function"),
        (lambda: objectives.gradient_variance(network(), normals(2, 2), objective=3), TypeError, "objective is int"),
        (lambda: objectives.gradient_variance(network(), normals(2, 2), generator=3), TypeError, "generator is int; wanted a torch"),
        (lambda: objectives.gradient_variance(network(), 3), TypeError, "x0 is int; wanted a tensor"),
    ],
)  # fmt: skip
def test_bad_choices_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
