"""Strong error on exact problems: how far a solver's samples end from the exact flow's, beside every deterministic solver of the peers.

The same x_T (the prior's) for all; the truth is the exact flow to t_min and the mean D there, which all rows compute in the limit; error:
root mean square over rows and numbers. Every evaluation counts, the last mean included. Settings are chosen on seed set A and reported
on seed set B. Cells: 3 problems x 3 SDEs x 9 budgets.

A row that starts beside a watershed of the mixture (between two classes) multiplies any small error by 10 to 100, and one such row in
128 can hold 99 % of the squared error: it would decide the cell by luck. So 144 rows are drawn a seed set and the 16 where the exact
flow is worst conditioned are set apart, before any solver runs; "B all" is set B with them.

python benchmarks/strong.py              compute what results/strong.json lacks, then print the summary
    --ours PATTERN | --peers-only        only our settings whose name matches the regular expression; only the peers'
    --fresh                              compute the chosen settings again
    --lent                               the peers on our grids that they do not offer, into results/strong_lent.json
    --report                             only print; --rules PATTERN restricts the search of rules; --verbose prints every cell
    --quick                              VP at NFE 6, 10, 20, nothing saved
"""

import argparse
import functools
import itertools
import json
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peers
import problems
import torch
from torch import Tensor

import scoresde
from scoresde import grid, solvers, variables
from scoresde.noise import seeded
from scoresde.sample import default_solver
from scoresde.solvers import bh1, exact

D = torch.float64
BUDGETS = (5, 6, 8, 10, 12, 15, 20, 35, 50)
DRAWN = problems.ROWS + 16
SEEDS = {"A": range(DRAWN), "B": range(10_000, 10_000 + DRAWN)}
KEYS = ("A", "B", "B all")
OUT = Path(__file__).parent / "results" / "strong.json"
LENT = OUT.with_name("strong_lent.json")
OURS = "scoresde"
TRUTH = solvers.TorchDiffEq("dopri8", rtol=1e-10, atol=1e-10, max_nfe=100_000)
ROUGH = solvers.TorchDiffEq("dopri8", rtol=1e-9, atol=1e-9, max_nfe=100_000)
TIGHTER = solvers.TorchDiffEq("dopri8", rtol=1e-12, atol=1e-12, max_nfe=100_000)


# --- ours ---------------------------------------------------------------------------------------------------------------------
GRIDS: dict[str, Any] = {
    "karras rho=7": grid.karras,
    "karras rho=3": functools.partial(grid.karras, rho=3.0),
    "logsnr": grid.logsnr,
    "uniform": grid.uniform,
    "quadratic": grid.quadratic,
    "rectified": grid.rectified,
    "rectified power=1.5": functools.partial(grid.rectified, power=1.5),
    "rectified power=2": functools.partial(grid.rectified, power=2.0),
    "cosine": grid.cosine,
}


