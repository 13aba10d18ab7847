"""The laws: what holds for every SDE and every solver, looped over the same `__all__` lists as the docs and the benchmarks."""

import math
from itertools import pairwise

import laws
import pytest
import torch
from laws import FLOWS, SIX, D, budget_of, coarse, every_sde, every_solver, label, logsnr_times, mixture, run

import scoresde
from scoresde import (
    DDIM,
    EDM,
    VP,
    Ancestral,
    EulerMaruyama,
    Gaussian,
    Heun,
    ImprovedEuler,
    Langevin,
    TorchDiffEq,
    TorchSDE,
    solvers,
    variables,
)
from scoresde.noise import seeded
from scoresde.solve import chunks, plan
from scoresde.solvers.corrector import Hold

SDES = every_sde()
SOLVERS = every_solver()
LONG = (EulerMaruyama, ImprovedEuler, TorchSDE)  # explicit in the drift: they refuse, or blow up in, few steps


# --- orders --------------------------------------------------------------------------------------------------------------
def on_sdes(solver):
    return ["VP"] if solver.invariant else list(SIX)


ORDER_CASES = [
    pytest.param(s, name, id=f"{label(s)}-{name}", marks=[pytest.mark.slow] if name not in ("VP", "VE") else [])
    for s in FLOWS
    for name in on_sdes(s)
]


def check_order(solver, errors, slopes):
    slack = 0.3 if solver.order >= 4 else 0.15
    assert solver.order - slack <= slopes[-1] <= solver.order + 0.3, (errors, slopes)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(("solver", "name"), ORDER_CASES)
def test_order_in_x(solver, name):
    check_order(solver, *laws.order_in_x(solver, SDES[name]))


@pytest.mark.parametrize(("solver", "name"), ORDER_CASES)
def test_order_in_log_p(solver, name):
    check_order(solver, *laws.order_in_log_p(solver, SDES[name]))


@pytest.mark.parametrize("solver", [s for s in FLOWS if s.invariant], ids=label)
def test_schedule_invariance(solver):
    """The same y = x / alpha on every SDE at the same rho nodes, so the order measured on VP is the order on all."""
    ends = []
    for name in SIX:
        sde = SDES[name]
        times = logsnr_times(sde, 12)
        y = seeded(range(16)).initial((16, 2), D) * math.exp(2)
        ends.append(run(mixture(sde), solver, sde.alpha(times[0]) * y, times) / sde.alpha(times[-1]))
    for other in ends[1:]:
        assert (other - ends[0]).abs().max() <= 1e-10


# --- one formula, one number ----------------------------------------------------------------------------------------------
def close(a, b, name="VP", grid=None, bound=1e-12, steps=10):
    """Two solvers on one problem: the largest difference in x / alpha, on [-4, 4] in logsnr and on the whole range."""
    sde = SDES[name]
    denoiser = mixture(sde)
    for times in (logsnr_times(sde, steps), (grid or scoresde.grid.logsnr)(sde, steps)):
        x = seeded(range(8)).initial((8, 2), D) * sde.rho(times[0]) * sde.alpha(times[0])
        ends = [run(denoiser, solver, x, times) / sde.alpha(times[-1]) for solver in (a, b)]
        assert (ends[0] - ends[1]).abs().max() <= bound, (a, b, name)


