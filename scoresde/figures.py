"""Figures of a comparison (matplotlib) and plain images (Pillow), each imported only when one is drawn."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["curve", "likelihood", "loss", "nfe_fid", "png", "require", "samples", "scatter", "sheet", "trajectories"]

# Okabe & Ito's colours, told apart by all readers
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"


def require() -> None:
    """Raise before any work when matplotlib or scikit-learn is missing."""
    missing = [name for name in ("matplotlib", "sklearn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: pip install 'scoresde[demo]'")


def _new(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def nfe_fid(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """FID against counted NFE, a panel a problem and a line a solver, with the data's own floor."""
    problems = list(dict.fromkeys(r["problem"] for r in results if "nfe" in r))
    figure, axes = _new(1, len(problems), 5.2 * len(problems), 4.2)
    for axis, problem in zip(axes[0], problems, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for r in results:
            if r["problem"] == problem and "nfe" in r:
                lines.setdefault(r["solver"].split(" 1e")[0], []).append((r["nfe"], r["fid"]))
        for i, (solver, points) in enumerate(lines.items()):
            axis.loglog(*zip(*sorted(points), strict=True), MARKERS[i % 7] + "-", color=COLOURS[i % 7], label=solver, ms=4, lw=1.2)
        for r in results:
            if "nfe" not in r and r["solver"].startswith("train"):
                axis.axhline(r["fid"], color="grey", ls=":", lw=1)
                axis.text(
                    0.99,
                    r["fid"],
                    r["solver"].split(" (")[0],
                    ha="right",
                    va="bottom",
                    fontsize=7,
                    transform=axis.get_yaxis_transform(),
                )
        axis.set(title=problem, xlabel="NFE (counted)", ylabel="FID (digit classifier's features)")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both", lw=0.4)
    _save(figure, path)


def _show(axis: Any, image: Tensor) -> None:
    axis.imshow(image.squeeze(0), cmap="gray", vmin=-1, vmax=1)
    axis.axis("off")


def samples(path: Path, sets: Mapping[str, Tensor], columns: int = 16, most: int = 14) -> None:
    """Rows of images in [-1, 1], one labelled row a set; of many sets, `most` evenly spaced ones."""
    names = list(sets)
    if len(names) > most:
        names = [names[i] for i in sorted({round(k * (len(names) - 1) / (most - 1)) for k in range(most)})]
    figure, axes = _new(len(names), 1, 9, 0.62 * len(names))
    for axis, name in zip(axes[:, 0], names, strict=True):
        row = torch.nn.functional.pad(sets[name][:columns], (0, 1, 0, 1), value=1.0)
        _show(axis, torch.cat(list(row), dim=-1))
        axis.set_title(name, fontsize=7, loc="left", pad=1)
    _save(figure, path)


def png(image: np.ndarray) -> bytes:
    """A PNG file of uint8 `[C, H, W]`, as it stands: grey for C = 1, RGB for 3."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)).save(file, "PNG")
    return file.getvalue()


def sheet(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 `[C, h, w]` of images `[N, C, H, W]` side by side, in a square or a row short of one, with white lines between."""
    n, c, height, width = images.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, c, height + 1, width + 1), 255, np.uint8)
    cells[:n, :, :-1, :-1] = images
    cells = cells.reshape(rows, columns, c, height + 1, width + 1).transpose(2, 0, 3, 1, 4)
    return cells.reshape(c, rows * (height + 1), columns * (width + 1))[:, :-1, :-1]


def trajectories(path: Path, problems: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> None:
    """Images from noise (left) to digit (right): a block a problem and kind of path, the same starts in each."""
    blocks = [(problem, label, states) for problem, kinds in problems.items() for label, states in kinds.items()]
    figure, axes = _new(len(blocks), 1, 6.5, 2.4 * len(blocks))
    for axis, (problem, label, states) in zip(axes[:, 0], blocks, strict=True):
        columns = [torch.cat(list(torch.nn.functional.pad(x, (0, 1, 0, 1), value=1.0)), dim=-2) for x in states]
        _show(axis, torch.cat(columns, dim=-1))
        axis.set_title(f"{problem}, {label}: noise to digit", fontsize=8)
    _save(figure, path)


def loss(path: Path, curves: Mapping[str, Sequence[float]]) -> None:
    """Training loss, smoothed over 50 steps, a line a network."""
    figure, axes = _new(1, 1, 5.5, 3.5)
    for i, (name, values) in enumerate(curves.items()):
        window = min(50, len(values))
        smooth = torch.tensor(values).unfold(0, window, 1).mean(1)
        axes[0, 0].plot(range(window, window + len(smooth)), smooth, color=COLOURS[i], label=name, lw=1.2)
    axes[0, 0].set(xlabel="step", ylabel="weighted DSM loss", title="training")
    axes[0, 0].legend()
    axes[0, 0].grid(alpha=0.3)
    _save(figure, path)


def likelihood(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Histograms of bits/dim of each image, a panel a network."""
    problems = list(dict.fromkeys(r["problem"] for r in rows))
    figure, axes = _new(1, len(problems), 4.6 * len(problems), 3.2)
    for axis, problem in zip(axes[0], problems, strict=True):
        for i, r in enumerate(r for r in rows if r["problem"] == problem):
            axis.hist(
                r["each"], bins=24, color=COLOURS[i], alpha=0.7, label=f"{r['images']}: {r['bits_per_dim']:.2f} ± {r['stderr']:.2f}"
            )
        axis.set(xlabel="bits/dim (lower: more likely)", ylabel="images")
        axis.set_title(problem.encode(errors="replace").decode(), parse_math=False)  # it may be the name of a file
        axis.legend(fontsize=7)
    _save(figure, path)


def curve(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], ylabel: str, xlabel: str = "step") -> None:
    """Lines through points (x, y), a line a name; a logarithmic axis where all y are positive."""
    figure, axes = _new(1, 1, 5.5, 3.5)
    for i, (name, points) in enumerate(lines.items()):
        axes[0, 0].plot(
            *zip(*points, strict=True), color=COLOURS[i % 7], label=name, lw=1.2, marker="." if len(points) < 20 else None
        )
    if all(y > 0 for points in lines.values() for _, y in points):
        axes[0, 0].set_yscale("log")
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    axes[0, 0].legend(fontsize=7)
    axes[0, 0].grid(alpha=0.3)
    _save(figure, path)


def scatter(path: Path, x: Tensor, data: Tensor) -> None:
    """The first two numbers of samples `[N, D]` over those of data; histograms where there is one."""
    figure, axes = _new(1, 1, 4.5, 4.5)
    for points, label, colour in ((data, "data", COLOURS[6]), (x, "samples", COLOURS[1])):
        points = points.detach().double().cpu()
        if points.shape[1] > 1:
            axes[0, 0].plot(points[:, 0].numpy(), points[:, 1].numpy(), ".", ms=2, alpha=0.5, color=colour, label=label)
        else:
            axes[0, 0].hist(points[:, 0].numpy(), bins=40, alpha=0.5, density=True, color=colour, label=label)
    axes[0, 0].legend(fontsize=7)
    _save(figure, path)
