"""Two processes against one, and the bytes and seconds that a plan for many machines is reckoned from.

python benchmarks/scaling.py                       all of it into results/scaling.json: some ten minutes on two idle cores
python benchmarks/scaling.py --quick               the same in small, for a look, into a temporary file
python benchmarks/scaling.py --only NAME ...       these parts anew, the others as they are in the file
python benchmarks/scaling.py --table [--into PAGE] the Markdown tables of docs/scaling.md, printed or put in their places there

It starts itself under torchrun, two ranks of one thread. "One" is rank 0 alone, with the other waiting on a socket; "two" are both. They
take turns in the same processes, after a warm-up: no start is in the figures, and what slows the machine slows both. Ratios are of
medians, with the lowest and highest of single turns. Commands are run at two lengths, and rates are of the difference: what a command
costs once is not in them. Everything is drawn from fixed seeds; networks have random weights.
"""

import argparse
import contextlib
import io
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import numpy as np
import torch
import torch.distributed as dist
from scaling_tables import fill, tables
from torch.utils.flop_counter import FlopCounterMode

import scoresde
from scoresde import checkpoint, datasets, densities, evaluate, figures, generate, metrics, nets, reports, store, sums
from scoresde.data import Batches, load, prefetched
from scoresde.parallel import Group, joined

OUT = Path(__file__).parent / "results/scaling.json"
SHAPE, COLOUR = (1, 28, 28), (3, 32, 32)  # Fashion-MNIST's, CIFAR-10's
MODEL = "unet-28: UNet((1, 28, 28), channels=24, multipliers=(1, 2, 2), attention=(2,))"
PLANNED = {  # networks of the plan, with the size of the images
    "unet-1m": [32], "unet-15m": [32], "dit-100m": [32], "ddpmpp-deep": [32, 64],
}  # fmt: skip
GLOBAL = 4096  # images a step in the plan


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    repeats: int = 6
    batch: int = 64
    steps: int = 4
    sampled: tuple[int, int] = (64, 384)
    scored: tuple[int, int] = (64, 192)
    evaluated: tuple[int, int] = (2048, 10240)
    runs: int = 3  # turns of a command
    reduced: tuple[str, ...] = ("unet-1m", "unet-15m", "ddpmpp-deep")
    trained: tuple[tuple[str, int], ...] = (("unet-1m", 8), ("ddpmpp-deep", 1))
    file: int = 2**31  # bytes of the data on disk
    rows: int = 2048  # of them read cold
    dims: tuple[int, ...] = (64, 2048)
    drawn: int = GLOBAL
    words: int = 500


QUICK = Sizes(
    repeats=1, batch=4, steps=1, sampled=(4, 8), scored=(4, 8), evaluated=(1024, 2048), runs=1, reduced=("unet-1m",),
    trained=(("unet-1m", 2),), file=2**24, rows=256, dims=(64,), drawn=64, words=20,
)  # fmt: skip


def median(values: list[float]) -> float:
    return statistics.median(values)


