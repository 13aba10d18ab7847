"""The metrics against closed forms, scipy, and laws; streaming statistics; feature extractors; what is refused."""

import copy
import hashlib
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import nn

import scoresde.metrics
from scoresde.metrics import (
    Features,
    Gaussian,
    ModuleFeatures,
    Statistics,
    Terms,
    classifier,
    fid,
    frechet_distance,
    frechet_terms,
    from_npz,
    gaussian_wasserstein,
    sliced_wasserstein,
    to_npz,
    train_classifier,
)
from scoresde.metrics.wasserstein import _directions


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def covariance(dim, rank, seed=0):
    a = normal(dim, rank, seed=seed)
    return a @ a.T / rank


def test_every_exported_metric_is_named_in_this_file():
    assert set(scoresde.metrics.__all__) <= set(globals())


# ---- Fréchet -------------------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians_is_the_sum_over_axes():
    m1, m2 = normal(7, seed=1), normal(7, seed=2)
    s1, s2 = normal(7, seed=3).abs(), normal(7, seed=4).abs()
    wanted = float(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum())
    assert frechet_distance(m1, torch.diag(s1**2), m2, torch.diag(s2**2)) == pytest.approx(wanted, rel=1e-13)
    assert gaussian_wasserstein(m1, torch.diag(s1**2), m2, torch.diag(s2**2)) == pytest.approx(math.sqrt(wanted), rel=1e-13)


def test_a_frechet_distance_is_its_terms():
    a, b = normal(40, 6, seed=1), 2 * normal(50, 6, seed=2) + 1
    x, y = Statistics().update(a), Statistics().update(b)
    found = frechet_terms(x.mean, x.cov, y.mean, y.cov)
    assert isinstance(found, Terms)
    assert found.distance == frechet_distance(x.mean, x.cov, y.mean, y.cov) == fid(a, b)
    assert found.distance == pytest.approx(found.mean + found.trace1 + found.trace2 - 2 * found.cross, rel=1e-14)
    assert found.trace2 == pytest.approx(float(y.cov.trace()), rel=1e-14)
    root = scipy.linalg.sqrtm(x.cov.numpy())
    assert found.cross == pytest.approx(float(np.trace(scipy.linalg.sqrtm(root @ y.cov.numpy() @ root)).real), rel=1e-12)


def test_statistics_in_a_file(tmp_path):
    x = Statistics().update(normal(40, 6))
    (tmp_path / "x.npz").write_bytes(to_npz(x, features="pixels"))
    found = from_npz(tmp_path / "x.npz")
    assert isinstance(found, Gaussian)
    assert (found.n, found.facts) == (40, {"features": "pixels"})
    assert torch.equal(found.mean, x.mean)
    assert torch.equal(found.cov, x.cov)
    assert to_npz(x, features="pixels") == to_npz(x, features="pixels")  # no clock in it
    with pytest.raises(FileNotFoundError):
        from_npz(tmp_path / "none.npz")


def test_frechet_of_commuting_covariances_is_the_distance_of_their_roots():
    # C1 C2 = C2 C1: tr(C1 + C2 - 2 C1^{1/2} C2^{1/2}) = |C1^{1/2} - C2^{1/2}|_F^2
    basis = torch.linalg.qr(normal(9, 9, seed=1)).Q
    r1, r2 = (basis @ torch.diag(normal(9, seed=s).abs()) @ basis.T for s in (2, 3))
    zero = torch.zeros(9)
    wanted = float((r1 - r2).square().sum())
    assert frechet_distance(zero, r1 @ r1, zero, r2 @ r2) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
def test_frechet_agrees_with_scipy_sqrtm(dim):
    m1, m2 = normal(dim, seed=1), normal(dim, seed=2)
    c1, c2 = covariance(dim, dim + 3, seed=3), covariance(dim, dim + 3, seed=4)
    root = scipy.linalg.sqrtm(c1.numpy() @ c2.numpy()).real
    wanted = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(m1.numpy(), c1.numpy(), m2.numpy(), c2.numpy()) == frechet_distance(m1, c1, m2, c2)


