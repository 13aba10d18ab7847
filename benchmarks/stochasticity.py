"""What stochasticity buys: FID against NFE on 8 x 8 digits for deterministic, SDE, churn and Restart samplers, of a network stopped
early and of the same network trained fully.

The digits, the classifier's features, the FID (against the test half), the U-Net and its training are those of `scoresde.demo`, VP
alone, with 8 channels for 24: a call costs a fifth, which pays for the cells. Settings of churn and Restart are chosen on seed set A and
every number of the tables is from the sets B, C and D; the other solvers have no setting and are run as they come, each on its own grid.
NFE is counted by the solver's oracle and never above the column's budget. FID of 1024 samples: only differences within a table mean
much, and with the trained network one seed set has a standard deviation of about 5, the mean of three one of 3.

python benchmarks/stochasticity.py       train (1 min), then compute what results/stochasticity.json lacks (half an hour on one core)
    --fresh                              forget the results and the networks
    --report                             only print the tables and draw the figure
"""

import argparse
import functools
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from noise import processor

from scoresde import checkpoint, compare, demo, figures, sample, solvers
from scoresde.denoiser import Denoiser
from scoresde.solvers import Solver

ROOT = Path(__file__).parents[1]
OUT, FIGURE = ROOT / "benchmarks/results/stochasticity.json", ROOT / "docs/images/stochasticity.png"
RUNS = ROOT / "runs/stochasticity"
SETTINGS = {"under-trained": demo.Settings(channels=8, steps=200), "trained": demo.Settings(channels=8, steps=1600)}
N = 1024
FIRST = {"A": 0, "B": 10_000, "C": 20_000, "D": 30_000}  # seed i of a set is its first seed + i
REPORTED = ("B", "C", "D")
BUDGETS = (10, 20, 35, 50, 100)
ORDER = (50, 100, 20, 35, 10)  # in which they are run: what says most first
CHOSEN_AT = {10: 20, 20: 20, 35: 50, 50: 50, 100: 100}  # budget: the budget whose choice on A it takes

# --- the solvers ----------------------------------------------------------------------------------------------------------
FIXED: dict[str, tuple[Solver, ...]] = {
    "deterministic": (solvers.Heun(), solvers.DPMSolverPP(2), solvers.UniPC(3)),
    "SDE": (
        solvers.EulerMaruyama(), solvers.Ancestral(), solvers.SDEDPMSolverPP(2), solvers.SDEDPMSolverPP(3), solvers.SASolver(),
        solvers.SASolver(tau=solvers.Band(0.05, 1.0)), solvers.ERSDE(3), solvers.SEEDS(2), solvers.StochasticHeun(),
        solvers.PredictorCorrector(solvers.Ancestral(), solvers.Langevin(0.16)),
    ),
}  # fmt: skip


def churns(budget: int) -> list[Solver]:
    """Noise levels rho; above s_churn = 0.41 N gamma is at its cap, so that 40 is as much as churn can do up to NFE 100."""
    bands = ((0.05, 1.0), (0.05, 10.0), (0.3, 10.0))
    return [solvers.Churn(solvers.Heun(), s_churn, *band) for s_churn, band in itertools.product((3.0, 40.0), bands)]


def restarts(solver: Solver, budget: int) -> list[Solver]:
    """Passes between two levels rho of 4 evaluations each (6 from NFE 50 on), as many as fill a quarter or a half of the budget."""
    cost = 4 if budget < 50 else 6
    levels, steps = ((0.05, 0.3), (0.1, 1.0), (0.3, 3.0)), cost // solver.evaluations(1)
    settings = [(*level, steps, max(1, int(share * budget / cost))) for share, level in itertools.product((0.25, 0.5), levels)]
    return [solvers.Restart(solver, (setting,)) for setting in settings]


TUNED: dict[str, Callable[[int], list[Solver]]] = {
    "Churn(Heun())": churns,
    "Restart(Heun())": functools.partial(restarts, solvers.Heun()),
    "Restart(DPMSolverPP(2))": functools.partial(restarts, solvers.DPMSolverPP(2)),
}


