"""The likelihood of a data set under a saved model, a row an image: resumable, and the same numbers however the work is cut up."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import divergence as divergences
from . import figures, images, resume
from .bits import Dequantization, Importance, Quantized, TruncatedNormal, Uniform, bits_per_dim
from .checks import NonFiniteError, check_count
from .command import check_device, given, loaded, opened, ran, versions, warn
from .denoiser import Preconditioned
from .divergence import Divergence
from .filling import Begun, Filling, Piece, admit, begin, together
from .likelihood import divergence_of, likelihood_plan
from .pages import PATIENCE, Facts, Pages
from .parallel import ALONE, Group
from .resume import MEND
from .seeds import Seeds
from .solvers import Dopri5, Solver

__all__ = ["Settings", "parse_divergence", "run"]

DEQUANTIZATIONS: dict[str, Callable[[], Dequantization]] = {"uniform": Uniform, "truncated-normal": TruncatedNormal}
COSTS = ("score", "rejected", "network", "divergence", "repeated")  # of the ledger; a row has the means over its batch
COLUMNS = ("index", "file", "bits_per_dim", "log_prob", "stderr", "nfe", *COSTS)
FILES = ("summary.json", "histogram.png")
ENDS = ("levels", "low", "high")  # of the cells of the images
ONCE = (".*images have negative bits/dim", "no pixel is above", ".*the noise of probes makes it optimistic")


@dataclass(frozen=True)
class Settings:
    """What decides the numbers beside model and data: the arguments of `bits_per_dim`, by their names on the command line."""

    levels: int | None = None  # None of these three: those of the training, else 256, -1 and 1
    low: float | None = None
    high: float | None = None
    dequantization: str = "uniform"
    importance: int | None = None
    samples: int = 1
    nfe: int | None = None
    steps: int | None = None
    tolerance: float | None = None
    divergence: Divergence | None = None
    batch: int = 64
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            check_count(getattr(self, name), name)
        for name, known in (("dequantization", DEQUANTIZATIONS), ("dtype", ("float32", "float64"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted one of {', '.join(known)}")
        if check_count(self.seed, "seed", 0) >= 2**32:
            raise ValueError(f"seed is {self.seed}; wanted less than 2^32: the lower 32 bits of an image's seed are its index")
        if sum(value is not None for value in (self.nfe, self.steps, self.tolerance)) > 1:
            raise ValueError("several of nfe, steps and tolerance are given; wanted one of them, or none for the default solver")
        _ = self.cells, self.solver, self.draws  # which have words of their own
        check_device(self.device)

    @property
    def cells(self) -> Quantized:
        """Of the images."""
        return self._cells({})

    def fitted(self, data: Mapping[str, Any]) -> Settings:
        """With the levels and the range of a model trained on such data, where they are left open."""
        cells = self._cells({key: data[key] for key in ENDS if key in data})
        return replace(self, **{key: getattr(cells, key) for key in ENDS})

    def _cells(self, known: Mapping[str, Any]) -> Quantized:
        return Quantized(**{**known, **given(self, ENDS)})

    @property
    def solver(self) -> Solver | None:
        """Of a tolerance; else the library chooses."""
        return None if self.tolerance is None else Dopri5(self.tolerance, self.tolerance)

    @property
    def draws(self) -> Dequantization:
        """The dequantization."""
        one = DEQUANTIZATIONS[self.dequantization]()
        return one if self.importance is None else Importance(self.importance, one)


def parse_divergence(text: str) -> Divergence:
    """The one of `scoresde.divergence` that a name and whole numbers after colons mean: rademacher:4 is rademacher(4)."""
    name, *numbers = text.split(":")
    kinds = {n: getattr(divergences, n) for n in divergences.__all__ if n not in ("Divergence", "default")}
    if name not in kinds:
        raise ValueError(f"divergence is {text!r}; wanted one of {', '.join(sorted(kinds))}, with numbers as in rademacher:4")
    try:
        return kinds[name](*map(int, numbers))
    except (TypeError, ValueError) as error:
        forms = "NAME, NAME:K or, of coloured and hutchpp, NAME:K:CHAINS"
        raise ValueError(f"divergence is {text!r} ({error}); wanted {forms}") from error


# --- a batch -------------------------------------------------------------------------------------------------------------
def score(folder: Path, config: str, settings: Settings, levels: np.ndarray, first: int) -> list[list[Any]]:
    """The columns from bits_per_dim on, for images first, first + 1, ..."""
    seeds = [(settings.seed << 32) + first + i for i in range(len(levels))]
    with warnings.catch_warnings():
        for message in ONCE:  # `run` says it of all images, once
            warnings.filterwarnings("ignore", message)
        found = bits_per_dim(
            loaded(folder, config, settings.device), torch.from_numpy(levels).to(settings.device), settings.solver,
            levels=settings.cells.levels, low=settings.cells.low, high=settings.cells.high, nfe=settings.nfe, steps=settings.steps,
            seeds=seeds,
            dequantization=settings.draws, samples=settings.samples, divergence=settings.divergence, microbatch=settings.batch,
            dtype=getattr(torch, settings.dtype),
        )  # fmt: skip
    stderr = found.each_stderr.tolist() if settings.samples > 1 else [""] * len(levels)
    costs = [found.nfe, *(float(found.ledger.get(name, 0.0)) for name in COSTS)]
    return [[*row, *costs] for row in zip(found.each.tolist(), found.log_prob.tolist(), stderr, strict=True)]


# --- the whole -----------------------------------------------------------------------------------------------------------
def _pinned(
    config: Mapping[str, Any], data: images.Images, settings: Settings, model: Preconditioned, shape: torch.Size
) -> dict[str, Any]:
    """What may not change between the runs that make one table; where and how fast they run may."""
    divergence = divergence_of(settings.divergence, shape)
    budget: dict[str, Any] = {"nfe": settings.nfe, "steps": settings.steps, "times": None, "grid": None}
    solver, times = likelihood_plan(model.sde, settings.solver, divergence, **budget)
    return {
        "checkpoint_sha256": config["sha256"], **{name: config[name] for name in ("sde", "parameterization", "net")},
        "data_sha256": data.sha256, "levels": settings.levels, "low": settings.low, "high": settings.high,
        "dequantization": repr(settings.draws), "samples": settings.samples, "divergence": repr(divergence),
        "solver": repr(solver), "steps": None if solver.adaptive else len(times) - 1, "batch": settings.batch,
        "seed": settings.seed, "seeds": "image i has the seed 2^32 seed + i", "dtype": settings.dtype,
        "device": torch.device(settings.device).type, "versions": versions(),
    }  # fmt: skip


def _pages(out: Path, settings: Settings, asked: range) -> Pages:
    """The table of the images asked for, whose rows are all good."""
    sums = ("bits_per_dim", "log_prob", *COSTS)

    def facts(rows: list[list[str]]) -> Facts:
        return Facts.of(COLUMNS, rows, sums, ("bits_per_dim", "stderr"), {"negative": sum(float(row[2]) < 0 for row in rows)})

    return Pages(out, "likelihood", COLUMNS, ("file",), MEND, Seeds((asked,)), settings.batch, lambda row: True, facts)


def _summary(facts: Facts, samples: int) -> dict[str, Any]:
    """stderr: over images; stderr_noise: over the draws for these images; log_prob, nfe and ledger: an image's."""
    n = facts.n
    return {
        "bits_per_dim": facts.mean("bits_per_dim"), "stderr": facts.stdev("bits_per_dim") / n**0.5 if n > 1 else None,
        "stderr_noise": facts.sum("stderr^2") ** 0.5 / n if samples > 1 else None, "n": n, "log_prob": facts.mean("log_prob"),
        "nfe": facts.nfe, "ledger": {name: facts.mean(name) for name in COSTS},
    }  # fmt: skip


