"""A table in pages, filled by any number of processes: every row once, whoever is killed and when; and nothing grows with what is done."""

import builtins
import csv
import gc
import hashlib
import itertools
import json
import math
import os
import random
import statistics
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kills import KILLED, die_at, in_child

from scoresde import pages as module
from scoresde.filling import Filling, begin, together
from scoresde.pages import Facts, Pages
from scoresde.parallel import Elsewhere, Group
from scoresde.seeds import Seeds, parse_seeds

COLUMNS = ("i", "text", "nfe", "value")


class Shared:
    """What the processes of a group count together, here in one process."""

    def __init__(self):
        self.counts = Counter()

    def add(self, name, n):
        self.counts[name] += n
        return self.counts[name]


def table(folder, seeds="0-46", batch=3):
    facts = lambda rows: Facts.of(COLUMNS, rows, ("value",), ("value",))
    asked = parse_seeds(seeds) if isinstance(seeds, str) else seeds
    return Pages(folder, "rows", COLUMNS, ("text",), "MEND", asked, batch, lambda row: row[1] == "good", facts)


def row(i, text="good"):
    return [i, text, i % 7, (i * 0.37) % 1.3 - 0.2]


class Killed(BaseException):
    """As SIGKILL: nothing is put in order."""


class Job:
    """A run over all ranks in one process: who takes or ends a batch next is drawn at random, and all may be killed after some steps."""

    def __init__(self, pages, world=1, seed=0, steps=math.inf, held=1, bad=(), there=lambda row: True, work=row):
        self.pages, self.world, self.steps, self.held = pages, world, steps, held
        self.random = random.Random(seed)  # noqa: S311
        self.bad, self.there, self.work = bad, there, work
        self.computed = []

    def __call__(self):
        self.pages.folder.mkdir(exist_ok=True)
        begun, store = begin(self.pages, self.there, {"seeds": str(self.pages.asked)}, "figure.png"), Shared()
        if begun.found is not None:
            return begun.found
        ranks = [Filling(self.pages, begun, self.there, Group(r, self.world, store=store)) for r in range(self.world)]
        taking = {r: filling.pieces() for r, filling in enumerate(ranks)}
        held = {r: [] for r in taking}
        while taking or any(held.values()):
            self.steps -= 1
            if self.steps < 0:
                raise Killed
            r = self.random.choice([r for r in held if r in taking or held[r]])
            if r in taking and len(held[r]) < self.held:
                piece = next(taking[r], None)
                held[r].append(piece) if piece else taking.pop(r)
            elif held[r]:
                piece = held[r].pop(self.random.randrange(len(held[r])))
                rows = [self.work(i) if i not in self.bad else self.work(i, "bad") for i in piece.wanted]
                self.computed += piece.wanted
                ranks[r].add(piece, rows)
        assert sum(filling.computed for filling in ranks) == len(self.computed)
        facts, sha256 = self.pages.sums()
        found = {"seeds": str(self.pages.asked), "n": facts.n, "bad": facts.bad, "sha256": sha256, **facts.packed()}
        if not facts.bad:
            (self.pages.folder / "summary.json").write_text(json.dumps(found))
        self.pages.close()
        return found


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def indices(pages):
    """Of all rows in all files, in their order."""
    found = []
    for path in sorted(pages.files(), key=lambda path: (len(path.stem), path.stem)):
        with path.open(newline="") as file:
            found += [int(line[0]) for line in itertools.islice(csv.reader(file), 1, None)]
    return found


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """No flushing, for speed: a kill takes nothing of what the system was given."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def small(monkeypatch):
    """Pages of ten indices, or twelve with batches of three."""
    monkeypatch.setattr(module, "PAGE", 10)


# --- sets of indices -----------------------------------------------------------------------------------------------------
PARTS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8)


@given(PARTS, PARTS, st.integers(0, 70), st.integers(0, 70))
def test_seeds_are_sets(one, other, a, b):
    a, b = min(a, b), max(a, b)
    sets = [{i for start, n in parts for i in range(start, start + n)} for parts in (one, other)]
    seeds = [Seeds.of((start, start + n) for start, n in parts) for parts in (one, other)]
    assert [list(s) for s in seeds] == [sorted(s) for s in sets]
    assert list(seeds[0].within(a, b)) == sorted(i for i in sets[0] if a <= i < b)
    assert list(seeds[0].without(seeds[1])) == sorted(sets[0] - sets[1])
    assert list(seeds[0].at(a, b)) == sorted(sets[0])[a:b]
    assert {i for i in range(80) if i in seeds[0]} == sets[0]
    assert all(x.stop < y.start for x, y in itertools.pairwise(seeds[0].without(seeds[1]).ranges))


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 11, 64])
@pytest.mark.parametrize("seeds", ["0", "0-99", "5,7-9,30-61,99,1000-1003"])
@pytest.mark.usefixtures("small")
def test_every_index_is_in_one_batch_and_every_batch_in_one_page(seeds, batch, tmp_path):
    pages = table(tmp_path, seeds, batch)
    assert pages.span % batch == 0
    assert pages.span - batch < 10 <= pages.span
    found = [(page, b, i) for page in pages.numbers for b, part in pages.batches(page) for i in part]
    assert [i for _, _, i in found] == list(parse_seeds(seeds))
    assert all(page == i // pages.span and b == i // batch * batch for page, b, i in found)
    assert len({pages.path(page) for page in pages.numbers}) == pages.numbers.count


def test_the_names_of_pages(tmp_path):
    pages = table(tmp_path, f"0-99,50000-50100,{2**64 - 1}", 64)
    assert [pages.path(page).name for page in pages.numbers][:2] == ["rows.csv", "rows-000000050048.csv"]
    assert pages.part(0).count == 99 + 1 + 48  # the first 50,000 are in one page, for any batch
    assert pages.path((2**64 - 1) // 50_048).name == f"rows-{(2**64 - 1) // 50_048 * 50_048}.csv"
    assert not table(tmp_path, "0-49999", 64).many


# --- sums ----------------------------------------------------------------------------------------------------------------
FLOATS = st.floats(-1e6, 1e6) | st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e150, 0.1])


@given(st.lists(FLOATS, min_size=2, max_size=20), st.lists(st.integers(0, 20), max_size=4))
def test_sums_are_exact_however_they_are_cut(values, cuts):
    ends = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    total = Facts()
    for a, b in itertools.pairwise(ends):
        rows = [[str(i), "", str(i), str(values[i])] for i in range(a, b)]
        total.add(Facts.unpacked(json.loads(json.dumps(Facts.of(COLUMNS, rows, ("value",), ("value",), {"k": b - a}).packed()))))
    assert (total.n, total.nfe, total.sum("k")) == (len(values), len(values) - 1, len(values))
    assert total.sum("value") == math.fsum(values)
    assert total.sums["value^2"] == sum(Fraction(v) ** 2 for v in values) * 2**2148
    assert total.mean("value") == math.fsum(values) / len(values)
    assert total.stdev("value") == pytest.approx(statistics.stdev(values), rel=1e-15)


# --- any number of processes ---------------------------------------------------------------------------------------------
SEEDS = ["0", "0-46", "0,5,7-9,30-31,40", "11-12", f"3-20,{2**64 - 20}-{2**64 - 1}"]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.usefixtures("small")
def test_the_same_files_for_any_number_of_processes(seeds, tmp_path):
    wanted = Job(table(tmp_path / "alone", seeds))()
    for world, held, seed in itertools.product((1, 2, 3, 5), (1, 3), range(3)):
        pages = table(tmp_path / f"{world} {held} {seed}", seeds)
        job = Job(pages, world, seed, held=held)
        assert job() == wanted
        assert sorted(job.computed) == list(parse_seeds(seeds)) == indices(pages)
        assert tree(pages.folder) == tree(tmp_path / "alone")
        again = Job(table(pages.folder, seeds), world)
        assert again() == wanted
        assert again.computed == []


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_killed_again_and_again(tmp_path_factory, rng):
    """At random steps, with the last rows or lines torn, with another number of processes each time: nothing lost, nothing doubled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAGE", 10)
        patch.setattr(os, "fsync", lambda file: None)
        folder, seeds = tmp_path_factory.mktemp("kills"), rng.choice(SEEDS[1:])
        wanted = Job(table(folder / "alone", seeds))()
        pages, computed = table(folder / "out", seeds), Counter()
        for _ in range(rng.randrange(1, 6)):
            asked = rng.choice([seeds, seeds, "0-8"])
            job = Job(table(pages.folder, asked), rng.choice([1, 2, 3]), rng.random(), rng.randrange(40), rng.choice([1, 3]))
            try:
                job()
            except Killed:
                computed.update(job.computed)
                assert not (pages.folder / "summary.json").exists()
                assert len(set(job.computed)) == len(job.computed)
                changed = [p for p in pages.folder.rglob("*") if p.is_file() and p.suffix in (".csv", ".jsonl")]
                if changed and rng.random() < 0.7:  # of what was written last some bytes may be missing
                    last = max(changed, key=lambda p: p.stat().st_mtime_ns)
                    os.truncate(last, max(0, last.stat().st_size - rng.randrange(30)))
        job = Job(pages, rng.choice([1, 2, 3]), rng.random())
        found = job()
        assert found == wanted or found["seeds"] == seeds == "0-8"
        asked = list(parse_seeds(seeds))
        assert [i for i in indices(pages) if i in parse_seeds(seeds)] == asked
        extra = Job(table(folder / "both", f"{seeds},0-8"))
        extra()
        if set(indices(pages)) == set(indices(extra.pages)):
            files = lambda folder: {name: sorted(data.split(b"\n")) for name, data in tree(folder).items() if name.endswith(".csv")}
            assert files(pages.folder) == files(folder / "both")


