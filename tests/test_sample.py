"""sample, encode, decode and trajectory: what they return, and what they leave alone."""

import inspect
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from laws import SIX, D, every_sde, mixture

import scoresde as s
from scoresde import grid, loss
from scoresde.noise import seeded

VP = s.VP()
MIX = mixture(VP)
SDES = every_sde()


def network(**kwargs):
    """A small network away from its zero start."""
    net = s.MLP(2, width=16, depth=1, **kwargs)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * seeded([i]).initial((1, *p.shape), torch.float32)[0])
    return net


# --- the solution --------------------------------------------------------------------------------------------------------
VAR = s.variables
SMALL = (s.AdamsMoulton(2, VAR.velocity), s.AdamsMoulton(4, VAR.V(0.5), startup=False))
LARGE = (s.UniPC(1, s.solvers.bh1, VAR.eps), s.AdamsMoulton(5, VAR.velocity, VAR.lam, startup=False))


@pytest.mark.parametrize(
    ("budget", "solver"),
    [
        ({"nfe": 2}, SMALL[0]), ({"nfe": 11}, SMALL[0]), ({"nfe": 12}, SMALL[1]), ({"nfe": 100}, SMALL[1]),
        ({"steps": 10}, SMALL[0]), ({"steps": 11}, SMALL[1]), ({"times": grid.logsnr(VP, 4)}, SMALL[0]),
    ],
    ids=repr,
)  # fmt: skip
def test_the_default_solver_is_named(budget, solver):
    found = s.sample(MIX, (2, 2), seeds=range(2), **budget)
    assert found.solver == solver
    assert found.nfe == budget.get("nfe", found.nfe)
    again = s.sample(MIX, (2, 2), found.solver, seeds=range(2), **budget)
    assert torch.equal(found.x, again.x)


@pytest.mark.parametrize(("nfe", "which"), [(4, 0), (13, 0), (14, 1), (60, 1)])
def test_the_default_solver_of_images(nfe, which):
    image = s.Gaussian(VP, torch.zeros(2, 16, 16, dtype=D), 0.5)
    found = s.sample(image, (1, 2, 16, 16), nfe=nfe, seeds=[0])
    assert found.solver == LARGE[which]
    assert found.nfe == nfe
    assert found.times[1] == grid.karras(VP, nfe - 1)[1]
    assert s.sample(s.Gaussian(VP, torch.zeros(511, dtype=D), 0.5), (1, 511), nfe=nfe, seeds=[0]).solver in SMALL


@pytest.mark.parametrize(("budget", "n"), [({}, 1), ({"nfe": 8}, 8), ({"steps": 4}, 4)], ids=repr)
def test_the_default_solver_of_encode_and_decode(budget, n):
    x = MIX.sample(2, torch.tensor(VP.t_min, dtype=D), seeds=range(2))
    up = s.encode(MIX, x, **budget)
    down = s.decode(MIX, up.x, **budget)
    assert up.solver == down.solver == s.log_prob(MIX, x, **budget).solution.solver
    assert up.solver == (s.DPMSolverPP(2) if budget else s.Dopri5())
    assert torch.equal(up.times, down.times.flip(0))
    assert torch.equal(down.times, grid.logsnr(VP, n))
    if budget:
        assert up.nfe == down.nfe == n  # and no final mean


@pytest.mark.parametrize("solver", [s.Heun(), s.Euler()], ids=repr)
def test_encode_is_uniform_in_logsnr_whatever_a_solver_recommends(solver):
    assert not torch.equal(solver.grid(VP, 4), grid.logsnr(VP, 4))
    assert torch.equal(s.encode(MIX, torch.zeros(1, 2), solver, steps=4).times, grid.logsnr(VP, 4).flip(0))


def test_fields_of_a_solution():
    found = s.sample(MIX, (5, 2), s.Heun(), nfe=9, seeds=range(5))
    assert found.x.shape == (5, 2)
    assert found.x.dtype == torch.float32
    assert found.nfe == 9
    assert found.nfe_each.tolist() == [9] * 5
    assert found.ledger == {"score": 8, "denoise": 1, "rejected": 0, "network": 9, "divergence": 0, "guidance": 0}
    assert found.status.tolist() == [0] * 5
    assert torch.equal(found.times, grid.karras(VP, 4))
    assert found.times.dtype == D
    assert found.solver == s.Heun()
    assert list(found.seeds) == list(range(5))
    assert "seeds" not in repr(found)
    with pytest.raises(AttributeError):
        found.x = None


