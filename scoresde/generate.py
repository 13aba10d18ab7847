"""Samples of a saved model as files, a seed a sample: resumable, and the same bits however the work is cut up."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import figures, resume, solvers
from .bits import Quantized
from .checks import NonFiniteError, check_count
from .command import check_device, given, loaded, opened, ran, versions, warn
from .denoiser import Preconditioned
from .filling import Begun, Filling, admit, begin, together
from .images import is_picture
from .linear import LinearSDE
from .pages import PATIENCE, Facts, Pages, guarded
from .parallel import ALONE, Group
from .resume import MEND, WRITING
from .sample import default_solver, sample
from .samples import COSTS, Layout, digest, files, folders, samples_of, table
from .seeds import Seeds, parse_seeds
from .solve import plan
from .solvers import Solver
from .store import write_file
from .strict import nearest

__all__ = ["Settings", "parse_seeds", "parse_solver", "run", "samples_of"]

NFE = 35  # where no budget is given
MANY = 10_000  # files a folder holds before each thousand gets one of its own
SHOWN = 64  # samples in the grid
FIRST = Seeds((range(SHOWN),))


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else value is None or isinstance(value, (bool, int, float))


def parse_solver(text: str) -> Solver:
    """The one of `scoresde.solvers` that a name and its arguments after colons mean: Heun, DPMSolverPP:order=3, Churn:Heun:40.

    An argument is a number, True, False, None, a tuple of them, or the name of a solver with its defaults.
    """
    name, *words = (word.strip() for word in text.split(":"))
    known = {n: getattr(solvers, n) for n in solvers.__all__ if not inspect.isabstract(getattr(solvers, n))}
    if name not in known:
        raise ValueError(f"solver is {text!r}; {nearest(name, known)}")
    values: list[Any] = []
    named: dict[str, Any] = {}
    try:
        for word in words:
            key, equals, value = word.rpartition("=")
            argument = known[value]() if value in known else ast.literal_eval(value)
            if value not in known and not _is_plain(argument):
                raise ValueError(f"{value} is neither a number, True, False nor a solver's name")
            named.update({key: argument}) if equals else values.append(argument)
        return known[name](*values, **named)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"solver is {text!r} ({error}); wanted {name}{inspect.signature(known[name])}") from error


@dataclass(frozen=True)
class Settings:
    """What decides the samples beside the model, by the names on the command line; seeds alone may differ from run to run.

    solver: as `parse_solver` reads it, None: the library's; one of nfe (the final mean included) and steps, none: nfe=35, or what an
    adaptive solver takes; labels: None for the unconditional model, one for all, or "cycle", seed modulo classes; weights: which, of a
    checkpoint that has several; levels, low, high: the cells of the grey levels, as `Quantized`, None of low and high: the training's,
    else -1 and 1; levels None, a network whose event is no grey or RGB image: floats as they are; format: "png" (a file a sample, its
    levels as they are) or "npz" (a file a batch: x, seeds, labels, -1 for none), None: png of images; subdirs: a folder a thousand PNG
    files, None: beyond 10,000.
    """

    seeds: Seeds = FIRST
    solver: str | None = None
    nfe: int | None = None
    steps: int | None = None
    labels: int | str | None = None
    weights: str | None = None
    levels: int | None = 256
    low: float | None = None
    high: float | None = None
    format: str | None = None
    subdirs: bool | None = None
    batch: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.seeds, Seeds) or not self.seeds.ranges:
            raise TypeError(f"seeds is {self.seeds!r}; wanted at least one seed, as parse_seeds('0-63')")
        check_count(self.batch, "batch")
        for name, known in (("dtype", ("float32", "float64")), ("format", (None, "png", "npz"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted one of {', '.join(filter(None, known))}")
        if self.nfe is not None and self.steps is not None:
            raise ValueError("nfe and steps are both given; wanted one of them, or none for nfe=35")
        for name in ("nfe", "steps"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        if self.labels not in (None, "cycle") and (not isinstance(self.labels, int) or self.labels < 0):
            raise ValueError(f"labels is {self.labels!r}; wanted a label, or cycle: the seed modulo the number of classes")
        if self.format == "png" and (self.levels or 257) > 256:
            raise ValueError(f"format is png and levels is {self.levels}; wanted format npz: PNG files here have 8 bits")
        if self.format == "npz" and self.subdirs:
            raise ValueError("subdirs is of PNG files and format is npz; drop one")
        if self.solver is not None:
            parse_solver(self.solver)
        self.cells  # noqa: B018  (it has words of its own)
        check_device(self.device)

    @property
    def cells(self) -> Quantized | None:
        """Of the images; None: floats."""
        return None if self.levels is None else Quantized(self.levels, **given(self, ("low", "high")))

    def plan(self, sde: LinearSDE, shape: Sequence[int]) -> tuple[Solver, Tensor]:
        """Solver and times for events of this shape; ValueError where the budget does not fit the solver."""
        budget = NFE if self.nfe is None and self.steps is None else self.nfe
        if self.solver is None:
            solver = default_solver(budget or (self.steps or 0) + 1, math.prod(shape))  # the final mean is one
        else:
            solver = parse_solver(self.solver)
        nfe = self.nfe if solver.adaptive else budget
        return solver, plan(sde, solver, nfe=nfe, steps=self.steps, times=None, grid=None, extra=1)

    def fitted(self, data: Mapping[str, Any], shape: Sequence[int], classes: int) -> Settings:
        """With nothing left open but subdirs, for a model trained on such data; refuses what does not fit it."""
        image = is_picture(shape)
        levels = self.levels if image else None
        format = self.format or ("png" if levels is not None and levels <= 256 else "npz")
        if format == "png" and not image:
            raise ValueError(f"format is png, and the model's samples are {list(shape)}, not [1 or 3, H, W]; wanted format npz")
        if format == "png" and importlib.util.find_spec("PIL") is None:
            raise ModuleNotFoundError("PNG files are written by Pillow: pip install 'scoresde[plots]', or choose format npz")
        if self.labels is not None and not classes:
            raise ValueError(f"labels is {self.labels!r} and the model has no classes; drop it")
        if isinstance(self.labels, int) and self.labels >= classes:
            raise ValueError(f"labels is {self.labels}; the model has classes 0 .. {classes - 1}")
        ends = {"low": data.get("low", -1.0), "high": data.get("high", 1.0)}
        return replace(self, levels=levels, format=format, **(dict.fromkeys(ends) if levels is None else ends | given(self, ends)))

    def label(self, seed: int, classes: int) -> int:
        """Of a seed; -1: none."""
        if self.labels is None:
            return -1
        return seed % classes if isinstance(self.labels, str) else self.labels

    @property
    def layout(self) -> Layout:
        """Which file a seed is in."""
        return Layout(self.format, self.subdirs, self.batch)

    def file(self, seed: int) -> str:
        """The file that a seed is in, a function of nothing else."""
        return self.layout.file(seed)


# --- a batch -------------------------------------------------------------------------------------------------------------
def _event(model: Preconditioned) -> tuple[tuple[int, ...], int]:
    """Shape of a sample, number of classes."""
    config: dict[str, Any] = model.net.config  # type: ignore[bad-assignment]
    return tuple(config["shape"]), config.get("classes", 0)


def draw(
    folder: Path, config: str, settings: Settings, out: Path, block: int, wanted: Sequence[int], there: Sequence[int], run: str = ""
) -> list[list[Any]]:  # fmt: skip
    """The rows of the seeds `wanted` of block .. block + batch - 1, written after their files; those `there` have rows already.

    run: as `pages.current` knows it; if it is over by then, no file is written.

    The network sees the whole block, each seed in its place, whatever is wanted of it: the bits of a sample may depend on both.
    """
    model = loaded(folder, config, settings.device, settings.weights)
    shape, classes = _event(model)
    solver, times = settings.plan(model.sde, shape)
    seeds = range(block, min(block + settings.batch, 2**64))
    labels = [settings.label(s, classes) for s in seeds]
    if settings.labels is not None:
        model = model.condition(torch.tensor(labels))
    found = sample(
        model, (len(seeds), *shape), solver, times=times, seeds=seeds, microbatch=settings.batch, dtype=getattr(torch, settings.dtype),
        device=settings.device, throw=False,
    )  # fmt: skip
    x = (found.x if settings.cells is None else settings.cells.to_levels(found.x)).cpu().numpy()
    costs = [float(found.ledger.get(name, 0.0)) for name in COSTS]
    status, nfe = found.status.tolist(), found.nfe_each.tolist()
    done = [s for s in wanted if not status[s - block]]
    if settings.format == "png":
        for s in done:
            path = out / settings.file(s)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, guarded(figures.png(x[s - block]), out, run), out / WRITING)
    elif done:
        kept, buffer = sorted({*done, *there}), io.BytesIO()  # the file is written anew with those it had: the same bits
        rows = [s - block for s in kept]
        np.savez(buffer, x=x[rows], seeds=np.array(kept, np.uint64), labels=np.array(labels)[rows])
        write_file(out / settings.file(block), guarded(buffer.getvalue(), out, run), out / WRITING)
    ends = lambda s: ("", "") if status[s - block] else (settings.file(s), digest(x[s - block]))
    each = ((s, s - block, *ends(s)) for s in wanted)
    return [[s, name, labels[i], nfe[i], status[i], *costs, written] for s, i, name, written in each]


def _grid(out: Path, settings: Settings, shape: Sequence[int], seeds: Sequence[int]) -> None:
    """The picture of these samples side by side; a warning where it cannot be made."""
    levels = settings.levels or 2
    try:
        x = np.stack(settings.layout.read(out, shape, seeds)).astype(np.float64)
        sheet = figures.sheet((255 * x / (levels - 1)).round().astype(np.uint8))
        write_file(out / "grid.png", figures.png(sheet), out / WRITING)
    except ModuleNotFoundError:
        warn("no grid.png without Pillow: pip install 'scoresde[plots]'")
    except Exception as error:  # a picture is not worth the samples
        warn(f"no grid.png: {type(error).__name__}: {error}")


# --- the whole -----------------------------------------------------------------------------------------------------------
def _pinned(config: Mapping[str, Any], sha256: str, settings: Settings, solver: Solver, times: Tensor) -> dict[str, Any]:
    """What may not change between the runs that fill one folder; where and how fast they run may."""
    return {
        "checkpoint_sha256": sha256, **{name: config[name] for name in ("sde", "parameterization", "net")},
        "solver": repr(solver), "steps": None if solver.adaptive else len(times) - 1,
        "labels": settings.labels, "levels": settings.levels, "low": settings.low, "high": settings.high, "format": settings.format,
        "subdirs": settings.subdirs, "batch": settings.batch, "dtype": settings.dtype,
        "device": torch.device(settings.device).type, "versions": versions(),
    }  # fmt: skip


def _begin(out: Path, settings: Settings, overwrite: bool) -> None:
    """Drop what earlier runs left where that is asked for; FileExistsError where samples are of no run."""
    pages = table(out, settings.layout, settings.seeds)
    admit(pages, "subdirs")
    ours = (path for path in files(out) if path.suffix != ".png" or path.parent != out)  # a picture beside samples/ is the user's
    if not (out / "settings.json").exists() and (pages.files() or any(ours)):
        raise FileExistsError(f"{out} holds samples and no settings.json to say of what; choose another --out")
    if overwrite:
        for name in ("summary.json", "grid.png"):
            (out / name).unlink(missing_ok=True)
        for path in list(ours):
            path.unlink()
        for folder in list(folders(out))[:-1]:
            with suppress(OSError):  # it holds something else
                folder.rmdir()
        pages.drop()
        (out / "settings.json").unlink(missing_ok=True)  # last: as long as files are there, it says whose they are


def _there(out: Path, layout: Layout) -> tuple[Callable[[list[str]], bool], Callable[[Seeds], bool]]:
    """Whether the file that a row names is there, an npz with its seed; whether those of all these seeds are, by listing folders."""

    @functools.lru_cache(maxsize=4)
    def shard(name: str) -> frozenset[int]:
        with (
            suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
            np.load(out / name, allow_pickle=False) as found,
        ):
            return frozenset(found["seeds"].tolist())
        return frozenset()

    if layout.format == "npz":
        return lambda row: int(row[0]) in shard(row[1]), lambda part: all(s in shard(layout.file(s)) for s in part)
    names = functools.lru_cache(maxsize=1)(lambda folder: frozenset(os.listdir(folder) if folder.is_dir() else ()))
    listed = lambda path: path.name in names(path.parent)
    return lambda row: (out / row[1]).is_file(), lambda part: all(listed(out / layout.file(s)) for s in part)


def _subdirs(out: Path, settings: Settings) -> bool:
    """Whether each thousand PNG files has a folder: as asked, as before, or by their number."""
    if settings.subdirs is not None or settings.format == "npz":
        return bool(settings.subdirs)
    with suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads((out / "settings.json").read_text())["subdirs"])
    return settings.seeds.count > MANY


def _summary(facts: Facts) -> dict[str, Any]:
    """n, and of a sample: nfe (the largest), nfe_mean and the ledger."""
    ledger = {name: facts.mean(name) for name in COSTS}
    return {"n": facts.n, "nfe": facts.nfe, "nfe_mean": facts.mean("nfe"), "ledger": ledger}


def _words(found: Mapping[str, Any], out: Path) -> str:
    return f"{found['n']} samples of {found['shape']}: {found['solver']}, NFE {found['nfe']} a sample; in {out}/"


def _few(words: Iterable[str]) -> str:
    first = list(itertools.islice(words, 9))
    return ", ".join(first[:8]) + (", ..." if len(first) > 8 else "")


def run(
    folder: Path, out: Path, settings: Settings | None = None, *, processes: int = 1, overwrite: bool = False,
    say: Callable[[str], object] = print, group: Group = ALONE,
) -> dict[str, Any]:  # fmt: skip
    """Samples of the checkpoint in `folder`, one a seed, into `out`; return the summary of those asked for.

    Samples that `out` has are kept, and those whose files are gone made again (beyond a million: after pages.jsonl was removed). What is
    missing comes in whole batches of the seeds b batch .. (b + 1) batch - 1, of which those asked for are written: a seed has the same
    mates and place, hence the same bits, whatever is asked for and in however many processes. A row of samples.csv (beyond 50,000: of a
    page of it) says that a sample is on the disk, summary.json that all are; grid.png shows the first 64, their levels stretched. Each
    process of `group` calls it alike and works on batches of its own, in so many `processes`.
    Raises: FileExistsError for a folder with other settings, NonFiniteError that names the seeds whose samples are not finite, after all
    others are done, RuntimeError for a batch that failed, with what is done kept.
    """
    started, settings = time.perf_counter(), settings or Settings()
    with together(group):
        device = group.place(settings.device)
        folder, text, model = opened(folder, device, settings.weights)
        config = json.loads(text)
        shape, classes = _event(model)
        settings = settings.fitted(config.get("data", {}), shape, classes)
        solver, times = settings.plan(model.sde, shape)
        check_count(processes, "processes")
        sha256 = config["sha256"]  # of the usual weights
        if settings.weights is not None:
            sha256 = hashlib.sha256((folder / f"{settings.weights}.safetensors").read_bytes()).hexdigest()
    group.agree("the model", sha256)
    group.agree("the settings", repr(settings))
    group.check_shared(out)
    if classes and settings.labels is None and group.first:
        warn(f"the model has {classes} classes and the samples have no label; labels are given by --labels cycle, or one for all")
    with ExitStack() as stack:

        def first() -> tuple[bool, dict[str, Any], Begun]:
            stack.enter_context(resume.locked(out))
            _begin(out, settings, overwrite)
            fitted = replace(settings, subdirs=(subdirs := _subdirs(out, settings)))
            pinned = _pinned(config, sha256, fitted, solver, times)
            resume.pin(out, pinned, MEND)
            there, whole = _there(out, fitted.layout)
            same = {"seeds": str(fitted.seeds)}
            return subdirs, pinned, begin(table(out, fitted.layout, fitted.seeds), there, same, "grid.png", whole)

        subdirs, pinned, begun = group.by_first(first)
        if begun.found is not None:
            if group.first:
                say(f"all {settings.seeds.count} samples are there: nothing to compute\n{_words(begun.found, out)}")
            return begun.found
        settings = replace(settings, subdirs=subdirs, device=device)
        filling = Filling(table(out, settings.layout, settings.seeds), begun, _there(out, settings.layout)[0], group)
        arguments = lambda piece: (folder, text, settings, out, piece.first, piece.wanted, piece.known, begun.run)
        computed = filling.fill(processes, draw, arguments, lambda piece, rows: rows, "sample", "seed")
        more = {
            "seeds": str(settings.seeds), "shape": list(shape), **pinned, "t_min": float(model.sde.t_min), "checkpoint": str(folder),
            "weights": settings.weights,
            **ran(started, computed, processes, group.world, settings.device),
        }  # fmt: skip
        found = group.by_first(lambda: _end(filling.pages, settings, shape, more, group))
    if group.first:
        say(_words(found, out))
    return found


def _end(pages: Pages, settings: Settings, shape: Sequence[int], more: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """The grid and, last, the summary; NonFiniteError where there are none for some seeds."""
    facts, sha256 = pages.sums(PATIENCE if group.world > 1 else 1)
    if facts.bad:
        pages.close()
        seeds, statuses = _few(row[0] for row in facts.first_bad), _few(sorted({row[4] for row in facts.first_bad}))
        raise NonFiniteError(
            f"the samples of {facts.bad} of {settings.seeds.count} seeds are not finite and were not written: {seeds} (status {statuses}: "
            f"the step, or as scoresde.Status says); the others are in {pages.folder}. "
            "The network may return NaN there: try --dtype float64, more steps or another solver, in another --out"
        )
    found = {**_summary(facts), **more, "sha256": sha256}
    if settings.levels is not None:
        _grid(pages.folder, settings, shape, list(settings.seeds.at(0, SHOWN)))
    resume.write_json(pages.folder / "summary.json", found, pages.folder / WRITING)  # last: where it is, all is
    pages.close()
    return found
