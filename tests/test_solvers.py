"""The core of the deterministic solvers: its weights, its memory of a grid, what it costs the host; grids; wrappers that change x0."""

import math
import pickle
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from laws import FLOWS, SIX, SOLVERS, D, every_sde, label, logsnr_times, mixture, order_in_x, run
from torch.utils._pytree import tree_map

import scoresde
from scoresde import EDM, VP, Heun, grid, solvers, variables
from scoresde.linear import derivative
from scoresde.noise import seeded
from scoresde.solvers.weights import bh1, bh2, exact, segment

SDES = every_sde()


# --- weights -------------------------------------------------------------------------------------------------------------
def psi(k, h):
    """int_0^h e^(u - h) u^(k-1) / (k-1)! du by its series: no cancellation."""
    return math.exp(-h) * sum(h ** (k + j) / (math.factorial(j) * math.factorial(k - 1) * (k + j)) for j in range(80))


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.1, 1.0, 5.0])
def test_weights_are_the_psi_functions_to_rounding_at_any_step(h):
    """Three nodes in lam, data form: the closed forms of DPM-Solver++(3M), written with series, relative 1e-13."""
    sde = EDM(t_min=1e-4, t_max=1e4)
    lam = torch.tensor([0.0, h], dtype=D)
    t, s = sde.time(2 * lam).split(1)
    (part,) = segment(variables.x0, variables.lam, sde, t, s).each()
    a, b = -0.7 * h, -1.6 * h
    moments = [psi(1, h), psi(2, h), 2 * psi(3, h)]  # int e^(u - h) u^k du
    wanted = [
        (moments[2] - (a + b) * moments[1] + a * b * moments[0]) / (a * b),
        (moments[2] - b * moments[1]) / (a * (a - b)),
        (moments[2] - a * moments[1]) / (b * (b - a)),
    ]
    step = float((sde.logsnr(s) - sde.logsnr(t)) / 2)  # h as the rounded times have it
    found = exact(part, [part.start, part.start + a * step / h, part.start + b * step / h]) / math.exp(part.end)
    assert np.abs(found / wanted - 1).max() < (1e-9 if h < 1e-4 else 1e-12)  # the times themselves are rounded
    assert found.sum() == pytest.approx(-math.expm1(-step), rel=1e-14)


def test_adams_bashforth_and_moulton_on_a_uniform_grid_are_the_textbook_ones():
    sde = EDM(t_min=1.0, t_max=10.0)
    t = torch.tensor([5.0], dtype=D)
    (part,) = segment(variables.eps, variables.rho, sde, t, t - 1).each()
    for nodes, wanted in (
        ([5, 6], [3 / 2, -1 / 2]),
        ([5, 6, 7], [23 / 12, -16 / 12, 5 / 12]),
        ([5, 6, 7, 8], [55 / 24, -59 / 24, 37 / 24, -9 / 24]),
        ([5, 4, 6], [8 / 12, 5 / 12, -1 / 12]),
        ([5, 4, 6, 7], [19 / 24, 9 / 24, -5 / 24, 1 / 24]),
    ):
        assert np.abs(-exact(part, [float(w) for w in nodes]) - wanted).max() < 1e-14
    counted = segment(variables.eps, None, sde, torch.tensor([9.0, 5.0], dtype=D), torch.tensor([5.0, 2.0], dtype=D)).each()[1]
    assert np.abs(exact(counted, [1.0, 0.0]) / -3 - [3 / 2, -1 / 2]).max() < 1e-14


def test_bh_differs_from_exact_on_two_nodes_alone():
    t, s = torch.tensor([3.0, 1.0], dtype=D).split(1)
    (part,) = segment(variables.x0, variables.lam, EDM(), t, s).each()
    w0, h = part.start, part.end - part.start
    for nodes in ([w0], [w0, w0 - 0.3, w0 - 1], [w0, w0 + h, w0 - 0.3, w0 - 1]):
        assert np.array_equal(bh1(part, nodes), exact(part, nodes))
        assert np.array_equal(bh2(part, nodes), exact(part, nodes))
    for rule, b in ((bh1, h), (bh2, -math.expm1(-h))):  # sigma_s c_1 = B h / 2 / (w1 - w0), Zhao et al. 2023
        c = rule(part, [w0, w0 - 0.5]) / math.exp(part.end)
        assert c[1] == pytest.approx(b * h / 2 / -0.5, rel=1e-12)
        assert c.sum() == pytest.approx(-math.expm1(-h), rel=1e-12)


