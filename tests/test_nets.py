"""The nets: shapes, dtypes, seeds, gradients, conditioning, function transforms, and what they refuse."""

import json

import pytest
import torch
from torch import nn

import scoresde.nets
from scoresde.nets import MLP, UNet
from scoresde.nets.embed import OMEGA_HIGH, fourier

# Small nets, one of each kind of layer: (class, constructor arguments).
NETS = {
    "mlp": (MLP, {"shape": (3,), "width": 16, "depth": 2}),
    "mlp-classes": (MLP, {"shape": [2, 3], "width": 16, "depth": 1, "classes": 3, "emb": 8}),
    "unet": (UNet, {"shape": (1, 8, 8), "channels": 8}),
    "unet-attention": (UNet, {"shape": (2, 7, 5), "channels": 8, "multipliers": (1, 2, 2), "attention": (1, 2)}),
    "unet-classes": (UNet, {"shape": (3, 6, 9), "channels": 12, "blocks": 2, "classes": 3}),
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
    assert {cls.__name__ for cls, _ in NETS.values()} == set(scoresde.nets.__all__)


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


def test_autocast_takes_a_float32_net():
    net = shaken("unet-attention", torch.float32)
    x, c, _ = inputs(net, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, c)
    assert (out.float() - net(x, c)).norm() <= 0.2 * net(x, c).norm()


def test_dropout_acts_in_training_alone():
    net = shaken("unet", torch.float32, dropout=0.5)
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
    ],
)
def test_a_bad_constructor_argument_is_named(make, error, match):
    with pytest.raises(error, match=match):
        make()
