import functools

import pytest
import torch
from laws import SIX, D, every_sde, mixture
from torch import nn

from scoresde import EDM, MLP, VE, VP, Gaussian, Preconditioned, Wrapped, flow, parameterizations, reverse_drift, sample
from scoresde.noise import seeded
from scoresde.parameterizations import Prediction

SDES = every_sde()
QUANTITIES = ("x0", "eps", "score", "v", "velocity")


def point(sde, share=0.4):
    t = torch.tensor(sde.t_min + share * (sde.t_max - sde.t_min), dtype=D)
    return seeded(range(6)).initial((6, 3), D), t


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_conversions_are_inverse(name, quantity):
    sde = SDES[name]
    for share in (0.0, 0.01, 0.4, 0.9, 1.0):
        x, t = point(sde, share)
        a, s = sde.alpha(t), sde.sigma(t)
        x0 = seeded(range(9, 15)).initial((6, 3), D)
        p = Prediction(x, x0, a, s)
        ca, cb = getattr(parameterizations, f"from_{quantity}")(a, s)
        back = ca * x + cb * getattr(p, quantity)
        scale = max(1.0, float(ca.abs()))  # x / alpha is large at t_max: rounding is relative to it
        assert (back - x0).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("name", SIX)
def test_definitions(name):
    """x = alpha x0 + sigma eps, score = -eps / sigma, v = alpha eps - sigma x0, velocity = eps - x0."""
    sde = SDES[name]
    x, t = point(sde)
    p = mixture(sde).predict(x[:, :2], t)
    assert torch.allclose(p.alpha * p.x0 + p.sigma * p.eps, p.x, rtol=1e-12)
    assert torch.allclose(p.score * p.sigma, -p.eps)
    assert torch.allclose(p.v, p.alpha * p.eps - p.sigma * p.x0)
    assert torch.allclose(p.velocity, p.eps - p.x0)


@pytest.mark.parametrize("name", SIX)
def test_velocity_is_the_derivative_in_tau(name):
    """d[x / (alpha + sigma)] / d tau, tau = sigma / (alpha + sigma), along the flow."""
    sde = SDES[name]
    x, t = point(sde, 0.5)
    denoiser = mixture(sde)
    dx = flow(denoiser, x[:, :2], t)
    h = 1e-6 * t
    total = lambda u: sde.alpha(u) + sde.sigma(u)
    tau = lambda u: sde.sigma(u) / total(u)
    d_total, d_tau = (total(t + h) - total(t - h)) / (2 * h), (tau(t + h) - tau(t - h)) / (2 * h)
    derivative = (dx / total(t) - x[:, :2] * d_total / total(t) ** 2) / d_tau
    assert torch.allclose(derivative, denoiser.predict(x[:, :2], t).velocity, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SIX)
