import math

import numpy as np
import pytest
import torch
from laws import SIX, D, every_sde
from scipy.integrate import quad

from scoresde import EDM, VE, VP, Ancestral, DiscreteVP, LinearSDE, Rectified, SubVP, Tabulated, Wrapped, grid, sample
from scoresde.noise import seeded
from scoresde.solve import solve

SDES = every_sde()


def times(sde, n=201):
    return torch.linspace(sde.t_min, sde.t_max, n, dtype=D)


def test_closed_forms_of_the_papers():
    t = torch.tensor([1e-3, 0.05, 0.3, 0.5, 1.0], dtype=D)
    B = 0.1 * t + 19.9 * t**2 / 2
    vp, sub, ve = VP(), SubVP(), VE()
    # Song et al. 2021, eq. 29: mean exp(-B/2) for VP and sub-VP, std sqrt(1 - e^-B) and 1 - e^-B; sigma_min (sigma_max/sigma_min)^t for VE
    assert torch.allclose(vp.alpha(t), torch.exp(-B / 2), rtol=1e-14)
    assert torch.allclose(vp.sigma(t) ** 2 + vp.alpha(t) ** 2, torch.ones_like(t), rtol=1e-14)
    assert torch.allclose(sub.sigma(t), 1 - torch.exp(-B), rtol=1e-12)
    assert torch.allclose(ve.sigma(t), 0.01 * 5000**t, rtol=1e-13)
    assert torch.allclose(vp.diffusion(t) ** 2, 0.1 + 19.9 * t, rtol=1e-14)
    assert torch.allclose(sub.diffusion(t) ** 2, (0.1 + 19.9 * t) * (1 - torch.exp(-2 * B)), rtol=1e-12)
    assert torch.allclose(ve.diffusion(t), ve.sigma(t) * math.sqrt(2 * math.log(5000)), rtol=1e-13)
    assert torch.allclose(vp.alpha(t)[1:], torch.tensor([0.985, 0.630, 0.281, 0.00657], dtype=D), atol=5e-4)


@pytest.mark.parametrize("name", sorted(SDES))
def test_coefficients_are_each_others_derivatives(name):
    """f = (log alpha)', g^2 = (sigma^2)' - 2 f sigma^2, by central differences of the stated alpha and sigma."""
    sde = SDES[name]
    t = sde.t_min + (sde.t_max - sde.t_min) * torch.tensor([0.0521, 0.2113, 0.5007, 0.8051, 0.9483], dtype=D)
    h = 1e-6 * t
    f = (sde.alpha(t + h).log() - sde.alpha(t - h).log()) / (2 * h)
    g2 = (sde.sigma(t + h) ** 2 - sde.sigma(t - h) ** 2) / (2 * h) - 2 * f * sde.sigma(t) ** 2
    assert torch.allclose(sde.drift_coefficient(t), f, rtol=1e-6, atol=1e-8)
    assert torch.allclose(sde.diffusion(t) ** 2, g2, rtol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(sde.diffusion(t) ** 2, g2, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SDES))
