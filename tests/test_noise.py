"""scoresde.noise: the bits, the laws, and that nothing depends on batch mates, order, chunks or the machine."""

import math
import os
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from scoresde import noise as N
from scoresde import philox as P
from scoresde.noise import CORRECTOR, INITIAL, PROBE, STEP, brownian, entropy_seeds, gaussian, seeded

F64 = {"dtype": torch.float64}


def time(value):
    return torch.tensor(value, **F64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# A second implementation, in Python integers and the C library's functions.


def philox(counter, key):
    """Philox4x32-10, as figure 2 of Salmon et al. (2011) writes it."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = q >> 32 ^ x1 ^ k0, q & 0xFFFFFFFF, p >> 32 ^ x3 ^ k1, p & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return x0, x1, x2, x3


def word(seed, stream, index, j):
    low, high = (v & 0xFFFFFFFF for v in (index, index >> 32))
    return philox((j // 4, low, high, stream), (seed & 0xFFFFFFFF, seed >> 32))[j % 4]


def normal(seed, stream, index, j):
    """Element j of a draw: Box-Muller on words 2 (j // 2) and 2 (j // 2) + 1."""
    u, w = (word(seed, stream, index, j - j % 2 + i) for i in (0, 1))
    angle = ((w & 2**30 - 1) + 0.5 - 2**29) * math.pi / 2**31
    point = [math.cos(angle), math.sin(angle)]
    point = point[::-1] if w >> 30 & 1 else point
    return math.sqrt(-2 * math.log((u + 0.5) / 2**32)) * point[j % 2] * (-1 if w >> 31 else 1)


def path(seed, u, j, length=1.0):
    """W and its integral at the fraction u for element j, by the recursion over halves."""
    h, node, w_a, j_a = length, 1, 0.0, 0.0
    w, area = (c * normal(seed, 5, 0, 2 * j + i) for i, c in enumerate((math.sqrt(h), math.sqrt(h / 12))))
    for _ in range(32):
        z1, z2 = (normal(seed, 5, node, 2 * j + i) for i in (0, 1))
        d = 3 * area + math.sqrt(h) / 2 * z1
        s, t = 2 * area - d / 2, math.sqrt(h / 12) * z2
        (w1, w2), (h1, h2), h = ((w + d) / 2, (w - d) / 2), ((s + t) / 2, (s - t) / 2), h / 2
        if u >= 0.5:
            j_a, w_a = j_a + h * (w_a + w1 / 2 + h1), w_a + w1
        node, u, w, area = (2 * node, 2 * u, w1, h1) if u < 0.5 else (2 * node + 1, 2 * u - 1, w2, h2)
    return w_a + u * w + 6 * u * (1 - u) * area, j_a + h * u * (w_a + u * w / 2 + u * (3 - 2 * u) * area)


# The known-answer vectors of Random123 (kat_vectors, philox4x32 10). They pin the bits for ever.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
@pytest.mark.parametrize("rows", [1, 3])
def test_philox_gives_the_known_answers_of_random123(counter, key, words, rows):
    signed = [v - 2**64 * (v >= 2**63) for v in (key[0] | key[1] << 32, counter[1] | counter[2] << 32)]
    seeds, index = (torch.full((rows,), v, dtype=torch.int64) for v in signed)
    keys = torch.stack((seeds & P.WORD, seeds >> 32))[:, :, None] + P.WEYL
    a, b = P._rounds(keys, index, counter[3], torch.tensor([counter[0]]))
    assert philox(counter, key) == words
    assert all((int(a[0, i]), int(b[0, i]), int(a[1, i]), int(b[1, i])) == words for i in range(rows))


def test_philox_agrees_with_python_integers_for_any_seed_stream_and_index():
    seeds, index = [0, 1, 2**32, 2**63 - 1], [0, 2**32 - 1, 2**32, 2**40 + 17]
    words = N.philox(torch.tensor(seeds), torch.tensor(index), 7, 11)
    assert words.tolist() == [[word(s, 7, i, j) for j in range(11)] for s, i in zip(seeds, index, strict=True)]


# (seed, stream, how many draws before, element): the float64 normal. These pin the bits for ever: they may not change.
NORMALS = [
    (0, 0, 0, 0, "-0x1.81109b0e37c15p-5"),
    (0, 0, 0, 1, "-0x1.5acc01228b060p+0"),
    (0, 0, 0, 2, "-0x1.8e203457c6f1ap-1"),
    (0, 0, 0, 3, "0x1.88911d17228edp-4"),
    (0, 0, 0, 4, "-0x1.3af9bfef04eeap-6"),
    (0, 1, 0, 0, "0x1.c3f92b93d6bd2p+0"),
    (0, 1, 1, 0, "-0x1.5303a758159a3p-2"),
    (0, 1, 17, 5, "-0x1.ba5c0246ba794p-1"),
    (1, 1, 0, 0, "0x1.251eb0da1422cp+1"),
    (17, 2, 3, 1, "0x1.fa34fe4df81dep-2"),
    (4294967296, 1, 0, 0, "0x1.01d13fb8a1eb4p+0"),
    (9223372036854775808, 3, 2, 4, "-0x1.000f4dcdcfbfcp+0"),
    (18446744073709551615, 4, 0, 5, "-0x1.3f7224542752cp+0"),
    (123456789012345678, 6, 1, 2, "0x1.000b119e02fefp-3"),
]
# (seed, t, s) of element 1 on [0, 1]: float64 noise, dW, dZ. These pin the bits for ever: they may not change.
PATHS = [
    (0, 0.0, 1.0, ("0x1.9c59359a496bdp-6", "0x1.9c59359a496bdp-6", "0x1.95dc57374cb6fp-4")),
    (0, 0.5, 0.25, ("0x1.7163fca788e7ap-3", "0x1.7163fca788e7ap-4", "0x1.825b176948006p-8")),
    (0, 0.3, 0.7, ("-0x1.26479f8ffad38p-5", "-0x1.743cdd0904230p-6", "-0x1.682cb0ca9c059p-5")),
    (17, 0.7, 0.3, ("-0x1.5b80ca52156f3p-1", "-0x1.b78f7ce97acbcp-2", "-0x1.46c578d8c8b80p-5")),
    (18446744073709551615, 0.875, 1.0, ("0x1.88b74d0fa6580p-3", "0x1.15b1316efed48p-4", "0x1.3584a8d215578p-6")),
    (5, 0.3333333333333333, 0.3333343333333333, ("-0x1.9b076a5b70835p+0", "-0x1.a4e4c70579c00p-10", "-0x1.86d476bef9600p-31")),
    (5, 1.0, 0.0, ("0x1.7a9611fdfda39p-1", "0x1.7a9611fdfda39p-1", "0x1.12cd20da36c87p-2")),
]


def drawn(seed, stream, draw, n=6):
    source, x = seeded([seed]), torch.zeros(1, n, **F64)
    return [source.draw(x, stream) for _ in range(draw + 1)][-1][0]


@pytest.mark.parametrize(("seed", "stream", "draw", "element", "pinned"), NORMALS)
def test_seeded_draws_keep_their_bits_for_ever(seed, stream, draw, element, pinned):
    z = drawn(seed, stream, draw)[element].item()
    assert z.hex() == pinned
    assert z == pytest.approx(normal(seed, stream, draw, element), rel=4e-15)


@pytest.mark.parametrize(("seed", "t", "s", "pinned"), PATHS)
def test_brownian_paths_keep_their_bits_for_ever(seed, t, s, pinned):
    source, x = brownian([seed], 0, 1), torch.zeros(1, 3, **F64)
    dw, dz = source.pair(x, time(t), time(s))
    assert tuple(v[0, 1].item().hex() for v in (source(x, time(t), time(s)), dw, dz)) == pinned
    t, s = (round(u * 2**46) / 2**46 for u in (t, s))
    (w_t, j_t), (w_s, j_s) = path(seed, t, 1), path(seed, s, 1)
    assert dw[0, 1].item() == pytest.approx(w_s - w_t, abs=1e-13)
    assert dz[0, 1].item() == pytest.approx(math.copysign(1, s - t) * (j_s - j_t - w_t * (s - t)), abs=1e-13)


def test_uniform_and_signs_keep_their_bits_for_ever():  # pinned: they may not change
    u = seeded([3]).uniform(torch.zeros(1, 5, **F64), PROBE)[0]
    signs = seeded([3]).signs(torch.zeros(1, 70), PROBE)[0]
    assert u.tolist() == [(word(3, PROBE, 0, j) + 0.5) / 2**32 for j in range(5)]
    assert signs.tolist() == [1 - 2 * (word(3, PROBE, 0, j // 32) >> j % 32 & 1) for j in range(70)]
    assert [v.hex() for v in u.tolist()] == [
        "0x1.5c5facea00000p-2",
        "0x1.71a1c79900000p-1",
        "0x1.7c9bf78800000p-4",
        "0x1.29205ec200000p-2",
        "0x1.61556e1600000p-2",
    ]
    assert sum(int(s < 0) << j for j, s in enumerate(signs.tolist())) == 0x38B8D0E3CC5717EB3A


def test_the_bits_do_not_depend_on_vector_width_or_threads():
    """The same numbers without AVX and with two threads: in a process of its own, where that can be chosen."""
    code = (
        "import torch; torch.set_num_threads(2); from scoresde.noise import seeded, brownian;"
        "x, y = torch.zeros(9, 8000, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64);"  # threads share 32768 and more
        "z, w = seeded(range(9)).draw(x, 1), brownian(range(5), 0, 1)(y, torch.tensor(0.3), torch.tensor(0.7));"
        "digest = [v.view(torch.int64).remainder(1000003).sum().item() for v in (z, w)]"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code + "\nprint(torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), *digest)"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    here: dict = {}
    exec(code.replace("set_num_threads(2)", "get_num_threads()"), here)  # noqa: S102
    assert run.stdout.split() == ["2", "DEFAULT", *map(str, here["digest"])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bits_do_not_depend_on_the_device():
    x, rows = torch.zeros(6, 3, 50), torch.linspace(0.2, 0.9, 6, **F64)[:, None, None]
    for make in MAKERS.values():
        for dtype in (torch.float32, torch.float64):
            here, there = everything(make(range(6)), x.to(dtype)), everything(make(range(6)), x.to("cuda", dtype))
            assert torch.equal(here, there.cpu())
        here, there = make(range(6)).pair(x, rows, time(0.5)), make(range(6)).pair(x.cuda(), rows.cuda(), time(0.5).cuda())
        assert all(torch.equal(v, w.cpu()) for v, w in zip(here, there, strict=True))


@pytest.mark.parametrize("chunk", [3, 64, 2**20])
@pytest.mark.parametrize("shape", [(5, 33), (33, 5), (1, 100), (100, 1)])
def test_the_bits_do_not_depend_on_the_chunk(monkeypatch, chunk, shape):
    x, t, s = torch.zeros(shape), time(0.1), time(0.625)

    def draws():
        a, b = seeded(range(shape[0])), brownian(range(shape[0]), 0, 1)
        return [a(x, t, s) for _ in range(3)] + [a.uniform(x, PROBE), a.signs(x, PROBE), b(x, t, s)]

    wanted = draws()
    monkeypatch.setattr(P, "CHUNK", chunk)
    assert all(torch.equal(v, w) for v, w in zip(draws(), wanted, strict=True))


def test_the_first_elements_do_not_depend_on_the_size():
    t, s = time(0.3), time(0.8)
    for n in range(10):
        x, large = torch.zeros(3, n), torch.zeros(3, 2, 5)
        for make in (lambda: seeded([4, 5, 6]), lambda: brownian([4, 5, 6], 0, 1)):
            for f in ("draw", "uniform", "signs"):
                assert torch.equal(getattr(make(), f)(x, PROBE), getattr(make(), f)(large, PROBE).flatten(1)[:, :n])
            assert torch.equal(make()(x, t, s), make()(large, t, s).flatten(1)[:, :n])
            assert torch.equal(make().pair(x, t, s)[1], make().pair(large, t, s)[1].flatten(1)[:, :n])


def everything(source, x):
    """One of each draw, in an order that mixes the streams."""
    t, s, late = time(0.9), time(0.35), time(0.2)
    return torch.stack(
        [
            source(x, t, s),
            source.draw(x, CORRECTOR),
            *source.pair(x, s, late),
            source.signs(x, PROBE),
            source.uniform(x, CORRECTOR),
            source(x, late, t),
            source.draw(x, CORRECTOR),
            source.initial(x.shape, x.dtype, x.device),
        ]
    )


MAKERS = {"seeded": seeded, "brownian": lambda seeds: brownian(seeds, 0.1, 1)}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "index",
    [slice(0, 3), slice(2, None), slice(None, None, 2), [3], [5, 0, 2], [], torch.tensor([4, 4, 1]), torch.arange(6) % 2 == 0],
    ids=str,
)
def test_a_row_depends_on_its_seed_alone(make, index):
    seeds, x = torch.tensor([11, 0, 2**40, 5, 7, 2**62]), torch.zeros(6, 2, 3)
    whole, source = make(seeds), make(seeds)
    rows = index if isinstance(index, (slice, torch.Tensor)) else torch.tensor(index, dtype=torch.long)
    first = everything(whole, x)
    assert torch.equal(everything(make(seeds[rows]), x[rows]), first[:, rows])
    everything(source, x)
    assert torch.equal(everything(source.select(index), x[rows]), everything(whole, x)[:, rows])  # the counters go on
    assert torch.equal(
        everything(source.select(index).select(slice(1)), x[rows][:1]), everything(make(seeds), x)[:, rows][:, :1]
    ) is (len(x[rows]) == 0)


def test_seeds_are_64_bits_and_every_bit_counts():
    x = torch.zeros(1, 8)
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1]
    draws = torch.cat([seeded([s]).draw(x, STEP) for s in seeds])
    assert len(draws.unique(dim=0)) == len(seeds)
    assert torch.equal(seeded(seeds).draw(x.expand(8, 8), STEP), draws)
    assert torch.equal(seeded(np.array([0, 2**32])).draw(x.expand(2, 8), STEP), draws[[0, 3]])


def test_draws_made_ahead_are_the_draws_of_their_number():
    """Small draws are made several at once; what comes between, other shapes and dtypes included, changes none."""
    x, source = torch.zeros(2, 3), seeded([1, 2])
    got = [source.draw(x, STEP) for _ in range(40)]
    for k, z in enumerate(got):
        assert z[1, 2].item() == pytest.approx(normal(2, STEP, k, 2), rel=1e-6)
    again, wide = seeded([1, 2]), torch.zeros(2, 4, **F64)
    mixed = [again.draw(wide if k % 3 else x, STEP) for k in range(40)]
    assert all(torch.equal(m[:, :3].float(), g) for m, g in zip(mixed, got, strict=True))
    got[5].zero_()  # a draw is the caller's own
    assert got[6].abs().min() > 0


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_float32_draws_are_the_float64_ones_rounded(make):
    x = torch.zeros(3, 7)
    single, double = everything(make([1, 2, 3]), x), everything(make([1, 2, 3]), x.double())
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert torch.equal(single, double.float())


@pytest.mark.parametrize(
    "source", [gaussian(generator()), seeded(range(4)), brownian(range(4), 0.1, 1)], ids=["gaussian", "seeded", "brownian"]
)
@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, 3), torch.zeros(4, 3, 2, 2, **F64).to(memory_format=torch.channels_last)],
    ids=["vectors", "channels last"],
)
def test_draws_are_like_x(source, x):
    out = everything(source, x.clone().requires_grad_())
    assert out.dtype == x.dtype
    assert out.shape[1:] == x.shape
    assert not out.requires_grad
    assert out.isfinite().all()


def test_the_initial_draw_is_in_float64_and_fresh_each_time():
    for make in (lambda: gaussian(generator()), lambda: seeded(range(3)), lambda: brownian(range(3), 0, 1)):
        single, double = make().initial((3, 4), torch.float32), make().initial(torch.Size([3, 4]), torch.float64)
        assert single.dtype == torch.float32
        assert torch.equal(single, double.float())
        source = make()
        assert not torch.equal(source.initial((3, 4), torch.float64), source.initial((3, 4), torch.float64))
    assert torch.equal(seeded([7]).initial((1, 4), torch.float64), brownian([7], 0, 1).initial((1, 4), torch.float64))
    assert seeded([7]).initial((1, 4), torch.float64)[0, 3].item() == pytest.approx(normal(7, INITIAL, 0, 3), rel=4e-15)


def test_an_empty_batch_is_fine():
    for source in (gaussian(generator()), seeded([]), brownian([], 0.1, 1), seeded([1, 2]).select([])):
        assert everything(source, torch.zeros(0, 3)).shape == (9, 0, 3)
        assert everything(source, torch.zeros(0, 3)).shape == (9, 0, 3)


# Laws.


def ulps(got, wanted):
    return ((got - wanted).abs() / torch.from_numpy(np.spacing(wanted.abs().numpy()))).max().item()


def test_log_cos_and_sin_are_right_to_double_precision():
    words = torch.randint(0, 2**32, (200_000,), generator=generator())
    words[:6] = torch.tensor([0, 1, 2**32 - 1, 2**32 - 2, 2**30, 2**31])
    u = P.unit(words)
    assert ulps(P._minus_two_log(u), -2 * u.log()) <= 4
    angle = ((words & 2**30 - 1).double() - (2**29 - 0.5)) * (math.pi * 2.0**-31)
    swap, sign = words >> 30 & 1 == 1, 1 - 2 * (words >> 31)
    cos, sin = P._cos_sin(words)
    assert ulps(cos, sign * torch.where(swap, angle.sin(), angle.cos())) <= 4
    assert ulps(sin, sign * torch.where(swap, angle.cos(), angle.sin())) <= 4


@pytest.fixture(scope="module")
def normals():
    """2^21 normals: 32 seeds, 2 draws, 32768 elements."""
    source, x = seeded(range(1000, 1032)), torch.zeros(32, 32768, **F64)
    return torch.stack([source.draw(x, STEP) for _ in range(2)], 1)


def test_seeded_normals_are_normal(normals):
    z = normals.flatten()
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}  # E z^k and its variance
    for k, (mean, variance) in moments.items():
        assert abs((z**k).mean().item() - mean) < 5 * math.sqrt(variance / len(z)), k
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6
    assert 4.8 < z.abs().max() < 6.8  # 2^21 draws; the largest a 32-bit radius can give is 6.77


def test_elements_draws_and_seeds_are_independent(normals):
    rows = normals.flatten(0, 1)  # seeds and draws
    quads = normals.reshape(-1, 4).T  # the words of a block: cos and sin of one radius, then of the next
    other = torch.stack([seeded([1000]).draw(torch.zeros(1, 32768, **F64), k)[0] for k in (0, 2, 3, 4, 6)])
    for z in (rows, quads, torch.cat([rows[:1], other])):
        for f in (z, z**2 - 1):
            correlation = torch.corrcoef(f) - torch.eye(len(f), **F64)
            assert correlation.abs().max() < 5 / math.sqrt(f.shape[1])
    lagged = (rows[:, 1:] * rows[:, :-1]).mean()
    assert abs(lagged) < 5 / math.sqrt(rows.numel())


@pytest.mark.parametrize("make", [lambda: gaussian(generator()), lambda: seeded(range(64))], ids=["gaussian", "seeded"])
def test_uniform_and_signs_have_their_laws(make):
    x = torch.zeros(64, 16384)
    u, signs = make().uniform(x, PROBE), make().signs(x, PROBE)
    assert stats.kstest(u.flatten()[: 2**19].double().numpy(), "uniform").pvalue > 1e-6
    assert signs.abs().eq(1).all()
    assert abs(signs.mean()) < 5 / 1024
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 5 / 1023
    assert torch.corrcoef(signs).sub(torch.eye(64)).abs().max() < 5 / 128


def test_uniform_never_reaches_its_ends():
    for dtype in (torch.float32, torch.float64):
        u = N._inside(torch.tensor([0.0, 2.0**-33, 1 - 2.0**-33, 1.0], dtype=dtype))
        assert 0 < u.min() < u.max() < 1


SOURCES = {
    "gaussian": lambda b: gaussian(generator()),
    "seeded": lambda b: seeded(range(b)),
    "brownian": lambda b: brownian(range(b), 0.2, 2),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("t", "s"), [(0.5, 1.7), (1.7, 0.5), (0.2, 2.0), (1.3, 1.3004), ("rows", "rows")])
def test_pair_is_the_increment_and_its_integral(make, t, s):
    """Var dW = h, Cov = h^2 / 2, Var dZ = h^3 / 3, upwards and downwards."""
    x = torch.zeros(400, 300)
    if t == "rows":
        t, s = torch.linspace(0.2, 1.0, 400, **F64)[:, None], torch.linspace(1.9, 1.1, 400, **F64)[:, None]
    else:
        t, s = time(t), time(s)
    h = (s - t).abs()
    dw, dz = make(400).pair(x, t, s)
    assert dw.dtype == dz.dtype == torch.float32
    a, b = dw / h.sqrt(), dz / h**1.5
    bound = 5 * math.sqrt(2 / x.numel())
    for product, wanted in ((a * a, 1), (a * b, 1 / 2), (b * b, 1 / 3)):
        assert abs(product.mean() - wanted) < bound * max(wanted, 0.5)
    assert max(abs(a.mean()), abs(b.mean())) < bound
    assert stats.kstest(a.flatten().numpy(), "norm").pvalue > 1e-6
    assert stats.kstest(b.flatten().numpy() * math.sqrt(3), "norm").pvalue > 1e-6


# The Brownian path.

GRID = [0.2, 0.31, 0.5, 0.875, 1.1, 1.1000001, 1.3, 1.55, 1.999, 2.0]


def brown(b=6, **k):
    return brownian(range(b), 0.2, 2, **k), torch.zeros(b, 5, **F64)


def increments(source, x, times):
    return [source.pair(x, time(t), time(s)) for t, s in pairwise(times)]


@pytest.mark.parametrize("times", [GRID, GRID[::-1]])
def test_nested_increments_and_integrals_add_up(times):
    source, x = brown()
    parts = increments(source, x, times)
    dw, dz = source.pair(x, time(times[0]), time(times[-1]))
    assert (sum(w for w, _ in parts) - dw).abs().max() < 1e-12
    rest = sum(z + w * abs(times[-1] - s) for (w, z), s in zip(parts, times[1:], strict=True))
    assert (rest - dz).abs().max() < 1e-12
    for (w, _), (t, s) in zip(parts, pairwise(times), strict=True):
        assert (source(x, time(t), time(s)) * math.sqrt(abs(s - t)) - w).abs().max() < 1e-12


def test_the_path_does_not_depend_on_the_order_of_queries():
    x = torch.zeros(6, 5, **F64)
    queries = [(t, s) for t in GRID for s in GRID if t != s]
    wanted = {q: brown()[0].pair(x, *map(time, q)) for q in queries}  # each from a fresh tree, with no cache
    source, _ = brown()
    for q in sorted(queries, key=str) + sorted(queries, key=lambda q: math.sin(1e3 * q[0] + q[1])):
        assert all(torch.equal(v, w) for v, w in zip(source.pair(x, *map(time, q)), wanted[q], strict=True))
    assert len(source._path) <= N.REUSED
    assert len(source._known) <= 2


def test_rows_with_their_own_times_get_what_they_would_get_alone():
    """Ends of the path, dyadic and other times mixed in one batch; one scalar time beside a time a row."""
    source, x = brown(len(GRID))
    t, s = time(GRID)[:, None], time(GRID[3:] + GRID[:3])[:, None]
    for f in (lambda n, *a: (n(*a),), lambda n, *a: n.pair(*a)):
        rows, one = f(source, x, t, s), f(source, x, time(1.25), s)
        for i in range(len(GRID)):
            alone = source.select([i])
            for v, w in zip(rows, f(alone, x[:1], t[i, 0], s[i, 0]), strict=True):
                assert torch.equal(v[i], w[0])
            for v, w in zip(one, f(alone, x[:1], time(1.25), s[i, 0]), strict=True):
                assert torch.equal(v[i], w[0])
    same = torch.full((len(GRID), 1), 0.7, **F64)
    assert torch.equal(source(x, same, same + 0.3), source(x, time(0.7), same[0, 0] + 0.3))


def test_times_that_differ_by_rounding_are_one_time():
    source, x = brownian([1], 0, 1), torch.zeros(1, 3, **F64)
    assert torch.equal(source(x, time(0.1 + 0.2), time(1.0)), source(x, time(0.3), time(1.0)))
    assert source(x, time(-1e-13), time(1 + 1e-13)).isfinite().all()


def test_the_path_is_brownian():
    """Cov(W_s, W_t) = min(s, t) - t_min at dyadic and other times, and normal increments on scales down to 1e-7."""
    source, x = brownian(range(500), 0.2, 2), torch.zeros(500, 200, **F64)
    start = time(0.2)
    w = torch.stack([source(x, start, time(t)) * math.sqrt(t - 0.2) for t in GRID[1:]]).flatten(1)
    at = torch.tensor(GRID[1:], **F64) - 0.2
    wanted = torch.minimum(at[:, None], at)
    error = (w @ w.T / w.shape[1] - wanted) / (at[:, None] * at + wanted**2).sqrt()
    assert error.abs().max() < 5 / math.sqrt(w.shape[1])
    unit = w.diff(dim=0) / at.diff().sqrt()[:, None]
    assert torch.corrcoef(unit).sub(torch.eye(len(unit), **F64)).abs().max() < 5 / math.sqrt(w.shape[1])
    for z in (*unit, w[0] / at[0].sqrt()):
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6


def test_both_halves_of_a_node_have_the_law_of_the_whole():
    """W and H of the two halves: independent, Var W = h / 2, Var H = h / 24."""
    source, x = brownian(range(500), 0, 1), torch.zeros(500, 400, **F64)
    halves = [v.flatten() for t in (0.0, 0.5) for v in source.pair(x, time(t), time(t + 0.5))]
    laws = torch.stack([halves[0], halves[1] * 2 - halves[0] / 2, halves[2], halves[3] * 2 - halves[2] / 2])
    covariance, std = laws @ laws.T / laws.shape[1], torch.tensor([1 / 2, 1 / 24, 1 / 2, 1 / 24], **F64).sqrt()
    error = covariance / std / std[:, None] - torch.eye(4, **F64)
    assert error.abs().max() < 5 * math.sqrt(2 / laws.shape[1])


# What is left alone, and what is refused.


def test_no_global_generator_is_read_or_moved():
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    x, results = torch.zeros(3, 4), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        makers = (lambda: gaussian(generator()), lambda: seeded(range(3)), lambda: brownian(range(3), 0, 1))
        results.append(torch.stack([everything(make(), x) for make in makers]))
        entropy_seeds(3)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*results)
    torch.set_rng_state(before[0])
    assert before[1:] == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002


