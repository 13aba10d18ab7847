"""Batches are a function of the step: the same whenever, wherever and by however many they are asked for."""

import gc
import math
import os
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde import data, images
from scoresde.data import Batches, Source, load, permuted, prefetched, split
from scoresde.philox import philox
from scoresde.sources import PIECE, Rows


def numbered(n, shape=(3, 4, 5), dtype=np.uint8):
    """Sample i holds i in its first three bytes: what a batch holds says which rows it is of."""
    x = np.zeros((n, int(np.prod(shape))), dtype)
    x[:, 0], x[:, 1], x[:, 2] = np.arange(n) % 256, np.arange(n) // 256 % 256, np.arange(n) // 65536
    return x.reshape(n, *shape)


def rows_of(batch):
    x = batch[0] if isinstance(batch, tuple) else batch
    flat = x.reshape(len(x), -1)[:, :3].long()
    return (flat * torch.tensor([1, 256, 65536])).sum(1).tolist()


def same(a, b):
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    return all(torch.equal(p, q) and p.dtype == q.dtype for p, q in pairs)


# --- the permutation -----------------------------------------------------------------------------------------------------
def test_permuted_is_a_bijection_of_every_small_size():
    for n in range(1, 301):
        assert np.array_equal(np.sort(permuted(np.arange(n), n, 5, 2)), np.arange(n)), n


@pytest.mark.parametrize("n", [1797, 4096, 4097, 60000, 99991, 2**17 - 1])
def test_permuted_is_a_bijection_of_larger_ones(n):
    for seed, epoch in ((0, 0), (2**64 - 1, 3)):
        assert (np.bincount(permuted(np.arange(n), n, seed, epoch), minlength=n) == 1).all()


def test_permuted_of_each_position_is_a_function_of_it_alone():
    n, order = 1000, np.random.default_rng(0).permutation(1000)
    whole = permuted(np.arange(n), n, 7, 4)
    assert np.array_equal(permuted(order, n, 7, 4), whole[order])
    assert np.array_equal(permuted(order, n, 7, np.full(n, 4)), whole[order])
    mixed = permuted(np.tile(np.arange(n), 3), n, 7, np.repeat([4, 0, 10**12], n)).reshape(3, n)
    assert np.array_equal(mixed, np.stack([permuted(np.arange(n), n, 7, e) for e in (4, 0, 10**12)]))
    small = permuted(np.tile(np.arange(9), 3), 9, 7, np.repeat([4, 0, 10**12], 9)).reshape(3, 9)
    assert np.array_equal(small, np.stack([permuted(np.arange(9), 9, 7, e) for e in (4, 0, 10**12)]))


def test_permuted_differs_by_seed_epoch_and_stream():
    n = 2000
    orders = [permuted(np.arange(n), n, seed, epoch, stream=s) for seed in (0, 1, 2**63) for epoch in (0, 1) for s in (32, 34)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 12  # one on average, of a Poisson law
    assert (orders[0] == np.arange(n)).sum() < 12


def test_permuted_bits_are_settled():
    assert permuted(np.arange(8), 8, 0, 0).tolist() == SETTLED[8]
    assert permuted(np.arange(8), 60000, 3, 11).tolist() == SETTLED[60000]
    assert permuted(np.array([0, 1, 10**9, 2**40 - 1]), 2**40, 2**64 - 1, 2**40).tolist() == SETTLED[2**40]


SETTLED = {
    8: [2, 3, 6, 1, 7, 5, 4, 0],
    60000: [43755, 56655, 55081, 36941, 25676, 4903, 40487, 33893],
    2**40: [628408170881, 790009354595, 702945817995, 940417224676],
}


def by_hand(position, n, seed, epoch):
    """The docstring of `permuted` in Python's integers."""
    words = philox(torch.tensor([seed]), epoch, data.ORDER, 16)[0].tolist()
    keys = [high << 32 | low for high, low in zip(words[::2], words[1::2], strict=True)]
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)

    def mix(value, key):  # SplitMix64's
        z = (value * 0x9E3779B97F4A7C15 + key) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    while True:
        left, right = divmod(position, b)
        for i in range(0, 8, 2):
            left = (left + mix(right, keys[i])) % a
            right = (right + mix(left, keys[i + 1])) % b
        position = left * b + right
        if position < n:
            return position


