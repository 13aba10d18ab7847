"""What steps of one's own cost and keep: error against counted NFE of adaptive solvers of the probability flow, ours and the peers', on
exact problems; a stiff sample among easy ones; frozen grids; the adaptive reverse SDE and what redrawn noise would make of it; overhead.

Float64, no final mean, every call of the denoiser counted by a wrapper; NFE is the mean over the samples, which all pay the same where
the batch has one step. The truth is the closed form (image), or Dopri8 at 1e-11, checked against torchdiffeq's dopri8. rtol = atol. Seed
set A is for the pilots of `freeze`, B for every number; the seeds that the controller was chosen on are in neither.

Peers: torchdiffeq through `TorchDiffEq` (dx/dt, each sample within the tolerance), in velocity (our letters), and bare (odeint on dx/dt
with its own norm, over the batch, and t clamped at t_min, which its last step passes); scipy's RK45 (score_sde's black box); k-diffusion's
sample_dpm_adaptive in z = x / alpha, an exact change of variables, with its own step rule.

python benchmarks/adaptive.py            compute what results/adaptive.json lacks (ten minutes on one core), print, draw the figure
    --fresh                              forget the results
    --tables                             only print the tables and draw the figure
"""

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cells as cells_of
import problems
import torch
from PIL import Image
from torch import Tensor
from torchdiffeq import odeint

sys.path.insert(0, str(Path(__file__).parent))
from peers import TooMany, double
from peers.kdiffusion import load

import scoresde
from scoresde import compare, figures, solvers, variables
from scoresde.denoiser import Denoiser, flow
from scoresde.noise import brownian, gaussian, seeded
from scoresde.solve import solve

D = torch.float64
ROOT = Path(__file__).parents[1]
OUT, FIGURE = ROOT / "benchmarks/results/adaptive.json", ROOT / "docs/images/adaptive.png"
ROWS = {"toy": 64, "digits": 16, "image": 4}
FIRST = {"A": 20_000, "B": 40_000}  # seed i of a set is its first seed + i
TOLERANCES = tuple(10.0**-k for k in range(2, 9))
ERRORS = (1e-3, 1e-5, 1e-7)  # at which NFE is compared
DEAR = 2000.0  # evaluations: a contender that would need more (by its last two tolerances) is not run at smaller tolerances
MANY = 100_000


# --- the problems ---------------------------------------------------------------------------------------------------------
@cache
def law_of(problem: str, sde_name: str) -> Denoiser:
    """The laws of `problems`, of classes that take a time a sample."""
    sde = problems.SDES[sde_name]()
    if problem == "digits":
        means, covariance, weights = problems.fitted()
        return scoresde.Mixture(sde, means, covariance=covariance, weights=weights)
    law = problems.PROBLEMS[problem](sde)
    if problem == "image":
        return scoresde.Gaussian(sde, law.means[0], law.tail[0].sqrt())
    return scoresde.Mixture(sde, law.means, law.tail[:, 0].sqrt(), weights=law.log_weights.exp())


def start(law: Denoiser, rows: int, of: str = "B") -> Tensor:
    """x at t_max, the prior's."""
    seeds = range(FIRST[of], FIRST[of] + rows)
    return float(law.sde.prior_std()) * seeded(seeds).initial((rows, *law.shape), D)


@cache
def truth(problem: str, sde_name: str) -> Tensor:
    """The exact flow's end of set B."""
    law = law_of(problem, sde_name)
    x = start(law, ROWS[problem])
    if problem == "image":
        return problems.image(law.sde).flow(x)
    return run(law, x, solvers.Dopri8(1e-11, 1e-11, max_nfe=MANY)).x


def run(law: Denoiser, x: Tensor, solver: solvers.Solver, **kwargs: Any) -> scoresde.Solution:
    return scoresde.sample(law, x.shape, solver, x=x, denoise=False, **kwargs)


def errors(x: Tensor, end: Tensor) -> Tensor:
    """Root mean square over its numbers, a sample."""
    return (x - end).square().flatten(1).mean(1).sqrt()


# --- the contenders -------------------------------------------------------------------------------------------------------
Result = tuple[Tensor, Tensor, float | None]  # the end, NFE of each sample, evaluations of rejected steps (where known)


@dataclass(frozen=True)
class Contender:
    """A solver at a tolerance; kin: the name that its like has in ours; dear: see DEAR."""

    name: str
    solve: Callable[[Denoiser, Tensor, float], Result]
    kin: str = ""
    dear: float = DEAR


def through(make: Callable[[float], solvers.Solver], tells: bool = True) -> Callable[[Denoiser, Tensor, float], Result]:
    """A solver of ours, or one that ours hand over to; tells: of its rejected steps."""

    def go(law: Denoiser, x: Tensor, tolerance: float) -> Result:
        found = run(law, x, make(tolerance))
        return found.x, found.nfe_each, found.ledger["rejected"] if tells else None

    return go