def our_solvers() -> list[solvers.Solver]:
    """Deterministic fixed-step solvers worth a row: every family, and the variants that came near the best under VP on set A."""
    eps, x0, v, lam, t = variables.eps, variables.x0, variables.v, variables.lam, variables.t
    AB, AM, half = solvers.AdamsBashforth, solvers.AdamsMoulton, variables.V(0.5)
    found = [
        solvers.DDIM(),
        solvers.Euler(variables.time),
        solvers.Heun(),
        solvers.RK4(),
        solvers.DPMSolver(2),
        solvers.DPMSolver(3),
    ]
    found += [solvers.DPMSolverPP(2), solvers.DPMSolverPP(2, lower_final=True), solvers.DPMSolverPP(3)]
    found += [solvers.DPMSolverPP(3, startup=False), solvers.DPMSolverPP(3, lower_final=True), solvers.DPMSolverPP(3, True)]
    found += [solvers.IPNDM(order) for order in (2, 3, 4)]
    found += [
        solvers.UniPC(1, bh1, eps),
        solvers.UniPC(2),
        solvers.UniPC(2, bh1, eps),
        solvers.UniPC(3),
        solvers.UniPC(3, startup=False),
    ]
    found += [solvers.UniPC(3, bh1, startup=False), solvers.UniPC(3, exact), solvers.UniPC(3, lower_final=True)]
    found += [
        solvers.UniPC(3, bh1, eps),
        solvers.UniPC(3, bh1, eps, startup=False),
        solvers.UniPC(4),
        solvers.UniPC(4, startup=False),
    ]
    found += [solvers.DEIS(order, on, startup=False) for order in (1, 2, 3) for on in (t, lam)] + [solvers.DEIS(3, variables.rho)]
    found += [
        solvers.Multistep(eps, lam, order, solvers.bh2, startup=False, name=f"Multistep(eps, lam, {order}, bh2)")
        for order in (2, 3)
    ]
    found += [AB(1, v), AB(2, v), AB(3, v), AB(3, v, lam), AB(2), AB(3), AB(3, startup=False), AB(4, startup=False), AB(4, x0)]
    found += [AM(2), AM(2, coordinate=lam), AM(3), AM(4), AM(4, startup=False), AM(4, coordinate=lam), AM(5, startup=False)]
    found += [AM(5, coordinate=lam, startup=False), AM(2, v), AM(3, v), AM(4, v, startup=False), AM(4, half, startup=False)]
    found += [
        AM(3, x0, predictor=3, startup=False),
        AM(4, x0, predictor=4, startup=False),
        AM(3, eps, lam, predictor=3, startup=False),
    ]
    return list({s: s for s in reversed(found)}.values())[::-1]


def our_settings() -> list[peers.Setting]:
    """Our solvers on our grids, with a run that goes through `scoresde.sample`."""

    def run(solver: solvers.Solver, rule: Any, ask: peers.Ask, x: Tensor) -> Tensor:
        found = scoresde.sample(ask.denoiser, x.shape, solver, nfe=ask.nfe, grid=rule, x=x, throw=False)
        ask.used = found.nfe
        return found.x

    return [
        peers.Setting(OURS, repr(solver), label, functools.partial(run, solver, rule))
        for solver in our_solvers()
        for label, rule in GRIDS.items()
    ]


def lent_settings() -> list[peers.Setting]:
    """The peers on the grids of ours that were tuned on these problems (set A) and that no peer offers."""
    return peers.lent({name: rule for name, rule in GRIDS.items() if "power" in name})


# --- one cell -----------------------------------------------------------------------------------------------------------------
def flow(law: scoresde.Denoiser, x: Tensor, solver: solvers.Solver) -> Tensor:
    """The exact flow from t_max to t_min by an adaptive solve, then the mean there."""
    end = scoresde.sample(law, x.shape, solver, x=x, denoise=False).x
    return law(end, torch.tensor(law.sde.t_min, dtype=D))


def rms(x: Tensor, dim: int | None = None) -> Tensor:
    """Root mean square."""
    return x.square().mean(dim).sqrt()


def draws(sde: scoresde.LinearSDE, seeds: Sequence[int], width: int) -> Tensor:
    """x_T of the prior."""
    return float(sde.prior_std()) * seeded(seeds).initial((len(seeds), width), D, torch.device("cpu"))


def watershed(law: scoresde.Denoiser, seeds: Sequence[int], width: int) -> list[int]:
    """The DRAWN - ROWS seeds whose end moves most when x_T moves by 1e-5 of the prior's std in four random directions."""
    x, step = draws(law.sde, seeds, width), 1e-5 * float(law.sde.prior_std())
    end = flow(law, x, ROUGH)
    generator = torch.Generator().manual_seed(0)
    moved = [rms(flow(law, x + step * torch.randn(x.shape, dtype=D, generator=generator), ROUGH) - end, 1) for _ in range(4)]
    order = torch.stack(moved).amax(0).argsort(descending=True)
    return sorted(seeds[int(i)] for i in order[: DRAWN - problems.ROWS])


