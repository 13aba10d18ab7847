"""The stochastic solvers against diffusers, k-diffusion, torchsde and the published updates, all fed the same noise.

Each side gets the same unit normals in the order it draws them, so that states are compared and not laws: to 1e-8 in float64, to 5e-6
relative where a peer rounds to float32. As in the deterministic suite the peers run on the float64 of their own sigmas and are fed x0 at
the sigma they step with; what lives in VP's x or in z = x / alpha alone is run there, and its formula on every SDE.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import published_sde as ps
import pytest
import torch
from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler
from peers import EXACT, FLOAT32, D, Problem, agree, difference, k_diffusion, problems, ramp, scheduler_run
from published_sde import RHO, begin, ours, replay, sampler
from torch import Tensor

import scoresde as S
from scoresde.sample import final_mean
from scoresde.solvers import Band, bh2, exact

pytestmark = pytest.mark.filterwarnings("ignore:__array_", "ignore:.algorithm_types dpmsolver")  # the schedulers' own
K = k_diffusion()
DIFFERENT = 1e-4  # a pinned difference is above this
SAMPLE = dict(prediction_type="sample", final_sigmas_type="sigma_min")
Multi = partial(diffusers.DPMSolverMultistepScheduler, lower_order_final=False, **SAMPLE)


def agree_to_zero(peer: Callable, p: Problem, solver: S.Solver, x: Tensor, draws: Sequence[Tensor], its: Sequence[Tensor]) -> None:
    """k-diffusion, in z and fed `its` draws, and ours agree above sigma = 0, and its step to 0 is the final mean."""
    for sigmas, scale, finish in ((RHO, p.alpha(RHO[-1]), None), (K.append_zero(RHO), 1.0, final_mean)):
        agree(ours(p, solver, x, p.time(RHO), draws, finish), scale * peer(sigmas, noise_sampler=sampler(its)), EXACT)


# --- DDPM, DDIM, Euler ancestral ---------------------------------------------------------------------------------------------
BOUNDS = {"fixed_small": 0.0, "fixed_small_log": 0.0, "learned_range": 0.3, "fixed_large": 1.0, "fixed_large_log": math.nan}


@pytest.mark.parametrize("dims", [2, 6])
@pytest.mark.parametrize("variance", BOUNDS)
def test_ddpm(variance: str, dims: int, monkeypatch: pytest.MonkeyPatch):
    """The whole chain on `nodes()`. Its last step, from index 0, has no noise and is the mean: it is our final one.

    learned_range is handed v = 2 upper - 1 by the network. fixed_large_log takes the root of a negative logarithm: NaN, pinned.
    """
    upper, n = BOUNDS[variance], 1000 if (variance, dims) == ("fixed_large", 2) else 100
    p = ps.Chain(torch.linspace(0.1 / n, 20 / n, n, dtype=D), dims)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=n, variance_type=variance, prediction_type="sample", clip_sample=False)
    scheduler.alphas_cumprod = (1 - p.betas).cumprod(0)
    x, _, draws = begin(p, n - 1, p.rho)
    replay(monkeypatch, scheduler, draws)
    peer = x
    for t, time in zip(scheduler.timesteps, p.sde.nodes(), strict=True):
        x0 = p.denoiser(peer, time)
        x0 = torch.cat([x0, torch.full_like(x0, 2 * upper - 1)], 1) if variance == "learned_range" else x0
        peer = scheduler.step(x0, int(t), peer).prev_sample
    if variance == "fixed_large_log":
        assert peer.isnan().all()
    else:
        agree(ours(p, S.Ancestral(upper), x, p.sde.nodes(), draws, final_mean), peer, EXACT)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("dims", [2, 6])
def test_ddim(dims: int, eta: float, monkeypatch: pytest.MonkeyPatch):
    """By set_alpha_to_one the last step is the mean, its noise times 0."""
    p = Problem("VP", dims)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(20)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    rho = (1 / scheduler.alphas_cumprod - 1).sqrt()[scheduler.timesteps]
    x, _, draws = begin(p, 20, rho)
    replay(monkeypatch, scheduler, draws)
    peer = x
    for t, r in zip(scheduler.timesteps, rho, strict=True):
        peer = scheduler.step(p.x0(peer, r), int(t), peer, eta=eta).prev_sample
    agree(ours(p, S.DDIM(eta), x, p.time(rho), draws[:-1], final_mean), peer, EXACT)


@problems
def test_ancestral(problem: Problem):
    """k-diffusion's split of the level into down and up is DDIM's eta, and DDPM's lower bound at eta = 1."""
    x, z, draws = begin(problem, 12)
    for solver, eta in ((S.DDIM(0.5), 0.5), (S.DDIM(1.0), 1.0), (S.Ancestral(), 1.0)):
        peer = partial(K.sample_euler_ancestral, problem.x0_of_z, z, disable=True, eta=eta)
        agree_to_zero(peer, problem, solver, x, draws, draws)
    for upper in (0.0, 0.5, 1.0):
        wanted = ps.posterior(problem, x, RHO, iter(draws), upper)
        agree(ours(problem, S.Ancestral(upper), x, problem.time(RHO), draws), wanted, EXACT)


