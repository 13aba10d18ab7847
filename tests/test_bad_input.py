"""What is refused, and in which words: a message says what came, and what was wanted or the mend."""

# ruff: noqa: E501  (a case is a line, so that the table can be read down its columns)
import functools
import json
import math

import pytest
import torch
from laws import D, mixture
from torch import nn

import scoresde as s
from scoresde import checkpoint, exact, grid, loss, store
from scoresde.checks import NonFiniteError
from scoresde.solvers import StochasticSolver

NAN, INF = math.nan, math.inf
VP, MIX = s.VP(), mixture(s.VP())
X, T = torch.zeros(4, 2), torch.tensor(0.5, dtype=D)
Z = torch.zeros
TIMES = torch.tensor([1.0, 0.5, 0.1], dtype=D)
IMAGES = Z(4, 2).long()


def net(classes=0):
    return s.Preconditioned(s.MLP(2, width=8, depth=1, classes=classes), VP)


def linear():
    """A denoiser that is no Preconditioned: it takes no labels."""
    return s.Wrapped.from_x0(lambda x, t: 0.5 * x, VP)


sample = functools.partial(s.sample, MIX, (4, 2))
heun = functools.partial(s.sample, MIX, (4, 2), s.Heun())
log_prob = functools.partial(s.log_prob, MIX, X)
encode = functools.partial(s.encode, MIX)
bits = functools.partial(s.bits_per_dim, MIX, IMAGES, steps=2, levels=4)
dsm = functools.partial(s.dsm_loss, MIX, X, T, loss.simple)
tabulated = s.LinearSDE.from_coefficients
chain = s.VP.from_betas


def times(*values):
    return heun(times=torch.tensor(values, dtype=D))


def fit(*batches, denoiser=None, **kwargs):
    return list(s.fit(net() if denoiser is None else denoiser, batches or [X], **kwargs))


def returning(value):
    """A solve whose network answers with `value`."""
    return s.sample(s.Wrapped.from_eps(lambda x, t: value, VP), (4, 2), steps=2)


def noisy(variable, clock, level=None):
    return s.solvers.NoisyMultistep(variable, clock, 2, startup=False, level=level or s.solvers.Tau(1.0))


def churn_twice():
    oracle = s.Oracle(MIX, 4, s.noise.seeded(range(4)))
    _, state = s.Churn(s.Heun(), 1.0).step(oracle, X, T, TIMES[2], None)
    s.Churn(s.Heun(), 1.0).step(oracle, X, T, TIMES[2], state)


def clipped_law():
    """Too far out for a probe of unit size to feel."""
    law = s.Clipped(s.Gaussian(VP, torch.tensor([0.6]), 0.45), -1.0, 1.0)
    s.orders.affine_law(law, s.Ancestral(), grid.logsnr(VP, 3), Z(1), torch.eye(1))


class Late(s.Solver):
    order = 1

    def evaluations(self, steps):
        return steps + (steps >= 5)

    def step(self, oracle, x, t, s, state):
        return x, None


class Answer(s.Denoiser):
    def __init__(self, value):
        super().__init__(VP)
        self.value = value

    def forward(self, x, t):
        return self.value


class Net(nn.Module):
    def forward(self, x, c_noise):
        return x[:, :1]