def start(product: problems.Product, apart: dict[str, list[int]]) -> Tensor:
    """x_T: the rows of seed set A, of B, and those of B set apart; what `apart` lacks is found."""
    parts = {}
    for name, width in {"digits": problems.PIXELS, "toy": problems.TOY, "image": problems.IMAGE // problems.FOLD}.items():
        rows = {}
        for key, seeds in SEEDS.items():
            where = f"{type(product.sde).__name__} {name} {key}"
            if name != "image" and where not in apart:
                apart[where] = watershed(getattr(product, name), list(seeds), width)
            out = apart.get(where, list(seeds[problems.ROWS :]))  # the image is linear: no row is worse than another
            rows[key] = [i for i in seeds if i not in out], out
        parts[name] = draws(product.sde, rows["A"][0] + rows["B"][0] + rows["B"][1], width)
    return torch.cat(list(parts.values()), 1)


def truth(product: problems.Product, x: Tensor, check: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Where the exact flow and the mean end, by problem; and (check) how far a tighter solve, or the solver on the Gaussian, ends."""
    ends, found = {}, {}
    for name, part in problems.split(x).items():
        law = getattr(product, name)
        if name == "image":
            ends[name] = law(law.flow(part), torch.tensor(law.sde.t_min, dtype=D))
        else:
            ends[name] = flow(law, part, TRUTH)
        if check:
            found[name] = float(f"{rms(flow(law, part, TIGHTER) - ends[name]):.2g}")
    return ends, found


def errors(end: Tensor, ends: dict[str, Tensor]) -> dict[str, list[float | None]]:
    """By seed set: the error on each problem, None where not finite."""
    out: dict[str, list[float | None]] = {key: [] for key in KEYS}
    for name, part in problems.split(end).items():
        gap = part - ends[name]
        n = len(gap) * problems.ROWS // (problems.ROWS + DRAWN)
        for key, some, digits in zip(KEYS, (gap[:n], gap[n : 2 * n], gap[n:]), (4, 4, 3), strict=True):
            e = float(rms(some))
            out[key].append(float(f"{e:.{digits}g}") if math.isfinite(e) else None)
    return out


def measure(setting: peers.Setting, product: problems.Product, nfe: int, x: Tensor, ends: dict[str, Tensor]) -> dict[str, Any]:
    """One setting at one budget: errors on A and B by problem, evaluations used; a note in place of them where it raised."""
    ask = peers.Ask(product, nfe)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = setting.run(ask, x)
    except Exception as error:  # a peer may raise anything; it is recorded
        return {"note": f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"}
    return {**errors(end, ends), "used": ask.used}


# --- the table ----------------------------------------------------------------------------------------------------------------
Table = dict[
    str, dict[str, dict[str, Any]]
]  # setting -> SDE -> {"A": [nfe][problem], "B": ..., "used": [nfe], "notes": {nfe: text}}


def fill(table: Table, settings: Sequence[peers.Setting], sdes: Sequence[str], budgets: Sequence[int], save: Callable[[], None],
         head: dict[str, Any]) -> None:  # fmt: skip
    """Compute what the table lacks."""
    for sde_name in sdes:
        todo = [s for s in settings if sde_name not in table.get(s.name, {})]
        if not todo:
            continue
        product = problems.Product(problems.SDES[sde_name]())
        began = time.perf_counter()
        x = start(product, head["seeds apart"])
        ends, check = truth(product, x, sde_name not in head["reference check"])
        if check:
            head["reference check"][sde_name] = check
            print(f"{sde_name}: truth against a solve at 1e-12 (image: the closed form against it): {check}", flush=True)
        print(f"{sde_name}: truth {time.perf_counter() - began:.0f} s, {len(todo)} settings to do", flush=True)
        began = saved = time.perf_counter()
        for i, setting in enumerate(todo):
            cells = [measure(setting, product, nfe, x, ends) for nfe in budgets]
            empty = [None] * len(problems.PROBLEMS)
            row: dict[str, Any] = {key: [c.get(key, empty) for c in cells] for key in KEYS}
            row["used"] = [c.get("used") for c in cells]
            if notes := {str(n): c["note"] for n, c in zip(budgets, cells, strict=True) if "note" in c}:
                row["notes"] = notes
            table.setdefault(setting.name, {})[sde_name] = row
            now = time.perf_counter()
            if now - saved > 60:
                save()
                saved = now
                print(f"  {i + 1}/{len(todo)}, {now - began:.0f} s", flush=True)
        save()
        print(f"{sde_name}: {time.perf_counter() - began:.0f} s for {len(todo)} settings", flush=True)


class Errors:
    """The table as arrays [setting, SDE, nfe, problem], inf where a setting has no number."""

    def __init__(self, table: Table, sdes: Sequence[str], budgets: Sequence[int]) -> None:
        self.names = [n for n, row in table.items() if all(s in row for s in sdes)]
        self.sdes, self.budgets, self.problems = list(sdes), list(budgets), list(problems.PROBLEMS)
        self.A, self.B, self.B_all = (np.array([[table[n][s][key] for s in sdes] for n in self.names], dtype=float) for key in KEYS)
        for e in (self.A, self.B, self.B_all):
            e[~np.isfinite(e)] = np.inf
        self.ours = np.array([n.startswith(OURS) for n in self.names], dtype=bool)
        self.where = {n: i for i, n in enumerate(self.names)}

    def best(self, among: Any) -> tuple[Any, Any]:
        """(the setting of least error on A by cell, its error on B)."""
        pick = np.where(among[:, None, None, None], self.A, np.inf).argmin(0)
        return pick, np.take_along_axis(self.B, pick[None], 0)[0]

    def over(self, errors: Any, floor: Any) -> Any:
        """Ratios [setting, nfe, 9] to the best of each cell."""
        return np.moveaxis(errors / floor, 2, 1).reshape(len(errors), len(self.budgets), -1)


def geometric(ratios: Any, axis: Any = None) -> Any:
    """Geometric mean; inf where any is."""
    with np.errstate(divide="ignore"):
        return np.exp(np.log(ratios).mean(axis))


Rule = list[tuple[int, str]]  # (largest NFE of the band, setting), bands upward


def apply(rule: Rule, nfe: int) -> str:
    """The setting of a rule at a budget."""
    return next(name for top, name in rule if nfe <= top)


def find_rule(ratios: Any, names: Sequence[str], budgets: Sequence[int], bands: int, slack: float = 1.0) -> Rule:
    """The rule of `bands` bands whose worst ratio is least and, within slack of that worst, whose geometric mean is.

    ratios [setting, nfe, cells]: of seed set A. Every place of the edges is tried; a band's setting is the best for it.
    """
    n = len(budgets)
    logs, worsts = np.log(ratios).mean(2), ratios.max(2)
    spans = {(i, j): (logs[:, i:j].sum(1), worsts[:, i:j].max(1)) for i in range(n) for j in range(i + 1, n + 1)}
    cuts = [(0, *c, n) for c in itertools.combinations(range(1, n), bands - 1)]
    limit = slack * min(max(spans[s][1].min() for s in itertools.pairwise(c)) for c in cuts)
    best: tuple[float, Rule] | None = None
    for c in cuts:
        total, rule = 0.0, []
        for i, j in itertools.pairwise(c):
            mean, worst = spans[i, j]
            k = int(np.where(worst <= limit, mean, np.inf).argmin())
            total += mean[k] if worst[k] <= limit else np.inf
            rule.append((budgets[j - 1] if j < n else 10**9, names[k]))
        if best is None or total < best[0]:
            best = total, rule
    return best[1]


# --- the summary --------------------------------------------------------------------------------------------------------------
def lines(e: Errors, rules: dict[str, Rule], pattern: str, verbose: bool) -> Iterator[str]:
    """The readable summary."""
    yield f"{int(e.ours.sum())} settings of ours, {int((~e.ours).sum())} of peers; errors of seed set B, settings chosen on A"
    bad = [f"{n}" for n, a in zip(e.names, e.A, strict=True) if not np.isfinite(a).any()]
    some = [n for n, a in zip(e.names, e.A, strict=True) if not np.isfinite(a).all() and np.isfinite(a).any()]
    yield f"never finite: {', '.join(bad) or 'none'}; without a number in some cells: {len(some)} settings"
    heads = [f"{p[:6]} {s}" for s in e.sdes for p in e.problems]
    if (~e.ours).any():
        pick, peer = e.best(~e.ours)
        yield "\nbest peer"
        yield from grid_of(peer, e, heads, "{:.2e}")
        if verbose:
            for k, i, j in np.ndindex(pick.shape):
                yield f"  {e.sdes[k]} NFE {e.budgets[i]} {e.problems[j]}: {e.names[pick[k, i, j]]} {peer[k, i, j]:.3e}"
    if e.ours.any() and (~e.ours).any():
        mine, own = e.best(e.ours)
        ratio = own / peer
        yield "\nours / best peer"
        yield from grid_of(ratio, e, heads, "{:.3f}")
        flat = ratio.ravel()
        yield (
            f"cells {flat.size}: at most 1.02 in {100 * (flat <= 1.02).mean():.1f} %, worst {flat.max():.3f}, "
            f"geometric mean {geometric(flat):.3f}"
        )
        every = [np.take_along_axis(e.B_all, k[None], 0)[0] for k in (mine, pick)]
        flat = (every[0] / every[1]).ravel()
        yield (
            f"with the rows of B set apart: at most 1.02 in {100 * (flat <= 1.02).mean():.1f} %, worst {flat.max():.3f}, "
            f"geometric mean {geometric(flat):.3f}"
        )
        yield from losses(e, mine, own, pick, peer)
        if verbose:
            for k, i, j in np.ndindex(ratio.shape):
                yield f"  {e.sdes[k]} NFE {e.budgets[i]} {e.problems[j]}: {e.names[mine[k, i, j]]} {own[k, i, j]:.3e}"
    pick, top_b = e.best(np.ones(len(e.names), dtype=bool))
    top_a = np.take_along_axis(e.A, pick[None], 0)[0]
    on_a, on_b = e.over(e.A, top_a), e.over(e.B, top_b)
    for title, who in (("peers'", ~e.ours), ("our", e.ours)):
        if not who.any():
            continue
        yield f"\n{title} best single setting by NFE (geometric mean on A), its ratio to the cell's best on B: geometric mean, worst"
        for i, nfe in enumerate(e.budgets):
            k = int(np.where(who, geometric(on_a[:, i], 1), np.inf).argmin())
            w = int(np.where(who, on_a[:, i].max(1), np.inf).argmin())
            yield (
                f"  NFE {nfe:3d}  {geometric(on_b[k, i]):.2f} {on_b[k, i].max():6.2f}  {e.names[k]:55s}"
                f"  least worst: {geometric(on_b[w, i]):.2f} {on_b[w, i].max():.2f} {e.names[w]}"
            )
    yield from default_lines(e, e.B, top_b)
    rules = dict(rules)
    allowed = [i for i, n in enumerate(e.names) if e.ours[i] and re.search(pattern, n)]
    named = [e.names[i] for i in allowed]
    for bands, slack in itertools.product((1, 2, 3, 4), (1.0, 1.5)):
        if allowed and bands <= len(e.budgets):
            rules[f"found, {bands} bands, slack {slack}"] = find_rule(on_a[allowed], named, e.budgets, bands, slack)
    peer_names = [i for i in range(len(e.names)) if not e.ours[i]]
    if peer_names and len(e.budgets) > 2:
        rules["found among peers, 3 bands"] = find_rule(on_a[peer_names], [e.names[i] for i in peer_names], e.budgets, 3, 1.5)
    for title, rule in rules.items():
        if any(name not in e.where for _, name in rule):
            yield f"\nrule {title}: not in the table: {[n for _, n in rule if n not in e.where]}"
            continue
        got = np.stack([on_b[e.where[apply(rule, nfe)], i] for i, nfe in enumerate(e.budgets)])
        yield f"\nrule {title}: geometric mean {geometric(got):.3f}, worst {got.max():.2f}"
        yield "  " + "; ".join(f"to {top if top < 10**9 else 'any'}: {name}" for top, name in rule)
        yield "  by NFE: " + ", ".join(f"{n}: {geometric(g):.2f} ({g.max():.2f})" for n, g in zip(e.budgets, got, strict=True))


def losses(e: Errors, mine: Any, own: Any, pick: Any, peer: Any) -> Iterator[str]:
    """The cells where our best is more than 1.02 of the best peer: mine and pick are settings, own and peer their errors."""
    ratio = own / peer
    for k, i, j in zip(*np.nonzero(ratio > 1.02), strict=True):
        yield (
            f"  {ratio[k, i, j]:.3f} {e.sdes[k]} NFE {e.budgets[i]} {e.problems[j]}: {e.names[mine[k, i, j]]} ({own[k, i, j]:.3e})"
            f" after {e.names[pick[k, i, j]]} ({peer[k, i, j]:.3e})"
        )


def lent_lines(e: Errors) -> Iterator[str]:
    """Our best over the best of the peers that were lent our grids, beside their own."""
    (mine, own), (pick, peer) = e.best(e.ours), e.best(~e.ours)
    ratio = own / peer
    lent = np.array([" | lent " in n for n in e.names])
    yield (
        f"\nours / best peer, peers on our tuned grids too: at most 1.02 in {100 * (ratio <= 1.02).mean():.1f} %, worst {ratio.max():.3f}, "
        f"geometric mean {geometric(ratio.ravel()):.3f}; the best peer is on a lent grid in {int(lent[pick].sum())} cells of {ratio.size}"
    )
    yield from losses(e, mine, own, pick, peer)


def default_lines(e: Errors, errors: Any, floor: Any) -> Iterator[str]:
    """`solver=None` over the best of each cell."""
    sizes = {"digits": problems.PIXELS, "toy": problems.TOY, "image": problems.IMAGE}
    picks = [[default_setting(n, sizes[p]) for p in e.problems] for n in e.budgets]
    if any(name not in e.where for row in picks for name in row):
        yield f"\nsample(solver=None): not in the table: {sorted({n for row in picks for n in row} - set(e.where))}"
        return
    k = np.array([[e.where[name] for name in row] for row in picks])  # [nfe, problem]
    got = np.take_along_axis(errors, k[None, None], 0)[0] / floor  # [SDE, nfe, problem]
    yield f"\nsample(solver=None): geometric mean {geometric(got):.3f}, worst {got.max():.2f}, cells above 3: {int((got > 3).sum())}"
    yield "  by NFE: " + ", ".join(f"{n}: {geometric(got[:, i]):.2f} ({got[:, i].max():.2f})" for i, n in enumerate(e.budgets))
    yield from (
        f"  {got[i, j, k]:.2f} {e.sdes[i]} NFE {e.budgets[j]} {e.problems[k]}" for i, j, k in zip(*np.nonzero(got > 3), strict=True)
    )


def grid_of(values: Any, e: Errors, heads: Sequence[str], form: str) -> Iterator[str]:
    """A table of NFE by (SDE, problem)."""
    yield "  NFE  " + " ".join(f"{h:>10s}" for h in heads)
    for i, nfe in enumerate(e.budgets):
        yield f"  {nfe:3d}  " + " ".join(
            f"{form.format(values[k, i, j]):>10s}" for k, j in np.ndindex(len(e.sdes), len(e.problems))
        )


# The rules under test, by name: what `solver=None` of scoresde.sample does, where it is such a rule.
RULES: dict[str, Rule] = {
    "2M everywhere": [(10**9, "scoresde DPMSolverPP(order=2) | logsnr")],
    "UniPC-3 everywhere": [(10**9, "scoresde UniPC(order=3) | logsnr")],
}


def default_setting(nfe: int, size: int) -> str:
    """The setting that `solver=None` of `scoresde.sample` takes."""
    key = lambda rule: (getattr(rule, "func", rule), getattr(rule, "keywords", {}))
    solver = default_solver(nfe, size)
    return f"{OURS} {solver!r} | {next(label for label, rule in GRIDS.items() if key(rule) == key(solver.grid))}"


# --- the program --------------------------------------------------------------------------------------------------------------
def machine() -> dict[str, Any]:
    """What the numbers were made on."""
    info = Path("/proc/cpuinfo")
    text = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in text if line.startswith("model name")]
    return {
        "machine": f"{names[0] if names else platform.processor()}, {platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "scoresde": scoresde.__version__,
            **{n: version(n) for n in ("torch", "numpy", "scikit-learn", "diffusers", "azula", "k-diffusion")},
        },
    }


def write(path: Path, head: dict[str, Any], table: Table) -> None:
    """One line a setting; replaced whole, so that an interrupted run leaves the last good file."""
    pack = lambda value: json.dumps(value, separators=(",", ":"), allow_nan=False)
    body = ",\n".join(f"{json.dumps(name)}:{pack(row)}" for name, row in table.items())
    opening = json.dumps(head, indent=1, allow_nan=False)
    new = path.with_suffix(".new")
    new.write_text(f'{opening[:-2]},\n "rows": {{\n{body}\n}}}}\n')
    os.replace(new, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", metavar="PATTERN")
    parser.add_argument("--peers-only", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--lent", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--rules", metavar="PATTERN", default="")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.lent:
        args.out = LENT
    torch.set_num_threads(1)
    sdes, budgets = (["VP"], (6, 10, 20)) if args.quick else (list(problems.SDES), BUDGETS)
    head: dict[str, Any] = {
        **machine(), "unit": "root mean square error, [nfe][problem] for each SDE and seed set", "nfe": list(budgets),
        "problems": list(problems.PROBLEMS), "sdes": {n: repr(k()) for n, k in problems.SDES.items()}, "ridge": problems.RIDGE,
        "rows a seed set": problems.ROWS,
        "image rows": problems.ROWS // problems.FOLD, "seeds": {k: [s.start, s.stop] for k, s in SEEDS.items()},
        "seeds apart": {}, "reference": repr(TRUTH), "reference check": {},
        "fast denoisers against scoresde's": float(f"{problems.check():.1g}"),
    }  # fmt: skip
    table: Table = {}
    if args.out.exists() and not args.quick:
        stored = json.loads(args.out.read_text())
        table = stored.pop("rows")
        fixed = ("nfe", "problems", "sdes", "ridge", "rows a seed set", "image rows", "seeds")
        if changed := [k for k in fixed if stored[k] != head[k]]:
            raise SystemExit(f"{args.out} was made with other {', '.join(changed)}: delete it to start anew")
        head |= {k: stored[k] for k in ("reference check", "seeds apart")}
    elif args.lent:
        head |= {k: v for k, v in json.loads(OUT.read_text()).items() if k in ("reference check", "seeds apart")}
    if not args.report:
        settings = lent_settings() if args.lent else [] if args.ours else peers.every()
        if not args.peers_only and not args.lent:
            settings += [s for s in our_settings() if re.search(args.ours or "", s.name)]
        if args.fresh:
            for s in settings:
                table.pop(s.name, None)
        save = (lambda: None) if args.quick else functools.partial(write, args.out, head, table)
        fill(table, settings, sdes, budgets, save, head)
    both = {path: json.loads(path.read_text())["rows"] if path.exists() else {} for path in (OUT, LENT)} | {args.out: table}
    if not args.lent:
        for line in lines(Errors(table, sdes, budgets), RULES, args.rules, args.verbose):
            print(line)
    if both[LENT] and both[OUT] and not args.quick:
        for line in lent_lines(Errors(both[OUT] | both[LENT], sdes, budgets)):
            print(line)


if __name__ == "__main__":
    main()
