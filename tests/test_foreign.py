"""Other libraries' solvers: the pitfalls of each, the exact Gaussian, gradients, bounds and what is refused."""

import functools
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from laws import every_sde
from torch import nn
from torchsde import BrownianInterval, sdeint

import scoresde as s
from scoresde import (
    EDM,
    MLP,
    SRA1,
    SRA3,
    VP,
    EulerMaruyama,
    Gaussian,
    NonFiniteError,
    Oracle,
    Preconditioned,
    ScipyIVP,
    Status,
    TorchDiffEq,
    TorchSDE,
    UnfinishedError,
    Wrapped,
    grid,
    variables,
)
from scoresde.noise import brownian, seeded
from scoresde.orders import affine_law, on_path, slopes
from scoresde.solve import solve
from scoresde.solvers import foreign

D = torch.float64
SDES = every_sde()
VARIABLES = (variables.time, variables.eps, variables.x0, variables.velocity, variables.v)
ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
IVPS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
METHODS = ("euler", "milstein", "srk", "heun", "midpoint", "reversible_heun")
COVARIANCE = torch.tensor([[1.0, 0.3, 0.1], [0.3, 0.5, -0.2], [0.1, -0.2, 0.3]], dtype=D)
MEAN = torch.tensor([0.5, -0.3, 0.2], dtype=D)


def T(value):
    return torch.tensor(value, dtype=D)


class Normal(Gaussian):
    """The Gaussian, its mean by one matrix: many evaluations are made here."""

    def __init__(self, sde):
        super().__init__(sde, MEAN, covariance=COVARIANCE)
        self.values, self.vectors = torch.linalg.eigh(COVARIANCE)

    def forward(self, x, t):
        a, s = self.sde.alpha(t), self.sde.sigma(t)
        gain = (self.vectors * (a * self.values / (a * a * self.values + s * s))) @ self.vectors.T
        return (MEAN - a * MEAN @ gain).to(x.dtype) + x @ gain.to(x.dtype)


@functools.cache
def law(sde=None):
    return Normal(sde or VP())


def test_the_quick_gaussian_is_the_gaussian():
    for name in ("VP", "EDM"):
        sde, x = SDES[name], start(5)
        for t in (sde.t_min, 0.4, sde.t_max):
            exact = Gaussian(sde, MEAN, covariance=COVARIANCE)(x, T(t))
            assert (law(sde)(x, T(t)) - exact).abs().max() < 1e-13 * (1 + float(x.abs().max()))
            assert (law(sde)(x.float(), T(t)) - exact).abs().max() < 1e-6 * (1 + float(x.abs().max()))


def spread(sde, t):
    """Eigenvectors and the variances along them of the Gaussian's x_t."""
    values, vectors = torch.linalg.eigh(COVARIANCE)
    return vectors, sde.alpha(t) ** 2 * values + sde.sigma(t) ** 2


def carried(sde, x, t, to):
    """The probability flow of the Gaussian, in closed form: each deviation along an eigenvector grows as that of the law does."""
    q, before = spread(sde, t)
    after = spread(sde, to)[1]
    return sde.alpha(to) * MEAN + (x - sde.alpha(t) * MEAN) @ q @ torch.diag((after / before).sqrt()) @ q.T


def start(rows, sde=None, seed=0):
    sde = sde or VP()
    return law(sde).sample(rows, T(sde.t_max), seeds=range(seed, seed + rows))


class Spy(s.Denoiser):
    """The same, with the times and dtypes that it was asked at."""

    def __init__(self, inner):
        super().__init__(inner.sde)
        self.inner, self.times, self.dtypes = inner, [], set()

    def forward(self, x, t):
        self.times.append(float(t))
        self.dtypes.add((x.dtype, t.dtype))
        return self.inner(x, t)


class Sick(s.Denoiser):
    """NaN below a time for rows that are marked by their size."""

    def __init__(self, below, sde=None):
        super().__init__(sde or VP())
        self.below = below

    def forward(self, x, t):
        sick = (x.flatten(1).abs().amax(1) > 1e6) & bool(t < self.below)
        return torch.where(sick.reshape(-1, *[1] * (x.ndim - 1)), math.nan, 0.1 * x)


def flows():
    rough = {"rtol": 1e-3, "atol": 1e-3}
    adaptive = [TorchDiffEq(m, **rough) for m in ADAPTIVE[:3]] + [ScipyIVP(m, **rough) for m in IVPS]
    adaptive += [TorchDiffEq(m, rtol=1e-2, atol=1e-2) for m in ADAPTIVE[3:]]
    others = [TorchDiffEq(variable=v, **rough) for v in VARIABLES[1:]] + [TorchDiffEq(adjoint=True, **rough)]
    return adaptive + others + [TorchDiffEq(m) for m in FIXED] + [TorchDiffEq("rk4", variable=variables.eps, adjoint=True)]


EVERY = [*flows(), *(TorchSDE(m) for m in METHODS)]
CONTROLLED = [solver for solver in EVERY if solver.adaptive]


def budget(solver, steps=10):
    return {} if solver.adaptive else {"steps": steps}


# --- pitfalls ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_c1_no_time_outside_the_interval(solver):
    """Not past its end, nor by the guess of a first step, nor by rounding; t_min is no exception."""
    for sde in (VP(), EDM()):
        denoiser = Spy(law(sde))
        times = torch.tensor([1.0, 0.51, 0.5, 0.3, 0.002], dtype=D) * sde.t_max
        times[-1] = sde.t_min
        oracle = Oracle(denoiser, 2, seeded(range(2)))
        x, state = start(2, sde), solver.start(sde, times) if not isinstance(solver, TorchSDE) else None
        for a, b in itertools.pairwise(times):
            denoiser.times.clear()
            x, state = solver.step(oracle, x, a, b, state)
            assert denoiser.times
            assert all(b <= t <= a for t in denoiser.times)
        if not solver.stochastic:
            denoiser.times.clear()
            solver.step(oracle, x, times[-1], times[0], None)
            assert all(sde.t_min <= t <= sde.t_max for t in denoiser.times)


@pytest.mark.parametrize("solver", [TorchDiffEq("rk4"), TorchDiffEq("heun3", variable=variables.eps), TorchSDE("srk")], ids=repr)
def test_c2_times_are_float64_whatever_the_state_is(solver):
    seen = []
    for dtype in (torch.float32, D):
        denoiser = Spy(law())
        s.sample(denoiser, (2, 3), solver, steps=20, seeds=range(2), dtype=dtype)
        assert denoiser.dtypes == {(dtype, D)}
        seen.append(denoiser.times)
    assert seen[0] == seen[1]
    assert any(t != float(torch.tensor(t).float()) for t in seen[0])


