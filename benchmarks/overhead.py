"""What the library adds to the network: wall time of a solve outside it, ours and the peers' in one run, one thread, interleaved.

python benchmarks/overhead.py [--out benchmarks/results/overhead.json] [--quick]

(a) a small U-Net on 32 x 32, batch 64: wall / (NFE x network). (b) a trivial network (x / 2 for x0 or eps, whichever the peer
asks for) on (64, 64) and (256, 3, 32, 32): microseconds an evaluation outside it, 20 steps of the same solver on the same Karras
grid, best of the repeats, everything a user's call does included (`sample(...)`, the sampler function, the scheduler's loop).
Initial noise is drawn beforehand for all. (c) what seeds cost beside a generator.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path

import azula.denoise
import azula.noise
import azula.sample
import diffusers
import torch
from noise import processor
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from peers.kdiffusion import load

import scoresde as s
from scoresde import variables as v

STEPS = 20
SDE = s.EDM()


class Half(s.Denoiser):
    """x0 = x / 2."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Half."""
        return x * 0.5


Run = Callable[[Tensor], Tensor]


def ours(solver: s.Solver) -> Run:
    denoiser, times, generator = Half(SDE), s.grid.karras(SDE, STEPS), torch.Generator()
    return lambda x: s.sample(denoiser, x.shape, solver, times=times, x=x, generator=generator, denoise=False).x


def k_diffusion(name: str) -> Run:
    k = load()
    sampler, sigmas = getattr(k, f"sample_{name}"), k.get_sigmas_karras(STEPS + 1, 0.002, 80.0)[:-1]
    return lambda x: sampler(lambda x, sigma: x * 0.5, x, sigmas, disable=True)


def edm(heun: bool) -> Run:
    """Karras et al. 2022, algorithm 1, as one would write it: float64 scalars on the host."""
    sigmas = s.grid.karras(SDE, STEPS)

    def run(x: Tensor) -> Tensor:
        for a, b in pairwise(sigmas):
            d = (x - x * 0.5) / a
            y = x + (b - a) * d
            if heun:
                y = x + (b - a) * (0.5 * d + 0.5 * (y - y * 0.5) / b)
            x = y
        return x

    return run


def hf(make: Callable[[], object]) -> Run:
    """The loop of a diffusers pipeline: set_timesteps, then scale_model_input, the network, step."""
    scheduler = make()

    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator()
        with_generator = isinstance(scheduler, diffusers.DDIMScheduler)
        for t in scheduler.timesteps:
            eps = scheduler.scale_model_input(x, t) * 0.5
            x = (
                scheduler.step(eps, t, x, generator=generator).prev_sample
                if with_generator
                else scheduler.step(eps, t, x).prev_sample
            )
        return x

    return run


