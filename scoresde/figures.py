"""Figures of a comparison (matplotlib, imported only when one is drawn)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["likelihood", "loss", "nfe_fid", "require", "samples", "trajectories"]

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