CLOCKS = [variables.lam, variables.rho, variables.snr, variables.tau, variables.t, variables.Angle(), variables.Angle(0.5)]


@pytest.mark.parametrize("w", CLOCKS, ids=repr)
def test_clocks_invert_and_their_rates_are_derivatives(w):
    lam = torch.linspace(-4, 4, 33, dtype=D)
    assert (w.to_lam(w.of_lam(lam)) - lam).abs().max() < 1e-12
    for sde in SDES.values():
        t = sde.time(torch.linspace(-6, 6, 9, dtype=D))
        assert (w.time(sde, w.at(sde, t)) / t - 1).abs().max() < 1e-9
        assert (w.along(sde, sde.logsnr(t) / 2) / w.at(sde, t) - 1).abs().nan_to_num().max() < 1e-9
    if w != variables.t:
        h = 1e-6
        assert ((w.of_lam(lam + h) - w.of_lam(lam - h)) / (2 * h) / w.rate(lam) - 1).abs().max() < 1e-7


@pytest.mark.parametrize(
    "variable", [variables.eps, variables.x0, variables.velocity, variables.v, variables.V(0.4), variables.time], ids=repr
)
@pytest.mark.parametrize("name", SIX)
def test_variables_say_how_the_flow_moves(variable, name):
    """d(x / m)/dt = q du/dt with q = p x + r x0, against the library's own dx/dt."""
    sde, d = SDES[name], mixture(SDES[name])
    t = sde.time(torch.tensor(0.7, dtype=D))
    x = seeded(range(5)).initial((5, 2), D)
    m = derivative(lambda t: variable.scale(sde.alpha(t), sde.sigma(t)), t)
    u = derivative(lambda t: variable.clock.at(sde, t), t)
    scale = variable.scale(sde.alpha(t), sde.sigma(t))
    p, r = variable.read(sde, t)
    q = p * x + r * d(x, t)
    assert (scoresde.flow(d, x, t) / scale - x * m / scale**2 - q * u).abs().max() < 1e-9 * u.abs()
    if variable == variables.v:
        assert (q - d.predict(x, t).v / scale).abs().max() < 1e-12
    elif isinstance(variable, variables.V):
        wiener = scoresde.Gaussian(sde, torch.zeros(2, dtype=D), 0.4)
        assert (p * x + r * wiener(x, t)).abs().max() < 1e-12  # data of that deviation: nothing moves
    elif variable != variables.time:
        assert (q - getattr(d.predict(x, t), repr(variable))).abs().max() < 1e-12


class FF:
    """f(t) = -k (): equal to every other, unhashable."""

    def __init__(self, k):
        self.k = k

    def __eq__(self, other):
        return type(self) is type(other)

    def __call__(self, t):
        return -self.k() * torch.ones_like(t)


class GG(FF):
    def __call__(self, t):
        return (2 * self.k() * torch.ones_like(t)).sqrt()


