"""The whole job on real images: train, sample, score and compare on the 8x8 digits that ship with scikit-learn."""

from __future__ import annotations

import functools
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, compare, figures, grid, loss, metrics, parameterizations
from .bits import Quantized, bits_per_dim
from .compare import Row
from .denoiser import Denoiser, Preconditioned
from .linear import LinearSDE
from .metrics import ModuleFeatures, Statistics, frechet_distance, sliced_wasserstein
from .nets import UNet
from .noise import seeded
from .oracle import Oracle
from .sde import VE, VP
from .solve import trajectory
from .solvers import (
    DDIM,
    Ancestral,
    DPMSolverPP,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ReverseDiffusion,
    SDEDPMSolverPP,
    TorchDiffEq,
)
from .train import EMA, fit

__all__ = ["Settings", "run"]

CELLS = Quantized(levels=17)  # grey levels 0 .. 16 as cells of [-1, 1]
SHAPE = (1, 8, 8)
SIGMA_DATA = 0.7  # standard deviation of a pixel in [-1, 1]: 0.708


@dataclass(frozen=True)
class Settings:
    """What the demo does; every number of its tables follows from these and the seed."""

    seed: int = 0
    steps: int = 1600
    batch: int = 128
    channels: int = 24
    samples: int = 512
    nfes: tuple[int, ...] = (5, 10, 20, 50, 100)
    sde_nfes: tuple[int, ...] = ()  # more evaluations for the SDE samplers
    em_nfes: tuple[int, ...] = ()  # and more for Euler-Maruyama under VP
    tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    likelihood_digits: int = 64
    likelihood_noise: int = 16
    likelihood_steps: int = 48
    processes: int = 2


FULL = Settings(sde_nfes=(200,), em_nfes=(1000,))


# --- data and features ---------------------------------------------------------------------------------------------------
def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, train labels, test images, test labels): halves fixed by the seed; images int64 `[N, 1, 8, 8]`, 0 .. 16."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images, labels = torch.tensor(data.images).long()[:, None], torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    return images[train], labels[train], images[test], labels[test]


def classifier(images: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, seed: int) -> tuple[ModuleFeatures, float]:
    """(features, test accuracy) of a small convolutional classifier of the digits: 32 numbers before its last layer."""
    x, net = CELLS.to_model(images), metrics.classifier(SHAPE, 10, features=32, seed=seed)
    metrics.train_classifier(net, x, labels, epochs=30, seed=seed)
    with torch.no_grad():
        accuracy = float((net(CELLS.to_model(test)).argmax(1) == test_labels).double().mean())
    return ModuleFeatures("digits-cnn-32", net[:-1]), accuracy


class Scorer:
    """FID in the classifier's features and sliced Wasserstein distance in pixels, against the test half."""

    def __init__(self, features: ModuleFeatures, reference: Tensor) -> None:
        self.features, self.pixels = features, CELLS.to_model(reference)
        self.reference = self._statistics(self.pixels)

    def _statistics(self, x: Tensor) -> Statistics:
        statistics = Statistics()
        statistics.update(self.features(x))
        return statistics

    def __call__(self, x: Tensor) -> dict[str, float]:
        """Scores of samples in the model's range; they are rounded to grey levels first, as an image file would be."""
        x = CELLS.to_model(CELLS.to_levels(x))
        a, b = self._statistics(x), self.reference
        distance = frechet_distance(a.mean, a.cov, b.mean, b.cov)
        return {"fid": distance, "sliced_w": sliced_wasserstein(x.flatten(1), self.pixels.flatten(1))}


# --- training ------------------------------------------------------------------------------------------------------------
def sde_of(name: str, train: Tensor) -> LinearSDE:
    """VP, or VE whose sigma_max is the largest distance in the training half."""
    return VP() if name == "VP" else VE.from_data(CELLS.to_model(train))


def network(sde: LinearSDE, settings: Settings) -> Preconditioned:
    """A U-Net of at most 0.4 M parameters with EDM's preconditioning."""
    parameterization = functools.partial(parameterizations.edm, sigma_data=SIGMA_DATA)
    return Preconditioned(UNet(SHAPE, channels=settings.channels, seed=settings.seed), sde, parameterization)