# --- cells ----------------------------------------------------------------------------------------------------------------
class Cells:
    """The results by (network, solver, budget): NFE as counted and FID by seed set, or why there is none."""

    def __init__(self, head: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
        self.head, self.rows = head, rows

    def fill(self, network: str, solver: Solver, budget: int, sets: tuple[str, ...], model: Denoiser, score: demo.Scorer) -> None:
        """Compute the seed sets that this cell lacks."""
        name = f"{network} | {solver!r} | {budget}"
        row = self.rows.setdefault(name, {"network": network, "solver": repr(solver), "budget": budget, "fid": {}})
        missing = [s for s in sets if s not in row["fid"]]
        if "error" in row or not missing:
            return
        started = time.perf_counter()
        seeds = [FIRST[s] + i for s in missing for i in range(N)]
        try:
            found = sample(model, (len(seeds), *demo.SHAPE), solver, nfe=budget, seeds=seeds, microbatch=512)
        except (ValueError, ArithmeticError) as error:  # too few evaluations for it
            row["error"] = str(error)
        else:
            row["nfe"] = found.nfe
            row["fid"] |= {s: round(score(x)["fid"], 3) for s, x in zip(missing, found.x.split(N), strict=True)}
        self.head["seconds"] = round(self.head["seconds"] + time.perf_counter() - started, 1)
        print(f"{self.head['seconds']:7.0f} s  {name}: NFE {row.get('nfe')}, FID {row['fid'] or row['error']}", flush=True)
        self.save()

    def save(self) -> None:
        """One line a cell; replaced whole, so that an interrupted run leaves the last good file."""
        body = ",\n".join(f"{json.dumps(name)}:{json.dumps(row)}" for name, row in self.rows.items())
        new = OUT.with_suffix(".new")
        new.write_text(f'{json.dumps(self.head, indent=1)[:-2]},\n "cells": {{\n{body}\n}}}}\n')
        os.replace(new, OUT)

    def get(self, network: str, solver: Solver, budget: int) -> dict[str, Any]:
        """The cell, or one without FID."""
        return self.rows.get(f"{network} | {solver!r} | {budget}", {"fid": {}})

    def chosen(self, network: str, family: str, budget: int) -> Solver:
        """The setting of the least FID on A at the budget where it is chosen, with the passes of this budget."""
        at = CHOSEN_AT[budget]
        fids = [self.get(network, s, at)["fid"].get("A", float("inf")) for s in TUNED[family](at)]
        return TUNED[family](budget)[fids.index(min(fids))]

    def line(self, network: str, row: str, budget: int) -> dict[str, Any]:
        """The cell of a row of the table."""
        fixed = {repr(s): s for group in FIXED.values() for s in group}
        return self.get(network, fixed[row] if row in fixed else self.chosen(network, row, budget), budget)


def run(cells: Cells, models: dict[str, Denoiser], score: demo.Scorer) -> None:
    """Every cell, one budget after another; the choice on A before what is reported of it."""
    for budget, network in itertools.product(ORDER, models):
        fill = functools.partial(cells.fill, network, model=models[network], score=score)
        for solver in itertools.chain(*FIXED.values()):
            fill(solver, budget, REPORTED)
        for family, make in TUNED.items():
            if budget == BUDGETS[0] and family.startswith("Restart"):
                continue  # no room for a pass
            for solver in make(CHOSEN_AT[budget]):
                fill(solver, CHOSEN_AT[budget], ("A",))
            fill(cells.chosen(network, family, budget), budget, REPORTED)


# --- report ---------------------------------------------------------------------------------------------------------------
def text(row: dict[str, Any], budget: int) -> str:
    """Mean ± sd over the seed sets, and the counted NFE where it is not the budget."""
    fids = [row["fid"][s] for s in REPORTED if s in row["fid"]]
    if len(fids) < len(REPORTED):
        return "-"
    return f"{statistics.mean(fids):.1f} ± {statistics.stdev(fids):.1f}" + (f" ({row['nfe']})" if row["nfe"] != budget else "")


def report(cells: Cells) -> Iterator[str]:
    """The tables, then the settings chosen."""
    head = cells.head
    yield f"{head['machine']}, {head['threads']} thread; {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"
    yield f"FID@{head['samples']} of seed sets {', '.join(REPORTED)}; training half against test half: {head['floor']:.1f}"
    names = [*(repr(s) for group in FIXED.values() for s in group), *TUNED]
    for network, about in head["networks"].items():
        yield f"\n{network}: {about['steps']} steps. FID, mean ± sd over 3 seed sets (counted NFE where below the column's)\n"
        columns = {"solver": "{solver}"} | {f"NFE {b}": f"{{nfe{b}}}" for b in BUDGETS}
        cell = lambda n, b: text(cells.line(network, n, b), b)  # noqa: B023
        yield compare.table([{"solver": re.sub(r"\w+=", "", n)} | {f"nfe{b}": cell(n, b) for b in BUDGETS} for n in names], columns)
    yield "\nsettings chosen on A, and the FID there of all that were tried (none for the rest)"
    for network, family in itertools.product(head["networks"], TUNED):
        for at in dict.fromkeys(CHOSEN_AT.values()):
            tried = [(s, cells.get(network, s, at)) for s in TUNED[family](at)]
            fids = ", ".join(f"{row['fid']['A']:.1f}" if row["fid"] else "-" for _, row in tried)
            yield f"{network}, NFE {at}: {cells.chosen(network, family, at)!r} of {len(tried)}: {fids}"


def draw(cells: Cells, path: Path) -> None:
    """FID against counted NFE, a panel a network, a line a solver, a colour a kind."""
    kinds = {k: [repr(s) for s in group] for k, group in FIXED.items()}
    kinds |= {"churn": ["Churn(Heun())"], "Restart": [name for name in TUNED if name.startswith("Restart")]}
    figure, axes = figures._new(1, len(SETTINGS), 9.5, 4.0)
    for axis, network in zip(axes[0], SETTINGS, strict=True):
        for i, (kind, names) in enumerate(kinds.items()):
            for j, name in enumerate(names):
                found = [cells.line(network, name, b) for b in BUDGETS]
                points = [(r["nfe"], statistics.mean(r["fid"][s] for s in REPORTED)) for r in found if "B" in r["fid"]]
                style: dict[str, Any] = {"marker": figures.MARKERS[j % 7], "color": figures.COLOURS[i]}
                style |= {"lw": 0.8, "ms": 2.5} if kind == "SDE" else {"lw": 1.6, "ms": 4}
                label = "" if j else f"{kind} ({len(names)} solvers)" if len(names) > 1 else kind
                axis.loglog([n for n, _ in points], [fid for _, fid in points], label=label, **style)
        axis.axhline(cells.head["floor"], color="grey", ls=":", lw=1, label="training half")
        axis.set(title=f"{network} network", xlabel="NFE (counted)", ylabel=f"FID@{N} (digit classifier's features)")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both", lw=0.4)
    figures._save(figure, path)


def load(name: str) -> tuple[Denoiser, dict[str, Any]]:
    """(network, what is recorded of it), trained if it is not there."""
    folder = RUNS / name
    if not (folder / "config.json").exists():
        demo.train("VP", SETTINGS[name], folder, 0)
    model, sha256 = checkpoint.load(folder), json.loads((folder / "config.json").read_text())["sha256"]
    about = {"steps": SETTINGS[name].steps, "sde": repr(model.sde), "parameters": sum(p.numel() for p in model.parameters())}
    return model.to(memory_format=torch.channels_last), {**about, "sha256": sha256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--fresh", "--report"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.fresh:
        OUT.unlink(missing_ok=True)
        shutil.rmtree(RUNS, ignore_errors=True)
    stored = json.loads(OUT.read_text()) if OUT.exists() else None
    if args.report:
        if stored is None:
            raise SystemExit(f"{OUT} is missing: run without --report first")
        cells = Cells(stored, stored.pop("cells"))
    else:
        images, labels, test, test_labels = demo.digits(0)
        features, accuracy = demo.classifier(images, labels, test, test_labels, 0)
        score = demo.Scorer(features, test)
        loaded = {name: load(name) for name in SETTINGS}
        versions = {p: version(p) for p in ("scoresde", "torch", "numpy", "scikit-learn")}
        head: dict[str, Any] = {
            "machine": f"{processor()}, {platform.system()} {platform.machine()}", "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), **versions}, "samples": N,
            "seeds": {"split, classifier, networks": 0, **{k: [i, i + N] for k, i in FIRST.items()}}, "budgets": list(BUDGETS),
            "features": [features.name, features.sha256], "accuracy": round(accuracy, 4),
            "floor": round(score(demo.CELLS.to_model(images))["fid"], 3),
            "networks": {name: about for name, (_, about) in loaded.items()},
        }  # fmt: skip
        if changed := [k for k in ("samples", "seeds", "networks") if stored and stored[k] != head[k]]:
            raise SystemExit(f"{OUT} was made with other {', '.join(changed)}: --fresh starts anew")
        head["seconds"] = stored["seconds"] if stored else 0.0
        print(json.dumps(head, indent=1), flush=True)
        cells = Cells(head, stored["cells"] if stored else {})
        run(cells, {name: model for name, (model, _) in loaded.items()}, score)
        at = dict.fromkeys(CHOSEN_AT.values())
        head["tried on A"] = {f: {b: [repr(s) for s in make(b)] for b in at} for f, make in TUNED.items()}
        head["chosen on A"] = {n: {f: {b: repr(cells.chosen(n, f, b)) for b in at} for f in TUNED} for n in SETTINGS}
        cells.save()
    for line in report(cells):
        print(line)
    draw(cells, FIGURE)


if __name__ == "__main__":
    main()
