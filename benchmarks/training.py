"""What the trainer costs beside a bare loop: batches, noise, times, clipping, averages, checks, the log's numbers.

python benchmarks/training.py            into results/training.json; some 10 minutes on one core

Bare is `optimizer.zero_grad(); net(x, c).square().mean().backward(); optimizer.step()` on a fixed batch; the trainer is `fit` with uint8
batches of `data.Batches`, one average and a gradient norm. Blocks of the two alternate in one process of one thread; the ratio is of the
medians over blocks. Memory is what is resident after 200, 400, ... steps of the trainer.
"""

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import cells
import torch

import scoresde
from scoresde.data import Batches, load
from scoresde.reports import Scale

OUT = Path(__file__).parent / "results/training.json"
BLOCKS = 9
NETS: dict[str, tuple[Any, tuple[int, ...], int, int]] = {  # make, shape, batch, steps a block
    "MLP(64, width=256), batch 256": (lambda: scoresde.MLP(64, width=256), (64,), 256, 60),
    "UNet 8x8, 16 channels, batch 64": (lambda: scoresde.UNet((1, 8, 8), channels=16), (1, 8, 8), 64, 20),
    "UNet of fashion.py, batch 64": (
        lambda: scoresde.UNet((1, 28, 28), channels=24, multipliers=(1, 2, 2), attention=(2,)), (1, 28, 28), 64, 4,
    ),
    "UNet 32x32, 32 channels, batch 32": (lambda: scoresde.UNet((3, 32, 32), channels=32, multipliers=(1, 2, 2)), (3, 32, 32), 32, 4),
}  # fmt: skip


def resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def data(shape: tuple[int, ...]) -> Any:
    draw = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        return load(torch.randn(5000, *shape, generator=draw))
    return load(torch.randint(0, 256, (5000, *shape), generator=draw, dtype=torch.uint8))


def compare(name: str) -> dict[str, float]:
    """Steps per second of the trainer over those of the bare loop."""
    make, shape, batch, steps = NETS[name]
    source = data(shape)
    net = make()
    x, c = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, batch)
    bare = torch.optim.AdamW(net.parameters(), lr=1e-4)
    model = scoresde.Preconditioned(make(), scoresde.VP())
    training = scoresde.Training(model, torch.optim.AdamW(model.parameters(), lr=1e-4), scoresde.EMA(model))
    scale = Scale(None if source.levels is None else scoresde.Quantized(256))
    trainer = scoresde.fit(training, Batches(source, batch), transform=scale, seed=0)

    def bare_step() -> None:
        bare.zero_grad(set_to_none=True)
        net(x, c).square().mean().backward()
        bare.step()

    times: dict[str, list[float]] = {"bare": [], "fit": []}
    for block in range(BLOCKS + 1):
        for kind, step in (("bare", bare_step), ("fit", lambda: next(trainer))):
            started = time.perf_counter()
            for _ in range(steps):
                step()
            if block:  # the first warms up
                times[kind].append((time.perf_counter() - started) / steps)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    ratios = sorted(a / b for a, b in zip(times["bare"], times["fit"], strict=True))
    return {
        "bare_ms": round(1e3 * medians["bare"], 3), "fit_ms": round(1e3 * medians["fit"], 3),
        "ratio": round(medians["bare"] / medians["fit"], 4), "ratio_of_blocks": [round(r, 3) for r in (ratios[0], ratios[-1])],
    }  # fmt: skip


def memory() -> dict[str, Any]:
    """Resident MiB over 1,200 steps with two averages."""
    source = data((1, 8, 8))
    model = scoresde.Preconditioned(scoresde.UNet((1, 8, 8), channels=16), scoresde.VP())
    training = scoresde.Training(model, ema=[scoresde.EMA(model), scoresde.PowerEMA(model, 0.1)])
    found = []
    for step in scoresde.fit(training, Batches(source, 16), transform=Scale(scoresde.Quantized(256)), steps=1200, seed=0):
        if step.step % 200 == 0:
            found.append(round(resident(), 2))
    return {"resident_mib": found, "growth": round(found[-1] / found[0] - 1, 5)}


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        **cells.machine(),
        "unit": "milliseconds a step; ratio: bare over fit, of medians; lowest and highest of blocks",
    }
    print(json.dumps(found, indent=1))
    found["memory"] = memory()
    print("memory", found["memory"], flush=True)
    found["throughput"] = {}
    for name in NETS:
        found["throughput"][name] = compare(name)
        print(name, found["throughput"][name], flush=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