def train(name: str, settings: Settings, folder: Path, bar: int) -> list[float]:
    """Train one network by denoising score matching, save its average in `folder`, return the loss of every step."""
    images, *_ = digits(settings.seed)
    model = network(sde_of(name, images), settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = lambda step: min(1.0, (step + 1) / 100) * math.sqrt(max(0.0, 1 - step / settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    ema = EMA(model, decay=0.998)
    data, noise = (torch.Generator().manual_seed(2 * settings.seed + k) for k in (0, 1))

    def batches() -> Iterator[Tensor]:
        for _ in range(settings.steps):
            rows = torch.randint(len(images), (settings.batch,), generator=data)
            yield CELLS.to_model(images[rows], torch.rand(settings.batch, *SHAPE, generator=data))  # uniform dequantization

    weight = functools.partial(loss.edm, sigma_data=SIGMA_DATA)
    times = loss.stratified(functools.partial(loss.log_normal, mean=-1.2, std=1.4))
    losses: list[float] = []
    with tqdm(total=settings.steps, desc=f"train {name}", position=bar, unit="step", mininterval=1.0) as progress:
        for step in fit(model, batches(), weight=weight, times=times, optimizer=optimizer, ema=ema, generator=noise):
            schedule.step()
            losses.append(step.loss)
            progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
            progress.update()
    checkpoint.save(folder, ema.module, overwrite=True)
    return losses


# --- likelihood ----------------------------------------------------------------------------------------------------------
def likelihood(make: Callable[[], Denoiser], images: Tensor, seeds: Sequence[int], steps: int) -> tuple[Tensor, int, float]:
    """(bits/dim of each image, NFE, divergence cost) with uniform dequantization and the exact divergence."""
    found = bits_per_dim(make(), images, DPMSolverPP(2), levels=CELLS.levels, steps=steps, seeds=seeds)
    return found.each, found.nfe, found.ledger["divergence"]


def floors(images: Tensor, score: Scorer, settings: Settings) -> list[dict[str, Any]]:
    """Rows of the training half against the test half: all of it, and subsets as large as a row's samples, over 8 draws."""
    generator, n = torch.Generator().manual_seed(settings.seed), min(settings.samples, len(images))
    draws = [score(CELLS.to_model(images[torch.randperm(len(images), generator=generator)[:n]])) for _ in range(8)]
    mean = {name: float(np.mean([draw[name] for draw in draws])) for name in draws[0]}
    spread = float(np.std([draw["fid"] for draw in draws], ddof=1))
    return [
        {"problem": "data", "solver": f"train half, {len(images)} images", "samples": len(images), **score(CELLS.to_model(images))},
        {"problem": "data", "solver": f"train half, {n} images (8 draws, sd {spread:.1f})", "samples": n, "fid_sd": spread, **mean},
    ]


def likelihoods(workers: ProcessPoolExecutor, makers: dict[str, Any], test: Tensor, settings: Settings) -> list[dict[str, Any]]:
    """A row a network and kind of image: held-out digits, and noise images of uniform grey levels as a sanity row."""
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randint(0, CELLS.levels, (settings.likelihood_noise, *SHAPE), generator=generator)
    jobs = []
    for name, make in makers.items():
        for kind, images in (("held-out digits", test[: settings.likelihood_digits]), ("noise images", noise)):
            parts = compare.shares(range(len(images)), settings.processes)
            submit = functools.partial(workers.submit, likelihood, make)
            jobs.append((name, kind, [submit(images[list(part)], part, settings.likelihood_steps) for part in parts]))
    rows = []
    for name, kind, shares in tqdm(jobs, desc="likelihood", unit="row"):
        each, nfe, divergence = zip(*(share.result() for share in shares), strict=True)
        bits = torch.cat(each)
        rows.append({
            "problem": name, "images": kind, "bits_per_dim": float(bits.mean()), "stderr": float(bits.std() / len(bits) ** 0.5),
            "nfe": max(nfe), "divergence": max(divergence), "n": len(bits), "each": bits.tolist(),
        })  # fmt: skip
    return rows


# --- the comparison ------------------------------------------------------------------------------------------------------
def rows(settings: Settings) -> list[Row]:
    """Every row of the comparison."""
    pc = "PC (reverse diffusion + Langevin)"
    stochastic = {
        "": EulerMaruyama(), " ": Ancestral(), pc: PredictorCorrector(ReverseDiffusion()), "SDE-DPM-Solver++(2M)": SDEDPMSolverPP(2),
    }  # fmt: skip
    made = []
    for name in ("VP", "VE"):
        for label, solver in stochastic.items():
            least = 10 if isinstance(solver, EulerMaruyama) else 1  # it refuses the steps of 5 evaluations under VP
            made += [Row(name, solver, n, label.strip()) for n in (*settings.nfes, *settings.sde_nfes) if n >= least]
            if name == "VP" and isinstance(solver, EulerMaruyama):
                made += [Row(name, solver, n) for n in settings.em_nfes]
        for solver in (DDIM(), Heun(), DPMSolverPP(2)):
            made += [Row(name, solver, n, "DPM-Solver++(2M)" if solver == DPMSolverPP(2) else "") for n in settings.nfes]
        made += [Row(name, TorchDiffEq(rtol=tol, atol=tol), None, f"dopri5 {tol:.0e}") for tol in settings.tolerances]
    return made


def columns(features: dict[str, Any]) -> dict[str, str]:
    """Headings and formats of the table; the FID's names its features."""
    fid = f"FID ({features['name']} {features['sha256'][:8]})"
    return {
        "problem": "{problem}", "solver": "{solver}", "grid": "{grid}", "NFE": "{nfe:.0f}", fid: "{fid:.2f}",
        "sliced W": "{sliced_w:.4f}", "seconds": "{seconds:.1f}",
    }  # fmt: skip


LIKELIHOOD = {
    "network": "{problem}", "images": "{images}", "bits/dim": "{bits_per_dim:.3f}", "std. error": "{stderr:.3f}", "NFE": "{nfe}",
    "divergence": "{divergence:.0f}", "N": "{n}",
}  # fmt: skip


def paths(model: Denoiser, seeds: range) -> dict[str, list[Tensor]]:
    """States from noise to digit from the same start, under the SDE and under the ODE, at 9 times uniform in logsnr."""
    found = {}
    for label, solver, steps in (("reverse SDE (ancestral)", Ancestral(), 96), ("probability flow (Heun)", Heun(), 48)):
        noise = seeded(seeds)
        times = grid.logsnr(model.sde, steps)
        start = model.sde.prior_std() * noise.initial((len(seeds), *SHAPE), torch.float32)
        scale = lambda t: float((model.sde.alpha(t) ** 2 * SIGMA_DATA**2 + model.sde.sigma(t) ** 2).sqrt()) / SIGMA_DATA
        with torch.no_grad():
            states = [x / scale(t) for t, x in trajectory(Oracle(model, len(seeds), noise), solver, start, times)]
        found[label] = states[:: steps // 8]
    return found


def work(settings: Settings) -> tuple[float, float, float]:
    """(training steps of one network, sample evaluations, vector-Jacobian products) a process has to do."""
    share = 1 / settings.processes
    adaptive = {1e-1: 20, 1e-2: 30, 1e-3: 50, 1e-4: 80, 1e-5: 130}
    evaluations = sum(row.nfe or adaptive.get(row.solver.rtol, 200) for row in rows(settings))  # type: ignore[attr-defined]
    images = 2 * (settings.likelihood_digits + settings.likelihood_noise)
    return 2 * settings.steps * share, evaluations * settings.samples * share, images * settings.likelihood_steps * 64 * share


def estimate(settings: Settings) -> float:
    """Seconds the run should take, from a second of measurement on this machine."""
    model = network(VP(), settings)
    x, t = torch.zeros(settings.batch, *SHAPE), torch.tensor(0.5, dtype=torch.float64)

    def seconds(call: Callable[[], object]) -> float:
        call()
        started = time.perf_counter()
        for _ in range(3):
            call()
        return (time.perf_counter() - started) / 3

    with torch.no_grad():
        forward = seconds(lambda: model(x, t)) / len(x)
    step = seconds(lambda: model(x, t).square().mean().backward())
    steps, evaluations, products = work(settings)
    return 20 + 1.3 * (steps * step + evaluations * forward + products * 1.5 * forward)


def record(settings: Settings, features: ModuleFeatures, accuracy: float, models: dict[str, Preconditioned]) -> dict[str, Any]:
    """Versions, seeds and device: what the numbers depend on."""
    import sklearn

    from . import __version__

    versions = {"scoresde": __version__, "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__}
    return {
        "settings": asdict(settings),
        "versions": {**versions, "scikit-learn": sklearn.__version__, "python": platform.python_version()},
        "device": f"cpu ({platform.machine()}, {platform.system()}), {settings.processes} processes of one thread",
        "seeds": f"split, networks, classifier: {settings.seed}; samples: 0 .. {settings.samples - 1}",
        "features": {"name": features.name, "sha256": features.sha256, "test_accuracy": accuracy},
        "networks": {n: {"sde": str(m.sde), "parameters": sum(p.numel() for p in m.net.parameters())} for n, m in models.items()},
    }


def report(info: dict[str, Any], results: list[dict[str, Any]], bits: list[dict[str, Any]], left_out: str) -> str:
    """The run as a page of Markdown."""
    features, settings = info["features"], info["settings"]
    networks = "\n".join(f"- {name}: {net['parameters']:,} parameters, {net['sde']}" for name, net in info["networks"].items())
    return f"""# scoresde demo

8x8 digits (scikit-learn), halves of seed {settings["seed"]}. Networks, {settings["steps"]} steps of {settings["batch"]} images:

{networks}

{settings["samples"]} samples a row from the same seeds, rounded to 17 levels. FID: Fréchet distance to the test half in the features of
`{features["name"]}` (test accuracy {features["test_accuracy"]:.3f}), sha256
`{features["sha256"]}`.
It falls with the number of samples, so the floor stands in the table for as many training images too. NFE: counted evaluations a
sample, the final mean included. Seconds: wall time of {settings["samples"]} samples in {settings["processes"]} processes of one thread.
{left_out}

{compare.table(results, columns(features))}

![FID against NFE](nfe_fid.png)

Likelihood, by the probability flow with the exact divergence (DPM-Solver++(2M), {settings["likelihood_steps"]} steps uniform in
logsnr), uniform dequantization of the 17 grey levels; the divergence column is its cost in network passes a sample:

{compare.table(bits, LIKELIHOOD)}

![likelihood](likelihood.png) ![samples](samples.png) ![trajectories](trajectories.png) ![loss](loss.png)

{info["device"]}; {", ".join(f"{k} {v}" for k, v in info["versions"].items())}; seeds: {info["seeds"]}.
"""


def run(folder: Path, settings: Settings, *, overwrite: bool = False, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Do the whole job into `folder`; FileExistsError when a run is there and not overwrite. Return what results.json holds."""
    figures.require()
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{folder} holds an earlier run; pass --overwrite to replace it, or another --out")
        for name in ("VP", "VE"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "rows.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    started = time.perf_counter()
    say(f"about {estimate(settings) / 60:.0f} minutes on this machine, in {settings.processes} processes of one thread")
    images, labels, test, test_labels = digits(settings.seed)
    features, accuracy = classifier(images, labels, test, test_labels, settings.seed)
    score = Scorer(features, test)
    names = ("VP", "VE")
    with compare.pool(settings.processes) as workers:
        training = [workers.submit(train, name, settings, folder / name, i) for i, name in enumerate(names)]
        losses = {name: job.result() for name, job in zip(names, training, strict=True)}
        makers = {name: functools.partial(checkpoint.load, folder / name) for name in names}
        models = {name: make() for name, make in makers.items()}
        results = floors(images, score, settings)
        drawn: dict[str, Tensor] = {}
        jobs = rows(settings)
        done = compare.run(workers, settings.processes, jobs, makers, SHAPE, range(settings.samples), score, folder / "rows.jsonl")
        for row, result, x in tqdm(done, total=len(jobs), desc="sample", unit="row"):
            results.append(result)
            if x is not None:
                drawn[f"{row.problem}, {result['solver']}, NFE {result['nfe']:.0f}"] = x[:16]
        bits = likelihoods(workers, makers, test, settings)
    info: dict[str, Any] = {**record(settings, features, accuracy, models), "seconds": round(time.perf_counter() - started, 1)}
    per_image = [{k: v for k, v in row.items() if k != "each"} for row in bits]
    compare.write(folder, "results", results, {**info, "likelihood": per_image})
    skipped = len(rows(FULL)) - len(jobs)
    left_out = f"{skipped} rows of many evaluations are left to `make demo-full`." if skipped > 0 else ""
    text = report(info, results, bits, left_out)
    (folder / "report.md").write_text(text)
    figures.nfe_fid(folder / "nfe_fid.png", results)
    figures.samples(folder / "samples.png", {"test half": CELLS.to_model(test[:16]), **drawn})
    figures.trajectories(folder / "trajectories.png", {name: paths(model, range(4)) for name, model in models.items()})
    figures.loss(folder / "loss.png", losses)
    figures.likelihood(folder / "likelihood.png", bits)
    (folder / "loss.json").write_text(json.dumps(losses))
    say("\n" + compare.table(results, columns(info["features"])) + "\n\n" + compare.table(bits, LIKELIHOOD))
    say(f"\n{len(results)} rows in {info['seconds'] / 60:.1f} minutes; report and figures in {folder}/. {left_out}")
    sys.stdout.flush()
    return {**info, "rows": results, "likelihood": per_image}
