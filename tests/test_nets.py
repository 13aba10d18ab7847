"""The nets: shapes, dtypes, seeds, gradients, conditioning, function transforms, and what they refuse."""

import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d
from torch import nn

import scoresde.nets
from scoresde import VP, Preconditioned, checkpoint, parameterizations
from scoresde.nets import MLP, DiT, FromDiffusers, NCSNpp, UNet, dit, fir, preset
from scoresde.nets.embed import OMEGA_HIGH, fourier, gaussian
from scoresde.nets.presets import PRESETS

FULL = {"fir": True, "pyramid": True, "scale": 4.0}
# Small nets, one of each kind of layer: (class, constructor arguments).
NETS = {
    "mlp": (MLP, {"shape": (3,), "width": 16, "depth": 2}),
    "mlp-classes": (MLP, {"shape": [2, 3], "width": 16, "depth": 1, "classes": 3, "emb": 8}),
    "unet": (UNet, {"shape": (1, 8, 8), "channels": 8}),
    "unet-attention": (UNet, {"shape": (2, 7, 5), "channels": 8, "multipliers": (1, 2, 2), "attention": (1, 2)}),
    "unet-classes": (UNet, {"shape": (3, 6, 9), "channels": 12, "blocks": 2, "classes": 3}),
    "ncsnpp": (NCSNpp, {"shape": (1, 8, 8), "channels": 8, "multipliers": (1, 2), "blocks": 1}),
    "ncsnpp-fir": (NCSNpp, {"shape": (2, 7, 5), "channels": 8, "multipliers": (1, 1, 2), "blocks": 1, "attention": (2,), **FULL}),
    "ncsnpp-classes": (
        NCSNpp,
        {"shape": (2, 4, 6), "channels": 12, "multipliers": (1, 1), "attention": (), "blocks": 2, "classes": 3},
    ),
    "dit": (DiT, {"shape": (1, 8, 8), "width": 16, "depth": 2, "heads": 2}),
    "dit-classes": (DiT, {"shape": (2, 6, 9), "width": 12, "depth": 1, "heads": 3, "patch": 3, "classes": 3, "emb": 8}),
}
FORMATS = (torch.contiguous_format, torch.channels_last)
CLASSES = [name for name in NETS if "classes" in name]


def build(name, **changes):
    cls, kwargs = NETS[name]
    return cls(**{**kwargs, **changes})


def shaken(name, dtype=torch.float64, **changes):
    """A net whose zero-initialised layers are not zero, as after training: a fresh one returns 0 and hides errors."""
    net = build(name, **changes).to(dtype)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g).to(dtype)
    return net


def inputs(net, rows=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *net.shape, generator=g, dtype=torch.float64).to(dtype)
    c = torch.randn(rows, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    cond = torch.randint(-1, net.config["classes"], (rows,), generator=g) if net.config["classes"] else None
    return x, c, cond


def normal_like(x, seed):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def test_every_exported_net_is_tested_here():
    classes = {name for name in scoresde.nets.__all__ if isinstance(getattr(scoresde.nets, name), type)}
    assert {cls.__name__ for cls, _ in NETS.values()} | {"FromDiffusers"} == classes
    assert classes | {"preset"} == set(scoresde.nets.__all__)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_has_the_shape_and_dtype_of_x(name, dtype):
    net = shaken(name, dtype)
    out = net(*inputs(net, dtype=dtype))
    assert out.shape == (4, *net.shape)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    # The reduced precisions are the same function, to their rounding.
    exact = shaken(name)(*inputs(net))
    assert (out.double() - exact).norm() <= 0.2 * exact.norm()


@pytest.mark.parametrize("name", NETS)
def test_a_fresh_net_returns_zero_at_every_noise_level(name):
    net = build(name)
    assert torch.equal(net(*inputs(net, dtype=torch.float32)), torch.zeros(4, *net.shape))


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 7, 5), (1, 1, 1), (3, 1, 9), (4, 16, 16)])
def test_unet_takes_any_size_at_four_levels(shape):
    kwargs = {"channels": 4, "multipliers": (1, 2, 2, 3), "attention": (3,)}
    net = UNet(shape, **kwargs)
    nn.init.normal_(net.leave.weight, generator=torch.Generator().manual_seed(0))
    x, c, _ = inputs(net, 1, torch.float32)
    out = net(x, c)
    assert out.shape == x.shape
    assert out.abs().sum() > 0


def test_pooling_an_odd_side_equals_repeating_its_edge():
    # The claim of the docstring, on the layer itself: one more row equal to the last changes no mean.
    x = normal_like(torch.zeros(2, 3, 7, 5, dtype=torch.float64), 0)
    padded = nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    ours = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
    torch.testing.assert_close(ours, nn.functional.avg_pool2d(padded, 2), rtol=0, atol=1e-15)


def call_and_gradients(net, x, c):
    out = net(x, c)
    return out, torch.autograd.grad(out.square().sum(), list(net.parameters()))