@pytest.mark.parametrize("name", SIX)
def test_equal_names_give_equal_numbers(name):
    """Published names of one formula, to 1e-12."""
    for variable in (variables.eps, variables.x0, variables.velocity):  # order 1: one line whatever moves along it
        close(DDIM(), scoresde.AdamsBashforth(1, variable), name)
        close(DDIM(), scoresde.Euler(variable), name)
    close(DDIM(), scoresde.DPMSolver(1), name)
    close(DDIM(), scoresde.DPMSolverPP(1), name)
    close(DDIM(), scoresde.IPNDM(1), name)
    close(DDIM(), scoresde.DEIS(0), name)
    for order in (2, 3):
        close(scoresde.AdamsBashforth(order, variables.x0), scoresde.DPMSolverPP(order, weights=solvers.exact), name)
        close(scoresde.AdamsBashforth(order, variables.eps), scoresde.DEIS(order - 1, variables.rho), name)
    close(scoresde.AdamsMoulton(3, variables.x0), scoresde.UniPC(2, solvers.exact), name)
    x = seeded(range(8)).initial((8, 2), D)
    times, denoiser = logsnr_times(SDES[name], 10), mixture(SDES[name])
    a = run(denoiser, DDIM(eta=1.0), x, times, seeded(range(8)))
    assert (a - run(denoiser, Ancestral(), x, times, seeded(range(8)))).abs().max() < 1e-11


def test_equal_names_are_equal_settings():
    assert scoresde.DPMSolverPP(2, weights=solvers.exact) == scoresde.AdamsBashforth(2, variables.x0)
    assert scoresde.UniPC(2, solvers.exact) == scoresde.AdamsMoulton(3, variables.x0)
    assert scoresde.DEIS(2, variables.rho) == scoresde.AdamsBashforth(3, variables.eps)
    assert scoresde.Euler() == DDIM()
    assert scoresde.DPMSolverPP(2) != scoresde.DPMSolverPP(3)
    assert repr(scoresde.Euler()) != repr(DDIM())


def test_time_itself_is_a_variable():
    """`Euler(time)` is x + (s - t) dx/dt, and on the rectified path time is tau: the same as the velocity's, to 1e-12."""
    sde = SDES["SubVP"]
    times, denoiser = logsnr_times(sde, 10), mixture(sde)
    x = y = seeded(range(8)).initial((8, 2), D)
    for t, s in pairwise(times):
        y = y + (s - t) * scoresde.flow(denoiser, y, t)
    assert (run(denoiser, scoresde.Euler(variables.time), x, times) - y).abs().max() < 1e-12
    close(scoresde.AdamsBashforth(3, variables.time), scoresde.AdamsBashforth(3, variables.velocity), "Rectified")
    close(scoresde.RK4(variables.time), scoresde.RK4(variables.velocity), "Rectified")


# --- counting ------------------------------------------------------------------------------------------------------------
class Counted(scoresde.Denoiser):
    """A denoiser with a counter of its own."""

    def __init__(self, inner):
        super().__init__(inner.sde)
        self.inner, self.rows = inner, 0

    def forward(self, x, t):
        self.rows += len(x)
        return self.inner(x, t)


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("solver", SOLVERS, ids=label)
def test_counted_nfe_is_a_counter_inside_the_denoiser(solver, name):
    for steps in (13, 14, 20) if isinstance(solver, LONG) else (1, 2, 7):  # it refuses longer steps
        denoiser = Counted(mixture(SDES[name]))
        found = scoresde.sample(denoiser, (3, 2), coarse(solver), seeds=range(3), dtype=D, **budget_of(solver, steps))
        mean = float(found.nfe_each.double().mean())
        assert found.nfe_each.sum() == denoiser.rows
        assert found.ledger["score"] + found.ledger["denoise"] == pytest.approx(mean, rel=1e-12)
        assert found.ledger["network"] == pytest.approx(mean, rel=1e-12)
        assert found.ledger["denoise"] == 1
        assert found.ledger["guidance"] == found.ledger["divergence"] == 0
        if not solver.adaptive:
            assert found.nfe_each.tolist() == [found.nfe] * 3
            assert solver.evaluations(steps) == found.ledger["score"]
            continue
        break


class Line(scoresde.Denoiser):
    """x0 = x / (1 + rho), with a counter of its own: as cheap as an evaluation can be."""

    def __init__(self, sde):
        super().__init__(sde)
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return x / (1 + self.sde.rho(t)) / self.sde.alpha(t)


