"""What a likelihood costs: solver error against evaluations, ours and the peers', on exact laws and a trained network; the noise of
probes at equal products; forward against reverse mode; whether the estimate of the solver's error is honest.

Float64 states, every call counted. In forward-equivalents with one probe a call is 4 for score_sde (its drift, then its divergence passes
the network again, forward and back), 3 for k-diffusion, for odeint on dx/dt and for ours where the trace is taken (one pass and a
vector-Jacobian product, taken as 2; in forward mode 2 in all), 1 for ours at a stage within a step, where none is: for ours it is what the
ledger says. Errors are in bits/dim, |log p - truth| / (D log 2), with the trace exact, so that no noise of probes is in them: in closed
form for `digits`, by one probe of signs for `image`, whose J is diagonal, by 64 products for `unet` (whose weights are float32). All have
the same prior: the exact p_T of the laws, N(0, 1) for the network. Truth: the closed form, or for the network AdamsMoulton(5, x0) in 160
evaluations; in 96, the same on a float64 copy, and Dopri8 on that at 1e-6 show that it stands still.

The rule for ours is fixed: what `log_prob(nfe=)` takes, in the least evaluations that meet the bounds on set A; set B tells the numbers.
The peers' tolerances are the cheapest that meet them on B itself.

Peers: score_sde's recipe (scipy's RK45 on dx/dt and d log p/dt, the batch as one vector, Song et al. 2021, app. D.2), k-diffusion's
`log_likelihood` (torchdiffeq's dopri5 in sigma, atol = rtol = 1e-4) and torchdiffeq's dopri5 on dx/dt as flow matching has it: the same
functions with an exact trace, written here; that of k-diffusion is compared with the original where one probe is exact.

python benchmarks/likelihood.py          compute what results/likelihood.json lacks (17 minutes on one core), print, fill
                                         docs/likelihood.md, draw; the first time trains the network of 8x8 digits (two minutes)
    --fresh                              forget the results
    --tables                             only print the tables, fill docs/likelihood.md and draw the figure
    --fashion FOLDER                     the network of fashion.py (default benchmarks/weights/fashion)
"""

import csv
import hashlib
import itertools
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import cells as cells_of
import fashion
import numpy as np
import problems
import scipy.integrate
import torch
from PIL import Image
from torch import Tensor
from torchdiffeq import odeint

sys.path.insert(0, str(Path(__file__).parent))
from peers import TooMany
from peers.kdiffusion import load

import scoresde
from scoresde import checkpoint, compare, demo, figures, solvers, variables
from scoresde import grid as grids
from scoresde.denoiser import Denoiser
from scoresde.divergence import Divergence, Jacobian, Mode, coloured, exact, gaussian, hutchpp, rademacher
from scoresde.noise import seeded

D = torch.float64
ROOT = Path(__file__).parents[1]
OUT, FIGURE, PAGE = (
    ROOT / "benchmarks/results/likelihood.json",
    ROOT / "docs/images/likelihood_cost.png",
    ROOT / "docs/likelihood.md",
)
TRAINED = ROOT / "runs/likelihood/digits"
FIRST = {"A": 20_000, "B": 40_000}  # seed i of a set is its first seed + i
ROWS = {"digits": 64, "image": 16, "unet": 8}
CASES = [("digits", "VP"), ("digits", "VE"), ("digits", "EDM"), ("image", "VP"), ("image", "VE"), ("unet", "VP")]
MEAN, WORST = 1e-3, 1e-2  # bits/dim: the bounds
MANY = 20_000


# --- problems -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Told(Divergence):
    """tr J as a function of (jacobian, x) says, `[B]`: a closed form, or one that looks on."""

    say: Callable[[Jacobian, Tensor], Tensor]
    random = False

    def probes(self, noise: Any, x: Tensor) -> Tensor:
        """None."""
        return x.new_zeros(0, *x.shape)

    def trace(self, jacobian: Jacobian, x: Tensor, probes: Tensor) -> Tensor:
        """As told, `[1, B]`."""
        return self.say(jacobian, x)[None]