def calls(folder, world, n, torn):
    """The job, in a child that dies at the n-th call to the system."""
    die_at(n, torn)
    Job(table(folder, "0-20"), world, held=2)()


WORLDS = [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("torn", [pytest.param(False, marks=pytest.mark.slow, id="before"), pytest.param(True, id="torn")])
@pytest.mark.usefixtures("small")
def test_a_kill_at_every_call(torn, world, tmp_path):
    """Of rows, records, pages, and of bringing them home: another number of processes makes the same files of what is left."""
    wanted = Job(table(tmp_path / "alone", "0-20"))()
    for n in itertools.count(1, 1 if world == 2 else 2):
        folder = tmp_path / f"{n}"
        code = in_child(lambda n=n, folder=folder: calls(folder, world, n, torn))
        if code == 0:
            break
        assert code == KILLED
        left = {int(line.split(",")[0]) for p in folder.rglob("*.csv") for line in p.read_text().split("\n")[1:-1]}
        job = Job(table(folder, "0-20"), n % 3 + 1, n)
        assert job() == wanted, f"killed at call {n}"
        assert not left & set(job.computed)
        assert tree(folder) == tree(tmp_path / "alone"), f"killed at call {n}"
    assert n > 50


@pytest.mark.usefixtures("small")
def test_killed_while_what_was_left_is_brought_home(tmp_path):
    wanted = Job(table(tmp_path / "alone", "0-20"))()
    for n in itertools.count(1, 2):
        folder = tmp_path / f"{n}"
        with pytest.raises(Killed):
            Job(table(folder, "0-20"), 3, 5, 14, held=2)()
        assert len(list((folder / module.ROWS).iterdir())) >= 3
        code = in_child(lambda n=n, folder=folder: (die_at(n, True), table(folder, "0-20").begin()))
        assert Job(table(folder, "0-20"), 2)() == wanted, f"killed at call {n}"
        assert tree(folder) == tree(tmp_path / "alone"), f"killed at call {n}"
        if code == 0:
            break
    assert n > 20


@pytest.mark.usefixtures("small")
def test_what_is_not_good_is_tried_again(tmp_path):
    """A page with bad rows is recorded with them and not taken for whole."""
    for world in (1, 3):
        pages = table(tmp_path / f"{world}")
        found = Job(pages, world, bad={4, 30, 31})()
        assert (found["n"], found["bad"], [line[0] for line in found["first_bad"]]) == (44, 3, ["4", "30", "31"])
        job = Job(pages, world, bad={30})
        assert job()["bad"] == 1
        assert sorted(job.computed) == [4, 30, 31]
        job = Job(pages, world)
        assert job() == Job(table(tmp_path / f"{world} whole"))()
        assert job.computed == [30]
        assert tree(pages.folder) == tree(tmp_path / f"{world} whole")


@pytest.mark.usefixtures("small")
def test_what_a_row_speaks_of_may_be_gone(tmp_path):
    """Of a page that is recorded that is not looked at; of others it is made again, by one process, whatever the others see."""
    with pytest.raises(Killed):
        Job(table(tmp_path), 2, steps=25)()
    known = {int(i) for p in tmp_path.rglob("*.csv") for i in (line.split(",")[0] for line in p.read_text().split("\n")[1:-1])}
    recorded = sum(line.count(b"\n") for p in (tmp_path / module.ROWS).glob("*.jsonl") for line in [p.read_bytes()])
    assert recorded >= 1
    gone = {i for i in known if i % 2}
    job = Job(table(tmp_path), 3, there=lambda row: int(row[0]) not in gone)
    job()
    assert indices(table(tmp_path)) == list(range(47))
    assert len(set(job.computed)) == len(job.computed)
    assert 0 < len(gone & set(job.computed)) < len(gone)


@pytest.mark.usefixtures("small")
def test_more_or_less_may_be_asked_for(tmp_path):
    wanted = Job(table(tmp_path / "alone"))()
    for seeds in ("0-30", "40", "0-8", "20-46", "0-46"):
        found = Job(table(tmp_path / "out", seeds), 2)()
        assert found["n"] == parse_seeds(seeds).count
        assert found["sha256"] == Job(table(tmp_path / f"fresh {seeds}", seeds))()["sha256"]  # whatever else is there
    assert tree(tmp_path / "out") == tree(tmp_path / "alone")
    assert found == wanted
    one = tmp_path / "fresh 0-8" / "rows.csv"
    assert Job(table(tmp_path / "fresh 0-8", "0-8"))()["sha256"] == hashlib.sha256(one.read_bytes()).hexdigest()


@pytest.mark.usefixtures("small")
def test_a_page_that_was_changed_is_read_again(tmp_path):
    wanted = Job(table(tmp_path))()
    before = tree(tmp_path)
    for name in ("rows-000000000012.csv", "pages.jsonl"):
        for keep in (0, 20, -1, -30):
            data = before[name]
            (tmp_path / name).write_bytes(data[:keep])
            job = Job(table(tmp_path), 2)
            assert job() == wanted
            assert tree(tmp_path) == before
            assert set(job.computed) <= set(range(12, 24))
    (tmp_path / "rows-000000000012.csv").write_bytes(before["rows.csv"][:-3])
    with pytest.raises(ValueError, match=r"rows-000000000012\.csv has a row of 0, which belongs into rows\.csv; MEND"):
        Job(table(tmp_path))()


def test_a_batch_with_other_rows_is_refused(tmp_path):
    pages = table(tmp_path, "0-5")
    filling = Filling(pages, begin(pages, lambda row: True, {}, "x"), lambda row: True, Group())
    piece = next(filling.pieces())
    for wrong in ([row(0), row(1)], [row(0), row(2), row(1)], [row(0), row(1), row(1)]):
        with pytest.raises(RuntimeError, match="wanted those of"):
            filling.add(piece, wrong)
    assert not pages.path(0).exists()


@pytest.mark.usefixtures("small")
def test_rows_that_do_not_show(tmp_path, monkeypatch):
    """What another machine has written may be seen late: that is waited for, and then said."""
    monkeypatch.setattr("scoresde.filling.PATIENCE", 3)
    waits = []

    def sleep(_):
        waits.append(1)
        if len(waits) == 2:
            hidden.rename(segment)

    monkeypatch.setattr("time.sleep", sleep)
    for late in (True, False):
        pages = table(tmp_path / str(late), "0-5")
        pages.folder.mkdir()
        begun, store = begin(pages, lambda row: True, {}, "x"), Shared()
        ranks = [Filling(pages, begun, lambda row: True, Group(r, 2, store=store)) for r in range(2)]
        for filling in ranks:
            filling.taken = next(filling.pieces())
        ranks[0].add(ranks[0].taken, [row(i) for i in (0, 1, 2)])
        (segment,) = (pages.folder / module.ROWS).glob("*.csv")
        hidden = segment.rename(tmp_path / "hidden")
        waits = [] if late else [1, 1, 1]
        if late:
            ranks[1].add(ranks[1].taken, [row(i) for i in (3, 4, 5)])
            assert indices(pages) == list(range(6))
        else:
            with pytest.raises(RuntimeError, match=r"3 rows that others have written do not show in "):
                ranks[1].add(ranks[1].taken, [row(i) for i in (3, 4, 5)])
            hidden.rename(segment)  # and nothing is lost
            job = Job(table(pages.folder, "0-5"))
            job()
            assert (indices(pages), job.computed) == (list(range(6)), [])


ALTERED = {
    "n": 5, "sums": {}, "bad": 1, "nfe": None, "page": True, "first_bad": 5, "sha256": "0", "asked": 7, "bytes": "x", "line": "0" * 16,
}  # fmt: skip


@pytest.mark.usefixtures("small")
def test_an_altered_line_is_as_if_it_were_not_there(tmp_path):
    """Its page is read and recorded again, and nothing is computed; so are lines that are doubled, or out of order."""
    wanted = Job(table(tmp_path))()
    before = tree(tmp_path)
    lines = before["pages.jsonl"].splitlines(keepends=True)
    cases = [[lines[0], *lines[:1], *lines[2:]], lines[::-1], [*lines, lines[0]], [b"\xff\x00\n", b"[]\n", b"5\n", b"{}\n"], []]
    for name, value in ALTERED.items():
        found = json.loads(lines[1])
        for changed in ({**found, name: value}, {key: found[key] for key in found if key != name}):
            cases.append([lines[0], json.dumps(changed, separators=(",", ":")).encode() + b"\n", *lines[2:]])
    for case in cases:
        for summary in (True, False):
            (tmp_path / "pages.jsonl").write_bytes(b"".join(case))
            if not summary:
                (tmp_path / "summary.json").unlink()
            job = Job(table(tmp_path))
            assert job() == wanted
            assert job.computed == []
            if case != [*lines, lines[0]]:  # what follows the lines of all is left there
                assert tree(tmp_path) == before


def test_an_altered_row_is_summed_anew(tmp_path):
    """The one page is what it is, and the summary is of it; rows that cannot be are refused in words."""
    wanted = Job(table(tmp_path))()
    path = tmp_path / "rows.csv"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\n3,good,3,", b"\n3,good,6,"))
    job = Job(table(tmp_path))
    found = job()
    assert (job.computed, found["n"], found["sha256"]) == ([], wanted["n"], hashlib.sha256(path.read_bytes()).hexdigest())
    assert found["sha256"] != wanted["sha256"]
    assert Job(table(tmp_path))() == found
    for cells, words in {
        b"3,good,5.5,": r"line 5 of .*rows\.csv has nfe '5\.5', which is no whole number; MEND",
        b"3,good,,": "which is no whole number; MEND",
        b"3" * 5000 + b",good,3,": "is none that this version writes; MEND",
        b'3,"' + b"x" * 200_000 + b",3,": r"rows\.csv is no table that this version writes \(field larger than .*; MEND",
    }.items():
        path.write_bytes(data.replace(b"\n3,good,3,", b"\n" + cells))
        with pytest.raises(ValueError, match=words):
            Job(table(tmp_path))()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("world", [1, 2])
def test_who_is_left_of_a_run_that_is_over_stops(world, tmp_path, monkeypatch):
    """It writes no rows, no page and no file of a sample, whether the later run is at work or done."""
    monkeypatch.setattr(module, "PATIENCE", 1)
    pages, there = table(tmp_path, "0-8"), lambda row: True
    begun = begin(pages, there, {}, "x")
    old = Filling(pages, begun, there, Group(0, world, store=Shared()))
    piece = next(old.pieces())
    module.current(tmp_path, begun.run)
    module.current(tmp_path, "")
    for finish in (False, True):
        if finish:
            Job(table(tmp_path, "0-8"))()
        else:
            begin(table(tmp_path, "0-8"), there, {}, "x")
        before = tree(tmp_path)
        with pytest.raises(RuntimeError, match=r"another run has begun in .* since: this one stops"):
            old.add(piece, [row(i) for i in piece.wanted])
        with pytest.raises(RuntimeError, match="this one stops"):
            pages.write({i: list(map(str, row(i))) for i in range(3)}, 0, begun.run)
        assert tree(tmp_path) == before


def test_what_is_under_way_goes_when_another_run_begins(tmp_path):
    """Between the look at who is at work and the renaming: the file is gone then, and cannot replace one of the later run."""
    pages = table(tmp_path, "0-8")
    begun = begin(pages, lambda row: True, {}, "x")

    def data():
        yield from module.guarded(b"early", tmp_path, begun.run)
        begin(pages, lambda row: True, {}, "x")
        (tmp_path / "file").write_bytes(b"late")

    with pytest.raises(FileNotFoundError):
        module.write_file(tmp_path / "file", data(), tmp_path / module.WRITING)
    assert (tmp_path / "file").read_bytes() == b"late"


@pytest.mark.usefixtures("small")
def test_files_of_recorded_pages_are_looked_for_in_small_jobs(tmp_path, monkeypatch):
    Job(table(tmp_path))()
    asked = []
    files = lambda part: asked.append(str(part)) or 13 not in part
    assert table(tmp_path).begin("x", files)[0].ranges == (range(1, 2),)
    assert asked == ["0-11", "12-23", "24-35", "36-46"]
    monkeypatch.setattr(module, "LOOKED", 3)
    assert table(tmp_path).begin("x", files) == (Seeds(()), 47)
    assert len(asked) == 4


# --- many ----------------------------------------------------------------------------------------------------------------
def test_fifty_thousand_with_all_that_goes_wrong(tmp_path):
    """Processes that die, batches that raise, rows that are not good, lines that are torn: then every index once, in order."""
    rng = random.Random(0)  # noqa: S311
    seeds, tries = "0-49999,60000,70000-75000", 0
    wanted = Job(table(tmp_path / "alone", seeds, 64))()
    bad = set(rng.sample(range(50_000), 40))

    def work(i, text="good"):
        if fails and rng.random() < 2e-5:
            raise ArithmeticError
        return row(i, text)

    fails, pages = True, table(tmp_path / "out", seeds, 64)
    while fails:
        tries += 1
        fails = tries < 5
        steps, wrong = (rng.randrange(400, 900), bad) if fails else (math.inf, ())
        job = Job(pages, rng.choice([1, 2, 3, 7]), tries, steps, 2, wrong, work=work)
        try:
            found = job()
        except (ArithmeticError, Killed):
            assert not (pages.folder / "summary.json").exists()
            for path in (pages.folder / module.ROWS).glob("*.csv"):
                if rng.random() < 0.3:
                    os.truncate(path, path.stat().st_size - rng.randrange(50))
    assert found == wanted
    assert indices(pages) == list(parse_seeds(seeds))
    assert tree(pages.folder) == tree(tmp_path / "alone")


def recorded(folder, pages, n):
    """As a job leaves its folder that has done so many pages: their files have their size, and no bytes on the disk."""
    folder.mkdir()
    facts = Facts.of(COLUMNS, [list(map(str, row(i))) for i in range(pages.span)], ("value",), ("value",))
    with (folder / "pages.jsonl").open("wb") as file:
        for page in range(n):
            pages.path(page).touch()
            os.truncate(pages.path(page), 3_000_000)
            asked = f"{page * pages.span}-{(page + 1) * pages.span - 1}"
            line = {"page": page, "asked": asked, "bytes": 3_000_000, "sha256": f"{page:064d}", **facts.packed()}
            file.write(module.vouched(line))
    return facts


def test_a_start_does_not_grow_with_what_is_done(tmp_path, monkeypatch):
    """Neither the files it opens nor the memory it takes: of a billion indices, so many pages are recorded, three are not."""
    opened, peaks, real = [], [], builtins.open
    for n in (40, 2000):
        folder = tmp_path / str(n)
        pages = table(folder, "0-999999999", 50_000)
        facts = recorded(folder, pages, n)
        monkeypatch.setattr("io.open", lambda path, *a, **k: names.append(path) or real(path, *a, **k))
        for _ in range(2):  # once, for what is made but once
            names = []
            tracemalloc.start()
            todo, done = table(folder, "0-999999999", 50_000).begin()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert todo.ranges == (range(n, 20_000),)
            assert done == n * 50_000
        opened.append(len(names))
        monkeypatch.undo()
        monkeypatch.setattr(os, "fsync", lambda file: None)
        found, _ = table(folder, f"0-{n * 50_000 - 1}", 50_000).sums()
        assert (found.n, found.sums["value"]) == (n * 50_000, n * facts.sums["value"])
    assert opened[0] == opened[1] <= 2
    assert peaks[3] < peaks[1] + 20_000


class Flat:
    """A store that takes no memory for what it counts."""

    def __init__(self):
        self.counts = {kind: np.zeros(1000, np.int64) for kind in ("taken", "done", "rows")}

    def add(self, name, n):
        _, page, *kind = name.split("/")
        if not page.isdecimal():
            return 0  # none fails
        count = self.counts[kind[0] if kind else "taken"]
        count[int(page)] += n
        return int(count[int(page)])


def fill(pages, world, store):
    """All rows, without keeping which."""
    pages.folder.mkdir()
    begun = begin(pages, lambda row: True, {}, "x")
    ranks = [Filling(pages, begun, lambda row: True, Group(r, world, store=store)) for r in range(world)]
    taking = {filling: filling.pieces() for filling in ranks}
    while taking:
        for filling in list(taking):
            if piece := next(taking[filling], None):
                filling.add(piece, [row(i) for i in piece.wanted])
                gc.collect()  # what waits for a collector is not held
            else:
                del taking[filling]
    pages.sums()
    pages.close()


@pytest.mark.parametrize("world", [1, 2])
def test_memory_is_that_of_a_page(world, tmp_path, monkeypatch):
    peaks = []
    monkeypatch.setattr(module, "PAGE", 50)
    gc.collect()
    gc.freeze()
    for n in (20_000, 500, 20_000):
        pages = table(tmp_path / f"{len(peaks)}", f"0-{n - 1}", 10)
        store = Flat()
        tracemalloc.start()
        fill(pages, world, store)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert indices(pages) == list(range(n))
    gc.unfreeze()
    # bytes a page more, for the place of its line. What is made but once falls in the first; the interpreter's own
    # table of strings (pathlib interns the parts of a path) may grow by megabytes in one of the two, never in both
    assert min(peaks[0], peaks[2]) < peaks[1] + 390 * 80


# --- errors --------------------------------------------------------------------------------------------------------------
def fails(group, who, folder):
    with together(group):
        if group.rank == who:
            raise ValueError("this is why")
    return "went on"


def test_an_error_of_one_ends_all(two, tmp_path):
    assert two(fails, None, tmp_path) == ["went on", "went on"]
    for who in (0, 1):
        with pytest.raises(AssertionError) as caught:
            two(fails, who, tmp_path)
        assert caught.value.errors[who] == (ValueError, "this is why")
        assert caught.value.errors[1 - who] == (Elsewhere, "1")
