"""What a draw costs: seeded noise and Brownian increments against torch.randn, one thread, microseconds a draw.

python benchmarks/noise.py [--out benchmarks/results/noise.json]
"""

import argparse
import json
import os
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch

import scoresde
from scoresde.noise import brownian, gaussian, seeded

SHAPES = [(64, 64), (256, 3, 32, 32), (512, 1, 8, 8)]
GRIDS = {"dyadic": torch.linspace(1, 0, 33, dtype=torch.float64), "other": torch.linspace(1, 0.07, 8, dtype=torch.float64) ** 1.5}


def microseconds(sweep, draws, repeats):
    """Median over `repeats` of the time of one sweep, a draw; the first sweep warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        sweep()
        seconds.append((time.perf_counter() - start) / draws)
    return statistics.median(seconds[1:]) * 1e6


def measure(shape):
    x, grid = torch.zeros(shape), GRIDS["dyadic"]
    repeats = 7 if x.numel() > 2**17 else 31

    def steps(source, grid):
        return lambda: [source(x, t, s) for t, s in pairwise(grid)]

    generator = torch.Generator().manual_seed(0)
    row = {
        "shape": list(shape),
        "torch.randn": microseconds(lambda: [torch.randn(shape, generator=generator) for _ in range(32)], 32, repeats),
        "gaussian": microseconds(steps(gaussian(generator), grid), 32, repeats),
        "seeded": microseconds(steps(seeded(range(len(x))), grid), 32, repeats),
        "seeded, alone": microseconds(lambda: seeded(range(len(x)))(x, grid[0], grid[1]), 1, repeats),
    }
    for name, times in GRIDS.items():
        few = repeats if name == "dyadic" and x.numel() <= 2**17 else 3
        row[f"brownian, {name} times"] = microseconds(steps(brownian(range(len(x)), 0, 1), times), len(times) - 1, few)
    row["seeded / torch.randn"] = row["seeded"] / row["torch.randn"]
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}


def processor():
    """The model name, as Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "noise.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    report = {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "vector width": torch.backends.cpu.get_cpu_capability(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "scoresde": scoresde.__version__},
        "threads": torch.get_num_threads(),
        "load at start": round(os.getloadavg()[0], 2),
        "unit": "microseconds a float32 draw, median of repeats",
    }
    print(json.dumps(report, indent=1))
    report["rows"] = []
    for shape in SHAPES:
        report["rows"].append(measure(shape))
        print(json.dumps(report["rows"][-1]), flush=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
