"""Metrics of samples against a reference: sums over images that many processes share, the same to the bit however the work is cut up.

A metric is a function of sufficient statistics that add up. A unit of consecutive images is summed by one process; the sums of the units
are added in their order, whoever has made them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import data, datasets, reports, resume, sums, verdicts
from .bits import Quantized
from .checks import check_count
from .command import check_device, given, ran, versions
from .metrics import Features, Gaussian, Statistics, frechet_terms, to_npz
from .metrics.frechet import check_covariance
from .parallel import ALONE, Elsewhere, Group
from .sets import Pair, Stream, check_state, is_light, opened, paired, state
from .store import write_file

__all__ = ["Settings", "run"]

UNIT = 1024  # images whose sums are made by one process
LITERATURE = 10_000  # samples from which on a Frechet distance goes by the name it has in papers
LARGEST = 4096  # numbers of a sample that is its own features
APART = 35  # the stream of the permutation that cuts the reference in two; the others are in `data`
PIXELS = "pixels"


@dataclass(frozen=True)
class Settings:
    """What decides the numbers beside the two sets, by the names on the command line.

    features: "pixels", the numbers in the model's range, or a folder that `scoresde.reports.save_features` wrote; part: of a reference that
    is a named set; count: so many of the samples, from the first on, None: all; levels: of .npy files of integers, None: those of the
    other set, else 256; low, high: the ends of the model's range, which integers are brought to, None: those that the samples were
    written with, else -1 and 1; batch: images whose features are computed at once.
    """

    features: str = PIXELS
    part: str | None = None
    count: int | None = None
    levels: int | None = None
    low: float | None = None
    high: float | None = None
    batch: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_count(self.batch, "batch")
        if self.count is not None:
            check_count(self.count, "count", 2)
        if not isinstance(self.features, str) or not self.features:
            raise TypeError(f"features is {self.features!r}; wanted pixels, or the path of a folder")
        self.cells(256 if self.levels is None else self.levels)  # which has words of its own
        check_device(self.device)

    def cells(self, levels: int) -> Quantized:
        """Of integers with so many levels."""
        return Quantized(levels, **given(self, ("low", "high")))


def _fitted(settings: Settings, pair: Pair) -> Settings:
    """With low and high as the samples were written, where they are left open; ValueError for a set that is too small."""
    low, high = (
        getattr(pair[0], name, None) if getattr(settings, name) is None else getattr(settings, name) for name in ("low", "high")
    )
    settings = replace(settings, low=low, high=high)
    cells = settings.cells(2)
    if isinstance(pair[0], Gaussian) and settings.count is not None:
        raise ValueError(f"count is {settings.count} and the samples are a file of statistics, which has no parts; leave it out")
    for each, least in zip(pair, (settings.count or 2, 2), strict=True):
        if isinstance(each, Stream) and each.count < least:
            raise ValueError(f"{each.name} has {each.count} samples; wanted at least {least}")
    return replace(settings, low=cells.low, high=cells.high)


# --- a unit --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """All that a unit needs, in any process: units 0, 1, ... are of the samples, then of the reference."""

    samples: str
    reference: str
    settings: Settings
    levels: int | None
    features_sha256: str
    counts: tuple[int, int]  # images to sum; 0 of a file of statistics
    floor: int  # images of the reference that are its first part
    unit: int
    key: str  # of what is pinned
    states: tuple[str, str]  # of the files of both, when this process looked

    @property
    def before(self) -> int:
        """Units of samples."""
        return -(-self.counts[0] // self.unit)

    @property
    def units(self) -> int:
        """How many there are."""
        return self.before - (-self.counts[1] // self.unit)

    def place(self, k: int) -> tuple[int, int, int]:
        """Of unit k: 0 of the samples or 1 of the reference, its first image and where it stops."""
        which = int(k >= self.before)
        first = (k - which * self.before) * self.unit
        return which, first, min(first + self.unit, self.counts[which])

    def images(self, units: int) -> int:
        """How many images the first units have."""
        which, first, _ = self.place(units)
        return min(which * self.counts[0] + first, sum(self.counts))

    def words(self, k: int) -> str:
        """What unit k is."""
        which, first, stop = self.place(k)
        return f"{('samples', 'reference')[which]} {first} .. {stop - 1}"


@functools.lru_cache(maxsize=1)
def _features(what: str, device: str) -> Features:
    """Those of that name or folder, loaded once a process and run."""
    if what == PIXELS:
        return reports.Pixels()
    found = reports.load_features(Path(what))
    found.module.to(device)
    return found


def _vectors(stream: Stream, settings: Settings, first: int, stop: int) -> Tensor:
    """The features of these images, float64 [n, D]."""
    scale = reports.Scale(None if stream.levels is None else settings.cells(stream.levels))
    return _features(settings.features, settings.device)(scale.seen(stream.read(first, stop))).double()


@functools.lru_cache(maxsize=4)
def _stream(what: str, part: str | None, levels: int | None, before: str) -> Stream:
    """The set that the run began with."""
    found = opened(what, part, levels)
    check_state(what, before)
    return found  # type: ignore[bad-return]


def measure(job: Job, k: int) -> dict[str, Statistics]:
    """The sums of unit k: of samples, or of the two parts of the reference."""
    which, first, stop = job.place(k)
    what, part = ((job.samples, None), (job.reference, job.settings.part))[which]
    stream = _stream(what, part, job.levels if what.endswith(".npy") else None, job.states[which])
    if _features(job.settings.features, job.settings.device).sha256 != job.features_sha256:
        raise ValueError(f"{job.settings.features} has been written anew since the run began; copy features that change")
    batches = range(first, stop, job.settings.batch)
    x = torch.cat([_vectors(stream, job.settings, i, min(i + job.settings.batch, stop)) for i in batches])  # type: ignore[bad-argument-type]
    if is_light(what):
        check_state(what, job.states[which])
    if not which:
        return {"samples": Statistics().update(x)}
    apart = torch.from_numpy(data.permuted(np.arange(first, stop), job.counts[1], 0, 0, stream=APART) < job.floor)
    return {
        name: Statistics().update(x[rows]) if rows.any() else Statistics() for name, rows in (("floor", apart), ("rest", ~apart))
    }


# --- metrics -------------------------------------------------------------------------------------------------------------
Known = Statistics | Gaussian
Parts = tuple[Statistics, Statistics] | None


def _frechet(samples: Known, reference: Known, parts: Parts) -> dict[str, Any]:
    """The Frechet distance with its terms and its floor: that of real data, a part of the reference, to the rest of it."""
    found = frechet_terms(samples.mean, samples.cov, reference.mean, reference.cov)
    floor = None
    if parts is not None:
        a, b = parts
        floor = {"fid": frechet_terms(a.mean, a.cov, b.mean, b.cov).distance, "samples": a.n, "reference": b.n}
    name = "fid" if samples.n is not None and samples.n >= LITERATURE else f"fid@{samples.n or 'unknown'}"
    terms = {"mean": found.mean, "trace_samples": found.trace1, "trace_reference": found.trace2, "cross": found.cross}
    return {name: found.distance, "fid_terms": terms, "fid_floor": floor}


METRICS: tuple[Callable[[Known, Known, Parts], dict[str, Any]], ...] = (_frechet,)


# --- the whole -----------------------------------------------------------------------------------------------------------
def _facts(each: Stream | Gaussian, settings: Settings, name: str, sha256: str) -> dict[str, Any]:
    """What is said of features beside every number made with them."""
    if isinstance(each, Gaussian):
        return dict(each.facts)
    cells = {} if each.levels is None else {"levels": each.levels, "low": settings.low, "high": settings.high}
    return {"features": name, "features_sha256": sha256, "shape": list(each.shape), **cells}


def _checked(pair: Pair, settings: Settings) -> tuple[str, str, int, tuple[dict[str, Any], dict[str, Any]]]:
    """Name, hash and dimension of the features, and the facts of both sets; ValueError where these do not go together."""
    streams = [each for each in pair if isinstance(each, Stream)]
    name, sha256, dims = "unknown", "", {len(each.mean) for each in pair if isinstance(each, Gaussian)}
    if streams:
        if settings.features == PIXELS and (size := int(np.prod(streams[0].shape))) > LARGEST:
            raise ValueError(
                f"features is pixels and samples have {size} numbers; wanted at most {LARGEST}, or a folder that "
                "scoresde.reports.save_features wrote, such as features/ of a training"
            )
        features = _features(settings.features, settings.device)
        name, sha256 = features.name, features.sha256
        try:
            dims |= {_vectors(each, settings, 0, 1).shape[1] for each in streams}
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"features {name} of samples {list(streams[0].shape)}: {str(error).splitlines()[0]}") from error
    a, b = (_facts(each, settings, name, sha256) for each in pair)
    if differ := [key for key in a if key in b and a[key] != b[key] and key != "data_sha256"]:
        words = "; ".join(f"{key} {a[key]} of the samples, {b[key]} of the reference" for key in differ)
        raise ValueError(f"the two sets do not compare: {words}; wanted statistics of the same features")
    if len(dims) > 1:
        raise ValueError(f"the features have dimensions {sorted(dims)}; wanted one: statistics of the same features")
    if not streams:
        name, sha256 = a.get("features", name), a.get("features_sha256", sha256)
    return name, sha256, dims.pop(), (a, b)


def _where(what: str) -> str:
    return str(Path(what).resolve()) if what not in datasets.SETS else what


def _words(found: Mapping[str, Any], out: Path) -> str:
    name = next(iter(found))
    floor = found["fid_floor"]
    of = (
        ""
        if floor is None
        else f"; floor {floor['fid']:.6g}: {floor['samples']} of the reference against its {floor['reference']} others"
    )
    a, b = (found[key]["count"] or "unknown" for key in ("samples", "reference"))
    return f"{name} {found[name]:.6g}: {a} samples, {b} of the reference{of}; features {found['features']['name']}; in {out}/"


@dataclass(frozen=True)
class Compared:
    """What a run is of, looked at and found to go together."""

    pair: Pair
    hashes: tuple[str, str]
    facts: tuple[dict[str, Any], dict[str, Any]]  # of the features of each
    pinned: dict[str, Any]  # may not change between the runs that make one summary; where and how fast they run may
    job: Job

    @property
    def counts(self) -> tuple[int, int]:
        """Images to sum; 0 of a file of statistics."""
        return self.job.counts


def _compared(samples: str, reference: str, settings: Settings, group: Group) -> Compared:
    for cache in (opened, _stream, _features):
        cache.cache_clear()
    with group.in_turn():  # the first of a machine fetches what is not there
        settings = replace(settings, device=group.place(settings.device))
        states = state(samples), state(reference)
        pair, levels = paired(samples, reference, settings.part, settings.levels)
        settings = _fitted(settings, pair)
        name, sha256, dim, facts = _checked(pair, settings)
        probes = ", ".join(each.probe() for each in pair if isinstance(each, Stream))
    a, b = (each.count if isinstance(each, Stream) else 0 for each in pair)
    n, m = (settings.count or a) if a else 0, b
    size = n or getattr(pair[0], "n", None) or m
    floor = 0 if m < 4 else size if m >= 2 * size else m // 2

    def digest(each: Stream | Gaussian, what: str) -> str:
        if isinstance(each, Stream):
            return each.digest()
        check_covariance(each.cov, f"sigma of {what}")
        return hashlib.sha256(Path(what).read_bytes()).hexdigest()

    hashes = group.by_first(lambda: (digest(pair[0], samples), digest(pair[1], reference)))
    pinned = {
        "samples_sha256": hashes[0], "reference_sha256": hashes[1], "summed": {"samples": n, "reference": m, "floor": floor},
        "features": {"name": name, "sha256": sha256, "dim": dim}, "low": settings.low, "high": settings.high,
        "batch": settings.batch, "unit": UNIT, "device": torch.device(settings.device).type,
        "versions": versions(),
    }  # fmt: skip
    text = json.dumps(pinned, sort_keys=True)
    group.agree("the data, or in settings or versions", f"{probes} {text}")
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    job = Job(samples, reference, settings, levels, sha256, (n, m), floor, UNIT, key, states)
    return Compared(pair, hashes, facts, pinned, job)


def _summary(of: Compared, made: sums.Sums, out: Path, how: Mapping[str, Any]) -> dict[str, Any]:
    """Of the sums of all units; written last, after the files of what was summed."""
    n, m = of.counts
    parts = (made["floor"], made["rest"]) if m else None
    both: list[Any] = [made["samples"] if n else of.pair[0], of.pair[1]]
    if parts is not None:
        both[1] = Statistics().merge(parts[0]).merge(parts[1])
    found: dict[str, Any] = {}
    for metric in METRICS:
        found |= metric(both[0], both[1], parts if of.job.floor else None)
    verdicts.check_finite(found)
    for i, (role, what) in enumerate((("samples", of.job.samples), ("reference", of.job.reference))):
        found[role] = {"what": _where(what), "count": both[i].n, "sha256": of.hashes[i]}
        if isinstance(each := of.pair[i], Stream):
            found[role] |= {"shape": list(each.shape), "levels": each.levels, "seeds": each.seeds}
            write_file(out / f"{role}.npz", to_npz(both[i], **of.facts[i], data_sha256=of.hashes[i]), out / resume.WRITING)
    return verdicts.finish(out, {**found, **of.pinned, **how})


def _check_unchanged(job: Job, out: Path, group: Group) -> None:
    """Raise ValueError where the data are no longer what they were when the run began; the sums of them go."""
    error: ValueError | None = None
    try:
        for what, before in zip((job.samples, job.reference), job.states, strict=True):
            check_state(what, before)
    except ValueError as found:
        error = found
    if group.any(error is not None):
        group.by_first(lambda: sums.end(out / "units"))
        raise error or Elsewhere(1)


def run(
    samples: str, reference: str, out: Path, settings: Settings | None = None, *, processes: int = 1, overwrite: bool = False,
    say: Callable[[str], object] = print, group: Group = ALONE,
) -> dict[str, Any]:  # fmt: skip
    """Metrics of `samples` against `reference`, into `out`; return the summary.

    Each is what `scoresde.data.load` takes by name or path, a folder that `scoresde sample` wrote, or a .npz file of mu and sigma. The
    processes of the group share the units of 1024 images, each in `processes` of its own; the numbers are the same to the bit for any of
    these, and however often the run was killed: the same call goes on. samples.npz and reference.npz have what was summed, summary.json,
    written last, the metrics and what they depend on. Raises ValueError for sets that cannot be compared, FileExistsError for a folder
    with other settings, RuntimeError for a unit that failed, with what is done kept.
    """
    started, settings = time.perf_counter(), settings or Settings()
    check_count(processes, "processes")
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # the bits of sums and of singular values may depend on it
        of = _compared(samples, reference, settings, group)
        group.check_shared(out)
        group.by_first(lambda: stack.enter_context(resume.locked(out)))
        job, folder, first = of.job, out / "units", list[sums.Total]()

        def begin() -> tuple[dict[str, Any] | None, str, list[int], int]:
            found, missing, saved = verdicts.begin(out, of.pinned, overwrite), list[int](), 0
            if found is None:
                total = sums.Total(folder, job.key, lambda k: measure(job, k), job.units)
                total.sweep()
                first.append(total)
                there = set(sums.left(folder))
                missing, saved = [k for k in range(total.folded, job.units) if k not in there], total.saved
            return found, uuid.uuid4().hex, missing, saved

        found, name, missing, saved = group.by_first(begin)
        if found is not None:
            if group.first:
                say(f"nothing to compute: all is there\n{_words(found, out)}")
            return found
        total = first[0] if first else None
        processes = max(1, min(processes, -(-len(missing) // group.world)))
        with tqdm(total=sum(job.counts), desc="evaluate", unit="image", disable=not (group.first and missing)) as bar:
            show = lambda: bar.update(job.images(total.folded) - bar.n) if total else None
            sums.Work(job.units, measure, job, folder, job.key, missing, saved, processes, group, name, total, job.words, show)()

        _check_unchanged(job, out, group)

        how = ran(started, len(missing), processes, group.world, job.settings.device)
        found = group.by_first(lambda: _summary(of, first[0].sums, out, how))
    if group.first:
        say(_words(found, out))
    return found
