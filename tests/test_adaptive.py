"""Adaptive steps: tolerances kept, samples alone, times inside, work bounded, paths kept, grids frozen."""

import math

import pytest
import torch
from laws import SIX, D, every_sde, first, mixture
from torch import nn

import scoresde as s
from scoresde import variables
from scoresde.checks import Status
from scoresde.noise import brownian, seeded
from scoresde.orders import on_path
from scoresde.solve import solve
from scoresde.solvers import Adaptive, AdaptiveSDE, Dopri5, Dopri8, DPMAdaptive, SingleStep, Tableau
from scoresde.solvers.tableau import DOPRI5, DOPRI8

SDES = every_sde()
VP = s.VP()
ODES = [Dopri5(), Dopri8(), DPMAdaptive(2), DPMAdaptive(3), Adaptive(s.Heun())]
FAMILIES = [Dopri5, Dopri8, lambda rtol, atol: DPMAdaptive(2, rtol, atol), lambda rtol, atol: DPMAdaptive(3, rtol, atol)]
BOGACKI = Tableau(  # 3(2), its last evaluation the next step's first: Bogacki & Shampine 1989
    3, (0.0, 1 / 2, 3 / 4), shares=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)), lower=(7 / 24, 1 / 4, 1 / 3, 1 / 8)
)


def cov(d):
    """A covariance `[d, d]` with eigenvalues from 0.01 to 1."""
    basis = torch.linalg.qr(torch.randn(d, d, dtype=D, generator=torch.Generator().manual_seed(3))).Q
    return basis @ torch.diag(torch.logspace(-2, 0, d, dtype=D)) @ basis.T


def flow_map(law, x, t, u):
    """The exact flow of a Gaussian from time t to time u: along each eigenvector the number of deviations stays."""
    mean, c = law.mean.flatten(), law.covariance
    a, b = (law.sde.alpha(v) for v in (t, u))
    values, basis = torch.linalg.eigh(c)
    dev = [(law.sde.alpha(v) ** 2 * values + law.sde.sigma(v) ** 2).sqrt() for v in (t, u)]
    return ((x - a * mean) @ basis * (dev[1] / dev[0])) @ basis.T + b * mean


class Exact(s.Gaussian):
    """A Gaussian that remembers what it was made of."""

    def __init__(self, sde, mean, covariance):
        super().__init__(sde, mean, covariance=covariance)
        self.covariance, self.own_mean = covariance, mean

    @property
    def mean(self):
        return self.own_mean


class Stiff(s.Denoiser):
    """x0 = x / 2 + w sin(rate t) a row: a rate a sample, carried by `select`."""

    def __init__(self, rate, sde=VP):
        super().__init__(sde)
        self.rate = rate

    def forward(self, x, t):
        return 0.5 * x + 0.5 * torch.sin(self.rate * t).to(x)

    def select(self, index):
        return Stiff(self.rate[index], self.sde)


class Spy(s.Denoiser):
    """What a denoiser sees: rows and times of every call."""

    def __init__(self, inner, log=None):
        super().__init__(inner.sde)
        self.inner, self.log = inner, [] if log is None else log

    def forward(self, x, t):
        self.log.append((len(x), float(t.min()), float(t.max())))
        return self.inner(x, t)

    def select(self, index):
        return Spy(self.inner.select(index), self.log)


# --- tolerances ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("make", FAMILIES, ids=["Dopri5", "Dopri8", "DPM2", "DPM3"])
def test_the_error_is_within_ten_tolerances(name, make):
    """Down and up, a Gaussian of condition 100 with its flow in closed form; in x's own size at the end.

    Up, the flow itself stretches an error made at the start by 10, that of the narrowest direction.
    """
    sde, d = SDES[name], 3
    law = Exact(sde, torch.tensor([0.5, -0.3, 0.1], dtype=D), cov(d))
    ends = [torch.tensor(t, dtype=D) for t in (sde.t_max, sde.t_min)]
    for a, b in (ends, ends[::-1]):
        x = law.sample(8, a, seeds=range(8))
        exact, scale = flow_map(law, x, a, b), float(sde.alpha(b) + sde.sigma(b))
        for tol in (1e-3, 1e-6) if make(1e-3, 1e-3).order > 3 else (1e-2, 1e-4):
            found = solve(law, x, make(tol, tol), torch.stack([a, b]), None, None)
            error = (found.x - exact).square().mean(1).sqrt() / (scale + exact.abs().mean(1))
            assert error.max() <= 10 * tol * (1 if b < a else 10), (tol, error)