def test_seeds_are_kept_and_repeat_the_call():
    for kwargs in ({}, {"seeds": [5, 3, 2**64 - 1]}, {"seeds": torch.tensor([5, 3, 4])}, {"seeds": range(3)}):
        for solver in (s.DPMSolverPP(), s.Ancestral()):
            found = s.sample(MIX, (3, 2), solver, steps=4, **kwargs)
            again = s.sample(MIX, (3, 2), solver, steps=4, seeds=found.seeds)
            assert torch.equal(found.x, again.x)
            assert len(found.seeds) == 3
            one = s.sample(MIX, (1, 2), solver, steps=4, seeds=[int(found.seeds[1])])
            assert torch.allclose(one.x, found.x[1:2], atol=1e-6)


def test_entropy_is_fresh_each_time():
    a, b = (s.sample(MIX, (3, 2), steps=4) for _ in range(2))
    assert a.seeds != b.seeds
    assert not torch.equal(a.x, b.x)


def test_a_generator_repeats_with_its_state_and_keeps_no_seeds():
    a, b, c = (s.sample(MIX, (3, 2), s.Ancestral(), steps=4, generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert a.seeds is None
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.x, c.x)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_dtype_and_device(dtype):
    for device in (None, "cpu", torch.device("cpu")):
        found = s.sample(MIX, (3, 2), nfe=9, seeds=range(3), dtype=dtype, device=device)
        assert found.x.dtype == dtype
        assert found.x.device.type == "cpu"
    x = torch.zeros(3, 2, dtype=dtype)
    for other in (torch.float32, D):  # x has its own
        assert s.sample(MIX, (3, 2), nfe=9, seeds=range(3), x=x, dtype=other).x.dtype == dtype
    assert s.encode(MIX, x, steps=2).x.dtype == dtype
    assert s.decode(MIX, x, steps=2).x.dtype == dtype


# --- arguments -----------------------------------------------------------------------------------------------------------
def test_denoise_is_one_counted_mean_at_the_last_time():
    for solver in (s.Heun(), s.DDIM(), s.Ancestral()):
        kwargs = {"solver": solver, "steps": 6, "seeds": range(4), "dtype": D}
        noisy, clean = s.sample(MIX, (4, 2), denoise=False, **kwargs), s.sample(MIX, (4, 2), **kwargs)
        assert clean.nfe == noisy.nfe + 1
        assert (noisy.ledger["denoise"], clean.ledger["denoise"]) == (0, 1)
        assert torch.equal(MIX(noisy.x, noisy.times[-1]), clean.x)


def test_nfe_leaves_room_for_the_final_mean():
    assert len(s.sample(MIX, (1, 2), s.Heun(), nfe=11).times) == 6
    assert len(s.sample(MIX, (1, 2), s.Heun(), nfe=11, denoise=False).times) == 6
    assert len(s.sample(MIX, (1, 2), s.Heun(), nfe=10).times) == 5
    assert len(s.sample(MIX, (1, 2), s.Heun(), nfe=10, denoise=False).times) == 6
    assert len(s.encode(MIX, torch.zeros(1, 2), s.Heun(), nfe=10).times) == 6


def test_x_starts_the_solve_at_the_first_time():
    """Half way down by hand, then on from there: the same as in one go (the solver has no memory)."""
    times = grid.karras(VP, 8)
    whole = s.sample(MIX, (4, 2), s.Heun(), times=times, seeds=range(4), dtype=D)
    half = s.sample(MIX, (4, 2), s.Heun(), times=times[:5], seeds=range(4), dtype=D, denoise=False)
    rest = s.sample(MIX, (4, 2), s.Heun(), times=times[4:], x=half.x)
    assert torch.equal(rest.x, whole.x)
    assert torch.equal(half.x, s.sample(MIX, (4, 2), s.Heun(), times=times[:5], x=half.x * 0 + start(4), denoise=False).x)


def start(rows, dtype=D):
    return (VP.prior_std() * seeded(range(rows)).initial((rows, 2), D)).to(dtype)


def test_the_callers_x_and_times_are_left_as_they_were():
    x, times = start(4), grid.karras(VP, 5)
    kept, kept_times = x.clone(), times.clone()
    for solver in (
        s.Euler(),
        s.Heun(),
        s.DPMSolverPP(),
        s.Ancestral(),
        s.PredictorCorrector(s.DDIM(), s.MALA(0.1)),
        s.TorchDiffEq(),
    ):
        s.sample(MIX, (4, 2), solver, times=times, x=x, seeds=range(4))
        assert torch.equal(x, kept)
        assert torch.equal(times, kept_times)
    s.encode(MIX, x, times=times)
    assert torch.equal(times, kept_times)


def test_grid_replaces_the_solvers_own():
    for rule in (grid.uniform, grid.quadratic, grid.logsnr, grid.karras, lambda sde, n: grid.karras(sde, n, rho=3)):
        found = s.sample(MIX, (2, 2), s.Heun(), steps=7, grid=rule, seeds=range(2))
        assert torch.equal(found.times, rule(VP, 7))
        assert torch.equal(s.encode(MIX, found.x, steps=7, grid=rule).times, rule(VP, 7).flip(0))
    assert torch.equal(s.sample(MIX, (2, 2), s.Heun(), steps=7).times, grid.karras(VP, 7))
    assert torch.equal(s.sample(MIX, (2, 2), s.Euler(s.variables.time), steps=7).times, grid.uniform(VP, 7))


def test_times_of_an_adaptive_solver_are_output_points():
    times = torch.tensor([1.0, 0.6, 0.2, 1e-3], dtype=D)
    solver = s.TorchDiffEq(rtol=1e-8, atol=1e-8)
    a = s.sample(MIX, (3, 2), solver, times=times, seeds=range(3), dtype=D)
    b = s.sample(MIX, (3, 2), solver, seeds=range(3), dtype=D)
    assert torch.equal(a.times, times)
    assert len(b.times) == 2
    assert (a.x - b.x).abs().max() < 1e-6


def test_encode_takes_times_in_either_order_and_stops_where_they_end():
    x = MIX.sample(3, torch.tensor(0.2, dtype=D), seeds=range(3))
    times = torch.tensor([0.2, 0.3, 0.5, 0.8], dtype=D)
    a, b = s.encode(MIX, x, s.Heun(), times=times), s.encode(MIX, x, s.Heun(), times=times.flip(0))
    assert torch.equal(a.x, b.x)
    assert a.times.tolist() == times.tolist()
    back = s.decode(MIX, a.x, s.Heun(), times=times)
    assert back.times.tolist() == times.flip(0).tolist()
    assert (back.x - x).abs().max() < 0.3  # three steps each way


@pytest.mark.parametrize("name", SIX)
def test_samples_are_samples(name):
    """From the prior to data: each component of the mixture gets its share, 5 sigma plus the prior's mismatch."""
    denoiser, n = mixture(SDES[name]), 4000
    x = s.sample(denoiser, (n, 2), nfe=33, seeds=range(n)).x.double()
    nearest = torch.cdist(x, denoiser.means).argmin(1)
    truth = denoiser.sample(n, seeds=range(n, 2 * n))
    expected = torch.bincount(torch.cdist(truth, denoiser.means).argmin(1), minlength=3) / n
    shares = torch.bincount(nearest, minlength=3) / n
    assert ((shares - expected).abs() < 5 * (2 * 0.25 / n) ** 0.5).all()
    assert ((x.mean(0) - truth.mean(0)).abs() < 5 * (2 * truth.var(0) / n).sqrt() + 0.02).all()


# --- the loop ------------------------------------------------------------------------------------------------------------
def test_trajectory_is_a_generator_that_yields_every_time():
    times = grid.logsnr(VP, 6)
    for order in (times, times.flip(0)):
        oracle = s.Oracle(MIX, 3)
        steps = s.trajectory(oracle, s.Heun(), start(3), order)
        assert inspect.isgenerator(steps)
        assert oracle.nfe.sum() == 0  # nothing is done until it is asked for
        t, x = next(steps)
        assert float(t) == float(order[0])
        assert torch.equal(x, start(3))
        assert oracle.nfe.sum() == 0
        rest = list(steps)
        assert [float(t) for t, _ in rest] == order[1:].tolist()
        assert oracle.nfe.tolist() == [12] * 3
        assert all(torch.isfinite(x).all() for _, x in rest)


def test_trajectory_can_be_left_early_and_is_what_sample_runs():
    times = grid.karras(VP, 6)
    oracle = s.Oracle(MIX, 3)
    x = [state for _, (_, state) in zip(range(3), s.trajectory(oracle, s.Heun(), start(3), times), strict=False)][-1]
    assert oracle.nfe.tolist() == [4] * 3
    assert torch.equal(x, s.sample(MIX, (3, 2), s.Heun(), times=times[:3], seeds=range(3), dtype=D, denoise=False).x)


def test_the_state_of_a_solver_goes_from_step_to_step_and_starts_on_the_whole_grid():
    seen = []

    class Chain(s.Solver):
        order = 1

        def start(self, sde, times):
            seen.append(times)
            return 0

        def step(self, oracle, x, t, s, state):
            seen.append((float(t), float(s), state))
            return oracle(x, t).x0, state + 1

    times = grid.uniform(VP, 4)
    found = s.sample(MIX, (2, 2), Chain(), times=times, seeds=range(2))
    assert torch.equal(seen[0], times)
    assert seen[1:] == [(float(t), float(u), i) for i, (t, u) in enumerate(pairwise(times))]
    assert found.nfe == 5


# --- what it leaves alone ------------------------------------------------------------------------------------------------
def states():
    numpy_state = np.random.get_state()  # noqa: NPY002 (the global one is what is watched)
    return torch.get_rng_state(), (numpy_state[1].tolist(), numpy_state[2]), random.getstate()


def untouched(call):
    torch.manual_seed(7)
    before = states()
    call()
    after = states()
    return torch.equal(before[0], after[0]) and before[1:] == after[1:]


def train(model, **kwargs):
    return list(s.fit(model, [X0, X0], ema=s.EMA(model), **kwargs))


X0 = torch.zeros(4, 2)
CORRECTED = s.PredictorCorrector(s.DDIM(), s.MALA())
ACTS = {
    "sample": lambda: [s.sample(MIX, (4, 2), solver, steps=3) for solver in (s.Heun(), s.Ancestral(), CORRECTED)],
    "sample by generator": lambda: s.sample(MIX, (4, 2), s.Ancestral(), steps=3, generator=torch.Generator()),
    "adaptive": lambda: s.sample(MIX, (4, 2), s.TorchDiffEq()),
    "encode": lambda: s.encode(MIX, X0, steps=3),
    "log_prob": lambda: [s.log_prob(MIX, X0, steps=3, divergence=p) for p in (None, s.divergence.rademacher(2))],
    "bits_per_dim": lambda: s.bits_per_dim(MIX, X0.long(), steps=3, levels=4, divergence=s.divergence.rademacher(1), samples=2),
    "exact.sample": lambda: [MIX.sample(4), s.Empirical(VP, X0).sample(4, torch.tensor(0.5, dtype=D))],
    "dsm_loss": lambda: s.dsm_loss(MIX, X0, torch.tensor(0.5, dtype=D), loss.edm),
    "nets": lambda: [s.MLP(2, seed=seed) for seed in (0, None)] + [s.UNet((1, 4, 4), channels=8, seed=seed) for seed in (0, None)],
    "fit": lambda: train(s.Preconditioned(s.MLP(2, width=8, depth=1), VP)),
    "fit by generator": lambda: train(s.Preconditioned(s.MLP(2, width=8), VP), generator=torch.Generator()),
    "metrics": lambda: s.metrics.sliced_wasserstein(MIX.sample(9), MIX.sample(9), projections=3),
    "VE.from_data": lambda: s.VE.from_data(X0 + torch.arange(4.0)[:, None]),
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_global_generators_are_not_touched(act):
    assert untouched(ACTS[act])


def test_the_watch_over_generators_works():
    assert not untouched(lambda: torch.randn(1))
    assert not untouched(lambda: np.random.rand())  # noqa: NPY002
    assert not untouched(random.random)


def test_gradients_and_modes_are_left_as_they_were():
    model = s.Preconditioned(network(), VP)
    for mode in (True, False):
        model.train(mode)
        s.sample(model, (2, 2), nfe=5, seeds=range(2))
        assert model.training is mode
    assert torch.is_grad_enabled()
    x = s.sample(model, (2, 2), nfe=5, seeds=range(2)).x
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())


# --- modes and dtypes of networks ----------------------------------------------------------------------------------------
MODELS = {"Mixture": MIX, "MLP": s.Preconditioned(network(), s.Cosine())}  # Cosine derives its f and g by autograd


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_inference_mode_gives_the_same(model):
    """In inference mode tensors carry no gradient: a divergence taken there would read zero, and log p be wrong by 10 nats."""
    x = start(3, torch.float32)
    calls = [
        lambda: s.sample(model, (3, 2), s.Heun(), nfe=9, seeds=range(3)).x,
        lambda: s.sample(model, (3, 2), s.Ancestral(), nfe=9, seeds=range(3)).x,
        lambda: s.sample(model, (3, 2), s.TorchDiffEq(rtol=1e-3, atol=1e-3), seeds=range(3)).x,
        lambda: s.encode(model, x, steps=4).x,
        lambda: s.log_prob(model, x, steps=4).value,
        lambda: s.log_prob(model, x, s.TorchDiffEq(rtol=1e-3, atol=1e-3)).value,
        lambda: s.log_prob(model, x, steps=4, divergence=s.divergence.rademacher(2), seeds=range(3)).value,
        lambda: s.bits_per_dim(model, torch.ones(3, 2).long(), steps=4, levels=4, seeds=range(3)).each,
        lambda: model.sde.diffusion(torch.tensor(0.5, dtype=D)),
    ]
    for call in calls:
        plain = call()
        with torch.inference_mode():
            assert torch.equal(plain, call())
        with torch.no_grad():
            assert torch.equal(plain, call())
    with torch.inference_mode():
        made = s.sample(model, (3, 2), nfe=9, seeds=range(3)).x
    assert torch.equal(s.log_prob(model, made, steps=4).value, s.log_prob(model, made.clone(), steps=4).value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("net", [network, lambda: s.UNet((1, 4, 4), channels=8)], ids=["MLP", "UNet"])
def test_networks_may_run_in_half_precision(net, dtype):
    """The state stays in float32; the samples are the float32 network's to half precision."""
    full, half = s.Preconditioned(net(), VP), s.Preconditioned(net().to(dtype), VP)
    shape = (3, *full.net.shape)
    a, b = (s.sample(model, shape, s.Heun(), nfe=13, seeds=range(3)).x for model in (full, half))
    assert b.dtype == torch.float32
    assert b.isfinite().all()
    assert (a - b).abs().max() < (0.01 if dtype == torch.float16 else 0.1) * (1 + float(a.abs().max()))
    value = s.log_prob(half, a, steps=2, divergence=s.divergence.rademacher(1), seeds=range(3)).value
    assert value.dtype == torch.float32
    assert value.isfinite().all()


def test_a_solver_that_forgets_its_state_or_changes_x_is_told():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Bad(s.Solver):
        kind: str = "state"
        order = 1

        def step(self, oracle, x, t, to, state):
            return {"state": x, "rows": (x[:1], None), "dtype": (x.double(), None)}[self.kind]

    law = s.Gaussian(s.VP(), torch.zeros(2), 0.5)
    with pytest.raises(TypeError, match="return x_s, None"):
        s.sample(law, (2, 2), Bad(), steps=2)
    for kind in ("rows", "dtype"):
        with pytest.raises(ValueError, match="same shape and dtype"):
            s.sample(law, (2, 2), Bad(kind), steps=2)


def test_labels_and_rows_must_agree():
    model = s.Preconditioned(s.MLP(2, width=8, depth=1, classes=3), s.VP())
    with pytest.raises(ValueError, match="7 labels for 4 samples"):
        s.sample(model.condition(torch.zeros(7, dtype=torch.long)), (4, 2), nfe=3)
    with pytest.raises(TypeError, match="a row a sample"):
        model.condition(1)


def test_a_grid_of_the_wrong_length_is_refused():
    law = s.Gaussian(s.VP(), torch.zeros(2), 0.5)
    with pytest.raises(ValueError, match="19 times for 9 steps"):
        s.sample(law, (2, 2), s.DDIM(), nfe=10, grid=lambda sde, n: s.grid.uniform(sde, 2 * n))