def elapsed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, the first left out."""
    return median([elapsed(work) for _ in range(repeats + 1)][1:])


# --- one against two -----------------------------------------------------------------------------------------------------
def turn(group: Group, alone: bool, work: Callable[[Group], Any]) -> float:
    """Seconds until the work is done: of rank 0 with the others waiting, or of all."""
    group.barrier()
    started = time.perf_counter()
    if not alone:
        work(group)
    elif group.first:
        work(Group())
    group.barrier()
    return time.perf_counter() - started


def spread(a: list[float], b: list[float], factor: float = 1.0) -> dict[str, Any]:
    """factor a / b of medians, and the lowest and highest of single turns."""
    each = [factor * x / y for x, y in zip(a, b, strict=True)]
    return {"ratio": factor * median(a) / median(b), "lowest": min(each), "highest": max(each)}


def wire() -> int:
    """Bytes sent so far over the loopback interface, which all processes here speak over."""
    (line,) = [each for each in Path("/proc/net/dev").read_text().splitlines() if each.strip().startswith("lo:")]
    return int(line.split()[9])


@contextlib.contextmanager
def counted(module: Any, name: str) -> Iterator[list[None]]:
    """A list as long as there were calls of this function of the module."""
    before, calls = getattr(module, name), list[None]()

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return before(*args, **kwargs)

    setattr(module, name, call)
    try:
        yield calls
    finally:
        setattr(module, name, before)


def network() -> torch.nn.Module:
    return scoresde.UNet(SHAPE, channels=24, multipliers=(1, 2, 2), attention=(2,))


def pictures(n: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def prepared(net: torch.nn.Module) -> scoresde.Training:
    model = scoresde.Preconditioned(net, scoresde.VP())
    return scoresde.Training(model, torch.optim.AdamW(model.parameters(), lr=1e-4), scoresde.EMA(model))


def training(group: Group, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Steps of `fit`: the same batch for one and for two, twice it for two, and a training each, apart: the machine's limit."""
    source, scale = load(pictures(5000)), reports.Scale(scoresde.Quantized(256), dequantize=True)

    def stream(of: Group, batch: int) -> Any:
        batches = Batches(source, batch, rank=of.rank, world=of.world)
        return scoresde.fit(prepared(network()), batches, transform=scale, seed=0, group=of)

    kinds = {"one": 1, "two": 1, "two, twice the batch": 2, "two, apart": 1}
    single = ("one", "two, apart")
    streams = {kind: stream(Group() if kind in single else group, times * sizes.batch) for kind, times in kinds.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sent, gathers = [], []
    for repeat in range(sizes.repeats + 1):
        for kind in list(kinds) if repeat % 2 else list(kinds)[::-1]:
            before = wire()
            with counted(dist, "all_gather") as calls:
                took = turn(group, kind == "one", lambda _, s=streams[kind]: [next(s) for _ in range(sizes.steps)])
            seconds[kind] += [took / sizes.steps] if repeat else []
            if repeat and kind == "two":
                sent.append((wire() - before) / sizes.steps)
                gathers.append((len(calls) - 2) / sizes.steps)  # two are of the turn
    for each in streams.values():
        each.close()
    parameters = sum(p.numel() for p in network().parameters())
    return {
        "batch": sizes.batch, "steps a turn": sizes.steps, "turns": sizes.repeats, "parameters": parameters,
        "seconds a step": {kind: median(each) for kind, each in seconds.items()},
        "strong": spread(seconds["one"], seconds["two"]), "weak": spread(seconds["one"], seconds["two, twice the batch"], 2.0),
        "apart": spread(seconds["one"], seconds["two, apart"], 2.0),
        "gathers a step": median(gathers), "bytes sent a step": median(sent), "gradient bytes": 4 * parameters,
    }  # fmt: skip


def command(name: str, group: Group, folder: Path, lengths: tuple[int, int], turns: int, run: Callable[..., Any]) -> dict[str, Any]:
    """run(of, n, out) at both lengths, alone and together, in turn; rates are of what the longer has more."""
    seconds: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in lengths} for kind in ("one", "two")}
    for repeat in range(turns + 1):
        for kind in ("one", "two") if repeat % 2 else ("two", "one"):
            for n in lengths:
                out = folder / f"{name}-{repeat}-{kind}-{n}"
                with contextlib.redirect_stderr(io.StringIO()):  # where a command shows how far it is
                    took = turn(group, kind == "one", lambda of, n=n, out=out: run(of, n, out))
                seconds[kind][n] += [took] if repeat else []
                if group.first and not (repeat == turns and n == lengths[1]):
                    shutil.rmtree(out)
    few, many = lengths
    more = {k: [b - a for a, b in zip(each[few], each[many], strict=True)] for k, each in seconds.items()}
    whole = {k: each[many] for k, each in seconds.items()}
    return {
        "n": lengths, "turns": turns, "a second": {k: (many - few) / median(each) for k, each in more.items()},
        "steady": spread(more["one"], more["two"]), "whole": spread(whole["one"], whole["two"]),
        "seconds": {k: {str(n): median(each[n]) for n in lengths} for k, each in seconds.items()},
        "same": whole_folder(folder / f"{name}-{turns}-one-{many}") == whole_folder(folder / f"{name}-{turns}-two-{many}"),
        "bytes a row": (folder / f"{name}-{turns}-two-{many}").joinpath(TABLES[name]).stat().st_size / many if TABLES[name] else None,
    }  # fmt: skip


TABLES = {"sampling": "samples.csv", "likelihood": "likelihood.csv", "evaluate": ""}