def _words(found: Mapping[str, Any], out: Path) -> str:
    spread = "" if found["stderr"] is None else f" ± {found['stderr']:.4f}"
    noise = "" if found["stderr_noise"] is None else f", of their draws ± {found['stderr_noise']:.4f}"
    return (
        f"{found['bits_per_dim']:.4f}{spread} bits/dim, mean and standard error of {found['n']} images{noise}\n"
        f"{found['solver']}, {found['divergence']}, {found['dequantization']}; NFE {found['nfe']} an image and "
        f"{found['ledger']['divergence']:.0f} passes for the divergence; in {out}/"
    )


def run(
    folder: Path, data: Path, out: Path, settings: Settings | None = None, *, first: int = 0, count: int | None = None,
    processes: int = 1, overwrite: bool = False, say: Callable[[str], object] = print, group: Group = ALONE,
) -> dict[str, Any]:  # fmt: skip
    """Bits/dim of images first .. first + count - 1 of `data` under the checkpoint in `folder`, into `out`; return its summary.

    Rows that `out` has are kept. The others come in whole batches b batch .. (b + 1) batch - 1 of the data: an image has the same mates
    and place, hence the same bits, whatever is asked for and in however many processes. The summary is of the images asked for. Each
    process of `group` calls it alike and works on batches of its own, in so many `processes`.
    """
    started, settings = time.perf_counter(), settings or Settings()
    with together(group):
        device = group.place(settings.device)
        folder, text, model = opened(folder, device)
        config = json.loads(text)
        shape = torch.Size(model.net.shape)  # type: ignore[bad-argument-type]
        source = images.load(data, shape)
        stop = source.count if count is None else first + check_count(count, "count")
        if not 0 <= check_count(first, "first", 0) < stop <= source.count:
            raise ValueError(f"images {first} .. {stop - 1} are asked for; {data} has 0 .. {source.count - 1}")
        size = min(settings.batch, source.count)
        settings = replace(settings, batch=size).fitted(config.get("data", {}))
        pinned = _pinned(config, source, settings, model, shape)
        check_count(processes, "processes")
        last = lambda i: min((i // size + 1) * size, source.count)  # past the batch that image i is in
        start, levels = first // size * size, settings.cells.levels
        part = group.share(last(stop - 1) - start)
        mine = source.check(start + part.start, start + part.stop, levels)
    group.agree("the model", config["sha256"])
    group.agree("the data", source.sha256)
    group.agree("the settings", repr((settings, first, stop)))
    group.check_shared(out)
    largest = max(found for (found,) in group.numbers(mine))
    odd: list[str] = []
    if getattr(model.net, "config", {}).get("classes"):
        odd.append("the network was given labels in training, and the density is that without: it may have seldom seen that case")
    if largest < levels // 8:
        odd.append(f"no pixel is above {largest} with --levels {levels}: is that their number of levels?")
    if (settings.importance or 1) > 1 and divergence_of(settings.divergence, shape).random:
        odd.append(
            f"{pinned['dequantization']} with {pinned['divergence']}: the noise of probes makes it optimistic; exact has none"
        )
    for words in odd if group.first else ():
        warn(words)
    pages, asked = _pages(out, settings, range(first, stop)), {"first": first, "count": stop - first}
    with ExitStack() as stack:

        def at_first() -> Begun:
            stack.enter_context(resume.locked(out))
            _begin(out, pages, overwrite)
            resume.pin(out, pinned, MEND)
            return begin(pages, lambda row: True, asked, "histogram.png")

        begun = group.by_first(at_first)
        if begun.found is not None:
            if group.first:
                say(f"all {stop - first} images are there: nothing to compute\n{_words(begun.found, out)}")
            return begun.found
        settings = replace(settings, device=device)
        filling = Filling(pages, begun, lambda row: True, group)
        arguments = lambda piece: (folder, text, settings, source.read(piece.first, last(piece.first)), piece.first)

        def rows(piece: Piece, found: list[list[Any]]) -> list[list[Any]]:
            if bad := [i for i in piece.wanted if not all(value == "" or math.isfinite(value) for value in found[i - piece.first])]:
                raise NonFiniteError(
                    f"the likelihood of images {', '.join(map(str, bad))} is not finite, and no row of their batch was written; those of "
                    f"other batches are in {out}. Try --dtype float64, more --steps or another --divergence, in another --out"
                )
            return [[i, source.names[i], *found[i - piece.first]] for i in piece.wanted]

        computed = filling.fill(processes, score, arguments, rows, "likelihood", "image", source.count)
        more = {
            **asked, "log_det": shape.numel() * settings.cells.log_det, **pinned,
            "t_min": float(model.sde.t_min), "checkpoint": str(folder), "data": str(data.resolve()),
            **ran(started, computed, processes, group.world, settings.device),
        }  # fmt: skip
        panel = {"problem": data.name, "images": config["sde"]["name"]}
        found = group.by_first(lambda: _end(pages, settings, panel, more, group))
    if group.first:
        say(_words(found, out))
    return found


def _begin(out: Path, pages: Pages, overwrite: bool) -> None:
    """Drop what earlier runs left where that is asked for; FileExistsError where a table is of no run, or the run another command's."""
    admit(pages, "dequantization")
    if overwrite:
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        pages.drop()
        (out / "settings.json").unlink(missing_ok=True)
    elif not (out / "settings.json").exists() and (tables := pages.files()):
        raise FileExistsError(f"{out} holds a {min(tables).name} and no settings.json to say of what; {MEND}")


def _end(pages: Pages, settings: Settings, panel: Mapping[str, Any], more: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """The histogram, of the first page, and, last, the summary."""
    facts, sha256 = pages.sums(PATIENCE if group.world > 1 else 1)
    found = {**_summary(facts, settings.samples), **more, "sha256": sha256}
    page = pages.numbers.ranges[0].start
    rows = pages.rows(pages.path(page), page)
    bits = [float(rows[i][2]) for i in pages.part(page)]
    shown = {**panel, "bits_per_dim": found["bits_per_dim"], "each": bits, "stderr": math.nan if facts.n == 1 else found["stderr"]}
    try:
        figures.likelihood(pages.folder / "histogram.png", [shown])
    except ModuleNotFoundError:
        warn("no histogram.png without matplotlib: pip install 'scoresde[plots]'")
    except Exception as error:  # a figure is not worth the numbers
        warn(f"no histogram.png: {type(error).__name__}: {error}")
    resume.write_json(pages.folder / "summary.json", found, pages.folder / resume.WRITING)  # last: where it is, all is
    pages.close()
    if negative := round(facts.sum("negative")):
        warn(f"{negative} of {facts.n} images have negative bits/dim, which no discrete image can but by the luck of a draw: too coarse "
              "a solve (try --tolerance 1e-6), or --levels, --low or --high are not those of the training")  # fmt: skip
    return found