@pytest.mark.parametrize("tableau", [DOPRI5, DOPRI8, BOGACKI], ids=["Dopri5", "Dopri8", "Bogacki"])
def test_the_tableaus_have_their_orders(tableau):
    """On a grid, in velocity, over logsnr [-4, 4]: both the kept order and, by the error estimate, the lower one."""
    law = mixture(VP)
    solver = SingleStep(variables.velocity, None, tableau)
    times = lambda n: VP.time(torch.linspace(-2, 2, n + 1, dtype=D))
    x = law.sample(16, times(1)[0], seeds=range(16))
    run = lambda n, k=solver: solve(law, x, k, times(n), None, None).x
    exact, counts = run(640), (3, 6) if tableau.order == 8 else (40, 80, 160)
    errors = [float((run(n) - exact).square().mean().sqrt()) for n in counts]
    slope = math.log2(errors[-2] / errors[-1])
    assert slope == pytest.approx(tableau.order, abs=0.6 if tableau.order == 8 else 0.25), errors
    for row, order in ((tableau.shares[-1], tableau.order), (tableau.lower, tableau.order - 1)):  # both integrate powers of t
        for k in range(order):
            assert sum(b * c**k for b, c in zip(row, (*tableau.fractions, 1.0), strict=False)) == pytest.approx(
                1 / (k + 1), abs=1e-14
            )
    if tableau.order == 8:  # its error estimate is at rounding before it is at its order
        return
    gaps = []
    for n in (20, 40, 80):
        a, b = (v.expand(16) for v in times(n)[:2])
        _, ratio, _ = Adaptive(solver, rtol=0.0, atol=1e-3).attempt(s.Oracle(law, 16), x, a, b, None)
        gaps.append(float(ratio.square().mean().sqrt()))
    assert math.log2(gaps[1] / gaps[2]) == pytest.approx(tableau.order, abs=0.4), gaps  # a local error: one more than order - 1


def test_a_smaller_tolerance_costs_more_and_errs_less():
    law = mixture(VP)
    kwargs = dict(seeds=range(32), dtype=D, denoise=False)
    exact = s.sample(law, (32, 2), Dopri8(1e-11, 1e-11), **kwargs).x
    for solver in ODES[:4]:
        errors, costs = [], []
        for tol in (1e-2, 1e-3, 1e-4, 1e-5):
            found = s.sample(law, (32, 2), s_replace(solver, rtol=tol, atol=tol), **kwargs)
            errors.append(float((found.x - exact).square().mean().sqrt()))
            costs.append(float(found.nfe_each.double().mean()))
        assert errors == sorted(errors, reverse=True)
        assert costs == sorted(costs)


def s_replace(solver, **kwargs):
    """dataclasses.replace."""
    from dataclasses import replace

    return replace(solver, **kwargs)


@pytest.mark.parametrize("variable", [variables.eps, variables.velocity, variables.v, variables.V(0.5), variables.time])
def test_any_variable_gives_the_same_flow(variable):
    law = mixture(s.EDM())
    kwargs = dict(seeds=range(4), dtype=D, denoise=False)
    a = s.sample(law, (4, 2), Dopri5(1e-8, 1e-8, variable), **kwargs).x
    assert (a - s.sample(law, (4, 2), Dopri8(1e-11, 1e-11), **kwargs).x).abs().max() < 1e-6


def test_the_steps_are_those_of_the_schedule_free_problem():
    """In velocity VP, VE and EDM solve one equation over one range of rho: as many evaluations, the same x / alpha."""
    sdes = [VP, s.VE(), s.EDM()]
    out = []
    for sde in sdes:
        law, times = mixture(sde), sde.time(torch.tensor([-6.0, 6.0], dtype=D))
        x = 20.0 * seeded(range(8)).initial((8, 2), D) * sde.alpha(times[0])
        found = solve(law, x, Dopri5(1e-6, 1e-6), times, None, None)
        out.append((found.nfe_each, found.x / sde.alpha(times[1])))
    for nfe, y in out[1:]:
        assert torch.equal(nfe, out[0][0])
        assert (y - out[0][1]).abs().max() < 1e-9


# --- each sample by itself -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "solver",
    [*ODES[:4], pytest.param(Adaptive(s.Heun(), rtol=1e-2, atol=1e-2), marks=pytest.mark.slow), AdaptiveSDE(rtol=0.1)],
    ids=repr,
)
def test_alone_as_in_a_batch_with_a_stiff_mate(solver):
    """To the bit at a fixed microbatch, with its own evaluations, which are those it has alone."""
    rate = torch.tensor([3.0, 300.0, 1.0, 5.0, 2.0, 100.0, 4.0], dtype=D)[:, None]
    seeds = torch.arange(10, 17)
    batch = s.sample(Stiff(rate), (7, 3), solver, seeds=seeds, dtype=D, microbatch=4)
    assert batch.nfe_each.max() > 1.5 * batch.nfe_each.min()
    for i in range(7):
        alone = s.sample(Stiff(rate[i : i + 1]), (1, 3), solver, seeds=seeds[i : i + 1], dtype=D, microbatch=4)
        assert torch.equal(alone.x, batch.x[i : i + 1])
        assert alone.nfe == batch.nfe_each[i]
    order = torch.tensor([6, 2, 5, 0, 1, 4, 3])
    mixed = s.sample(Stiff(rate[order]), (7, 3), solver, seeds=seeds[order], dtype=D, microbatch=4)
    assert torch.equal(mixed.x, batch.x[order])
    assert torch.equal(mixed.nfe_each, batch.nfe_each[order])
    free = s.sample(Stiff(rate), (7, 3), solver, seeds=seeds, dtype=D)
    assert torch.equal(free.nfe_each, batch.nfe_each)
    assert (free.x - batch.x).abs().max() < 1e-9  # rounding, which the stiff rows stretch