# --- the core ------------------------------------------------------------------------------------------------------------
def test_a_grid_met_before_is_remembered_and_an_sde_that_can_change_is_not():
    vp, times = VP(), grid.logsnr(VP(), 8)
    assert scoresde.UniPC(3).start(vp, times)[0] is scoresde.UniPC(3).start(vp, times)[0]
    assert scoresde.UniPC(3).start(VP(beta_max=19.0), times)[0] != scoresde.UniPC(3).start(vp, times)[0]

    class Power(variables.Clock):
        """lam to a power: a plain subclass with a number of its own."""

        def __init__(self, p):
            self.p = p

        def of_lam(self, lam):
            return torch.exp(-self.p * lam)

        def to_lam(self, w):
            return -w.log() / self.p

        def rate(self, lam):
            return -self.p * torch.exp(-self.p * lam)

    a, b = (solvers.Multistep(variables.eps, Power(p), 3) for p in (0.1, 3.0))
    assert a != b
    assert a == solvers.Multistep(variables.eps, Power(0.1), 3)
    assert a.start(vp, times)[0] != b.start(vp, times)[0]

    k = 1.0
    one, four = [], []
    for found, k in ((one, 1.0), (four, 4.0)):
        sde = scoresde.LinearSDE.from_coefficients(FF(lambda: k), GG(lambda: k))
        found.append(scoresde.DPMSolverPP(2).start(sde, grid.uniform(sde, 4))[0])
    assert one != four

    class Scaled(VP):
        """Undecorated: it inherits the frozen dataclass and adds what is not compared."""

        def __init__(self, c):
            super().__init__()
            object.__setattr__(self, "c", c)

        def sigma(self, t):
            return self.c * super().sigma(t)

        def time(self, logsnr):
            return scoresde.LinearSDE.time(self, logsnr)

    rows = [scoresde.DPMSolverPP(2).start(Scaled(c), grid.uniform(vp, 4))[0] for c in (1.0, 3.0)]
    assert Scaled(1.0) == Scaled(3.0)
    assert rows[0] != rows[1]

    class Loose(scoresde.LinearSDE):
        t_min, t_max, top = 0.01, 1.0, 1.0

        def alpha(self, t):
            return torch.ones_like(t)

        def sigma(self, t):
            return t * self.top

    sde = Loose()
    times = grid.uniform(sde, 5)
    before = scoresde.DPMSolverPP(2, weights=exact).start(sde, times)[0]
    sde.top = 2.0
    assert scoresde.AdamsBashforth(2, variables.velocity).start(sde, times)[0] != before
    x = torch.ones(1, 1, dtype=D)
    d = scoresde.Gaussian(sde, torch.zeros(1, dtype=D), 1.0)
    truth = run(d, scoresde.TorchDiffEq("dopri8", rtol=1e-10, atol=1e-10), x, times[[0, -1]])
    assert (run(d, scoresde.RK4(), x, grid.uniform(sde, 80)) - truth).abs().max() < 1e-4


@pytest.mark.parametrize("solver", FLOWS, ids=label)
def test_solvers_are_values(solver):
    """Hashable, equal after pickling (a process pool sends them), and their repr is the call that makes them."""
    twin = pickle.loads(pickle.dumps(solver))  # noqa: S301
    assert twin == solver
    assert hash(twin) == hash(solver)
    assert twin.grid == solver.grid
    names = {**vars(scoresde), **vars(solvers), **{k: getattr(variables, k) for k in variables.__all__ if k not in ("t", "v")}}
    assert eval(repr(solver).replace("coordinate=t)", "coordinate=variables.t)").replace("=v)", "=variables.v)"), names) == solver  # noqa: S307


@pytest.mark.parametrize("solver", [s for s in FLOWS if not s.adaptive], ids=label)
def test_a_step_alone_is_the_first_of_a_grid(solver):
    """`step` without a `start` steps between the two times it gets, for wrappers that walk their own way."""
    sde, d = VP(), mixture(VP())
    t, s = grid.uniform(sde, 12)[3:5]
    x = seeded(range(4)).initial((4, 2), D)
    oracle = scoresde.Oracle(d, 4)
    alone, _ = solver.step(oracle, x, t, s, None)
    assert (alone - run(d, solver, x, torch.stack([t, s]))).abs().max() == 0


def test_the_corrector_starts_from_the_state_it_is_given():
    """PEC adds the correction to x: what a corrector of another kind did between two steps is kept."""
    sde, d, solver = VP(), mixture(VP()), scoresde.UniPC(2)
    times = grid.logsnr(sde, 6)
    x = seeded(range(4)).initial((4, 2), D)
    moved, ends = 1e-3, []
    for push in (0.0, moved):
        oracle, y, state = scoresde.Oracle(d, 4), x, solver.start(sde, times)
        for k, (t, s) in enumerate(pairwise(times)):
            y, state = solver.step(oracle, y, t, s, state)
            y = y + push if k == 2 else y
        ends.append(y)
    assert (ends[1] - ends[0]).abs().min() > 0.1 * moved


def test_a_denoiser_that_writes_into_its_time_spoils_no_other_solve():
    def rude(x, t):
        t *= 1000
        return x / (1 + t)

    sde, x = VP(), torch.ones(2, 2, dtype=D)
    times = grid.logsnr(sde, 4)
    polite = scoresde.Wrapped.from_eps(lambda x, t: x / (1 + 1000 * t), sde)
    wanted = scoresde.decode(polite, x, scoresde.DPMSolver(2), times=times).x
    scoresde.decode(scoresde.Wrapped.from_eps(rude, sde), x, scoresde.DPMSolver(2), times=times)
    assert torch.equal(scoresde.decode(polite, x, scoresde.DPMSolver(2), times=times).x, wanted)