class Digits(problems.Full):
    """The mixture with a time a row, which keeps the trace of d x0 / dx of its last call: alpha / sigma^2 tr Cov[x0 | x]."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x]; t () or `[B, 1]`."""
        a, s = (c.reshape(-1, 1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        v = a**2 * self.spectrum + s**2  # [B, K, D]
        raw = (x @ self.bases - a[:, 0] * self.along).view(len(x), *self.spectrum.shape)
        p = (self.log_weights - v.log().sum(2) / 2 - (raw.square() / v).sum(2) / 2).softmax(1)
        means = torch.einsum("bkr,kdr->bkd", raw * (a * self.spectrum / v), self.basis) + self.means
        x0 = torch.einsum("bk,bkd->bd", p, means)
        within, between = (self.spectrum * s**2 / v).sum(2), (means - x0[:, None]).square().sum(2)
        self.kept = (a / s**2)[:, 0, 0] * (p * (within + between)).sum(1)
        return x0


@dataclass(frozen=True)
class Case:
    """A model, states of it, and what their log-densities are."""

    model: Denoiser
    divergence: Divergence
    x: Tensor
    truth: Tensor
    prior: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        """Nats in a bit/dim."""
        return self.x[0].numel() * math.log(2)

    def error(self, value: Tensor) -> dict[str, float]:
        """Of log-densities, bits/dim."""
        off = (value - self.truth).double() / self.bits
        return {"mean": float(off.abs().mean()), "max": float(off.abs().max()), "bias": float(off.mean())}


def ends(sde: scoresde.LinearSDE) -> tuple[Tensor, Tensor]:
    return torch.tensor(sde.t_min, dtype=D), torch.tensor(sde.t_max, dtype=D)


@cache
def unet() -> Denoiser:
    """The demo's network of 8x8 digits under VP, by its recipe; trained once."""
    if not (TRAINED / "model.safetensors").exists():
        demo.train("VP", demo.Settings(), TRAINED, 0)
    return checkpoint.load(TRAINED)


@cache
def unet_double() -> Denoiser:
    """A float64 copy."""
    return checkpoint.load(TRAINED).double()


def unet_states(of: str) -> Tensor:
    """Held-out digits, uniformly dequantized, as states at t_min."""
    n = ROWS["unet"]
    images = demo.digits(0)[2]["AB".index(of) * n :][:n]
    u = seeded(range(FIRST[of], FIRST[of] + n)).uniform(torch.empty(n, *demo.SHAPE, dtype=D), scoresde.noise.DEQUANTIZE)
    return unet().sde.alpha(ends(unet().sde)[0]) * demo.CELLS.to_model(images, u)


def unet_truth(of: str, nfe: int, double: bool = False, rows: int = ROWS["unet"]) -> dict[str, Any]:
    """Log-densities of a set by AdamsMoulton(5, x0) with the exact trace, or (nfe 0) by Dopri8 at 1e-6."""
    solver = solvers.AdamsMoulton(5, variables.x0) if nfe else solvers.Dopri8(1e-6, 1e-6)
    kwargs: Any = {"nfe": nfe} if nfe else {}
    model = unet_double() if double else unet()
    found = scoresde.log_prob(model, unet_states(of)[:rows], solver, divergence=exact(), **kwargs)
    return {"value": found.value.tolist(), "nfe": found.nfe}


TRUTHS: dict[str, tuple[Any, ...]] = {
    "A": ("A", 160), "B": ("B", 160), "B, 96 evaluations": ("B", 96), "B, 96 evaluations, float64": ("B", 96, True, 2),
    "B, Dopri8 1e-6, float64": ("B", 0, True, 1),
}  # fmt: skip


def case(cells: "Cells", problem: str, sde_name: str, of: str = "B") -> Case:
    if problem == "unet":
        truth = torch.tensor(cells.rows[f"truth | {of}"]["value"], dtype=D)
        return Case(unet(), exact(), unet_states(of), truth, unet().sde.prior_log_prob)
    return law(problem, sde_name, of)


@cache
def law(problem: str, sde_name: str, of: str) -> Case:
    """A case in closed form."""
    sde = problems.SDES[sde_name]()
    low, high = ends(sde)
    seeds = range(FIRST[of], FIRST[of] + ROWS[problem])
    model: Any
    divergence: Divergence
    if problem == "digits":
        model = Digits(sde, *problems.fitted())

        def say(jacobian: Jacobian, x: Tensor) -> Tensor:
            jacobian.record("divergence", 2.0)  # booked as one product
            return (jacobian.x0, model.kept)[1]

        divergence = Told(say)
    else:
        model, divergence = problems.image(sde), rademacher(1)  # J is diagonal: any signs give its trace
    x = model.sample(len(seeds), low, seeds=seeds)
    return Case(model, divergence, x, model.log_prob(x, low), lambda z: model.log_prob(z, high))


def check_law(problem: str, sde_name: str) -> dict[str, float]:
    """Largest relative difference of a case's mean and trace from the library's own law by exact(), over times and eight rows;

    and of k-diffusion's own log_likelihood from what is written here, nats, where its one probe is exact.
    """
    this = law(problem, sde_name, "A")
    means, sde = 0.0, this.model.sde
    traces = 0.0
    plain = problems.PROBLEMS[problem](sde)
    plain.forward = partial(scoresde.Mixture.forward, plain)
    for t in torch.linspace(sde.t_min, sde.t_max, 4, dtype=D):
        x = this.model.sample(8, t, seeds=range(8))
        x0, trace = both(this, x, t)
        jacobian = Jacobian(lambda v, t=t: plain(v, t), x, Mode("reverse", x.device), lambda *_: None)
        if problem == "image":  # of 3072 products, 64
            some = torch.eye(3072, dtype=D)[:64, None].expand(64, 8, 3072)
            known = this.model.tail[0] * sde.alpha(t) / (sde.alpha(t) ** 2 * this.model.tail[0] + sde.sigma(t) ** 2)
            off = (jacobian(some) - some * known).abs().max() + (trace - known.sum()).abs().max() / known.sum()
            traces = max(traces, float(off))
        else:
            truth = exact().trace(jacobian, x, x)[0].detach()
            traces = max(traces, float((trace - truth).abs().max() / truth.abs().max()))
        means = max(means, float((x0 - jacobian.x0).abs().max() / jacobian.x0.abs().max()))
    found = {"mean": means, "trace": traces}
    if problem == "image":
        calls = 0
        rho = sde.rho(torch.stack(ends(sde)))

        def model(z: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            t = sde.time(-2 * sigma[0].log())
            return this.model(sde.alpha(t) * z, t)

        theirs, info = load().log_likelihood(model, this.x / sde.alpha(ends(sde)[0]), float(rho[0]), float(rho[1]))
        z, gain, spent = in_sigma(this, 1e-4)
        ours = torch.distributions.Normal(0, float(rho[1])).log_prob(z).sum(1) + gain
        found |= {"k-diffusion": float((theirs - ours).abs().max()), "its calls": info["fevals"], "ours": spent}
    return found


# --- contenders -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def both(of: Case, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and the trace of d x0 / dx `[B]` at one time."""
    jacobian = Jacobian(lambda v: of.model(v, t), x, Mode("reverse", x.device), lambda *_: None)
    trace = of.divergence.trace(jacobian, x, of.divergence.probes(seeded(range(len(x))), x))[0]
    return jacobian.x0.detach(), trace.detach()


class Rate:
    """dx/dt of the probability flow and its divergence, f x - g^2/2 score, counted."""

    def __init__(self, of: Case) -> None:
        self.case, self.calls = of, 0

    def __call__(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both at one time."""
        self.calls += 1
        if self.calls > MANY:
            raise TooMany(f"more than {MANY} evaluations")
        sde, d = self.case.model.sde, x[0].numel()
        x0, trace = both(self.case, x, t)
        a, s, f, g = sde.alpha(t), sde.sigma(t), sde.drift_coefficient(t), sde.diffusion(t)
        return f * x - g**2 / 2 * (a * x0 - x) / s**2, f * d - g**2 / 2 * (a * trace - d) / s**2


Found = tuple[Tensor, float, int, float]  # log-densities, evaluations a sample: mean and largest, forward-equivalents


def score_sde(of: Case, tolerance: float) -> Found:
    """Song et al. 2021's recipe: [x of the whole batch, log p] is one vector of RK45's."""
    rate, sde, b = Rate(of), of.model.sde, len(of.x)

    def f(t: float, y: np.ndarray) -> np.ndarray:
        dx, dl = rate(torch.tensor(t, dtype=D), torch.tensor(y[:-b]).reshape(of.x.shape))
        return torch.cat([dx.flatten(), dl]).numpy()

    first = torch.cat([of.x.flatten(), torch.zeros(b, dtype=D)]).numpy()
    found = scipy.integrate.solve_ivp(f, (sde.t_min, sde.t_max), first, rtol=tolerance, atol=tolerance, method="RK45")
    end = torch.tensor(found.y[:, -1])
    return of.prior(end[:-b].reshape(of.x.shape)) + end[-b:], rate.calls, rate.calls, 4 * rate.calls


def in_sigma(of: Case, tolerance: float) -> tuple[Tensor, Tensor, int]:
    """k-diffusion's log_likelihood in z = x / alpha with any trace: (z, gain, evaluations)."""
    sde, calls, d = of.model.sde, 0, of.x[0].numel()
    rho = sde.rho(torch.stack(ends(sde)))

    def f(sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls > MANY:
            raise TooMany(f"more than {MANY} evaluations")
        z, t = state[0], sde.time(-2 * sigma.log())
        a = sde.alpha(t)
        x0, trace = both(of, a * z, t)
        return (z - x0) / sigma, (d - a * trace) / sigma

    z = of.x / sde.alpha(ends(sde)[0])
    zs, gains = odeint(f, (z, z.new_zeros(len(z))), rho, atol=tolerance, rtol=tolerance, method="dopri5")
    return zs[-1], gains[-1], calls


def k_diffusion(of: Case, tolerance: float) -> Found:
    """The same as log-densities of x, with this case's prior."""
    z, gain, calls = in_sigma(of, tolerance)
    low, high = (of.model.sde.alpha(t) for t in ends(of.model.sde))
    return of.prior(high * z) + gain + of.x[0].numel() * (high / low).log(), calls, calls, 3 * calls


def dxdt(of: Case, tolerance: float) -> Found:
    """torchdiffeq's dopri5 on (dx/dt, d log p/dt)."""
    rate = Rate(of)
    times = torch.stack(ends(of.model.sde))
    start = (of.x, of.x.new_zeros(len(of.x)))
    xs, gains = odeint(lambda t, y: rate(t, y[0]), start, times, rtol=tolerance, atol=tolerance, method="dopri5")
    return of.prior(xs[-1]) + gains[-1], rate.calls, rate.calls, 3 * rate.calls


def ours(make: Callable[[float], solvers.Solver | None], of: Case, setting: float, **kwargs: Any) -> Found:
    """log_prob in `setting` evaluations, or at that tolerance; no solver: its own choice."""
    solver = make(setting)
    kwargs |= {} if solver is not None and solver.adaptive else {"nfe": int(setting)}
    found = scoresde.log_prob(of.model, of.x, solver, prior=of.prior, divergence=of.divergence, seeds=range(len(of.x)), **kwargs)
    ledger, products = found.ledger, of.x[0].numel() if isinstance(of.divergence, exact) else 1
    cost = ledger["score"] + ledger["denoise"] + ledger["divergence"] / products
    if isinstance(of.divergence, rademacher):
        assert cost == ledger["network"] + ledger["divergence"]
    return found.value, float(found.solution.nfe_each.double().mean()), found.nfe, cost


BUDGETS = (12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 80, 96)
DECADES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HALVES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)


@dataclass(frozen=True)
class Contender:
    """Who, at which settings (evaluations or tolerances), and at which of them on the network, where a call takes half a second."""

    name: str
    run: Callable[[Case, float], Found]
    settings: tuple[float, ...]
    few: tuple[float, ...] = ()


RULE = "log_prob(nfe=)"
EARLY = "AdamsBashforth(3), rectified(1.5)"
PATH: dict[str, Any] = {"grid": partial(grids.rectified, power=1.5)}
CONTENDERS = [
    Contender(RULE, partial(ours, lambda _: None), BUDGETS, (24, 32, 40)),
    Contender(EARLY, partial(ours, lambda _: solvers.AdamsBashforth(3), **PATH), BUDGETS[2:], (24, 28, 32, 36, 40, 48, 64)),
    Contender("DPMSolverPP(2)", partial(ours, lambda _: solvers.DPMSolverPP(2)), BUDGETS, (32,)),
    Contender("AdamsMoulton(4, x0)", partial(ours, lambda _: solvers.AdamsMoulton(4, variables.x0)), BUDGETS, (24, 32, 40)),
    Contender("Heun", partial(ours, lambda _: solvers.Heun()), BUDGETS[::2]),
    Contender("Dopri5", partial(ours, lambda e: solvers.Dopri5(e, e, max_nfe=MANY)), DECADES, (1e-2, 1e-3)),
    Contender("Dopri8", partial(ours, lambda e: solvers.Dopri8(e, e, max_nfe=MANY)), DECADES),
    Contender("DPMAdaptive(3)", partial(ours, lambda e: solvers.DPMAdaptive(3, e, e, max_nfe=MANY)), DECADES[:-1]),
    Contender("ScipyIVP RK45", partial(ours, lambda e: solvers.ScipyIVP("RK45", e, e, max_nfe=MANY)), DECADES),
    Contender("score_sde RK45", score_sde, HALVES, (1e-2, 3e-3, 1e-3, 1e-4, 1e-5)),
    Contender("k-diffusion dopri5", k_diffusion, DECADES, (1e-3, 1e-4)),
    Contender("torchdiffeq dopri5, dx/dt", dxdt, DECADES, (1e-3, 1e-5)),
]
PEERS = ("score_sde RK45", "k-diffusion dopri5", "torchdiffeq dopri5, dx/dt")


# --- cells ----------------------------------------------------------------------------------------------------------------
class Cells(cells_of.Cells):
    """The results of this benchmark."""

    path = OUT
    failures = (ArithmeticError, TooMany, scoresde.UnfinishedError)

    def digits(self, name: str) -> int:
        """Twelve of the truths, from which errors are cut."""
        return 12 if name.startswith("truth") else 5

    def curve(self, problem: str, sde: str, who: str, of: str = "B") -> list[tuple[float, dict[str, Any]]]:
        """(setting, cell) where there is an error to read, the cheapest first."""
        start = f"cost | {problem} | {sde} | {who} | {of} | "
        found = [(float(name[len(start) :]), row) for name, row in self.rows.items() if name.startswith(start) and "mean" in row]
        return sorted(found, key=lambda item: item[1]["nfe"])


def meets(row: dict[str, Any]) -> bool:
    """Whether the bounds are kept."""
    return row["mean"] <= MEAN and row["max"] <= WORST


def cost(cells: Cells) -> None:
    """Every contender at every setting on set B, and the rule's on set A."""
    for problem, sde in CASES:
        if problem == "unet":
            for name, how in TRUTHS.items():
                cells.fill(f"truth | {name}", partial(unet_truth, *how))
        else:
            cells.fill(f"check | {problem} | {sde}", partial(check_law, problem, sde))
        for who in CONTENDERS:
            for setting, of in itertools.product(who.few if problem == "unet" else who.settings, "BA"):
                if of == "A" and who.name != RULE:
                    continue

                def one(
                    p: str = problem, s: str = sde, who: Contender = who, setting: float = setting, of: str = of
                ) -> dict[str, Any]:
                    this = case(cells, p, s, of)
                    value, nfe, most, spent = who.run(this, setting)
                    return this.error(value) | {"nfe": nfe, "nfe max": most, "forward-equivalents": spent}

                cells.fill(f"cost | {problem} | {sde} | {who.name} | {of} | {setting:g}", one)


# --- the noise of probes --------------------------------------------------------------------------------------------------
NFE, SEEDS = 32, 64
ALONG: dict[str, Any] = {"solver": solvers.AdamsBashforth(3), "nfe": NFE, **PATH}  # the path, on which the noise hardly depends
PROBED = {"digits": 16, "fashion": 2}  # images
KINDS: dict[str, Callable[[int], Divergence]] = {
    "rademacher": rademacher,
    "rademacher, frozen": partial(rademacher, frozen=True),
    "gaussian": gaussian,
    "coloured, one chain": lambda k: coloured(k, 1),
    "coloured, one chain, frozen": lambda k: coloured(k, 1, frozen=True),
    "coloured, two chains": lambda k: coloured(k // 2, 2),
    "hutchpp": lambda k: hutchpp(k, 1),
}
PRODUCTS: dict[str, tuple[int, ...]] = {
    "rademacher": (1, 2, 4, 6, 8, 12, 16), "rademacher, frozen": (1, 2, 4, 8, 16), "gaussian": (2, 4, 8, 16),
    "coloured, one chain": (2, 4, 6, 8, 12, 16), "coloured, one chain, frozen": (2, 4, 8, 16), "coloured, two chains": (4, 8, 12, 16),
    "hutchpp": (6, 12),
}  # fmt: skip


class Nothing(Denoiser):
    """x0 = 0."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


@cache
def weights(sde: scoresde.LinearSDE) -> list[float]:
    """d log p / d tr_n of the trace that is asked for n-th: log p is affine in them, whatever the model."""
    n = itertools.count()

    def say(_: Jacobian, x: Tensor) -> Tensor:
        told, k = x.new_zeros(len(x)), next(n)
        told[k] = 1.0
        return told

    value = scoresde.log_prob(Nothing(sde), torch.zeros(NFE + 1, 1, dtype=D), **ALONG, divergence=Told(say)).value
    return (value[: next(n)] - value[-1]).tolist()


def spread(model: Denoiser, x: Tensor, direct: bool) -> dict[str, Any]:
    """Root mean square over seeds of log p by probes less log p by the exact trace, bits/dim, of x `[1, *shape]`.

    The path is the same for all: it is solved once, J is made whole at each evaluation (D products), and the divergences of the library
    are given that matrix. direct: what log_prob itself returns for four of the seeds, and how far that is from this, nats.
    """
    w = weights(model.sde)
    made = {(kind, k): KINDS[kind](k) for kind, ks in PRODUCTS.items() for k in ks if k < x[0].numel()}
    noise = {key: seeded(range(FIRST["B"], FIRST["B"] + SEEDS)) for key in made}
    kept: dict[Any, Tensor] = {}
    off = {key: torch.zeros(SEEDS, dtype=D) for key in made}
    shares = dict.fromkeys(("diagonal", "off it"), 0.0)
    n, d, shape = itertools.count(), x[0].numel(), x.shape[1:]
    like = torch.zeros(SEEDS, *shape)

    def say(jacobian: Jacobian, x: Tensor) -> Tensor:
        step = next(n)
        unit = torch.eye(d, dtype=x.dtype)
        rows = torch.cat([jacobian(v).flatten(1) for v in unit.reshape(d, 1, *shape).split(64)])  # of J: e_i' J
        matrix, trace = rows.float(), float(rows.trace())
        product: Any = lambda v: (v.flatten(2) @ matrix).reshape(v.shape)
        for key, divergence in made.items():
            if key not in kept or not divergence.frozen:
                kept[key] = divergence.probes(noise[key], like)
            off[key] += w[step] * (divergence.trace(product, like, kept[key]).mean(0).double() - trace)
        s = (rows + rows.T) / 2
        shares["diagonal"] += w[step] ** 2 * float(s.diagonal().square().sum())
        shares["off it"] += w[step] ** 2 * float((s - s.diagonal().diag()).square().sum())
        return torch.full((1,), trace, dtype=x.dtype)

    truth = scoresde.log_prob(model, x, **ALONG, divergence=Told(say)).value
    assert next(n) == len(w)
    bits = d * math.log(2)
    row: dict[str, Any] = {f"{kind} {k}": float(v.square().mean().sqrt()) / bits for (kind, k), v in off.items()}
    row["formula: rademacher 1"] = math.sqrt(2 * shares["off it"]) / bits
    row["formula: gaussian 1"] = math.sqrt(2 * (shares["off it"] + shares["diagonal"])) / bits
    if direct:
        seeds = range(FIRST["B"], FIRST["B"] + 4)
        worst = 0.0
        for key in (("rademacher", 2), ("rademacher, frozen", 2), ("coloured, one chain", 4)):
            found = scoresde.log_prob(model, x.expand(4, *shape), **ALONG, divergence=made[key], seeds=seeds)
            worst = max(worst, float((found.value - truth - off[key][:4]).abs().max()))
        row["log_prob itself, nats off"] = worst
    return row


@cache
def fashion_net(folder: Path) -> Denoiser:
    return checkpoint.load(folder)


def probed(name: str, folder: Path) -> tuple[Denoiser, Tensor]:
    """A network and states of held-out images."""
    if name == "digits":
        sets = [unet_states(of) for of in "AB"]
        return unet(), torch.cat(sets)[: PROBED[name]]
    n, model = PROBED[name], fashion_net(folder)
    images = fashion.images("t10k")[:n].long()
    u = seeded(range(FIRST["B"], FIRST["B"] + n)).uniform(torch.empty(n, *fashion.SHAPE, dtype=D), scoresde.noise.DEQUANTIZE)
    return model, model.sde.alpha(ends(model.sde)[0]) * fashion.CELLS.to_model(images, u)


def probes(cells: Cells, folder: Path | None) -> None:
    for name, n in PROBED.items():
        if name == "fashion" and folder is None:
            continue
        for i in range(n):

            def one(name: str = name, i: int = i) -> dict[str, Any]:
                model, x = probed(name, folder or Path())
                return spread(model, x[i : i + 1], i == 0)

            cells.fill(f"probes | {name} | {i}", one)


# --- modes ----------------------------------------------------------------------------------------------------------------
DIVERGENCES = {"1 product": rademacher(1), "2 products": rademacher(2), "8 products": rademacher(8), "exact": exact()}


def modes(model: Denoiser, shape: tuple[int, ...], rows: int, repeats: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of x0 with its divergence over those of x0 alone, the least over repeats, taking turns."""
    x = seeded(range(rows)).initial((rows, *shape), torch.float32)
    t = torch.tensor(0.3, dtype=D)

    def plain() -> None:
        with torch.no_grad():
            model(x, t)

    def one(divergence: Divergence, mode: str) -> None:
        with torch.no_grad():
            jacobian = Jacobian(lambda v: model(v, t), x, Mode(mode, x.device), lambda *_: None)
            divergence.trace(jacobian, x, divergence.probes(seeded(range(rows)), x))

    jobs = {(name, mode): partial(one, DIVERGENCES[name], mode) for name in names for mode in ("forward", "reverse")}
    best = dict.fromkeys(("plain", *jobs), math.inf)
    for _ in range(repeats):
        for key, job in {**jobs, "plain": plain}.items():
            for _ in range(3 if key == "plain" else 1):
                began = time.perf_counter()
                job()
                best[key] = min(best[key], time.perf_counter() - began)
    return {"plain, ms": best["plain"] * 1e3, "rows": rows, **{f"{n}, {m}": best[n, m] / best["plain"] for n, m in jobs}}


def mlp() -> Denoiser:
    net = scoresde.MLP(64)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):  # away from its zero start
            p.add_(0.01 * seeded([i]).initial((1, *p.shape), torch.float32)[0])
    return scoresde.Preconditioned(net, scoresde.VP())


def timing(cells: Cells, folder: Path | None) -> None:
    few, all_ = tuple(DIVERGENCES)[:3], tuple(DIVERGENCES)
    cells.fill("modes | MLP(64), 256 rows", lambda: modes(mlp(), (64,), 256, 7, all_))
    cells.fill("modes | U-Net 1x8x8, 16 rows", lambda: modes(unet(), (1, 8, 8), 16, 5, all_))
    if folder is not None:
        net = lambda: fashion_net(folder)
        cells.fill("modes | U-Net 1x28x28, 8 rows", lambda: modes(net(), (1, 28, 28), 8, 5, few))
        cells.fill("modes | U-Net 1x28x28, 1 row", lambda: modes(net(), (1, 28, 28), 1, 2, all_))


# --- the estimate of the solver's error ------------------------------------------------------------------------------------
ESTIMATED: dict[str, tuple[Callable[[float], solvers.Solver | None], tuple[float, ...]]] = {
    RULE: (lambda _: None, (16, 24, 32, 48, 64)),
    "DPMSolverPP(2)": (lambda _: solvers.DPMSolverPP(2), (16, 24, 32, 48, 64)),
    "Dopri5": (lambda e: solvers.Dopri5(e, e), (1e-3, 1e-4, 1e-5, 1e-6)),
}


def estimated(sde: str, make: Callable[[float], solvers.Solver | None], setting: float) -> dict[str, Any]:
    """solver_error over the true error of each image of set B, and how many images it falls short of."""
    this, solver = law("digits", sde, "B"), make(setting)
    kwargs: Any = {} if solver is not None and solver.adaptive else {"nfe": int(setting)}
    found = scoresde.log_prob(this.model, this.x, solver, prior=this.prior, divergence=this.divergence, solver_error=True, **kwargs)
    true = (found.value - this.truth).abs()
    ratio = found.solver_error / true
    return {
        "nfe": float(found.solution.nfe_each.double().mean()), "evaluations of the estimate": found.ledger["solver_error"],
        "true, mean": float(true.mean()) / this.bits, "estimate, mean": float(found.solver_error.mean()) / this.bits,
        "median ratio": float(ratio.median()), "10th percentile": float(ratio.quantile(0.1)),
        "short": float((true > found.solver_error).double().mean()),
        "short by 3": float((true > 3 * found.solver_error).double().mean()),
    }  # fmt: skip


def honesty(cells: Cells) -> None:
    for sde, (name, (make, settings)) in itertools.product(("VP", "VE"), ESTIMATED.items()):
        for setting in settings:
            cells.fill(f"estimate | {sde} | {name} | {setting:g}", partial(estimated, sde, make, setting))


# --- report ---------------------------------------------------------------------------------------------------------------
def chosen(cells: Cells, problem: str, sde: str) -> tuple[float, dict[str, Any]] | None:
    """The rule's least evaluations on set A, and its cell on set B."""
    on_b = dict(cells.curve(problem, sde, RULE))
    n = next((n for n, row in cells.curve(problem, sde, RULE, "A") if meets(row)), None)
    return None if n is None else (n, on_b[n])


def cheapest(cells: Cells, problem: str, sde: str, who: str) -> tuple[float, dict[str, Any]] | None:
    """The cheapest setting that meets the bounds on set B."""
    return next(((e, row) for e, row in cells.curve(problem, sde, who) if meets(row)), None)


def told(row: dict[str, Any], setting: float, who: str) -> str:
    """Evaluations and errors of a cell."""
    tolerance = f" at {setting:.0e}" if setting < 1 else ""
    return f"{row['nfe']:.0f}{tolerance}: {row['mean']:.1e} / {row['max']:.1e}"


def targets(cells: Cells) -> Iterator[str]:
    """What the bounds cost, the rule against score_sde."""
    yield (
        f"\nEvaluations: mean / largest error over images of set B, bits/dim, at mean <= {MEAN:g} and max <= {WORST:g}; ratios: "
        f"{RULE} over score_sde, in forward-equivalents, in plain evaluations\n"
    )
    rows = []
    for p, s in CASES:
        mine, recipe, least = chosen(cells, p, s), dict(cells.curve(p, s, PEERS[0])).get(1e-5), cheapest(cells, p, s, PEERS[0])
        row: dict[str, Any] = {"case": f"{p} {s}"}
        if mine is not None:
            row["mine"] = f"{told(mine[1], mine[0], RULE)}{'' if meets(mine[1]) else ' (misses the bounds on B)'}"
        for key, at, other in (("recipe", 1e-5, recipe), ("least", least and least[0], least and least[1])):
            if other:
                row[key] = told(other, at, PEERS[0])
                if mine is not None:
                    spent, plain = (mine[1][k] / other[k] for k in ("forward-equivalents", "nfe"))
                    row[f"{key} ratio"] = f"{spent:.2f}, {plain:.2f}"
        rows.append(row)
    yield compare.table(
        rows,
        {"problem": "{case}", f"{RULE}, chosen on A": "{mine}", "score_sde RK45 at 1e-5": "{recipe}", "ratio": "{recipe ratio}",
         "score_sde RK45, cheapest that does": "{least}", "ratio ": "{least ratio}"},
    )  # fmt: skip


def cheapest_each(cells: Cells) -> Iterator[str]:
    """Every contender's cheapest."""
    yield (
        "\nThe cheapest setting of each that meets the bounds on set B (chosen there): evaluations a sample; in brackets "
        "forward-equivalents with one probe\n"
    )
    rows = []
    for who in CONTENDERS:
        row = {"who": who.name}
        for p, s in CASES:
            if found := cheapest(cells, p, s, who.name):
                e, cell = found
                row[f"{p} {s}"] = f"{cell['nfe']:.0f} ({cell['forward-equivalents']:.0f}){f' {e:.0e}' if e < 1 else ''}"
        rows.append(row)
    yield compare.table(rows, {"solver": "{who}"} | {f"{p} {s}": f"{{{p} {s}}}" for p, s in CASES})


def curves(cells: Cells) -> Iterator[str]:
    """Everything of part one."""
    for p, s in CASES:
        rows = [
            {"who": who.name, "setting": f"{e:g}", **row, "fe": row["forward-equivalents"]}
            for who in CONTENDERS
            for e, row in cells.curve(p, s, who.name)
        ]
        yield f"\n{p} {s}: error of set B, bits/dim\n"
        yield compare.table(
            rows,
            {"solver": "{who}", "setting": "{setting}", "evaluations": "{nfe:.0f}", "largest": "{nfe max}", 
             "forward-equivalents": "{fe:.0f}", "mean": "{mean:.1e}", "max": "{max:.1e}", "bias": "{bias:.1e}"},
        )  # fmt: skip


def defaults(cells: Cells) -> Iterator[str]:
    """The defaults of each, as they come."""
    yield "\nAs each comes: evaluations at its default tolerance: mean / largest error of set B, bits/dim\n"
    own = (("Dopri5", 1e-5, "log_prob, no budget"), ("score_sde RK45", 1e-5, ""), ("ScipyIVP RK45", 1e-5, ""),
           ("k-diffusion dopri5", 1e-4, ""), ("torchdiffeq dopri5, dx/dt", 1e-5, ""))  # fmt: skip
    rows = []
    for who, e, note in own:
        row: dict[str, Any] = {"who": f"{who}{f' ({note})' if note else ''}", "tolerance": f"{e:.0e}"}
        for p, s in CASES:
            cell = dict(cells.curve(p, s, who)).get(e)
            row |= {} if cell is None else {f"{p} {s}": f"{cell['nfe']:.0f}: {cell['mean']:.1e} / {cell['max']:.1e}"}
        rows.append(row)
    yield compare.table(rows, {"solver": "{who}", "rtol = atol": "{tolerance}"} | {f"{p} {s}": f"{{{p} {s}}}" for p, s in CASES})


def over_images(cells: Cells, name: str) -> dict[str, float]:
    """Root mean square over the images of each column."""
    found = [row for key, row in cells.rows.items() if key.startswith(f"probes | {name} | ") and "error" not in row]
    keys = (
        [k for k in found[0] if isinstance(found[0][k], float) and k not in ("seconds", "log_prob itself, nats off")]
        if found
        else []
    )
    return {k: math.sqrt(statistics.mean(row[k] ** 2 for row in found)) for k in keys}


def noises(cells: Cells) -> Iterator[str]:
    """Part two."""
    for name in PROBED:
        found = over_images(cells, name)
        if not found:
            continue
        n = sum(key.startswith(f"probes | {name} | ") for key in cells.rows)
        ks = sorted({k for of in PRODUCTS.values() for k in of})
        yield (
            f"\nU-Net of {name}: rms deviation of log p over {SEEDS} seeds and {n} images by the probes' noise, 1e-3 bits/dim, by "
            f"products an evaluation; {EARLY}, {NFE} evaluations\n"
        )
        rows = []
        for kind in KINDS:
            row: dict[str, Any] = {"who": kind}
            rows.append(row | {f"k{k}": f"{1e3 * found[f'{kind} {k}']:.3g}" for k in ks if f"{kind} {k}" in found})
        yield compare.table(rows, {"divergence": "{who}"} | {str(k): f"{{k{k}}}" for k in ks})
        best = []
        for k in ks:
            at = {kind: found[f"{kind} {k}"] for kind in KINDS if f"{kind} {k}" in found}
            if len(at) > 1:
                who = min(at, key=at.__getitem__)
                best.append(f"{k}: {who} ({at[who] / at['rademacher']:.2f} of rademacher)")
        yield f"\nthe least at each number of products: {'; '.join(best)}"


def checks(cells: Cells) -> Iterator[str]:
    """What the numbers rest on."""
    for name, row in cells.rows.items():
        if name.startswith("check"):
            yield f"{name}: {json.dumps({k: v for k, v in row.items() if k != 'seconds'})}"
    truth = cells.rows.get("truth | B", {}).get("value", [])
    for name, row in cells.rows.items():
        if name.startswith("truth | B,") and truth:
            off = max(abs(x - y) for x, y in zip(truth, row["value"], strict=False)) / 64 / math.log(2)
            yield (
                f"truth of the network and {name[8:]} ({row['nfe']} evaluations, {len(row['value'])} images): {off:.1e} bits/dim at most"
            )
    for name in PROBED:
        found = over_images(cells, name)
        row = cells.rows.get(f"probes | {name} | 0", {})
        if found and "log_prob itself, nats off" in row:
            yield (
                f"probes, {name}: log_prob itself is within {row['log_prob itself, nats off']:.1e} nats of the same seeds here; formula, "
                f"one product: signs {1e3 * found['formula: rademacher 1']:.3g}e-3 (seeds {1e3 * found['rademacher 1']:.3g}e-3), normals "
                f"{1e3 * found['formula: gaussian 1']:.3g}e-3 bits/dim"
            )


def timed(cells: Cells) -> Iterator[str]:
    """Part three."""
    yield "\nSeconds of an evaluation with its divergence over those of one without, in forward mode, in reverse mode\n"
    rows = []
    for name, row in cells.rows.items():
        if name.startswith("modes"):
            pairs = {n: f"{row[f'{n}, forward']:.1f}, {row[f'{n}, reverse']:.1f}" for n in DIVERGENCES if f"{n}, forward" in row}
            rows.append({"net": name[8:], "plain": row["plain, ms"], **pairs})
    yield compare.table(
        rows, {"network": "{net}", "without, ms": "{plain:.2f}"} | {n: f"{{{n}}}" for n in DIVERGENCES},
    )  # fmt: skip


def estimates(cells: Cells) -> Iterator[str]:
    """Part four."""
    yield "\nsolver_error over the true error, digits, 64 images of set B; short: images whose error exceeds the estimate\n"
    rows = []
    for name, row in cells.rows.items():
        if name.startswith("estimate"):
            _, sde, who, setting = name.split(" | ")
            rows.append(
                {"sde": sde, "who": who, "setting": setting, **row, "percent": 100 * row["short"], "by 3": 100 * row["short by 3"]}
            )
    yield compare.table(
        rows,
        {"SDE": "{sde}", "solver": "{who}", "setting": "{setting}", "evaluations": "{nfe:.0f}",
         "those of the estimate": "{evaluations of the estimate:.0f}", "true error, mean": "{true, mean:.1e}",
         "estimate, mean": "{estimate, mean:.1e}", "median ratio": "{median ratio:.2f}", "10th percentile": "{10th percentile:.2f}",
         "short, %": "{percent:.0f}", "short by 3, %": "{by 3:.0f}"},
    )  # fmt: skip


def machine(head: dict[str, Any]) -> str:
    return f"{head['machine']}, {head['threads']} thread; {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"


def report(cells: Cells) -> Iterator[str]:
    """All tables."""
    head = cells.head
    yield machine(head)
    yield f"rows {head['rows']}, seeds {head['seeds']}; networks {head['networks']}; {RULE}: {head['rule']}; {head['seconds']:.0f} s in all"
    for part in (curves, targets, cheapest_each, defaults, noises, timed, estimates, checks):
        yield from part(cells)
    bad = [f"{name}: {row['error']}" for name, row in cells.rows.items() if "error" in row]
    yield f"\nwithout a number: {'; '.join(bad) or 'none'}"


def fill_page(cells: Cells) -> None:
    """The tables between the markers of docs/likelihood.md; says which marker is missing."""
    sys.path.insert(0, str(ROOT / "docs"))
    import markers

    head = cells.head
    rows = ", ".join(f"{n} of {k}" for k, n in head["rows"].items())
    parts = {
        "likelihood-cost": [f"{machine(head)}. Rows: {rows}.", *targets(cells), *cheapest_each(cells), *defaults(cells)],
        "likelihood-probes": list(noises(cells)),
        "likelihood-modes": list(timed(cells)),
        "likelihood-error": list(estimates(cells)),
    }
    text = PAGE.read_text()
    for name, lines in parts.items():
        if re.search(rf"<!-- {name} -->\n[\s\S]*<!-- /{name} -->", text):
            markers.fill(PAGE, name, "\n\n".join(line.strip() for line in lines))
        else:
            print(f"{PAGE.relative_to(ROOT)} has no marker <!-- {name} -->: that table is printed above only")


LINES = {  # colour, marker
    RULE: (0, "o"), EARLY: (5, "D"), "AdamsMoulton(4, x0)": (2, "^"), "Dopri5": (6, "s"), "score_sde RK45": (1, "v"),
    "k-diffusion dopri5": (3, "P"), "torchdiffeq dopri5, dx/dt": (4, "X"),
}  # fmt: skip


def draw(cells: Cells, path: Path) -> None:
    """Error against forward-equivalents, a panel a problem and SDE."""
    figure, axes = figures._new(2, 3, 11.0, 7.2)
    for axis, (p, s) in zip(axes.flat, CASES, strict=True):
        for name, (colour, marker) in LINES.items():
            curve = [row for _, row in cells.curve(p, s, name)]
            x = [r["forward-equivalents"] for r in curve]
            style: dict[str, Any] = {"color": figures.COLOURS[colour], "marker": marker, "ms": 4}
            axis.loglog(x, [r["mean"] for r in curve], lw=1.4, label=name, **style)
            axis.loglog(x, [r["max"] for r in curve], lw=0.8, ls=":", mfc="none", **style)
        for bound, line in ((MEAN, "-"), (WORST, ":")):
            axis.axhline(bound, color="grey", lw=0.8, ls=line)
        axis.set(title=f"{p}, {s}", xlim=(30, 1500), ylim=(1e-6, 1))
        axis.grid(alpha=0.3, which="major", lw=0.4)
    for axis in axes[-1]:
        axis.set_xlabel("forward-equivalents with one probe")
    for axis in axes[:, 0]:
        axis.set_ylabel("error, bits/dim")
    figure.suptitle("Error of log p: mean over images (solid) and worst image (dotted); grey: the bounds", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figures._save(figure, path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def write_csv(cells: Cells) -> None:
    """A line a cell: the parts of its name and its numbers."""
    rows = []
    for name, row in cells.rows.items():
        part, *where = name.split(" | ")
        keys = {"cost": ("problem", "sde", "solver", "set", "setting"), "estimate": ("sde", "solver", "setting"),
                "probes": ("problem", "image"), "truth": ("set",), "check": ("problem", "sde"),
                "modes": ("network",)}[part]  # fmt: skip
        rows.append({"part": part, **dict(zip(keys, where, strict=True)), **{k: v for k, v in row.items() if k != "value"}})
    first = ["part", "problem", "sde", "network", "solver", "set", "setting", "image"]
    columns = list(dict.fromkeys(first + [k for row in rows for k in row]))
    with OUT.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]


def library() -> str:
    """Which source the numbers are of."""
    files = sorted((ROOT / "scoresde").rglob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def rule() -> str:
    """What log_prob(nfe=32) takes."""
    found = scoresde.log_prob(Nothing(scoresde.VP()), torch.zeros(1, 1, dtype=D), nfe=32, divergence=exact())
    return f"{found.solution.solver!r}, times {cells_of.rounded(found.solution.times[:3].tolist(), 4)} ..."


def main() -> None:
    parser = cells_of.options(__doc__)
    parser.add_argument("--fashion", type=Path, default=fashion.FOLDER)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stored = cells_of.stored(OUT, args)
    if args.tables and stored:
        cells = Cells(stored, stored.pop("cells"))
    else:
        unet()
        networks = {"unet": sha(TRAINED)}
        folder: Path | None = args.fashion
        try:
            fashion.images("t10k")
            networks["fashion"] = sha(args.fashion)
        except OSError as error:
            folder = None
            print(f"without the network of fashion.py: {error}", flush=True)
        head: dict[str, Any] = cells_of.machine() | {
            "rows": ROWS,
            "seeds": {k: f"from {i}" for k, i in FIRST.items()}, "bounds": [MEAN, WORST],
            "probes": {"seeds": SEEDS, "images": PROBED, "evaluations": NFE},
            "sdes": {n: repr(k()) for n, k in problems.SDES.items()},
            "unit": "cost: mean, max, bias of the error of log p, bits/dim; nfe: evaluations a sample, mean; forward-equivalents with one "
            "probe, 4 a call of score_sde, 3 of others; probes: rms deviation of log p over seeds, bits/dim; modes: seconds over those of "
            "a plain evaluation; estimate: solver_error over the true error; seconds: wall time",
            "networks": networks, "library": library(), "rule": rule(), "seconds": stored["seconds"] if stored else 0.0,
        }  # fmt: skip
        fixed = ("rows", "seeds", "bounds", "probes", "sdes")
        cells_of.check_same(stored, head, fixed, OUT)
        rows = stored["cells"] if stored else {}
        for name, where in (("unet", r"\| unet \||^truth|probes \| digits|1x8x8"), ("fashion", r"probes \| fashion|1x28x28")):
            if stored and name in networks and stored["networks"].get(name) != networks[name]:
                print(f"the network {name} is another one: its cells are made anew", flush=True)
                rows = {k: v for k, v in rows.items() if not re.search(where, k)}
            elif stored and name not in networks and name in stored["networks"]:
                networks[name] = stored["networks"][name]  # whose cells stay
        if stored and stored["library"] != head["library"]:
            print("the library has changed since: what is stored is kept, --fresh makes it anew", flush=True)
            head["library"] = f"{stored['library'].split(' and ')[0]} and {head['library']}"
        print(json.dumps(head, indent=1), flush=True)
        cells = Cells(head, rows)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                cost(cells)
                honesty(cells)
                timing(cells, folder)
                probes(cells, folder)
        finally:
            cells.save()
        write_csv(cells)
    for line in report(cells):
        print(line, flush=True)
    fill_page(cells)
    draw(cells, FIGURE)


if __name__ == "__main__":
    main()