class Bare:
    """dx/dt as one hands it to torchdiffeq, which also tells it what became of a step."""

    def __init__(self, law: Denoiser, rate: Callable[[Denoiser, Tensor, Tensor], Tensor]) -> None:
        self.law, self.rate, self.calls, self.taken, self.rejected = law, rate, 0, 0, 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The derivative, counted."""
        self.calls += 1
        return self.rate(self.law, x, t.clamp(self.law.sde.t_min, self.law.sde.t_max))

    def callback_accept_step(self, *_: Any) -> None:
        """The evaluations since the last step were of one taken,"""
        self.taken = self.calls

    def callback_reject_step(self, *_: Any) -> None:
        """or of one refused."""
        self.rejected += self.calls - self.taken
        self.taken = self.calls


def bare(method: str, rate: Callable[[Denoiser, Tensor, Tensor], Tensor] = flow) -> Callable[[Denoiser, Tensor, float], Result]:
    """torchdiffeq as it comes."""

    def go(law: Denoiser, x: Tensor, tolerance: float) -> Result:
        f = Bare(law, rate)
        times = torch.tensor([law.sde.t_max, law.sde.t_min], dtype=D)
        with torch.no_grad():
            end = odeint(f, x, times, rtol=tolerance, atol=tolerance, method=method)[-1]
        return end, torch.full((len(x),), f.calls), f.rejected

    return go


def k_diffusion(order: int) -> Callable[[Denoiser, Tensor, float], Result]:
    """sample_dpm_adaptive at eta = 0, h_init, PID and safety its own; z = x / alpha."""
    k = load()

    def go(law: Denoiser, x: Tensor, tolerance: float) -> Result:
        sde, calls = law.sde, 0
        ends = torch.tensor([sde.t_max, sde.t_min], dtype=D)
        top, bottom = sde.rho(ends).tolist()

        def model(z: Tensor, rho: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > MANY:
                raise TooMany(f"more than {MANY} evaluations")
            t = sde.time(-2 * rho[0].log()).clamp(sde.t_min, sde.t_max)
            return law(sde.alpha(t) * z, t)

        with double():
            z, info = k.sample_dpm_adaptive(
                model, x / sde.alpha(ends[0]), bottom, top, disable=True, order=order, rtol=tolerance, atol=tolerance, eta=0.0,
                noise_sampler=lambda *_: 0.0, return_info=True,
            )  # fmt: skip
        return sde.alpha(ends[1]) * z, torch.full((len(x),), calls), order * info["n_reject"]

    return go


def contenders() -> list[Contender]:
    tde, dp = solvers.TorchDiffEq, solvers.DPMAdaptive
    found = [
        Contender("Dopri5", through(lambda e: solvers.Dopri5(e, e, max_nfe=MANY)), "Dopri5"),
        Contender("Dopri8", through(lambda e: solvers.Dopri8(e, e, max_nfe=MANY)), "Dopri8"),
        Contender("DPMAdaptive(2)", through(lambda e: dp(2, e, e, max_nfe=MANY)), "DPMAdaptive(2)"),
        Contender("DPMAdaptive(3)", through(lambda e: dp(3, e, e, max_nfe=MANY)), "DPMAdaptive(3)"),
        Contender("Adaptive(Heun())", through(lambda e: solvers.Adaptive(solvers.Heun(), rtol=e, atol=e, max_nfe=MANY))),
        Contender("Dopri5 in dx/dt", through(lambda e: solvers.Dopri5(e, e, variables.time, max_nfe=MANY))),
        Contender("Dopri8 in dx/dt", through(lambda e: solvers.Dopri8(e, e, variables.time, max_nfe=MANY))),
    ]
    for n in (5, 8):
        for label, var in (("", variables.time), (" in velocity", variables.velocity)):
            make = lambda e, n=n, var=var: tde(f"dopri{n}", e, e, max_nfe=MANY, variable=var)
            found.append(Contender(f"TorchDiffEq dopri{n}{label}", through(make), f"Dopri{n}"))
        found.append(Contender(f"torchdiffeq dopri{n}, bare", bare(f"dopri{n}"), f"Dopri{n}"))
    black_box = through(lambda e: solvers.ScipyIVP("RK45", e, e, max_nfe=MANY), tells=False)
    found.append(Contender("ScipyIVP RK45", black_box, "Dopri5"))
    return found + [Contender(f"k-diffusion dpm_adaptive({n})", k_diffusion(n), f"DPMAdaptive({n})", 1.5 * DEAR) for n in (2, 3)]


OURS = ("Dopri5", "Dopri8", "DPMAdaptive(2)", "DPMAdaptive(3)", "Adaptive(Heun())", "Dopri5 in dx/dt", "Dopri8 in dx/dt")


# --- cells ----------------------------------------------------------------------------------------------------------------
class Cells(cells_of.Cells):
    """The results of this benchmark."""

    path = OUT
    failures = (ArithmeticError, AssertionError, TooMany, ValueError, scoresde.UnfinishedError)

    def curve(self, problem: str, sde: str, who: str) -> list[tuple[float, dict[str, Any]]]:
        """(tolerance, cell) where there is an error to read."""
        found = [(e, self.rows.get(f"flow | {problem} | {sde} | {who} | {e:.0e}", {})) for e in TOLERANCES]
        return [(e, row) for e, row in found if "rms" in row]


CASES = list(itertools.product(ROWS, problems.SDES))


def check_truth(problem: str, sde: str) -> dict[str, Any]:
    """Largest difference from torchdiffeq's dopri8 at 1e-11 over up to eight rows, solved one by one, and each row's conditioning:

    how much the end moves where x_T moves by 1e-5 of the prior's std, over 1e-5, in the worst of four directions.
    """
    law, end = law_of(problem, sde), truth(problem, sde)
    x, few = start(law, len(end)), min(8, len(end))
    other = run(law, x[:few], solvers.TorchDiffEq("dopri8", 1e-11, 1e-11, max_nfe=MANY, variable=variables.velocity), microbatch=1)
    step, generator = 1e-5 * float(law.sde.prior_std()), torch.Generator().manual_seed(0)
    moved = torch.stack(
        [
            errors(run(law, x + step * torch.randn(x.shape, dtype=D, generator=generator), solvers.Dopri8(1e-9, 1e-9)).x, end)
            for _ in range(4)
        ]
    ).amax(0)
    moved = moved / 1e-5  # a relative change of the noise
    return {
        "difference": float(errors(other.x, end[:few]).max()), "conditioning, median": float(moved.median()),
        "conditioning, max": float(moved.max()),
    }  # fmt: skip


def work_precision(cells: Cells) -> None:
    """Every contender at every tolerance."""
    for problem, sde in CASES:
        cells.fill(f"truth | {problem} | {sde}", lambda p=problem, s=sde: check_truth(p, s))
        for who in contenders():
            past: list[float] = []
            for e in TOLERANCES:

                def one(p: str = problem, s: str = sde, who: Contender = who, e: float = e) -> dict[str, Any]:
                    end, law = truth(p, s), law_of(p, s)
                    x = start(law, len(end))
                    y, nfe, rejected = who.solve(law, x, e)
                    at = torch.tensor(law.sde.t_min, dtype=D)
                    own = errors(y / (size := e * (law.sde.alpha(at) + law.sde.sigma(at) + end.abs())), end / size)
                    off, mean = errors(y, end), float(nfe.double().mean())
                    return {
                        "rms": float(off.square().mean().sqrt()), "max": float(off.max()), "median": float(off.median()), "nfe": mean,
                        "nfe max": int(nfe.max()), "rejected": None if rejected is None else rejected / mean,
                        "own rms": float(own.square().mean().sqrt()), "own max": float(own.max()),
                    }  # fmt: skip

                if len(past) > 1 and past[-1] ** 2 / past[-2] > who.dear:
                    break
                past.append(cells.fill(f"flow | {problem} | {sde} | {who.name} | {e:.0e}", one).get("nfe", math.inf))


# --- a stiff sample among easy ones ---------------------------------------------------------------------------------------
class Shaken(Denoiser):
    """x0 of a law, and in some rows a fast oscillation: amount_i sin(rate logsnr)."""

    amount: Tensor

    def __init__(self, law: Denoiser, amount: Tensor, rate: float) -> None:
        super().__init__(law.sde)
        self.law, self.rate = law, rate
        self.register_buffer("amount", amount)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The mean of the law, shaken."""
        return self.law(x, t) + self.amount[:, None] * (self.rate * self.sde.logsnr(t)).sin()

    def select(self, index: Any) -> Denoiser:
        """The same rows of the amounts."""
        return Shaken(self.law.select(index), self.amount[index], self.rate)