@pytest.mark.parametrize("n", [65, 1797, 60000, 2**40 - 5])
def test_permuted_is_what_it_says(n):
    position = np.random.default_rng(n).integers(0, n, 200)
    assert permuted(position, n, 12, 3).tolist() == [by_hand(p, n, 12, 3) for p in position.tolist()]


def chi_square(counts):
    """Of equal cells, as a number of standard deviations above its mean."""
    expected = counts.sum() / counts.size
    free = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - free) / (2 * free) ** 0.5)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_every_order_of_a_few_is_as_frequent(n):
    epochs = 20000
    orders = permuted(np.tile(np.arange(n), epochs), n, 3, np.repeat(np.arange(epochs), n)).reshape(epochs, n)
    _, counts = np.unique((orders * n ** np.arange(n)).sum(1), return_counts=True)
    assert len(counts) == {2: 2, 3: 6, 5: 120}[n]
    assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("n", [65, 81, 100])
def test_rows_of_neighbours_are_as_independent_as_they_can_be(n):
    """Over epochs, where two positions go: all n (n - 1) pairs of rows alike, and so their differences."""
    epochs = 20 * n * n
    first, second = (permuted(np.full(epochs, i), n, 1, np.arange(epochs)) for i in (0, 1))
    pairs = np.bincount(first * n + second, minlength=n * n).reshape(n, n)
    assert not pairs.diagonal().any()
    assert abs(chi_square(pairs[~np.eye(n, dtype=bool)])) < 4
    assert abs(chi_square(np.bincount((second - first) % n, minlength=n)[1:])) < 4


@pytest.mark.parametrize("n", [1000, 60000, 10**9 + 7])
def test_rows_within_an_epoch_are_spread_evenly_and_without_correlation(n):
    rows = permuted(np.arange(min(n, 60000)), n, 9, 5) / n
    m = len(rows)
    if m < n:
        assert abs(chi_square(np.bincount((rows * 50).astype(int), minlength=50))) < 4
    else:  # without replacement: of a stretch of them
        assert chi_square(np.bincount((rows[: m // 2] * 20).astype(int), minlength=20)) < 4
    for lag in (1, 2, 3, 7, 64):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 4 / m**0.5
    assert abs(np.corrcoef(rows, np.arange(m))[0, 1]) < 4 / m**0.5
    moved = permuted(np.arange(m), n, 9, 6) / n
    assert abs(np.corrcoef(rows, moved)[0, 1]) < 4 / m**0.5


@pytest.mark.slow
def test_a_million_rows_are_each_there_once():
    n = 10**6
    seen = np.zeros(n, np.int64)
    for first in range(0, n, 50000):
        seen[permuted(np.arange(first, first + 50000), n, 2, 1)] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("n", [10**6, 10**9, 2**40])
def test_memory_does_not_grow_with_the_number_of_samples(n):
    position = np.random.default_rng(0).integers(0, n, 256)
    permuted(position, n, 0, 0)
    tracemalloc.start()
    rows = permuted(position, n, 0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert 0 <= rows.min() <= rows.max() < n
    assert len(set(rows.tolist())) == len(set(position.tolist()))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(n=2**40 + 1), "wanted at most 2\\^40"),
        (dict(n=0), "at least 1"),
        (dict(position=np.array([10])), "position spans 10 .. 10; wanted 0 .. 9"),
        (dict(position=np.array([-1])), "position spans -1"),
        (dict(epoch=-1), "epoch spans -1"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=2**64), "seed % 2"),
    ],
)
def test_permuted_refuses(kwargs, words):
    with pytest.raises(ValueError, match=words):
        permuted(**{"position": np.arange(3), "n": 10, "seed": 0, "epoch": 0, **kwargs})


# --- batches -------------------------------------------------------------------------------------------------------------
SOURCE = Source(numbered(1000), "numbered", np.arange(1000) % 7, 7, 256)


def test_every_epoch_has_every_row_once_and_batches_run_on():
    batches = Batches(SOURCE, 64, seed=3)
    rows = [row for step in range(1, 48) for row in rows_of(batches(step))]
    for epoch in range(3):
        assert sorted(rows[epoch * 1000 : (epoch + 1) * 1000]) == list(range(1000))
    assert rows[:1000] != rows[1000:2000]
    assert [(batches.epoch(s), batches.position(s)) for s in (1, 2, 16, 17, 32)] == [(0, 0), (0, 64), (0, 960), (1, 24), (1, 984)]


def test_a_step_is_the_same_at_any_time():
    steps = [5, 1, 16, 10**9, 2, 16]
    batches = Batches(SOURCE, 64, seed=3, flip=True)
    first = {step: batches(step) for step in steps}
    data._words.cache_clear()
    again = Batches(SOURCE, 64, seed=3, flip=True)
    for step in sorted(steps):
        assert same(again(step), first[step])
    x, labels = first[5]
    assert (x.dtype, labels.dtype, x.shape) == (torch.uint8, torch.int64, (64, 3, 4, 5))
    assert labels.tolist() == [row % 7 for row in rows_of(Batches(SOURCE, 64, seed=3)(5))]


def test_seeds_give_other_orders():
    assert rows_of(Batches(SOURCE, 64, seed=1)(1)) != rows_of(Batches(SOURCE, 64, seed=2)(1))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6, 66])