def test_declared_coefficients_equal_derived_ones(name):
    sde = SDES[name]
    t = times(sde)[1:-1]
    assert torch.allclose(sde.drift_coefficient(t), LinearSDE.drift_coefficient(sde, t), rtol=1e-9, atol=1e-9)
    assert torch.allclose(sde.diffusion(t), LinearSDE.diffusion(sde, t), rtol=1e-8)
    assert torch.allclose(sde.logsnr(t), LinearSDE.logsnr(sde, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(SDES))
def test_time_inverts_logsnr(name):
    sde = SDES[name]
    t = times(sde)
    assert (sde.logsnr(t).diff() < 0).all()
    for found in (sde.time(sde.logsnr(t)), LinearSDE.time(sde, sde.logsnr(t))):
        assert ((found - t) / sde.t_max).abs().max() < 1e-12


@pytest.mark.parametrize("name", sorted(SDES))
def test_transitions_compose(name):
    """q(r | t) = q(r | s) after q(s | t); from t_min on, the marginal of t_min carries to that of s."""
    sde = SDES[name]
    t, s, r = times(sde)[[0, 20, 130]]
    (a1, v1), (a2, v2), (a, v) = sde.transition(t, s), sde.transition(s, r), sde.transition(t, r)
    assert torch.allclose(a, a1 * a2, rtol=1e-12)
    assert torch.allclose(v**2, (a2 * v1) ** 2 + v2**2, rtol=1e-11)
    assert torch.allclose(sde.sigma(s) ** 2, (a1 * sde.sigma(t)) ** 2 + v1**2, rtol=1e-11)
    assert sde.transition(s, s)[1] == 0
    with pytest.raises(ValueError, match="forward"):
        sde.transition(r, s)


def test_close_transitions_do_not_cancel():
    sde = VP()
    t = torch.tensor(0.7, dtype=D)
    for h in (1e-6, 1e-9, 1e-12):
        exact = float(sde.diffusion(t) ** 2) * float((t + h) - t)  # g^2 h to first order
        assert abs(float(sde.transition(t, t + h)[1] ** 2) / exact - 1) < max(20 * h, 1e-15 / h)


def test_noise_near_zero_time_is_right_in_float32():
    """sqrt(1 - exp(-B)) in float32 is 0.6 % off at t = 1e-5 and 0 at 1e-7."""
    t = torch.logspace(-8, 0, 200, dtype=D)
    for sde in (VP(), SubVP(), SDES["Cosine"], Rectified(), VE(), EDM()):
        assert torch.allclose(sde.sigma(t.float()).double(), sde.sigma(t), rtol=1e-6)


def test_ve_variance_is_sigma_min_squared_and_the_integral_of_g_squared():
    """x(0) of VE carries noise sigma_min: sigma^2(t) = sigma_min^2 + int_0^t g^2."""
    sde = VE()
    for t in (1e-5, 0.1, 0.5, 1.0):
        integral = quad(lambda u: float(sde.diffusion(torch.tensor(u, dtype=D)) ** 2), 0, t, epsrel=1e-12)[0]
        assert float(sde.sigma(torch.tensor(t, dtype=D)) ** 2) == pytest.approx(sde.sigma_min**2 + integral, rel=1e-10)


@pytest.mark.parametrize("name", SIX)
def test_an_sde_given_by_f_and_g_has_the_same_alpha_and_sigma(name):
    sde = SDES[name]
    table = LinearSDE.from_coefficients(
        sde.drift_coefficient, sde.diffusion, sde.t_min, sde.t_max, sigma_0=sde.sigma_min if name == "VE" else 0.0
    )
    t = times(sde)
    assert isinstance(table, Tabulated)
    assert torch.allclose(table.alpha(t), sde.alpha(t), rtol=1e-11)
    assert torch.allclose(table.sigma(t), sde.sigma(t), rtol=1e-11)
    assert torch.allclose(table.time(sde.logsnr(t)), t, rtol=1e-9)


def test_constants_may_be_coefficients():
    """Ornstein-Uhlenbeck dx = -x dt + sqrt(2) dw: alpha = e^-t, sigma^2 = 1 - e^-2t."""
    sde = LinearSDE.from_coefficients(lambda t: -1.0, lambda t: math.sqrt(2), t_min=1e-3, t_max=5.0)
    t = times(sde)
    assert torch.allclose(sde.alpha(t), torch.exp(-t), rtol=1e-12)
    assert torch.allclose(sde.sigma(t) ** 2, -torch.expm1(-2 * t), rtol=1e-12)
    assert sde.diffusion(t).shape == t.shape


def test_printing_shows_the_ends():
    text = str(VP())
    assert "alpha(t_max) = 0.006572" in text
    assert "SNR(t_min) = 9095" in text
    assert "SNR(t_max) = 4.319e-05" in text
    assert "sigma_max=50.0" in str(VE())


def test_ve_from_data_takes_the_largest_distance():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    assert VE.from_data(x).sigma_max == pytest.approx(5.0)
    big = torch.cat([torch.zeros(9000, 1, 2), torch.full((1, 1, 2), 7.0)])
    assert VE.from_data(big).sigma_max == pytest.approx(7 * math.sqrt(2))
    with pytest.raises(ValueError, match="at least two"):
        VE.from_data(x[:1])


def test_half_precision_modules_cannot_change_the_sde():
    sde = VP()
    model = Wrapped.from_eps(torch.nn.Identity(), sde)
    before = sde.alpha(torch.tensor(0.3, dtype=D))
    assert model.half().sde.alpha(torch.tensor(0.3, dtype=D)) == before


# --- DDPM ----------------------------------------------------------------------------------------------------------------
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=D)


def test_ddpm_chain_is_mapped_exactly_at_its_nodes():
    """Index i of the chain is t = (i + 1) / N."""
    sde, abar = VP.from_betas(BETAS), (1 - BETAS).cumprod(0)
    t = sde.nodes().flip(0)
    assert isinstance(sde, DiscreteVP)
    assert sde.t_min == t[0] == 1 / 1000
    assert sde.t_max == t[-1] == 1
    assert torch.allclose(sde.alpha(t) ** 2, abar, rtol=1e-12)
    assert torch.allclose(sde.sigma(t) ** 2, 1 - abar, rtol=1e-12)
    assert float(sde.alpha(t[-1])) == pytest.approx(0.006353, abs=5e-7)  # sqrt(abar_T) of the chain; the SDE's is 0.006572
    fine = torch.linspace(sde.t_min, 1, 20_011, dtype=D)
    assert (sde.logsnr(fine).diff() < 0).all()