def test_frechet_of_two_rank_one_covariances_is_closed():
    # C = a a^T: the cross term is |a . b|, which sqrtm gets wrong to 1e-8.
    a, b = normal(30, seed=1), normal(30, seed=2)
    wanted = float(a @ a + b @ b - 2 * (a @ b).abs())
    got = frechet_distance(torch.zeros(30), torch.outer(a, a), torch.zeros(30), torch.outer(b, b))
    assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("rank", [64, 40, 1, 0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_frechet_self_distance_is_zero_at_any_rank(rank, scale):
    c = scale * covariance(64, rank, seed=5) if rank else torch.zeros(64, 64)
    m = normal(64, seed=6)
    assert 0 <= frechet_distance(m, c, m, c) <= 1e-6 * min(scale, 1)


def test_frechet_is_symmetric_and_moves_with_a_common_rotation_and_shift():
    m1, m2, shift = (normal(6, seed=s) for s in (1, 2, 3))
    c1, c2 = covariance(6, 9, seed=4), covariance(6, 3, seed=5)
    q = torch.linalg.qr(normal(6, 6, seed=6)).Q
    d = frechet_distance(m1, c1, m2, c2)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(d, rel=1e-12)
    moved = frechet_distance(q @ m1 + shift, q @ c1 @ q.T, q @ m2 + shift, q @ c2 @ q.T)
    assert moved == pytest.approx(d, rel=1e-12)


def test_fid_is_the_frechet_distance_of_numpys_moments():
    x, y = normal(50, 6, seed=1), 1.5 * normal(80, 6, seed=2) + 1
    moments = [f(z.numpy()) for z in (x, y) for f in (lambda a: a.mean(0), lambda a: np.cov(a, rowvar=False))]
    assert fid(x, y) == pytest.approx(frechet_distance(*moments), rel=1e-12)
    assert fid(x, x) <= 1e-6
    assert fid(x, x + 2) == pytest.approx(24, rel=1e-9)
    # Fewer samples than dimensions: singular on both sides.
    assert fid(normal(10, 40), normal(10, 40)) <= 1e-6


# ---- Statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_streaming_statistics_equal_numpys_whatever_the_offset(offset):
    x = normal(101, 5, seed=1) @ normal(5, 5, seed=2) + offset
    streamed = Statistics()
    for rows in x.split(17):
        assert streamed.update(rows) is streamed
    # The oracle subtracts the offset first: at 1e8 numpy's own mean has lost digits.
    wanted = np.cov((x - offset).numpy(), rowvar=False)
    assert streamed.n == 101
    np.testing.assert_allclose(streamed.cov.numpy(), wanted, rtol=0, atol=1e-12 + 1e-16 * offset)
    np.testing.assert_allclose((streamed.mean - offset).numpy(), (x - offset).mean(0).numpy(), atol=1e-13 + 1e-15 * offset)
    assert streamed.mean.dtype == streamed.cov.dtype == torch.float64


def test_merged_statistics_equal_those_of_all_rows_in_any_order():
    x = normal(60, 4, seed=3) + torch.tensor([0.0, 10.0, -1e4, 3.0], dtype=torch.float64)
    whole = Statistics().update(x)
    parts = [Statistics().update(rows) for rows in (x[:1], x[1:20], x[20:])]
    kept = copy.deepcopy(parts)
    for order in ([0, 1, 2], [2, 0, 1]):
        total = Statistics()
        for i in order:
            total.merge(parts[i])
        total.merge(Statistics())
        assert total.n == 60
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-14, atol=1e-12)
        torch.testing.assert_close(total.cov, whole.cov, rtol=0, atol=1e-11)
    for part, before in zip(parts, kept, strict=True):  # merging leaves the other as it was
        assert part.n == before.n
        assert torch.equal(part.mean, before.mean)
        assert torch.equal(part.scatter, before.scatter)


def test_statistics_accumulate_float32_features_in_float64():
    x = normal(1000, 3, seed=4, dtype=torch.float32) + 4096
    got = Statistics().update(x[:500]).update(x[500:]).cov
    torch.testing.assert_close(got, torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)), rtol=0, atol=1e-11)