def mate(sde: str, solver: solvers.Solver) -> dict[str, Any]:
    """65 samples of which the last is stiff, and the first one alone; microbatch 65 for both, so that the network sees the same rows."""
    law = law_of("toy", sde)
    x = start(law, 65)
    amount = torch.zeros(65, dtype=D)
    amount[-1] = 0.3
    whole = Shaken(law, amount, 30.0)
    found = run(whole, x, solver, microbatch=65)
    alone = run(whole.select(torch.tensor([0])), x[:1], solver, microbatch=65)
    easy = run(whole.select(torch.arange(64)), x[:64], solver)
    return {
        "nfe": float(found.nfe_each.double().mean()), "easy": float(found.nfe_each[:-1].double().mean()),
        "stiff": int(found.nfe_each[-1]), "without the stiff one": float(easy.nfe_each.double().mean()),
        "first": int(found.nfe_each[0]), "first alone": int(alone.nfe_each[0]), "same bits": bool((alone.x[0] == found.x[0]).all()),
    }  # fmt: skip


MATES = {
    "Dopri5": lambda e: solvers.Dopri5(e, e, max_nfe=MANY),
    "TorchDiffEq dopri5": lambda e: solvers.TorchDiffEq("dopri5", e, e, max_nfe=MANY),
    "TorchDiffEq dopri5 in velocity": lambda e: solvers.TorchDiffEq("dopri5", e, e, max_nfe=MANY, variable=variables.velocity),
}