F, V, R = TypeError, ValueError, RuntimeError
CASES = [
    # --- states
    ("x is a list", lambda: heun(nfe=9, x=[[0.0, 0.0]]), F, r"x is list; wanted a tensor \[B, \*shape\]: torch.as_tensor"),
    ("x of other shape", lambda: heun(nfe=9, x=Z(4, 3)), V, r"x is \[4, 3\] float32; wanted the shape given, \[4, 2\]"),
    ("x without event", lambda: encode(Z(4), steps=2), V, r"x is \[4\] float32; wanted \[B, \*shape\].*x\[:, None\]"),
    ("x int, sample", lambda: heun(nfe=9, x=X.long()), F, r"x is \[4, 2\] int64; the state is float32 or float64: x.float\(\)"),
    ("x int, encode", lambda: encode(X.long(), steps=2), F, r"x is \[4, 2\] int64; the state is float32 or float64: x.float\(\)"),
    ("x half, sample", lambda: heun(nfe=9, x=X.half()), F, r"x is \[4, 2\] float16; the state is float32 or float64.*net.half"),
    ("x bfloat16, log_prob", lambda: s.log_prob(MIX, X.bfloat16(), steps=2), F, r"x is \[4, 2\] bfloat16; the state is float32 or"),
    ("x half, decode", lambda: s.decode(MIX, X.half(), steps=2), F, r"x is \[4, 2\] float16; the state is float32 or float64"),
    ("x complex", lambda: encode(X + 0j, steps=2), F, r"x is \[4, 2\] complex64; the state is float32 or float64"),
    ("x numpy", lambda: encode(X.numpy(), steps=2), F, r"x is ndarray; wanted a tensor.*torch.as_tensor"),
    ("x of another event", lambda: encode(Z(4, 3), steps=2), V, r"x is \[4, 3\] float32; wanted \[B, 2\]"),
    ("dtype half", lambda: heun(nfe=9, dtype=torch.float16), F, r"dtype is torch.float16; wanted torch.float32 or torch.float64.*half"),
    ("dtype a word", lambda: heun(nfe=9, dtype="float32"), F, r"dtype is 'float32'; wanted torch.float32 or torch.float64"),
    ("shape an integer", lambda: s.sample(MIX, 4, nfe=9), V, r"shape is \(4,\); wanted \[B, \*event\].*as in \(16, 3, 32, 32\)"),
    ("shape without event", lambda: s.sample(MIX, (4,), nfe=9), V, r"shape is \(4,\); wanted \[B, \*event\]"),
    ("shape negative", lambda: s.sample(MIX, (-1, 2), nfe=9), V, r"shape is \(-1, 2\); wanted \[B, \*event\] of non-negative"),
    ("shape a float", lambda: s.sample(MIX, (4.0, 2), nfe=9), V, r"shape is \(4.0, 2\); wanted .* non-negative integers"),
    # --- one time
    ("t of shape [B]", lambda: MIX.predict(X, Z(4)), V, r"t is \[4\] float32; wanted \(\) or \[4, 1\].*t.reshape\(\[4, 1\]\)"),
    ("t of shape [B], forward", lambda: net()(X, Z(4)), V, r"t is \[4\] float32; wanted \(\) or \[4, 1\].*t.reshape"),
    ("t of shape [B], exact", lambda: MIX(X, Z(4)), V, r"t is \[4\] float32; wanted \(\) or \[4, 1\].*t.reshape"),
    ("t of wrong ndim", lambda: MIX.predict(X, Z(4, 1, 1)), V, r"t is \[4, 1, 1\] float32; wanted \(\) or \[4, 1\]"),
    ("t of shape [1]", lambda: VP.perturb(X, Z(1), X), V, r"t is \[1\] float32; wanted \(\) or \[4, 1\]"),
    ("t int", lambda: MIX.score(X, torch.tensor(1)), F, r"t is \[\] int64; times are continuous: t.double\(\)"),
    ("t a float", lambda: MIX.score(X, 0.5), F, r"t is float; wanted a tensor: torch.tensor\(t, dtype=torch.float64\)"),
    ("t a float, drift", lambda: VP.drift(X, 0.5), F, r"t is float; wanted a tensor: torch.tensor"),
    ("t a float, flow", lambda: s.flow(MIX, X, 0.5), F, r"t is float; wanted a tensor: torch.tensor"),
    ("t a float, exact log_prob", lambda: MIX.log_prob(X, 0.5), F, r"t is float; wanted a tensor: torch.tensor"),
    ("t a float, exact sample", lambda: MIX.sample(4, 0.5), F, r"t is float; wanted a tensor: torch.tensor"),
    ("t outside, oracle", lambda: s.Oracle(MIX, 4)(X, 3 * T), V, r"t = \[1.5\] is outside \[0.001, 1.0\], where VP.*choose times inside"),
    ("t below, oracle", lambda: s.Oracle(MIX, 4)(X, 0 * T), V, r"t = \[0.0\] is outside \[0.001, 1.0\].*choose times inside"),
    ("transition backwards", lambda: VP.transition(T, T / 2), V, r"s=0.25 is before t=0.5; wanted s >= t: swap them"),
    # --- grids of times
    ("times too late", lambda: times(1.5, 0.5), V, r"times span \[0.5, 1.5\], outside \[0.001, 1\], where VP is regular; stay inside"),
    ("times too early", lambda: times(1.0, 1e-5), V, r"times span \[1e-05, 1\], outside \[0.001, 1\].*another t_min, t_max"),
    (
        "float32 rounds t_max outside",
        lambda: s.sample(mixture(s.Cosine()), (4, 2), times=torch.tensor([0.999, 0.5])),
        V,
        r"times span \[0.5, 0.999000012\d+\], outside \[0.001, 0.999\].*in float64",
    ),
    ("times not monotone", lambda: times(1.0, 0.2, 0.5), V, r"times\[1\] = 0.2.*, times\[2\] = 0.5; sort them"),
    ("times with a duplicate", lambda: times(1.0, 0.5, 0.5, 0.1), V, r"times\[1\] = 0.5, times\[2\] = 0.5;.*drop duplicates"),
    ("times all equal", lambda: times(1.0, 1.0), V, r"times\[0\] = 1, times\[1\] = 1;.*drop duplicates"),
    ("times NaN", lambda: times(1.0, NAN, 0.1), V, r"times has 1 NaN or infinite entries; wanted finite times"),
    ("times infinite", lambda: times(INF, 0.5), V, r"times has 1 NaN or infinite entries; wanted finite times"),
    ("times too short", lambda: times(1.0), V, r"times is \[1\] float64; wanted a 1-D float tensor of at least two times"),
    ("times empty", lambda: heun(times=Z(0)), V, r"times is \[0\] float32; wanted a 1-D float tensor of at least two"),
    ("times 2-D", lambda: heun(times=TIMES[None]), V, r"times is \[1, 3\] float64; wanted a 1-D float tensor"),
    ("times a list", lambda: heun(times=[1.0, 0.5]), V, r"times is list; wanted a 1-D float tensor.*torch.tensor"),
    ("times int", lambda: heun(times=torch.tensor([1, 0])), V, r"times is \[2\] int64; wanted a 1-D float tensor"),
    ("times up in sample", lambda: heun(times=TIMES.flip(0)), V, r"times run up, from 0.1 to 1; sampling runs down: times.flip\(0\)"),
    ("times below t_max", lambda: heun(times=TIMES[1:]), V, r"times start at 0.5, below t_max = 1, .*pass x= at that time"),
    ("times below t_max in log_prob", lambda: log_prob(times=TIMES[1:]), V, r"times end at 0.5, below t_max = 1, .*pass prior="),
    ("times and grid", lambda: heun(times=TIMES, grid=grid.karras), V, r"times and grid are both given;.*drop one"),
    ("grid a word", lambda: heun(nfe=9, grid="karras"), F, r"grid is str; wanted a rule \(sde, n\) -> times"),
    ("grid outside", lambda: heun(steps=3, grid=lambda sde, n: torch.linspace(1, 0, n + 1)), V, r"times span \[0, 1\], outside .* stay inside"),
    ("grid n = 0", lambda: grid.uniform(VP, 0), V, r"n is 0; wanted an integer of at least 1"),
    ("grid n = 2.0", lambda: grid.logsnr(VP, 2.0), F, r"n is 2.0 \(float\); wanted an integer"),
    ("karras rho = 0", lambda: grid.karras(VP, 5, rho=0), V, r"rho is 0; wanted a finite number in \(0, inf\)"),
    ("karras rho NaN", lambda: grid.karras(VP, 5, rho=NAN), V, r"rho is nan; wanted a finite number in \(0, inf\)"),
    ("interval n = 2", lambda: grid.interval(VP, 2), V, r"n is 2; the interval grid has one step: an adaptive solver"),
    # --- budgets
    ("nfe = 0", lambda: heun(nfe=0), V, r"nfe is 0; wanted an integer of at least 1"),
    ("nfe negative", lambda: heun(nfe=-3), V, r"nfe is -3; wanted an integer of at least 1"),
    ("nfe a float", lambda: heun(nfe=9.0), F, r"nfe is 9.0 \(float\); wanted an integer: int\(nfe\)"),
    ("nfe too small", lambda: heun(nfe=2), V, r"nfe is 2; one step of Heun\(\) costs 2 and the final mean 1: the least is nfe=3"),
    ("nfe too small without mean", lambda: heun(nfe=1, denoise=False), V, r"nfe is 1; one step of Heun\(\) costs 2: the least is nfe=2"),
    ("nfe and steps", lambda: heun(nfe=9, steps=3), V, r"got nfe and steps of nfe, steps, times; wanted exactly one"),
    ("nfe and times", lambda: heun(nfe=9, times=TIMES), V, r"got nfe and times of nfe, steps, times; wanted exactly one"),
    ("all three", lambda: heun(nfe=9, steps=2, times=TIMES), V, r"got nfe and steps and times of .*; wanted exactly one"),
    ("no budget", lambda: heun(), V, r"got none of nfe, steps, times; wanted exactly one"),
    ("no budget, no solver", lambda: sample(), V, r"got none of nfe, steps, times; wanted exactly one"),
    ("nfe, adaptive", lambda: sample(s.TorchDiffEq(), nfe=9), V, r"TorchDiffEq\(.* is adaptive.*: drop nfe; max_nfe="),
    ("steps, adaptive", lambda: sample(s.TorchDiffEq(), steps=9), V, r"TorchDiffEq\(.* is adaptive.*: drop steps; max_nfe="),
    ("grid, adaptive", lambda: sample(s.TorchDiffEq(), grid=grid.karras), V, r"is adaptive.*: drop grid; max_nfe="),
    ("steps a float", lambda: heun(steps=3.0), F, r"steps is 3.0 \(float\); wanted an integer: int\(steps\)"),
    ("steps a bool", lambda: heun(steps=True), F, r"steps is True \(bool\); wanted an integer"),
    ("steps = 0", lambda: heun(steps=0), V, r"steps is 0; wanted an integer of at least 1"),
    ("microbatch = 0", lambda: heun(steps=2, microbatch=0), V, r"microbatch is 0; wanted an integer of at least 1"),
    ("microbatch a float", lambda: heun(steps=2, microbatch=2.0), F, r"microbatch is 2.0 \(float\); wanted an integer"),
    # --- SDEs
    ("betas of VP swapped", lambda: s.VP(beta_min=20.0, beta_max=0.1), V, r"beta_min=20.0, beta_max=0.1; wanted beta_min < beta_max: swap"),
    ("betas of VP equal", lambda: s.SubVP(beta_min=1.0, beta_max=1.0), V, r"beta_min=1.0, beta_max=1.0; wanted beta_min < beta_max"),
    ("beta_min negative", lambda: s.VP(beta_min=-1.0), V, r"beta_min is -1.0; wanted a finite number in \[0, inf\)"),
    ("beta_max NaN", lambda: s.VP(beta_max=NAN), V, r"beta_max is nan; wanted a finite number"),
    ("beta_max a tensor", lambda: s.VP(beta_max=torch.tensor(20.0)), F, r"beta_max is \[\] float32; wanted a number: float\(beta_max\)"),
    ("beta_max too large", lambda: s.Gaussian(s.VP(beta_max=5e3), Z(2), 1.0), V, r"has logsnr .* and -inf at t_max; wanted finite"),
    ("sigma_min = 0", lambda: s.VE(sigma_min=0.0), V, r"sigma_min is 0.0; wanted a finite number in \(0, inf\)"),
    ("sigma_min negative", lambda: s.VE(sigma_min=-0.1), V, r"sigma_min is -0.1; wanted a finite number in \(0, inf\)"),
    ("sigmas swapped", lambda: s.VE(sigma_min=50.0, sigma_max=0.01), V, r"sigma_min=50.0, sigma_max=0.01; wanted sigma_min < sigma_max"),
    ("sigma_max infinite", lambda: s.VE(sigma_max=INF), V, r"sigma_max is inf; wanted a finite number"),
    ("t_min = 0", lambda: s.VP(t_min=0.0), V, r"t_min is 0.0; wanted a finite number in \(0, inf\)"),
    ("t_min above t_max", lambda: s.EDM(t_min=3.0, t_max=2.0), V, r"t_max is 2.0; wanted a finite number in \(3, inf\)"),
    ("t_min = t_max", lambda: s.Cosine(t_min=0.5, t_max=0.5), V, r"t_max is 0.5; wanted a finite number in \(0.5, inf\)"),
    ("t_max NaN", lambda: s.Rectified(t_max=NAN), V, r"t_max is nan; wanted a finite number in \(0.001, inf\)"),
    ("t_min a word", lambda: s.VP(t_min="0.1"), F, r"t_min is str; wanted a number: float\(t_min\)"),
    ("alpha = 0 at t_max", lambda: s.Gaussian(s.Rectified(t_max=1.0), Z(2), 1.0), V, r"logsnr 13.8.* -inf at t_max; wanted finite.*choose t_min"),
    ("f is None", lambda: tabulated(None, lambda t: 1.0), F, r"f is NoneType; wanted a callable of a tensor of times"),
    ("g is a number", lambda: tabulated(lambda t: -t, 1.0), F, r"g is float; wanted a callable of a tensor of times"),
    ("f of wrong shape", lambda: tabulated(lambda t: t[:3], lambda t: t), V, r"f\(t\) is \[3, 16\] for t \[\d+, 16\]; wanted the shape of t"),
    ("f is NaN", lambda: tabulated(lambda t: t * NAN, lambda t: t), V, r"f\(t\) is not finite .*; wanted a regular coefficient"),
    ("g is infinite", lambda: tabulated(lambda t: -t, lambda t: 0 / (t - t)), V, r"g\(t\) is not finite .*; wanted a regular"),
    ("g returns a word", lambda: tabulated(lambda t: -t, lambda t: "1"), F, r"g\(t\) is str; wanted a tensor of the shape of t"),
    ("g is zero", lambda: tabulated(lambda t: -t, lambda t: 0 * t), V, r"has logsnr inf at t_min and inf at t_max; wanted finite numbers"),
    ("sigma_0 negative", lambda: tabulated(lambda t: -t, lambda t: t, sigma_0=-1.0), V, r"sigma_0 is -1.0; wanted a finite number in \[0"),
    ("a beta of 1", lambda: chain([0.1, 1.0]), V, r"betas\[1\] is 1.0; wanted a finite number in \(0, 0.999999999999\]"),
    ("a beta of 0", lambda: chain([0.0, 0.1]), V, r"betas\[0\] is 0.0; wanted a finite number in \(0, 0.99"),
    ("a beta NaN", lambda: chain([0.1, NAN]), V, r"betas\[1\] is nan; wanted a finite number in \(0, 0.99"),
    ("one beta", lambda: chain([0.1]), V, r"betas has 1 entries; wanted at least two"),
    ("betas 2-D", lambda: chain(Z(2, 2) + 0.1), V, r"betas is \[2, 2\] float64; wanted one dimension"),
    ("betas a list", lambda: s.DiscreteVP([0.1, 0.2]), F, r"betas is list; wanted a tuple of floats: VP.from_betas"),
    ("noise of wrong shape", lambda: VP.perturb(X, T, Z(4, 3)), V, r"noise is \[4, 3\]; wanted the shape of x0, \[4, 2\]"),
    # --- data
    ("NaN in fit", lambda: fit(X, X * NAN), V, r"x0 has NaN or infinite entries in rows \[0, 1, 2, 3\];.*clean the data"),
    ("NaN in VE.from_data", lambda: s.VE.from_data(torch.tensor([[0.0], [NAN]])), V, r"x has NaN .* in rows \[1\];.*clean the data"),
    ("one point in VE.from_data", lambda: s.VE.from_data(Z(1, 2)), V, r"x has 1 rows; wanted at least two data points"),
    ("equal points in VE.from_data", lambda: s.VE.from_data(X), V, r"sigma_max=0.0; wanted sigma_min < sigma_max"),
    ("NaN in Empirical", lambda: s.Empirical(VP, X * NAN), V, r"points has NaN .* in rows \[0, 1, 2, 3\]; wanted finite"),
    ("inf in encode", lambda: encode(X + INF, steps=2), V, r"x has NaN or infinite entries in rows \[0, 1, 2, 3\]; wanted finite"),
    ("NaN in log_prob", lambda: s.log_prob(MIX, X * NAN, steps=2), V, r"x has NaN or infinite entries in rows \[0.*; wanted finite"),
    ("NaN in sample", lambda: heun(nfe=9, x=torch.where(T == T, X, X).index_fill(0, torch.tensor([2]), NAN)), V, r"NaN .* in rows \[2\]; wanted"),
    ("integer data in fit", lambda: fit(X.long()), F, r"batch 1 is \[4, 2\] int64; wanted transform=, which makes integers x0"),
    # --- what a network returns
    ("another shape", lambda: returning(Z(4, 3)), V, r"fn returned \[4, 3\] float32 for x \[4, 2\]; wanted the shape of x"),
    ("None", lambda: returning(None), V, r"fn returned NoneType for x \[4, 2\]; wanted the shape of x"),
    ("a tuple", lambda: returning((X, X)), V, r"fn returned tuple for x \[4, 2\]; wanted the shape of x"),
    ("another shape, net", lambda: s.sample(s.Preconditioned(Net(), VP), (4, 2), steps=2), V, r"network returned \[4, 1\] float32 .*; wanted"),
    ("another shape, denoiser", lambda: s.sample(Answer(Z(4, 3)), (4, 2), steps=2), V, r"Answer returned \[4, 3\] float32 for x .*; wanted x0"),
    ("None, denoiser", lambda: s.sample(Answer(None), (4, 2), steps=2), V, r"Answer returned NoneType for x \[4, 2\] float32; wanted x0"),
    ("None, likelihood", lambda: s.log_prob(Answer(None), X, steps=2), V, r"Answer returned NoneType for x \[4, 2\] float32; wanted x0"),
    ("another dtype", lambda: s.sample(Answer(X.double()), (4, 2), steps=2), V, r"Answer returned \[4, 2\] float64 .* dtype of x"),
    # --- seeds
    ("seeds too few", lambda: heun(nfe=9, seeds=range(3)), V, r"seeds has 3 entries for 4 rows; wanted one a row, as in seeds=range\(4\)"),
    ("seeds too many", lambda: heun(nfe=9, seeds=range(5)), V, r"seeds has 5 entries for 4 rows; wanted one a row"),
    ("seeds negative", lambda: heun(nfe=9, seeds=[0, 1, 2, -1]), V, r"seeds\[3\] is -1; wanted an integer in \[0, 2\^64\): seed % 2\*\*64"),
    ("seeds too large", lambda: heun(nfe=9, seeds=[0, 1, 2, 2**64]), V, r"seeds\[3\] is 18446744073709551616; wanted an integer in \[0, 2"),
    ("seeds floats", lambda: heun(nfe=9, seeds=[0.0, 1.0, 2.0, 3.0]), F, r"seeds\[0\] is 0.0 \(float\); wanted an integer"),
    ("seeds float tensor", lambda: heun(nfe=9, seeds=Z(4)), F, r"seeds is \[4\] float32; wanted integers, one a row"),
    ("seeds one number", lambda: heun(nfe=9, seeds=7), F, r"seeds is 7 \(int\); wanted one seed a row: range\(B\)"),
    ("seeds and generator", lambda: heun(nfe=9, seeds=range(4), generator=torch.Generator()), V, r"seeds and generator are both given; wanted"),
    ("generator an integer", lambda: heun(nfe=9, generator=0), F, r"generator is int; wanted a torch.Generator: torch.Generator\(\)"),
    ("seeds of exact.sample", lambda: MIX.sample(4, T, seeds=range(3)), V, r"seeds has 3 entries for 4 rows; wanted one a row"),
    ("n of exact.sample", lambda: MIX.sample(-1), V, r"n is -1; wanted an integer of at least 0"),
    # --- solvers
    ("solver a class", lambda: sample(s.Heun, nfe=9), F, r"solver is <function Heun.*; wanted a Solver, as in Heun\(\)"),
    ("solver a type", lambda: sample(s.Ancestral, nfe=9), F, r"solver is <class .*Ancestral'>; wanted a Solver, as in Ancestral\(\)"),
    ("solver a word", lambda: sample("heun", nfe=9), F, r"solver is 'heun'; wanted a Solver, as in Heun\(\)"),
    ("solver a function", lambda: encode(X, lambda x: x, steps=2), F, r"solver is <function.*; wanted a Solver, as in Heun\(\)"),
    ("stochastic, encode", lambda: encode(X, s.EulerMaruyama(), steps=2), F, r"EulerMaruyama\(\) is stochastic .*; wanted a deterministic"),
    ("stochastic, log_prob", lambda: log_prob(s.DDIM(eta=0.5), steps=2), F, r"DDIM\(eta=0.5\) is stochastic .*; wanted a deterministic"),
    ("stochastic, bits_per_dim", lambda: bits(s.Ancestral()), F, r"Ancestral\(upper=0.0\) is stochastic .*; wanted a deterministic"),
    ("stochastic, up", lambda: list(s.trajectory(s.Oracle(MIX, 4), s.Ancestral(), X, TIMES.flip(0))), V, r"Ancestral.* runs down in time; a det"),
    ("no noise source", lambda: list(s.trajectory(s.Oracle(MIX, 4), s.Ancestral(), X, TIMES)), V, r"no noise source.*pass seeds= or generator="),
    ("trajectory of a denoiser", lambda: list(s.trajectory(MIX, s.Heun(), X, TIMES)), F, r"oracle is Mixture; wanted an Oracle of it"),
    ("order of a stochastic solver", lambda: s.DDIM(eta=0.5).order, F, r"DDIM\(eta=0.5\) is stochastic: read weak_order"),
    ("evaluations of an adaptive", lambda: s.TorchDiffEq().evaluations(3), F, r"an adaptive solver chooses its steps: read .nfe"),
    ("DDIM eta 2", lambda: s.DDIM(eta=2), V, r"eta is 2; wanted a finite number in \[0, 1\]"),
    ("DDIM eta NaN", lambda: s.DDIM(eta=NAN), V, r"eta is nan; wanted a finite number in \[0, 1\]"),
    ("DPMSolverPP order 4", lambda: s.DPMSolverPP(order=4), V, r"order is 4; wanted an integer from 1 to 3"),
    ("DPMSolverPP single-step order 4", lambda: s.DPMSolverPP(4, singlestep=True), V, r"order is 4; wanted an integer from 1 to 3"),
    ("DPMSolver order 0", lambda: s.DPMSolver(0), V, r"order is 0; wanted an integer of at least 1"),
    ("UniPC order 5", lambda: s.UniPC(5), V, r"order is 5; wanted an integer from 1 to 4"),
    ("UniPC weights a word", lambda: s.UniPC(2, "bh2"), F, r"weights is 'bh2'; wanted one of scoresde.solvers: exact, bh1, bh2"),
    ("UniPC variable a word", lambda: s.UniPC(2, variable="x0"), F, r"variable is 'x0'; wanted one of scoresde.variables \(eps, x0"),
    ("UniPC in velocity", lambda: s.UniPC(2, variable=s.variables.velocity), V, r"variable is velocity; wanted x0 or eps"),
    ("DEIS order -1", lambda: s.DEIS(-1), V, r"order is -1; wanted an integer of at least 0"),
    ("DEIS order 4", lambda: s.DEIS(4), V, r"order is 4; wanted an integer from 0 to 3"),
    ("DEIS coordinate a word", lambda: s.DEIS(2, "t"), F, r"coordinate is 't'; wanted a Clock of scoresde.variables: t, rho, lam"),
    ("IPNDM order 5", lambda: s.IPNDM(5), V, r"order is 5; wanted an integer from 1 to 4"),
    ("AdamsBashforth order 2.0", lambda: s.AdamsBashforth(2.0), F, r"order is 2.0 \(float\); wanted an integer"),
    ("AdamsBashforth variable", lambda: s.AdamsBashforth(2, s.parameterizations.eps), F, r"variable is <function eps.*; wanted one of scoresde.v"),
    ("AdamsBashforth time in lam", lambda: s.AdamsBashforth(2, s.variables.time, s.variables.lam), V, r"coordinate is lam; the variable time is interpolated in t alone"),
    ("AdamsMoulton order 1", lambda: s.AdamsMoulton(1), V, r"order is 1; wanted an integer of at least 2"),
    ("Euler variable", lambda: s.Euler("eps"), F, r"variable is 'eps'; wanted one of scoresde.variables"),
    ("startup a word", lambda: s.AdamsBashforth(3, startup="yes"), F, r"startup is 'yes', lower_final False; wanted True, False or \(startup\) None"),
    ("V 0", lambda: s.variables.V(0.0), V, r"sigma_data is 0.0; wanted a finite number in \(0, inf\)"),
    ("V a word", lambda: s.variables.V("0.5"), F, r"sigma_data is str; wanted a number"),
    ("startup 0", lambda: s.AdamsBashforth(4, startup=0), F, r"startup is 0, lower_final False; wanted True, False or"),
    ("DPMSolverPP single and ramped", lambda: s.DPMSolverPP(3, True, startup=False), V, r"of the multistep form; drop them"),
    ("DPMSolverPP singlestep a word", lambda: s.DPMSolverPP(2, "no"), F, r"singlestep is 'no'; wanted True or False"),
    ("DEIS coordinate None", lambda: s.DEIS(3, None), F, r"coordinate is None; wanted a Clock"),
    ("AdamsBashforth coordinate 0", lambda: s.AdamsBashforth(3, coordinate=0), F, r"coordinate is 0; wanted a Clock"),
    ("bh1 in t", lambda: s.solvers.Multistep(s.variables.eps, s.variables.t, 2, s.solvers.bh1), V, r"weights is bh1 in t; .* wants a clock"),
    ("SingleStep tableau", lambda: s.solvers.SingleStep(s.variables.eps, s.variables.lam, "MIDPOINT"), F, r"tableau is 'MIDPOINT'; wanted"),
    ("Tableau fractions", lambda: s.solvers.Tableau(2, (0.3, 0.5), ((0,), (1,))), V, r"wanted the first fraction 0"),
    ("Tableau rows", lambda: s.solvers.Tableau(2, (0.0, 0.5)), V, r"0 rows in through or shares; wanted"),
    ("Tableau sums", lambda: s.solvers.Tableau(2, (0.0, 2 / 3), shares=((0.5,), (0.25, 0.75))), V, r"row 0 of shares is .* add to where it ends"),
    ("Tableau ahead", lambda: s.solvers.Tableau(2, (0.0, 0.5), ((1,), (0,))), V, r"row 0 of the tableau is \(1,\); wanted it made of the"),
    ("a family not called", lambda: sample(s.UniPC, nfe=9), F, r"wanted a Solver, as in UniPC\(\)"),
    ("per-sample times", lambda: s.Heun().step(s.Oracle(MIX, 4), X, torch.ones(4, 1), torch.ones(4, 1), None), V, r"steps on a grid, with one"),
    (
        "times of one noise level",
        lambda: s.sample(s.Gaussian(s.EDM(), torch.zeros(2), 1.0), (4, 2), s.UniPC(2), times=torch.tensor([80.0, 79.99999999999999, 1.0], dtype=D), seeds=range(4)),
        V,
        r"have the same noise level to rounding; drop one",
    ),
    ("nodes 6", lambda: s.solvers.Multistep(s.variables.eps, s.variables.rho, 6), V, r"nodes is 6, corrector 0: order 6; no start-up"),
    ("corrector 4 of 2", lambda: s.solvers.Multistep(s.variables.eps, s.variables.rho, 2, corrector=4), V, r"corrector is 4 with nodes=2"),
    ("corrector True", lambda: s.solvers.Multistep(s.variables.eps, s.variables.rho, 2, corrector=True), F, r"corrector is True \(bool\)"),
    ("AdamsMoulton predictor", lambda: s.AdamsMoulton(4, predictor=1), V, r"predictor is 1; wanted 3, 4 or None"),
    ("Multistep variable", lambda: s.solvers.Multistep("eps", s.variables.rho, 2), F, r"variable is 'eps'; wanted one of scoresde.variables"),
    ("SingleStep coordinate", lambda: s.solvers.SingleStep(s.variables.eps, "rho", None), F, r"coordinate is 'rho'; wanted a Clock"),
    ("nodes 0", lambda: s.solvers.Multistep(s.variables.eps, s.variables.rho, 0), V, r"nodes is 0; wanted an integer of at least 1"),
    (
        "a step off the grid it was started on",
        lambda: s.Heun().step(s.Oracle(MIX, 4), X, TIMES[1], TIMES[2], s.Heun().start(VP, TIMES)),
        V,
        r"step 0 of this grid runs from t = .*; start the solver on the grid it runs on",
    ),
    ("clip bounds swapped", lambda: s.Clipped(MIX, 1.0, -1.0), V, r"high is -1.0; wanted a finite number in \(1, inf\)"),
    ("clip of a network", lambda: s.Clipped(torch.nn.Linear(2, 2)), F, r"denoiser is Linear; wanted a Denoiser"),
    ("threshold quantile 2", lambda: s.Thresholded(MIX, 2.0), V, r"quantile is 2.0; wanted a finite number in \(0, 1\]"),
    ("threshold bound 0", lambda: s.Thresholded(MIX, bound=0.0), V, r"bound is 0.0; wanted a finite number in \(0, inf\)"),
    ("Ancestral upper 2", lambda: s.Ancestral(upper=2), V, r"upper is 2; wanted a finite number in \[0, 1\]"),
    ("Langevin snr 0", lambda: s.Langevin(snr=0), V, r"snr is 0; wanted a finite number in \(0, 0.999\]"),
    ("Langevin snr 1", lambda: s.Langevin(snr=1), V, r"snr is 1; wanted a finite number in \(0, 0.999\]"),
    ("MALA log_prob", lambda: s.MALA(log_prob=3), F, r"log_prob is int; wanted a callable \(x, s\) -> log p_s\(x\) \[B\], or None"),
    ("predictor a class", lambda: s.PredictorCorrector(s.Heun), F, r"predictor is <function Heun.*; wanted a Solver and a Langevin"),
    ("corrector a predictor", lambda: s.PredictorCorrector(s.Heun(), s.Heun()), F, r"corrector is Heun\(\); wanted a Solver and a Langevin"),
    ("corrector_steps 0", lambda: s.PredictorCorrector(s.Heun(), corrector_steps=0), V, r"corrector_steps is 0; wanted an integer of at"),
    ("corrector_first 1", lambda: s.PredictorCorrector(s.Heun(), corrector_first=1), F, r"corrector_first is 1; wanted True or False"),
    ("AnnealedLangevin moves 0", lambda: s.AnnealedLangevin(moves=0), V, r"moves is 0; wanted an integer of at least 1"),
    ("SDE-DPM++ degree 4", lambda: s.SDEDPMSolverPP(4), V, r"degree is 4; wanted an integer from 1 to 3"),
    ("SDE-DPM++ tau negative", lambda: s.SDEDPMSolverPP(2, tau=-1.0), V, r"tau is -1.0; wanted a finite number in \[0, 1000000\]"),
    ("SDE-DPM++ tau a word", lambda: s.SDEDPMSolverPP(2, tau="1"), F, r"tau is '1'; wanted a number, or a function of rho = .* as Band"),
    ("SDE-DPM++ weights", lambda: s.SDEDPMSolverPP(2, singlestep=True, weights=s.solvers.exact), V, r"are of the multistep form; drop"),
    ("SEEDS degree 0", lambda: s.SEEDS(0), V, r"degree is 0; wanted an integer of at least 1"),
    ("SA predictor 5", lambda: s.SASolver(5), V, r"predictor is 5; wanted an integer from 1 to 4"),
    ("SA corrector 5 of 2", lambda: s.SASolver(2, 5), V, r"corrector is 5 with nodes=2; wanted 0, or 2 to nodes \+ 1"),
    (
        "tau(rho) a number",
        lambda: sample(s.SASolver(2, tau=lambda rho: 1.0), steps=4, seeds=range(4)),
        V,
        r"tau\(rho\) gave float for rho \[4, 1\] float64; wanted its shape and dtype, as Band",
    ),
    ("tau(rho) negative", lambda: sample(s.SASolver(2, tau=lambda rho: -rho), steps=4, seeds=range(4)), V, r"wanted finite numbers >= 0, as Band"),
    ("tau(rho) of Python", lambda: sample(s.SASolver(2, tau=lambda r: 1.0 if r < 1 else 0.0), steps=4, seeds=range(4)), V, r"failed on a tensor"),
    ("tau a class", lambda: s.SASolver(2, tau=s.Band), F, r"tau is <class .*Band'>; wanted a number, or a function"),
    ("tau overflows", lambda: sample(s.SEEDS(2, tau=1e200), steps=4, seeds=range(4)), V, r"tau is 1e\+200; wanted a finite number in"),
    ("Band empty", lambda: s.solvers.Band(1.0, 0.5), V, r"low is 1 and high 0.5; wanted low < high"),
    ("ERSDE phi a number", lambda: s.ERSDE(2, phi=2.0), F, r"phi is float; wanted a torch function of rho"),
    (
        "ERSDE phi too flat",
        lambda: sample(s.ERSDE(2, phi=torch.sqrt), steps=4, seeds=range(4)),
        V,
        r"d log phi / d log rho is 0.5 at rho = .*; wanted at least 1: phi must grow as fast as rho",
    ),
    ("ERSDE phi negative", lambda: sample(s.ERSDE(2, phi=lambda r: -r), steps=4, seeds=range(4)), V, r"phi\(rho\) gave .*; wanted finite numbers >= "),
    ("ERSDE phi of math", lambda: sample(s.ERSDE(2, phi=math.exp), steps=4, seeds=range(4)), V, r"phi\(rho\) failed on a tensor"),
    ("ERSDE phi in float32", lambda: sample(s.ERSDE(2, phi=lambda r: r.float()), steps=4, seeds=range(4)), V, r"wanted its shape and dtype"),
    ("noisy velocity", lambda: noisy(s.variables.velocity, s.variables.tau), V, r"variable is velocity, .*; wanted x0 or eps, and a Clock"),
    ("noisy without a clock", lambda: noisy(s.variables.x0, None), V, r"coordinate None; wanted x0 or eps, and a Clock"),
    ("Phi with eps", lambda: noisy(s.variables.eps, s.variables.lam, s.solvers.Phi(torch.square)), F, r"level is Phi\(.*; wanted a .*Tau"),
    ("Churn of a class", lambda: s.Churn(s.DDIM, 1.0), F, r"solver is <function DDIM.*; wanted a Solver, as in Heun\(\)"),
    ("Churn negative", lambda: s.Churn(s.Heun(), -1.0), V, r"s_churn is -1.0; wanted a finite number in \[0, inf\)"),
    ("Churn band", lambda: s.Churn(s.Heun(), 1.0, 2.0, 1.0), V, r"s_min is 2 and s_max 1; wanted s_min < s_max"),
    ("Churn of Churn", lambda: s.Churn(s.Churn(s.Heun(), 1.0), 1.0), V, r"sets its noise by the number of times in the whole grid"),
    ("Churn of Restart", lambda: s.Churn(s.Restart(s.Heun(), [(0.1, 1.0, 2, 1)]), 1.0), V, r"belongs to the whole grid; wrappers do not nest"),
    ("Churn of two points", lambda: sample(s.Churn(s.TorchDiffEq(), 1.0), seeds=range(4)), V, r"two points of its adaptive solver.*pass times="),
    ("Churn past its end", churn_twice, V, r"has made the 1 steps it was started for; start the solver on the grid"),
    ("on_path of Langevin", lambda: s.orders.on_path(MIX, s.Langevin(), X, TIMES, range(4)), V, r"has strong order 0: its noise belongs to no"),
    ("on_path of Churn", lambda: s.orders.on_path(MIX, s.Churn(s.Ancestral(), 1.0), X, TIMES, range(4)), V, r"has strong order 0"),
    ("on_path without seeds", lambda: s.orders.on_path(MIX, s.SRA3(), X, TIMES, None), F, r"seeds is None; wanted one integer a row: range\(4\)"),
    ("strong_errors of one grid", lambda: s.orders.strong_errors(MIX, s.SRA3(), X, TIMES, range(4), X), F, r"wanted a list of times"),
    ("strong_errors reference", lambda: s.orders.strong_errors(MIX, s.SRA3(), X, [TIMES], range(4), X[:2]), V, r"wanted a state like x"),
    ("slopes of nothing", lambda: s.orders.slopes([1, 2], [0.0, 1.0]), V, r"wanted different steps and a positive error for each"),
    ("slopes of fewer", lambda: s.orders.slopes([1, 2], [1.0]), V, r"wanted different steps and a positive error for each"),
    ("affine_law of lists", lambda: s.orders.affine_law(MIX, s.SRA3(), TIMES, [0.0], [[1.0]]), F, r"mean is list, cov list; wanted tensors"),
    ("affine_law clipped", clipped_law, V, r"is not affine .*; wanted an affine score"),
    ("a solver of one cost more later", lambda: s.Churn(Late(), 1.0), V, r"costs 6 evaluations in 5 steps, 5 in 5 pieces of one; wanted a solver"),
    ("Restart without intervals", lambda: s.Restart(s.Heun(), []), F, r"intervals is \[\]; wanted \(low, high, steps, repeats\) ones"),
    ("Restart one interval", lambda: s.Restart(s.Heun(), (0.1, 1.0, 2, 1)), F, r"wanted \(low, high, steps, repeats\) ones, as in \[\("),
    ("Restart interval of three", lambda: s.Restart(s.Heun(), [(0.1, 1.0, 2)]), F, r"wanted \(low, high, steps, repeats\) ones"),
    ("Restart upside down", lambda: s.Restart(s.Heun(), [(1.0, 0.1, 2, 1)]), V, r"the interval \(1, 0.1\) is empty; wanted low < high"),
    ("Restart no steps", lambda: s.Restart(s.Heun(), [(0.1, 1.0, 0, 1)]), V, r"steps is 0; wanted an integer of at least 1"),
    (
        "Restart above t_max",
        lambda: sample(s.Restart(s.Heun(), [(0.1, 1e4, 2, 1)]), steps=9, seeds=range(4)),
        V,
        r"the interval \(0.1, 10000\) leaves the levels rho of this grid and SDE",
    ),
    (
        "Restart below the grid",
        lambda: sample(s.Restart(s.Heun(), [(1e-4, 1.0, 2, 1)]), steps=9, seeds=range(4)),
        V,
        r"the interval \(0.0001, 1\) leaves the levels rho",
    ),
    ("Euler-Maruyama too coarse", lambda: sample(s.EulerMaruyama(), steps=2, seeds=range(4)), V, r"\|f\| h = .*wanted at most 2; take more"),
    ("a stochastic solver in log_prob", lambda: log_prob(s.Churn(s.Heun(), 1.0), steps=2), F, r"is stochastic and has no inverse and no"),
    ("Dopri5 rtol", lambda: s.Dopri5(rtol=2.0), V, r"rtol is 2.0; wanted a finite number in \[0, 1\]"),
    ("Dopri5 atol", lambda: s.Dopri5(atol=0.0), V, r"atol is 0.0; wanted a finite number in \(0, inf\)"),
    ("Dopri5 max_nfe", lambda: s.Dopri5(max_nfe=0), V, r"max_nfe is 0; wanted an integer of at least 1"),
    ("Dopri5 pid", lambda: s.Dopri5(pid=(1.0, 0.0, 0.0)), V, r"pid is .*; wanted i > 0"),
    ("Dopri5 pid of two", lambda: s.Dopri5(pid=(1.0, 0.0)), F, r"pid is .*; wanted three numbers \(p, i, d\)"),
    ("Dopri5 pid negative", lambda: s.Dopri5(pid=(-1.0, 1.0, 0.0)), V, r"pid is -1.0; wanted a finite number in \[0, inf\)"),
    ("Dopri5 variable", lambda: s.Dopri5(variable="eps"), F, r"variable is 'eps'; wanted one of scoresde.variables"),
    ("Dopri5 nfe", lambda: sample(s.Dopri5(), nfe=9), V, r"Dopri5\(.* is adaptive.*: drop nfe; max_nfe="),
    ("DPMAdaptive order", lambda: s.DPMAdaptive(1), V, r"order is 1; wanted an integer of at least 2"),
    ("DPMAdaptive order 4", lambda: s.DPMAdaptive(4), V, r"order is 4; wanted an integer from 2 to 3"),
    ("Adaptive of a multistep", lambda: s.Adaptive(s.UniPC(3)), F, r"wanted a single-step solver with an embedded lower order: Heun\(\)"),
    ("Adaptive of no lower", lambda: s.Adaptive(s.RK4()), F, r"wanted a single-step solver with an embedded lower order"),
    ("lower of the wrong length", lambda: s.solvers.Tableau(2, (0.0, 1.0), shares=((1.0,), (0.5, 0.5)), lower=(1.0,)), V, r"lower is \(1.0,\); wanted 2 or 3"),
    ("lower the row itself", lambda: s.solvers.Tableau(2, (0.0, 0.5), ((0,), (1,)), lower=(1,)), V, r"the row of the end itself: the error would"),
    ("AdaptiveSDE on no path", lambda: list(s.trajectory(s.Oracle(MIX, 4, s.noise.seeded(range(4))), s.AdaptiveSDE(), X, TIMES)), V, r"wanted noise.brownian"),
    ("lower through what is not", lambda: s.solvers.Tableau(2, (0.0, 0.5), ((0,), (1,)), lower=(2,)), V, r"lower is \(2,\); wanted .* some of 0 to 1"),
    ("AdaptiveSDE, up", lambda: encode(X, s.AdaptiveSDE()), F, r"is stochastic and has no inverse and no density"),
    ("AdaptiveSDE crossed twice", lambda: s.Restart(s.AdaptiveSDE(), [(0.1, 1.0, 2, 1)]), V, r"one Brownian path, which cannot be crossed twice"),
    ("a step of per-sample times", lambda: s.Dopri5().step(s.Oracle(MIX, 4), X, torch.ones(4, 1), torch.ones(4, 1), None), V, r"goes from one time \(\) to"),
    ("unknown method", lambda: s.TorchDiffEq("rk45"), V, r"method is 'rk45'; wanted one of \['adaptive_heun'.*'dopri5'"),
    ("rtol negative", lambda: s.TorchDiffEq(rtol=-1e-3), V, r"rtol is -0.001; wanted a finite number in \[0, 1\]"),
    ("atol 0", lambda: s.TorchDiffEq(atol=0.0), V, r"atol is 0.0; wanted a finite number in \(0, inf\)"),
    ("max_nfe 0", lambda: s.TorchDiffEq(max_nfe=0), V, r"max_nfe is 0; wanted an integer of at least 1"),
    ("max_nfe spent", lambda: sample(s.TorchDiffEq(max_nfe=20), seeds=range(4)), R, r"has used max_nfe = 20 .*; loosen rtol and atol, or allow"),
    ("tolerance below rounding", lambda: sample(s.TorchDiffEq(rtol=0.0, atol=1e-30)), R, r"step size .* is not finite; loosen rtol"),
    (
        "a field too large for a step",
        lambda: s.sample(s.Wrapped.from_eps(lambda x, t: x + 1e25, VP), (4, 2), s.TorchDiffEq(), seeds=range(4)),
        R,
        r"torchdiffeq gave up between t = 1 and 0.001 after \d+ evaluations \(underflow.*; loosen rtol and atol",
    ),
    # --- denoisers
    ("denoiser a function", lambda: s.sample(lambda x, t: x, (4, 2), nfe=9), F, r"denoiser is function; wanted a Denoiser: Wrapped.from_score"),
    ("denoiser a module", lambda: s.sample(nn.Linear(2, 2), (4, 2), nfe=9), F, r"denoiser is Linear; wanted a Denoiser:.*Preconditioned\(net, sde"),
    ("denoiser a module, log_prob", lambda: s.log_prob(nn.Linear(2, 2), X, steps=2), F, r"denoiser is Linear; wanted a Denoiser"),
    ("denoiser a module, encode", lambda: s.encode(nn.Linear(2, 2), X, steps=2), F, r"denoiser is Linear; wanted a Denoiser"),
    ("denoiser a module, fit", lambda: fit(denoiser=nn.Linear(2, 2)), F, r"denoiser is Linear; wanted a Denoiser"),
    ("denoiser a module, loss", lambda: s.dsm_loss(nn.Linear(2, 2), X, T, loss.edm), F, r"denoiser is Linear; wanted a Denoiser"),
    ("denoiser a function, flow", lambda: s.flow(lambda x, t: x, X, T), F, r"denoiser is function; wanted a Denoiser"),
    ("denoiser a class", lambda: s.sample(s.Wrapped, (4, 2), nfe=9), F, r"denoiser is \w+; wanted a Denoiser"),
    ("sde a class", lambda: s.Preconditioned(s.MLP(2), s.VP), F, r"sde is \w+; wanted a LinearSDE such as VP\(\): is it a class"),
    ("sde a word", lambda: s.Wrapped.from_x0(lambda x, t: x, "vp"), F, r"sde is str; wanted a LinearSDE such as VP\(\)"),
    ("net a function", lambda: s.Preconditioned(lambda x, c: x, VP), F, r"net is function; wanted an nn.Module: Wrapped.from_eps"),
    ("parameterization a word", lambda: s.Preconditioned(s.MLP(2), VP, "eps"), F, r"parameterization is str; wanted a function \(sde, t\)"),
    ("fn a tensor", lambda: s.Wrapped.from_eps(X, VP), F, r"fn is \[4, 2\] float32; wanted a callable \(x, t\) -> prediction"),
    ("labels to an unconditional net", lambda: net().condition(Z(4).long())(X, T), V, r"cond was given to a net without classes; wanted None"),
    ("labels to another denoiser", lambda: fit((X, Z(4).long()), denoiser=linear(), optimizer=torch.optim.SGD([Z(1)])), F, r"labels .*wanted Precond"),
    ("labels out of range", lambda: net(3).condition(Z(4).long() + 5)(X, T), V, r"labels out of range; wanted 0 ... 2, or -1"),
    # --- likelihood
    ("prior of wrong shape", lambda: log_prob(steps=2, prior=lambda z: z), V, r"prior returned \[4, 2\] float32 for 4 samples; wanted .* \[4\]"),
    ("prior returns a float", lambda: log_prob(steps=2, prior=lambda z: 0.0), V, r"prior returned float for 4 samples; wanted their"),
    ("prior a number", lambda: log_prob(steps=2, prior=1.0), F, r"prior is float; wanted a callable z -> log-densities"),
    ("probes 0", lambda: log_prob(steps=2, divergence=s.divergence.rademacher(0)), V, r"k is 0; wanted an integer of at least 1"),
    ("chunk 0", lambda: log_prob(steps=2, divergence=s.divergence.exact(0)), V, r"chunk is 0; wanted an integer of at least 1"),
    ("float images", lambda: s.bits_per_dim(MIX, X, steps=2, levels=4), F, r"images is \[4, 2\] float32; wanted integers 0 .. 3"),
    ("bool images", lambda: s.bits_per_dim(MIX, X > 0, steps=2, levels=2), F, r"images is \[4, 2\] bool; wanted integers 0 .. 1"),
    ("numpy images", lambda: s.bits_per_dim(MIX, IMAGES.numpy(), steps=2, levels=4), F, r"images is ndarray; wanted integers"),
    ("levels too few for the images", lambda: s.bits_per_dim(MIX, IMAGES + 4, steps=2, levels=4), V, r"images span 4 .. 4; wanted 0 .. 3: check"),
    ("negative images", lambda: s.bits_per_dim(MIX, IMAGES - 1, steps=2, levels=4), V, r"images span -1 .. -1; wanted 0 .. 3: check levels="),
    ("levels 1", lambda: bits(levels=1), V, r"levels is 1; wanted an integer of at least 2"),
    ("samples 0", lambda: bits(samples=0), V, r"samples is 0; wanted an integer of at least 1"),
    ("dequantization 3", lambda: bits(dequantization=3), F, r"dequantization is int; wanted Uniform\(\), TruncatedNormal\(\)"),
    ("Quantized upside down", lambda: s.Quantized(8, low=1.0, high=-1.0), V, r"high is -1.0; wanted a finite number in \(1, inf\)"),
    ("Quantized NaN", lambda: s.Quantized(8, low=NAN), V, r"low is nan; wanted a finite number"),
    ("Quantized levels a float", lambda: s.Quantized(8.0), F, r"levels is 8.0 \(float\); wanted an integer"),
    # --- loss and training
    ("t of a loss outside", lambda: s.dsm_loss(MIX, X, 3 * T, loss.edm), V, r"t spans \[1.5, 1.5\]; wanted times of VP.*in \[0.001, 1\]"),
    ("t of a loss a float", lambda: s.dsm_loss(MIX, X, 0.5, loss.edm), F, r"t is float; wanted a tensor: torch.tensor"),
    ("t of a loss too short", lambda: s.dsm_loss(MIX, X, Z(3) + 0.5, loss.edm), V, r"t is \[3\] float32; wanted \(\) or \[4, 1\]"),
    ("weight None", lambda: s.dsm_loss(MIX, X, T, None), F, r"weight is NoneType; wanted a function \(sde, t\)"),
    ("noise of a loss", lambda: dsm(noise=Z(3, 2)), V, r"noise is \[3, 2\]; wanted the shape of x0, \[4, 2\]"),
    ("log_normal std 0", lambda: loss.log_normal(VP, Z(3), std=0.0), V, r"std is 0.0; wanted a finite number in \(0, inf\)"),
    ("clip 0", lambda: fit(clip=0), V, r"clip is 0; wanted a finite number in \(0, inf\)"),
    ("clip NaN", lambda: fit(clip=NAN), V, r"clip is nan; wanted a finite number in \(0, inf\)"),
    ("clip -inf", lambda: fit(clip=-INF), V, r"clip is -inf; wanted a finite number in \(0, inf\)"),
    ("batches a tensor", lambda: list(s.fit(net(), X)), F, r"batches is a tensor \[4, 2\] float32; wanted an iterable.*\[x0\]"),
    ("a batch of one part", lambda: fit([X]), V, r"batch 1 has 1 parts; wanted a tensor x0 or a pair.*b\[0\] for b"),
    ("optimizer a word", lambda: fit(optimizer="adam"), F, r"optimizer is 'adam'; wanted a torch.optim.Optimizer"),
    ("generator of fit", lambda: fit(generator=0), F, r"generator is int; wanted a torch.Generator"),
    ("times of fit", lambda: fit(times=TIMES), F, r"times is \[3\] float64; wanted a function \(sde, u\)"),
    ("EMA decay 2", lambda: s.EMA(net(), decay=2), V, r"decay is 2; wanted a finite number in \[0, 1\]"),
    ("EMA of no module", lambda: s.EMA(lambda x: x), F, r"module is function; wanted an nn.Module"),
    # --- closed forms
    ("means a list", lambda: s.Mixture(VP, [[0.0, 0.0]], 1.0), F, r"means is list; wanted a float tensor: torch.as_tensor"),
    ("no means", lambda: s.Mixture(VP, Z(0, 2), 1.0), V, r"means is \[0, 2\] float64; wanted at least one component"),
    ("std and covariance", lambda: s.Gaussian(VP, Z(2), 1.0, covariance=torch.eye(2)), V, r"std is float, covariance is .*; wanted exactly one"),
    ("neither", lambda: s.Gaussian(VP, Z(2)), V, r"std is NoneType, covariance is NoneType; wanted exactly one"),
    ("mean 0-dim", lambda: s.Gaussian(VP, torch.tensor(1.0), 1.0), V, r"mean is \(\); wanted an event .*: mean\[None\]"),
    ("std negative", lambda: s.Gaussian(VP, Z(2), -1.0), V, r"std is -1.0; wanted a finite number in \[0, inf\)"),
    ("std with a negative", lambda: s.Mixture(VP, X, torch.tensor([1.0, 1, 1, -1])), V, r"std is \[4\] float64, least -1; wanted .* all >= 0"),
    ("std of wrong shape", lambda: s.Mixture(VP, X, torch.ones(3)), V, r"std is \[3\] float64, least 1; wanted \(\), \[4\] or \[4, 2\]"),
    ("std empty", lambda: s.Mixture(VP, X, torch.ones(0)), V, r"std is \[0\] float64; wanted \(\), \[4\] or \[4, 2\]"),
    ("covariance indefinite", lambda: s.Gaussian(VP, Z(2), covariance=torch.tensor([[1.0, 2], [2, 1]])), V, r"eigenvalue -1; wanted positive semi"),
    ("covariance a Cholesky factor", lambda: s.Gaussian(VP, Z(2), covariance=torch.tensor([[1.0, 0], [1, 1]])), V, r"transpose by 1; .*wanted L @ L"),
    ("covariance of wrong shape", lambda: s.Gaussian(VP, Z(2), covariance=torch.eye(3)), V, r"covariance is \[1, 3, 3\] float64; wanted \[1, 2, 2\]"),
    ("covariance NaN", lambda: s.Gaussian(VP, Z(2), covariance=torch.eye(2) * NAN), V, r"covariance has NaN .*; wanted finite"),
    ("weights of wrong shape", lambda: s.Mixture(VP, X, 1.0, weights=torch.ones(3)), V, r"weights is \[3\] float64, least 1; wanted \[4\] positive"),
    ("weights with a zero", lambda: s.Mixture(VP, X, 1.0, weights=torch.tensor([1.0, 1, 1, 0])), V, r"least 0; wanted \[4\] positive numbers"),
    ("weights empty", lambda: s.Mixture(VP, X, 1.0, weights=Z(0)), V, r"weights is \[0\] float64; wanted \[4\] positive numbers"),
    ("factor of wrong shape", lambda: s.Gaussian.low_rank(VP, Z(2), Z(3, 1), 1.0), V, r"factor is \[3, 1\] float64; wanted .* r <= 2"),
    ("points int", lambda: s.Empirical(VP, X.long()), F, r"points is \[4, 2\] int64; wanted a float tensor: torch.as_tensor"),
    ("no points", lambda: s.Empirical(VP, Z(0, 2)), V, r"points has no rows; wanted at least one data point"),
    ("no density", lambda: s.Empirical(VP, X).log_prob(X), V, r"Empirical has a component of zero variance .*; pass t="),
    ("no density, Gaussian", lambda: s.Gaussian(VP, Z(2), 0.0).log_prob(X), V, r"Gaussian has a component of zero variance .*; pass t="),
]  # fmt: skip


