"""What a training shows of itself while it runs: the loss at each noise level, a grid of samples, a Frechet distance with its floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import figures, store
from .bits import Quantized
from .codec import from_tensors, to_json, to_tensors
from .denoiser import Denoiser
from .images import is_picture
from .metrics import Features, ModuleFeatures, Statistics, classifier, frechet_distance, train_classifier
from .parallel import ALONE, Group
from .sample import sample

__all__ = ["Pixels", "Scale", "Scorer", "draw", "learn_features", "load_features", "save_features", "show"]

TAUGHT = 20_000  # images that a feature network of a run learns from, so that it takes a minute or two


@dataclass(frozen=True)
class Scale:
    """Between what is stored and what the model sees: the cells of integer images, None for vectors, which are seen as they are."""

    cells: Quantized | None = None
    dequantize: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Of a batch in training: at the centre of each cell, or anywhere in it."""
        if self.cells is None:
            return x
        if not self.dequantize:
            return self.cells.to_model(x)
        return self.cells.to_model(x, torch.rand(x.shape, generator=generator, device=generator.device).to(x.device))

    def seen(self, x: np.ndarray) -> Tensor:
        """Of stored data, without noise."""
        stored = torch.from_numpy(np.array(x, order="C"))  # a mapped file is not to be written to
        return stored if self.cells is None else torch.cat([self.cells.to_model(part) for part in stored.split(256)])

    def rounded(self, x: Tensor) -> Tensor:
        """Of samples: to grey levels and back, as a file would."""
        return x if self.cells is None else self.cells.to_model(self.cells.to_levels(x))

    def bytes(self, x: Tensor) -> np.ndarray:
        """Samples as uint8 grey, 0 .. 255."""
        cells = self.cells or Quantized()
        return (cells.to_levels(x).double() * (255 / (cells.levels - 1))).round().byte().cpu().numpy()


# --- features ------------------------------------------------------------------------------------------------------------
class Pixels:
    """The data themselves as features, where there are no labels to learn better ones from: what a Gaussian of the pixels sees."""

    name, sha256 = "pixels", "0" * 64

    def __call__(self, images: Tensor) -> Tensor:
        """[N, D]."""
        return images.flatten(1).cpu()


def save_features(folder: Path, name: str, net: nn.Sequential, **settings: Any) -> Path:
    """Write a `metrics.classifier` into a folder; settings: its arguments shape, classes, features; and what was measured of it."""
    files = {"model.safetensors": to_tensors(net.state_dict(), name), "config.json": to_json({"name": name, **settings}, name)}
    folder.mkdir(parents=True, exist_ok=True)
    store.put(folder, files)
    return folder


def load_features(folder: Path) -> ModuleFeatures:
    """The features in a folder that `save_features` wrote, verified; ValueError for another."""
    files = store.read(folder)
    try:
        config = json.loads(files["config.json"])
        net = classifier(config["shape"], config["classes"], config["features"])
        net.load_state_dict(from_tensors(files["model.safetensors"], f"{folder / 'model.safetensors'}"))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no features that save_features wrote ({error!r})") from error
    return ModuleFeatures(config["name"], net[:-1])


def learn_features(folder: Path, images: Tensor, labels: Tensor, classes: int, epochs: int = 3, seed: int = 0) -> ModuleFeatures:
    """A classifier of these images, the last tenth kept out to say how good it is, saved in the folder."""
    kept = max(1, len(images) // 10)
    shape = tuple(images.shape[1:])
    net = classifier(shape, classes, seed=seed)
    train_classifier(net, images[:-kept], labels[:-kept], epochs, seed=seed)
    with torch.no_grad():
        right = torch.cat([net(x).argmax(1) for x in images[-kept:].split(512)]) == labels[-kept:]
    facts = {"accuracy": float(right.double().mean()), "images": len(images) - kept, "epochs": epochs, "seed": seed}
    save_features(folder, f"cnn-{classes}-classes", net, shape=list(shape), classes=classes, features=64, **facts)
    return load_features(folder)


# --- scores and pictures -------------------------------------------------------------------------------------------------
def draw(
    denoiser: Denoiser, shape: tuple[int, ...], count: int, nfe: int, classes: int = 0, batch: int = 64, group: Group = ALONE
) -> Tensor:
    """Samples of the seeds 0 .. count - 1, in the default solver; of a network with classes, labels in turn.

    Of a group, those of the seeds in the blocks of `batch` that are this process's: the same bits, in the order of ranks.
    """
    blocks, microbatch = -(-count // batch), min(batch, count)
    mine = range(count)[group.share(blocks).start * batch : group.share(blocks).stop * batch]
    if not mine:
        return torch.empty(0, *shape)
    model = denoiser if not classes else denoiser.condition(torch.tensor(mine) % classes)  # type: ignore[attr-defined]
    return sample(model, (len(mine), *shape), nfe=nfe, seeds=mine, microbatch=microbatch).x


@dataclass(frozen=True)
class Scorer:
    """Frechet distance to a reference, in given features; `floor`: that of as many real data, which no sampler should beat by much."""

    features: Features
    reference: Tensor
    scale: Scale
    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "_statistics", self._of(self.reference))

    def _of(self, x: Tensor) -> Statistics:
        found = Statistics()
        for part in x.split(1000):
            found.update(self.features(part))
        return found

    def __call__(self, x: Tensor) -> float:
        """Of samples in the model's range."""
        a, b = self._of(self.scale.rounded(x.float()).cpu()), self._statistics  # type: ignore[attr-defined]
        return float(frechet_distance(a.mean, a.cov, b.mean, b.cov))

    @property
    def name(self) -> str:
        """FID@N in the log: below 10,000 samples the number is not the literature's."""
        return f"fid@{self.count}"

    def record(self, floor: float, **facts: Any) -> dict[str, Any]:
        """What the number depends on."""
        features = {"name": self.features.name, "sha256": self.features.sha256}
        return {"samples": self.count, "features": features, "reference": len(self.reference), "floor": floor, **facts}


def show(path: Path, x: Tensor, data: Callable[[], Tensor], scale: Scale, columns: int) -> None:
    """Images as a sheet; vectors as a scatter of their first two numbers over the data's, which are read for that alone."""
    if is_picture(x.shape[1:]):
        store.write_file(path, figures.png(figures.sheet(scale.bytes(x), columns)))
    else:
        figures.scatter(path, x.flatten(1), data().flatten(1))


def figures_of(folder: Path, rows: Sequence[Mapping[str, Any]], levels: Sequence[Mapping[str, Any]]) -> None:
    """loss.png and validation.png of what the logs hold."""
    losses = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    if losses:
        figures.curve(folder / "loss.png", {"training": losses, **_pairs(rows, "validation_loss")}, "loss")
    if levels:
        steps = sorted({r["step"] for r in levels})
        shown = [steps[round(i * (len(steps) - 1) / 5)] for i in range(6)] if len(steps) > 6 else steps
        lines = {f"step {s}": [(r["logsnr"], r["loss"]) for r in levels if r["step"] == s] for s in dict.fromkeys(shown)}
        figures.curve(folder / "validation.png", lines, "loss of what is held out", "logsnr")


def _pairs(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    found = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    return {key.replace("_", " "): found} if found else {}