def test_flow_and_reverse_drift(name):
    """flow = alpha' x0 + sigma' eps; reverse drift = f x - g^2 score; their difference is g^2 score / 2."""
    sde = SDES[name]
    x, t = point(sde, 0.5)
    x = x[:, :2]
    denoiser = mixture(sde)
    p, h = denoiser.predict(x, t), 1e-6 * t
    d_alpha, d_sigma = ((c(t + h) - c(t - h)) / (2 * h) for c in (sde.alpha, sde.sigma))
    assert torch.allclose(flow(denoiser, x, t), d_alpha * p.x0 + d_sigma * p.eps, rtol=1e-5, atol=1e-7)
    gap = flow(denoiser, x, t) - reverse_drift(denoiser, x, t)
    assert torch.allclose(gap, sde.diffusion(t) ** 2 * p.score / 2, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_wrapped_callables(name, quantity):
    """Any of the five from a callable gives the same denoiser; per-sample times and a 0-dim time agree."""
    truth = mixture(SDES[name])
    wrapped = getattr(Wrapped, f"from_{quantity}")(lambda x, t: getattr(truth.predict(x, t), quantity), truth.sde)
    x, t = point(truth.sde)
    x = x[:, :2]
    assert torch.allclose(wrapped(x, t), truth(x, t), rtol=1e-9, atol=1e-9)
    assert torch.allclose(wrapped(x, t.expand(6).reshape(6, 1)), truth(x, t), rtol=1e-9, atol=1e-9)
    assert torch.allclose(wrapped.score(x, t), truth.score(x, t), rtol=1e-8, atol=1e-8)


def test_k_diffusion_and_score_sde_models_fit_on_day_one():
    """k-diffusion: x0 of (x, sigma [B]); score_sde: score of (x, t [B])."""
    edm, vp = mixture(EDM()), mixture(VP())

    def k_model(x, sigma):
        assert sigma.shape == (len(x),)
        return edm(x, sigma.double().reshape(-1, 1))

    def score_fn(x, t):
        assert t.shape == (len(x),)
        return vp.score(x, t.double().reshape(-1, 1))

    ours = Wrapped.from_x0(lambda x, t: k_model(x, t.flatten().expand(len(x)).to(x)), EDM())
    theirs = Wrapped.from_score(lambda x, t: score_fn(x, t.flatten().expand(len(x)).to(x)), VP())
    for wrapped, truth in ((ours, edm), (theirs, vp)):
        a, b = (sample(d, (4, 2), nfe=11, seeds=range(4), dtype=D).x for d in (wrapped, truth))
        assert (a - b).abs().max() < 1e-10


PARAMETERIZATIONS = [getattr(parameterizations, n) for n in parameterizations.__all__ if n != "Prediction"]


class Answer(nn.Module):
    """A network that knows what is asked of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=D))

    def forward(self, x, c_noise):
        return self.answer


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("fn", PARAMETERIZATIONS, ids=lambda f: f.__name__)
def test_parameterizations_ask_for_what_they_say(name, fn):
    truth = mixture(SDES[name])
    x, t = point(truth.sde)
    x, net = x[:, :2], Answer()
    model, p = Preconditioned(net, truth.sde, fn), truth.predict(x, t)
    if fn is parameterizations.edm:
        c_skip, c_out, _, _ = fn(truth.sde, t)
        net.answer = (p.x0 - c_skip * x) / c_out
    else:
        net.answer = getattr(p, fn.__name__)
    assert torch.allclose(model(x, t), p.x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SIX)
def test_edm_parameterization_is_karras_table_1_in_x_over_alpha(name):
    sde, sd = SDES[name], 0.5
    _, t = point(sde)
    c_skip, c_out, c_in, c_noise = parameterizations.edm(sde, t)
    rho, a = sde.rho(t), sde.alpha(t)
    assert torch.allclose(c_skip * a, sd**2 / (rho**2 + sd**2))
    assert torch.allclose(c_out, rho * sd / (rho**2 + sd**2).sqrt())
    assert torch.allclose(c_in * a, 1 / (rho**2 + sd**2).sqrt())
    assert torch.allclose(c_noise, rho.log() / 4)
    assert torch.allclose((a**2 * sd**2 + sde.sigma(t) ** 2) * c_in**2, torch.ones((), dtype=D))  # unit-variance input


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, D])
def test_the_network_runs_in_its_own_dtype_and_the_state_keeps_its(dtype):
    net = MLP(2, width=16, depth=1).to(dtype)
    for fn in PARAMETERIZATIONS:
        model = Preconditioned(net, VP(), fn)
        for x_dtype in (torch.float32, D):
            out = model(torch.ones(3, 2, dtype=x_dtype), torch.tensor(0.5, dtype=D))
            assert out.dtype == x_dtype
            assert out.isfinite().all()


def test_times_stay_distinct_on_their_way_to_a_bfloat16_network():
    """1,000 times enter the network as 1,000 different numbers (bf16 would keep 506)."""
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

        def forward(self, x, c_noise):
            seen.append(c_noise)
            return x

    model = Preconditioned(Net(), VP())
    model(torch.zeros(1000, 2), torch.linspace(1e-3, 1, 1000, dtype=D).reshape(-1, 1))
    assert seen[0].dtype == torch.float32
    assert len(seen[0].unique()) == 1000


def test_labels_follow_their_rows():
    model = Preconditioned(MLP(2, width=16, depth=1, classes=3), VP())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    labels = torch.tensor([0, 1, 2, 1])
    given = model.condition(labels)
    x, t = torch.linspace(-1, 1, 8).reshape(4, 2), torch.tensor(0.5, dtype=D)
    whole = given(x, t)
    part = given.select(torch.tensor([2, 0]))(x[[2, 0]], t)
    assert torch.allclose(whole[[2, 0]], part, atol=1e-6)
    assert not torch.allclose(whole, model(x, t), atol=1e-4)
    a = sample(given, (4, 2), nfe=5, seeds=range(4), microbatch=2).x
    b = sample(given, (4, 2), nfe=5, seeds=range(4)).x
    assert torch.allclose(a, b, atol=1e-5)


def test_partial_sets_sigma_data():
    fn = functools.partial(parameterizations.edm, sigma_data=0.1)
    model = Preconditioned(MLP(2, width=16, depth=1), VE(), fn)  # the last layer starts at zero: x0 = c_skip x
    t = torch.tensor(0.5, dtype=D)
    assert torch.allclose(model(torch.ones(2, 2, dtype=D), t), fn(VE(), t)[0] * torch.ones(2, 2, dtype=D), rtol=1e-6)


def test_gaussian_score_is_the_gradient_of_its_log_density():
    for name in SIX:
        denoiser = Gaussian(
            SDES[name], torch.tensor([0.3, -1.0], dtype=D), covariance=torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=D)
        )
        x, t = point(denoiser.sde)
        x = x[:, :2].requires_grad_()
        gradient = torch.autograd.grad(denoiser.log_prob(x, t).sum(), x)[0]
        assert torch.allclose(gradient, denoiser.score(x, t), rtol=1e-9, atol=1e-10)