# --- frozen grids ---------------------------------------------------------------------------------------------------------
FROZEN = {
    "Dopri5 1e-3": solvers.Dopri5(1e-3, 1e-3),
    "Dopri5 1e-5": solvers.Dopri5(1e-5, 1e-5),
    "Dopri8 1e-5": solvers.Dopri8(1e-5, 1e-5),
    "DPMAdaptive(3)": solvers.DPMAdaptive(3),
}


def frozen(problem: str, sde: str, solver: solvers.Adaptive) -> dict[str, Any]:
    """Errors on set B of the adaptive run, and of who runs on the grid of a pilot on set A."""
    law, end = law_of(problem, sde), truth(problem, sde)
    x, pilot = start(law, len(end)), start(law, 16 if problem == "digits" else 64, "A")
    ran = run(law, x, solver)
    row: dict[str, Any] = {"nfe": float(ran.nfe_each.double().mean()), "rms": float(errors(ran.x, end).square().mean().sqrt())}
    for label, fixed in (("frozen", None), ("moulton", solvers.AdamsMoulton(5)), ("single", solver.solver)):
        found = scoresde.freeze(law, pilot.shape, solver, x=pilot, fixed=fixed)
        again = run(law, x, found.solver, times=found.times)
        row[label] = {
            "who": "own steps" if found.solver == solver.solver else str(found.solver).replace("order=5, variable=velocity", "5"),
            "nfe": again.nfe,
            "steps": len(found.times) - 1, "rms": float(errors(again.x, end).square().mean().sqrt()),
        }  # fmt: skip
        row["pilot"] = float(found.pilot.nfe_each.double().mean())
    return row


# --- the adaptive reverse SDE ---------------------------------------------------------------------------------------------
NUMBERS, WIDTHS = 1 << 14, (1, 16, 256)


def normal(sde: str, width: int) -> tuple[Denoiser, float]:
    """N(0, 1/4), and the std of x at t_min."""
    law = scoresde.Gaussian(problems.SDES[sde](), torch.zeros(width, dtype=D), 0.5)
    t = torch.tensor(law.sde.t_min, dtype=D)
    return law, float((law.sde.alpha(t) ** 2 / 4 + law.sde.sigma(t) ** 2).sqrt())


def stochastic(sde: str, width: int, kind: str) -> dict[str, Any]:
    """std of the samples over the exact one, of a loop that keeps the path of a step it makes again, or draws new noise."""
    law, std = normal(sde, width)
    rows, span = NUMBERS // width, (law.sde.t_min, law.sde.t_max)
    seeds = range(FIRST["B"], FIRST["B"] + rows)
    x = law.sample(rows, torch.tensor(law.sde.t_max, dtype=D), seeds=seeds)
    source = brownian(seeds, *span) if kind == "path" else gaussian(torch.Generator().manual_seed(FIRST["B"]))
    source.path = True  # or the solver would refuse it: that is the point
    with torch.no_grad():
        found = solve(law, x, solvers.AdaptiveSDE(), torch.tensor(span[::-1], dtype=D), source, None)
    nfe = float(found.nfe_each.double().mean())
    return {
        "ratio": float(found.x.square().mean().sqrt()) / std, "nfe": nfe, "nfe max": found.nfe,
        "rejected": found.ledger["rejected"] / nfe, "rows": rows,
    }  # fmt: skip