def test_those_that_are_done_leave_the_batch():
    rate = torch.tensor([1.0, 1.0, 100.0, 300.0], dtype=D)[:, None]
    for microbatch in (None, 4):
        spy = Spy(Stiff(rate))
        found = s.sample(spy, (4, 3), Dopri5(), seeds=range(4), dtype=D, microbatch=microbatch, denoise=False)
        seen = [rows for rows, _, _ in spy.log]
        if microbatch:
            assert set(seen) == {4}
        else:
            assert seen == sorted(seen, reverse=True)
            assert {4, 2, 1} <= set(seen)
            assert sum(seen) == found.nfe_each.sum()
        assert len(seen) == found.nfe == found.nfe_each.max()
        assert found.ledger["score"] == found.ledger["network"] == pytest.approx(float(found.nfe_each.double().mean()))
        assert found.ledger["guidance"] == 0
        assert 0 < found.ledger["rejected"] < found.ledger["score"]


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_padding_is_not_counted(rows):
    rate = torch.linspace(1, 60, 5, dtype=D)[:rows, None]
    whole, parts = (
        s.sample(s.Clipped(Stiff(rate), -9, 9), (rows, 3), Dopri5(), seeds=range(rows), dtype=D, microbatch=m) for m in (None, 4)
    )
    assert torch.equal(whole.nfe_each, parts.nfe_each)
    assert parts.ledger == pytest.approx(whole.ledger, rel=1e-12)
    assert parts.ledger["network"] == pytest.approx(parts.ledger["score"] + parts.ledger["denoise"])


class Labelled(nn.Module):
    """A network whose label is the sign its rows of x are marked with in their last entry: it fails where they do not fit."""

    def forward(self, x, noise, cond):
        assert noise.shape == (len(x),)
        assert torch.equal(x[:, -1].sign(), cond.to(x))
        return torch.cat([torch.tanh(x[:, :-1] * cond[:, None].abs()), torch.zeros_like(x[:, -1:])], 1)


def test_labels_follow_their_rows():
    """And the network is counted through the selections of a labelled denoiser, its hooks gone at the end."""
    cond = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    model = s.Preconditioned(Labelled(), VP, s.parameterizations.edm, cond)
    x = seeded(range(5)).initial((5, 3), torch.float32)
    x[:, -1] = 5 * cond
    for denoiser in (model, s.Clipped(model, -50.0, 50.0)):
        for microbatch in (None, 2, 3):
            found = s.sample(denoiser, (5, 3), Dopri5(1e-3, 1e-3), x=x, seeds=range(5), microbatch=microbatch)
            assert found.x.dtype == torch.float32
            assert found.ledger["network"] == pytest.approx(found.ledger["score"] + 1)
            assert not any(m._forward_hooks or getattr(m, "recorders", []) for m in denoiser.modules())


# --- bounds --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", first("VP", "VE", "Rectified"))
@pytest.mark.parametrize(
    "solver", [Dopri5(1e-3, 1e-3), Dopri8(1e-3, 1e-3), DPMAdaptive(), Adaptive(s.Heun(), rtol=0.01), AdaptiveSDE()], ids=repr
)
def test_time_stays_inside(solver, name):
    sde = SDES[name]
    inner = torch.tensor([sde.t_max, 0.6 * sde.t_max, 0.1 * sde.t_max, sde.t_min], dtype=D)
    for times in (None, inner):
        spy = Spy(mixture(sde))
        found = s.sample(spy, (6, 2), solver, seeds=range(6), dtype=D, times=times, denoise=False)
        assert min(t for _, t, _ in spy.log) >= sde.t_min
        assert max(t for _, _, t in spy.log) <= sde.t_max
        assert found.status.tolist() == [0] * 6
        if not solver.stochastic:
            spy.log.clear()
            s.encode(spy, found.x, solver, times=None if times is None else times.flip(0))
            assert sde.t_min <= min(t for _, t, _ in spy.log)
            assert max(t for _, _, t in spy.log) <= sde.t_max