def test_gaussian_draws_from_its_generator_alone():
    x = torch.zeros(4, 3)
    g = generator(5)
    source = gaussian(g)
    assert source.select([0, 1]) is source
    assert torch.equal(source(x, time(0.1), time(0.2)), torch.randn(4, 3, generator=generator(5)))
    assert source(x[:2], time(0.1), time(0.2)).shape == (2, 3)


def test_entropy_seeds_are_consecutive_and_fresh():
    seeds = entropy_seeds(5)
    assert [s - seeds[0] for s in seeds] == list(range(5))
    assert entropy_seeds(5) != seeds
    assert entropy_seeds(0) == []
    assert seeded(seeds).draw(torch.zeros(5, 2), STEP).shape == (5, 2)


X = torch.zeros(3, 2)
REFUSED = [
    (lambda: gaussian(None), TypeError, r"generator is NoneType; wanted a torch.Generator: torch.Generator\(\)"),
    (lambda: gaussian(0), TypeError, "generator is int"),
    (lambda: seeded(17), TypeError, r"seeds is 17 \(int\); wanted one seed a row: range\(B\), or \[17\]"),
    (lambda: seeded(None), TypeError, r"seeds is None"),
    (lambda: seeded("12"), TypeError, r"seeds is '12' \(str\)"),
    (lambda: seeded([0, -1]), ValueError, r"seeds\[1\] is -1; wanted an integer in \[0, 2\^64\)"),
    (lambda: seeded([2**64]), ValueError, r"seeds\[0\] is 18446744073709551616; wanted"),
    (lambda: seeded([1.0]), TypeError, r"seeds\[0\] is 1.0 \(float\); wanted an integer"),
    (lambda: seeded([0, True]), TypeError, r"seeds\[1\] is True \(bool\)"),
    (lambda: seeded(torch.zeros(3)), TypeError, r"seeds is \[3\] float32; wanted integers, one a row"),
    (lambda: seeded(torch.zeros(3, dtype=torch.bool)), TypeError, r"seeds is \[3\] bool"),
    (lambda: seeded(torch.tensor(3)), TypeError, r"seeds is \[\] int64"),
    (lambda: seeded(torch.tensor([-3])), ValueError, r"seeds\[0\] is -3"),
    (lambda: seeded([1, 2])(X, time(0.1), time(0.2)), ValueError, "seeds has 2 entries for 3 rows"),
    (lambda: seeded([1, 2]).signs(X, PROBE), ValueError, "seeds has 2 entries for 3 rows"),
    (lambda: seeded([1, 2]).initial((3, 2), torch.float32), ValueError, "seeds has 2 entries for 3 rows"),
    (lambda: seeded([1]).initial((1, 2), torch.float16), TypeError, "float16.*wanted the whole shape"),
    (lambda: seeded([1]).initial(3, torch.float32), TypeError, r"initial\(3, .*wanted the whole shape \(B, \*shape\)"),
    (lambda: seeded([1]).initial((1,), torch.float32), ValueError, "at least one event dimension"),
    (lambda: seeded([1]).initial((1, 2.0), torch.float32), TypeError, "a size in shape is 2.0"),
    (lambda: seeded(range(3)).draw(X, -1), ValueError, "stream is -1"),
    (lambda: seeded(range(3)).draw(X, 1.0), TypeError, "stream is 1.0"),
    (lambda: seeded(range(3)).draw(X, 2**32), ValueError, r"stream is 4294967296; wanted one in \[0, 2\^32\)"),
    (lambda: seeded(range(3)).draw(X, N.BROWNIAN), ValueError, "other than 5, the Brownian path's own"),
    (lambda: gaussian(generator()).draw(X, N.BROWNIAN), ValueError, "stream is 5"),
    (lambda: seeded(range(3)).draw(X.half(), STEP), TypeError, "x is .* float16"),
    (lambda: seeded(range(3)).uniform(X.numpy(), STEP), TypeError, "x is ndarray"),
    (lambda: seeded(range(3))(X, 0.1, time(0.2)), TypeError, "t is float; wanted a tensor"),
    (lambda: seeded(range(3))(X, time(0.1), time([0.2])), ValueError, r"s is \[1\] float64; wanted \(\) or \[3, 1\]"),
    (lambda: gaussian(generator()).pair(X, torch.tensor(1), time(0.2)), TypeError, "t is .* int64; times are continuous"),
    (lambda: seeded(range(3)).select(1), TypeError, r"index is \[\] int64; wanted rows of the batch: a slice, \[3\]"),
    (lambda: seeded(range(3)).select([3]), IndexError, "out of"),
    (lambda: brownian(range(3), 1, 0), ValueError, "t_min is 1 and t_max 0; wanted t_min < t_max"),
    (lambda: brownian(range(3), 0, 0), ValueError, "wanted t_min < t_max"),
    (lambda: brownian(range(3), 0, math.inf), ValueError, "t_max is inf"),
    (lambda: brownian(range(3), "0", 1), TypeError, "t_min is str"),
    (lambda: brownian(3, 0, 1), TypeError, "seeds is 3"),
    (lambda: brownian(range(2), 0, 1)(X, time(0.1), time(0.2)), ValueError, "seeds has 2 entries for 3 rows"),
    (lambda: brownian(range(3), 0, 1)(X, time(0.5), time(0.5)), ValueError, r"t = s in 1 of 1 .*a corrector uses draw\(\)"),
    (lambda: brownian(range(3), 0, 1).pair(X, time([[0.5], [0.1], [0.2]]), time(0.5)), ValueError, "t = s in 1 of 3 intervals"),
    (lambda: brownian(range(3), 0, 1)(X, time(0.5), time(1.1)), ValueError, r"time 1.1 is outside the path's \[0.0, 1.0\]"),
    (lambda: brownian(range(3), 0, 1)(X, time(-1e-9), time(1.0)), ValueError, "time -1e-09 is outside"),
    (lambda: brownian(range(3), 0, 1)(X, time(0.5), time(math.nan)), ValueError, "time nan is outside"),
    (lambda: entropy_seeds(-1), ValueError, "n is -1"),
    (lambda: entropy_seeds(2.0), TypeError, "n is 2.0"),
]  # fmt: skip