def test_unet_is_the_same_function_in_either_memory_format():
    net = shaken("unet", shape=(3, 8, 8))
    x, c, _ = inputs(net)
    assert all(p.is_contiguous() for p in net.parameters())  # safetensors and parameters_to_vector need it
    out, gradients = call_and_gradients(net, x, c)
    net.to(memory_format=torch.channels_last)
    fast, same = call_and_gradients(net, x, c)
    assert net.enter(x).is_contiguous(memory_format=torch.channels_last)  # it is indeed taken up
    for a, b in zip([out, *gradients], [fast, *same], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    net.to(memory_format=torch.contiguous_format)
    assert all(p.is_contiguous() for p in net.parameters())


def test_unet_takes_images_and_tangents_in_either_memory_format():
    net = shaken("unet", shape=(3, 8, 8))
    x, c, _ = inputs(net)
    v = normal_like(x, 1)
    outs = [
        torch.func.jvp(lambda z: net(z, c), (x.to(memory_format=a),), (v.to(memory_format=b),)) for a in FORMATS for b in FORMATS
    ]
    for out, tangent in outs:
        torch.testing.assert_close(out, net(x, c), rtol=0, atol=1e-12)
        torch.testing.assert_close(tangent, outs[0][1], rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last), c), net(x, c), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_weights_are_a_function_of_the_seed_and_the_global_generator_is_untouched(name):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = build(name, seed=3).state_dict()
    torch.manual_seed(12)
    again, other = build(name, seed=3).state_dict(), build(name, seed=4).state_dict()
    fresh, fresher = build(name, seed=None).state_dict(), build(name, seed=None).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    for a, b in [(first, other), (first, fresh), (fresh, fresher)]:
        assert any(not torch.equal(a[k], b[k]) for k in a)
    torch.manual_seed(11)
    net = build(name)
    net(*inputs(net, dtype=torch.float32))  # nor does a call draw
    build(name, seed=None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", NETS)
def test_config_survives_json_and_rebuilds_the_net(name):
    net = build(name, seed=7)
    twin = type(net)(**json.loads(json.dumps(net.config)))
    assert twin.config == net.config
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["ncsnpp-fir", "dit-classes"])
def test_a_checkpoint_brings_back_the_function_in_its_dtype(name, dtype, tmp_path):
    net = shaken(name, dtype)
    back = checkpoint.load(checkpoint.save(tmp_path / "model", Preconditioned(net, VP()))).net
    assert type(back) is type(net)
    args = inputs(net, dtype=dtype)
    assert torch.equal(back(*args), net.eval()(*args))


def test_a_net_is_built_on_the_default_device():
    with torch.device("meta"):
        net = build("unet-classes")
    assert {p.device.type for p in net.parameters()} == {"meta"}


@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_every_parameter_once_the_zero_layers_have_moved(name):
    net = build(name)
    x, c, cond = inputs(net, 8, torch.float32)
    cond = None if cond is None else torch.arange(8) % 4 - 1  # every label, and none
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    # Step 1 moves the output layer, step 2 the last layers of the branches; from then on everything moves.
    for _ in range(3):
        optimizer.zero_grad()
        (net(x, c, cond) - x).square().mean().backward()
        optimizer.step()
    still = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_a_few_steps_of_adam_reduce_the_loss(name):
    net = build(name)
    x, c, _ = inputs(net, 32, torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(x, c) - x.tanh() * c.reshape(-1, *[1] * (x.ndim - 1))).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", CLASSES)
def test_labels_change_the_output_and_minus_one_is_none(name):
    net = shaken(name)
    x, c, _ = inputs(net)
    outs = [net(x, c, torch.full((4,), k)) for k in range(3)] + [net(x, c)]
    for i in range(4):
        for j in range(i):
            assert (outs[i] - outs[j]).abs().max() > 1e-4
    mixed = net(x, c, torch.tensor([0, -1, 2, -1]))
    torch.testing.assert_close(mixed, torch.stack([outs[0][0], outs[3][1], outs[2][2], outs[3][3]]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_a_row_does_not_depend_on_its_batch(name):
    net = shaken(name, torch.float32)
    x, c, cond = inputs(net, 9, torch.float32)
    together = net(x, c, cond)
    alone = torch.cat([net(x[i : i + 1], c[i : i + 1], None if cond is None else cond[i : i + 1]) for i in range(9)])
    assert (together - alone).abs().max() <= 1e-5 * together.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", NETS)
def test_jvp_vmap_and_batched_gradients_agree_with_autograd(name):
    net = shaken(name)
    x, c, cond = inputs(net, 3)
    rows = [(x[i], c[i], None if cond is None else cond[i]) for i in range(3)]
    tangent = normal_like(x, 1)

    def alone(row, c_row, label):
        return net(row[None], c_row[None], None if label is None else label[None])[0]

    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda z: alone(z, *r[1:]), r[0]) for r in rows])
    jacobians = jacobians.reshape(3, x[0].numel(), x[0].numel())
    wanted = torch.einsum("bij,bj->bi", jacobians, tangent.flatten(1))

    out, forward = torch.func.jvp(lambda z: net(z, c, cond), (x,), (tangent,))
    torch.testing.assert_close(out, net(x, c, cond), rtol=0, atol=1e-12)
    torch.testing.assert_close(forward.flatten(1), wanted, rtol=0, atol=1e-10)

    dims = (0, 0, None if cond is None else 0)
    torch.testing.assert_close(torch.func.vmap(alone, in_dims=dims)(x, c, cond), out, rtol=0, atol=1e-10)
    by_vmap = torch.func.vmap(torch.func.jacrev(alone), in_dims=dims)(x, c, cond).reshape(jacobians.shape)
    torch.testing.assert_close(by_vmap, jacobians, rtol=0, atol=1e-10)
    by_forward = torch.func.vmap(torch.func.jacfwd(alone), in_dims=dims)(x, c, cond).reshape(jacobians.shape)
    torch.testing.assert_close(by_forward, jacobians, rtol=0, atol=1e-10)

    z = x.clone().requires_grad_()
    probes = normal_like(x.expand(5, *x.shape), 2)
    (batched,) = torch.autograd.grad(net(z, c, cond), z, probes, is_grads_batched=True)
    expected = torch.einsum("kbi,bij->kbj", probes.flatten(2), jacobians)
    torch.testing.assert_close(batched.flatten(2), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NETS)
