"""What a configuration of a training means: data, network, optimizer, averages, ready to be trained."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint
from . import config as configs
from .bits import Quantized
from .choices import build
from .command import check_device
from .config import Config
from .data import Batches, Source, load, split
from .denoiser import Preconditioned
from .parallel import ALONE, Group
from .reports import Scale
from .train import Step, Training, fit

__all__ = ["Job", "prepare"]

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Job:
    """A configuration made into objects."""

    config: Config
    source: Source
    held_out: Source | None
    scale: Scale
    batches: Batches
    training: Training
    group: Group = ALONE

    @property
    def model(self) -> Preconditioned:
        """What is trained."""
        return self.training.denoiser  # type: ignore[bad-return]

    @property
    def average(self) -> Preconditioned:
        """What is shown and scored: the first average, or the network itself without any, in eval mode; whole also where it is sharded."""
        return self.training.whole(self.training.emas[0].module if self.training.emas else self.model)

    def rate(self, step: int) -> float:
        """Factor on the learning rate of a step: min(1, step / warmup) times a fall over the whole training."""
        config, done = self.config, (step - 1) / self.config.steps
        falls = {"none": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "sqrt": math.sqrt(1 - done)}
        return min(1.0, step / config.warmup if config.warmup else 1.0) * falls[config.decay]

    def fit(self, batches: Callable[[int], Any]) -> Iterator[Step]:
        """The training itself, from the step where it stands."""
        config, (times, weight) = self.config, configs.times_and_weight_of(self.config)
        return fit(
            self.training, batches, weight=weight, times=times,
            rate=self.rate, clip=config.clip, accumulate=config.accumulate, label_dropout=config.label_dropout, transform=self.scale,
            patience=config.patience, compile=config.compile, steps=config.steps, seed=config.seed,
            group=self.group,
        )  # fmt: skip

    @cached_property
    def network(self) -> dict[str, Any]:
        """The network by name and settings, which one that is sharded no longer tells: asked for before."""
        return checkpoint.describe(self.model)

    def described(self) -> dict[str, Any]:
        """config.json of its checkpoints: the network, and what its numbers mean."""
        cells, source = self.scale.cells, self.source
        data = {
            "source": self.config.data.source,
            "entries": len(source),
            "shape": list(source.shape),
            "sha256_of_some": self.fingerprint,
        }
        if cells is not None:
            data |= {"levels": cells.levels, "low": cells.low, "high": cells.high}
        found = {**self.network, "emas": [e.name for e in self.training.emas], "data": data}
        return json.loads(json.dumps(found))  # as it is read back: lists for tuples

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of 256 entries, evenly spaced: other data of the same name and shape are other data."""
        rows = spread(self.source, 256)
        labels = b"" if self.source.labels is None else self.source.labels[rows].tobytes()
        return hashlib.sha256(np.ascontiguousarray(self.source.x[rows]).tobytes() + labels).hexdigest()

    def seen(self, source: Source, count: int) -> Tensor:
        """Up to `count` entries of a source, evenly spaced, in the model's range."""
        return self.scale.seen(source.x[spread(source, count)])


def spread(source: Source, count: int) -> np.ndarray:
    """The indices of up to `count` entries, evenly spaced."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(np.int64)


def prepare(config: Config, group: Group = ALONE) -> Job:
    """Load the data, build network, optimizer and averages, whole in every process; raises before any step is taken."""
    device = check_device(group.place(config.device))
    data, named = config.data, config.data.source in configs.SETS
    source = (
        load(data.source, part=data.part, folder=data.folder)
        if named
        else load(Path(data.source), labels=data.labels, levels=data.levels)
    )
    if data.conditional and source.labels is None:
        raise ValueError(f"data.conditional is true and {data.source} has no labels; wanted data.labels, or a folder a class")
    source, held_out = (source, None) if not data.held_out else split(source, data.held_out, seed=config.seed)
    cells = None if source.levels is None else Quantized(source.levels, data.low, data.high)
    scale = Scale(cells, data.dequantize)
    if cells is None and data.dequantize:
        raise ValueError(f"data.dequantize is true and {data.source} is of floats, which have no grey levels; wanted false")
    batches = Batches(
        source, config.batch, seed=config.seed, flip=data.flip, labels=data.conditional, rank=group.rank, world=group.world
    )
    wanted = bool(config.sde.options.get("from_data"))
    sde = configs.sde_of(config.sde, scale.seen(source.x[spread(source, 5000)]) if wanted else None)
    net = configs.net_of(config.net, source.shape, source.classes if data.conditional else 0, seed=config.seed)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[no-matching-overload]
    parameterization = build(config.parameterization, configs.PARAMETERIZATIONS, "parameterization")
    model = Preconditioned(net, sde, parameterization).to(device)
    objective = build(config.objective, configs.OBJECTIVES, "objective")
    own = list(objective.to(device).parameters()) if isinstance(objective, nn.Module) else []
    optimizer = configs.optimizer_of(config.optimizer, [*model.parameters(), *own])
    emas = [configs.average_of(average, model) for average in config.ema]
    training = Training(model, optimizer, emas, objective=objective, precision=PRECISIONS[config.precision])
    return Job(config, source, held_out, scale, batches, training, group)