def test_the_table_is_large_and_its_names_differ():
    assert len(CASES) >= 70
    assert len({name for name, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize(("call", "error", "pattern"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused_with_what_came_and_what_was_wanted(call, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}"):
        call()


# --- checkpoints ---------------------------------------------------------------------------------------------------------
def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename(folder, what, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config[what].update(changes)
    path.write_text(json.dumps(config))


DAMAGE = [
    ("no config", lambda f: (f / "config.json").unlink(), FileNotFoundError, r"config.json is missing; .* is no checkpoint of"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"model.safetensors is missing; .* is no checkpoint"),
    ("not JSON", lambda f: (f / "config.json").write_text("{"), V, r"config.json is not a checkpoint's config .*was it edited or cut"),
    ("not UTF-8", lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), V, r"config.json is not a checkpoint's config .*was it edited"),
    ("a list", lambda f: (f / "config.json").write_text("[]"), V, r"config.json is not a checkpoint's config"),
    ("no format", lambda f: (f / "config.json").write_text("{}"), V, r"config.json is not a checkpoint's config \(KeyError"),
    ("another format", lambda f: edit(f, format=99), V, r"is of format 99; this version reads 1 and 2: install a newer scoresde"),
    ("damaged", lambda f: (f / "model.safetensors").write_bytes(b"0" * 64), V, r"is not the file config.json was written with; it is damaged"),
    ("unknown sde", lambda f: rename(f, "sde", name="Linear"), V, r"names the sde 'Linear'; known are \[.*'VP'.*\]: pass sde="),
    ("unknown net", lambda f: rename(f, "net", name="os.system"), V, r"names the net 'os.system'; known are \['DiT', 'FromDiffusers', 'MLP', 'NCSNpp', 'UNet'\]: pass net="),
    ("unknown parameterization", lambda f: rename(f, "parameterization", name="exec"), V, r"parameterization 'exec'; known are .*: pass"),
    ("a class for a parameterization", lambda f: rename(f, "parameterization", name="Prediction"), V, r"'Prediction'; known are \['edm'"),
    ("abstract sde", lambda f: rename(f, "sde", name="LinearSDE"), V, r"does not describe a sde \(.*\); pass sde="),
    ("unknown setting", lambda f: rename(f, "sde", beta_mid=3.0), V, r"does not describe a sde \(.*beta_mid.*\); pass sde="),
    ("bad setting", lambda f: rename(f, "sde", beta_min=30.0), V, r"beta_min=30.0, beta_max=20.0; wanted beta_min < beta_max"),
    ("another net", lambda f: rename(f, "net", width=16), V, r"weights do not fit the MLP .*pass net="),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "error", "pattern"), [c[1:] for c in DAMAGE], ids=[c[0] for c in DAMAGE])
def test_a_harmed_checkpoint_is_refused(harm, error, pattern, tmp_path):
    folder = checkpoint.save(tmp_path / "model", net())
    harm(folder)
    store.seal(folder)  # by hand: else the manifest refuses it first
    with pytest.raises(error, match=f"(?s){pattern}"):
        checkpoint.load(folder)


def test_checkpoints_refuse_to_save(tmp_path):
    folder = checkpoint.save(tmp_path / "model", net())
    with pytest.raises(FileExistsError, match=r"model holds a checkpoint; choose another folder or pass overwrite=True"):
        checkpoint.save(folder, net())
    with pytest.raises(TypeError, match=r"denoiser is a Mixture; wanted Preconditioned"):
        checkpoint.save(tmp_path / "other", MIX)
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        checkpoint.load(tmp_path / "nothing")
    assert not (tmp_path / "other").exists()


# --- networks that fail --------------------------------------------------------------------------------------------------
class Sick(s.Denoiser):
    """A denoiser that returns NaN for marked rows (those with x > 50 in the first entry) once t is below `below`."""

    def __init__(self, below):
        super().__init__(VP)
        self.inner, self.below = mixture(VP), below

    def forward(self, x, t):
        sick = (x[:, :1] > 50) & (t < self.below)
        return self.inner(x, t) * torch.where(sick, NAN, 1.0).to(x.dtype)


SICK_SOLVERS = [
    s.Euler(), s.Heun(), s.DDIM(), s.DDIM(eta=1.0), s.DPMSolverPP(2), s.EulerMaruyama(), s.Ancestral(),
    s.PredictorCorrector(s.DDIM(), s.Langevin(0.1)), s.PredictorCorrector(s.DDIM(), s.MALA(0.1)), s.TorchDiffEq(rtol=1e-3, atol=1e-3),
]  # fmt: skip


def marked(rows, batch=6):
    """A start whose marked rows stay above 50 long enough to be recognised."""
    x = torch.linspace(-1, 1, 2 * batch, dtype=D).reshape(batch, 2).clone()
    x[rows, 0] = 1e6
    return x


@pytest.mark.parametrize("solver", SICK_SOLVERS, ids=lambda v: repr(v))
def test_nan_from_the_network_raises_and_names_the_samples_the_step_and_t(solver):
    budget = {} if solver.adaptive else {"steps": 6}
    kwargs = dict(x=marked([1, 4]), seeds=range(6), **budget)
    # the third step runs from times[2]: its denoiser call is the first below times[1]
    below = 2.0 if solver.adaptive else float(solver.grid(VP, 6)[1:3].mean())
    with pytest.raises(NonFiniteError) as caught:
        s.sample(Sick(below), (6, 2), solver, **kwargs)
    text = str(caught.value)
    assert "samples [1, 4] (2 of 6)" in text
    if solver.adaptive:
        assert "t = 1," in text
        assert "evaluation 1:" in text
    else:
        step = 2 if solver == s.Heun() or isinstance(solver, s.PredictorCorrector) else 3  # these look at the end of their step too
        grid_times = solver.grid(VP, 6)
        assert f"after step {step} of 6 (t = {grid_times[step - 1]:.6g} -> {grid_times[step]:.6g})" in text
    assert "check the network" in text


@pytest.mark.parametrize("solver", SICK_SOLVERS, ids=lambda v: repr(v))
def test_without_throw_the_status_names_the_bad_rows_and_the_others_are_untouched(solver):
    budget = {} if solver.adaptive else {"steps": 6}
    kwargs = dict(x=marked([1, 4]), seeds=range(6), throw=False, microbatch=1, **budget)
    found = s.sample(Sick(0.7), (6, 2), solver, **kwargs)
    clean = s.sample(Sick(-1.0), (6, 2), solver, **kwargs)
    good = torch.tensor([0, 2, 3, 5])
    assert (found.status > 0).nonzero().flatten().tolist() == [1, 4]
    assert found.x[[1, 4]].isnan().all()
    assert torch.equal(found.x[good], clean.x[good])
    assert clean.status.sum() == 0
    if not solver.adaptive:  # in one batch as well: no row of a fixed grid depends on another
        found, clean = (s.sample(Sick(b), (6, 2), solver, **{**kwargs, "microbatch": None}) for b in (0.7, -1.0))
        assert torch.equal(found.x[good], clean.x[good])


def test_an_adaptive_solver_in_one_batch_goes_on_with_the_healthy_rows():
    solver = s.TorchDiffEq(rtol=1e-6, atol=1e-6)
    kwargs = {"x": marked([1, 4]), "seeds": range(6), "throw": False}
    found, clean = (s.sample(Sick(b), (6, 2), solver, **kwargs) for b in (0.7, -1.0))
    good = torch.tensor([0, 2, 3, 5])
    assert (found.status > 0).nonzero().flatten().tolist() == [1, 4]
    assert (found.x[good] - clean.x[good]).abs().max() < 1e-4
    times = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.1], dtype=D)  # NaN on arrival at the last two intervals
    found = s.sample(Sick(0.7), (6, 2), solver, times=times, **kwargs)
    assert found.status.tolist() == [0, 2, 0, 0, 2, 0]


@pytest.mark.parametrize("microbatch", [1, 2, 4, None])
@pytest.mark.parametrize("solver", [s.Heun(), s.TorchDiffEq(rtol=1e-3, atol=1e-3)], ids=["Heun", "TorchDiffEq"])
def test_samples_are_named_by_their_number_in_the_callers_batch(solver, microbatch):
    budget = {} if solver.adaptive else {"steps": 6}
    with pytest.raises(NonFiniteError, match=r"samples \[4\] \(1 of \d\)"):
        s.sample(Sick(2.0), (5, 2), solver, x=marked([4], 5), seeds=range(5), microbatch=microbatch, **budget)


@pytest.mark.parametrize("solver", [s.Heun(), s.TorchDiffEq(rtol=1e-3, atol=1e-3)], ids=["Heun", "TorchDiffEq"])
def test_nan_in_a_likelihood(solver):
    x = marked([1])
    budget = {} if solver.adaptive else {"steps": 6}
    with pytest.raises(NonFiniteError, match=r"samples \[1\] \(1 of 6\)"):
        s.log_prob(Sick(2.0), x, solver, **budget)
    found = s.log_prob(Sick(2.0), x, solver, throw=False, microbatch=1, **budget)
    clean = s.log_prob(Sick(-1.0), x, solver, microbatch=1, **budget)
    good = torch.tensor([0, 2, 3, 4, 5])
    assert (found.solution.status > 0).nonzero().flatten().tolist() == [1]
    assert found.value[1].isnan()
    assert torch.equal(found.value[good], clean.value[good])


def test_a_corrector_alone_does_not_hide_nan():
    """MALA refuses a NaN proposal; without a word it would refuse for ever."""
    sick = s.Wrapped.from_x0(lambda x, t: x * NAN, VP)
    with pytest.raises(NonFiniteError, match=r"samples \[0, 1\]"):
        s.sample(sick, (2, 2), s.MALA(), steps=3, seeds=range(2), denoise=False)


def test_nan_in_the_final_mean_raises():
    class End(s.Denoiser):
        def forward(self, x, t):
            return x * (NAN if t == VP.t_min else 0.5)

    with pytest.raises(NonFiniteError, match=r"samples \[0, 1, 2\] \(3 of 3\).* after the mean at t = 0.001"):
        s.sample(End(VP), (3, 2), s.DDIM(), steps=2, seeds=range(3))


# --- what is odd, and works ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("denoiser", [MIX, net()], ids=["Mixture", "MLP"])
def test_empty_batches_work(denoiser, microbatch):
    x = Z(0, 2)
    for solver in (s.DDIM(), s.Heun(), s.Ancestral(), s.PredictorCorrector(s.DDIM(), s.MALA(0.1)), s.TorchDiffEq()):
        budget = {} if solver.adaptive else {"nfe": 9}
        found = s.sample(denoiser, (0, 2), solver, seeds=[], microbatch=microbatch, **budget)
        assert found.x.shape == (0, 2)
        assert found.nfe == 0
        assert found.status.shape == (0,)
    assert s.sample(denoiser, (0, 2), nfe=9).seeds == []
    for budget in ({}, {"steps": 2}):
        assert s.encode(denoiser, x, microbatch=microbatch, **budget).x.shape == (0, 2)
        assert s.decode(denoiser, x, microbatch=microbatch, **budget).x.shape == (0, 2)
        for probes in (None, 2):
            found = s.log_prob(denoiser, x, divergence=probes and s.divergence.rademacher(probes), microbatch=microbatch, **budget)
            assert found.value.shape == found.stderr.shape == (0,)
            assert found.latent.shape == (0, 2)
            bits = s.bits_per_dim(
                denoiser, x.long(), levels=4, divergence=probes and s.divergence.rademacher(probes), microbatch=microbatch, **budget
            )
            assert bits.each.shape == (0,)
            assert math.isnan(bits.value)
    assert s.dsm_loss(denoiser, x, Z(0) + 0.5, loss.edm).shape == (0,)


def test_empty_batches_work_in_closed_forms():
    for law in (MIX, s.Empirical(VP, X), s.Gaussian(VP, Z(2), covariance=torch.eye(2))):
        assert law.sample(0).shape == law.sample(0, T, seeds=[]).shape == (0, 2)
        assert law(Z(0, 2), T).shape == (0, 2)
        assert law(Z(0, 2), Z(0, 1) + 0.5).shape == (0, 2)
        assert law.log_prob(Z(0, 2), T).shape == (0,)


def test_seeds_may_repeat_and_come_in_any_container():
    a = heun(nfe=9, seeds=[7, 7, 8, 2**64 - 1])
    assert torch.equal(a.x[0], a.x[1])
    assert not torch.equal(a.x[0], a.x[2])
    for seeds in ((7, 7, 8, 9), torch.tensor([7, 7, 8, 9]), iter([7, 7, 8, 9]), torch.tensor([7, 7, 8, 9]).numpy()):
        assert torch.equal(heun(nfe=9, seeds=seeds).x[:3], a.x[:3])


def test_stochastic_is_what_the_solver_says():
    """The cases above cover every kind: a solver of the reverse SDE, and DDIM, which is one when eta > 0."""
    assert isinstance(s.Ancestral(), StochasticSolver)
    assert s.DDIM(eta=0.1).stochastic
    assert not s.DDIM().stochastic
    assert exact.__all__ == ["Empirical", "Gaussian", "Mixture"]