def bad(kind):
    """x0 = fn(x, t) of a network that is not well."""
    calls = [0]

    def fn(x, t):
        calls[0] += 1
        wave = torch.sin(1e9 * t).to(x).expand(x.shape)
        return {
            "nan": x * math.nan,
            "inf": x + math.inf,
            "later": x * (math.nan if calls[0] > 9 else 0.5),
            "below": torch.where(t.to(x) < 0.3, math.nan, 0.5 * x),
            "one": torch.where(x[:, :1] > 0, math.nan, 0.5 * x),
            "stiff": -1e9 * x,
            "exploding": 1e30 * x.abs().exp(),
            "jump": torch.where(x > 0, 100.0, -100.0).to(x) * (t.to(x) > 0.5),
            "oscillating": 1e6 * wave,
            "noise": 1e30 * torch.sin(1e12 * x),
        }[kind]

    return s.Wrapped.from_x0(fn, VP)


BAD = ["nan", "inf", "later", "below", "one", "stiff", "exploding", "jump", "oscillating", "noise"]


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(
    "solver", [Dopri5(max_nfe=600), Dopri8(max_nfe=600), DPMAdaptive(max_nfe=600), AdaptiveSDE(max_nfe=600)], ids=repr
)
def test_nothing_hangs(solver, kind):
    """An error by name, or a status a sample, within max_nfe."""
    found = s.sample(bad(kind), (5, 2), solver, seeds=range(5), dtype=D, throw=False, denoise=False)
    assert found.nfe_each.max() <= 600
    finite = found.x.isfinite().all(1)
    assert torch.equal(finite, found.status == 0)
    assert set(found.status.tolist()) <= {0, 1, Status.MAX_NFE, Status.MIN_STEP}
    if kind in ("nan", "inf"):
        assert found.status.tolist() == [1] * 5
    if kind == "below":  # it creeps up to the edge
        assert not finite.any()
    if kind == "one" and not solver.stochastic:  # those that never meet it are not touched
        assert 0 < int(finite.sum()) < 5
    if bool(finite.all()):
        s.sample(bad(kind), (5, 2), solver, seeds=range(5), dtype=D, denoise=False)
    else:
        with pytest.raises((s.NonFiniteError, s.UnfinishedError), match=r"samples \[.*\] \(\d of 5\)"):
            s.sample(bad(kind), (5, 2), solver, seeds=range(5), dtype=D, denoise=False)


def test_a_lost_sample_leaves_its_mates_alone():
    """NaN in one row of a batch: the others to the bit as without it, at a fixed microbatch; and the mean is not asked of nobody."""
    rate = torch.ones(6, 1, dtype=D)
    rate[2] = math.nan
    for solver in (Dopri5(), DPMAdaptive(), AdaptiveSDE()):
        found = s.sample(Stiff(rate), (6, 3), solver, seeds=range(6), dtype=D, microbatch=3, throw=False)
        fine = s.sample(Stiff(torch.ones(6, 1, dtype=D)), (6, 3), solver, seeds=range(6), dtype=D, microbatch=3)
        keep = torch.tensor([0, 1, 3, 4, 5])
        assert torch.equal(found.x[keep], fine.x[keep])
        assert found.x[2].isnan().all()
        assert found.status.tolist() == [0, 0, 1, 0, 0, 0]
        assert torch.equal(found.nfe_each[keep], fine.nfe_each[keep])
        with pytest.raises(s.NonFiniteError, match=r"samples \[2\] \(1 of "):
            s.sample(Stiff(rate), (6, 3), solver, seeds=range(6), dtype=D, microbatch=3)


def test_max_nfe_is_of_the_solve_and_of_the_sample():
    rate = torch.tensor([1.0, 1000.0, 1.0], dtype=D)[:, None]
    times = torch.tensor([1.0, 0.7, 0.3, 1e-3], dtype=D)
    for grid in (None, times):
        found = s.sample(Stiff(rate), (3, 2), Dopri5(max_nfe=300), seeds=range(3), dtype=D, times=grid, throw=False, denoise=False)
        assert found.status.tolist() == [0, Status.MAX_NFE, 0]
        assert 290 <= found.nfe_each[1] <= 300
        assert found.x[1].isnan().all()
        with pytest.raises(
            s.UnfinishedError,
            match=r"samples \[1\] \(1 of 3\) have no evaluations for another step within max_nfe = 300 and are at t = 0\.\d+; loosen",
        ):
            s.sample(Stiff(rate), (3, 2), Dopri5(max_nfe=300), seeds=range(3), dtype=D, times=grid, denoise=False)


def test_no_step_is_below_what_time_resolves():
    with pytest.raises(s.UnfinishedError, match=r"smallest step that time resolves"):
        s.sample(bad("noise"), (2, 2), Dopri5(), seeds=range(2), dtype=D)


def test_a_tolerance_below_the_dtype_is_refused():
    with pytest.raises(
        ValueError, match=r"rtol is 1e-09 and atol 1e-09; .*float32 resolves 9.5e-07: loosen them, or solve in float64"
    ):
        s.sample(mixture(VP), (2, 2), Dopri5(1e-9, 1e-9), seeds=range(2))
    assert s.sample(mixture(VP), (2, 2), Dopri5(1e-5, 1e-5), seeds=range(2)).x.dtype == torch.float32