@pytest.mark.parametrize("name", laws.first("VP", "VE"))
@pytest.mark.parametrize("solver", [s for s in FLOWS if not s.adaptive], ids=label)
def test_every_step_count_to_sixty_is_counted_finite_and_without_repeats(solver, name):
    sde = SDES[name]
    for n in range(1, 61):
        denoiser = Line(sde)
        found = scoresde.sample(denoiser, (2, 1), solver, steps=n, x=torch.ones(2, 1, dtype=D), denoise=False)
        assert found.nfe == denoiser.calls == solver.evaluations(n) == found.ledger["network"]
        assert found.x.isfinite().all()
        assert (found.times.diff() < 0).all()
        assert len(found.times) == n + 1


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.adaptive], ids=label)
def test_nfe_is_a_ceiling_and_the_largest_that_fits(solver):
    sde = VP()
    for nfe in range(1, 61):
        least = solver.evaluations(1) + 1
        if nfe < least:
            with pytest.raises(ValueError, match="costs"):
                plan(sde, solver, nfe=nfe, steps=None, times=None, grid=None, extra=1)
            continue
        times = plan(sde, solver, nfe=nfe, steps=None, times=None, grid=None, extra=1)
        n = len(times) - 1
        assert solver.evaluations(n) + 1 <= nfe < solver.evaluations(n + 1) + 1
        assert (times.diff() < 0).all()


# --- shapes, dtypes, seeds -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS, ids=label)
def test_dtype_shape_and_device_are_kept(solver, dtype):
    mean = torch.zeros(1, 2, 3, dtype=D)
    for b in (0, 1, 5):
        denoiser = Gaussian(VP(), mean, 0.5)
        budget = budget_of(solver, 20 if isinstance(solver, LONG) else 3)
        found = scoresde.sample(denoiser, (b, 1, 2, 3), solver, seeds=range(b), dtype=dtype, **budget)
        assert found.x.shape == (b, 1, 2, 3)
        assert found.x.dtype == dtype
        assert found.x.device.type == "cpu"
        assert len(found.status) == len(found.nfe_each) == b


SEED_SOLVERS = [s for s in SOLVERS if s.independent]


@pytest.mark.parametrize("solver", SEED_SOLVERS, ids=label)
def test_same_seeds_same_x_for_any_split_order_and_microbatch(solver):
    denoiser = mixture(VP())
    kwargs = dict(solver=coarse(solver), dtype=D, **budget_of(solver, 20 if isinstance(solver, LONG) else 6))
    whole = scoresde.sample(denoiser, (9, 2), seeds=range(9), **kwargs).x
    parts = [scoresde.sample(denoiser, (len(r), 2), seeds=r, **kwargs).x for r in (range(4), range(4, 5), range(5, 9))]
    assert (torch.cat(parts) - whole).abs().max() < 1e-12
    backwards = scoresde.sample(denoiser, (9, 2), seeds=list(range(9))[::-1], **kwargs).x
    assert (backwards.flip(0) - whole).abs().max() < 1e-12
    a, b = (scoresde.sample(denoiser, (n, 2), seeds=range(n), microbatch=4, **kwargs).x for n in (9, 6))
    assert torch.equal(a[:6], b)  # at a fixed microbatch: to the bit
    assert (a - whole).abs().max() < 1e-12


def test_a_coupled_solver_is_independent_at_microbatch_one():
    denoiser, solver = mixture(VP()), TorchDiffEq(rtol=1e-3, atol=1e-3)
    whole = scoresde.sample(denoiser, (5, 2), solver, seeds=range(5), dtype=D, microbatch=1)
    alone = scoresde.sample(denoiser, (1, 2), solver, seeds=[3], dtype=D)
    assert torch.equal(whole.x[3:4], alone.x)
    assert whole.nfe_each[3] == alone.nfe