@pytest.mark.parametrize("solver", [x for x in EVERY if not isinstance(x, TorchSDE)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_c2_times_closer_than_float32_tells_apart(solver, dtype):
    """An interval of 1e-10, up and down: the derivative times its length."""
    t, to = T(0.5), T(0.5 - 1e-10)
    x = start(3).to(dtype)
    for a, b in ((t, to), (to, t)):
        denoiser = Spy(law())
        y, _ = solver.step(Oracle(denoiser, 3), x, a, b, None)
        assert all(to <= seen <= t for seen in denoiser.times)
        assert y.dtype == dtype
        moved = (b - a) * s.flow(law(), x.double(), a)
        assert ((y.double() - x.double()) - moved).abs().max() < (1e-14 if dtype == D else 3e-7)


def test_c3_the_tolerance_holds_for_each_sample_whoever_its_mates_are():
    """Easy samples, at the centre that stands still, do not loosen it; with the mean over the batch they would."""
    denoiser = Gaussian(VP(), torch.zeros(3, dtype=D), covariance=COVARIANCE)
    hard = torch.tensor([[3.0, -2.0, 1.0]], dtype=D)
    many = torch.cat([hard, torch.zeros(999, 3, dtype=D)])
    for method in ADAPTIVE[:3]:
        solver = TorchDiffEq(method, rtol=0.0, atol=1e-5)
        alone, among = s.decode(denoiser, hard, solver), s.decode(denoiser, many, solver)
        assert alone.nfe == among.nfe
        assert (alone.x[0] - among.x[0]).abs().max() < 1e-14
    rough = s.decode(denoiser, many, ScipyIVP(rtol=1e-12, atol=1e-5))
    assert rough.nfe < s.decode(denoiser, hard, ScipyIVP(rtol=1e-12, atol=1e-5)).nfe  # so the docstring says
    assert not any(solver.independent for solver in CONTROLLED)
    assert all(solver.independent for solver in EVERY if not solver.adaptive)


@pytest.mark.parametrize("solver", [TorchDiffEq(rtol=1e-4), ScipyIVP(), ScipyIVP("LSODA")], ids=repr)
def test_c3_microbatch_of_one_is_independent_to_the_bit(solver):
    x = start(5)
    whole = s.decode(law(), x, solver, microbatch=1)
    for i in range(5):
        alone = s.decode(law(), x[i : i + 1], solver)
        assert torch.equal(whole.x[i], alone.x[0])
        assert whole.nfe_each[i] == alone.nfe


@pytest.mark.parametrize("method", METHODS)
def test_c4_one_step_an_interval_and_the_probe_is_not_an_evaluation(method):
    """The steps are the grid's, whatever torchsde's default dt; its check of shapes asks for the drift and costs nothing."""
    solver = TorchSDE(method)
    sde = VP(t_min=0.1, t_max=0.4)
    for n in range(1, 11):
        denoiser, times = Spy(law(sde)), grid.logsnr(sde, n)
        found = s.sample(denoiser, (2, 3), solver, times=times, seeds=range(2), dtype=D, denoise=False)
        assert found.nfe == len(denoiser.times) == solver.evaluations(n) == found.ledger["score"] == found.ledger["network"]
        assert set(times[:-1].tolist()) - set(denoiser.times) == set()
        if method in ("euler", "milstein"):
            assert denoiser.times == times[:-1].tolist()
    each = {"euler": 1, "milstein": 1, "srk": 2, "heun": 2, "midpoint": 2, "reversible_heun": 1}[method]
    assert solver.evaluations(10) == 10 * each + (method == "reversible_heun")
    assert solver.past == (method == "reversible_heun")


def test_c4_reversible_heun_is_not_restarted_at_every_step():
    """Its state goes on from interval to interval: the same as torchsde's own solve over a uniform grid in one call."""
    sde, n, rows = VP(t_min=0.125, t_max=0.625), 16, 4
    denoiser, x = law(sde), start(4, sde)
    times = torch.linspace(sde.t_max, sde.t_min, n + 1, dtype=D)
    ours = on_path(denoiser, TorchSDE("reversible_heun"), x, times, range(rows))
    noise = brownian(range(rows), sde.t_min, sde.t_max)

    class Equation(nn.Module):
        sde_type, noise_type = "stratonovich", "diagonal"

        def f(self, t, y):
            return -s.reverse_drift(denoiser, y, (-t).clamp(sde.t_min, sde.t_max))

        def g(self, t, y):
            return sde.diffusion((-t).clamp(sde.t_min, sde.t_max)).expand_as(y)

    oracle = Oracle(denoiser, rows, noise)
    theirs = sdeint(Equation(), x, -times, bm=foreign._Path(oracle, x), method="reversible_heun", dt=float(times[0] - times[1]))[-1]
    assert (ours - theirs).abs().max() < 1e-12
    heun = on_path(denoiser, TorchSDE("heun"), x, times, range(rows))  # which it would be, restarted
    assert (ours - heun).abs().max() > 1e-6


def test_c5_the_generative_sde_is_no_path_turned_back():
    doc = " ".join(TorchSDE.__doc__.split())
    assert "retraces a *forward* path" in doc
    assert "does not turn a path back" in doc
    for method in METHODS:
        with pytest.raises(TypeError, match="is stochastic and has no inverse"):
            s.encode(law(), start(2), TorchSDE(method), steps=4)
        with pytest.raises(ValueError, match="runs down in time"):
            list(s.trajectory(Oracle(law(), 2), TorchSDE(method), start(2), T([0.1, 0.5])))


def test_c6_the_path_is_ours_whatever_the_order_of_queries():
    """W and U of a whole interval are those of its parts, asked for in any order; U is torchsde's: int (W_u - W_a) du."""
    x = torch.zeros(3, 1, 2, dtype=D)
    oracle = Oracle(Gaussian(VP(), torch.zeros(1, 2, dtype=D), 1.0), 3, brownian(range(3), 0.001, 1.0))
    path = foreign._Path(oracle, x)
    a, b, c = T(-0.9), T(-0.4), T(-0.1)
    (w1, u1), (w2, u2) = path(a, b, return_U=True), path(b, c, return_U=True)
    w, u = foreign._Path(oracle, x)(a, c, return_U=True)
    assert w.shape == path.shape == path.size() == (3, 2)
    assert (w - w1 - w2).abs().max() < 1e-12
    assert (u - u1 - u2 - w1 * (c - b)).abs().max() < 1e-10  # the second part's starts from W_b
    assert torch.equal(path(a, b), w1)
    fine = torch.linspace(-0.9, -0.4, 401, dtype=D)
    walk = torch.stack([path(p, q) for p, q in itertools.pairwise(fine)]).cumsum(0)
    assert (walk[-1] - w1).abs().max() < 1e-12
    assert ((walk.sum(0) - walk[-1] / 2) * 0.5 / 400 - u1).abs().max() < 5e-4
    for ta, tb in ((T(-1.1), T(-0.5)), (T(-0.5), T(0.0))):  # torchsde's own would clamp
        with pytest.raises(ValueError, match="outside the path"):
            path(ta, tb)
    for kwargs in ({"return_A": True}, {"tb": None}):
        with pytest.raises(TypeError, match="no Levy area A"):
            path(**{"ta": a, "tb": b, **kwargs})


def test_c6_u_has_the_law_of_torchsdes():
    h, n = 0.5, 20_000
    ours = foreign._Path(Oracle(law(), n, seeded(range(n))), torch.zeros(n, 1, dtype=D))(T(-0.7), T(-0.2), return_U=True)
    theirs = BrownianInterval(0.0, 1.0, size=(n, 1), dtype=D, levy_area_approximation="space-time", entropy=3)(
        0.2, 0.7, return_U=True
    )
    for w, u in (ours, theirs):
        for value, wanted in ((w * w, h), (u * u, h**3 / 3), (w * u, h**2 / 2)):
            assert abs(float(value.mean()) - wanted) < 5 * float(value.std()) / n**0.5


@pytest.mark.parametrize("method", METHODS)
def test_c7_no_dense_diffusion_matrix(method, monkeypatch):
    """D = 12,288 numbers a sample: a (B, D, D) matrix would be 2.4 GB."""
    shapes = set()
    product = foreign._Reverse.spread

    def watched(self, time, v):
        shapes.add(tuple(v.shape))
        return product(self, time, v)

    monkeypatch.setattr(foreign._Reverse, "spread", watched)
    sde = VP(t_min=0.1, t_max=0.3)
    denoiser = Gaussian(sde, torch.zeros(3, 64, 64, dtype=D), 0.5)
    noise = seeded(range(2))
    x = noise.initial((2, 3, 64, 64), torch.float32)
    found = solve(denoiser, x, TorchSDE(method), T([0.3, 0.2, 0.1]), noise, None)
    assert found.x.shape == x.shape
    assert found.x.isfinite().all()
    assert shapes == {(2, 12288)}


# --- the exact Gaussian --------------------------------------------------------------------------------------------------
EXACT = [
    *(TorchDiffEq(m, 1e-8, 1e-8) for m in ADAPTIVE[:2]),
    TorchDiffEq("bosh3", 1e-6, 1e-6),
    *(TorchDiffEq(variable=v, rtol=1e-8, atol=1e-8) for v in (variables.velocity, variables.v)),
    TorchDiffEq("dopri5", 1e-8, 1e-8, adjoint=True),
    *(ScipyIVP(m, 1e-8, 1e-8) for m in ("RK45", "DOP853", "LSODA")),
]


@pytest.mark.parametrize("solver", EXACT, ids=repr)
def test_the_flow_and_the_density_of_a_gaussian(solver):
    """x at the other end against the closed form, and log p with the exact p_T, to a hundred tolerances."""
    sde, bound = VP(), 100 * solver.rtol
    high, low, x = T(sde.t_max), T(sde.t_min), start(8)
    down = s.decode(law(), x, solver)
    assert (down.x - carried(sde, x, high, low)).abs().max() < bound
    assert down.nfe < 2000
    low_x = carried(sde, x, high, low)
    found = s.log_prob(law(), low_x, solver, prior=lambda z: law().log_prob(z, high))
    assert (found.latent - x).abs().max() < 3 * bound
    assert (found.value - law().log_prob(low_x, low)).abs().max() < (bound if solver.order > 3 else 5 * bound)


@pytest.mark.parametrize("name", ["SubVP", "VE", "EDM", "Cosine", "Rectified", "DiscreteVP", "Tabulated"])
def test_the_flow_of_a_gaussian_on_every_sde(name):
    sde = SDES[name]
    high, low, x = T(sde.t_max), T(sde.t_min), start(4, sde)
    tight, loose = {"rtol": 1e-8, "atol": 1e-8}, {"rtol": 1e-7, "atol": 1e-7}
    rough = name in ("DiscreteVP", "Tabulated")  # the first's logsnr has kinks in the second derivative, a thousand of them
    solvers = [TorchDiffEq("dopri5", **tight), TorchDiffEq("dopri8", variable=variables.v, **tight), ScipyIVP("DOP853", **loose)]
    for solver in solvers[:1] if rough else solvers:
        found = s.decode(law(sde), x, solver)
        assert (found.x - carried(sde, x, high, low)).abs().max() < (1e-5 if rough else 1e-6), solver


@pytest.mark.parametrize("variable", [variables.time, variables.velocity], ids=repr)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_have_their_order_and_cost(method, variable):
    sde, solver = VP(), TorchDiffEq(method, variable=variable)
    ends, x, errors = sde.time(T([-4.0, 4.0])), start(8), []
    counts = (40, 80)
    for n in counts:
        times = sde.time(torch.linspace(-4, 4, n + 1, dtype=D))
        denoiser = Spy(law())
        found = solve(denoiser, x, solver, times, None, None)
        assert found.nfe == len(denoiser.times) == solver.evaluations(n) == found.ledger["network"]
        errors.append(float((found.x - carried(sde, x, *ends)).abs().max()))
    slope = slopes(counts, errors)[0]
    least = 0.25 if variable == variables.time else 1.25  # a Gaussian is kind to a midpoint in tau
    assert -0.25 < slope - solver.order < least, (errors, slope)
    assert solver.evaluations(7) == 7 * {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}[method]


@pytest.mark.parametrize("variable", VARIABLES, ids=repr)
def test_fixed_steps_are_this_librarys_where_the_rule_is_one(variable):
    for name in ("VP", "EDM", "Rectified"):
        sde = SDES[name]
        times, x = grid.logsnr(sde, 12), start(5, sde)
        for ours, method in ((s.Euler(variable), "euler"), (s.Heun(variable), "heun2")):
            a, b = (solve(law(sde), x, solver, times, None, None).x for solver in (ours, TorchDiffEq(method, variable=variable)))
            assert (a - b).abs().max() < 1e-11 * (1 + float(x.abs().max())), (name, method)


def test_what_a_method_is_shows_in_its_attributes():
    for method in ADAPTIVE:
        solver = TorchDiffEq(method)
        assert solver.adaptive
        assert solver.grid is grid.interval
        assert not solver.independent
        with pytest.raises(TypeError, match="chooses its steps"):
            solver.evaluations(3)
    for method in FIXED:
        solver = TorchDiffEq(method)
        assert not solver.adaptive
        assert solver.grid is grid.logsnr
        assert solver.independent
    assert [TorchDiffEq(variable=v).invariant for v in VARIABLES] == [False, True, True, True, True]
    assert [ScipyIVP(m).order for m in IVPS] == [5, 3, 8, 5, 5, 12]
    assert TorchDiffEq() == TorchDiffEq("dopri5", 1e-5, 1e-5, 10_000, variables.time, False)
    assert len({TorchDiffEq(), TorchDiffEq(variable=variables.eps), TorchDiffEq(adjoint=True), ScipyIVP(), TorchSDE()}) == 5
    for solver in EVERY:
        assert isinstance(solver, s.Solver)
        assert solver.stochastic == isinstance(solver, TorchSDE)


def test_the_schedule_is_known_through_rho_alone_in_the_other_variables():
    """The same x / alpha on every SDE at the same rho, to the tolerance even of an adaptive solver: it takes the same steps."""
    for solver in (TorchDiffEq("dopri5", 1e-3, 1e-3, variable=variables.eps), TorchDiffEq("rk4", variable=variables.velocity)):
        ends = []
        for name in ("VP", "VE", "Cosine"):
            sde = SDES[name]
            times = sde.time(torch.linspace(-4, 4, 2 if solver.adaptive else 13, dtype=D))
            x = sde.alpha(times[0]) * 7 * start(4, VP())
            ends.append(solve(law(sde), x, solver, times, None, None).x / sde.alpha(times[-1]))
        assert (ends[1] - ends[0]).abs().max() < 1e-9
        assert (ends[2] - ends[0]).abs().max() < 1e-9


# --- the reverse SDE -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [m for m in METHODS if m != "milstein"])
def test_the_law_of_the_reverse_sde_is_the_gaussian(method):
    """4,000 samples: mean and covariance within 5 sigma; without Monte Carlo, at 128 steps, to the order of the method."""
    sde, solver, n = VP(), TorchSDE(method), 4000
    low, times = T(sde.t_min), grid.logsnr(VP(), 128)
    q, variance = spread(sde, low)
    wanted = q @ torch.diag(variance) @ q.T
    noise = seeded(range(n))
    found = solve(law(), start(n, seed=9), solver, times, noise, None).x
    gap = found - sde.alpha(low) * MEAN
    bias = 0.03 if solver.weak_order == 1 else 0.004
    assert (gap.mean(0).abs() < 5 * wanted.diagonal().sqrt() / n**0.5 + bias).all()
    products = gap[:, :, None] * gap[:, None]
    assert ((products.mean(0) - wanted).abs() < 5 * products.std(0) / n**0.5 + 2 * bias).all()
    q, before = spread(sde, T(sde.t_max))
    mean, cov = affine_law(law(), solver, times, sde.alpha(T(sde.t_max)) * MEAN, q @ torch.diag(before) @ q.T)
    assert (mean - sde.alpha(low) * MEAN).abs().max() < bias
    assert (cov - wanted).abs().max() < 2 * bias


PATHS = VP(t_min=0.125, t_max=0.625)


@functools.cache
def fine_paths():
    return on_path(law(PATHS), SRA3(), start(60, PATHS), torch.linspace(PATHS.t_max, PATHS.t_min, 513, dtype=D), range(60))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "milstein"])  # which is euler, below
