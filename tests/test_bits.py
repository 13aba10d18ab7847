"""Bits a dimension: conventions pinned, bounds on laws of known entropy, dequantizations, their errors."""

import math

import pytest
import torch
from laws import D
from torch import nn

import scoresde as s
from scoresde import EDM, VP, Dopri5, Gaussian, Importance, Mixture, TruncatedNormal, Uniform
from scoresde.divergence import exact, rademacher
from scoresde.noise import seeded

SHARES = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=D)
CENTRES = torch.tensor([[-0.75], [-0.25], [0.25], [0.75]], dtype=D)  # of four cells of [-1, 1]
ENTROPY = -float((SHARES * SHARES.log2()).sum())


def draws(n):
    """n images of one pixel from the law of the four levels, and the bits of the true code for them."""
    images = torch.multinomial(SHARES, n, True, generator=torch.Generator().manual_seed(0))[:, None]
    return images, -SHARES.log2()[images[:, 0]]


def flat(low, high, sde=None):
    """A model whose flow stands still in x / alpha, and the prior that makes its x0 uniform on [low, high]."""
    sde = sde or VP()
    alpha = float(sde.alpha(torch.tensor(sde.t_max, dtype=D)))
    return s.Wrapped.from_eps(lambda x, t: 0 * x, sde), lambda z: torch.full(
        (len(z),), -z[0].numel() * math.log(alpha * (high - low)), dtype=z.dtype
    )


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0)])
def test_a_uniform_density_costs_exactly_log2_of_the_levels(levels, low, high):
    """No constants 7 or 8: the cells carry their log-determinant, whatever the range of the data and the number of levels."""
    model, prior = flat(low, high)
    images = torch.arange(levels).repeat(8)[: 8 * (levels // 2)].reshape(-1, 1, 2, 2)
    found = s.bits_per_dim(model, images, levels=levels, low=low, high=high, prior=prior, nfe=4, dtype=D, seeds=range(len(images)))
    assert torch.allclose(found.each, torch.full_like(found.each, math.log2(levels)), rtol=1e-13)
    assert found.log_det == pytest.approx(4 * math.log((high - low) / levels))
    nats = found.log_prob + found.log_det
    assert torch.allclose(-nats / (4 * math.log(2)), found.each)
    assert found.t_min == model.sde.t_min


def test_eight_bits_are_the_default():
    model, prior = flat(-1, 1)
    images = torch.arange(256, dtype=torch.uint8).reshape(-1, 16)
    found = s.bits_per_dim(model, images, prior=prior, nfe=4)
    assert found.value == pytest.approx(8.0, abs=1e-5)
    assert found.dequantization == "Uniform()"
    assert found.divergence == "exact(chunk=64)"


# --- the gap [0, t_min], and discrete data -----------------------------------------------------------------------------------
@pytest.mark.parametrize("t_min", [0.02, 0.1])
def test_truncated_normal_bounds_discrete_data_of_known_entropy(t_min):
    """The exact model of four grey levels: the bound holds for these very images at any t_min, and is tight where the noise there

    is small beside a cell; uniform noise fills cells that the law leaves empty, at a high cost.
    """
    law = Mixture(EDM(t_min=t_min), CENTRES, 0.0, weights=SHARES)
    images, code = draws(200)
    kwargs = {"levels": 4, "dtype": D, "seeds": range(200)}
    found = s.bits_per_dim(law, images, Dopri5(1e-6, 1e-6), dequantization=TruncatedNormal(), **kwargs)
    # P(k), the mass of the cell: mixtures of normals of std t_min, truncated by the cell's walls
    walls = torch.tensor([[-1.0, -0.5], [-0.5, 0.0], [0.0, 0.5], [0.5, 1.0]], dtype=D)
    mass = torch.special.ndtr((walls[:, None, 1] - CENTRES[:, 0]) / t_min) - torch.special.ndtr(
        (walls[:, None, 0] - CENTRES[:, 0]) / t_min
    )
    truth = -(mass * SHARES).sum(1).log2()[images[:, 0]]
    gap = found.each - truth
    assert float(gap.mean()) >= -2e-4 - 5 * float(gap.std()) / 200**0.5  # to the solver's tolerance, the prior's mismatch, chance
    assert float(gap.mean()) < 0.02
    assert found.value == pytest.approx(float(code.mean()), abs=2e-3 if t_min < 0.05 else 0.05)
    assert found.value >= ENTROPY - 0.1  # 200 draws of it
    rough = s.bits_per_dim(law, images, Dopri5(1e-4, 1e-4), dequantization=Uniform(), **kwargs)
    assert rough.value > found.value + 0.3


def test_truncated_normal_is_a_density_on_the_cell():
    """E_q[1 / q] = 1 over the cell, and u lies within it, for noise far smaller and far larger than the cell."""
    like = torch.zeros(20000, 1, dtype=D)
    for rho, cell in ((0.01, 0.5), (0.2, 0.5), (5.0, 0.5), (1e-4, 2 / 256)):
        u, log_q = TruncatedNormal()(seeded(range(20000)), like, cell, rho)
        assert float(u.min()) >= 0
        assert float(u.max()) <= 1
        assert u.dtype == D
        inside = (u - 0.5).abs() < 2 * rho / cell  # where q is not tiny, whose inverse would have a large variance
        volume = float((inside * (-log_q).exp()[:, None]).mean())
        assert volume == pytest.approx(min(1.0, 4 * rho / cell), rel=0.05)
        grid = torch.linspace(0, 1, 40001, dtype=D)[1:-1]
        e = (grid - 0.5) * cell / rho
        assert float(u.std()) == pytest.approx(
            float(((grid - 0.5).square() * (-e.square() / 2).exp()).sum() / (-e.square() / 2).exp().sum()) ** 0.5, rel=0.05
        )


def test_importance_is_a_log_mean_exp_with_its_minus_log_k():
    """On a Gaussian with u known: -log2 of the mean of p(u_j) / q(u_j); K equal draws are one draw (not log2 K / D bits better)."""
    law = Gaussian(VP(), torch.zeros(2, dtype=D), 0.5)
    images = torch.arange(8).reshape(4, 2) % 4
    kwargs = {"levels": 4, "dtype": D, "seeds": range(4), "nfe": 12}
    half = lambda noise, like, cell, rho: (0 * like + 0.5, like.new_zeros(len(like)))
    one, many = (s.bits_per_dim(law, images, dequantization=q, **kwargs) for q in (half, Importance(20, half)))
    assert torch.allclose(one.each, many.each, rtol=1e-12)
    singles = s.bits_per_dim(law, images, samples=6, **kwargs)
    joint = s.bits_per_dim(law, images, dequantization=Importance(6), **kwargs)
    assert joint.nfe == singles.nfe
    assert (joint.each < singles.each).all()  # Jensen
    parts, uniform = [], seeded(range(4))
    for _ in range(6):
        u = uniform.uniform(torch.zeros(4, 2, dtype=D), 4)  # the stream of dequantization
        parts.append(
            s.bits_per_dim(law, images, dequantization=lambda *_, u=u: (u, u.new_zeros(4)), **kwargs).each * -2 * math.log(2)
        )
    assert torch.allclose(joint.each, (math.log(6) - torch.stack(parts).logsumexp(0)) / (2 * math.log(2)), rtol=1e-12)


def test_importance_tends_to_the_mass_of_the_cell():
    law = Gaussian(EDM(t_min=0.01), torch.zeros(1, dtype=D), 0.3)
    images = torch.arange(4)[:, None].repeat(16, 1)
    last = torch.tensor(law.sde.t_max, dtype=D)
    found = s.bits_per_dim(
        law,
        images,
        nfe=24,
        levels=4,
        dequantization=Importance(24),
        dtype=D,
        seeds=range(64),
        prior=lambda z: law.log_prob(z, last),
    )
    walls = torch.linspace(-1, 1, 5, dtype=D) / (0.3**2 + 0.01**2) ** 0.5
    truth = -torch.special.ndtr(walls).diff().log2()[images[:, 0]]
    assert abs(float((found.each - truth).mean())) < 0.02


# --- a dequantization of the user's ------------------------------------------------------------------------------------------
class Learned(nn.Module):
    """u = sigmoid(a + b e): its log-density is that of the normal e and of the map; it sees the cells' centres."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.1, dtype=D)), nn.Parameter(torch.tensor(1.3, dtype=D))

    def forward(self, noise, centres, cell, rho):
        e = noise.draw(centres, 9)
        u = (self.a + 0.1 * centres + self.b * e).sigmoid()
        log_q = -e.square() / 2 - math.log(2 * math.pi) / 2 - self.b.log() - (u * (1 - u)).log()
        return u, log_q.flatten(1).sum(1)


def test_a_module_dequantizes():
    """Any proper q bounds the same mass: of a uniform density E[log q] is the cost."""
    model, prior = flat(-1, 1)
    images = torch.arange(4).repeat(500)[:, None]
    found = s.bits_per_dim(model, images, levels=4, prior=prior, nfe=4, dequantization=Learned(), dtype=D, seeds=range(2000))
    assert found.value > 2.0
    assert found.value == pytest.approx(2.0, abs=0.2)
    weighted = s.bits_per_dim(
        model, images, levels=4, prior=prior, nfe=4, dequantization=Importance(30, Learned()), dtype=D, seeds=range(2000)
    )
    assert weighted.value == pytest.approx(2.0, abs=0.05)
    assert not found.each.requires_grad


# --- errors, seeds and words -------------------------------------------------------------------------------------------------
def test_standard_errors_over_images_and_over_noise():
    law = Gaussian(VP(), torch.zeros(2, dtype=D), 0.5)
    images = torch.randint(0, 4, (50, 2), generator=torch.Generator().manual_seed(0))
    kwargs = {"levels": 4, "dtype": D, "nfe": 12}
    found = [s.bits_per_dim(law, images, samples=4, seeds=range(i, i + 50), **kwargs) for i in range(0, 1000, 50)]
    assert s.bits_per_dim(law, images, seeds=range(50), **kwargs).stderr_noise != found[0].stderr_noise
    assert math.isnan(s.bits_per_dim(law, images, seeds=range(50), **kwargs).stderr_noise)
    values = torch.tensor([f.value for f in found], dtype=D)
    assert float(values.std()) == pytest.approx(sum(f.stderr_noise for f in found) / len(found), rel=0.45)
    assert found[0].stderr == pytest.approx(float(found[0].each.std()) / 50**0.5)


def test_the_solver_error_in_bits_a_dimension():
    law = Gaussian(VP(), torch.zeros(2, dtype=D), 0.5)
    images = torch.randint(0, 4, (20, 2), generator=torch.Generator().manual_seed(0))
    kwargs = {"levels": 4, "dtype": D, "seeds": range(20)}
    rough, fine = (s.bits_per_dim(law, images, nfe=n, solver_error=True, **kwargs) for n in (24, 200))
    assert rough.solver_error.shape == (20,)
    assert float((rough.each - fine.each).abs().mean()) <= 3 * float(rough.solver_error.mean())
    assert float(fine.solver_error.mean()) < 0.1 * float(rough.solver_error.mean())
    assert s.bits_per_dim(law, images, nfe=24, **kwargs).solver_error is None


def test_an_image_has_its_own_number_whatever_its_mates():
    law = Gaussian(VP(), torch.zeros(1, 2, 2, dtype=D), covariance=0.3 * torch.eye(4, dtype=D) + 0.1)
    images = torch.randint(0, 8, (7, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    for dequantization in (Uniform(), TruncatedNormal(), Importance(2)):
        for divergence in (exact(), rademacher(2)):
            if divergence.random and isinstance(dequantization, Importance):
                continue
            kwargs = {
                "levels": 8,
                "samples": 2,
                "nfe": 8,
                "microbatch": 4,
                "dequantization": dequantization,
                "divergence": divergence,
            }
            whole = s.bits_per_dim(law, images, seeds=range(7), **kwargs)
            part = s.bits_per_dim(law, images[4:], seeds=range(4, 7), **kwargs)
            assert torch.equal(part.each, whole.each[4:])
            order = [3, 1, 6, 0, 5, 2, 4]
            mixed = s.bits_per_dim(law, images[order], seeds=order, **kwargs)
            assert torch.equal(mixed.each, whole.each[order])


def test_times_above_t_min_give_the_bits_there():
    """alpha, the noise of a clean image and t_min of the result are those of the lowest time."""
    law = Gaussian(VP(), torch.zeros(1, dtype=D), 0.5)
    times = s.grid.logsnr(law.sde, 200)
    times = times[times >= 0.3]
    last = torch.tensor(law.sde.t_max, dtype=D)
    images = torch.arange(8)[:, None]
    fixed = lambda noise, like, cell, rho: (0 * like + 0.5, like.new_zeros(len(like)))
    found = s.bits_per_dim(
        law, images, s.DPMSolverPP(3), levels=8, times=times, dtype=D, dequantization=fixed, prior=lambda z: law.log_prob(z, last)
    )
    t = times.min()
    x = law.sde.alpha(t) * s.Quantized(8).to_model(images, torch.full((8, 1), 0.5, dtype=D))
    nats = law.log_prob(x, t) + law.sde.alpha(t).log() + math.log(2 / 8)
    assert torch.allclose(found.each, -nats / math.log(2), atol=1e-3)
    assert found.t_min == float(t)


def test_many_levels_and_their_types():
    model, prior = flat(-1, 1)
    images = torch.randint(0, 65536, (6, 4), generator=torch.Generator().manual_seed(0))
    found = s.bits_per_dim(model, images.to(torch.uint16), levels=65536, prior=prior, nfe=4, dtype=D)
    assert found.value == pytest.approx(16.0, abs=1e-6)
    with pytest.raises(ValueError, match="pass dtype="):
        s.bits_per_dim(model, images, levels=2**24, prior=prior, nfe=4)
    with pytest.raises(TypeError, match="wanted what draws one u"):
        Importance(2, Importance(3))
    assert s.bits_per_dim(model, images, levels=65536, prior=prior, nfe=4, dtype=D, seeds=iter(range(6))).value > 0


def test_words_for_what_is_probably_wrong():
    law = Gaussian(VP(), torch.zeros(16, dtype=D), 0.5)
    images = torch.arange(16).reshape(1, 16).repeat(32, 1)
    with pytest.warns(UserWarning, match="no pixel is above 15 with levels=256"):
        s.bits_per_dim(law, images, nfe=4)
    with pytest.warns(UserWarning, match="optimistic"):
        s.bits_per_dim(law, images, levels=16, nfe=4, dequantization=Importance(2), divergence=rademacher(2))
    with pytest.warns(UserWarning, match="lattice of step 0.125"):
        s.log_prob(law, images / 8.0 - 1, nfe=4)
    with pytest.warns(UserWarning, match="lattice"):
        s.log_prob(law, (0.999 * (torch.randint(0, 256, (20, 16)) / 127.5 - 1)).float(), nfe=4)


@pytest.mark.filterwarnings("error")
def test_no_words_where_nothing_is_wrong():
    law = Gaussian(VP(), torch.zeros(16, dtype=D), 0.5)
    s.log_prob(law, seeded(range(9)).initial((9, 16), D), nfe=4)
    s.log_prob(law, seeded(range(1)).initial((1, 16), torch.float32), nfe=4)
    s.log_prob(law, torch.zeros(3, 16), nfe=4)
    s.log_prob(law, seeded(range(9)).initial((9, 16), torch.float32) + 100, nfe=4)  # float32's own lattice
    two = Gaussian(VP(), torch.zeros(2, dtype=D), 0.5)
    axis = torch.linspace(-1, 1, 9)
    s.log_prob(two, torch.cartesian_prod(axis, axis), nfe=4)  # a map of a density
    s.bits_per_dim(law, torch.arange(16).reshape(1, 16).repeat(32, 1), levels=16, nfe=40)