def test_rows_met_in_inference_mode_serve_a_gradient():
    sde, w = VP(), torch.ones((), dtype=D, requires_grad=True)
    d = scoresde.Wrapped.from_eps(lambda x, t: w * t * x, sde)
    x = torch.ones(2, 2, dtype=D)
    with torch.inference_mode():
        scoresde.encode(d, x, Heun(), steps=4)
    scoresde.log_prob(d, x.clone().requires_grad_(), Heun(), steps=4).value.sum().backward()
    assert w.grad.isfinite()


def test_a_mean_of_two_keeps_the_lesser_in_float32():
    """EDM from 1e5 to 1e-3: lerp takes 1 - weight in float32, so it is given the lesser of the two weights."""
    sde = EDM(1e-5, 1e5)
    d = scoresde.Wrapped.from_x0(lambda x, t: torch.ones_like(x), sde)
    ends = [
        run(d, scoresde.DDIM(), torch.full((1, 1), 1e5, dtype=dt), torch.tensor([1e5, 1e-3], dtype=D)) for dt in (torch.float32, D)
    ]
    assert abs(float(ends[0]) - float(ends[1])) < 1e-7
    assert float(ends[1]) == pytest.approx(1.001, abs=1e-6)


def test_bh1_is_of_its_order_in_any_clock_with_a_rate():
    for variable, clock in ((variables.eps, variables.tau), (variables.velocity, variables.rho), (variables.x0, variables.lam)):
        solver = solvers.Multistep(variable, clock, 2, bh1)
        slopes = order_in_x(solver, SDES["VP"], samples=8)[1]
        assert 1.85 < slopes[-1] < 2.3


def test_a_predictor_with_a_past_is_of_weak_order_one_around_a_corrector():
    exact_chain = scoresde.MALA(0.5, log_prob=lambda x, s: x.sum(1))
    assert scoresde.PredictorCorrector(scoresde.DPMSolverPP(2), exact_chain).weak_order == 1
    assert scoresde.PredictorCorrector(Heun(), exact_chain).weak_order == 2
    assert (scoresde.UniPC(2).past, scoresde.AdamsBashforth(3).past, Heun().past, scoresde.DDIM().past) == (2, 2, 0, 0)


def test_startup_keeps_the_order_that_the_ramp_loses():
    ramp, single = scoresde.AdamsBashforth(4, startup=False), scoresde.AdamsBashforth(4, startup=True)
    assert (ramp.order, single.order, scoresde.AdamsBashforth(4).order) == (2, 4, 4)
    assert scoresde.UniPC(3, startup=False).order == 3
    assert scoresde.AdamsBashforth(4, lower_final=True).order == 2
    assert ramp.evaluations(30) == 30
    assert single.evaluations(30) == 34  # two single steps of three
    assert scoresde.AdamsBashforth(3).evaluations(17) == 17
    assert scoresde.AdamsBashforth(3).evaluations(18) == 19  # and the final mean: nfe = 20