def whole_folder(folder: Path) -> dict[str, bytes]:
    """The files of a command by name, without what is of the run alone."""
    kept = (".csv", ".png", ".npz")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in kept}


def silent(_: str) -> None:
    pass


def sampling(group: Group, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """`scoresde sample`, PNG files."""

    def run(of: Group, n: int, out: Path) -> None:
        settings = generate.Settings(generate.parse_seeds(f"0-{n - 1}"), nfe=6, batch=max(1, sizes.batch // 4))
        generate.run(folder / "model", out, settings, say=silent, group=of)

    return {"nfe": 6, **command("sampling", group, folder, sizes.sampled, sizes.runs, run)}


def likelihood(group: Group, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """`scoresde likelihood`, of an .npy file, its default divergence."""

    def run(of: Group, n: int, out: Path) -> None:
        settings = densities.Settings(nfe=6, batch=max(1, sizes.batch // 4))
        densities.run(folder / "model", folder / "images.npy", out, settings, count=n, say=silent, group=of)

    return {"nfe": 6, **command("likelihood", group, folder, sizes.scored, sizes.runs, run)}


def evaluating(group: Group, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """`scoresde evaluate`, 64 features of a small classifier, of images against as many others."""

    def run(of: Group, n: int, out: Path) -> None:
        settings = evaluate.Settings(features=str(folder / "features"), count=n)
        evaluate.run(str(folder / "images.npy"), str(folder / "reference.npy"), out, settings, say=silent, group=of)

    return command("evaluate", group, folder, sizes.evaluated, sizes.runs, run)


# --- what a plan is reckoned from ----------------------------------------------------------------------------------------
def words(group: Group, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Seconds a call of what the processes say to each other, and of the sum of gradients of these sizes."""
    calls: dict[str, Callable[[], Any]] = {
        "numbers": lambda: group.numbers(1, 2), "objects": lambda: group.objects({"rank": group.rank}), "barrier": group.barrier,
        "claim": lambda: group.claim("queue"),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, call in calls.items():
        group.barrier()
        found[name] = elapsed(lambda c=call: [c() for _ in range(sizes.words)]) / sizes.words
    for name in sizes.reduced:
        parameters = sum(p.numel() for p in nets.preset(name, COLOUR).parameters()) if group.first else 0
        ((parameters,), *_) = group.numbers(parameters)
        gradients = torch.zeros(parameters)
        found[f"all-reduce, {name}"] = {"bytes": 4 * parameters, "seconds": timed(lambda g=gradients: dist.all_reduce(g), 3)}
    return found


def networks(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Parameters, and FLOP of an image, as torch counts them: multiplications and additions of convolutions and matrix products."""
    found: dict[str, Any] = {}
    for name, sides in PLANNED.items():
        for side in sides[: None if sizes.file > 2**24 else 1]:
            net = nets.preset(name, (3, side, side)).to("meta")
            x, c = torch.empty(1, 3, side, side, device="meta"), torch.empty(1, device="meta")
            with FlopCounterMode(display=False) as forward:
                net(x, c)
            with FlopCounterMode(display=False) as both:
                net(x, c).sum().backward()
            parameters = sum(p.numel() for p in net.parameters())
            row = {"parameters": parameters, "forward": forward.get_total_flops(), "training": both.get_total_flops()}
            found[f"{name}, 3x{side}x{side}"] = row
    return found


def steps(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Seconds a step of `fit` on one thread, and what is written for it and read back: network, average, AdamW's moments."""
    a = torch.randn(1024, 1024)
    found: dict[str, Any] = {"matrix products, FLOP a second": 2 * 1024**3 / timed(lambda: a @ a, 20)}
    for name, batch in sizes.trained:
        job = prepared(nets.preset(name, COLOUR, dropout=0.0) if "pp" in name else nets.preset(name, COLOUR))
        source = load(pictures(64, COLOUR))
        stream = scoresde.fit(job, Batches(source, batch), transform=reports.Scale(scoresde.Quantized(256)), seed=0)
        seconds = timed(lambda s=stream: next(s), 2)
        out, model = folder / "checkpoints", job.denoiser
        out.mkdir()
        config = {**checkpoint.describe(model), "emas": [e.name for e in job.emas]}  # type: ignore[bad-argument-type]
        state = {"optimizer": job.optimizer.state_dict(), "config": config, "state": job.state()}
        writing = elapsed(lambda j=job, o=out, s=state: checkpoint.write(o, j.step, j.tensors(), **s))
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        reading = elapsed(lambda o=out: checkpoint.read(o))
        shutil.rmtree(out)
        row = {"batch": batch, "seconds": seconds, "checkpoint": {"bytes": size, "write seconds": writing, "read seconds": reading}}
        found[name] = {"parameters": sum(p.numel() for p in job.parameters), **row}
    return found


def drawing(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Seconds on one thread to draw the noise of a step for the whole batch, as each process does, and for a 64th part of it."""
    found: dict[str, Any] = {"images": sizes.drawn}
    generator, scale = torch.Generator().manual_seed(0), reports.Scale(scoresde.Quantized(256), dequantize=True)
    for side in (32, 64):
        for name, n in (("whole", sizes.drawn), ("share", sizes.drawn // 64)):
            images = torch.zeros(n, 3, side, side, dtype=torch.uint8)
            noise = timed(lambda i=images: torch.randn(i.shape, generator=generator), 3)
            found[f"3x{side}x{side}, {name}"] = {"noise": noise, "dequantize": timed(lambda i=images: scale(i, generator), 3)}
    return found


def reading(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Images a second out of an .npy file of uint8, in the shuffled order, and bytes that the disk reads for one: cold, then cached."""
    path, n = folder / "large.npy", sizes.file // 3072
    data = np.lib.format.open_memmap(path, "w+", np.uint8, (n, *COLOUR))
    for first in range(0, n, 2**14):
        data[first : first + 2**14] = pictures(min(2**14, n - first), COLOUR)
    data.flush()
    del data
    file = os.open(path, os.O_RDWR)
    os.fsync(file)
    found: dict[str, Any] = {"file bytes": path.stat().st_size, "rows": sizes.rows}
    count = sizes.rows // 256
    for name, advice in (("as it is", mmap.MADV_NORMAL), ("MADV_RANDOM", mmap.MADV_RANDOM)):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = np.load(path, mmap_mode="r")
        mapped._mmap.madvise(advice)
        batches, before = Batches(load(mapped), 256), from_disk()
        seconds = elapsed(lambda b=batches: [b(k) for k in range(1, count + 1)])
        found[f"cold, {name}"] = {
            "disk bytes an image": (from_disk() - before) / sizes.rows,
            "images a second": sizes.rows / seconds,
        }
        del batches, mapped
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
    batches = Batches(load(path), 256)
    for workers in (0, 2):
        with prefetched(batches, workers) as ahead:
            turns = [elapsed(lambda a=ahead: [a(k) for k in range(1, count + 1)]) for _ in range(4)]  # the first fills the cache
        found[f"cached, {workers} workers"] = {"images a second": sizes.rows / median(turns[1:])}
    os.close(file)
    whole = load(path)
    found["sha256, bytes a second"] = whole.x.nbytes / elapsed(lambda: whole.sha256)  # type: ignore[missing-attribute]
    path.unlink()
    return found


def from_disk() -> int:
    """Bytes that this process has had the disk read."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def files(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Bytes of a sample as a PNG file and in a batch's npz, on the disk and in the file, and seconds to have them there for good."""
    found: dict[str, Any] = {}
    known: dict[str, Callable[[], np.ndarray]] = {
        "noise": lambda: pictures(64, COLOUR),
        "CIFAR-10": lambda: datasets.cifar10(part="test").x[np.arange(64)],
        "Fashion-MNIST": lambda: datasets.fashion_mnist(part="test").x[np.arange(64)],
    }
    out = folder / "files"
    for name, images in known.items():
        try:
            x = images()
        except OSError as error:
            found[name] = {"missing": str(error)[:80]}
            continue
        out.mkdir()
        each = [figures.png(image) for image in x]
        seconds = elapsed(lambda e=each: [store.write_file(out / f"{i:08d}.png", data) for i, data in enumerate(e)]) / len(x)
        at = [p.stat() for p in out.iterdir()]
        np.savez(folder / "batch.npz", x=x, seeds=np.arange(len(x), dtype=np.uint64), labels=np.zeros(len(x), np.int64))
        batch = (folder / "batch.npz").read_bytes()
        together = elapsed(lambda b=batch: store.write_file(out / "batch.npz", b)) / len(x)
        found[name] = {
            "raw bytes": int(x[0].nbytes), "png bytes": median([len(e) for e in each]),
            "png bytes on disk": median([512 * a.st_blocks for a in at]), "png seconds": seconds,
            "npz bytes": len(batch) / len(x), "npz seconds": together, "npz of": len(x),
        }  # fmt: skip
        shutil.rmtree(out)
    return found


def merging(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Statistics of 1,024 rows of D features: bytes, and seconds to make, write, read and add them."""
    found: dict[str, Any] = {}
    for d in sizes.dims:
        x = torch.randn(1024, d, generator=torch.Generator().manual_seed(0))
        part, total = metrics.Statistics().update(x), metrics.Statistics().update(x)
        sums.begin(folder)
        put = timed(lambda p=part: sums.put(folder, 0, {"samples": p}, "key"), 3)
        (file,) = folder.glob("unit-*.npz")
        found[f"D = {d}"] = {
            "bytes": file.stat().st_size, "update seconds": timed(lambda x=x: metrics.Statistics().update(x), 3), "put seconds": put,
            "take seconds": timed(lambda: sums.take(folder, 0, "key"), 3), "merge seconds": timed(lambda t=total, p=part: t.merge(p), 5),
            "distance seconds": elapsed(lambda a=part, b=total: metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov)),
        }  # fmt: skip
        file.unlink()
    return found


RACES = {"training": training, "sampling": sampling, "likelihood": likelihood, "evaluate": evaluating, "words": words}
ALONE = {"networks": networks, "steps": steps, "drawing": drawing, "reading": reading, "files": files, "merging": merging}


# --- the whole -----------------------------------------------------------------------------------------------------------
def prepare(folder: Path, sizes: Sizes) -> None:
    """What the commands read."""
    checkpoint.save(folder / "model", scoresde.Preconditioned(network(), scoresde.VP()))  # type: ignore[bad-argument-type]
    np.save(folder / "images.npy", pictures(max(sizes.evaluated)))
    np.save(folder / "reference.npy", pictures(min(sizes.evaluated))[::-1])
    reports.save_features(
        folder / "features", "untrained", metrics.classifier(SHAPE, 10), shape=list(SHAPE), classes=10, features=64
    )


def worker(folder: Path, out: Path, sizes: Sizes, only: list[str]) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as group:
        found: dict[str, Any] = {}
        if group.first:
            found = json.loads(out.read_text()) if only and out.exists() else {}
            found |= {**cells.machine(), "disk": disk(folder), "torchrun": f"{group.world} ranks of one thread, gloo over loopback"}
            print(json.dumps(found | {n: "..." for n in [*RACES, *ALONE] if n in found}, indent=1), flush=True)
            prepare(folder, sizes)
        group.barrier()
        for name in only or [*RACES, *ALONE]:
            started = time.perf_counter()
            if name in RACES:
                part = RACES[name](group, folder, sizes)
            else:
                part = ALONE[name](folder, sizes) if group.first else {}
                group.barrier()
            if group.first:
                found[name] = cells.rounded({**part, "seconds in all": time.perf_counter() - started}, 4)
                print(name, json.dumps(found[name]), flush=True)
                new = out.with_suffix(".new")
                new.write_text(json.dumps(found, indent=1) + "\n")
                os.replace(new, out)


def disk(folder: Path) -> str:
    """What kind the folder is on, and how much is read ahead there."""
    device = os.stat(folder).st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    ahead = path / "queue/read_ahead_kb"
    ahead = ahead if ahead.exists() else path / "../queue/read_ahead_kb"
    return f"{path.resolve().name}, reads ahead {ahead.read_text().strip()} KiB" if ahead.exists() else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--into", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*RACES, *ALONE], default=[])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    sizes, out = (
        (QUICK, chosen.out or Path(tempfile.gettempdir()) / "scaling-quick.json") if chosen.quick else (Sizes(), chosen.out or OUT)
    )
    if chosen.table:
        text = tables(json.loads(out.read_text()))
        print(*text, sep="\n\n") if chosen.into is None else fill(chosen.into, text)
        return
    if "RANK" in os.environ:
        worker(Path(os.environ["SCALING_FOLDER"]), out, sizes, chosen.only)
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "SCALING_FOLDER": folder, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000",
        }  # fmt: skip
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        started = time.perf_counter()
        done = subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment, check=False)  # noqa: S603
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