@pytest.mark.parametrize("name", first("VP", "VE", "Rectified"))
@pytest.mark.parametrize("solver", [Dopri5(1e-5, 1e-5), Dopri8(1e-5, 1e-5), DPMAdaptive(), AdaptiveSDE()], ids=repr)
def test_float32_follows_float64(solver, name):
    ends = [s.sample(mixture(SDES[name]), (16, 2), solver, seeds=range(16), dtype=t).x for t in (torch.float32, D)]
    # a step accepted in one and refused in the other, or a little longer, differs by the tolerance, not by rounding
    assert (ends[0].double() - ends[1]).abs().max() <= max(2e-4, 4 * solver.rtol)


def test_the_steps_go_on_through_output_times():
    """No new start at each: the step, the last errors and the last evaluation are kept."""
    law, times = mixture(VP), VP.time(torch.linspace(-7, 7, 21, dtype=D))
    x = law.sample(4, times[0], seeds=range(4))
    one = solve(law, x, Dopri5(1e-4, 1e-4), times[[0, -1]], None, None)
    many = solve(law, x, Dopri5(1e-4, 1e-4), times, None, None)
    assert (one.x - many.x).abs().max() < 1e-3
    assert many.nfe_each.max() <= one.nfe_each.max() + 6 * 20
    assert all(n % 6 == 1 for n in many.nfe_each.tolist())  # six a try, and the first


def test_batches_of_none_and_one_and_images():
    for solver in (*ODES[:4], AdaptiveSDE()):
        for b in (0, 1, 3):
            sde = VP
            law = s.Gaussian(sde, torch.zeros(1, 2, 3, dtype=D), 0.5)
            found = s.sample(law, (b, 1, 2, 3), solver, seeds=range(b), microbatch=2)
            assert found.x.shape == (b, 1, 2, 3)
            assert found.x.isfinite().all()


# --- likelihood and gradients --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("solver", [Dopri5(1e-7, 1e-7), Dopri8(1e-8, 1e-8)], ids=repr)
def test_log_prob_is_exact(solver, name):
    sde = SDES[name]
    law, ends = mixture(sde), [torch.tensor(t, dtype=D) for t in (sde.t_min, sde.t_max)]
    x = law.sample(6, ends[0], seeds=range(6))
    found = s.log_prob(law, x, solver, prior=lambda z: law.log_prob(z, ends[1]))
    assert (found.value - law.log_prob(x, ends[0])).abs().max() < 1e-5


def test_probes_stay_with_their_rows():
    """One set a sample for the whole solve, whoever has left: as alone, and for any microbatch."""
    law = mixture(VP)
    x = law.sample(7, torch.tensor(VP.t_min, dtype=D), seeds=range(7))
    values = [
        s.log_prob(law, x, Dopri5(), divergence=s.divergence.rademacher(2), seeds=range(7), microbatch=m).value
        for m in (None, 2, 3)
    ]
    assert (values[0] - values[1]).abs().max() < 1e-9
    assert (values[0] - values[2]).abs().max() < 1e-9
    alone = s.log_prob(law, x[3:4], Dopri5(), divergence=s.divergence.rademacher(2), seeds=[3]).value
    assert (alone - values[0][3:4]).abs().max() < 1e-9


def test_gradients_are_those_of_the_steps_taken():
    law = mixture(VP)
    x = law.sample(3, torch.tensor(VP.t_min, dtype=D), seeds=range(3)).requires_grad_()
    for solver in (Dopri5(1e-8, 1e-8), Dopri8(1e-8, 1e-8)):
        value = s.log_prob(law, x, solver, prior=lambda z: law.log_prob(z, torch.tensor(1.0, dtype=D))).value
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert (grad - law.score(x.detach(), torch.tensor(VP.t_min, dtype=D))).abs().max() < 1e-5


def test_gradients_reach_the_parameters():
    scale = torch.tensor(0.7, dtype=D, requires_grad=True)
    model = s.Wrapped.from_x0(lambda x, t: scale * torch.tanh(x), VP)
    start = seeded(range(3)).initial((3, 2), D)
    times = torch.tensor([1.0, 1e-3], dtype=D)

    def end(c):
        with torch.no_grad():
            old = scale.clone()
            scale.copy_(c)
        out = list(s.trajectory(s.Oracle(model, 3), Dopri8(1e-10, 1e-10), start, times))[-1][1].square().sum()
        with torch.no_grad():
            scale.copy_(old)
        return out

    (grad,) = torch.autograd.grad(
        list(s.trajectory(s.Oracle(model, 3), Dopri5(1e-9, 1e-9), start, times))[-1][1].square().sum(), scale
    )
    with torch.no_grad():
        wanted = (end(0.7001) - end(0.6999)) / 2e-4
    assert float(grad) == pytest.approx(float(wanted), rel=1e-6)


