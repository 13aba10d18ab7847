"""A small U-Net of Fashion-MNIST under VP: the network of 784 numbers that `likelihood.py` measures probes on.

python benchmarks/fashion.py [STEPS]      train it (4,000 steps: half an hour on one core) into benchmarks/weights/fashion

The images (Xiao et al. 2017, MIT) are those of `scoresde.datasets.fashion_mnist`: from the folder SCORESDE_FASHION if it is set.
"""

import sys
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import scoresde
from scoresde import checkpoint, datasets, loss, parameterizations

FOLDER = Path(__file__).parent / "weights/fashion"
CELLS = scoresde.Quantized(256)
SHAPE, SIGMA_DATA, BATCH, STEPS = (1, 28, 28), 0.7, 64, 4000


@cache
def images(part: str) -> Tensor:
    """uint8 `[N, 1, 28, 28]`, N = 60,000 of `train` or 10,000 of `t10k`; OSError when they can be had nowhere."""
    return torch.from_numpy(np.array(datasets.fashion_mnist(part={"t10k": "test"}.get(part, part)).x))


def train(steps: int) -> None:
    """The demo's recipe: EDM's preconditioning and weight, AdamW, an average of the weights; uniform dequantization."""
    parameterization = partial(parameterizations.edm, sigma_data=SIGMA_DATA)
    model = scoresde.Preconditioned(
        scoresde.UNet(SHAPE, channels=24, multipliers=(1, 2, 2), attention=(2,)), scoresde.VP(), parameterization
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 200) * max(0.0, 1 - i / steps) ** 0.5)
    ema = scoresde.EMA(model, decay=0.998)
    data, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    known = images("train").long()

    def batches():
        for _ in range(steps):
            rows = torch.randint(len(known), (BATCH,), generator=data)
            yield CELLS.to_model(known[rows], torch.rand(BATCH, *SHAPE, generator=data))

    times = loss.stratified(partial(loss.log_normal, mean=-1.2, std=1.6))
    started, losses = time.perf_counter(), []
    for step in scoresde.fit(
        model,
        batches(),
        weight=partial(loss.edm, sigma_data=SIGMA_DATA),
        times=times,
        optimizer=optimizer,
        ema=ema,
        generator=noise,
    ):
        schedule.step()
        losses.append(step.loss)
        if len(losses) % 200 == 0:
            print(f"{len(losses)} loss {sum(losses[-200:]) / 200:.4f} {time.perf_counter() - started:.0f} s", flush=True)
            checkpoint.save(FOLDER, ema.module, overwrite=True)
    checkpoint.save(FOLDER, ema.module, overwrite=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