def test_the_parts_of_the_ranks_make_the_batch(world):
    whole = Batches(SOURCE, 66, seed=3, flip=True)
    for step in (1, 16, 17):  # 16 crosses the end of an epoch
        parts = [Batches(SOURCE, 66, seed=3, flip=True, rank=r, world=world)(step) for r in range(world)]
        assert same(tuple(torch.cat(p) for p in zip(*parts, strict=True)), whole(step))
        assert {len(x) for x, _ in parts} <= {66 // world, 66 // world + 1}


def test_a_batch_may_hold_many_epochs():
    few = load(numbered(5))
    rows = rows_of(Batches(few, 64)(3))
    k = 128 + np.arange(64)
    assert rows == [int(permuted(p, 5, 0, e)) for e, p in zip(k // 5, k % 5, strict=True)]
    assert rows_of(Batches(load(numbered(1)), 1000)(7)) == [0] * 1000
    assert sorted(rows_of(Batches(load(numbered(100)), 200)(1))) == sorted([*range(100)] * 2)


def test_flips_are_of_the_last_axis_every_other_one_by_chance():
    x = np.random.default_rng(0).integers(0, 256, (500, 3, 4, 5)).astype(np.uint8)
    plain, flipped = Batches(load(x), 500), Batches(load(x), 500, flip=True)
    turned = []
    for step in range(1, 21):
        a, b = plain(step), flipped(step)
        as_is, mirrored = ((b == c).flatten(1).all(1) for c in (a, a.flip(3)))
        assert bool((as_is ^ mirrored).all())
        turned.append(mirrored)
    share = torch.stack(turned).double()
    assert abs(float(share.mean()) - 0.5) < 4 * 0.5 / 10000**0.5
    assert abs(float(torch.corrcoef(torch.stack([share.flatten()[:-1], share.flatten()[1:]]))[0, 1])) < 4 / 10000**0.5
    rows = torch.tensor([permuted(np.arange(500), 500, 0, e).tolist() for e in range(20)])
    of_rows = torch.zeros(500, dtype=torch.double).index_add_(0, rows.flatten(), share.flatten())  # of a row, another in each epoch
    assert int(of_rows.min()) > 0
    assert int(of_rows.max()) < 20
    assert not same(Batches(load(x), 500, flip=True, seed=1)(1), flipped(1))
    assert np.array_equal(x, np.random.default_rng(0).integers(0, 256, (500, 3, 4, 5)))  # the source is as it was


def test_vectors_and_their_dtypes():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(10, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
        source = load(x)
        assert (source.levels, source.labels, source.classes, source.shape, len(source)) == (None, None, 0, (2,), 10)
        got = Batches(source, 5)(2)
        assert got.dtype is dtype
        assert torch.equal(got, x[permuted(np.arange(5, 10), 10, 0, 0)])
    labels = torch.arange(10) % 3
    x, c = Batches(load(x, labels=labels), 10)(1)
    assert isinstance(Batches(load(x, labels=labels), 10, labels=False)(1), torch.Tensor)
    assert torch.equal(c, labels[permuted(np.arange(10), 10, 0, 0)])


def test_a_batch_is_its_own_memory():
    x = numbered(10)
    got = Batches(load(x), 10)(1)
    got.zero_()
    assert np.array_equal(x, numbered(10))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        (dict(batch=0), ValueError, "at least 1"),
        (dict(batch=2.0), TypeError, "an integer"),
        (dict(batch=True), TypeError, "an integer"),
        (dict(world=65), ValueError, "batch is 64 for 65 ranks; wanted at least a row each"),
        (dict(world=0), ValueError, "at least 1"),
        (dict(world=2, rank=2), ValueError, "wanted 0 .. 1"),
        (dict(rank=-1), ValueError, "at least 0"),
        (dict(seed=-1), ValueError, "seed is -1"),
        (dict(seed=2**64), ValueError, "seed % 2"),
        (dict(seed=0.5), TypeError, "seed is 0.5"),
        (dict(flip=1), TypeError, "True or False"),
        (dict(labels=torch.zeros(3)), TypeError, "True or False"),
        (dict(source=load(torch.zeros(4, 2)), flip=True), ValueError, "flip is of images"),
        (dict(source=torch.zeros(4, 2)), TypeError, "wanted what load"),
    ],
)
def test_batches_refuse(kwargs, error, words):
    with pytest.raises(error, match=words):
        Batches(**{"source": SOURCE, "batch": 64, **kwargs})


@pytest.mark.parametrize(
    ("step", "error"), [(0, ValueError), (-1, ValueError), (1.0, TypeError), (2**60, ValueError), (None, TypeError)]
)
def test_steps_are_counted_from_one(step, error):
    for batches in (Batches(SOURCE, 64), prefetched(Batches(SOURCE, 64), workers=1)):
        with pytest.raises(error, match="step"):
            batches(step)


# --- ahead of time -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(workers):
    plain = Batches(SOURCE, 64, seed=1, flip=True)
    with prefetched(plain, workers=workers, ahead=3) as batches:
        assert batches.batches is plain
        for step in (1, 2, 3, 4, 9, 10, 5, 5, 4, 10**6, 1):
            assert same(batches(step), plain(step))


def test_steps_are_computed_ahead_and_once():
    asked, gate = [], threading.Event()

    def batches(step):
        asked.append(step)
        gate.wait(30)
        return torch.tensor([step])

    with prefetched(batches, workers=1, ahead=2) as ahead:
        gate.set()
        for step in range(1, 8):
            assert int(ahead(step)) == step
    assert asked[:7] == [1, 2, 3, 4, 5, 6, 7]
    assert len(set(asked)) == len(asked)
    assert max(asked) <= 9


def test_an_error_is_raised_at_its_step_and_leaves_the_others():
    def batches(step):
        if step == 3:
            raise OSError(f"no file for step {step}")
        return torch.tensor([step])

    for workers in (0, 2):
        with prefetched(batches, workers=workers) as ahead:
            assert [int(ahead(step)) for step in (1, 2)] == [1, 2]
            for _ in range(2):
                with pytest.raises(OSError, match="step 3"):
                    ahead(3)
            assert [int(ahead(step)) for step in (4, 2, 5)] == [4, 2, 5]


def alive():
    return sum(t.name.startswith("scoresde-data") for t in threading.enumerate())


def soon(ready):
    for _ in range(500):
        gc.collect()
        if ready():
            return True
        time.sleep(0.02)
    return False


def test_threads_end_with_the_object():
    assert soon(lambda: not alive())
    with prefetched(Batches(SOURCE, 8), workers=3) as batches:
        batches(1)
        assert alive() >= 1
    assert soon(lambda: not alive())
    with pytest.raises(RuntimeError, match="closed"):
        batches(2)
    batches.close()
    forgotten = prefetched(Batches(SOURCE, 8), workers=2)
    forgotten(1)
    del forgotten
    assert soon(lambda: not alive())


def test_threads_may_ask_together():
    plain, wrong = Batches(SOURCE, 16, seed=1), []
    with prefetched(plain, workers=2, ahead=2) as batches:

        def ask(first):
            wrong.extend(step for step in range(first, first + 10) if not same(batches(step), plain(step)))

        threads = [threading.Thread(target=ask, args=(i,)) for i in (1, 3, 100)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_has_its_own_threads():
    plain = Batches(SOURCE, 16, seed=1)
    with prefetched(plain, workers=2) as batches:
        wanted = batches(1), plain(2)
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 0 if same(batches(2), wanted[1]) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert same(batches(2), wanted[1])


def test_prefetched_refuses():
    with pytest.raises(TypeError, match="a function of the step"):
        prefetched([torch.zeros(3)])
    for kwargs in (dict(workers=-1), dict(ahead=0)):
        with pytest.raises(ValueError, match="at least"):
            prefetched(Batches(SOURCE, 8), **kwargs)


# --- split ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("held_out", "count"), [(1, 1), (200, 200), (0.25, 250), (999, 999)])
def test_split_parts_the_samples(held_out, count):
    train, held = split(SOURCE, held_out, seed=4)
    assert (len(train), len(held)) == (1000 - count, count)
    rows = [rows_of(torch.from_numpy(part.x[np.arange(len(part))])) for part in (train, held)]
    assert sorted(rows[0] + rows[1]) == list(range(1000))
    assert all(r == sorted(r) for r in rows)
    assert train.labels.tolist() == [r % 7 for r in rows[0]]
    assert (held.classes, held.levels, held.dtype, held.shape) == (7, 256, np.uint8, (3, 4, 5))
    assert split(SOURCE, held_out, seed=4)[1].sha256 == held.sha256 != train.sha256
    if count not in (1, 999):
        assert split(SOURCE, held_out, seed=5)[1].sha256 != held.sha256
    inner, _ = split(train, 0.5) if count < 999 else (train, None)
    assert set(rows_of(torch.from_numpy(inner.x[np.arange(len(inner))]))) <= set(rows[0])


@pytest.mark.parametrize("held_out", [0, 1000, 1.0, 0.0, 1e-9, -1, float("nan"), None, "1", True])
def test_split_refuses(held_out):
    with pytest.raises((ValueError, TypeError), match="held_out"):
        split(SOURCE, held_out)


# --- arrays --------------------------------------------------------------------------------------------------------------
RNG = np.random.default_rng(1)
GREY, COLOUR = RNG.integers(0, 256, (6, 5, 7)).astype(np.uint8), RNG.integers(0, 256, (6, 3, 5, 7)).astype(np.uint8)
TAKEN = {
    "N H W": (GREY, GREY[:, None]),
    "N 1 H W": (GREY[:, None], GREY[:, None]),
    "N C H W": (COLOUR, COLOUR),
    "N H W C": (np.moveaxis(COLOUR, 1, -1), COLOUR),
    "N H W 1": (GREY[..., None], GREY[:, None]),
    "int64": (COLOUR.astype(np.int64), COLOUR),
    "big-endian int16": (COLOUR.astype(">i2"), COLOUR),
    "Fortran order": (np.asfortranarray(COLOUR), COLOUR),
    "video": (COLOUR[:, :, None], COLOUR[:, :, None]),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("kind", ["array", "tensor", "file"])
def test_images_are_taken_as_they_stand(name, kind, tmp_path):
    given, wanted = TAKEN[name]
    if kind == "tensor" and given.dtype.byteorder == ">":
        return
    if kind == "file":
        np.save(tmp_path / "x.npy", given)
    source = load(
        {"array": given, "tensor": torch.from_numpy(given.copy()) if kind == "tensor" else None}.get(kind, tmp_path / "x.npy")
    )
    assert (source.dtype, source.shape, source.levels, len(source)) == (np.uint8, wanted.shape[1:], 256, 6)
    assert np.array_equal(source.x[np.array([4, 0, 4])], wanted[[4, 0, 4]])
    assert source.sha256 == load(wanted).sha256
    assert torch.equal(Batches(source, 6)(1), torch.from_numpy(wanted[permuted(np.arange(6), 6, 0, 0)].copy()))


def test_levels():
    assert load(COLOUR // 16, levels=16).levels == 16
    deep = load(COLOUR.astype(np.uint16) * 257, levels=65536)
    assert (deep.dtype, deep.levels) == (np.int32, 65536)
    assert int(Batches(deep, 6)(1).max()) == int(COLOUR.max()) * 257
    x = COLOUR // 16
    x[2, 0, 0, 0] = 16
    with pytest.raises(ValueError, match=r"sample 2 spans .*; wanted 0 .. 15: check levels"):
        load(x, levels=16)
    with pytest.raises(ValueError, match="at most 2\\^31"):
        load(COLOUR, levels=2**31 + 1)


def test_sha256_is_of_samples_shape_and_labels():
    one = load(COLOUR)
    assert one.sha256 == load(COLOUR.copy()).sha256
    other = COLOUR.copy()
    other[3, 2, 1, 0] ^= 1
    hashes = {one.sha256, load(other).sha256, load(COLOUR.reshape(6, 3, 7, 5)).sha256, load(COLOUR, labels=np.zeros(6, int)).sha256}
    hashes |= {load(COLOUR, labels=np.arange(6)).sha256, load(COLOUR.astype(np.float32)).sha256}
    assert len(hashes) == 6
    large = np.zeros((3 * PIECE // 2**20 + 1, 2**20), np.float32)  # more pieces than one
    assert load(large).sha256 == Source(Rows(large.shape, large.dtype, lambda i: large[i])).sha256


BAD = {
    "a list": ([[1.0]], TypeError, "wanted a tensor or array"),
    "None": (None, TypeError, "wanted a tensor or array"),
    "no samples": (np.zeros((0, 3, 4, 4), np.uint8), ValueError, "holds no samples"),
    "an empty sample": (np.zeros((4, 0), np.float32), ValueError, "holds no samples"),
    "no vectors": (np.zeros((0, 3), np.float32), ValueError, "holds no samples"),
    "numbers": (np.zeros(4, np.float32), ValueError, r"x\[:, None\]"),
    "integer vectors": (np.zeros((4, 2), np.int64), ValueError, "astype"),
    "a scalar": (torch.tensor(1.0), ValueError, r"x\[:, None\]"),
    "NaN": (np.array([[0.0], [1.0], [np.nan]]), ValueError, r"rows \[2\]"),
    "infinity": (torch.tensor([[0.0], [float("inf")]]), ValueError, r"rows \[1\]"),
    "objects": (np.array([[None, 1]]), TypeError, "float32 or float64"),
    "text": (np.array([["a"]]), TypeError, "float32 or float64"),
    "complex": (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "float32 or float64"),
    "bool": (torch.zeros(2, 2, 2, dtype=torch.bool), TypeError, "float32 or float64"),
    "half": (torch.zeros(2, 2, dtype=torch.half), TypeError, "astype"),
    "bfloat16": (torch.zeros(2, 2, dtype=torch.bfloat16), TypeError, "float32 or float64"),
    "sparse": (torch.eye(3).to_sparse(), TypeError, "dense"),
    "negative": (np.full((2, 3, 4, 4), -1), ValueError, "sample 0 spans -1 .. -1"),
    "too bright": (np.full((2, 3, 4, 4), 256), ValueError, "check levels"),
    "channels last of int64": (np.zeros((2, 5, 5, 3), np.int64), ValueError, "moveaxis"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", ["array", "file"])
def test_what_is_no_data_is_refused(name, kind, tmp_path):
    x, error, words = BAD[name]
    if kind == "file":
        if not isinstance(x, np.ndarray):
            return
        np.save(tmp_path / "x.npy", x, allow_pickle=True)
        x, words = tmp_path / "x.npy", words if name != "objects" else "cannot be read"
        error = ValueError if name == "objects" else error
    with pytest.raises(error, match=words):
        load(x)


LABELS = {
    "too few": ([0, 1], ValueError, r"wanted one a sample, \[6\]"),
    "two axes": (np.zeros((6, 1), int), ValueError, "one a sample"),
    "floats": (np.zeros(6), TypeError, "wanted integers"),
    "names": (list("abcdef"), TypeError, "np.unique"),
    "negative": ([0, 0, 0, 0, 0, -1], ValueError, "span -1 .. 0"),
    "huge": ([0, 0, 0, 0, 0, 2**31], ValueError, "span 0 .. 2147483648"),
    "no file": ("none.npy", ValueError, "cannot be read as labels"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_one_a_sample(name):
    labels, error, words = LABELS[name]
    with pytest.raises(error, match=words):
        load(COLOUR, labels=labels)


def test_labels_of_a_file(tmp_path):
    np.save(tmp_path / "x.npy", COLOUR)
    assert load(tmp_path / "x.npy").labels is None
    np.save(tmp_path / "x.labels.npy", np.array([2, 0, 1, 1, 0, 2], np.uint8))
    beside = load(str(tmp_path / "x.npy"))
    assert (beside.labels.tolist(), beside.labels.dtype, beside.classes) == ([2, 0, 1, 1, 0, 2], np.int64, 3)
    np.save(tmp_path / "y.npy", np.arange(6))
    assert load(tmp_path / "x.npy", labels=tmp_path / "y.npy").labels.tolist() == list(range(6))
    assert load(tmp_path / "x.npy", labels=str(tmp_path / "y.npy")).classes == 6
    np.save(tmp_path / "x.labels.npy", np.zeros(5, int))
    with pytest.raises(ValueError, match="one a sample"):
        load(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(labels=np.zeros(9, np.int64)), "one a sample"),
        (dict(labels=np.zeros(10, np.int32)), "int64"),
        (dict(labels=np.full(10, 7), classes=7), "wanted 0 .. 6"),
        (dict(x=np.zeros((10, 3), np.int64)), "scoresde.data.load"),
        (dict(x=np.zeros(10, np.float32)), "scoresde.data.load"),
    ],
)
def test_a_source_made_by_hand_is_checked(kwargs, words):
    with pytest.raises(ValueError, match=words):
        replace(Source(numbered(10)), **kwargs)


def test_a_mapped_file_is_not_read_whole(tmp_path):
    """Sparse files of 64 GB and more than memory holds: a batch costs a batch."""
    shape, path = (2**18, 1, 512, 512), tmp_path / "x.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        try:
            file.truncate(file.tell() + int(np.prod(shape)))
        except OSError as error:
            pytest.skip(f"no sparse files here ({error})")
    tracemalloc.start()
    batches = Batches(split(load(path), 1000)[0], 4, flip=True)
    assert int(batches(1).sum()) == int(batches(10**6).sum()) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20  # the split's 2^18 numbers and a few images


# --- files and folders ---------------------------------------------------------------------------------------------------
def write(folder, arrays, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(arrays):
        image = Image.fromarray(x if x.ndim == 2 else np.moveaxis(x, 0, -1))
        image.save(folder / (names[i] if names else f"{i:03d}.png"))


def test_a_flat_folder(tmp_path):
    write(tmp_path, COLOUR)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    source = load(tmp_path)
    assert (source.shape, source.dtype, source.levels, source.labels) == ((3, 5, 7), np.uint8, 256, None)
    assert np.array_equal(source.x[np.array([5, 1])], COLOUR[[5, 1]])
    assert source.sha256 == load(COLOUR).sha256
    assert load(str(tmp_path), labels=[0, 1] * 3).classes == 2
    with prefetched(Batches(source, 4, flip=True), workers=2) as batches:
        assert all(same(batches(s), Batches(load(COLOUR), 4, flip=True)(s)) for s in (1, 2, 3))


def test_grey_files_have_one_channel_unless_one_is_in_colour(tmp_path):
    write(tmp_path, GREY)
    assert load(tmp_path).shape == (1, 5, 7)
    assert np.array_equal(load(tmp_path).x[np.arange(6)], GREY[:, None])
    write(tmp_path, COLOUR[:1], ["z.png"])
    source = load(tmp_path)
    assert source.shape == (3, 5, 7)
    assert np.array_equal(source.x[np.array([2, 6])], np.stack([np.repeat(GREY[2][None], 3, 0), COLOUR[0]]))


def test_a_folder_a_class(tmp_path):
    for name, part in (("dog", COLOUR[:2]), ("cat", COLOUR[2:5]), ("eel", COLOUR[5:])):
        write(tmp_path / name, part)
    (tmp_path / ".git").mkdir()
    source = load(tmp_path)
    assert (source.labels.tolist(), source.classes) == ([0, 0, 0, 1, 1, 2], 3)
    assert np.array_equal(source.x[np.arange(6)], COLOUR[[2, 3, 4, 0, 1, 5]])
    with pytest.raises(ValueError, match="leave out labels"):
        load(tmp_path, labels=[0] * 6)
    (tmp_path / "fox").mkdir()
    with pytest.raises(ValueError, match="fox holds no image files"):
        load(tmp_path)
    (tmp_path / "fox").rmdir()
    write(tmp_path, COLOUR[:1])
    with pytest.raises(ValueError, match="one or the other"):
        load(tmp_path)


def test_parts_are_no_classes(tmp_path):
    for name in ("train", "Test"):
        write(tmp_path / name, COLOUR)
    with pytest.raises(ValueError, match="which are no classes"):
        load(tmp_path)
    assert len(load(tmp_path / "train")) == 6


def palette(path):
    image = Image.fromarray(GREY[0]).convert("P")
    image.save(path, transparency=int(GREY[0, 0, 0]))


HOSTILE = {
    "16 bits": (lambda p: Image.fromarray(GREY[0].astype(np.uint16) * 257).save(p), "is of (16 bits|I;16)"),
    "transparent": (lambda p: Image.fromarray(np.zeros((5, 7, 4), np.uint8)).save(p), "transparent in places"),
    "transparent palette": (palette, "transparent in places"),
    "another size": (lambda p: Image.fromarray(np.zeros((7, 5), np.uint8)).save(p), "wanted one size"),
    "frames": (
        lambda p: Image.fromarray(GREY[0]).save(p, save_all=True, append_images=[Image.fromarray(GREY[1])]),
        "is of 2 frames",
    ),
    "no image": (lambda p: p.write_bytes(b"not a picture"), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_do_not_fit_are_refused_before_work_starts(name, tmp_path):
    write(tmp_path, GREY)
    make, words = HOSTILE[name]
    make(tmp_path / "z.png")
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_opaque_alpha_is_taken(tmp_path):
    write(tmp_path, COLOUR)
    Image.fromarray(np.moveaxis(COLOUR[0], 0, -1)).convert("RGBA").save(tmp_path / "z.png")
    assert np.array_equal(load(tmp_path).x[np.array([6])], COLOUR[:1])


def test_a_file_cut_short_is_named_at_its_step(tmp_path):
    write(tmp_path, np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64)).astype(np.uint8))
    path = tmp_path / "002.png"
    path.write_bytes(path.read_bytes()[:2000])
    with prefetched(Batches(load(tmp_path), 1), workers=2) as batches:
        bad = permuted(np.arange(4), 4, 0, 0).tolist().index(2) + 1
        for step in range(1, 5):
            if step == bad:
                with pytest.raises(ValueError, match=r"002.png cannot be read"):
                    batches(step)
            else:
                batches(step)


def test_what_load_refuses(tmp_path):
    (tmp_path / "x.txt").write_text("no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY no")
    np.savez(tmp_path / "z.npz", COLOUR)
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    cases = [
        (dict(what=tmp_path / "none.npy"), FileNotFoundError, "does not exist"),
        (dict(what="minst"), FileNotFoundError, "one of digits, mnist"),
        (dict(what=tmp_path / "x.txt"), ValueError, "neither a .npy file nor a folder"),
        (dict(what=tmp_path / "empty"), ValueError, "holds no image files"),
        (dict(what=tmp_path / "x.npy"), ValueError, "cannot be read"),
        (dict(what=tmp_path / "z.npy"), TypeError, "wanted one array"),
        (dict(what=COLOUR, part="test"), ValueError, "part and folder"),
        (dict(what=tmp_path, folder=tmp_path), ValueError, "part and folder"),
        (dict(what="digits", labels=[1]), ValueError, "of its own"),
        (dict(what="digits", levels=17), ValueError, "of its own"),
        (dict(what="digits", part="test"), ValueError, "one part"),
        (dict(what=np.zeros((3, 2)), levels=4), ValueError, "levels are of integer images"),
    ]
    for kwargs, error, words in cases:
        with pytest.raises(error, match=words):
            load(**kwargs)
    write(tmp_path / "pictures", COLOUR)
    with pytest.raises(ValueError, match="which have 256"):
        load(tmp_path / "pictures", levels=16)


def test_a_name_is_the_set_and_a_path_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "digits", COLOUR)
    assert load("digits").shape == (1, 8, 8)
    assert load("./digits").shape == load(tmp_path / "digits").shape == (3, 5, 7)


def test_survey_and_picture_agree_with_the_reader_of_the_likelihood(tmp_path):
    write(tmp_path, COLOUR)
    read = images.load(tmp_path, (3, 5, 7))
    assert np.array_equal(read.read(0, 6), load(tmp_path).x[np.arange(6)])
    assert images.survey(images.files_of(tmp_path)) == (3, 5, 7)