def frozen_sde(sde: str, width: int = 16) -> dict[str, Any]:
    """The same of ImprovedEuler on the grid of a pilot of AdaptiveSDE."""
    law, std = normal(sde, width)
    at = torch.tensor(law.sde.t_max, dtype=D)
    seeds = {k: range(i, i + n) for (k, i), n in zip(FIRST.items(), (64, NUMBERS // width), strict=True)}
    found = scoresde.freeze(law, (64, width), solvers.AdaptiveSDE(), x=law.sample(64, at, seeds=seeds["A"]), seeds=seeds["A"])
    again = run(law, law.sample(len(seeds["B"]), at, seeds=seeds["B"]), found.solver, times=found.times, seeds=seeds["B"])
    return {"ratio": float(again.x.square().mean().sqrt()) / std, "nfe": again.nfe}


# --- overhead -------------------------------------------------------------------------------------------------------------
class Trivial(Denoiser):
    """x0 = x / (1 + rho^2): nearly no cost."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """A factor of x."""
        return x * (1 / (1 + t * t)).to(x.dtype)


def speed(shape: tuple[int, ...], repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds an evaluation of Dopri5 and of torchdiffeq bare on (x - x0) / t, EDM at 1e-4, the least over repeats, taking turns."""
    law = Trivial(scoresde.EDM())
    x = 80 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    runs = {"ours": through(lambda e: solvers.Dopri5(e, e)), "bare": bare("dopri5", lambda law, x, t: (x - law(x, t)) / t)}
    best, nfe = dict.fromkeys(runs, math.inf), {}
    for _ in range(repeats):
        for name, go in runs.items():
            began = time.perf_counter()
            _, each, _ = go(law, x, 1e-4)
            nfe[name] = int(each.max())
            best[name] = min(best[name], (time.perf_counter() - began) / nfe[name])
    return {
        "ours, us": best["ours"] * 1e6,
        "bare, us": best["bare"] * 1e6,
        "ratio": best["ours"] / best["bare"],
        **{f"nfe {k}": n for k, n in nfe.items()},
    }


SHAPES = {"(64, 64)": ((64, 64), 30), "(256, 3, 32, 32)": ((256, 3, 32, 32), 3)}


def compute(cells: Cells) -> None:
    work_precision(cells)
    for (p, s), (name, solver) in itertools.product(CASES, FROZEN.items()):
        cells.fill(f"freeze | {p} | {s} | {name}", lambda p=p, s=s, solver=solver: frozen(p, s, solver))
    for s, (name, make), e in itertools.product(problems.SDES, MATES.items(), (1e-3, 1e-5)):
        cells.fill(f"mate | {s} | {name} | {e:.0e}", lambda s=s, make=make, e=e: mate(s, make(e)))
    for s, width, kind in itertools.product(problems.SDES, WIDTHS, ("path", "redrawn")):
        cells.fill(f"sde | {s} | {width} | {kind}", lambda s=s, w=width, k=kind: stochastic(s, w, k))
    for s in problems.SDES:
        cells.fill(f"frozen sde | {s}", lambda s=s: frozen_sde(s))
    for (name, (shape, repeats)), dtype in itertools.product(SHAPES.items(), (torch.float32, torch.float64)):
        cells.fill(f"speed | {name} | {dtype}", lambda a=shape, n=repeats, d=dtype: speed(a, n, d))
    cells.save()


# --- report ---------------------------------------------------------------------------------------------------------------
def cost_at(curve: Sequence[tuple[float, dict[str, Any]]], error: float, of: str = "rms") -> float | None:
    """NFE at an error (rms, or max: the worst sample's), log-log between the last two tolerances on both sides of it; or None."""
    found = None
    for (_, a), (_, b) in itertools.pairwise(curve):
        if a[of] >= error > b[of]:
            part = math.log(a[of] / error) / math.log(a[of] / b[of])
            found = math.exp(math.log(a["nfe"]) + part * math.log(b["nfe"] / a["nfe"]))
    return found


def ratios(cells: Cells, who: str, peer: str, of: str = "rms") -> dict[tuple[str, str, float], tuple[float, float]]:
    """(problem, SDE, error): the NFE of both, where both curves reach."""
    found = {}
    for (p, s), e in itertools.product(CASES, ERRORS):
        both = [cost_at(cells.curve(p, s, n), e, of) for n in (who, peer)]
        if None not in both:
            found[p, s, e] = (both[0], both[1])
    return found


def equal_error(cells: Cells) -> Iterator[str]:
    """NFE at equal error, a table a pair, then the summary."""
    pairs = [(c.kin, c.name) for c in contenders() if c.kin and c.name not in OURS]
    pairs += [(f"Dopri{n} in dx/dt", f"TorchDiffEq dopri{n}") for n in (5, 8)]
    summary = []
    for mine, group in itertools.groupby(sorted(pairs, key=lambda pair: OURS.index(pair[0])), key=lambda pair: pair[0]):
        names = [peer for _, peer in group]
        found = {n: ratios(cells, mine, n) for n in names}
        rows = []
        for (p, s), e in itertools.product(CASES, ERRORS):
            nfe = cost_at(cells.curve(p, s, mine), e)
            row = {"case": f"{p} {s}", "error": f"{e:.0e}", "nfe": "-" if nfe is None else f"{nfe:.0f}"}
            for i, f in enumerate(found.values()):
                if (p, s, e) in f:
                    ours, theirs = f[p, s, e]
                    row[f"n{i}"] = f"{theirs:.0f} ({ours / theirs:.2f})"
            rows.append(row)
        heads = {"problem": "{case}", "rms error": "{error}", mine: "{nfe}"} | {n: f"{{n{i}}}" for i, n in enumerate(names)}
        yield f"\nNFE at equal error: {mine}, and each peer's (ours over the peer's)\n"
        yield compare.table(rows, heads)
        for n, f in found.items():
            r = {k: a / b for k, (a, b) in f.items()}
            if r:
                by_max = statistics.geometric_mean(a / b for a, b in ratios(cells, mine, n, "max").values())
                worst, least = max(r, key=r.__getitem__), min(r, key=r.__getitem__)
                summary.append(
                    {"ours": mine, "peer": n, "cells": len(r), "mean": statistics.geometric_mean(r.values()), "least": r[least],
                     "worst": r[worst], "where": f"{worst[0]} {worst[1]} at {worst[2]:.0e}", "over": sum(v > 1 for v in r.values()),
                     "by max": by_max}
                )  # fmt: skip
    yield "\nOurs over the peer's NFE at equal error, over problems, SDEs and errors\n"
    yield compare.table(
        summary,
        {"ours": "{ours}", "peer": "{peer}", "cells": "{cells}", "geometric mean": "{mean:.2f}", "least": "{least:.2f}",
         "worst": "{worst:.2f}", "where": "{where}", "above 1": "{over}",
         "mean at equal error of the worst sample": "{by max:.2f}"},
    )  # fmt: skip


def kept(cells: Cells) -> Iterator[str]:
    """The error over the tolerance asked for."""
    rows = []
    for who in contenders():
        all_ = [((p, s, e), row) for p, s in CASES for e, row in cells.curve(p, s, who.name)]
        by = {k: max(all_, key=lambda item, k=k: item[1][k] / item[0][2]) for k in ("median", "rms", "max")}
        worst = {k: row[k] / e for k, ((_, _, e), row) in by.items()}
        worst |= {k: max(row[k] for _, row in all_) for k in ("own rms", "own max")}
        where = {k: f"{p} {s} {e:.0e}" for k, ((p, s, e), _) in by.items()}
        over = sum(row["rms"] > 10 * e for (_, _, e), row in all_)
        rows.append({"who": who.name, "cells": len(all_), **worst, **{f"at {k}": w for k, w in where.items()}, "over": over,
                     "mean": statistics.geometric_mean(row["rms"] / e for (_, _, e), row in all_)})  # fmt: skip
    yield (
        "\nError over the tolerance: of all samples (rms), of the worst sample (max) and of the median one; own measure: entry by "
        "entry over rtol |x| + atol (alpha + sigma), as a step's error is measured; the largest cell of each\n"
    )
    yield compare.table(
        rows,
        {"solver": "{who}", "cells": "{cells}", "rms, geometric mean": "{mean:.2f}", "rms": "{rms:.1f}", "where": "{at rms}",
         "cells above 10": "{over}", "max": "{max:.1f}", "where ": "{at max}", "median": "{median:.1f}",
         "own measure, rms": "{own rms:.1f}", "own, max": "{own max:.1f}"},
    )  # fmt: skip
    missed = [
        f"{who} {p} {s} {e:.0e}: {row['rms'] / e:.1f}"
        for who in OURS
        for p, s in CASES
        for e, row in cells.curve(p, s, who)
        if row["rms"] > 10 * e
    ]
    yield f"\nours above 10 (rms): {'; '.join(missed) or 'none'}"
    yield "\nThe problems: how far the end moves where x_T moves by a part of its std, over that part; truth against torchdiffeq\n"
    rows = [{"case": f"{p} {s}", **cells.rows[f"truth | {p} | {s}"]} for p, s in CASES]
    yield compare.table(
        rows,
        {"problem": "{case}", "median": "{conditioning, median:.2g}", "worst row": "{conditioning, max:.3g}",
         "check of the truth": "{difference:.1e}"},
    )  # fmt: skip


def some(cells: Cells) -> Iterator[str]:
    """NFE and error at two tolerances."""
    for e in (1e-3, 1e-5):
        yield f"\nAt tolerance {e:.0e}: NFE / rms error over the tolerance\n"
        rows = []
        for who in contenders():
            row = {"who": who.name}
            for p, s in CASES:
                cell = dict(cells.curve(p, s, who.name)).get(e)
                row |= {} if cell is None else {f"{p} {s}": f"{cell['nfe']:.0f} / {cell['rms'] / e:.2g}"}
            shares = [
                c["rejected"] for p, s in CASES if (c := dict(cells.curve(p, s, who.name)).get(e)) and c["rejected"] is not None
            ]
            rows.append(row | ({"rejected": 100 * statistics.mean(shares)} if shares else {}))
        heads = {"solver": "{who}"} | {f"{p} {s}": f"{{{p} {s}}}" for p, s in CASES} | {"rejected, %": "{rejected:.0f}"}
        yield compare.table(rows, heads)


def others(cells: Cells) -> Iterator[str]:
    """The mate, freeze, the SDE, overhead."""
    rows = []
    for s, e in itertools.product(problems.SDES, (1e-3, 1e-5)):
        mine = cells.rows[f"mate | {s} | Dopri5 | {e:.0e}"]
        for name in MATES:
            cell = cells.rows[f"mate | {s} | {name} | {e:.0e}"]
            rows.append({"sde": s, "tol": e, "who": name, **cell, "share": mine["nfe"] / cell["nfe"]})
    yield "\nOne stiff sample among 64 easy ones of the toy\n"
    yield compare.table(
        rows,
        {"SDE": "{sde}", "tolerance": "{tol:.0e}", "solver": "{who}", "mean NFE": "{nfe:.0f}", 
         "without the stiff one": "{without the stiff one:.0f}",
         "easy ones": "{easy:.0f}", "stiff one": "{stiff}", "first, alone": "{first alone}", "first, in the batch": "{first}",
         "the same bits": "{same bits}", "Dopri5 / this": "{share:.2f}"},
    )  # fmt: skip
    rows = []
    for (p, s), name in itertools.product(CASES, FROZEN):
        cell = cells.rows[f"freeze | {p} | {s} | {name}"]
        row: dict[str, Any] = {"case": f"{p} {s}", "who": name, "nfe": cell["nfe"], "rms": cell["rms"]}
        for k in ("frozen", "moulton", "single"):
            row |= {f"{k} {key}": v for key, v in cell[k].items()} | {f"{k} ratio": cell[k]["rms"] / cell["rms"]}
        rows.append(row)
    yield (
        "\nFrozen: the adaptive run of set B, and on the grid of a pilot on set A whom `freeze` takes, AdamsMoulton(5), and the own "
        "single steps of the method: rms error over that of the adaptive run\n"
    )
    yield compare.table(
        rows,
        {"problem": "{case}", "solver": "{who}", "mean NFE": "{nfe:.0f}", "rms error": "{rms:.1e}",
         "frozen": "{frozen who}", "NFE": "{frozen nfe}",
         "error / adaptive": "{frozen ratio:.2f}", "AdamsMoulton(5)": "{moulton ratio:.2f}", "NFE ": "{moulton nfe}",
         "own steps": "{single ratio:.2f}", "NFE  ": "{single nfe}"},
    )  # fmt: skip
    for k in ("frozen", "moulton", "single"):
        values = [r[f"{k} ratio"] for r in rows]
        missed = [f"{r['case']} {r['who']} {r[f'{k} ratio']:.2f}" for r in rows if r[f"{k} ratio"] > 1.2]
        mean, worst = statistics.geometric_mean(values), max(values)
        yield f"\n{k}: geometric mean {mean:.2f}, worst {worst:.2f}; above 1.2: {'; '.join(missed) or 'none'}"
    rows = []
    for s, w in itertools.product(problems.SDES, WIDTHS):
        path, redrawn = (cells.rows[f"sde | {s} | {w} | {k}"] for k in ("path", "redrawn"))
        row = {"sde": s, "w": w, **{f"p {k}": v for k, v in path.items()}, **{f"r {k}": v for k, v in redrawn.items()}}
        rows.append(row | ({f"f {k}": v for k, v in cells.rows[f"frozen sde | {s}"].items()} if w == 16 else {}))
    spread = 1 / math.sqrt(2 * NUMBERS)
    yield (
        f"\nAdaptiveSDE on N(0, 1/4): std over the exact one (standard error {spread:.1%}), the rejected step's path kept or noise drawn "
        "anew; frozen: ImprovedEuler on the grid of a pilot\n"
    )
    share = lambda r, k: f"{100 * r[k]:.0f}"
    rows = [r | {k: share(r, k) for k in ("p rejected", "r rejected")} for r in rows]
    yield compare.table(
        rows,
        {"SDE": "{sde}", "D": "{w}", "path kept": "{p ratio:.3f}", "NFE": "{p nfe:.0f}", "rejected, %": "{p rejected}",
         "drawn anew": "{r ratio:.3f}", "NFE ": "{r nfe:.0f}", "rejected, % ": "{r rejected}", "frozen": "{f ratio:.3f}",
         "frozen NFE": "{f nfe}"},
    )  # fmt: skip
    rows = [
        {"shape": k, "type": str(d)[6:], **cells.rows[f"speed | {k} | {d}"]} for k in SHAPES for d in (torch.float32, torch.float64)
    ]
    yield "\nMicroseconds an evaluation with a trivial denoiser\n"
    yield compare.table(
        rows,
        {"shape": "{shape}", "state": "{type}", "Dopri5": "{ours, us:.0f}", "torchdiffeq, bare": "{bare, us:.0f}", "ratio": "{ratio:.2f}",
         "NFE": "{nfe ours}", "NFE, bare": "{nfe bare}"},
    )  # fmt: skip


def report(cells: Cells) -> Iterator[str]:
    """All tables."""
    head = cells.head
    yield f"{head['machine']}, {head['threads']} thread; {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"
    yield f"rows {head['rows']}, seeds {head['seeds']}; {head['seconds']:.0f} s in all"
    for part in (some, equal_error, kept, others):
        yield from part(cells)
    bad = [f"{name}: {row['error']}" for name, row in cells.rows.items() if "error" in row]
    yield f"\nwithout a number: {'; '.join(bad) or 'none'}"


PAGE = (  # what docs/adaptive.md shows
    "Ours over the peer's NFE", "Error over the tolerance", "One stiff sample", "Frozen:", "AdaptiveSDE on",
)  # fmt: skip


def page(cells: Cells) -> str:
    """The tables of docs/adaptive.md, with their titles."""
    lines, made = list(report(cells)), []
    for title, table in itertools.pairwise(lines):
        if title.strip().startswith(PAGE):
            made += [title.strip() + ":", table]
    head = cells.head
    told = (
        f"{lines[0]}. Rows: {', '.join(f'{n} of {k}' for k, n in head['rows'].items())}; seeds of set B, those of a pilot of set A."
    )
    return "\n\n".join([told, *made])


LINES = {  # colour, line, marker
    "Dopri5": (0, "-", "o"), "TorchDiffEq dopri5": (0, "--", ""), "ScipyIVP RK45": (6, ":", ""), "Dopri8": (1, "-", "s"),
    "TorchDiffEq dopri8": (1, "--", ""), "DPMAdaptive(3)": (2, "-", "^"), "k-diffusion dpm_adaptive(3)": (2, "--", ""),
    "Adaptive(Heun())": (3, "-", "v"),
}  # fmt: skip


def draw(cells: Cells, path: Path) -> None:
    """Error against NFE, a panel a problem and SDE."""
    figure, axes = figures._new(len(ROWS), len(problems.SDES), 11.0, 9.5)
    for axis, (p, s) in zip(axes.flat, CASES, strict=True):
        for name, (colour, line, marker) in LINES.items():
            curve = [row for _, row in cells.curve(p, s, name)]
            style = {"color": figures.COLOURS[colour], "ls": line, "marker": marker, "ms": 3.5, "lw": 1.4}
            axis.loglog([r["nfe"] for r in curve], [r["rms"] for r in curve], label=name, **style)
        axis.set(title=f"{p}, {s}", xlim=(9, 2500), ylim=(2e-9, 1))
        axis.grid(alpha=0.3, which="major", lw=0.4)
    for axis in axes[-1]:
        axis.set_xlabel("NFE a sample (mean, counted)")
    for axis in axes[:, 0]:
        axis.set_ylabel("rms error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figures._save(figure, path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes


def main() -> None:
    parser = cells_of.options(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stored = cells_of.stored(OUT, args)
    if args.tables and stored:
        cells = Cells(stored, stored.pop("cells"))
    else:
        head: dict[str, Any] = cells_of.machine() | {
            "rows": ROWS,
            "seeds": {k: f"from {i}" for k, i in FIRST.items()}, "tolerances": list(TOLERANCES),
            "sdes": {n: repr(k()) for n, k in problems.SDES.items()},
            "unit": "rms, max, median: error of a sample against the exact flow; own: the same entry by entry over rtol |x| + atol "
            "(alpha + sigma); nfe: mean over samples; rejected: share of them; seconds: wall time",
            "seconds": stored["seconds"] if stored else 0.0,
        }  # fmt: skip
        fixed = ("rows", "seeds", "tolerances", "sdes")
        cells_of.check_same(stored, head, fixed, OUT)
        print(json.dumps(head, indent=1), flush=True)
        cells = Cells(head, stored["cells"] if stored else {})
        try:
            compute(cells)
        except KeyboardInterrupt:
            cells.save()
            raise
    for line in report(cells):
        print(line, flush=True)
    sys.path.insert(0, str(ROOT / "docs"))
    import markers

    markers.fill(ROOT / "docs/adaptive.md", "adaptive", page(cells))
    draw(cells, FIGURE)


if __name__ == "__main__":
    main()