@problems
def test_euler_ancestral_of_diffusers(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """In z, with a state in float32; it draws for its step to 0, the mean, too, times 0."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(20)
    scheduler.is_scale_input_called, scheduler.sigmas = True, scheduler.sigmas.double()
    rho = scheduler.sigmas[:-1]
    x, z, draws = begin(problem, 20, rho)
    replay(monkeypatch, scheduler, draws)
    for t, r in zip(scheduler.timesteps, rho, strict=True):
        z = scheduler.step((z - problem.x0_of_z(z, r)) / r, t, z).prev_sample
    agree(ours(problem, S.DDIM(1.0), x, problem.time(rho), draws[:-1], final_mean), z, FLOAT32)


# --- SDE-DPM-Solver++, SA-Solver, SEEDS, SRA, ER-SDE -------------------------------------------------------------------------
@problems
@pytest.mark.parametrize("karras_sigmas", [False, True], ids=["linspace", "karras"])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_sde_dpmpp_of_diffusers(order: int, kind: str, karras_sigmas: bool, problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """Order 3: a sign is lost in the scheduler's D2, whose factor tends to -1 with h and not to 0. Held to that; ours is seen to differ."""
    scheduler = Multi(solver_order=order, algorithm_type="sde-dpmsolver++", solver_type=kind, use_karras_sigmas=karras_sigmas)
    scheduler.set_timesteps(20)
    rho = scheduler.sigmas.double()[: -1 if karras_sigmas else None]  # it repeats the last
    x, _, draws = begin(problem, len(rho) - 1, rho)
    update = partial(ps.sde_dpmpp, problem, x, rho, orders=ramp(len(draws), order), exact=kind == "heun")
    solver = S.SDEDPMSolverPP(order, weights=exact if kind == "heun" else bh2)
    found = ours(problem, solver, x, problem.time(rho), draws)
    agree(found, update(iter(draws)), EXACT)
    if problem.name == "VP":
        replay(monkeypatch, scheduler, draws)
        peer, as_shipped = scheduler_run(scheduler, problem, x, rho), update(iter(draws), third="diffusers")
        agree(peer, as_shipped, FLOAT32)
        assert (difference(found, as_shipped) > DIFFERENT) == (order == 3)


@problems
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", ["2m midpoint", "2m heun", "3m"])
def test_sde_dpmpp_of_k_diffusion(name: str, eta: float, problem: Problem):
    """eta is our tau^2. 3m has half the third-order term, as its ODE, and exact steps of order 2: held to that, and ours seen to differ."""
    (x, z, draws), order, tau, weights = begin(problem, 12), int(name[0]), math.sqrt(eta), bh2 if "mid" in name else exact
    peer = partial(K.sample_dpmpp_2m_sde, solver_type=name[3:]) if order == 2 else K.sample_dpmpp_3m_sde
    peer = partial(peer, problem.x0_of_z, z, disable=True, eta=eta)
    update = partial(ps.sde_dpmpp, problem, x, RHO, orders=ramp(12, order), tau=tau, exact=weights is exact)
    solver = S.SDEDPMSolverPP(order, tau, weights=weights)
    found = ours(problem, solver, x, problem.time(RHO), draws)
    agree(found, update(iter(draws)), EXACT)
    if order == 2:
        agree_to_zero(peer, problem, solver, x, draws, draws)
    else:
        as_shipped = update(iter(draws), third="k-diffusion")
        agree(problem.alpha(RHO[-1]) * peer(RHO, noise_sampler=sampler(draws)), as_shipped, EXACT)
        assert difference(found, as_shipped) > DIFFERENT


@problems
def test_sde_dpmpp_single_step(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """k-diffusion's and diffusers' draw for half the step and for the whole; given what our two halves add to, both are ours at tau = 1.

    Drawn independently (diffusers) or from a Brownian motion in sigma (k-diffusion, the next test), their correlation alone differs. At
    eta = 1/2 k-diffusion has DDIM's eta of each level: no tau^2 makes (s / r)^(1 + tau^2) of it in the half and the whole step alike.
    """
    (x, z, draws), solver = begin(problem, 24), S.SDEDPMSolverPP(2, singlestep=True)
    joint = ps.with_wholes(draws, RHO)
    peer = partial(K.sample_dpmpp_sde, problem.x0_of_z, z, disable=True)
    agree_to_zero(peer, problem, solver, x, draws, joint)
    if problem.name == "VP":
        scheduler = diffusers.DPMSolverSinglestepScheduler(solver_order=2, algorithm_type="sde-dpmsolver++", **SAMPLE)
        replay(monkeypatch, scheduler, joint)
        agree(scheduler_run(scheduler, problem, x, ps.halves(RHO)), ours(problem, solver, x, problem.time(RHO), draws), EXACT)
    wanted = ps.dpmpp_sde_of_k_diffusion(problem, x, RHO, iter(joint), eta=0.5)
    agree(problem.alpha(RHO[-1]) * peer(RHO, eta=0.5, noise_sampler=sampler(joint)), wanted, EXACT)
    for tau in (0.5, math.sqrt(0.5)):
        solver = S.SDEDPMSolverPP(2, tau, singlestep=True)
        assert difference(ours(problem, solver, x, problem.time(RHO), draws), wanted) > DIFFERENT


def test_the_brownian_tree_of_k_diffusion():
    """Its draw for the whole step is that of one Brownian motion in sigma: the halves weigh as the roots of their lengths, not as ours."""
    p, draws, its = Problem("EDM", 2), [], []
    x = p.start(RHO)
    tree = K.BrownianTreeNoiseSampler(x, RHO[-1], RHO[0], seed=0)
    for r, mid, end in zip(RHO[:-1], ps.halves(RHO)[1::2], RHO[1:], strict=True):
        draws += [tree(r, mid), tree(mid, end)]
        its += [tree(r, mid), tree(r, end)]
        agree(its[-1] * (r - end).sqrt(), (r - mid).sqrt() * draws[-2] + (mid - end).sqrt() * draws[-1], EXACT)
    found = ours(p, S.SDEDPMSolverPP(2, singlestep=True), x, p.time(RHO), draws)
    run = lambda its: K.sample_dpmpp_sde(p.x0_of_z, x, RHO, disable=True, noise_sampler=sampler(its))
    agree(run(ps.with_wholes(draws, RHO)), found, EXACT)
    assert difference(run(its), found) > DIFFERENT


@problems
@pytest.mark.parametrize("n", [20, 8])
@pytest.mark.parametrize("tau", [1.0, 0.5, Band(0.05, 10.0)], ids=["1", "0.5", "band"])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 0), (3, 0), (1, 2), (2, 2), (2, 3), (3, 2), (3, 4), (4, 4)])
def test_sa_solver(predictor: int, corrector: int, tau: Any, n: int, problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """Data prediction. n = 8 with lower_order_final. The scheduler's tau is of its integer timestep: it is told rho instead.

    It draws in every step, ours only where tau > 0. It has no predictor alone (its corrector "of order 1" is implicit Euler): for
    that it is made to forget its last sample. Its orders beyond predictor + 1 are no corrector of ours.
    """
    orders = dict(predictor_order=predictor, corrector_order=max(corrector, 1), lower_order_final=n == 8)
    scheduler = diffusers.SASolverScheduler(prediction_type="sample", tau_func=lambda t: level[int(t)], **orders)
    scheduler.set_timesteps(n)
    rho = scheduler.sigmas.double()
    of = tau if callable(tau) else lambda rho: torch.full_like(rho, tau)
    level = dict(zip(scheduler.timesteps.tolist(), of(rho[:-1]).tolist(), strict=True))
    x, _, draws = begin(problem, n, rho)
    used = [z for z, on in zip(draws, of(rho[:-1]) > 0, strict=True) if on]
    found = ours(problem, S.SASolver(predictor, corrector, tau, lower_final=n == 8), x, problem.time(rho), used)
    agree(found, ps.sa_solver(problem, x, rho, iter(draws), ramp(n, predictor, n == 8), corrector, of), EXACT)
    if problem.name == "VP":
        replay(monkeypatch, scheduler, draws)
        forget = lambda i: corrector or setattr(scheduler, "last_sample", None)
        agree(scheduler_run(scheduler, problem, x, rho, before=forget), found, EXACT)


@problems
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_seeds(degree: int, problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """SEEDS-1 runs in diffusers as sde-dpmsolver of order 1."""
    x, _, draws = begin(problem, 12 * degree)
    found = ours(problem, S.SEEDS(degree), x, problem.time(RHO), draws)
    agree(found, ps.seeds(problem, x, RHO, iter(draws), degree), EXACT)
    if degree == 1 and problem.name == "VP":
        scheduler = Multi(solver_order=1, algorithm_type="sde-dpmsolver")
        replay(monkeypatch, scheduler, draws)
        agree(scheduler_run(scheduler, problem, x, RHO), found, FLOAT32)


@problems
@pytest.mark.parametrize("name", ["SRA1", "SRA3"])
def test_sra(name: str, problem: Problem):
    """Rossler's scheme with its whole tableaux; SRA1 is also torchsde's "srk" for additive noise."""
    (x, _, draws), times = begin(problem, 24), problem.time(RHO)
    found = ours(problem, getattr(S, name)(), x, times, draws)
    agree(found, ps.sra(problem, x, times, iter(draws), ps.SRA[name]), EXACT)
    if name == "SRA1":
        agree(ps.torchsde_srk(problem, x, times, iter(draws)), found, EXACT)


@problems
@pytest.mark.parametrize("phi", ["default", "squared"])
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_er_sde(degree: int, phi: str, problem: Problem):
    x, _, draws = begin(problem, 12)
    solver = S.ERSDE(degree) if phi == "default" else S.ERSDE(degree, lambda rho: rho**2)
    scale = (lambda u: u * (math.exp(u**0.3) + 10)) if phi == "default" else (lambda u: u**2)
    agree(ours(problem, solver, x, problem.time(RHO), draws), ps.er_sde(problem, x, RHO, iter(draws), degree, scale), EXACT)


# --- churn and Restart -------------------------------------------------------------------------------------------------------
CHURNS = {  # (s_churn, s_min, s_max, s_noise); 0.02 is the last level above 0
    "all": (3.0, 0.03, math.inf, 1.0),
    "band": (3.0, 0.05, 10.0, 1.003),
    "capped": (40.0, 0.05, 50.0, 1.003),  # gamma = sqrt 2 - 1
    "to the last": (3.0, 0.0, math.inf, 1.0),
}


@problems
@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize("heun", [True, False], ids=["heun", "euler"])
def test_churn(heun: bool, churn: str, problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """EDM's algorithm 2, k-diffusion's s_churn, which draws in every step, and ours. No churn goes above t_max, where ours would stop.

    Our step to 0 is the final mean, with no churn: theirs has it where s_min is not above the last level ("to the last"), and that alone.
    """
    rho, (s_churn, s_min, s_max, s_noise), last = K.append_zero(RHO), CHURNS[churn], churn == "to the last"
    x, z, draws = begin(problem, 13)
    used, left = [u for u, r in zip(draws, RHO, strict=True) if s_min <= r <= s_max], iter(draws)
    settings = dict(s_churn=s_churn, s_tmin=s_min, s_tmax=s_max, s_noise=s_noise)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: next(left))
        peer = (K.sample_heun if heun else K.sample_euler)(problem.x0_of_z, z, rho, disable=True, **settings)
    agree(ps.edm_stochastic(problem, x, rho, iter(used), *CHURNS[churn], heun=heun), peer, EXACT)
    solver = S.Churn(S.Heun() if heun else S.Euler(), *CHURNS[churn])
    run = partial(ours, problem, solver, x, problem.time(RHO), used[:-1] if last else used)
    found = run(final_mean)
    if last:
        assert difference(found, peer) > DIFFERENT
        up = RHO[-1] * (1 + s_churn / 13)
        found = problem.x0_of_z(run() / problem.alpha(RHO[-1]) + (up**2 - RHO[-1] ** 2).sqrt() * used[-1], up)
    agree(found, peer, EXACT)


LOW, HIGH = float(RHO[9]), float(RHO[8])
BETWEEN = (math.sqrt(LOW * HIGH) + (LOW + HIGH) / 2) / 2  # nearer to LOW, and in the logarithm to HIGH
PASSES = {"one": [(0.3, 2.0, 4, 2)], "two": [(LOW, 0.5, 3, 1), (1.0, 30.0, 5, 3)], "between": [(BETWEEN, 2.0, 4, 2)]}


@problems
@pytest.mark.parametrize("intervals", PASSES.values(), ids=PASSES)
def test_restart(intervals: list[tuple[float, float, int, int]], problem: Problem):
    """Heun's passes. t_min is moved to the nearest level of the grid, in ours by its logarithm: "between" that is another one."""
    x, _, draws = begin(problem, sum(repeats for *_, repeats in intervals))
    found = ours(problem, S.Restart(S.Heun(), intervals), x, problem.time(RHO), draws)
    if intervals is PASSES["between"]:
        assert difference(found, ps.restart(problem, x, RHO, iter(draws), intervals)) > DIFFERENT
        intervals = [(HIGH, *intervals[0][1:])]
    agree(found, ps.restart(problem, x, RHO, iter(draws), intervals), EXACT)


# --- score_sde ---------------------------------------------------------------------------------------------------------------
N = 60
CHAIN = ps.Chain(torch.linspace(0.1 / N, 20 / N, N, dtype=D), 2)
GRIDS = {  # score_sde's own levels: the chain beta_i = beta(i / N) / N, and sigmas uniform in the logarithm
    "VP": (CHAIN, CHAIN.rho),
    "VE": (Problem("VE", 6), torch.linspace(math.log(50.0), math.log(0.01), N, dtype=D).exp()),
}
names = pytest.mark.parametrize("name", GRIDS)


@names
@pytest.mark.parametrize("rule", [ps.reverse_diffusion, ps.ancestral], ids=lambda f: f.__name__)
def test_predictors_of_score_sde(rule: Callable, name: str):
    """Ancestral: its variance under VP is beta, the upper bound, and under VE (SMLD) the lower one.

    Its last step, to t = 0 without noise, is our final mean; by reverse diffusion under VP it is off by the order of beta_0^2.
    """
    p, rho = GRIDS[name]
    x, _, draws = begin(p, N - 1, rho)
    solver = S.ReverseDiffusion() if rule is ps.reverse_diffusion else S.Ancestral(1.0 if name == "VP" else 0.0)
    found = ours(p, solver, x, p.time(rho), draws)
    agree(found, ps.predictor_corrector(p, x, rho, iter(draws), rule), EXACT)
    mean = rule(p, found, K.append_zero(rho), N - 1, iter([torch.zeros_like(x)]))
    off = difference(mean, p.x0(found, rho[-1]))
    assert 1e-7 < off < p.betas[0] if (rule, name) == (ps.reverse_diffusion, "VP") else off < EXACT


@names
def test_euler_maruyama_of_score_sde(name: str, monkeypatch: pytest.MonkeyPatch):
    """Ours with the gap of the grid, (T - eps) / (N - 1) of N points; score_sde, and diffusers' ScoreSdeVpScheduler, have 1 / N for it."""
    p, n = Problem(name, 2), 200
    times = torch.linspace(1.0, 1e-3, n, dtype=D)
    x, _, draws = begin(p, n - 1, p.sde.rho(times))
    found = ours(p, S.EulerMaruyama(), x, times, draws)
    agree(found, ps.euler_maruyama(p, x, times, iter(draws)), EXACT)
    its = ps.euler_maruyama(p, x, times, iter(draws), dt=-1 / n)
    assert difference(found, its) > DIFFERENT
    if name == "VP":
        scheduler = ScoreSdeVpScheduler()
        scheduler.set_timesteps(n)
        replay(monkeypatch, scheduler, draws)
        for t in times[:-1]:
            x, _ = scheduler.step_pred(p.eps(x, p.sde.rho(t)), x, t)  # its score is -output / std
        agree(x, its, EXACT)


@names
@pytest.mark.parametrize("moves", [1, 2])
@pytest.mark.parametrize("batch", [True, False], ids=["langevin", "ald"])
def test_predictor_corrector_of_score_sde(batch: bool, moves: int, name: str):
    """Corrector first. Its Langevin steps by the batch, which ours never does: `BatchNormLangevin` stands in for it.

    Its annealed Langevin steps by sigma, as ours: under VE it is ours, under VP it has a factor alpha_i = 1 - beta_i.
    """
    p, rho = GRIDS[name]
    x, _, draws = begin(p, (N - 1) * (1 + moves), rho)
    rule = partial(ps.langevin, snr=0.16, batch=batch)
    wanted = ps.predictor_corrector(p, x, rho, iter(draws), ps.reverse_diffusion, rule, moves)
    alpha = (lambda s: 1 - CHAIN.betas[round(float(s) * N) - 1]) if name == "VP" else (lambda s: 1.0)
    corrector = ps.BatchNormLangevin(0.16, alpha) if batch else S.Langevin(0.16)
    solver = S.PredictorCorrector(S.ReverseDiffusion(), corrector, moves, corrector_first=True)
    found = ours(p, solver, x, p.time(rho), draws)
    assert difference(found, wanted) < EXACT if batch or name == "VE" else difference(found, wanted) > DIFFERENT


@pytest.mark.parametrize("moves", [1, 2])
def test_score_sde_ve_scheduler(moves: int, monkeypatch: pytest.MonkeyPatch):
    """diffusers' whole loop, whose last mean, of the step to sigma = 0, is our final one after the last moves. Float32 step sizes.

    It steps by `discrete_sigmas` but has the network told `sigmas`, up to 1e-4 of themselves off. Fed the score where it steps it is ours;
    run as its pipeline does it is the formula so fed, and ours is seen to differ.
    """
    p, _ = GRIDS["VE"]
    scheduler: Any = diffusers.ScoreSdeVeScheduler(num_train_timesteps=N, sigma_min=0.01, sigma_max=50.0, snr=0.16)
    scheduler.set_timesteps(N)
    scheduler.set_sigmas(N)
    scheduler.discrete_sigmas = scheduler.discrete_sigmas.double()
    rho, told = scheduler.discrete_sigmas.flip(0), scheduler.sigmas.double()
    assert 5e-5 < difference(told / rho, torch.ones_like(rho)) < 1e-4
    x, _, draws = begin(p, N * (1 + moves), rho)

    def finish(oracle: S.Oracle, y: Tensor, t: Tensor) -> Tensor:
        for _ in range(moves):
            y, _ = corrector.step(oracle, y, t, t, None)
        return final_mean(oracle, y, t)

    corrector = ps.BatchNormLangevin(0.16)
    solver = S.PredictorCorrector(S.ReverseDiffusion(), corrector, moves, corrector_first=True)
    found = ours(p, solver, x, p.time(rho), draws[:-1], finish)  # the last draw is of the step to 0, which returns its mean
    for levels in (rho, told):
        at = lambda r: levels[(rho - r).abs().argmin()]
        fed = SimpleNamespace(name="VE", alpha=torch.ones_like, sigma=at, x0=lambda y, r: p.x0(y, at(r)))
        z, langevin = iter([*draws[:-1], torch.zeros_like(x)]), partial(ps.langevin, snr=0.16)
        wanted = ps.predictor_corrector(fed, x, K.append_zero(rho), z, ps.reverse_diffusion, langevin, moves)
        replay(monkeypatch, scheduler, draws)
        agree(ps.score_sde_ve(scheduler, p, x, levels, moves), wanted, FLOAT32)
        assert difference(found, wanted) > 1e-5 if levels is told else difference(found, wanted) < EXACT
