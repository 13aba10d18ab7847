"""What it costs to go on with a billion samples: a folder as a killed job leaves it, and the start of the next one in a new process.

    python benchmarks/bookkeeping.py            # into benchmarks/results/bookkeeping.json
    python benchmarks/bookkeeping.py --pages 2000

The folder has the records of all pages but the last few, whose rows are in the files of eight killed processes; the pages' files have
their size and no bytes. Nothing is sampled: the numbers are of the bookkeeping alone.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scoresde.pages import RECORDS, ROWS, vouched
from scoresde.resume import text_of
from scoresde.samples import COLUMNS, COSTS, Layout, table
from scoresde.seeds import Seeds

LAYOUT = Layout("npz", False, 500)
OPEN = 3  # pages that were under way
RANKS = 8


def rows(first: int, stop: int) -> list[list[object]]:
    """Rows as `scoresde sample` writes them."""
    return [
        [s, LAYOUT.file(s), -1, 35, 0, *(34.0, 1.0, 0.0, 35.0), f"{s * 0x9E3779B97F4A7C15 % 2**64:016x}"]
        for s in range(first, stop)
    ]


def make(folder: Path, pages: int) -> None:
    """The folder."""
    book = table(folder, LAYOUT, Seeds((range(pages * 50_000),)))
    (folder / ROWS).mkdir()
    one = {i: list(map(str, row)) for i, row in enumerate(rows(0, book.span))}
    size = len(text_of([COLUMNS, *one.values()]))
    facts, sha256 = book.summed(one, 0)
    with (folder / RECORDS).open("wb") as file:
        for page in range(pages - OPEN):
            path = book.path(page)
            path.touch()
            os.truncate(path, size)
            asked = f"{page * book.span}-{(page + 1) * book.span - 1}"
            line = {"page": page, "asked": asked, "bytes": size, "sha256": sha256, **facts.packed()}
            file.write(vouched(line))
    for page in range(pages - OPEN, pages):
        start, each = page * book.span, book.span // 2 // RANKS  # half of each page is done
        for rank in range(RANKS):
            part = text_of([COLUMNS, *rows(start + rank * each, start + (rank + 1) * each)])
            (folder / ROWS / f"{book.path(page).stem}.00c0ffee.rank{rank:05d}.csv").write_bytes(part)


def measure(folder: Path, pages: int) -> dict[str, float]:
    """Seconds and bytes of a start, which brings home what was left, of another one, and of the sums of the pages that are whole."""
    book = table(folder, LAYOUT, Seeds((range(pages * 50_000),)))
    before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
    for name in ("seconds_start", "seconds_start_again"):
        started, cpu = time.perf_counter(), time.process_time()
        todo, done = book.begin()
        found[name], found[f"cpu_{name}"] = round(time.perf_counter() - started, 3), round(time.process_time() - cpu, 3)
        if (todo.count, done) != (OPEN, (pages - OPEN) * 50_000):
            raise RuntimeError(f"{todo} to do and {done} done; wanted {OPEN} pages and the others")
    whole = table(folder, LAYOUT, Seeds((range((pages - OPEN) * 50_000),)))
    started, cpu = time.perf_counter(), time.process_time()
    facts, _ = whole.sums()
    found["seconds_sums"], found["cpu_seconds_sums"] = round(time.perf_counter() - started, 3), round(time.process_time() - cpu, 3)
    if (facts.n, facts.mean("network"), [facts.mean(name) for name in COSTS]) != (whole.asked.count, 35.0, [34.0, 1.0, 0.0, 35.0]):
        raise RuntimeError(f"the sums are {facts}; wanted those of {whole.asked.count} rows")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, "peak_mib": round(after / 1024, 1), "peak_mib_of_imports": round(before / 1024, 1)}


def main() -> None:
    """Make the folder, and measure in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.pages)))
        return
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), chosen.pages)
        words = [sys.executable, __file__, "--pages", str(chosen.pages), "--measure", name]
        load = os.getloadavg()[0]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)  # noqa: S603
        files = list(Path(name).glob("*.csv"))
        sizes = {
            "bytes_of_records": (Path(name) / RECORDS).stat().st_size, "bytes_of_a_page": files[0].stat().st_size,
            "bytes_of_tables": sum(path.stat().st_size for path in files),
        }  # fmt: skip
        command = "python benchmarks/bookkeeping.py" + (f" --pages {chosen.pages}" if chosen.pages != 20_000 else "")
        machine = f"{platform.machine()}, {platform.system()}, python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f}"
    found = {
        "command": command,
        "indices": chosen.pages * 50_000,
        "pages": chosen.pages,
        "open": OPEN,
        **found,
        **sizes,
        "machine": machine,
    }
    print(json.dumps(found, indent=1))
    if chosen.pages == parser.get_default("pages"):
        (Path(__file__).parent / "results" / "bookkeeping.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