def test_the_paths_are_those_of_sra3_in_the_limit(method):
    """One Brownian path a sample, one strong solution; the orders along it are as stated, srk's a Gaussian's linear score improves."""
    x, errors, order = start(60, PATHS), [], TorchSDE(method).strong_order
    for n in (32, 256):
        times = torch.linspace(PATHS.t_max, PATHS.t_min, n + 1, dtype=D)
        errors.append(float((on_path(law(PATHS), TorchSDE(method), x, times, range(60)) - fine_paths()).square().mean().sqrt()))
    assert errors[1] < (2e-2 if order == 1 else 1e-4)
    assert -0.25 < slopes((32, 256), errors)[0] - order < (0.25 if order == 1 else 0.75), errors


def test_one_rule_one_number():
    """euler is our EulerMaruyama, srk Rossler's SRA1 of the drift as a whole and heun our improved Euler, on the same path and grid."""
    sde, x = PATHS, start(6, PATHS)
    times = grid.logsnr(sde, 10)
    at = lambda solver: on_path(law(sde), solver, x, times, range(6))
    for method in ("euler", "milstein"):
        assert (at(TorchSDE(method)) - at(EulerMaruyama())).abs().max() < 1e-12
    y, noise = x, brownian(range(6), sde.t_min, sde.t_max)
    z = x
    for t, to in itertools.pairwise(times):
        h, (w, u) = t - to, noise.pair(x, t, to)
        g, g_to = sde.diffusion(t), sde.diffusion(to)
        a = -s.reverse_drift(law(sde), y, t)
        b = -s.reverse_drift(law(sde), y + 0.75 * h * a + 1.5 * g_to * u / h, t - 0.75 * h)
        y = y + h * (a + 2 * b) / 3 + g_to * w + (g - g_to) * u / h
        a = -s.reverse_drift(law(sde), z, t)
        b = -s.reverse_drift(law(sde), z + h * a + g * w, to)
        z = z + h * (a + b) / 2 + (g + g_to) / 2 * w
    assert (at(TorchSDE("srk")) - y).abs().max() < 1e-12
    assert (at(TorchSDE("heun")) - z).abs().max() < 1e-12
    assert (at(TorchSDE("srk")) - at(SRA1())).abs().max() < 0.1  # that one is exact in the linear part