# ---- Wasserstein ---------------------------------------------------------------------------------------------------


def test_sliced_distance_of_equal_sets_is_zero_in_any_order():
    x = normal(40, 6, seed=1)
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x, x.flip(0)) <= 1e-12
    # Every point twice is the same distribution: sizes 40 and 80.
    assert sliced_wasserstein(x, x.repeat(2, 1)) <= 1e-12


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_translation_moves_every_projection_by_the_same_law(p):
    x, shift = normal(30, 5, seed=1), normal(5, seed=2)
    u = _directions(5, 200, seed=9)
    wanted = float((shift @ u).abs().pow(p).mean() ** (1 / p))
    assert sliced_wasserstein(x, x + shift, 200, 9, p) == pytest.approx(wanted, rel=1e-12)


def test_translation_by_s_costs_its_length_over_root_d():
    # E (u . s)^2 = |s|^2 / D; the standard error at 20000 directions is 0.5 %.
    x, shift = normal(10, 8, seed=1), normal(8, seed=2)
    wanted = float(shift.norm()) / math.sqrt(8)
    assert sliced_wasserstein(x, x + shift, 20_000) == pytest.approx(wanted, rel=0.02)


def test_directions_are_unit_seeded_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    u = _directions(4, 100, seed=1)
    x, y = normal(20, 4, seed=1), normal(25, 4, seed=2)
    assert sliced_wasserstein(x, y, seed=3) == sliced_wasserstein(x, y, seed=3) != sliced_wasserstein(x, y, seed=4)
    torch.testing.assert_close(u.norm(dim=0), torch.ones(100, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 7), (6, 9), (100, 33), (2, 64)])
def test_unequal_sizes_agree_with_scipy_at_p_1(n, m):
    x, y = normal(n, 3, seed=1), normal(m, 3, seed=2) * 2 + 1
    u = _directions(3, 20, seed=0)
    wanted = np.mean([scipy.stats.wasserstein_distance((x @ v).numpy(), (y @ v).numpy()) for v in u.T])
    assert sliced_wasserstein(x, y, 20, p=1) == pytest.approx(wanted, rel=1e-12)
    assert sliced_wasserstein(y, x, 20, p=1) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_unequal_sizes_agree_with_repeating_the_points_to_a_common_size(p):
    x, y = normal(4, 1, seed=1), normal(6, 1, seed=2)
    a, b = (z.flatten().repeat_interleave(k).sort().values for z, k in ((x, 3), (y, 2)))
    wanted = float((a - b).abs().pow(p).mean() ** (1 / p))
    assert sliced_wasserstein(x, y, 10, p=p) == pytest.approx(wanted, rel=1e-12)


def test_sliced_distance_of_gaussian_samples_is_near_the_gaussian_one_in_one_dimension():
    x, y = normal(20_000, 1, seed=1), 2 * normal(15_000, 1, seed=2) + 1
    wanted = gaussian_wasserstein(torch.zeros(1), torch.eye(1), torch.ones(1), 4 * torch.eye(1))
    assert wanted == pytest.approx(math.sqrt(2), rel=1e-14)
    assert sliced_wasserstein(x, y, 1) == pytest.approx(wanted, rel=0.03)


# ---- Features ------------------------------------------------------------------------------------------------------


def module(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )


def test_features_do_not_depend_on_the_batch():
    images = normal(23, 1, 8, 8, dtype=torch.float32)
    whole = ModuleFeatures("cnn", module())
    assert isinstance(whole, Features)
    assert whole(images).shape == (23, 16)
    assert not whole(images).requires_grad
    for batch in (1, 7):
        assert (ModuleFeatures("cnn", module(), batch)(images) - whole(images)).abs().max() <= 1e-5
    assert (whole(images[5:6]) - whole(images)[5:6]).abs().max() <= 1e-5