def test_second_derivatives_agree_with_differences(name):
    # Training through a divergence, and guidance by a gradient, differentiate twice.
    net = shaken(name)
    x, c, cond = inputs(net, 2)
    v = normal_like(x, 1)

    def gradient(z):
        z = z.clone().requires_grad_()
        return z, torch.autograd.grad((net(z, c, cond) ** 2).sum(), z, create_graph=True)[0]

    z, g = gradient(x)
    (got,) = torch.autograd.grad((g * v).sum(), z)
    h = 1e-5
    wanted = (gradient(x + h * v)[1] - gradient(x - h * v)[1]) / (2 * h)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * float(wanted.detach().abs().max().clamp(min=1)))


def test_the_noise_level_is_embedded_in_float32_whatever_the_net():
    # Neighbours that bfloat16 (8 bits) and float16 (11 bits) cannot tell apart, and the embedding can.
    c = torch.tensor([2.0, 2.0005])
    assert len(c.bfloat16().unique()) == len(c.half().unique()) == 1
    low, high = fourier(c, 64)
    assert low.dtype == torch.float32
    assert (low - high).norm() > 0.5 * 0.0005 * OMEGA_HIGH
    torch.testing.assert_close(fourier(c.double(), 64).float(), torch.stack([low, high]), rtol=0, atol=2e-5)
    assert fourier(c.double(), 64).dtype == torch.float64


def test_the_net_sees_noise_levels_that_its_own_dtype_cannot_tell_apart():
    net = shaken("mlp", torch.bfloat16)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    seen = []
    net.condition.first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(x, torch.tensor([2.0, 2.003]))  # bfloat16 rounds both to 2
    assert seen[0].dtype == torch.bfloat16
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("name", NETS)
def test_autocast_takes_a_float32_net_and_leaves_its_times_in_float32(name):
    net = shaken(name, torch.float32)
    x, c, cond = inputs(net, dtype=torch.float32)
    seen, embed = [], net.condition.embed
    net.condition.embed = lambda *args: seen.append(embed(*args)) or seen[-1]
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, c, cond)
    wanted = net(x, c, cond)
    assert (out.float() - wanted).norm() <= 0.2 * wanted.norm()
    assert seen[0].dtype == torch.float32
    assert torch.equal(*seen)  # to the bit, with and without


@pytest.mark.parametrize("name", NETS)
def test_a_thousand_times_are_a_thousand_embeddings_in_bfloat16(name):
    t = torch.linspace(1e-3, 1, 1000, dtype=torch.float64)
    c = parameterizations.edm(VP(), t)[3].float()
    condition = build(name, **({"width": 32} if "mlp" in name else {})).condition
    with torch.autocast("cpu", torch.bfloat16):
        cast = condition(c, None)
    low = condition.to(torch.bfloat16)(c, None)
    assert cast.dtype == low.dtype == torch.bfloat16
    assert len(cast.unique(dim=0)) == len(low.unique(dim=0)) == 1000