def test_a_corrector_that_moves_x_moves_both_copies_of_reversible_heun():
    """Else the second copy, an undamped mode, would drift away from x: the law with a corrector in between is still the Gaussian's."""
    sde, n = VP(), 1000
    solver, times = s.PredictorCorrector(TorchSDE("reversible_heun"), s.Langevin(0.05)), grid.logsnr(sde, 200)
    found = solve(law(), start(n), solver, times, seeded(range(n)), None)
    assert found.nfe == solver.evaluations(200) == 401
    q, variance = spread(sde, times[-1])
    deviations = ((found.x - sde.alpha(times[-1]) * MEAN) @ q).std(0)
    assert ((deviations / variance.sqrt() - 1).abs() < 0.15).all()
    assert solver.weak_order <= 1


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generator_is_left_alone(method):
    """torchsde draws from it to check shapes."""
    state = torch.get_rng_state()
    s.sample(law(PATHS), (2, 3), TorchSDE(method), steps=4, seeds=range(2))
    assert torch.equal(torch.get_rng_state(), state)

    class Dropout(s.Denoiser):  # and what a network draws from it goes on
        def forward(self, x, t):
            self.drawn = [*getattr(self, "drawn", []), float(torch.rand(()))]
            return 0.1 * x

    denoiser = Dropout(PATHS)
    s.sample(denoiser, (2, 3), TorchSDE(method), steps=4, seeds=range(2))
    assert len(set(denoiser.drawn)) == len(denoiser.drawn)


