"""Likelihoods: against closed forms, against the integral of the density, and against each other."""

import math
from functools import cache

import pytest
import torch
from laws import SIX, D, every_sde, mixture, unet

import scoresde as s
from scoresde import EDM, VP, Gaussian, Heun, Mixture, Quantized, TorchDiffEq
from scoresde.divergence import coloured, exact, rademacher
from scoresde.noise import seeded

SDES = every_sde()
TIGHT = TorchDiffEq("dopri5", 1e-9, 1e-9)
EIGHTH = TorchDiffEq("dopri8", 1e-9, 1e-9)


def ends(sde):
    return torch.tensor([sde.t_min, sde.t_max], dtype=D)


def problem(name, rows):
    """The mixture, states of exact p_{t_min}, and their exact log p."""
    law = mixture(SDES[name])
    first, _ = ends(law.sde)
    x = law.sample(rows, first, seeds=range(rows))
    return law, x, law.log_prob(x, first)


IMAGES = seeded(range(3)).initial((3, 1, 4, 4), D)


# --- against the truth ---------------------------------------------------------------------------------------------------
# Two SDEs on every push, the other four in the slow suite: each takes some seconds.
MOST_SLOW = [name if name in ("VP", "VE") else pytest.param(name, marks=pytest.mark.slow) for name in SIX]


@pytest.mark.parametrize("name", SIX)
def test_log_p_is_exact_to_a_millionth_of_a_nat(name, record_property):
    """dopri5 at 1e-9 with the exact p_T as prior, float64: the greatest of 16 errors against the closed form."""
    law, x, truth = problem(name, 16)
    _, last = ends(law.sde)
    found = s.log_prob(law, x, TIGHT, prior=lambda z: law.log_prob(z, last))
    error = float((found.value - truth).abs().max())
    record_property("error", error)
    print(f"{name}: {error:.2e} nats, NFE {found.nfe}")
    assert error <= 1e-6
    assert found.stderr.tolist() == [0.0] * 16


@pytest.mark.parametrize("name", MOST_SLOW)
def test_the_default_prior_is_off_by_its_stated_mismatch(name):
    """log p by the flow - exact log p = log prior(z) - log p_T(z) at the latent z: nothing else is wrong."""
    law, x, truth = problem(name, 8)
    _, last = ends(law.sde)
    found = s.log_prob(law, x, EIGHTH)
    mismatch = law.sde.prior_log_prob(found.latent) - law.log_prob(found.latent, last)
    assert (found.value - truth - mismatch).abs().max() <= 1e-8
    assert 1e-9 < float(mismatch.abs().mean()) < 2e-2  # and small: 1e-3 ... 2e-2 nats at most


@pytest.mark.parametrize("name", ["VP", "EDM"])
def test_densities_integrate_to_one(name):
    """The flow is a bijection, so its density has mass one whatever the prior's mismatch."""
    law = mixture(SDES[name])
    axis = torch.linspace(-3.5, 3.5, 31, dtype=D)
    found = s.log_prob(law, torch.cartesian_prod(axis, axis), TorchDiffEq("dopri5", 1e-6, 1e-6))
    mass = float(found.value.exp().sum() * (axis[1] - axis[0]) ** 2)
    assert abs(mass - 1) <= 1e-4


def test_other_times_give_the_density_there():
    """From t to T: log p_t, not log p_{t_min}; from t to u with the exact p_u as prior as well."""
    law = mixture(VP())
    t, u = torch.tensor(0.2, dtype=D), torch.tensor(0.6, dtype=D)
    x = law.sample(8, t, seeds=range(8))
    for last in (u, ends(law.sde)[1]):
        found = s.log_prob(law, x, EIGHTH, times=torch.stack([t, last]), prior=lambda z, last=last: law.log_prob(z, last))
        assert (found.value - law.log_prob(x, t)).abs().max() < 1e-6


@pytest.mark.parametrize("name", SIX)
def test_float32_is_good_to_a_few_thousandths(name):
    law, x, _ = problem(name, 16)
    a, b = (s.log_prob(law, x.to(dtype), Heun(), steps=40) for dtype in (torch.float32, D))
    assert a.value.dtype == torch.float32
    assert (a.value.double() - b.value).abs().max() < 5e-3


# --- latents -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", [Heun(), s.Euler(), s.DPMSolverPP(2), s.DDIM()], ids=repr)
@pytest.mark.parametrize("name", SIX)
def test_the_latent_is_encodes(name, solver):
    law, x, _ = problem(name, 8)
    found = s.log_prob(law, x, solver, steps=12)
    latent = s.encode(law, x, solver, steps=12)
    assert torch.allclose(found.latent, latent.x, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.solution.times, latent.times)
    assert found.nfe == latent.nfe + 1  # the trace at the last time


def test_the_latent_of_images_is_encodes():
    model = unet()
    found = s.log_prob(model, IMAGES, steps=3)
    assert found.latent.shape == IMAGES.shape
    assert torch.allclose(found.latent, s.encode(model, IMAGES, steps=3).x, rtol=1e-10)


