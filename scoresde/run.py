"""`scoresde train`: a configuration and a folder to a trained network; killed or interrupted, the same command goes on to the same end."""

from __future__ import annotations

import math
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, reports
from . import config as configs
from .choices import build
from .config import Config
from .data import prefetched
from .denoiser import Preconditioned
from .ema import PowerEMA, posthoc
from .job import Job, prepare, spread
from .logs import Log, require_tensorboard
from .reports import Scorer
from .resume import write_json
from .store import latest, locked, step_name, steps, write_file
from .train import Step, loss_by_level

__all__ = ["average", "run"]

FREE = ("compile", "device", "tensorboard")  # of the configuration: what may change when a run goes on
OURS = (
    "checkpoints", "averages", "samples", "features", "tensorboard", "config.yaml", "environment.json", "fid.json", "loss.png",
    "validation.png", "summary.json", *(f"{n}.{s}" for n in ("metrics", "speed", "validation") for s in ("jsonl", "csv")),
)  # fmt: skip
MEND = "choose another --out, or pass --overwrite to start afresh"


def _end(number: int) -> NoReturn:
    """Leave as this signal asks: what Ctrl-C raises, or the exit status of the others."""
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


# --- the folder of a run -------------------------------------------------------------------------------------------------
def _pin(config: Config, folder: Path) -> None:
    """Keep the resolved configuration in config.yaml; FileExistsError that says what differs from a run that is there."""
    path = folder / "config.yaml"
    if path.exists():
        try:
            before = configs.load(path)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what a run writes ({error}); {MEND}") from error
        changed = [f.name for f in fields(config) if getattr(before, f.name) != getattr(config, f.name) and f.name not in FREE]
        if config.decay == "none" and "steps" in changed:
            changed.remove("steps")  # a longer training begins as a shorter one
        if replace(before.data, workers=0) == replace(config.data, workers=0) and "data" in changed:
            changed.remove("data")
        if replace(before.every, keep=1) == replace(config.every, keep=1) and "every" in changed:
            changed.remove("every")
        if changed:
            differs = "; ".join(f"{name} was {getattr(before, name)}, is {getattr(config, name)}" for name in changed)
            raise FileExistsError(f"{folder} holds a run of another configuration: {differs}. {MEND}")
    elif any((folder / name).exists() for name in OURS):
        raise FileExistsError(f"{folder} holds a run and no config.yaml to say which; {MEND}")
    write_file(path, configs.dump(config).encode())