def test_a_step_too_long_for_the_drift_is_refused():
    with pytest.raises(ValueError, match=r"TorchSDE\(method='heun'\) is unstable in step 1 of 2.* wanted at most 2"):
        s.sample(law(), (2, 3), TorchSDE("heun"), steps=2, seeds=range(2))


def test_torchsde_carries_gradients():
    x = start(3, PATHS).requires_grad_()
    times = grid.logsnr(PATHS, 6)
    for method in METHODS:
        *_, (_, end) = s.trajectory(Oracle(law(PATHS), 3, seeded(range(3))), TorchSDE(method), x, times)
        (grad,) = torch.autograd.grad(end.sum(), x)
        assert grad.isfinite().all()
        assert grad.abs().max() > 0.01


# --- gradients -----------------------------------------------------------------------------------------------------------
def network(width=8, dim=2):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(dim + 1, width), nn.Tanh(), nn.Linear(width, dim)).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, c):
            return self.net(torch.cat([x, c[:, None]], 1))

    return Preconditioned(Net(), VP(t_min=0.2))


def end_of(denoiser, solver, x, times):
    *_, (_, end) = s.trajectory(Oracle(denoiser, len(x)), solver, x, times)
    return end


def gradients(loss, x, denoiser):
    return torch.autograd.grad(loss, [x, *denoiser.parameters()])


def check_close(found, wanted, bound):
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max() + 1e-12