def test_rows_that_were_at_a_time_before_are_remembered_to_the_bit():
    """Some rows go on, some go back, some are chosen: each increment is that of a path that remembers nothing."""
    rows, low, high = 8, 0.25, 2.0
    x, path = torch.zeros(rows, 3, dtype=torch.float64), brownian(range(rows), low, high)
    here = torch.full((rows, 1), high, dtype=torch.float64)
    index = torch.arange(rows)
    for k in range(6):
        there = here - 0.03 * (1 + torch.rand(here.shape, dtype=torch.float64, generator=generator()))
        for call in (lambda p: p(x[: len(here)], here, there), lambda p: torch.cat(p.pair(x[: len(here)], here, there))):
            assert torch.equal(call(path), call(brownian(index.tolist(), low, high)))
        here = torch.where(torch.arange(len(here))[:, None] % 3 == k % 3, here, there)  # a third of them tries again
        if k in (2, 4):
            chosen = torch.tensor([0, 2, 2, 5] if k == 2 else [3, 1])
            path, here, index = path.select(chosen), here[chosen], index[chosen]


@pytest.mark.parametrize(("call", "error", "match"), REFUSED, ids=[m[:30] for _, _, m in REFUSED])
def test_bad_input_is_refused_with_the_mend(call, error, match):
    with pytest.raises(error, match=match):
        call()