@pytest.mark.parametrize("name", ["unet", "ncsnpp"])
def test_dropout_acts_in_training_alone(name):
    net = shaken(name, torch.float32, dropout=0.5)
    x, c, _ = inputs(net, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(net(x, c), net(x, c))
    net.eval()
    assert torch.equal(net(x, c), net(x, c))


def test_the_digits_net_stays_small():
    assert sum(p.numel() for p in UNet((1, 8, 8), channels=24).parameters()) == 221_545
    assert sum(p.numel() for p in UNet((1, 8, 8), channels=32).parameters()) == 392_929


X, C = torch.zeros(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((torch.zeros(2, 4), C), ValueError, r"x is \[2, 4\] float32; wanted \[B, 3\]: reshape"),
        ((torch.zeros(3), C), ValueError, r"x is \[3\] float32; wanted \[B, 3\]"),
        ((torch.zeros(2, 3, 1), C), ValueError, r"x is \[2, 3, 1\] float32; wanted \[B, 3\]"),
        ((X.double(), C), TypeError, r"x is \[2, 3\] float64; the weights are torch.float32: net.to\(x.dtype\)"),
        (([[0.0] * 3], C), TypeError, r"x is list; wanted a tensor \[B, 3\]: torch.as_tensor"),
        ((X, torch.zeros(3)), ValueError, r"c_noise is \[3\] float32; wanted \[2\], one a row of x: c_noise.expand"),
        ((X, torch.zeros(())), ValueError, r"c_noise is \[\] float32; wanted \[2\]"),
        ((X, C[:, None]), ValueError, r"c_noise is \[2, 1\] float32; wanted \[2\]"),
        ((X, C.half()), TypeError, r"c_noise is \[2\] float16; wanted a float32 or float64 tensor \[B\]: c_noise.float"),
        ((X, 0.5), TypeError, r"c_noise is float; wanted"),
        ((X, C, torch.tensor([0, 3])), ValueError, r"labels out of range; wanted 0 ... 2, or -1 for no label: build"),
        ((X, C, torch.tensor([0, -2])), ValueError, r"labels out of range"),
        ((X, C, torch.tensor([0.0, 1.0])), TypeError, r"cond is \[2\] float32; wanted an int64 tensor of labels \[B\]: cond.long"),
        ((X, C, torch.tensor([0, 1], dtype=torch.int32)), TypeError, r"cond is \[2\] int32; wanted an int64"),
        ((X, C, [0, 1]), TypeError, r"cond is list; wanted an int64"),
        ((X, C, torch.tensor([0])), ValueError, r"cond is \[1\] int64; wanted \[2\], one a row of x: cond.expand"),
    ],
)
def test_a_bad_call_says_what_came_and_what_was_wanted(args, error, match):
    net = MLP(3, width=8, depth=1, classes=3)
    with pytest.raises(error, match=match):
        net(*args)


def test_labels_are_refused_by_a_net_without_classes_and_by_their_range_under_vmap():
    with pytest.raises(ValueError, match=r"cond was given to a net without classes; wanted None: build the net with classes"):
        MLP(3, width=8, depth=1)(X, C, torch.tensor([0, 1]))
    net = MLP(3, width=8, depth=1, classes=3)
    with pytest.raises(ValueError, match="labels out of range"):
        torch.func.vmap(lambda x, c, y: net(x[None], c[None], y[None]))(X, C, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"x is \[2, 8, 8\] float32; wanted \[B, 1, 8, 8\]"):
        build("unet")(torch.zeros(2, 8, 8), C)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: MLP(0), ValueError, r"shape\[0\] is 0; wanted an integer of at least 1"),
        (lambda: MLP("3"), TypeError, r"shape is '3'; wanted the shape of one sample"),
        (lambda: MLP(()), TypeError, r"shape is \(\); wanted the shape of one sample"),
        (lambda: MLP((2.0,)), TypeError, r"shape\[0\] is 2.0 \(float\); wanted an integer"),
        (lambda: MLP(3, width=0), ValueError, r"width is 0; wanted an integer of at least 1"),
        (lambda: MLP(3, depth=0), ValueError, r"depth is 0; wanted"),
        (lambda: MLP(3, emb=5), ValueError, r"emb is 5; wanted an even number, a sine and a cosine each: emb=6"),
        (lambda: MLP(3, classes=-1), ValueError, r"classes is -1; wanted an integer of at least 0"),
        (lambda: MLP(3, seed=-1), ValueError, r"seed is -1; wanted an integer of at least 0"),
        (lambda: MLP(3, seed=2**63), ValueError, r"seed is \d+; wanted an integer below 2\*\*63"),
        (lambda: MLP(3, seed=1.5), TypeError, r"seed is 1.5 \(float\); wanted an integer"),
        (lambda: UNet((8, 8)), ValueError, r"shape is \(8, 8\); wanted \(C, H, W\), as in \(1, 8, 8\)"),
        (lambda: UNet((1, 8, 8), channels=3), ValueError, r"channels is 3; wanted an integer of at least 4"),
        (lambda: UNet((1, 8, 8), multipliers=()), TypeError, r"multipliers is \(\); wanted one integer a level"),
        (lambda: UNet((1, 8, 8), multipliers=(1, 0)), ValueError, r"multipliers\[1\] is 0; wanted"),
        (lambda: UNet((1, 8, 8), blocks=0), ValueError, r"blocks is 0; wanted"),
        (lambda: UNet((1, 8, 8), attention=1), TypeError, r"attention is 1; wanted a sequence of levels, as in \(1,\)"),
        (lambda: UNet((1, 8, 8), attention=(2,)), ValueError, r"attention is \(2,\); wanted levels among \[0, 1\]"),
        (lambda: UNet((1, 8, 8), dropout=1.5), ValueError, r"dropout is 1.5; wanted a finite number in \[0, 1\]"),
        (lambda: UNet((1, 8, 8), classes=True), TypeError, r"classes is True \(bool\); wanted an integer"),
        (lambda: NCSNpp((8, 8)), ValueError, r"shape is \(8, 8\); wanted \(C, H, W\)"),
        (lambda: NCSNpp((1, 8, 8), channels=7), ValueError, r"channels is 7; wanted an even number.*: channels=8"),
        (lambda: NCSNpp((1, 8, 8), multipliers=2), TypeError, r"multipliers is 2; wanted one integer a level"),
        (lambda: NCSNpp((1, 8, 8), attention=(4,)), ValueError, r"attention is \(4,\); wanted levels among \[0, 1, 2, 3\]"),
        (lambda: NCSNpp((1, 8, 8), blocks=0), ValueError, r"blocks is 0; wanted"),
        (lambda: NCSNpp((1, 8, 8), fir=1), TypeError, r"fir is 1; wanted True or False: fir=bool\(fir\)"),
        (lambda: NCSNpp((1, 8, 8), scale=-1.0), ValueError, r"scale is -1.0; wanted a finite number in \[0"),
        (lambda: DiT((1, 8, 8), patch=3), ValueError, r"patch is 3 for images of 8 x 8; wanted a divisor.*one of \[1, 2, 4, 8\]"),
        (lambda: DiT((1, 8, 8), width=30, heads=4), ValueError, r"width is 30 with 4 heads; wanted a multiple.*: width=32"),
        (lambda: DiT((1, 8, 8), depth=0), ValueError, r"depth is 0; wanted"),
        (lambda: DiT((1, 8, 8), emb=7), ValueError, r"emb is 7; wanted an even number.*: emb=8"),
        (lambda: DiT(64), ValueError, r"shape is 64; wanted \(C, H, W\)"),
        (lambda: preset("unet-2m", (1, 8, 8)), ValueError, r"preset is 'unet-2m'; wanted one of mlp-100k, .*ncsnpp-deep"),
        (lambda: preset("unet-1m", (1, 8, 8), depth=3), TypeError, r"unexpected keyword argument 'depth'"),
        (lambda: FromDiffusers(len), TypeError, r"unet is builtin_function_or_method; wanted an nn.Module such as"),
        (lambda: FromDiffusers(nn.Identity(), -1), ValueError, r"unlabelled is -1; wanted an integer of at least 0"),
    ],
)
def test_a_bad_constructor_argument_is_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