# --- the divergence ------------------------------------------------------------------------------------------------------
def test_the_ledger_has_two_passes_a_derivative():
    """Exact: D vector-Jacobian products an evaluation, 2 forward-equivalents each; k probes: 2 k."""
    for law, x in ((mixture(VP()), torch.zeros(5, 2, dtype=D)), (unet(), IMAGES)):
        d = x[0].numel()
        for kwargs, each in (
            ({}, 2 * d),
            ({"divergence": rademacher(1)}, 2),
            ({"divergence": rademacher(3)}, 6),
            ({"divergence": exact(1)}, 2 * d),
            ({"divergence": exact(3)}, 2 * d),
        ):
            for solver, nfe in ((Heun(), 9), (s.Euler(), 5)):  # the last time among them
                found = s.log_prob(law, x, solver, steps=4, seeds=range(len(x)), **kwargs)
                assert found.nfe == nfe
                assert found.ledger["score"] == found.ledger["network"] == nfe
                assert found.ledger["divergence"] == each * nfe
                assert found.ledger["guidance"] == found.ledger["denoise"] == 0


def test_the_ledger_does_not_count_padding():
    law = mixture(VP())
    for rows in (1, 4, 7):
        for probes in (None, 2):
            found = s.log_prob(law, torch.zeros(rows, 2, dtype=D), steps=5, divergence=probes and rademacher(probes), microbatch=4)
            assert found.ledger["divergence"] == pytest.approx(4 * found.nfe)
            assert found.ledger["network"] == pytest.approx(found.nfe)


def test_chunks_of_the_divergence_agree():
    model = unet()
    values = [s.log_prob(model, IMAGES, steps=3, divergence=exact(chunk)).value for chunk in (1, 5, 16, 64)]
    for value in values[1:]:
        assert torch.allclose(value, values[0], rtol=1e-12)


def test_the_divergence_is_the_trace_of_the_jacobian():
    """One step: l is the trapezoid of D - tr(d x0 / dy) in lam = log(alpha / sigma) at its two ends, with the Jacobians written out."""
    model, x = unet(), IMAGES
    sde = model.sde
    times = torch.tensor([0.3, 0.4], dtype=D)
    t, u = times
    found = s.log_prob(model, x, s.DDIM(), times=times, prior=lambda z: torch.zeros(len(z), dtype=D))

    def rest(z, at):
        jacobian = torch.autograd.functional.jacobian(lambda v: model.predict(v, at).x0.sum(0), z).reshape(16, 3, 16)
        return 16 - sde.alpha(at) * jacobian.diagonal(dim1=0, dim2=2).sum(1)

    gap = (sde.logsnr(t) - sde.logsnr(u)) / 2
    truth = gap * (rest(x, t) + rest(found.latent, u)) / 2 + 16 * (sde.alpha(u) / sde.alpha(t)).log()
    assert torch.allclose(found.value, truth, rtol=1e-10)


# --- probes --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("solver", "kwargs"), [(Heun(), {"steps": 12}), (TorchDiffEq(rtol=1e-3, atol=1e-3), {})], ids=["Heun", "dopri5"]
)
def test_probes_are_unbiased(solver, kwargs):
    """The mean over 2,000 seeds is within 5 standard errors of the exact divergence, and the stderr of a seed is right."""
    n = 2000
    # x0 = tanh-like and sheared: the Jacobian has off-diagonal entries, whose sum is what a probe's error is made of
    law = Gaussian(VP(), torch.zeros(2, dtype=D), covariance=torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=D))
    x = torch.tensor([[0.7, -0.3]], dtype=D).expand(n, 2)
    exact = s.log_prob(law, x[:1], solver, **kwargs).value
    slack = 0.0 if solver.adaptive is False else 2e-3  # an adaptive step size depends on the probes, to the tolerance
    for k in (1, 4):
        found = s.log_prob(law, x, solver, divergence=rademacher(k), seeds=range(n), **kwargs)
        spread = float(found.value.std())
        assert spread > 0.01
        assert abs(float(found.value.mean() - exact)) < 5 * spread / math.sqrt(n) + slack
        if k == 1:
            assert found.stderr.isnan().all()
        else:
            assert 0.8 < float(found.stderr.square().mean().sqrt()) / spread < 1.25


def test_probes_of_a_seed_are_its_own():
    law, x, _ = problem("VP", 9)
    whole = s.log_prob(law, x, steps=6, divergence=rademacher(3), seeds=range(9))
    part = s.log_prob(law, x[2:5], steps=6, divergence=rademacher(3), seeds=range(2, 5))
    assert (part.value - whole.value[2:5]).abs().max() < 1e-12
    assert (part.stderr - whole.stderr[2:5]).abs().max() < 1e-12
    other = s.log_prob(law, x, steps=6, divergence=rademacher(3), seeds=range(9, 18))
    assert not torch.equal(other.value, whole.value)
    assert torch.equal(other.latent, whole.latent)
    a, b = (
        s.log_prob(law, x, steps=6, divergence=rademacher(3), generator=torch.Generator().manual_seed(1)).value for _ in range(2)
    )
    assert torch.equal(a, b)