class AzulaHalf(azula.denoise.Denoiser):
    """x0 = x / 2, as azula has it."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = azula.noise.VESchedule(0.002, 80.0)

    def forward(self, x_t: Tensor, t: Tensor, **_: object) -> azula.denoise.DiracPosterior:
        """Half."""
        return azula.denoise.DiracPosterior(mean=x_t * 0.5)


def az(kind: str, **options: object) -> Run:
    sampler = getattr(azula.sample, kind)(AzulaHalf(), steps=STEPS, silent=True, **options)
    return lambda x: sampler(x)


def karras_hf(kind: str, **options: object) -> Callable[[], object]:
    return lambda: getattr(diffusers, kind)(use_karras_sigmas=True, **options)


def contests() -> dict[str, tuple[s.Solver, dict[str, Run]]]:
    """Name -> (our solver, the peers that have it)."""
    multistep = "DPMSolverMultistepScheduler"
    table: dict[str, tuple[s.Solver, dict[str, Run]]] = {
        "Heun": (s.Heun(), {"k-diffusion": k_diffusion("heun"), "edm": edm(True), "azula": az("HeunSampler")}),
        "Euler / DDIM": (s.DDIM(), {"k-diffusion": k_diffusion("euler"), "azula": az("DDIMSampler")}),
        "DPM++ 2M": (s.DPMSolverPP(2), {"k-diffusion": k_diffusion("dpmpp_2m"), "diffusers": hf(karras_hf(multistep))}),
        "DPM++ 3M": (s.DPMSolverPP(3, startup=False), {"azula": az("xEABSampler", order=3)}),
        "UniPC 3": (s.UniPC(3, startup=False), {}),
        "DEIS 3": (s.DEIS(2, v.lam, startup=False), {"azula": az("zEABSampler", order=3)}),
        "iPNDM 4": (s.IPNDM(4), {"diffusers": hf(diffusers.IPNDMScheduler)}),
        "AB 4 in eps": (
            s.AdamsBashforth(4, v.eps, startup=False),
            {"k-diffusion": k_diffusion("lms"), "azula": az("zABSampler", order=4)},
        ),
        "AB 3 in velocity": (s.AdamsBashforth(3, startup=False), {"azula": az("vABSampler", order=3)}),
        "midpoint": (s.DPMSolver(2), {"k-diffusion": k_diffusion("dpm_2")}),
    }
    for name, kind, options in (
        ("Heun", "HeunDiscreteScheduler", {}),
        ("DPM++ 3M", multistep, {"solver_order": 3}),
        ("UniPC 3", "UniPCMultistepScheduler", {"solver_order": 3}),
        ("DEIS 3", "DEISMultistepScheduler", {"solver_order": 3}),
    ):
        table[name][1]["diffusers"] = hf(karras_hf(kind, **options))
    table["Euler / DDIM"][1]["diffusers"] = hf(diffusers.DDIMScheduler)
    return table


def evaluations(solver: s.Solver) -> int:
    return solver.evaluations(STEPS)


def best(runs: dict[str, Run], x: Tensor, repeats: int) -> dict[str, float]:
    """Seconds, the least over repeats, the contestants taking turns."""
    times = dict.fromkeys(runs, float("inf"))
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run(x)
                if repeat:
                    times[name] = min(times[name], time.perf_counter() - start)
    return times


def trivial(shape: tuple[int, ...], repeats: int) -> list[dict[str, object]]:
    x, rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)), []
    for name, (solver, peers) in contests().items():
        n = evaluations(solver)

        def network(x: Tensor, n: int = n) -> Tensor:
            for _ in range(n):
                y = x * 0.5
            return y

        bare = {"bare loop": edm(False)} if name.startswith("Euler") else {}  # for reference: no library at all
        seconds = best({"network": network, "ours": ours(solver), **peers, **bare}, x * 80, repeats)
        outside = {k: round((t - seconds["network"]) / n * 1e6, 1) for k, t in seconds.items() if k != "network"}
        fastest = min((p for p in outside if p not in ("ours", "bare loop")), key=outside.__getitem__)
        rows.append(
            {"shape": list(shape), "solver": name, "evaluations": n, "network": round(seconds["network"] / n * 1e6, 1), **outside,
             "fastest peer": fastest, "ours / fastest peer": round(outside["ours"] / outside[fastest], 2)}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def unet(repeats: int, batch: int) -> list[dict[str, object]]:
    """(a): wall of `sample` over NFE times the network alone, the network timed between the solves."""
    shape = (batch, 3, 32, 32)
    net = s.UNet(shape[1:], channels=16).eval()
    denoiser = s.Preconditioned(net, SDE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 80
    c_noise = torch.zeros(batch)
    rows = []
    with torch.no_grad():
        for solver in (s.Heun(), s.DPMSolverPP(2), s.UniPC(3)):
            steps = 10 // (2 if isinstance(solver, s.solvers.SingleStep) else 1)
            n = solver.evaluations(steps) + 1
            ratios = []
            for _ in range(repeats):
                start = time.perf_counter()
                for _ in range(n):
                    net(x, c_noise)
                middle = time.perf_counter()
                found = s.sample(denoiser, shape, solver, steps=steps, x=x, generator=torch.Generator())
                ratios.append((time.perf_counter() - middle) / (middle - start))
            assert found.nfe == n
            row = {"solver": repr(solver), "NFE": found.nfe, "network, ms": round((middle - start) / n * 1e3, 1)}
            rows.append(
                {**row, "wall / (NFE x network)": round(sorted(ratios)[len(ratios) // 2], 4), "all": [round(r, 4) for r in ratios]}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def seeded(repeats: int) -> list[dict[str, object]]:
    """(c): a solve from seeds beside one from a generator: the initial noise, and a draw a step."""
    rows = []
    denoiser, times, generator = Half(SDE), s.grid.karras(SDE, STEPS), torch.Generator()
    for shape, solver in product(((64, 64), (256, 3, 32, 32)), (s.DDIM(), s.Ancestral())):
        solve = partial(s.sample, denoiser, shape, solver, times=times)
        runs = {"seeds": lambda x, f=solve: f(seeds=range(len(x))).x, "generator": lambda x, f=solve: f(generator=generator).x}
        seconds = best(runs, torch.zeros(shape), repeats)
        rows.append({"shape": list(shape), "solver": repr(solver), **{k: round(t / STEPS * 1e6, 1) for k, t in seconds.items()}})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    parser.add_argument("--quick", action="store_true", help="few repeats, no U-Net")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "scoresde", "diffusers", "azula", "k-diffusion")},
        },
        "threads": torch.get_num_threads(),
        "load at start": round(os.getloadavg()[0], 2),
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "unit of (b)": "microseconds an evaluation outside the network, best of the repeats",
    }
    print(json.dumps(report, indent=1))
    report["(b) trivial network"] = [
        row for shape, n in (((64, 64), 200), ((256, 3, 32, 32), 30)) for row in trivial(shape, n // (5 if args.quick else 1))
    ]
    if not args.quick:
        report["(a) U-Net"] = unet(5, 64)
        report["(c) seeds, microseconds a step with the network"] = seeded(20)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