# --- sizes and numbers of parameters -------------------------------------------------------------------------------------
def count(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


# The trained parameters of score_sde_pytorch's networks, instantiated from its configs at commit cb1f359. Theirs have besides a
# table of 1000 noise levels (a buffer) and, where the embedding is "fourier", 128 frequencies that are not trained.
@pytest.mark.parametrize(
    ("config", "arguments", "parameters"),
    [
        ("vp, subvp/cifar10_ddpmpp_continuous", {}, 61_804_419),
        ("vp, subvp/cifar10_ddpmpp_deep_continuous", {"blocks": 8}, 106_632_579),
        ("ve/cifar10_ncsnpp_continuous", {"fir": True, "pyramid": True, "scale": 16.0}, 62_758_787),
        ("ve/cifar10_ncsnpp_deep_continuous", {"fir": True, "pyramid": True, "scale": 16.0, "blocks": 8}, 107_586_947),
        ("vp, subvp/cifar10_ncsnpp_continuous", {"fir": True, "pyramid": True}, 62_693_251),
        ("vp, subvp/cifar10_ncsnpp_deep_continuous", {"fir": True, "pyramid": True, "blocks": 8}, 107_521_411),
    ],
)
def test_the_published_networks_have_their_number_of_parameters(config, arguments, parameters):
    assert count(lambda: NCSNpp((3, 32, 32), **arguments)) == parameters, config


COUNTS = {
    "mlp-100k": 90_530, "mlp-1m": 873_218, "mlp-4m": 4_500_994,
    "unet-100k": 99_507, "unet-1m": 1_075_427, "unet-4m": 4_868_099, "unet-15m": 15_730_851, "unet-40m": 38_774_915,
    "unet-100m": 98_467_403,
    "dit-100k": 95_836, "dit-1m": 1_040_940, "dit-4m": 4_127_820, "dit-15m": 14_423_820, "dit-30m": 32_399_244, "dit-100m": 96_740_684,
    "ddpmpp": 61_804_419, "ddpmpp-deep": 106_632_579, "ncsnpp": 62_758_787, "ncsnpp-deep": 107_586_947,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_number_of_parameters_and_rebuilds_through_its_class(name):
    shape = (2,) if name.startswith("mlp") else (3, 32, 32)
    assert count(lambda: preset(name, shape)) == COUNTS[name]
    with torch.device("meta"):
        net = preset(name, shape, classes=10, seed=3)
        twin = type(net)(**json.loads(json.dumps(net.config)))
    assert twin.config == net.config
    assert net.config["classes"] == 10
    assert net.config["seed"] == 3
    assert {k: p.shape for k, p in net.state_dict().items()} == {k: p.shape for k, p in twin.state_dict().items()}


def test_a_preset_takes_changes_and_runs():
    net = preset("unet-100k", (1, 8, 8), channels=8)
    assert net.config["channels"] == 8
    small = preset("dit-100k", (1, 8, 8), classes=2)
    assert small(*inputs(small, dtype=torch.float32)).shape == (4, 1, 8, 8)


def test_the_weights_of_a_seed_stay_what_they_were():
    """Names and values to the bit, as hashed before the image nets had a module in common: saved seeds depend on them."""
    nets = (
        UNet((2, 7, 5), channels=8, multipliers=(1, 2, 2), attention=(1, 2), classes=3),
        MLP(3, width=16, depth=2, classes=2),
    )
    wanted = ("1dc733f69c384a06a6627cee55dd4d60", "a27a82ae62cff9cf369215236878f970")
    for net, start in zip(nets, wanted, strict=True):
        digest = hashlib.sha256()
        for name, value in net.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        assert digest.hexdigest().startswith(start)


# --- NCSN++ ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [{}, FULL], ids=["ddpmpp", "ncsnpp"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 7, 5), (1, 1, 1), (3, 1, 9)])
def test_ncsnpp_takes_any_size_at_four_levels(shape, arguments):
    net = NCSNpp(shape, channels=4, multipliers=(1, 2, 2, 3), blocks=1, attention=(3,), **arguments)
    nn.init.normal_(net.leave.weight, generator=torch.Generator().manual_seed(0))
    x, c, _ = inputs(net, 1, torch.float32)
    out = net(x, c)
    assert out.shape == x.shape
    assert out.abs().sum() > 0


def written(net):
    """Weights that are a formula of their name's place and of their index."""
    with torch.no_grad():
        for j, (_, p) in enumerate(sorted(net.named_parameters())):
            k = torch.arange(p.numel(), dtype=torch.float64).reshape(p.shape)
            p.copy_((1.7 * k + j).cos() * (2 / p[0].numel()) ** 0.5)
    return net


@pytest.mark.parametrize(
    ("full", "pixel", "corner", "square"),
    [
        (False, (-0.387673277072, -1.420811290034, 1.159517143034), (-0.591781617673, -1.163964748218, 0.853757662745), 1.1851374486361463),
        (True, (-0.788712990239, 1.076428020052, 0.714534451689), (-0.643111335627, 0.954678262779, 0.810619070118), 0.8103541500468107),
    ],
    ids=["ddpmpp", "ncsnpp"],
)  # fmt: skip
def test_ncsnpp_is_the_published_function(full, pixel, corner, square):
    """The numbers are what score_sde_pytorch's `NCSNpp` gives, in float64, for the same weights, image and embedding of the time."""
    net = NCSNpp((3, 8, 8), 8, (1, 2), 1, (1,), fir=full, pyramid=full).double()
    written(net)
    omega = torch.exp(-math.log(10000) / 3 * torch.arange(4, dtype=torch.float64))
    net.condition.embed = lambda t, _: torch.cat([(t[:, None] * omega).sin(), (t[:, None] * omega).cos()], dim=1)
    x = (0.3 * torch.arange(192, dtype=torch.float64)).sin().reshape(1, 3, 8, 8)
    out = net(x, torch.tensor([37.0], dtype=torch.float64))[0]
    assert out[:, 3, 5].tolist() == pytest.approx(pixel, abs=1e-11)
    assert out[:, 0, 7].tolist() == pytest.approx(corner, abs=1e-11)
    assert out.square().mean().item() == pytest.approx(square, abs=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NCSNpp((3, 32, 32), channels=32, blocks=8),
        lambda: NCSNpp((3, 32, 32), channels=32, blocks=8, fir=True, pyramid=True, scale=16.0),
        lambda: NCSNpp((1, 13, 11), channels=32, blocks=2, fir=True, pyramid=True),
        lambda: DiT((3, 16, 16), width=64, depth=12),
    ],
    ids=["ddpmpp-deep", "ncsnpp-deep", "ncsnpp-odd", "dit"],
)
def test_a_fresh_net_keeps_the_size_of_its_activations_through_the_depth(make):
    net, seen = make(), []
    for module in net.modules():
        if type(module).__name__ == "_Block":
            module.register_forward_hook(lambda m, args, out: seen.append(float(out.std())))
    with torch.no_grad():
        net(*inputs(net, 2, torch.float32))
    assert len(seen) >= 12
    assert 0.3 <= min(seen) <= max(seen) <= 3


def test_gaussian_frequencies_have_the_spread_asked_for_and_no_weights():
    w = torch.special.ndtri((1 + (torch.arange(4096) + 0.5) / 4096) / 2)
    assert float(w.square().mean().sqrt()) == pytest.approx(1, abs=2e-3)
    c = torch.tensor([0.3], dtype=torch.float64)
    features = gaussian(c, 64, 16.0)
    w = torch.special.ndtri((1 + (torch.arange(32, dtype=torch.float64) + 0.5) / 32) / 2)
    wanted = torch.cat([(2 * math.pi * 16 * 0.3 * w).sin(), (2 * math.pi * 16 * 0.3 * w).cos()]) * math.sqrt(2)
    torch.testing.assert_close(features[0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(gaussian(c.float(), 64, 16.0)[0].double(), wanted, rtol=0, atol=1e-4)
    assert float(features.square().mean()) == pytest.approx(1)


# --- FIR resampling --------------------------------------------------------------------------------------------------------
KERNELS = [(1, 3, 3, 1), (1, 1), (1, 4, 2, 5, 3, 1)]  # the last is no mirror image of itself: a flipped filter would show


def upfirdn(image, kernel, up, down, pad):
    """Zeros between the pixels, zeros around, convolve, every down-th pixel: StyleGAN2's operation, spelled out."""
    rows, columns = image.shape
    wide = np.zeros((rows * up, columns * up))
    wide[::up, ::up] = image
    return convolve2d(np.pad(wide, pad), kernel, mode="valid")[::down, ::down]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("shape", [(8, 6), (2, 4)])
def test_fir_is_its_definition_with_stylegan2s_gain_and_padding(kernel, shape):
    x = np.random.default_rng(0).normal(size=(2, 3, *shape))
    k = np.outer(kernel, kernel) / np.sum(kernel) ** 2
    p = len(kernel) - 2
    for ours, taps, up, down, pad in [
        (fir.up, 4 * k, 2, 1, ((p + 1) // 2 + 1, p // 2)),
        (fir.down, k, 1, 2, ((p + 1) // 2, p // 2)),
        (fir.blur, k, 1, 1, ((p + 3) // 2, (p + 2) // 2)),
    ]:
        wanted = np.stack([[upfirdn(image, taps, up, down, (pad, pad)) for image in row] for row in x])
        np.testing.assert_allclose(ours(torch.from_numpy(x), kernel).numpy(), wanted, rtol=0, atol=1e-13)


def test_fir_keeps_constants_and_means_inside_the_image_and_up_is_four_times_the_adjoint_of_down():
    ones = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fir.up(ones)[..., 1:-1, 1:-1], torch.ones(1, 1, 14, 14).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(fir.down(ones)[..., 1:-1, 1:-1], torch.ones(1, 1, 2, 2).double(), rtol=0, atol=1e-15)
    x = normal_like(ones, 0)
    x[..., 0, :] = x[..., -1, :] = x[..., :, 0] = x[..., :, -1] = 0  # nothing reaches over the edge
    assert float(fir.down(x).mean()) == pytest.approx(float(x.mean()), abs=1e-15)
    assert float(fir.up(x).mean()) == pytest.approx(float(x.mean()), abs=1e-15)
    small, large = normal_like(torch.zeros(1, 1, 4, 4).double(), 1), normal_like(ones, 2)
    assert float((fir.up(small) * large).sum()) == pytest.approx(4 * float((small * fir.down(large)).sum()), abs=1e-13)


def test_fir_of_an_odd_side_repeats_its_edge():
    x = normal_like(torch.zeros(2, 3, 7, 5, dtype=torch.float64), 0)
    padded = nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    for f in (fir.down, fir.blur):
        torch.testing.assert_close(f(x), f(padded), rtol=0, atol=0)
    assert fir.down(x).shape == (2, 3, 4, 3)
    assert fir.down(x[..., :1, :1]).shape == (2, 3, 1, 1)


@pytest.mark.parametrize("f", [fir.up, fir.down, fir.blur], ids=["up", "down", "blur"])
def test_fir_has_every_derivative_and_runs_in_every_float_dtype(f):
    x = normal_like(torch.zeros(2, 2, 4, 3, dtype=torch.float64), 0).requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: f(z).square(), x)
    torch.testing.assert_close(torch.func.vmap(lambda z: f(z[None])[0])(x), f(x), rtol=0, atol=1e-14)
    for dtype, error in [(torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)]:
        out = f(x.to(dtype))
        assert out.dtype == dtype
        assert (out.double() - f(x)).abs().max() <= error * x.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (f(x.float()).double() - f(x)).abs().max() <= 3e-2 * x.abs().max()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fir.up([1.0]), TypeError, r"x is list; wanted a float tensor \[B, C, H, W\]"),
        (lambda: fir.down(torch.zeros(1, 1, 2, 2, dtype=torch.int64)), TypeError, r"x is \[1, 1, 2, 2\] int64; wanted a float"),
        (lambda: fir.down(torch.zeros(3, 2, 2)), ValueError, r"x is \[3, 2, 2\] float32; wanted \[B, C, H, W\]: x\[None\]"),
        (lambda: fir.up(torch.zeros(1, 1, 2, 2), (1, 2, 1)), ValueError, r"kernel is \(1, 2, 1\); wanted an even number of finite taps"),
        (lambda: fir.up(torch.zeros(1, 1, 2, 2), ()), ValueError, r"kernel is \(\); wanted an even number"),
        (lambda: fir.blur(torch.zeros(1, 1, 2, 2), (1, -1)), ValueError, r"kernel is \(1, -1\); wanted .* with a sum other than 0"),
    ],
)  # fmt: skip
def test_fir_says_what_is_wrong(call, error, match):
    with pytest.raises(error, match=match):
        call()


# --- DiT -------------------------------------------------------------------------------------------------------------------
def test_dit_positions_are_sines_and_cosines_of_row_and_column():
    positions = dit._positions(3, 5, 16)
    assert positions.shape == (15, 16)
    assert positions.dtype == torch.float64
    for row in range(3):
        for column in range(5):
            omega = 10000.0 ** (-np.arange(4) / 4)
            wanted = np.concatenate([np.sin(row * omega), np.cos(row * omega), np.sin(column * omega), np.cos(column * omega)])
            np.testing.assert_allclose(positions[5 * row + column].numpy(), wanted, rtol=0, atol=1e-15)
    assert len(dit._positions(32, 32, 64).unique(dim=0)) == 1024
    assert set(DiT((1, 8, 8), width=16, depth=1).state_dict()) == {
        k for k, _ in DiT((1, 8, 8), width=16, depth=1).named_parameters()
    }


def test_dit_patches_are_cut_row_by_row_and_put_back():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = dit._patches(x, 2)
    assert patches.shape == (2, 6, 12)
    for i in range(6):
        row, column = 2 * (i // 3), 2 * (i % 3)
        assert torch.equal(patches[:, i], x[:, :, row : row + 2, column : column + 2].flatten(1))
    assert torch.equal(dit._image(patches, (3, 4, 6), 2), x)


def test_dit_attends_as_scaled_dot_product_attention_does_on_queries_and_keys_of_mean_square_1():
    block = shaken("dit").blocks[0]
    h = normal_like(torch.zeros(2, 16, 16, dtype=torch.float64), 3)
    q, k, v = (z.unflatten(2, (2, 8)).transpose(1, 2) for z in block.qkv(h).chunk(3, dim=2))
    q, k = (nn.functional.rms_norm(z, (8,), gain, eps=1e-6) for z, gain in zip((q, k), block.gain, strict=True))
    wanted = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block._attend(h), wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        block.qkv.weight[:32] *= 1e3
        block.qkv.bias[:32] *= 1e3
    torch.testing.assert_close(block._attend(h), wanted, rtol=0, atol=1e-4)  # to the 1e-6 beside the mean square
    half = block.half()._attend(h.half())  # whose squares are beyond float16
    assert (half.double() - wanted).norm() <= 0.02 * wanted.norm()


def test_a_fresh_dit_block_is_the_identity():
    net = build("dit")
    h, e = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2, 16)
    assert torch.equal(net.blocks[1](h, e), h)


# --- a network of diffusers ------------------------------------------------------------------------------------------------
@pytest.fixture
def unet2d(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # not needed, and its import fails beside a torch of another build
    pytest.importorskip("diffusers")
    from diffusers.utils import import_utils

    monkeypatch.setattr(import_utils, "_torchvision_available", False)  # another test may have imported diffusers with it in sight
    from diffusers import UNet2DModel

    def make(**changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"), **changes,
            ).eval()  # fmt: skip

    return make


def test_a_network_of_diffusers_is_a_denoiser(unet2d):
    unet, sde = unet2d().double(), VP.from_betas(torch.linspace(1e-4, 0.02, 50))

    def steps(sde, t):  # as in the docstring
        c_skip, c_out, c_in, _ = parameterizations.eps(sde, t)
        return c_skip, c_out, c_in, len(sde.betas) * t - 1

    model = Preconditioned(FromDiffusers(unet), sde, steps)
    x = normal_like(torch.zeros(3, 1, 8, 8, dtype=torch.float64), 0)
    for i in (0, 17, 49):
        with torch.no_grad():
            eps = model.predict(x, torch.tensor((i + 1) / 50, dtype=torch.float64)).eps
            torch.testing.assert_close(eps, unet(x, i).sample, rtol=0, atol=1e-5)  # its times are float32
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).reshape(3, 1, 1, 1)
    assert model(x, t).shape == x.shape
    x.requires_grad_()
    assert torch.autograd.grad(model(x, t).sum(), x)[0].abs().sum() > 0


def test_a_network_of_diffusers_takes_labels(unet2d):
    unet = unet2d(num_class_embeds=4)
    x, c, labels = (
        torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, 2.5, 40.0]),
        torch.arange(3),
    )
    with torch.no_grad():
        assert torch.equal(FromDiffusers(unet)(x, c, labels), unet(x, c, class_labels=labels).sample)
        net, none = FromDiffusers(unet, unlabelled=3), unet(x, c, class_labels=torch.full((3,), 3)).sample
        assert torch.equal(net(x, c), none)
        mixed = net(x, c, torch.tensor([0, -1, 2]))
    torch.testing.assert_close(mixed[1], none[1], rtol=0, atol=1e-6)
    assert (mixed[0] - none[0]).abs().max() > 1e-5