def _clean(folder: Path) -> None:
    for name in OURS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _environment(job: Job) -> dict[str, Any]:
    from . import __version__

    net = job.model.net
    return {
        "versions": {"scoresde": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "device": f"{job.config.device} ({platform.machine()}, {platform.system()}), {torch.get_num_threads()} threads",
        "cuda": torch.cuda.get_device_name() if job.training.device.type == "cuda" else None,
        "network": type(net).__name__, "parameters": sum(p.numel() for p in net.parameters()), "sde": str(job.model.sde),
    }  # fmt: skip


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that have asked to stop: the first lets the step end, the second ends it there."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked:
            _end(number)
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


# --- what is done every so many steps ------------------------------------------------------------------------------------
class _Watch:
    """The reports of a run, each of which leaves the training as it was."""

    def __init__(self, job: Job, folder: Path, log: Log, levels: Log) -> None:
        self.job, self.folder, self.log, self.levels = job, folder, log, levels
        self.scorer: Scorer | None = None
        self.shape = tuple(job.source.shape)
        self.classes = job.source.classes if job.config.data.conditional else 0

    def __call__(self, step: int) -> None:
        every = self.job.config.every
        for period, report in ((every.validate, self.validate), (every.sample, self.sample), (every.fid, self.fid)):
            if period and (step % period == 0 or step == self.job.config.steps):
                average = self.job.average
                mode = average.training
                average.eval()
                try:
                    report(step, average)
                except (ArithmeticError, OSError) as error:  # a picture or a score is not worth the training
                    _warn(f"step {step}: no {report.__name__}: {error}")
                finally:
                    average.train(mode)

    def validate(self, step: int, model: Preconditioned) -> None:
        """The loss of what is held out, by noise level and its mean."""
        x0 = self.job.seen(self.job.held_out, 10_000).to(self.job.training.device)  # type: ignore[bad-argument-type]
        weight = build(self.job.config.weight, configs.WEIGHTS, "weight")
        logsnr, loss = loss_by_level(model, x0, weight=weight, seed=self.job.config.seed)
        for a, b in zip(logsnr.tolist(), loss.tolist(), strict=True):
            self.levels.add({"step": step, "logsnr": a, "loss": b})
        self.log.add({"step": step, "validation_loss": float(loss.mean())})

    def sample(self, step: int, model: Preconditioned) -> None:
        """A grid of samples; its seeds are the same at every step."""
        chosen = self.job.config.samples
        (self.folder / "samples").mkdir(exist_ok=True)
        x = reports.draw(model, self.shape, chosen.count, chosen.nfe, self.classes)
        reports.show(self.folder / "samples" / f"step-{step:08d}.png", x, self.job.seen(self.job.source, 1000), self.job.scale,
                     chosen.columns)  # fmt: skip

    def fid(self, step: int, model: Preconditioned) -> None:
        """Frechet distance of samples to the held-out data, or to the training's where nothing is held out."""
        chosen = self.job.config.samples
        scorer = self.scorer = self.scorer or self._scorer()
        value = scorer(reports.draw(model, self.shape, chosen.fid, chosen.nfe, self.classes))
        self.log.add({"step": step, scorer.name: value})

    def _scorer(self) -> Scorer:
        job, chosen = self.job, self.job.config.samples
        features: Any = reports.Pixels()
        if chosen.features is not None:
            features = reports.load_features(Path(chosen.features))
        elif job.source.labels is not None and len(self.shape) == 3 and job.source.classes > 1:
            own = self.folder / "features"
            if not (own / "manifest.json").exists():
                rows = spread(job.source, reports.TAUGHT)
                labels = torch.from_numpy(job.source.labels[rows])
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
                images = job.scale.seen(job.source.x[rows])
                reports.learn_features(own, images[order], labels[order], job.source.classes)
            features = reports.load_features(own)
        elif math.prod(self.shape) > 4096:
            raise ValueError(
                f"every.fid is {job.config.every.fid}, and samples of {math.prod(self.shape)} numbers without labels have no features to "
                "compare; wanted samples.features, a folder of them, or data.labels"
            )
        scorer = Scorer(features, job.seen(job.held_out or job.source, 10_000), job.scale, chosen.fid)
        real = job.seen(job.source, chosen.fid) if job.held_out else job.seen(job.source, 2 * chosen.fid)[1::2]
        record = scorer.record(
            scorer(real), of="held out" if job.held_out else "training", floor_samples=len(real), nfe=chosen.nfe,
            seeds=f"0 .. {chosen.fid - 1}", weights=job.training.emas[0].name if job.training.emas else "model",
        )  # fmt: skip
        write_json(self.folder / "fid.json", record)
        return scorer


def _store(job: Job, folder: Path) -> None:
    """The averages of this step, for good: what an average of another length is made of afterwards."""
    training, folder = job.training, folder / "averages"
    if training.step not in steps(folder):  # a run that was killed comes by here again, with the same averages
        config, state = (
            job.described(),
            {"step": training.step, "widths": {e.name: e.std for e in training.emas if isinstance(e, PowerEMA)}},
        )
        checkpoint.write(folder, training.step, training.tensors(), optimizer=None, config=config, state=state, keep=10**9)


def average(folder: Path, std: float, step: int | None = None) -> Preconditioned:
    """A power average of any std from those that a run has stored (every.average), at `step` (default the last stored), in eval mode.

    Two widths stored some ten times or more serve, as ema: [{std: 0.05}, {std: 0.1}] with every.average a tenth of the steps. Raises
    ValueError for a folder without any. See `scoresde.ema.posthoc`. Karras et al. 2024 (CVPR), section 3.2.
    """
    found = [checkpoint.read(path) for n, path in steps(Path(folder) / "averages").items() if step is None or n <= step]
    stored = [(each.step, std, each.tensors[name]) for each in found for name, std in each.state["widths"].items()]
    if not stored:
        raise ValueError(
            f"{folder} has no stored power averages; wanted a run with ema: [{{std: 0.05}}, {{std: 0.1}}] and every.average"
        )
    model = checkpoint.load(found[-1].path)
    model.net.load_state_dict(posthoc(stored, std, step))
    return model


def _save(job: Job, folder: Path, pending: list[float]) -> None:
    training = job.training
    step = training.step
    state = {
        **training.state(), "epoch": job.batches.epoch(step + 1), "position": job.batches.position(step + 1), "seed": job.config.seed,
        "pending": pending,
    }  # fmt: skip
    checkpoint.write(
        folder / "checkpoints", step, training.tensors(), optimizer=training.optimizer.state_dict(), config=job.described(), state=state,
        keep=job.config.every.keep,
    )  # fmt: skip


def run(config: Config, folder: Path, *, overwrite: bool = False, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train as `config` says, in `folder`; return the summary. What is there of the same configuration is gone on with.

    In the folder: config.yaml (resolved), environment.json, metrics.jsonl and .csv (a row every log steps, and what is measured),
    speed.jsonl, checkpoints/step-*, samples/, validation and loss figures, and summary.json when all steps are done. A signal (Ctrl-C,
    SIGTERM) ends it after a step, with a checkpoint. A checkpoint that cannot be written is said and tried again at the next.
    """
    if config.tensorboard:
        require_tensorboard()
    with locked(folder), _signals() as asked:
        if overwrite:
            _clean(folder)
        _pin(config, folder)
        job = prepare(config)
        training, pending = job.training, list[float]()
        newest = latest(folder / "checkpoints")
        if newest is not None:
            found = checkpoint.read(newest)
            if any(found.config.get(key) != value for key, value in job.described().items()):
                raise FileExistsError(f"{newest} is of other data or another network than {config.data.source} now makes; {MEND}")
            training.restore(found.tensors, found.state, found.optimizer)
            pending = [float(v) for v in found.state["pending"]]
        write_json(folder / "environment.json", _environment(job))
        log = Log(folder, step=training.step, tensorboard=config.tensorboard)
        speed, levels = Log(folder, "speed", training.step), Log(folder, "validation", training.step)
        if training.step:
            say(f"going on after step {training.step} of {config.steps}")
        try:
            _loop(job, folder, (log, speed, levels), pending, asked)
        finally:
            log.close()
        summary = _summary(job, log, speed)
        for each in (log, speed, levels):
            each.table()
        try:
            reports.figures_of(folder, log.rows, levels.rows)
        except ModuleNotFoundError:
            _warn("no figures without matplotlib: pip install 'scoresde[plots]'")
        write_json(folder / "summary.json", summary)
        words = ", ".join(f"{k} {v:.4f}" for k, v in summary.items() if isinstance(v, float))
        say(f"step {training.step}: {words}; {training.skipped} steps skipped; in {folder}/")
        return summary


def _loop(job: Job, folder: Path, logs: tuple[Log, Log, Log], pending: list[float], asked: list[int]) -> None:
    """All steps from where the training stands; `pending`: losses that no row of the log has yet."""
    config, every = job.config, job.config.every
    log, speed, levels = logs
    watch, clock = _Watch(job, folder, log, levels), _Clock(job.training.step)
    bar = tqdm(
        total=config.steps, initial=clock.first, desc="train", unit="step", mininterval=1.0, disable=clock.first == config.steps
    )
    with prefetched(job.batches, config.data.workers) as batches, bar:
        for step in job.fit(batches):
            n, end = step.step, bool(asked) or step.step == config.steps
            bar.update()
            pending += [] if step.skipped else [step.loss]
            if every.log and n % every.log == 0:
                row = _row(job, step, pending)
                log.add(row)
                speed.add(clock(n))
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                pending.clear()
            watch(n)
            if every.average and n % every.average == 0:  # before the checkpoint: a run goes on after it
                try:
                    _store(job, folder)
                except OSError as error:
                    _warn(f"the training goes on without stored averages of step {n}: {error}")
            if end or (every.checkpoint and n % every.checkpoint == 0):
                try:
                    log.flush()
                    levels.flush()
                    _save(job, folder, pending)
                except OSError as error:
                    if end:
                        raise
                    _warn(f"the training goes on without a checkpoint of step {n}: {error}")
            if asked:
                _warn(f"stopped after step {n}, which is in a checkpoint: the same command goes on")
                _end(asked[0])


def _row(job: Job, step: Step, losses: list[float]) -> dict[str, Any]:
    """Of the log: nothing in it depends on when and where the run was stopped."""
    return {
        "step": step.step, "epoch": job.batches.epoch(step.step), "loss": math.fsum(losses) / len(losses) if losses else math.nan,
        "grad_norm": step.grad_norm, "lr": step.lr, "skipped": job.training.skipped,
    }  # fmt: skip


class _Clock:
    """Seconds of this sitting, and the pace since the last reading."""

    def __init__(self, first: int) -> None:
        self.first = self.step = first
        self.started = self.read = time.perf_counter()

    def __call__(self, step: int) -> dict[str, Any]:
        now = time.perf_counter()
        row = {
            "step": step,
            "seconds": round(now - self.started, 3),
            "steps_per_second": round((step - self.step) / (now - self.read), 4),
        }
        self.step, self.read = step, now
        return row


def _summary(job: Job, log: Log, speed: Log) -> dict[str, Any]:
    training, seconds = job.training, math.fsum(_sittings([r["seconds"] for r in speed.rows]))
    names = dict.fromkeys(k for r in log.rows for k in r if k == "loss" or k == "validation_loss" or k.startswith("fid@"))
    last = {name: next(r[name] for r in reversed(log.rows) if r.get(name, name) != name) for name in names}
    return {
        "step": training.step, "skipped": training.skipped, "epochs": round(training.step * job.config.batch / len(job.source), 3), **last,
        "seconds": round(seconds, 1), "checkpoint": f"checkpoints/{step_name(training.step)}",
        "weights": training.emas[0].name if training.emas else "model",
    }  # fmt: skip


def _sittings(seconds: list[float]) -> list[float]:
    """The last clock reading of each sitting: a run that goes on starts its clock anew."""
    return [a for a, b in pairwise([*seconds, -1.0]) if b < a]


def _warn(text: str) -> None:
    print(f"scoresde: {text}", file=sys.stderr)
