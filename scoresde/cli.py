"""The command line: `scoresde train`, `scoresde sample`, `scoresde likelihood`, `scoresde demo`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from . import __version__

__all__ = ["main"]


@dataclass(frozen=True)
class Train:
    """Train a model as a configuration says; killed or interrupted, the same command goes on."""

    config: Path
    """the configuration: YAML, JSON or TOML, of which data: {source: digits} is a whole one"""
    set: tuple[tuple[str, ...], ...] = ()
    """KEY=VALUE, as in optimizer.lr=1e-3: in place of what the configuration says; several, here or by repeating"""
    out: Path | None = None
    """folder of the run (None: runs/, then the name of the configuration)"""
    overwrite: bool = False
    """drop what a run has left in the folder instead of going on with it"""


@dataclass(frozen=True)
class Sample:
    """Samples of a saved model, a seed a sample; killed or interrupted, the same command goes on."""

    folder: Path
    """the model, as scoresde.checkpoint.save wrote it"""
    out: Path = Path("runs/samples")
    """folder of the samples, their table, their summary and a picture of the first"""
    seeds: str = "0-63"
    """numbers and ranges: 0-4999 or 0,5,7-9; a sample is a function of its seed"""
    nfe: int | None = None
    """at most this many evaluations a sample (None: 35)"""
    steps: int | None = None
    """steps a sample, in place of nfe"""
    solver: str | None = None
    """NAME[:ARGUMENT...], as in Heun, DPMSolverPP:order=3 or Churn:Heun:40 (None: the library chooses)"""
    labels: str | None = None
    """one class for all, or cycle: seed modulo classes"""
    weights: str | None = None
    """which, of a model that has several, such as ema_0.999"""
    format: Literal["png", "npz"] | None = None
    """a PNG a sample, or an npz a batch (None: png, of images)"""
    subdirs: bool | None = None
    """a folder for each thousand PNG files (None: beyond 10,000)"""
    levels: int = 256
    """grey levels of images"""
    low: float | None = None
    """lower end of the model's range (None: the training's, else -1)"""
    high: float | None = None
    """its upper end (None: the training's, else 1)"""
    batch: int = 64
    """samples the network sees at once"""
    processes: int = 1
    """batches at work at once, a thread each"""
    dtype: Literal["float32", "float64"] = "float32"
    """of the state"""
    device: str = "cpu"
    """of each process"""
    overwrite: bool = False
    """drop what a run has left in the folder instead of going on with it"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when it is done, 1 when it failed, 2 for wrong usage, 130 when interrupted, 143 when told to end."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in TYPED:
            with _ending():
                TYPED[words[0]](words[1:])
            return 0
        chosen = _parser().parse_args(words)
        chosen.run(chosen)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ArithmeticError, MemoryError, ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"scoresde: {str(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scoresde", description="Continuous-time score-based diffusion: any SDE, any solver.")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, options in (("train", Train), ("sample", Sample)):
        commands.add_parser(name, help=str(options.__doc__).splitlines()[0].rstrip("."), add_help=False)
    demo = commands.add_parser("demo", help="train, sample, score and compare on 8x8 digits, into a folder of tables and figures")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    demo.add_argument(
        "--full", action="store_true", help="every row: the SDE samplers at 200 evaluations too, Euler-Maruyama at 1000"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the networks and the classifier (default: %(default)s)")
    demo.set_defaults(run=_demo)
    _add_likelihood(commands)
    return parser


@contextmanager
def _ending() -> Iterator[None]:
    """A SIGTERM ends the work as Ctrl-C does, files closed, workers stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> NoReturn:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _typed(command: str, options: Any, words: Sequence[str], description: str | None = None) -> Any:
    """The options of a command, by tyro; exit 2, with its words, for wrong ones."""
    import tyro

    conf = tyro.conf
    markers = (conf.PositionalRequiredArgs, conf.UseAppendAction, conf.FlagCreatePairsOff, conf.DisallowNone)
    return tyro.cli(options, prog=f"scoresde {command}", description=description, args=words, config=markers)


def _refuse(command: str, error: Exception) -> NoReturn:
    print(f"scoresde {command}: error: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def _train(words: Sequence[str]) -> None:
    from .config import Config, load
    from .sections import describe

    chosen = _typed("train", Train, words, f"{Train.__doc__} Keys and defaults:\n\n{describe(Config)}")
    try:
        config = load(chosen.config, [text for several in chosen.set for text in several])
    except (OSError, TypeError, ValueError) as error:
        _refuse("train", error)
    from .run import run

    run(config, Path("runs") / chosen.config.stem if chosen.out is None else chosen.out, overwrite=chosen.overwrite)


def _sample(words: Sequence[str]) -> None:
    chosen = _typed("sample", Sample, words)
    from .checks import check_count
    from .generate import Settings, parse_seeds, run

    values = {field.name: getattr(chosen, field.name) for field in fields(Settings)}
    try:
        values["seeds"] = parse_seeds(chosen.seeds)
        if chosen.labels is not None and chosen.labels.isdecimal():
            values["labels"] = int(chosen.labels)
        settings = Settings(**values)
        check_count(chosen.processes, "processes")
    except (TypeError, ValueError) as error:
        _refuse("sample", error)
    run(chosen.folder, chosen.out, settings, processes=chosen.processes, overwrite=chosen.overwrite)


TYPED: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "sample": _sample}


def _demo(chosen: argparse.Namespace) -> None:
    from .demo import FULL, Settings, run  # the imports of a command are paid when it runs

    run(chosen.out, replace(FULL if chosen.full else Settings(), seed=chosen.seed), overwrite=chosen.overwrite)


def _add_likelihood(commands: Any) -> None:
    text = "bits/dim of integer images under a saved model, a row an image; killed or interrupted, the same command goes on"
    command = commands.add_parser("likelihood", help=text, description=text)
    add, default, whole = command.add_argument, " (default: %(default)s)", _at_least
    add("folder", type=Path, metavar="FOLDER", help="the model, as scoresde.checkpoint.save wrote it")
    add("data", type=Path, metavar="DATA", help=".npy of integers [N, *shape], or a folder of image files, in the order of names")
    add("--out", type=Path, default=Path("runs/likelihood"), help="folder of table, summary and histogram" + default)
    trained = " (default: the training's, else {})".format
    add("--levels", type=whole(2), metavar="N", help="grey levels of the images, 0 .. N - 1" + trained(256))
    add("--low", type=float, metavar="X", help="lower end of the model's range" + trained(-1))
    add("--high", type=float, metavar="X", help="its upper end" + trained(1))
    add("--dequantization", choices=["uniform", "truncated-normal"], default="uniform", help="noise in a cell" + default)
    add("--importance", type=whole(1), metavar="K", help="log-mean-exp of K draws of it: a tighter bound")
    add("--samples", type=whole(1), default=1, metavar="K", help="bounds to average, for their spread" + default)
    budget = command.add_mutually_exclusive_group()
    budget.add_argument("--nfe", type=whole(1), metavar="N", help="at most N evaluations a solve")
    budget.add_argument("--steps", type=whole(1), metavar="N", help="N steps a solve")
    budget.add_argument("--tolerance", type=float, metavar="TOL", help="Dopri5(TOL, TOL); given none, the library chooses")
    kinds = "exact, rademacher:K, gaussian:K, coloured:K[:CHAINS] or hutchpp:K[:CHAINS]"
    least = " (default: exact up to 256 numbers an image, coloured:2:2 beyond)"
    add("--divergence", type=_divergence, metavar="NAME", help=kinds + least)
    add("--batch", type=whole(1), default=64, metavar="N", help="images the network sees at once" + default)
    add("--first", type=whole(0), default=0, metavar="I", help="index of the first image" + default)
    add("--count", type=whole(1), metavar="N", help="how many images (default: all from the first on)")
    add("--processes", type=whole(1), default=1, metavar="P", help="batches at work at once, a thread each" + default)
    add("--seed", type=whole(0), default=0, metavar="S", help="image i draws from the seed 2^32 S + i" + default)
    add("--dtype", choices=["float32", "float64"], default="float32", help="of the state" + default)
    add("--device", default="cpu", help="of each process" + default)
    add("--overwrite", action="store_true", help="drop what a run has left in the folder instead of going on with it")
    command.set_defaults(run=_likelihood, refuse=command.error)


def _likelihood(chosen: argparse.Namespace) -> None:
    from .densities import Settings, run

    values = vars(chosen)
    try:
        settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    except (TypeError, ValueError) as error:
        return chosen.refuse(str(error))
    how = {name: values[name] for name in ("first", "count", "processes", "overwrite")}
    run(chosen.folder, chosen.data, chosen.out, settings, **how)
    return None


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {low}")
        return int(text)

    return number


def _divergence(text: str) -> Any:
    from .densities import parse_divergence

    try:
        return parse_divergence(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