@pytest.mark.parametrize(("upper", "variance"), [(0.0, "posterior"), (1.0, "beta")])
@pytest.mark.parametrize("n", [50, 10])
def test_ancestral_on_the_chain_is_the_ddpm_update(upper, variance, n):
    """Ho et al. 2020, algorithm 2 with eq. 7, both variances, to 1e-10."""
    betas = torch.linspace(1e-3, 0.3, n, dtype=D)
    abar = (1 - betas).cumprod(0)
    sde = VP.from_betas(betas)
    fn = lambda x, t: torch.tanh(x) * 0.9 + 0.05 * t
    x = start = seeded(range(4)).initial((4, 3), D)
    noise = seeded(range(4))
    for i in range(n - 1, 0, -1):
        beta, ab, ab_prev = betas[i], abar[i], abar[i - 1]
        x0 = fn(x, torch.tensor((i + 1) / n, dtype=D))
        mean = ab_prev.sqrt() * beta / (1 - ab) * x0 + (1 - beta).sqrt() * (1 - ab_prev) / (1 - ab) * x
        var = beta if variance == "beta" else (1 - ab_prev) / (1 - ab) * beta
        x = mean + var.sqrt() * noise(x, torch.tensor(1.0), torch.tensor(0.5))
    x = fn(x, torch.tensor(1 / n, dtype=D))  # i = 0: the mean of q(x_{-1} | x_0) is x0 itself
    found = solve(Wrapped.from_x0(fn, sde), start, Ancestral(upper), sde.nodes(), seeded(range(4)), None)
    final = Wrapped.from_x0(fn, sde)(found.x, sde.nodes()[-1])
    assert (final - x).abs().max() < 1e-10


@pytest.mark.parametrize("n", [1, 2, 7, 19, 20])
def test_ancestral_is_valid_at_any_number_of_steps(n):
    """A2: score_sde's betas / N gives alpha < 0 and NaN below 20 steps."""
    from scoresde import Gaussian

    found = sample(Gaussian(VP(), torch.zeros(2, dtype=D), 0.5), (16, 2), Ancestral(), steps=n, grid=grid.uniform, seeds=range(16))
    assert found.x.isfinite().all()


def test_dataclasses_are_frozen_and_compare():
    assert VP() == VP()
    assert VP(beta_max=10.0) != VP()
    with pytest.raises(AttributeError):
        VP().beta_min = 1.0
    assert np.isclose(VP().prior_std(), math.sqrt(1 - math.exp(-10.05)), rtol=1e-14)


def test_a_jump_is_refused_unless_named():
    """f and g with a jump at t = 0.37: alpha = exp(-t), then exp(-0.37 - 5 (t - 0.37)); sigma by its own integral."""
    f, g = (lambda t: torch.where(t < 0.37, -1.0, -5.0)), (lambda t: torch.where(t < 0.37, 0.5, 3.0))
    with pytest.raises(ValueError, match="breaks"):
        LinearSDE.from_coefficients(f, g)
    sde = LinearSDE.from_coefficients(f, g, breaks=(0.37,))
    t = times(sde)
    log_alpha = torch.where(t < 0.37, -t, -0.37 - 5 * (t - 0.37))
    before = 0.25 / 2 * torch.expm1(2 * t.clamp(max=0.37))
    after = 9 / 10 * math.exp(2 * 0.37) * torch.expm1(10 * (t - 0.37).clamp(min=0))
    assert torch.allclose(sde.alpha(t), log_alpha.exp(), rtol=1e-12)
    assert torch.allclose(sde.sigma(t), (log_alpha.exp() ** 2 * (before + after)).sqrt(), rtol=1e-12)


def test_an_sde_that_is_irregular_inside_is_refused():
    from dataclasses import dataclass

    from scoresde import Gaussian

    @dataclass(frozen=True)
    class Wavy(LinearSDE):
        t_min: float = 1e-3
        t_max: float = 1.0

        def alpha(self, t):
            return 1 - 0.5 * t

        def sigma(self, t):
            return 0.1 + t + 0.4 * torch.sin(12 * t)

    with pytest.raises(ValueError, match="does not fall between"):
        Gaussian(Wavy(), torch.zeros(2), 0.5)
    with pytest.raises(ValueError, match=r"not finite|fall"):
        LinearSDE.from_coefficients(lambda t: -2.0, lambda t: 1.0, t_max=800.0)