# --- the reverse SDE -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", first("VP", of=("VP", "VE", "EDM")))
@pytest.mark.parametrize("d", [1, 16, 256])
def test_the_law_of_adaptive_sde(name, d):
    """Standard deviation within 5 sigma of the exact one; drawing noise anew after a rejection makes it 1.3 to 1.5 times at d = 1."""
    sde, n = SDES[name], max(24, 4000 // d)
    law = s.Gaussian(sde, torch.zeros(d, dtype=D), 0.3)
    x = s.sample(law, (n, d), AdaptiveSDE(), seeds=range(n), dtype=D, denoise=False).x
    t = torch.tensor(sde.t_min, dtype=D)
    want = float((sde.alpha(t) ** 2 * 0.09 + sde.sigma(t) ** 2).sqrt())
    z = (float(x.square().mean()) / want**2 - 1) * (n * d / 2) ** 0.5
    assert abs(z) < 5, (z, float(x.std()) / want)


class Anew(s.noise.Noise):
    """Fresh noise whenever it is asked for, and no path, whatever it says."""

    path = True

    def __init__(self, seeds):
        self.source = seeded(seeds)

    def draw(self, x, stream):
        return self.source.draw(x, stream)

    def signs(self, x, stream):
        return self.source.signs(x, stream)

    def uniform(self, x, stream):
        return self.source.uniform(x, stream)

    def select(self, index):
        part = Anew([0])
        part.source = self.source.select(index)
        return part


def test_noise_drawn_anew_widens_the_law():
    """Why the path is kept: the same solver, the same tolerance, without it."""
    law = s.Gaussian(VP, torch.zeros(1, dtype=D), 0.3)
    x = VP.prior_std() * seeded(range(2000)).initial((2000, 1), D)
    times = torch.tensor([1.0, 1e-3], dtype=D)
    widths = []
    for noise in (Anew(torch.arange(2000)), brownian(torch.arange(2000), VP.t_min, VP.t_max)):
        widths.append(float(solve(law, x, AdaptiveSDE(rtol=0.1), times, noise, None).x.std()) / 0.3)
    assert widths[0] > 1.1 > 1.08 > widths[1]


def test_adaptive_sde_follows_its_path():
    """As the tolerance falls it nears the fine solution on the same path; seeds repeat it; a generator gives it seeds."""
    line, seeds = mixture(VP), range(24)
    x = line.sample(24, torch.tensor(1.0, dtype=D), seeds=seeds)
    times = torch.tensor([1.0, 0.5, 1e-3], dtype=D)
    fine = on_path(
        line, s.SRA3(), x, VP.time(torch.linspace(*VP.logsnr(times[[0, -1]]).tolist(), 1001, dtype=D)).clamp(1e-3, 1.0), seeds
    )
    errors = [
        float((on_path(line, AdaptiveSDE(rtol=tol, atol=tol), x, times, seeds) - fine).abs().median()) for tol in (0.1, 0.02, 0.004)
    ]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]
    a, b = (s.sample(line, (4, 2), AdaptiveSDE(), seeds=[7, 8, 9, 10], dtype=D).x for _ in range(2))
    assert torch.equal(a, b)
    first, again, other = (
        s.sample(line, (4, 2), AdaptiveSDE(), generator=torch.Generator().manual_seed(g), dtype=D) for g in (1, 1, 2)
    )
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert torch.equal(s.sample(line, (4, 2), AdaptiveSDE(), seeds=first.seeds, dtype=D).x, first.x)


def test_adaptive_sde_ends_its_steps_on_dyadic_times():
    spy = Spy(mixture(VP))
    s.sample(spy, (1, 2), AdaptiveSDE(), seeds=[3], dtype=D, denoise=False)
    parts = (torch.tensor([t for _, t, _ in spy.log], dtype=D) - VP.t_min) / (VP.t_max - VP.t_min) * 2**20
    assert (parts - parts.round()).abs().max() < 1e-3


# --- pilots --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", [Dopri5(1e-3, 1e-3), Dopri5(), Dopri8(), DPMAdaptive(2), DPMAdaptive(3)], ids=repr)
@pytest.mark.parametrize("name", ["VP", "EDM"])
def test_a_frozen_grid_is_as_good_on_fresh_noise(name, solver):
    """Error at most 1.2 times that of the adaptive run, at its evaluations."""
    law, n = mixture(SDES[name]), 128
    frozen = s.freeze(law, (256, 2), solver, seeds=range(256), dtype=D)
    kwargs = dict(seeds=range(1000, 1000 + n), dtype=D, denoise=False)
    exact = s.sample(law, (n, 2), Dopri8(1e-11, 1e-11), **kwargs).x
    adaptive = s.sample(law, (n, 2), solver, **kwargs)
    fixed = s.sample(law, (n, 2), frozen.solver, times=frozen.times, **kwargs)
    assert fixed.nfe <= float(adaptive.nfe_each.double().mean()) + 2
    errors = [float((run.x - exact).square().mean().sqrt()) for run in (fixed, adaptive)]
    assert errors[0] <= 1.2 * errors[1], errors