@pytest.mark.parametrize("times", [T([1.0, 0.2]), T([0.2, 0.5, 1.0])], ids=["down", "up in two"])
@pytest.mark.parametrize("variable", [variables.time, variables.v], ids=repr)
def test_the_adjoint_of_a_trajectory_is_its_gradient(variable, times):
    """x and parameters, to 1e-6 of the largest of each, at a tolerance of 1e-9; the same evaluations as without, and no more after."""
    denoiser, x = network(), torch.randn(4, 2, dtype=D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    found, nfe = [], []
    for adjoint in (True, False):
        solver = TorchDiffEq("dopri5", 1e-9, 1e-9, variable=variable, adjoint=adjoint)
        with Oracle(denoiser, 4) as oracle:
            *_, (_, end) = s.trajectory(oracle, solver, x, times)
            before = dict(oracle.ledger), oracle.nfe.clone()
            found.append([end, *gradients((end**2).sum(), x, denoiser)])
            assert oracle.ledger == before[0]
            assert torch.equal(oracle.nfe, before[1])
        nfe.append(int(before[1].max()))
    check_close(*found, 1e-6)
    assert nfe[0] == nfe[1]


@pytest.mark.parametrize("probes", [None, 2])
def test_the_adjoint_of_a_log_prob_is_its_gradient(probes):
    denoiser, x = network(), torch.randn(3, 2, dtype=D, generator=torch.Generator().manual_seed(3)).requires_grad_()
    found = []
    for adjoint in (True, False):
        solver = TorchDiffEq("dopri5", 1e-8, 1e-8, adjoint=adjoint)
        value = s.log_prob(denoiser, x, solver, divergence=probes and s.divergence.rademacher(probes), seeds=range(3))
        nfe = value.nfe, dict(value.ledger)
        found.append([value.value, *gradients(value.value.sum(), x, denoiser)])
        assert (value.nfe, value.ledger) == nfe
    check_close(*found, 1e-6)


def test_gradcheck_of_the_adjoint():
    denoiser = network(3)
    x = torch.randn(2, 2, dtype=D, generator=torch.Generator().manual_seed(5)).requires_grad_()
    for solver in (TorchDiffEq("dopri5", 1e-9, 1e-9, adjoint=True), TorchDiffEq("rk4", variable=variables.v)):
        times = T([0.8, 0.3]) if solver.adaptive else grid.logsnr(denoiser.sde, 4)
        assert torch.autograd.gradcheck(lambda x, solver=solver, times=times: end_of(denoiser, solver, x, times), (x,), atol=1e-6)


def test_the_adjoint_of_fixed_steps_is_near_the_gradient_at_its_order():
    denoiser, x = network(), torch.ones(2, 2, dtype=D).requires_grad_()
    errors = []
    for n in (20, 40):
        times = grid.logsnr(denoiser.sde, n)
        pair = [gradients(end_of(denoiser, TorchDiffEq("rk4", adjoint=a), x, times).sum(), x, denoiser) for a in (True, False)]
        errors.append(max(float((a - b).abs().max()) for a, b in zip(*pair, strict=True)))
    assert errors[1] < errors[0] / 8
    assert errors[1] < 1e-4


def test_the_adjoint_keeps_constant_memory():
    """What is saved for the backward pass does not grow with the evaluations."""
    denoiser, x = network(), torch.ones(2, 2, dtype=D).requires_grad_()

    def saved(solver):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            end_of(denoiser, solver, x, T([1.0, 0.2]))
        return len(kept)

    coarse, fine = (saved(TorchDiffEq("dopri5", tol, tol, adjoint=True)) for tol in (1e-2, 1e-9))
    assert coarse == fine
    assert fine < saved(TorchDiffEq("dopri5", 1e-2, 1e-2)) / 5


def test_the_way_back_of_the_adjoint_stays_inside_and_is_bounded_by_itself():
    denoiser = Spy(network())
    x = torch.ones(2, 2, dtype=D).requires_grad_()
    solver = TorchDiffEq("dopri5", 1e-6, 1e-6, adjoint=True)
    for times in (T([1.0, 0.5, 0.2]), T([0.2, 1.0])):
        end = end_of(denoiser, solver, x, times)
        forward = len(denoiser.times)
        end.sum().backward()
        assert len(denoiser.times) > forward
        assert all(0.2 <= t <= 1.0 for t in denoiser.times)
        denoiser.times.clear()
    # a solve that all but spends max_nfe leaves the way back its own
    used = s.decode(denoiser, x.detach(), solver).nfe
    just = TorchDiffEq("dopri5", 1e-6, 1e-6, max_nfe=used, adjoint=True)
    end = end_of(denoiser, just, x, T([1.0, 0.2]))
    end.sum().backward(retain_graph=True)
    end.sum().backward()  # and each its own
    steep = Wrapped.from_x0(lambda x, t: torch.sin(40 * x) / 40, VP(t_min=0.2))  # its Jacobian is rougher: 14 there, 50 back
    with pytest.raises(UnfinishedError, match=r"on the way back of an adjoint: .* max_nfe = 30 evaluations"):
        end_of(steep, TorchDiffEq(rtol=1e-2, atol=1e-2, max_nfe=30, adjoint=True), 3 * x, T([1.0, 0.2])).sum().backward()


def test_nan_on_the_way_back_of_the_adjoint_ends():
    """The value is finite, its derivative is not."""
    denoiser = Wrapped.from_x0(lambda x, t: (x - x.detach()).abs().sqrt() + 0.1 * x, VP(t_min=0.2))
    x = torch.ones(2, 2, dtype=D).requires_grad_()
    with pytest.raises(UnfinishedError, match="on the way back of an adjoint: torchdiffeq gave up"):
        end_of(denoiser, TorchDiffEq(adjoint=True), x, T([1.0, 0.2])).sum().backward()


def test_scipy_has_no_gradient_and_says_so():
    x = start(2).requires_grad_()
    with pytest.raises(TypeError, match=r"x requires a gradient and ScipyIVP\(.*has none; use TorchDiffEq\(\)"):
        s.log_prob(law(), x, ScipyIVP())
    assert not s.decode(law(), x, ScipyIVP()).x.requires_grad  # under no_grad
    denoiser = network()
    x = torch.ones(2, 2, dtype=D)
    assert not end_of(denoiser, ScipyIVP(), x, T([1.0, 0.2])).requires_grad  # parameters alone do not stop it


# --- NaN, bounds, status -------------------------------------------------------------------------------------------------
def marked(rows, batch=5, shape=(3,)):
    x = torch.linspace(-1, 1, batch * math.prod(shape), dtype=D).reshape(batch, *shape).clone()
    x[rows] = 1e12
    return x


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_nan_in_some_samples(solver):
    """Named with throw; else they end as NaN and the others go on."""
    kwargs = {"x": marked([1, 4]), "seeds": range(5), **budget(solver, 40 if solver.stochastic else 10)}
    with pytest.raises(NonFiniteError, match=r"samples \[1, 4\] \(2 of 5\)") as caught:
        s.sample(Sick(0.9), (5, 3), solver, denoise=False, **kwargs)
    assert ("evaluation" if solver.adaptive else "is not finite after step") in str(caught.value)
    assert "check the network" in str(caught.value)
    found = s.sample(Sick(0.9), (5, 3), solver, throw=False, **kwargs)
    assert (found.status > 0).tolist() == [False, True, False, False, True]
    assert found.x[[1, 4]].isnan().all()
    good = [0, 2, 3]
    clean = s.sample(Sick(-1.0), (5, 3), solver, **kwargs).x[good]
    assert (found.x[good] - clean).abs().max() < (5e-2 if solver.adaptive else 1e-15)


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_nan_in_all_samples(solver, capfd):
    nan = Wrapped.from_x0(lambda x, t: x * math.nan, VP())
    with pytest.raises(NonFiniteError, match=r"samples \[0, 1, 2\] \(3 of 3\)"):
        s.sample(nan, (3, 2), solver, seeds=range(3), **budget(solver))
    found = s.sample(nan, (3, 2), solver, seeds=range(3), throw=False, **budget(solver))
    assert (found.status == 1).all()
    assert found.x.isnan().all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("solver", CONTROLLED, ids=repr)
@pytest.mark.filterwarnings("error")
def test_max_nfe_is_for_the_whole_solve_of_a_batch(solver, capfd):
    """Counted over all intervals: one less than it takes ends in the last. Samples that are NaN already keep that status."""
    times, x = T([1.0, 0.7, 0.4, 0.001]), start(3)
    used = s.decode(law(), x, solver, times=times).nfe
    few = replace(solver, max_nfe=used - 1)
    last = rf"samples \[0, 1, 2\] \(3 of 3\) are unfinished: the solve from t = 0.4 to 0.001 has used max_nfe = {used - 1} .* allow more"
    with pytest.raises(UnfinishedError, match=last):
        s.decode(law(), x, few, times=times)
    assert s.decode(law(), x, replace(solver, max_nfe=used), times=times).nfe == used
    found = s.decode(law(), x, few, times=times, throw=False)
    assert found.status.tolist() == [Status.MAX_NFE] * 3
    assert found.nfe_each.tolist() == [used - 1] * 3
    assert found.x.isnan().all()
    oracle = Oracle(Sick(2.0), 4, throw=False)
    with oracle:
        *_, (_, end) = s.trajectory(oracle, replace(solver, max_nfe=3), marked([2], 4), times)
    assert oracle.nfe.tolist() == [3] * 4
    assert end.isnan().all()
    assert oracle.status().tolist() == [-1, -1, 1, -1]
    found = s.decode(law(), x, replace(solver, max_nfe=3), throw=False, microbatch=1)
    assert found.status.tolist() == [Status.MAX_NFE] * 3
    assert found.nfe_each.tolist() == [3] * 3
    assert capfd.readouterr() == ("", "")


def blow(x, t):
    """An x0 for which dx/dt is -x^3 times a lot: it is infinite before the end."""
    return x + 5 * x**3


@pytest.mark.parametrize("solver", CONTROLLED, ids=repr)
@pytest.mark.filterwarnings("error")
def test_a_field_that_explodes_ends_within_the_bound(solver, capfd):
    few, x = replace(solver, max_nfe=100), torch.full((2, 1), 2.0, dtype=D)
    denoiser = Wrapped.from_x0(blow, EDM(t_min=0.01, t_max=5.0))
    with pytest.raises((UnfinishedError, NonFiniteError)):
        s.decode(denoiser, x, few)
    found = s.decode(denoiser, x, few, throw=False)
    assert (found.status != 0).all()
    assert found.x.isnan().all()
    assert found.nfe <= 100
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("solver", CONTROLLED, ids=repr)
def test_a_sample_that_overflows_at_once_does_not_stop_the_others(solver):
    class Overflow(s.Denoiser):
        def forward(self, x, t):
            return torch.where((x > 1e6) & bool(t < 0.9), x * 1e300 * 1e300, 0.1 * x)

    x = marked([1], 3)
    found = s.decode(Overflow(VP()), x, solver, throw=False)
    assert (found.status != 0).tolist() == [False, True, False]
    assert found.x[1].isnan().all()
    assert found.x[[0, 2]].isfinite().all()


@pytest.mark.parametrize("solver", CONTROLLED[::2], ids=repr)
def test_a_field_with_a_jump_is_crossed(solver):
    """dx/dt jumps where t = 0.5: x moves by the two halves. The pairs' estimates are up to 160 times too small at one."""
    sde = s.VE(t_min=0.25, t_max=1.0, sigma_min=0.5, sigma_max=1.0)
    denoiser = Wrapped.from_eps(lambda x, t: torch.ones_like(x) * (1.0 if t > 0.5 else -1.0), sde)
    x = torch.zeros(2, 1, dtype=D)
    found = s.decode(denoiser, x, replace(solver, rtol=1e-6, atol=1e-6))
    sigma = sde.sigma(T([1.0, 0.5, 0.25]))
    assert (found.x - ((sigma[1] - sigma[0]) - (sigma[2] - sigma[1]))).abs().max() < 1e-3


def test_underflow_is_min_step():
    """A derivative so large that no step moves time: the status of every sample, and the words."""
    denoiser = Wrapped.from_eps(lambda x, t: x + 1e25, VP())
    for solver in (TorchDiffEq(), TorchDiffEq("dopri8", variable=variables.eps)):
        with pytest.raises(UnfinishedError, match=r"torchdiffeq gave up between t = 1 and 0.001 after \d+ evaluations \(underflow"):
            s.decode(denoiser, torch.ones(2, 2), solver)
        found = s.decode(denoiser, torch.ones(2, 2), solver, throw=False)
        assert found.status.tolist() == [Status.MIN_STEP] * 2
        assert found.x.isnan().all()

    class Wild(s.Denoiser):  # noise of its own: no step is small enough
        def forward(self, x, t):
            return x + 1e6 * torch.sin(1e25 * t)

    for method in ("RK45", "RK23", "DOP853"):
        with pytest.raises(UnfinishedError, match=r"scipy gave up between|has used max_nfe"):
            s.decode(Wild(VP()), torch.ones(2, 2, dtype=D), ScipyIVP(method, max_nfe=1000))


def test_bounds_hold_where_asserts_are_gone():
    """`python -O` takes torchdiffeq's asserts away: NaN, underflow and max_nfe end all the same."""
    code = """
import math, torch, scoresde as s
x = torch.ones(2, 2, dtype=torch.float64)
def ends(fn, **kwargs):
    for throw in (True, False):
        try:
            found = s.decode(s.Wrapped.from_eps(fn, s.VP()), x, s.TorchDiffEq(**kwargs), throw=throw)
            print(found.status.tolist())
        except Exception as error:
            print(type(error).__name__)
ends(lambda x, t: x * math.nan)
ends(lambda x, t: x + 1e25)
ends(lambda x, t: torch.sin(50 * x), max_nfe=30)
w = x.clone().requires_grad_()
denoiser = s.Wrapped.from_x0(lambda x, t: (x - x.detach()).abs().sqrt() + 0.1 * x, s.VP())
*_, (_, end) = s.trajectory(s.Oracle(denoiser, 2), s.TorchDiffEq(adjoint=True), w, torch.tensor([1.0, 0.05], dtype=torch.float64))
try:
    end.sum().backward()
except s.UnfinishedError as error:
    print("back")
"""
    run = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    wanted = ["NonFiniteError", "[1, 1]", "UnfinishedError", "[-2, -2]", "UnfinishedError", "[-1, -1]", "back"]
    assert run.stdout.split("\n")[:-1] == wanted, run.stdout + run.stderr


def test_an_error_of_the_users_own_goes_through():
    """An assert or an exception inside the denoiser is theirs: no solver takes it for its own."""
    for error in (AssertionError("mine"), KeyError("mine"), ValueError("mine")):

        def fail(x, t, error=error):
            raise error

        for solver in (TorchDiffEq(), TorchDiffEq("rk4"), TorchSDE(), *map(ScipyIVP, IVPS)):
            with pytest.raises(type(error), match="mine"):
                s.sample(Wrapped.from_x0(fail, VP()), (2, 2), solver, seeds=range(2), throw=False, **budget(solver))


# --- shapes, dtypes, seeds -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_shape_and_dtype_are_kept(solver, dtype):
    if isinstance(solver, ScipyIVP) and solver.method in ("Radau", "BDF"):
        solver = ScipyIVP(solver.method, rtol=1e-2, atol=1e-2)
    for b in (0, 1, 4):
        denoiser = Spy(Gaussian(VP(), torch.zeros(1, 2, 3, dtype=D), 0.5))
        found = s.sample(denoiser, (b, 1, 2, 3), solver, seeds=range(b), dtype=dtype, **budget(solver))
        assert found.x.shape == (b, 1, 2, 3)
        assert found.x.dtype == dtype
        assert found.x.isfinite().all()
        assert len(found.status) == len(found.nfe_each) == b
        assert not b or found.nfe == len(denoiser.times)
        assert all(kind[0] == dtype for kind in denoiser.dtypes)


@pytest.mark.parametrize("solver", [x for x in EVERY if not x.adaptive], ids=repr)
def test_rows_are_independent_and_microbatches_agree(solver):
    kwargs = {"solver": solver, "steps": 10, "dtype": D}
    whole = s.sample(law(), (7, 3), seeds=range(7), **kwargs).x
    parts = [s.sample(law(), (len(r), 3), seeds=r, **kwargs).x for r in (range(3), range(3, 7))]
    assert (torch.cat(parts) - whole).abs().max() < 1e-12
    a, b = (s.sample(law(), (n, 3), seeds=range(n), microbatch=3, **kwargs).x for n in (7, 4))
    assert torch.equal(a[:4], b)
    assert (a - whole).abs().max() < 1e-12


@pytest.mark.parametrize("solver", CONTROLLED[::3], ids=repr)
def test_microbatches_of_an_adaptive_solver_agree_to_the_tolerance(solver):
    x = start(5)
    whole, parts = (s.decode(law(), x, solver, microbatch=m) for m in (None, 2))
    assert (whole.x - parts.x).abs().max() < 2e-2
    assert parts.nfe_each.shape == (5,)


def test_float32_follows_float64():
    for solver in (
        TorchDiffEq(),
        TorchDiffEq(variable=variables.v),
        ScipyIVP(),
        TorchDiffEq("rk4"),
        TorchSDE("srk"),
        TorchSDE("heun"),
    ):
        ends = [
            s.sample(law(), (16, 3), solver, seeds=range(16), dtype=d, **budget(solver, 40)).x.double() for d in (torch.float32, D)
        ]
        assert (ends[0] - ends[1]).abs().max() < 1e-4


def test_on_a_brownian_path_samples_converge_one_by_one():
    """The same seeds on a finer grid are the same path."""
    x = law().sample(50, torch.tensor(VP().t_max, dtype=D), seeds=range(50))
    a, b, c = (s.orders.on_path(law(), TorchSDE("srk"), x, s.grid.logsnr(VP(), n), range(50)) for n in (50, 100, 200))
    assert (b - c).abs().max() < (a - c).abs().max() < 0.3


def test_inference_mode_and_wrappers():
    with torch.inference_mode():
        for solver in EVERY:
            s.sample(law(), (2, 3), solver, seeds=range(2), **budget(solver))
    inner = TorchDiffEq("heun2", variable=variables.eps)
    for solver in (s.Churn(inner, 5.0), s.Restart(inner, [(0.1, 0.5, 3, 1)]), s.PredictorCorrector(inner, s.Langevin(0.1))):
        found = s.sample(law(), (3, 3), solver, steps=10, seeds=range(3))
        assert found.nfe == solver.evaluations(10) + 1
        assert found.x.isfinite().all()
    found = s.sample(
        law(), (3, 3), s.PredictorCorrector(TorchDiffEq(), s.Langevin(0.1)), times=T([1.0, 0.5, 0.001]), seeds=range(3)
    )
    assert found.x.isfinite().all()


def test_a_network_in_float32():
    denoiser = Preconditioned(MLP(2), VP())
    for solver in (TorchDiffEq(rtol=1e-3, atol=1e-3), ScipyIVP(rtol=1e-3, atol=1e-3), TorchSDE()):
        assert s.sample(denoiser, (4, 2), solver, seeds=range(4), **budget(solver)).x.isfinite().all()


# --- refused -------------------------------------------------------------------------------------------------------------
REFUSED = [
    (lambda: TorchDiffEq("rk45"), ValueError, r"method is 'rk45'; wanted one of \['adaptive_heun', 'bosh3', 'dopri5', .*'rk4'\]"),
    (lambda: TorchDiffEq("explicit_adams"), ValueError, "method is 'explicit_adams'; wanted one of"),
    (lambda: TorchDiffEq(rtol=-1.0), ValueError, r"rtol is -1.0; wanted a finite number in \[0, 1\]"),
    (lambda: TorchDiffEq(rtol="1"), TypeError, "rtol is str; wanted a number"),
    (lambda: TorchDiffEq(atol=0.0), ValueError, r"atol is 0.0; wanted a finite number in \(0, inf\)"),
    (lambda: TorchDiffEq(max_nfe=0), ValueError, "max_nfe is 0; wanted an integer of at least 1"),
    (lambda: TorchDiffEq(max_nfe=1.5), TypeError, "max_nfe is 1.5"),
    (lambda: TorchDiffEq(variable="time"), TypeError, "variable is 'time'; wanted one of scoresde.variables"),
    (lambda: TorchDiffEq(variable=variables.lam), TypeError, "variable is lam; wanted one of scoresde.variables"),
    (lambda: TorchDiffEq(adjoint=1), TypeError, "adjoint is 1; wanted True or False"),
    (lambda: ScipyIVP("rk45"), ValueError, r"method is 'rk45'; wanted one of \['BDF', 'DOP853', 'LSODA', 'RK23', 'RK45', 'Radau'\]"),
    (lambda: ScipyIVP(rtol=1e-15), ValueError, r"rtol is 1e-15; wanted a finite number in \[2.22044604925e-14, 1\]"),
    (lambda: ScipyIVP(atol=math.nan), ValueError, "atol is nan"),
    (lambda: ScipyIVP(max_nfe=True), TypeError, "max_nfe is True"),
    (lambda: ScipyIVP().evaluations(3), TypeError, "an adaptive solver chooses its steps"),
    (lambda: TorchSDE("log_ode"), ValueError, r"method is 'log_ode'; wanted one of \['euler', .*'srk'\]"),
    (lambda: TorchSDE("adaptive"), ValueError, "method is 'adaptive'"),
    (lambda: TorchSDE().order, TypeError, "read weak_order and strong_order"),
    (lambda: s.sample(law(), (2, 3), TorchDiffEq(), steps=3), ValueError, "is adaptive and chooses its steps: drop steps"),
    (lambda: s.sample(law(), (2, 3), ScipyIVP(), nfe=3), ValueError, "is adaptive and chooses its steps: drop nfe"),
    (lambda: s.sample(law(), (2, 3), TorchDiffEq("rk4"), nfe=4), ValueError, "one step of TorchDiffEq.* costs 4 and the final mean 1"),
    (lambda: s.sample(law(), (2, 3), TorchDiffEq("rk4")), ValueError, "got none of nfe, steps, times"),
    (lambda: s.log_prob(law(), start(2), TorchSDE(), steps=3), TypeError, "is stochastic and has no inverse and no density"),
    *(
        (lambda solver=solver: solver.step(Oracle(law(), 2), start(2), T([[0.5], [0.4]]), T([[0.1], [0.1]]), None), ValueError,
         r"t is \[2, 1\] float64; .* steps with one time \(\) for the batch")
        for solver in (TorchDiffEq(), TorchDiffEq("rk4"), ScipyIVP())
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), REFUSED, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_refused(call, error, match):
    with pytest.raises(error, match=f"(?s){match}"):
        call()


def test_the_file_is_where_other_libraries_are_called():
    """Nowhere else in the package."""
    root = Path(s.__file__).parent
    users = [p.name for p in root.rglob("*.py") if "torchdiffeq import" in p.read_text() or "torchsde import" in p.read_text()]
    assert users == ["foreign.py"]