def test_chunks_cover_every_row_once_and_pad_to_size():
    for rows in range(12):
        for size in (None, 1, 3, 5, 20):
            parts = list(chunks(rows, size))
            assert torch.equal(torch.cat([index[:kept] for index, kept in parts]), torch.arange(rows))
            assert all(size is None or not rows or len(index) == size for index, _ in parts)


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.adaptive], ids=label)
def test_float32_follows_float64(solver, name):
    """Same noise, float32 against float64: 1e-4 at most, on every SDE; relative where too few moves leave x large."""
    denoiser = mixture(SDES[name])
    ends = [scoresde.sample(denoiser, (64, 2), solver, steps=30, seeds=range(64), dtype=dt).x for dt in (torch.float32, D)]
    assert (ends[0].double() - ends[1]).abs().max() <= 1e-4 * max(1.0, float(ends[1].abs().max()) / 5)


def test_the_start_of_a_seed_is_the_same_for_every_solver_dtype_and_budget():
    sde, seen = VP(), []

    class Spy(scoresde.Denoiser):
        def forward(self, x, t):
            if t == sde.t_max:
                seen.append(x.clone())
            return torch.zeros_like(x)

    for solver, steps in ((Heun(), 3), (EulerMaruyama(), 8), (DDIM(), 5)):
        for dtype in (torch.float32, D):
            scoresde.sample(Spy(sde), (4, 3), solver, steps=steps, seeds=range(4), dtype=dtype)
    assert all(torch.equal(x.double().float(), seen[0].float()) for x in seen)


# --- time ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("solver", SOLVERS, ids=label)
@pytest.mark.parametrize("name", sorted(SDES))
def test_every_solver_runs_on_every_sde_full_range(solver, name):
    found = scoresde.sample(mixture(SDES[name]), (32, 2), coarse(solver), seeds=range(32), dtype=D, **budget_of(solver, 40))
    assert found.x.isfinite().all()
    if not isinstance(getattr(solver, "predictor", solver), (Langevin, Hold)):  # a corrector alone moves nothing from t to s
        assert found.x.abs().max() < 5


def test_flow_up_then_down_returns():
    denoiser = mixture(VP())
    x = denoiser.sample(16, torch.tensor(1e-3, dtype=D), seeds=range(16))
    z = scoresde.encode(denoiser, x, TorchDiffEq(rtol=1e-9, atol=1e-9))
    back = scoresde.decode(denoiser, z.x, TorchDiffEq(rtol=1e-9, atol=1e-9))
    assert (back.x - x).abs().max() < 1e-6
    errors = [
        float((scoresde.decode(denoiser, scoresde.encode(denoiser, x, steps=n).x, steps=n).x - x).abs().max()) for n in (50, 100)
    ]
    assert errors[1] < errors[0] / 3


def test_heun_and_the_final_mean_are_the_edm_sampler():
    """Karras et al. 2022, algorithm 1, written out, to 1e-12 (S_churn = 0, 18 nodes, NFE 35)."""
    sde, n = EDM(), 18
    denoiser = mixture(sde)
    i = torch.arange(n, dtype=D)
    t_steps = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t_steps[0], t_steps[-1] = 80, 0.002
    t_steps = torch.cat([t_steps, torch.zeros(1, dtype=D)])
    x = start = seeded(range(8)).initial((8, 2), D) * t_steps[0]
    for t_cur, t_next in pairwise(t_steps):
        d_cur = (x - denoiser(x, t_cur)) / t_cur
        x_next = x + (t_next - t_cur) * d_cur
        if t_next > 0:
            d_prime = (x_next - denoiser(x_next, t_next)) / t_next
            x_next = x + (t_next - t_cur) * (0.5 * d_cur + 0.5 * d_prime)
        x = x_next
    found = scoresde.sample(denoiser, (8, 2), Heun(), times=t_steps[:-1], x=start, dtype=D)
    assert found.nfe == 35
    assert (found.x - x).abs().max() <= 1e-12
    ours = scoresde.sample(denoiser, (8, 2), Heun(), nfe=35, seeds=range(8), dtype=D)
    assert (ours.x - x).abs().max() < 1e-10