def test_a_frozen_grid_is_a_grid():
    law = mixture(VP)
    frozen = s.freeze(law, (16, 2), seeds=range(16))
    assert frozen.pilot.solver == Dopri5()
    for n in (1, 2, 7, 500):
        times = frozen.grid(VP, n)
        assert len(times) == n + 1
        assert times[0] == VP.t_max
        assert times[-1] == VP.t_min
        assert (times.diff() < 0).all()
    found = s.sample(law, (4, 2), s.UniPC(3), nfe=20, grid=frozen.grid, seeds=range(4))
    assert found.nfe <= 20
    other = s.freeze(law, (16, 2), Dopri5(), fixed=s.Heun(), seeds=range(16), microbatch=3)
    assert other.solver == s.Heun()
    for solver in (Dopri5(), DPMAdaptive(2)):
        assert s.freeze(law, (16, 2), solver, seeds=range(16)).solver in solver.fixed
    sde = s.freeze(law, (16, 2), AdaptiveSDE(), seeds=range(16))
    assert sde.solver == s.ImprovedEuler()
    assert s.sample(law, (4, 2), sde.solver, times=sde.times, seeds=range(4)).x.isfinite().all()


def test_what_cannot_be_frozen():
    law = mixture(VP)
    with pytest.raises(TypeError, match=r"wanted an adaptive solver with steps of its own, as Dopri5\(\)"):
        s.freeze(law, (4, 2), s.Heun())
    with pytest.raises(TypeError, match=r"wanted a solver on a grid"):
        s.freeze(law, (4, 2), Dopri5(), fixed=Dopri5())
    with pytest.raises(ValueError, match="at least one sample"):
        s.freeze(law, (0, 2))
    with pytest.raises(ValueError, match=r"frozen for VP\(.*asked for EDM"):
        s.freeze(law, (4, 2), seeds=range(4)).grid(s.EDM(), 5)


# --- your own ------------------------------------------------------------------------------------------------------------
def test_a_tableau_of_ones_own_is_adaptive():
    own = Adaptive(SingleStep(variables.velocity, None, BOGACKI), rtol=1e-5, atol=1e-5)
    law = mixture(VP)
    kwargs = dict(seeds=range(8), dtype=D, denoise=False)
    found = s.sample(law, (8, 2), own, **kwargs)
    assert (found.x - s.sample(law, (8, 2), Dopri8(1e-11, 1e-11), **kwargs).x).abs().max() < 1e-3
    assert all(n % 3 == 1 for n in found.nfe_each.tolist())
    assert own.order == 3


@pytest.mark.parametrize("pid", [(0.0, 1.0, 0.0), (0.7, 0.1, 0.0), (0.25, 0.25, 0.1)])
def test_any_controller_keeps_the_tolerance(pid):
    law = mixture(VP)
    kwargs = dict(seeds=range(32), dtype=D, denoise=False)
    exact = s.sample(law, (32, 2), Dopri8(1e-11, 1e-11), **kwargs).x
    found = s.sample(law, (32, 2), Dopri5(1e-5, 1e-5, pid=pid), **kwargs)
    assert (found.x - exact).square().mean().sqrt() < 1e-4
    assert found.nfe < 250


# --- after a breaker -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("microbatch", [2, 3])
@pytest.mark.parametrize("solver", [Dopri5(1e-3, 1e-3), DPMAdaptive(), AdaptiveSDE(rtol=0.1)], ids=repr)
def test_padding_goes_along_through_output_times(solver, microbatch):
    rate = torch.tensor([1.0, 30.0, 200.0, 3.0, 300.0], dtype=D)[:, None]
    times = torch.tensor([1.0, 0.7, 0.3, 1e-3], dtype=D)
    kwargs = dict(seeds=range(5), dtype=D, times=times)
    whole, parts = (s.sample(Stiff(rate), (5, 2), solver, microbatch=m, **kwargs) for m in (None, microbatch))
    assert torch.equal(whole.nfe_each, parts.nfe_each)
    assert (whole.x - parts.x).abs().max() < 1e-9
    assert parts.ledger == pytest.approx(whole.ledger, rel=1e-12)


def test_the_final_mean_is_not_asked_at_a_stale_state():
    """Padding ends where the row ends that it is a copy of."""
    fine = lambda x, t: torch.where((x.abs() > 5) & (t.to(x) < 0.1), math.nan, 0.5 * x / (1 + t.to(x) ** 2))
    found = s.sample(s.Wrapped.from_x0(fine, s.EDM()), (5, 2), Dopri5(1e-4, 1e-4), seeds=range(5), microbatch=4)
    assert found.x.isfinite().all()