def test_a_diagonal_jacobian_needs_one_probe():
    """Rademacher probes: p' J p = tr J for a diagonal J, whatever the signs."""
    law = Gaussian(VP(), torch.zeros(3, dtype=D), torch.tensor([0.2, 0.5, 1.0], dtype=D))
    x = seeded(range(4)).initial((4, 3), D)
    exact, probed = (s.log_prob(law, x, steps=8, divergence=p, seeds=range(4)) for p in (None, rademacher(2)))
    assert torch.allclose(probed.value, exact.value, rtol=1e-12)
    assert probed.stderr.abs().max() < 1e-12
    assert exact.stderr.tolist() == [0.0] * 4


# --- batch mates ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("probes", [None, 2])
def test_rows_do_not_depend_on_their_mates_at_a_fixed_microbatch(probes):
    for law, x in ((mixture(VP()), problem("VP", 9)[1]), (unet(), seeded(range(9)).initial((9, 1, 4, 4), D))):
        kwargs = {"solver": Heun(), "steps": 3, "divergence": probes and rademacher(probes), "microbatch": 4}
        whole = s.log_prob(law, x, seeds=range(9), **kwargs)
        part = s.log_prob(law, x[:6], seeds=range(6), **kwargs)
        assert torch.equal(part.value, whole.value[:6])
        assert torch.equal(part.latent, whole.latent[:6])
        backwards = s.log_prob(law, x.flip(0), seeds=list(range(9))[::-1], **kwargs)
        assert torch.equal(backwards.value.flip(0), whole.value)
        free = s.log_prob(law, x, seeds=range(9), **{**kwargs, "microbatch": None})
        assert torch.allclose(free.value, whole.value, rtol=1e-10)


# --- gradients -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("probes", [None, 2])
def test_gradients_with_respect_to_x(probes):
    law = mixture(VP())
    x = problem("VP", 3)[1].requires_grad_()
    seeds = None if probes is None else range(3)
    value = lambda v: s.log_prob(law, v, Heun(), steps=3, divergence=probes and rademacher(probes), seeds=seeds).value
    assert torch.autograd.gradcheck(value, (x,), eps=1e-6, atol=1e-6)
    assert not s.log_prob(law, x.detach(), steps=3).value.requires_grad
    with torch.no_grad():
        assert not value(x).requires_grad


def test_the_gradient_is_the_score():
    law, x, _ = problem("VP", 6)
    first, last = ends(law.sde)
    x = x.requires_grad_()
    value = s.log_prob(law, x, Heun(), steps=200, prior=lambda z: law.log_prob(z, last)).value
    score = torch.autograd.grad(value.sum(), x)[0]
    assert torch.allclose(score, law.score(x.detach(), first), rtol=0.02, atol=0.02)


def test_gradients_with_respect_to_weights():
    """Maximum likelihood through the solver: the gradient of a network's parameter by central differences."""
    model = s.Preconditioned(s.MLP(2, width=8, depth=1).double(), VP())
    weight = model.net.leave.weight
    x = problem("VP", 4)[1].requires_grad_()
    value = lambda: s.log_prob(model, x, Heun(), steps=3).value.sum()
    gradient = torch.autograd.grad(value(), weight)[0][0, 0]
    h, ends_of = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * h
        ends_of.append(float(value().detach()))
        with torch.no_grad():
            weight[0, 0] -= sign * h
    assert float(gradient) == pytest.approx((ends_of[0] - ends_of[1]) / (2 * h), rel=1e-5)


