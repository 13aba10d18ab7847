"""The command line: `scoresde demo`, `scoresde likelihood`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from . import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 when it is done, 1 when it failed, 2 for wrong usage, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="scoresde", description="Continuous-time score-based diffusion: any SDE, any solver.")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train, sample, score and compare on 8x8 digits, into a folder of tables and figures")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run (default: %(default)s)")
    demo.add_argument(
        "--full", action="store_true", help="every row: the SDE samplers at 200 evaluations too, Euler-Maruyama at 1000"
    )
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the networks and the classifier (default: %(default)s)")
    demo.set_defaults(run=_demo)
    _add_likelihood(commands)
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ArithmeticError, ModuleNotFoundError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"scoresde: {error}", file=sys.stderr)
        return 1
    return 0


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
    add("--levels", type=whole(2), default=256, metavar="N", help="grey levels of the images, 0 .. N - 1" + default)
    add("--low", type=float, default=-1.0, metavar="X", help="lower end of the model's range" + default)
    add("--high", type=float, default=1.0, metavar="X", help="its upper end" + default)
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
    from .evaluate import Settings, run

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
    from .evaluate import parse_divergence

    try:
        return parse_divergence(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