def test_features_are_frozen_and_leave_the_module_as_it_was():
    net = module().train()
    features = ModuleFeatures("cnn", net)
    images = normal(4, 1, 8, 8, dtype=torch.float32)
    before = features(images)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net[0].weight += 1
    assert torch.equal(features(images), before)
    assert features.sha256 != ModuleFeatures("cnn", net).sha256


def test_sha256_is_that_of_names_dtypes_shapes_and_bytes():
    base = ModuleFeatures("a", module()).sha256
    assert len(base) == 64
    assert ModuleFeatures("b", module(), batch=3).sha256 == base  # neither the name nor the batch is in it
    assert ModuleFeatures("a", module().to(memory_format=torch.channels_last)).sha256 == base
    others = [module(1), module().double(), module().bfloat16(), nn.Sequential(module()), nn.Flatten()]
    assert len({base, *(ModuleFeatures("a", other).sha256 for other in others)}) == 6
    # Pinned: a change of the recipe would silently disown every committed number.
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.zero_()
    recipe = b"bias torch.float32 [1]\n" + bytes(4) + b"weight torch.float32 [1, 2]\n" + np.array([1, 2], "<f4").tobytes()
    assert ModuleFeatures("a", layer).sha256 == hashlib.sha256(recipe).hexdigest()


def test_images_are_moved_to_the_modules_dtype():
    images = normal(3, 1, 8, 8, dtype=torch.float32)
    assert ModuleFeatures("cnn", module().double())(images).dtype == torch.float64
    assert ModuleFeatures("cnn", module())(images.double()).dtype == torch.float32
    assert ModuleFeatures("pixels", nn.Flatten())(images.double()).dtype == torch.float64


# ---- What is refused -----------------------------------------------------------------------------------------------