# --- bits a dimension ----------------------------------------------------------------------------------------------------
def uniform_law(low, high, cells=200):
    """Uniform on [low, high]: narrow Gaussians side by side; only within a cell of the ends does it differ."""
    width = (high - low) / cells
    means = low + width * (torch.arange(cells, dtype=D) + 0.5)
    return Mixture(EDM(), means[:, None], width)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_levels_cost_log2_of_their_number(levels):
    law = uniform_law(-1, 1)
    images = torch.arange(levels).repeat(-(-256 // levels))[:, None]
    solver = TorchDiffEq("dopri5", 1e-4, 1e-4)
    found = s.bits_per_dim(law, images, solver, levels=levels, seeds=range(len(images)), dtype=D)
    assert -0.005 < found.value - math.log2(levels) < 0.02
    assert found.each.shape == (len(images),)
    assert found.value == pytest.approx(float(found.each.mean()))
    assert found.dequantization == "Uniform()"


def test_the_arithmetic_by_hand():
    """A Gaussian model and u = 1/4: -(log p(alpha x0) + D log alpha + D log cell - log q) / (D log 2)."""
    law = Gaussian(VP(), torch.zeros(1, 2, 2, dtype=D), 0.7)
    first, last = ends(law.sde)
    images = torch.arange(12).reshape(3, 1, 2, 2) % 5
    quarter = lambda noise, like, cell, rho: (0 * like + 0.25, torch.full((len(like),), 0.3, dtype=like.dtype))
    for low, high in ((-1.0, 1.0), (0.0, 1.0)):
        kwargs = {"levels": 5, "low": low, "high": high, "dtype": D, "prior": lambda z: law.log_prob(z, last)}
        found = s.bits_per_dim(law, images, TorchDiffEq("dopri8", 1e-7, 1e-7), dequantization=quarter, **kwargs)
        x0, alpha = low + (images + 0.25) * (high - low) / 5, law.sde.alpha(first)
        nats = law.log_prob(alpha * x0, first) + 4 * (alpha.log() + math.log((high - low) / 5)) - 0.3
        assert torch.allclose(found.each, -nats / (4 * math.log(2)), atol=1e-6)
        assert found.stderr == pytest.approx(float(found.each.std()) / 3**0.5)


def test_the_range_of_the_data_does_not_matter():
    """The same model of [-1, 1] and of [0, 1] data: halve x, the noise levels and the prior with it."""
    images = torch.arange(64).reshape(16, 4) % 8
    means, std = seeded(range(3)).initial((3, 4), D) / 2, 0.3
    wide = Mixture(EDM(), means, std)
    narrow = Mixture(EDM(t_min=0.001, t_max=40.0), (means + 1) / 2, std / 2)
    # both priors are centred at 0, and the narrow data are not: with the exact p_T there is nothing left of that
    a, b = (
        s.bits_per_dim(
            law, images, Heun(), steps=30, levels=8, low=low, seeds=range(16), dtype=D,
            prior=lambda z, law=law: law.log_prob(z, torch.tensor(law.sde.t_max, dtype=D)),
        )
        for law, low in ((wide, -1.0), (narrow, 0.0))
    )  # fmt: skip
    assert torch.allclose(a.each, b.each, atol=1e-9)


def test_more_draws_of_u_are_averaged_and_seeds_repeat_them():
    law = Gaussian(VP(), torch.zeros(2, dtype=D), 0.5)
    images = torch.arange(8).reshape(4, 2) % 4
    kwargs = {"steps": 6, "levels": 4, "dtype": D}
    a, b = (s.bits_per_dim(law, images, samples=3, seeds=range(4), **kwargs) for _ in range(2))
    assert torch.equal(a.each, b.each)
    assert a.samples == 3
    one = s.bits_per_dim(law, images, samples=1, seeds=range(4), **kwargs)
    assert not torch.equal(a.each, one.each)
    part = s.bits_per_dim(law, images[1:3], samples=3, seeds=[1, 2], **kwargs)
    assert torch.allclose(part.each, a.each[1:3], rtol=1e-12)
    fresh = [s.bits_per_dim(law, images, **kwargs).value for _ in range(2)]
    assert fresh[0] != fresh[1]
    probed = s.bits_per_dim(law, images, seeds=range(4), divergence=rademacher(2), **kwargs)
    assert torch.allclose(probed.each, one.each, rtol=1e-9)  # an isotropic Gaussian has a diagonal Jacobian
    assert probed.ledger["divergence"] == 4 * probed.nfe


def test_bits_bound_the_entropy_from_above():
    """No model codes a source below its entropy: uniform 8 levels cost at least 3 bits, a wrong model more."""
    images = torch.arange(8).repeat(64)[:, None]
    kwargs = {"levels": 8, "steps": 40, "seeds": range(512), "dtype": D}
    for law in (Gaussian(EDM(), torch.zeros(1, dtype=D), 0.6), Gaussian(EDM(), torch.tensor([0.5], dtype=D), 0.3)):
        assert s.bits_per_dim(law, images, **kwargs).value > 3.0


def test_quantized_is_inverted_by_its_levels():
    for cells in (Quantized(), Quantized(2), Quantized(17, 0.0, 1.0), Quantized(1000, -3.0, 5.0)):
        k = torch.arange(cells.levels)
        for u in (0.01, 0.5, 0.99):  # float32: a cell of 1,000 levels is 10,000 roundings wide
            x = cells.to_model(k, u)
            assert torch.equal(cells.to_levels(x).long(), k)
            assert float(x.min()) >= cells.low
            assert float(x.max()) <= cells.high
        assert cells.to_levels(torch.tensor([cells.low - 9.0, cells.high + 9.0])).tolist() == [0, cells.levels - 1]
        assert cells.log_det == pytest.approx(math.log((cells.high - cells.low) / cells.levels))
    assert Quantized().to_levels(torch.zeros(1)).dtype == torch.uint8
    assert Quantized(257).to_levels(torch.zeros(1)).dtype == torch.int32


@pytest.mark.parametrize("name", ["VP", "Rectified"])
def test_gradients_through_the_adaptive_solver_are_the_score(name):
    """d log p / dx = score, also where torchdiffeq chooses the steps: their sizes carry no gradient."""
    law, x, _ = problem(name, 3)
    first, last = ends(law.sde)
    x = x.requires_grad_()
    found = s.log_prob(law, x, TorchDiffEq(rtol=1e-7, atol=1e-7), prior=lambda z: law.log_prob(z, last))
    gradient = torch.autograd.grad(found.value.sum(), x)[0]
    score = law.score(x.detach(), first)
    assert (gradient - score).abs().max() < 1e-4 * score.abs().max()


def test_a_callable_without_gradient_is_told_of():
    model = s.Wrapped.from_eps(torch.no_grad()(lambda x, t: 0.9 * x), VP())
    with pytest.warns(UserWarning, match="no gradient"):
        s.log_prob(model, torch.ones(2, 2, dtype=D), steps=4)


def test_every_draw_of_u_has_probes_of_its_own():
    law = Gaussian(VP(), torch.zeros(2, dtype=D), 0.5)
    images = torch.randint(0, 4, (4, 2), generator=torch.Generator().manual_seed(0))
    fixed = lambda noise, like, cell, rho: (torch.full_like(like, 0.5), like.new_zeros(len(like)))
    correlated = Mixture(VP(), torch.zeros(1, 2, dtype=D), covariance=torch.tensor([[[0.5, 0.4], [0.4, 0.5]]], dtype=D))
    kwargs = {"levels": 4, "dequantization": fixed, "steps": 10, "divergence": rademacher(1), "seeds": range(4), "dtype": D}
    one, two = (s.bits_per_dim(correlated, images, samples=n, **kwargs) for n in (1, 2))
    assert not torch.equal(one.each, two.each)
    assert two.nfe == 2 * one.nfe
    with pytest.raises(ValueError, match="log q"):
        s.bits_per_dim(law, images, levels=4, dequantization=lambda noise, like, cell, rho: (0 * like, like[:, :1]), steps=2)


# --- how exact -----------------------------------------------------------------------------------------------------------
@cache
def learned():
    """A network of 2-D data, trained a little: an energetic stranger, not the mixture's own score."""
    net = s.MLP(2, width=24, depth=2).double()
    model = s.Preconditioned(net, VP())
    law, generator = mixture(VP()), torch.Generator().manual_seed(0)
    batches = (law.sample(128, seeds=range(128 * i, 128 * i + 128)) for i in range(60))
    for _ in s.fit(model, batches, optimizer=torch.optim.Adam(net.parameters(), lr=3e-3), generator=generator):
        pass
    return model.eval()


@pytest.mark.parametrize("kind", ["a law of one number", "a learned model"])
def test_other_densities_integrate_to_one(kind):
    if kind == "a learned model":
        model = learned()
        axis = torch.linspace(-6, 6, 51, dtype=D)
        points, cell = torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2
    else:
        model = Mixture(s.SubVP(), torch.tensor([[-0.5], [0.8]], dtype=D), torch.tensor([0.1, 0.4], dtype=D))
        points = torch.linspace(-3, 3, 401, dtype=D)[:, None]
        cell = float(points[1] - points[0])
    found = s.log_prob(model, points, s.DPMSolverPP(3), steps=200)
    assert abs(float(found.value.exp().sum()) * cell - 1) <= 1e-4


@pytest.mark.parametrize(
    "solver", [None, Heun(), s.DPMSolverPP(2), s.Dopri5(1e-4, 1e-4), TorchDiffEq(rtol=1e-4, atol=1e-4)], ids=repr
)
@pytest.mark.parametrize("name", ["VP", "VE"])
def test_the_stated_solver_error_is_about_the_true_one(name, solver):
    """Over 64 points: in the root mean square neither much above it nor far below; a single one may be off where the error changes sign."""
    law, x, truth = problem(name, 64)
    _, last = ends(law.sde)
    budget = {} if solver is not None and solver.adaptive else {"nfe": 48}
    found = s.log_prob(law, x, solver, prior=lambda z: law.log_prob(z, last), solver_error=True, **budget)
    error = (found.value - truth).abs()
    stated, true = (float(e.square().mean().sqrt()) for e in (found.solver_error, error))
    assert true / 3 <= stated <= 30 * true
    assert float((error > 5 * found.solver_error + 1e-7).double().mean()) <= 0.2
    assert found.ledger["solver_error"] > 0
    plain = s.log_prob(law, x, solver, prior=lambda z: law.log_prob(z, last), **budget)
    assert torch.equal(plain.value, found.value)
    assert plain.solver_error is None
    assert plain.nfe == found.nfe


def test_the_solver_error_has_no_noise_of_probes():
    """With random probes it is that of the path they share: far below stderr, and a seed's own."""
    law, x, _ = problem("VP", 8)
    kwargs = {"nfe": 48, "solver_error": True, "microbatch": 4}
    found = s.log_prob(law, x, divergence=rademacher(2), seeds=range(8), **kwargs)
    assert found.solver_error.median() < 0.3 * found.stderr.median()
    assert torch.equal(
        s.log_prob(law, x[4:], divergence=rademacher(2), seeds=range(4, 8), **kwargs).solver_error, found.solver_error[4:]
    )
    assert (
        s.log_prob(law, x, divergence=rademacher(2), generator=torch.Generator().manual_seed(0), **kwargs)
        .solver_error.isfinite()
        .all()
    )
    with pytest.raises(ValueError, match="halves the steps"):
        s.log_prob(law, x, Heun(), steps=1, solver_error=True)


@pytest.mark.parametrize("name", SIX)
def test_the_stated_mismatch_bounds_that_of_the_prior(name):
    """E[log p_T(z) - log prior(z)] over data = KL(p_T || prior) <= prior_mismatch, which is not far above it for data about 0."""
    law, x, _ = problem(name, 400)
    _, last = ends(law.sde)
    found = s.log_prob(law, x, nfe=24)
    z = law.sample(20000, last, seeds=range(20000))
    gap = law.log_prob(z, last) - law.sde.prior_log_prob(z)
    slack = 5 * float(gap.std()) / 20000**0.5
    assert float(gap.mean()) <= found.prior_mismatch + slack
    assert found.prior_mismatch < 0.03
    assert math.isnan(s.log_prob(law, x[:4], nfe=8, prior=lambda z: law.log_prob(z, last)).prior_mismatch)


def test_the_mismatch_of_a_point_is_in_closed_form():
    """KL(N(alpha m, sigma^2 I) || N(0, sigma^2 I)) = alpha^2 |m|^2 / (2 sigma^2)."""
    law = Gaussian(VP(), torch.tensor([1.0, 2.0], dtype=D), 0.0)
    first, last = ends(law.sde)
    x = law.sample(100_000, first, seeds=range(100_000))
    from scoresde.likelihood import prior_mismatch

    truth = float((law.sde.alpha(last) / law.sde.sigma(last)) ** 2) * 5 / 2
    assert prior_mismatch(law.sde, x, first) == pytest.approx(truth, rel=1e-3)


# --- large events --------------------------------------------------------------------------------------------------------
def in_64_dimensions(sde):
    means = 0.5 * seeded(range(3)).initial((3, 64), D)
    factor = seeded(range(10, 13)).initial((3, 64, 64), D) / 12
    return Mixture(sde, means, covariance=factor @ factor.mT + 0.05 * torch.eye(64, dtype=D))


@pytest.mark.parametrize("name", MOST_SLOW)
def test_64_dimensions_to_1e_7_nats_a_dimension(name, record_property):
    law = in_64_dimensions(SDES[name])
    first, last = ends(law.sde)
    x = law.sample(2, first, seeds=range(2))
    found = s.log_prob(law, x, s.Dopri8(1e-8, 1e-8), prior=lambda z: law.log_prob(z, last))
    error = float((found.value - law.log_prob(x, first)).abs().max()) / 64
    record_property("error", error)
    assert error <= 1e-7


def low_rank(sde):
    factor = seeded(range(8)).initial((8, 3, 32, 32), D).movedim(0, -1) / 16
    return Gaussian.low_rank(sde, 0.3 * seeded([9]).initial((1, 3, 32, 32), D)[0], factor, 0.4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_images_of_3072_numbers_to_1e_7_nats_a_dimension(name, record_property):
    """A Gaussian of low rank on (3, 32, 32), the exact divergence of 3,072 products."""
    law = low_rank(SDES[name])
    first, last = ends(law.sde)
    x = law.sample(1, first, seeds=[0])
    found = s.log_prob(law, x, s.Dopri8(1e-6, 1e-6), prior=lambda z: law.log_prob(z, last), divergence=exact(1024))
    error = float((found.value - law.log_prob(x, first)).abs().max()) / 3072
    record_property("error", error)
    print(name, error, found.nfe)
    assert error <= 1e-7
    assert found.ledger["divergence"] == 2 * 3072 * (found.nfe if "rejected" not in found.ledger else found.ledger["score"])


def test_large_events_have_random_probes_unless_told():
    law = low_rank(VP())
    first, _ = ends(law.sde)
    x = law.sample(2, first, seeds=range(2))
    found = s.log_prob(law, x, seeds=range(2))
    assert found.divergence == repr(s.divergence.default((3, 32, 32)))
    assert (found.stderr > 0).all()
    assert 64 <= found.nfe <= 66
    assert ((found.value - law.log_prob(x, first)).abs() < 6 * found.stderr + 1).all()


# --- the density of samples ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MOST_SLOW)
def test_samples_come_with_their_density(name):
    law, *_ = problem(name, 1)
    first, last = ends(law.sde)
    tight = s.Dopri8(1e-8, 1e-8)
    found = s.sample(law, (16, 2), tight, log_prob=True, seeds=range(16), dtype=D)
    back = s.log_prob(law, found.x, tight)
    assert (found.log_prob.value - back.value).abs().max() < 1e-6
    assert (found.log_prob.latent - back.latent).abs().max() < 1e-5 * law.sde.prior_std()
    plain = s.sample(law, (16, 2), tight, seeds=range(16), dtype=D, denoise=False)
    assert (plain.x - found.x).abs().max() < 1e-6
    truth = law.log_prob(found.x, first) + law.sde.prior_log_prob(back.latent) - law.log_prob(back.latent, last)
    assert (found.log_prob.value - truth).abs().max() < 1e-6
    assert found.seeds == range(16)


def test_the_density_of_samples_in_its_variants():
    model = unet()
    for kwargs in (
        {"nfe": 12},
        {"steps": 6, "solver": Heun()},
        {"nfe": 24, "divergence": rademacher(2)},
        {"nfe": 8, "microbatch": 2},
    ):
        found = s.sample(model, (3, 1, 4, 4), log_prob=True, seeds=range(3), dtype=D, **kwargs)
        assert found.x.shape == (3, 1, 4, 4)
        assert found.log_prob.value.shape == (3,)
        assert found.log_prob.latent.shape == found.x.shape
        assert (found.log_prob.stderr > 0).all() == ("divergence" in kwargs)
        assert found.nfe == found.log_prob.nfe
    plain = s.sample(model, (3, 1, 4, 4), Heun(), steps=6, grid=s.grid.logsnr, denoise=False, seeds=range(3), dtype=D)
    again = s.sample(model, (3, 1, 4, 4), Heun(), steps=6, log_prob=True, seeds=range(3), dtype=D)
    assert torch.allclose(again.x, plain.x, rtol=1e-10, atol=1e-12)
    with torch.inference_mode():
        assert torch.equal(
            s.sample(model, (3, 1, 4, 4), Heun(), steps=6, log_prob=True, seeds=range(3), dtype=D).log_prob.value,
            again.log_prob.value,
        )
    for kwargs, words in (
        ({"denoise": True}, "drop one"),
        ({"solver": s.Ancestral()}, "no inverse and no density"),
        ({"times": torch.tensor([0.5, 0.1])}, "no prior"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            s.sample(model, (3, 1, 4, 4), log_prob=True, **({"nfe": 9} if "times" not in kwargs else {}), **kwargs)
    with pytest.raises(ValueError, match="log_prob is False"):
        s.sample(model, (3, 1, 4, 4), nfe=9, divergence=exact())


# --- gradients of parameters ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("divergence", [exact(), rademacher(2), coloured(2, 1)], ids=repr)
def test_gradcheck_with_respect_to_x_and_the_parameters(divergence):
    model = s.Preconditioned(s.MLP(2, width=4, depth=1).double(), VP())
    names = [name for name, p in model.named_parameters() if p.ndim == 1][:3]
    x = problem("VP", 2)[1]
    values = {name: p.detach().clone() + 0.1 for name, p in model.named_parameters()}

    def value(x, *chosen):
        from torch.nn.utils import stateless

        with stateless._reparametrize_module(model, {**values, **dict(zip(names, chosen, strict=True))}):
            return s.log_prob(model, x, Heun(), steps=2, divergence=divergence, differentiable=True, seeds=range(2)).value

    inputs = (x.clone().requires_grad_(), *(values[name].clone().requires_grad_() for name in names))
    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "solver",
    [
        Heun(),
        s.DPMSolverPP(3),
        s.Dopri5(1e-4, 1e-4),
        TorchDiffEq(rtol=1e-4, atol=1e-4),
        TorchDiffEq(rtol=1e-5, atol=1e-5, adjoint=True),
    ],
    ids=repr,
)
def test_gradients_of_the_parameters_alone(solver):
    """x needs none: differentiable=True keeps the graph, and the default does not."""
    model = learned()
    x = problem("VP", 2)[1]
    budget = {} if solver.adaptive else {"steps": 6}
    assert not s.log_prob(model, x, solver, **budget).value.requires_grad
    weight = model.net.leave.weight
    value = lambda **kw: s.log_prob(model, x, solver, **budget, **kw).value.sum()
    gradient = torch.autograd.grad(value(differentiable=True), weight)[0]
    h, sides = 1e-4, []
    direction = torch.ones_like(weight)
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
            sides.append(float(value()))
            weight -= sign * h * direction
    assert float((gradient * direction).sum()) == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-3)
    with torch.no_grad(), pytest.raises(ValueError, match="under no_grad"):
        value(differentiable=True)


def test_the_adjoint_keeps_no_graph_of_the_steps():
    """Bytes saved for the way back: about those of one evaluation, however many steps; the others' grow with them."""
    model = learned()
    x = problem("VP", 4)[1]

    def saved(solver):
        sizes = {}

        class Kept:
            def __init__(self, t):
                self.t = t
                sizes[id(self)] = t.numel()

            def __del__(self):
                del sizes[id(self)]

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
            found = s.log_prob(model, x, solver, differentiable=True)
        assert found.value.requires_grad
        return sum(sizes.values())  # what the graph of the value holds on to

    loose, tight = (saved(TorchDiffEq(rtol=tol, atol=tol, adjoint=True)) for tol in (1e-2, 1e-4))
    assert tight <= 1.5 * loose
    assert saved(TorchDiffEq(rtol=1e-2, atol=1e-2)) > 10 * loose


# --- there and back ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
def test_the_round_trip_is_reported(name):
    law, x, _ = problem(name, 8)
    found = s.encode(law, x, Heun(), steps=40, round_trip=True)
    back = s.decode(law, found.x, Heun(), times=found.times.flip(0))
    assert torch.allclose(found.round_trip, (back.x - x).square().mean(1).sqrt())
    assert found.ledger["round_trip"] == back.nfe
    assert found.nfe == s.encode(law, x, Heun(), steps=40).nfe
    assert s.encode(law, x, Heun(), steps=40).round_trip is None
    down = s.decode(law, found.x, s.Dopri5(1e-8, 1e-8), round_trip=True)
    assert float(down.round_trip.max()) < 1e-4 * law.sde.prior_std()


def test_slerp_keeps_the_radius_and_the_ends():
    a, b = (seeded(range(i, i + 5)).initial((5, 1, 4, 4), D) for i in (0, 50))
    unit = lambda v: v / v.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    a, b = unit(a), unit(b)
    shares = torch.linspace(0, 1, 9)
    path = s.slerp(a, b, shares)
    assert path.shape == (9, 5, 1, 4, 4)
    assert torch.allclose(path[0], a)
    assert torch.allclose(path[-1], b)
    assert torch.allclose(path.flatten(2).norm(dim=2), torch.ones(9, 5, dtype=D))
    angles = (path[:-1] * path[1:]).flatten(2).sum(2).clamp(-1, 1).acos()
    assert torch.allclose(angles, angles[:1].expand(8, 5))  # equal shares of the angle
    assert torch.equal(s.slerp(a, b, 0.25), path[2])
    assert torch.allclose(s.slerp(a, a, 0.3), a)
    assert torch.allclose(s.slerp(a, (1 + 1e-9) * a, 0.3), a)
    assert s.slerp(a.float(), b.float(), 0.5).dtype == torch.float32
    assert s.slerp(torch.zeros(2, 3), torch.ones(2, 3), 0.5).isfinite().all()
    with pytest.raises(ValueError, match="opposite"):
        s.slerp(a, -a, 0.5)
    with pytest.raises(ValueError, match="wanted the shape of a"):
        s.slerp(a, b[:2], 0.5)
    with pytest.raises(ValueError, match="share is"):
        s.slerp(a, b, math.nan)


# --- l on a grid -----------------------------------------------------------------------------------------------------------
def test_the_quadrature_is_exact_for_polynomials_of_its_degree():
    from scoresde.likelihood import quadrature

    nodes = torch.tensor([0.0, 0.3, 0.5, 1.1, 1.6, 2.0, 2.7], dtype=D).numpy()
    for degree in (3, 5):
        for power in range(degree + 1):
            for at in (nodes, nodes[::-1].copy()):
                truth = (at[-1] ** (power + 1) - at[0] ** (power + 1)) / (power + 1)
                assert float(quadrature(at, degree) @ at**power) == pytest.approx(truth, rel=1e-10)
    for n in (2, 3, 4, 5):  # few nodes: the highest odd degree below their number
        assert quadrature(nodes[:n], 5).sum() == pytest.approx(nodes[n - 1])


class Midway(s.Solver):
    """Asks between the times alone, where no trace is taken."""

    order = 1

    def step(self, oracle, x, t, u, state):
        at = (t + u) / 2
        p, sde = oracle(x, at), oracle.sde
        return sde.alpha(u) * (x / sde.alpha(t) + (sde.rho(u) - sde.rho(t)) * p.eps), None


def test_a_solver_that_never_asks_at_the_times_carries_l_in_the_state():
    law, x, truth = problem("VP", 8)
    _, last = ends(law.sde)
    found = s.log_prob(law, x, Midway(), steps=200, prior=lambda z: law.log_prob(z, last))
    assert found.nfe == 200
    assert (found.value - truth).abs().max() < 0.5
    half = s.log_prob(law, x, Midway(), steps=400, prior=lambda z: law.log_prob(z, last))
    assert (half.value - truth).abs().max() < 0.6 * (found.value - truth).abs().max()


@pytest.mark.parametrize("solver", [s.AdamsMoulton(4, s.variables.x0), s.UniPC(4), s.RK4(), s.DPMSolverPP(3)], ids=repr)
def test_high_orders_do_not_blow_up_in_few_steps(solver):
    """On an image's spectrum at 24 evaluations, where l carried in the state was off by bits: now by hundredths."""
    std = torch.arange(1, 513, dtype=D) ** -1.25
    law = Gaussian(VP(), torch.zeros(512, dtype=D), std * 0.5 / std.square().mean().sqrt())
    first, last = ends(law.sde)
    x = law.sample(4, first, seeds=range(4))
    found = s.log_prob(law, x, solver, nfe=24, prior=lambda z: law.log_prob(z, last), divergence=rademacher(1), seeds=range(4))
    assert float((found.value - law.log_prob(x, first)).abs().max()) / (512 * math.log(2)) < 0.2


# --- what a likelihood is refused ----------------------------------------------------------------------------------------
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_what_cannot_be_differentiated_twice_is_an_error_and_no_wrong_gradient():
    net = torch.nn.Linear(2, 2).double()
    net.forward = lambda x, c: torch.nn.functional.linear(Once.apply(x), net.weight)
    model = s.Preconditioned(net, VP())
    x = torch.ones(3, 2, dtype=D, requires_grad=True)
    assert s.log_prob(model, x.detach(), steps=2).value.isfinite().all()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        s.log_prob(model, x, steps=2).value.sum().backward()


def test_forward_tangents_of_x_are_refused():
    from torch.autograd import forward_ad

    x = torch.ones(3, 2, dtype=D)
    with forward_ad.dual_level(), pytest.raises(TypeError, match="forward-mode tangent"):
        s.log_prob(mixture(VP()), forward_ad.make_dual(x, x), steps=2)


def test_networks_may_view_their_input_and_labels_come_from_inference_mode():
    model = s.Wrapped.from_eps(lambda x, t: (0.9 * x.view(-1, 2)).view(-1, 1, 2), VP())
    assert s.log_prob(model, torch.ones(3, 1, 2, dtype=D), steps=2).value.shape == (3,)
    labelled = s.Preconditioned(s.MLP(2, classes=3), VP())
    with torch.inference_mode():
        found = s.log_prob(labelled.condition(torch.tensor([0, 1, 2])), torch.ones(3, 2), steps=2)
    assert torch.equal(found.value, s.log_prob(labelled.condition(torch.tensor([0, 1, 2])), torch.ones(3, 2), steps=2).value)