# --- the host ------------------------------------------------------------------------------------------------------------
class Watched(torch.Tensor):
    """A tensor on a device, as it were: whatever is computed from it is one too, and reading a value of it on the host raises."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "item")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in cls.READS):
            raise AssertionError(f"{func} reads a tensor of the solve on the host")
        inner = tree_map(lambda a: a.inner if isinstance(a, cls) else a, (args, kwargs or {}))
        out = func(*inner[0], **inner[1])
        return tree_map(lambda a: cls(a) if isinstance(a, torch.Tensor) else a, out)


class Third(scoresde.Denoiser):
    def forward(self, x, t):
        return x / 3


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.adaptive], ids=label)
def test_no_tensor_of_the_solve_is_read_on_the_host(solver):
    """On a GPU every such read waits for the device; here it raises. The states are watched, and looked at after the loop."""
    with pytest.raises(AssertionError, match="reads a tensor"):
        float(Watched(torch.ones(2, 2)).sum())
    sde = VP()
    times = solver.grid(sde, 24)
    oracle = scoresde.Oracle(Third(sde), 2, scoresde.noise.gaussian(torch.Generator()))
    oracle.noise_source = Drawn()
    x, state = Watched(torch.ones(2, 2)), solver.start(sde, times)
    for t, s in pairwise(times.unbind()):
        x, state = solver.step(oracle, x, t, s, state)
        oracle.watch(x)
    assert isinstance(x, Watched)
    assert oracle.nfe[0] == solver.evaluations(24)


class Drawn(scoresde.noise.Noise):
    """Noise as a device draws it."""

    def draw(self, x, stream):
        return Watched(torch.ones(x.shape, dtype=x.dtype))

    def uniform(self, like, stream):
        return Watched(torch.full(like.shape, 0.5, dtype=like.dtype))

    signs = None

    def select(self, index):
        return self


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_loop_on_a_gpu_never_waits_and_is_one_cuda_graph():
    sde = VP()
    for solver in FLOWS:
        times = solver.grid(sde, 24)

        def loop(x, solver=solver, times=times):
            state, oracle = solver.start(sde, times), scoresde.Oracle(Third(sde), len(x))
            for t, s in pairwise(times.unbind()):
                x, state = solver.step(oracle, x, t, s, state)
                oracle.watch(x)
            return x

        x = torch.randn(64, 3, 8, 8, device="cuda")
        wanted = loop(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = loop(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, wanted), solver


# --- grids ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(SDES))
def test_new_grids_are_uniform_in_what_they_say(name):
    sde = SDES[name]
    rho = sde.rho(grid.rectified(sde, 9))
    assert ((rho / (1 + rho)).diff().diff()).abs().max() < 1e-9
    assert sde.rho(grid.cosine(sde, 9)).atan().diff().diff().abs().max() < 1e-9
    assert (grid.score_sde(sde, 9).diff().diff()).abs().max() < 1e-5 * sde.t_max
    for rule in (grid.rectified, grid.cosine, grid.score_sde):
        for n in range(1, 61):
            times = rule(sde, n)
            assert times[0] == sde.t_max
            assert times[-1] == sde.t_min
            assert (times.diff() < 0).all()


# --- x0 changed ----------------------------------------------------------------------------------------------------------
def test_clipped_and_thresholded_bound_x0_and_let_small_ones_be():
    x0 = torch.tensor([[0.1, -0.4, 0.9, 0.2], [0.5, -3.0, 2.0, 0.0]], dtype=D)
    inner = scoresde.Wrapped.from_x0(lambda x, t: x, VP())
    t = torch.tensor(0.5, dtype=D)
    assert torch.equal(scoresde.Clipped(inner)(x0, t), x0.clamp(-1, 1))
    assert torch.equal(scoresde.Clipped(inner, -0.2, 5.0)(x0, t), x0.clamp(-0.2, 5))
    for quantile in (0.5, 0.7, 0.995, 1.0):
        s = x0.abs().quantile(quantile, dim=1, keepdim=True).clamp(min=1.0)
        found = scoresde.Thresholded(inner, quantile)(x0, t)
        assert (found - x0.clamp(-s, s) / s).abs().max() < 1e-12
        assert torch.equal(found[0], x0[0])  # within the bound: untouched, whatever its mates are
    assert scoresde.Thresholded(inner)(x0[:0], t).shape == (0, 4)
    labelled = scoresde.Preconditioned(scoresde.MLP((4,), width=8, classes=3), VP()).condition(torch.tensor([0, 2]))
    for wrap in (scoresde.Clipped, scoresde.Thresholded):
        found = scoresde.sample(wrap(labelled), (2, 4), scoresde.DPMSolverPP(2), nfe=6, seeds=range(2), microbatch=1)
        assert found.ledger["network"] == found.nfe == 6
        assert found.x.abs().max() <= 1


@dataclass(frozen=True)
class Shifted(solvers.Solver):
    """A solver of a user's that has no `start`, no state and no knowledge of the core."""

    order = 1

    def step(self, oracle, x, t, s, state):
        p = oracle(x, t)
        return oracle.sde.alpha(s) * p.x0 + oracle.sde.sigma(s) * p.eps, None


def test_a_solver_of_the_users_own_runs_beside_the_core():
    d, x = mixture(VP()), seeded(range(4)).initial((4, 2), D)
    times = logsnr_times(VP(), 6)
    assert (run(d, Shifted(), x, times) - run(d, scoresde.DDIM(), x, times)).abs().max() < 1e-13
    assert replace(Shifted()) == Shifted()