def test_gradients_pass_a_try_that_was_not_finite():
    scale = torch.tensor(0.7, dtype=D, requires_grad=True)
    fn = lambda x, t: scale * x * torch.sqrt(1 - (x / 8) ** 2) - 3 * torch.sin(200 * t).to(x)
    x = (0.9 * seeded(range(6)).initial((6, 2), D).clamp(-1.2, 1.2)).requires_grad_()
    oracle = s.Oracle(s.Wrapped.from_x0(fn, VP), 6)
    out = list(s.trajectory(oracle, Dopri5(0.1, 0.1), x, torch.tensor([1.0, 1e-3], dtype=D)))[-1][1]
    grads = torch.autograd.grad(out.square().sum(), [scale, x])
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads)


def test_a_path_is_wanted_where_steps_are_made_again():
    oracle = s.Oracle(mixture(VP), 2, seeded(range(2)))
    with pytest.raises(ValueError, match=r"one Brownian path a sample and the noise is Seeded; wanted noise.brownian"):
        list(s.trajectory(oracle, AdaptiveSDE(), torch.zeros(2, 2, dtype=D), torch.tensor([1.0, 0.5], dtype=D)))


def test_the_coordinate_may_be_left_to_the_variable():
    law, kwargs = mixture(VP), dict(seeds=range(8), dtype=D)
    for tableau in (s.solvers.tableau.TRAPEZOID, s.solvers.tableau.THIRDS):
        found = [
            s.sample(law, (8, 2), Adaptive(SingleStep(variables.velocity, c, tableau), rtol=1e-4, atol=1e-4), **kwargs)
            for c in (None, variables.tau)
        ]
        assert torch.equal(found[0].x, found[1].x)


def test_max_nfe_is_of_the_solve_in_pieces_too():
    times = torch.linspace(1, 1e-3, 11, dtype=D)
    found = s.sample(
        mixture(VP), (3, 2), s.Churn(Dopri5(max_nfe=40), 200.0), seeds=range(3), dtype=D, times=times, throw=False, denoise=False
    )
    assert found.nfe <= 40
    assert found.status.tolist() == [Status.MAX_NFE] * 3


def test_what_was_given_up_stays_nan_and_is_asked_nothing():
    class Signs(s.Denoiser):
        def forward(self, x, t):
            return torch.where(x > 0, 1.0, -1.0).to(x)

    found = s.sample(Signs(VP), (3, 2), Dopri5(max_nfe=10), seeds=range(3), dtype=D, throw=False)
    assert found.x.isnan().all()
    assert found.nfe <= 10


def test_output_times_close_together_do_not_shorten_the_steps():
    law = mixture(VP)
    far = torch.linspace(1, 1e-3, 22, dtype=D)
    pairs = torch.stack([far[1:-1], far[1:-1] - 1e-7], 1).flatten()
    close = torch.tensor([1.0, 0.5, 0.5 - 5e-16, 1e-3], dtype=D)
    nfe = [
        s.sample(law, (8, 2), Dopri5(1e-6, 1e-6), seeds=range(8), dtype=D, times=t).nfe
        for t in (far, torch.cat([far[:1], pairs, far[-1:]]), close)
    ]
    assert nfe[1] <= nfe[0] + 6 * 20 + 30
    assert nfe[2] < nfe[0]


def test_bits_do_not_depend_on_the_place_in_the_batch():
    """Twelve rows: some kernels round the last few of a tensor otherwise, which nothing here may use."""
    kwargs = dict(dtype=D, microbatch=12)
    rate = torch.linspace(1, 40, 12, dtype=D)[:, None]
    for solver in (Dopri5(), DPMAdaptive(), AdaptiveSDE(rtol=0.1)):
        whole = s.sample(Stiff(rate), (12, 3), solver, seeds=range(12), **kwargs)
        back = s.sample(Stiff(rate.flip(0)), (12, 3), solver, seeds=range(11, -1, -1), **kwargs)
        assert torch.equal(whole.x, back.x.flip(0))
        assert torch.equal(whole.nfe_each, back.nfe_each.flip(0))


def test_wrappers_keep_the_tolerance_of_what_they_wrap():
    class Strict(s.Denoiser):
        def __init__(self):
            super().__init__(VP)
            self.asked = 0

        def forward(self, x, t):
            return 0.5 * x

        def error_norm(self, ratio):
            self.asked += 1
            return super().error_norm(ratio)

    for wrap in (s.Clipped, s.Thresholded):
        inner = Strict()
        s.sample(wrap(inner), (2, 3), Dopri5(1e-3, 1e-3), seeds=range(2))
        assert inner.asked
    inner = Strict()
    s.log_prob(inner, torch.zeros(2, 3, dtype=D), Dopri5(1e-3, 1e-3))
    assert inner.asked


def test_a_frozen_run_says_who_ran():
    frozen = s.freeze(mixture(VP), (8, 2), Dopri5(1e-4, 1e-4, max_nfe=120), seeds=range(8))
    assert frozen.pilot.solver == Dopri5(1e-4, 1e-4, max_nfe=120)
    assert frozen == frozen
    assert hash(frozen.grid)