A, M, E = torch.zeros(3, 2), torch.zeros(2), torch.eye(2)
NAN = torch.tensor([[0.0, math.nan], [0.0, 0.0]])
IMAGES = torch.zeros(2, 1, 4, 4)
FLAT = ModuleFeatures("pixels", nn.Flatten())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fid(A, torch.zeros(3, 4)), ValueError, r"mean1 has D = 2 and mean2 D = 4; wanted the same D"),
        (lambda: fid(A[:1], A), ValueError, r"samples_features has shape \[1, 2\]; wanted \[N, D\] with N >= 2"),
        (lambda: fid(A, NAN), ValueError, r"reference_features has NaN or infinite entries; wanted finite"),
        (lambda: fid(A, torch.zeros(3, 2, 1)), ValueError, r"reference_features has shape \[3, 2, 1\]; wanted \[N, D\]: rows"),
        (lambda: fid(A, [[0.0]]), TypeError, r"reference_features is list; wanted a tensor or an array"),
        (lambda: fid(A, A + 0j), TypeError, r"reference_features is torch.complex64; wanted real numbers"),
        (lambda: fid(torch.zeros(3, 0), A), ValueError, r"with N >= 2 and D >= 1"),
        (lambda: frechet_distance(A, E, M, E), ValueError, r"mean1 has shape \[3, 2\]; wanted \[D\]: a vector"),
        (lambda: frechet_distance(M, torch.eye(3), M, E), ValueError, r"cov1 has shape \[3, 3\]; wanted \[2, 2\], as the means"),
        (lambda: frechet_distance(M, E, M, -E), ValueError, r"cov2 has the eigenvalue -1; wanted none below 0"),
        (lambda: frechet_distance(M, E, M, E.cumsum(0)), ValueError, r"cov2 differs from its transpose by 1; wanted a cov"),
        (lambda: frechet_distance(M, NAN, M, E), ValueError, r"cov1 has NaN or infinite entries"),
        (lambda: Statistics().cov, ValueError, r"a covariance of 0 samples; wanted at least 2"),
        (lambda: Statistics().update(A[:1]).cov, ValueError, r"a covariance of 1 samples; wanted at least 2"),
        (lambda: Statistics().update(A[:0]), ValueError, r"features has shape \[0, 2\]; wanted \[N, D\] with N >= 1"),
        (lambda: Statistics().update(A).update(A[:, :1]), ValueError, r"features have D = 1; wanted D = 2, as before"),
        (lambda: Statistics().update(NAN), ValueError, r"features has NaN or infinite entries"),
        (lambda: sliced_wasserstein(A, torch.zeros(3, 4)), ValueError, r"x has D = 2 and y D = 4; wanted the same D"),
        (lambda: sliced_wasserstein(A, A[:1]), ValueError, r"y has shape \[1, 2\]; wanted \[N, D\] with N >= 2"),
        (lambda: sliced_wasserstein(M, A), ValueError, r"x has shape \[2\]; wanted \[N, D\]"),
        (lambda: sliced_wasserstein(NAN, A), ValueError, r"x has NaN or infinite entries"),
        (lambda: sliced_wasserstein(A, A, projections=0), ValueError, r"projections is 0; wanted an integer of at least 1"),
        (lambda: sliced_wasserstein(A, A, seed=-1), ValueError, r"seed is -1; wanted an integer in \[0, 2\*\*63\)"),
        (lambda: sliced_wasserstein(A, A, p=0.5), ValueError, r"p is 0.5; wanted a finite number of at least 1"),
        (lambda: sliced_wasserstein(A, A, p=math.inf), ValueError, r"p is inf; wanted a finite number"),
        (lambda: ModuleFeatures("", nn.Flatten()), ValueError, r"name is ''; wanted a word for the tables"),
        (lambda: ModuleFeatures("f", torch.flatten), TypeError, r"module is builtin\w+; wanted an nn.Module"),
        (lambda: ModuleFeatures("f", nn.Flatten(), 0), ValueError, r"batch is 0; wanted an integer of at least 1"),
        (
            lambda: ModuleFeatures("f", nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False))),
            ValueError,
            r"0 normalises by the batch; wanted track_running_stats=True",
        ),
        (lambda: FLAT(IMAGES.long()), TypeError, r"images are torch.int64; wanted a float tensor \[N, C, H, W\]"),
        (lambda: FLAT([IMAGES]), TypeError, r"images are list; wanted a float tensor"),
        (lambda: FLAT(IMAGES[0]), ValueError, r"images have shape \[1, 4, 4\]; wanted \[N, C, H, W\] with N >= 1"),
        (lambda: FLAT(IMAGES[:0]), ValueError, r"images have shape \[0, 1, 4, 4\]; wanted"),
        (lambda: FLAT(IMAGES / 0), ValueError, r"pixels returned NaN or infinite features; wanted finite ones"),
        (lambda: ModuleFeatures("id", nn.Identity())(IMAGES), ValueError, r"id returned \[2, 1, 4, 4\]; wanted \[2, D\]"),
    ],
)
def test_a_bad_input_says_what_came_and_what_was_wanted(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- the classifier whose last hidden layer serves as features -----------------------------------------------------------


def test_a_classifier_learns_and_is_a_function_of_its_seeds():
    labels = torch.arange(90) % 3
    x = normal(90, 1, 8, 8, dtype=torch.float32) + labels[:, None, None, None]
    nets = [classifier((1, 8, 8), 3, features=16, seed=seed) for seed in (1, 1, 2)]
    before = torch.get_rng_state()
    for net in nets:
        train_classifier(net, x, labels, epochs=8, batch=16, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert float((nets[0](x).argmax(1) == labels).double().mean()) > 0.9
    assert nets[0][:-1](x).shape == (90, 16)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 28, 20), (3, 33, 65)])
def test_a_classifier_takes_any_image_of_four_pixels_a_side(shape):
    assert classifier(shape, 5)(normal(2, *shape, dtype=torch.float32)).shape == (2, 5)


@pytest.mark.parametrize(("shape", "classes"), [((1, 3, 8), 3), ((8, 8), 3), ((1, 8, 8), 1)])
def test_what_a_classifier_refuses(shape, classes):
    with pytest.raises(ValueError, match="wanted"):
        classifier(shape, classes)
