"""fit and EMA: that training reaches the truth, and what happens when it does not."""

import copy
import inspect
import math
import threading
from itertools import islice, repeat

import pytest
import torch
from laws import D, mixture
from torch import nn

import scoresde as s
from scoresde import EMA, VP, NonFiniteError, loss, parameterizations
from scoresde.ema import PowerEMA, exponent, posthoc, posthoc_coefficients
from scoresde.noise import seeded

X = seeded(range(16)).initial((16, 2), torch.float32)


def model(classes=0, seed=0, **kwargs):
    return s.Preconditioned(s.MLP(2, width=16, depth=1, classes=classes, seed=seed), VP(), **kwargs)


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- does it learn -------------------------------------------------------------------------------------------------------
def test_training_reaches_the_exact_likelihood(record_property):
    """An MLP, 300 steps on the 2-D mixture: its NLL on held-out draws of exact p_{t_min} is within 0.2 nats of the truth."""
    law, steps, batch = mixture(VP()), 300, 256
    data = law.sample(steps * batch, seeds=range(steps * batch)).float()
    net = s.Preconditioned(s.MLP(2, width=64, depth=2, emb=32), law.sde)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    ema, losses = EMA(net, 0.99), []
    for step in s.fit(net, data.split(batch), optimizer=optimizer, ema=ema, generator=generator()):
        schedule.step()
        losses.append(step.loss)
    first = torch.tensor(law.sde.t_min, dtype=D)
    held_out = law.sample(500, first, seeds=range(10**9, 10**9 + 500))
    found = s.log_prob(ema.module, held_out.float(), s.TorchDiffEq(rtol=1e-4, atol=1e-4)).value.double()
    gap = float((law.log_prob(held_out, first) - found).mean())
    record_property("gap", gap)
    print(f"NLL of the network minus the exact one: {gap:.3f} nats; last loss {losses[-1]:.3f}")
    assert abs(gap) < 0.2
    assert sum(losses[-50:]) < sum(losses[:50])


@pytest.mark.parametrize("weight", [loss.simple, loss.capped, loss.edm, loss.likelihood], ids=lambda w: w.__name__)
@pytest.mark.parametrize("fn", [parameterizations.eps, parameterizations.v, parameterizations.x0, parameterizations.velocity])
def test_every_weight_trains_every_parameterization(weight, fn):
    """Fixed data, times and noise (a generator set back): 30 steps of Adam lower the loss."""
    net = model(parameterization=fn)
    source, losses = generator(), []
    state = source.get_state()
    for step in s.fit(net, repeat(X, 30), weight=weight, optimizer=torch.optim.Adam(net.parameters(), lr=3e-3), generator=source):
        losses.append(step.loss)
        source.set_state(state)
    assert losses[-1] < losses[0]


def test_labels_are_learnt():
    """Two classes, two points: the conditional network tells them apart."""
    net = model(classes=2)
    points = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    batches = [(points[c], c) for c in (torch.arange(64) % 2).expand(150, 64)]
    steps = list(s.fit(net, batches, optimizer=torch.optim.Adam(net.parameters(), lr=1e-2), generator=generator()))
    assert len(steps) == 150
    t = torch.tensor(0.6, dtype=D)
    guess = net.condition(torch.tensor([0, 1]))(torch.zeros(2, 2), t)
    assert guess[0, 0] > 0.5
    assert guess[1, 0] < -0.5


# --- the generator -------------------------------------------------------------------------------------------------------
def test_fit_is_a_generator_that_the_caller_stops():
    net = model()
    before = weights(net)
    steps = s.fit(net, repeat(X), generator=generator())
    assert inspect.isgenerator(steps)
    assert equal(weights(net), before)
    seen = list(islice(steps, 3))
    assert [step.step for step in seen] == [1, 2, 3]
    assert all(isinstance(step, s.Step) and step.loss > 0 and step.grad_norm > 0 for step in seen)
    assert not equal(weights(net), before)
    assert net.training
    assert list(s.fit(net, [])) == []


def test_training_is_a_function_of_its_generator():
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("fresh", None), ("fresh again", None)):
        net = model()
        ema = EMA(net)
        steps = list(s.fit(net, repeat(X, 5), ema=ema, generator=None if seed is None else generator(seed)))
        runs[name] = ([step.loss for step in steps], weights(net), weights(ema.module))
    assert runs["a"][0] == runs["b"][0]
    assert equal(runs["a"][1], runs["b"][1])
    assert equal(runs["a"][2], runs["b"][2])
    assert runs["a"][0] != runs["c"][0]
    assert runs["fresh"][0] != runs["fresh again"][0]


def test_a_step_is_the_loss_its_gradient_and_the_optimizer():
    """One step written out: times and noise from the generator, dsm_loss, clipped gradient, SGD."""
    net, source = model(), generator()
    by_hand = copy.deepcopy(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    (step,) = s.fit(net, [X], weight=loss.simple, times=loss.uniform, optimizer=sgd, clip=0.05, generator=source)
    source = generator()
    u = torch.rand(16, generator=source, dtype=D)
    noise = torch.randn(16, 2, generator=source)
    value = s.dsm_loss(by_hand, X, loss.uniform(VP(), u), loss.simple, noise).mean()
    gradients = torch.autograd.grad(value, list(by_hand.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert step.loss == pytest.approx(float(value.detach()))
    assert step.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.05
    for p, q, g in zip(net.parameters(), by_hand.parameters(), gradients, strict=True):
        assert torch.allclose(p, q - 0.1 * g * (0.05 / norm), atol=1e-7)


def test_clip_may_be_infinite():
    net, other = model(), model()
    for each, clip in ((net, math.inf), (other, 1e9)):
        list(s.fit(each, [X], optimizer=torch.optim.SGD(each.parameters(), lr=0.1), clip=clip, generator=generator()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(weights(net), weights(other), strict=True))


def test_conditional_batches_reach_the_network():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x, c_noise, cond=None):
            seen.append(cond)
            return self.w * x

    net = s.Preconditioned(Net(), VP())
    labels = torch.arange(16)
    list(s.fit(net, [X, (X, labels), [X, labels], (X, None)], generator=generator()))
    assert seen[0] is None
    assert torch.equal(seen[1], labels)
    assert torch.equal(seen[2], labels)
    assert seen[3] is None
    assert net.cond is None


def test_only_the_optimizers_parameters_move():
    net = model()
    before = weights(net.net.enter)
    list(s.fit(net, [X, X], optimizer=torch.optim.SGD(net.net.leave.parameters(), lr=0.1), generator=generator()))
    assert equal(weights(net.net.enter), before)
    assert net.net.leave.weight.abs().sum() > 0


# --- failures ------------------------------------------------------------------------------------------------------------
class Cliff(nn.Module):
    """A network that returns NaN from call `after` on."""

    def __init__(self, after):
        super().__init__()
        self.w, self.after = nn.Parameter(torch.ones(2)), after

    def forward(self, x, c_noise):
        self.after -= 1
        return self.w * x * (math.nan if self.after < 0 else 1.0)


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("patience", [1, 3])
def test_nan_is_skipped_counted_and_after_k_in_a_row_raised(after, patience):
    net = s.Preconditioned(Cliff(after), VP())
    training = s.Training(net, torch.optim.Adam(net.parameters()), EMA(net))
    steps = s.fit(training, repeat(X), patience=patience, seed=0)
    done = list(islice(steps, after))
    kept, averaged, moments = weights(net), weights(training.emas[0].module), copy.deepcopy(training.optimizer.state_dict())
    skipped = list(islice(steps, patience - 1))
    with pytest.raises(NonFiniteError, match=rf"step {after + patience}: loss nan.* {patience}th .*in a row.*learning rate"):
        next(steps)
    assert not any(step.skipped for step in done)
    assert [(step.step, step.skipped) for step in skipped] == [(after + k, True) for k in range(1, patience)]
    assert (training.step, training.skipped, training.in_a_row) == (after + patience, patience, patience)
    assert equal(weights(net), kept)
    assert equal(weights(training.emas[0].module), averaged)
    assert training.emas[0].updates == after
    assert str(training.optimizer.state_dict()["state"]) == str(moments["state"])


def test_a_good_step_ends_the_count_in_a_row():
    class Flicker(Cliff):
        def forward(self, x, c_noise):
            self.after += 1
            return self.w * x * (math.nan if self.after % 3 else 1.0)

    net = s.Preconditioned(Flicker(0), VP())
    steps = list(s.fit(net, repeat(X, 12), patience=3, seed=0))
    assert [step.skipped for step in steps] == [True, True, False] * 4
    assert not math.isnan(float(net.net.w.detach().sum()))


def test_an_infinite_gradient_raises_too():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x, c_noise):
            return self.w.abs().sqrt() * x  # finite, with an infinite derivative at 0

    net = s.Preconditioned(Root(), VP())
    with pytest.raises(NonFiniteError, match=r"step 1: loss [0-9.]+, gradient norm (inf|nan)"):
        list(s.fit(net, [X], patience=1, generator=generator()))
    assert net.net.w.tolist() == [0.0, 0.0]


# --- EMA -----------------------------------------------------------------------------------------------------------------
class Buffered(nn.Module):
    """A float buffer, which is averaged, and a counter, which is copied."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x, c_noise):
        if self.training:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
            self.count += 1
        return self.w * x + self.mean


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0])
def test_ema_is_the_recursion_written_out(decay):
    """First a copy, then a <- d a + (1 - d) x with d = min(decay, (1 + n) / (10 + n)) at update n; buffers likewise."""
    net = s.Preconditioned(Buffered(), VP())
    ema = EMA(net, decay)
    w, mean = net.net.w.detach().clone(), net.net.mean.clone()
    for n, step in enumerate(s.fit(net, repeat(X, 12), ema=ema, generator=generator())):
        now = net.net.w.detach(), net.net.mean
        if n == 0:
            w, mean = (v.clone() for v in now)
        else:
            d = min(decay, (1 + n) / (10 + n))
            w, mean = d * w + (1 - d) * now[0], d * mean + (1 - d) * now[1]
        assert step.step == n + 1
        assert torch.allclose(ema.module.net.w, w, rtol=1e-5)
        assert torch.allclose(ema.module.net.mean, mean, rtol=1e-5, atol=1e-7)
        assert int(ema.module.net.count) == n + 1
    assert not torch.equal(ema.module.net.w, net.net.w) or decay == 0.0


def test_the_average_is_a_frozen_copy():
    net = model()
    ema = EMA(net)
    assert ema.module is not net
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in net.parameters())
    kept = weights(ema.module)
    list(s.fit(net, [X, X], generator=generator()))
    assert equal(weights(ema.module), kept)  # not told
    ema.update(net)
    assert equal(weights(ema.module), weights(net))  # the first update is a copy
    x = s.sample(ema.module, (3, 2), nfe=9, seeds=range(3)).x
    assert x.isfinite().all()
    assert isinstance(ema.module, s.Preconditioned)


def test_batch_norm_counters_do_not_stop_the_average():
    net = s.Preconditioned(nn.Sequential(), VP())
    net.net = nn.ModuleDict({"norm": nn.BatchNorm1d(2)})
    net.net.forward = lambda x, c_noise: net.net["norm"](x)
    ema = EMA(net)
    for _ in range(3):
        net(X, torch.tensor(0.5, dtype=D))
        ema.update(net)
    assert int(ema.module.net["norm"].num_batches_tracked) == 3


# --- resume and the state of a training ----------------------------------------------------------------------------------
def digest(training):
    """Everything that resumed training must share with training that never stopped."""
    tensors = [v for part in training.tensors().values() for v in part.values()]
    moments = [v for state in training.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [v.clone() for v in (*tensors, *moments)], training.state()


def fresh(optimizer=torch.optim.AdamW, **kwargs):
    net = s.Preconditioned(s.UNet((1, 8, 8), channels=8, dropout=0.2, classes=3, seed=1), VP())
    return s.Training(net, optimizer(net.parameters(), lr=1e-3), [EMA(net, 0.9), PowerEMA(net, 0.1)], **kwargs)


def images_of(step):
    n = torch.arange(8) + 8 * step
    return seeded(n.tolist()).initial((8, 1, 8, 8), torch.float32), n % 3


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_training_resumed_is_a_training_that_never_stopped(stop, precision):
    """Parameters, averages, moments, scale and every loss to the bit, dropout layers and dropped labels included."""
    how = {"seed": 5, "accumulate": 2, "label_dropout": 0.3, "rate": lambda n: min(1.0, n / 4)}
    whole = fresh(precision=precision)
    rows = list(s.fit(whole, images_of, steps=7, **how))
    first = fresh(precision=precision)
    begun = list(s.fit(first, images_of, steps=stop, **how))
    second = fresh(precision=precision)
    second.restore(copy.deepcopy(first.tensors()), copy.deepcopy(first.state()), copy.deepcopy(first.optimizer.state_dict()))
    torch.manual_seed(stop)  # what the global generator holds does not matter
    before = torch.get_rng_state()
    rest = list(s.fit(second, images_of, steps=7, **how))
    assert [step.step for step in rest] == list(range(stop + 1, 8))
    assert begun + rest == rows
    for a, b in zip(digest(whole)[0], digest(second)[0], strict=True):
        assert torch.equal(a, b)
    assert digest(whole)[1] == digest(second)[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_iterable_cannot_be_resumed_and_says_so():
    training = s.Training(model())
    list(s.fit(training, repeat(X, 2), seed=0))
    with pytest.raises(ValueError, match=r"after step 2.*order cannot be resumed.*data.Batches"):
        next(s.fit(training, repeat(X), seed=0))
    assert next(s.fit(training, lambda step: X, seed=0)).step == 3


def test_restoring_another_training_is_refused_by_name():
    one, other = fresh(), s.Training(model())
    with pytest.raises(ValueError, match=r"differ in \['ema_0.9', 'ema_std0.1'\]"):
        other.restore(one.tensors(), one.state(), None)
    tensors = one.tensors()
    tensors["model"].pop("enter.weight")
    with pytest.raises(ValueError, match=r"(?s)model of the checkpoint differs in .*enter.weight"):
        fresh().restore(tensors, one.state(), None)


def test_parts_of_a_batch_are_the_same_step_to_rounding():
    runs = []
    for accumulate in (1, 3, 16, 40):
        net = model()
        runs.append((list(s.fit(net, repeat(X, 5), accumulate=accumulate, seed=0)), weights(net)))
    for steps, values in runs[1:]:
        assert [a.loss for a in steps] == pytest.approx([a.loss for a in runs[0][0]], rel=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(values, runs[0][1], strict=True))


def test_the_rate_is_a_factor_on_the_optimizers_own():
    net = model()
    sgd = torch.optim.SGD([{"params": net.net.enter.parameters()}, {"params": net.net.leave.parameters(), "lr": 0.5}], lr=0.1)
    steps = list(s.fit(net, repeat(X, 4), optimizer=sgd, rate=lambda n: n / 4, seed=0))
    assert [step.lr for step in steps] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert [group["lr"] for group in sgd.param_groups] == [0.1, 0.5]


def test_integer_batches_are_transformed_on_the_device():
    cells, seen = s.Quantized(256), []
    raw = torch.randint(0, 256, (16, 2), dtype=torch.uint8, generator=generator())

    def transform(x, draws):
        seen.append((x.dtype, draws.initial_seed()))
        return cells.to_model(x, torch.rand(x.shape, generator=draws))

    list(s.fit(model(), lambda step: raw, transform=transform, steps=2, seed=0))
    assert [dtype for dtype, _ in seen] == [torch.uint8] * 2
    assert seen[0][1] != seen[1][1]
    with pytest.raises(TypeError, match=r"batch 1 is \[16, 2\] uint8; wanted transform="):
        list(s.fit(model(), lambda step: raw, steps=2, seed=0))


def test_labels_are_dropped_for_guidance():
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x, c_noise, cond):
            seen.append(cond.clone())
            return self.w * x

    labels = torch.arange(16)
    list(s.fit(s.Preconditioned(Net(), VP()), repeat((X, labels), 200), label_dropout=0.25, seed=0))
    seen = torch.stack(seen)
    assert abs(float((seen == -1).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / seen.numel()) ** 0.5
    assert ((seen == labels) | (seen == -1)).all()
    assert torch.equal(labels, torch.arange(16))


def test_an_objective_with_parameters_is_trained_and_kept():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.u = nn.Parameter(torch.zeros(()))

        def forward(self, denoiser, x0, t, weight, noise):
            return s.dsm_loss(denoiser, x0, t, weight, noise) * (-self.u).exp() + self.u

    net, objective = model(), Scaled()
    training = s.Training(net, objective=objective)
    list(s.fit(training, repeat(X, 3), seed=0))
    assert float(objective.u.detach()) != 0
    assert set(training.tensors()) == {"model", "objective"}
    with pytest.raises(ValueError, match=r"optimizer lacks the objective's own"):
        s.Training(net, torch.optim.Adam(net.parameters()), objective=Scaled())


def test_a_compiled_network_trains_the_same_parameters():
    plain, fast = model(), model()
    a = list(s.fit(plain, repeat(X, 3), seed=0))
    b = list(s.fit(fast, repeat(X, 3), seed=0, compile=True))
    assert [step.loss for step in a] == pytest.approx([step.loss for step in b], rel=1e-4)
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(weights(plain), weights(fast), strict=True))
    assert list(plain.state_dict()) == list(fast.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "kind", "words"),
    [
        ({"accumulate": 0}, ValueError, "accumulate is 0"),
        ({"patience": 0}, ValueError, "patience is 0"),
        ({"label_dropout": 1.5}, ValueError, "label_dropout is 1.5"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 1, "generator": torch.Generator()}, TypeError, "not both"),
        ({"rate": 0.1}, TypeError, "rate is float"),
        ({"transform": "x"}, TypeError, "transform is str"),
        ({"objective": 3}, TypeError, "objective is int"),
        ({"precision": torch.float64}, ValueError, "precision is torch.float64"),
        ({"ema": [3]}, TypeError, "ema holds"),
        ({"steps": -1}, ValueError, "steps is -1"),
    ],
)
def test_bad_arguments_of_fit(kwargs, kind, words):
    with pytest.raises(kind, match=words):
        next(s.fit(model(), repeat(X), **kwargs))


def test_a_training_has_its_own_optimizer():
    training = s.Training(model())
    with pytest.raises(ValueError, match="a Training has its optimizer"):
        next(s.fit(training, repeat(X), ema=EMA(training.denoiser)))
    with pytest.raises(ValueError, match="two averages are alike"):
        s.Training(training.denoiser, ema=[EMA(training.denoiser), EMA(training.denoiser)])


# --- half precision ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_and_gradient_are_finite_at_every_noise_level_in_half_precision(dtype):
    """sigma from 1e-4 to 1e3: sums of squares at sigma 50 and 1 / sigma^2 at 0.002 are infinite in float16."""
    sde = s.VE(sigma_min=1e-4, sigma_max=1e3)
    net = s.Preconditioned(s.UNet((3, 8, 8), channels=8), sde)
    x0 = seeded(range(200)).initial((200, 3, 8, 8), torch.float32)
    t = sde.time(torch.linspace(-13.8, 18.4, 200, dtype=D)).clamp(sde.t_min, sde.t_max)
    (step,) = s.fit(net, [x0], times=lambda sde, u: t, precision=dtype, seed=0)
    assert not step.skipped
    (again,) = s.fit(s.Preconditioned(s.UNet((3, 8, 8), channels=8), sde), [x0], times=lambda sde, u: t, seed=0)
    assert step.loss == pytest.approx(again.loss, rel=0.02)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_float16_scales_its_loss_and_finds_the_scale_again():
    training = s.Training(model(), precision=torch.float16)
    assert training.scaler.is_enabled()
    training.scaler._init_scale = 2.0**40  # so large that the first gradients overflow
    steps = list(s.fit(training, repeat(X, 40), patience=40, seed=0))
    assert steps[0].skipped
    assert not steps[-1].skipped
    assert training.scaler.get_scale() < 2.0**40
    assert training.skipped == sum(step.skipped for step in steps)


# --- averages made afterwards --------------------------------------------------------------------------------------------
def test_the_exponent_inverts_the_width():
    for std in (0.01, 0.05, 0.1, 0.2, 0.288):
        g = exponent(std)
        assert ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(std, rel=1e-12)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)  # Karras et al. 2024, section 3.1
    assert exponent(0.1) == pytest.approx(6.94, abs=0.01)
    assert exponent(1 / 12**0.5) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="at most"):
        exponent(0.3)


def test_the_power_average_weighs_as_a_power():
    """Against the weighted mean of all states with weights that follow from the recursion."""
    net = s.Preconditioned(nn.Linear(1, 1, bias=False), VP()).double()
    ema, states = PowerEMA(net, 0.1), []
    for n in range(1, 201):
        net.net.weight.data.fill_(math.sin(n) + n / 50)
        states.append(float(net.net.weight.detach()))
        ema.update(net)
    g, n = exponent(0.1), torch.arange(1, 201, dtype=D)
    weight = (n / 200) ** (g + 1) - ((n - 1) / 200) ** (g + 1)
    assert float(ema.module.net.weight) == pytest.approx(float((weight * torch.tensor(states, dtype=D)).sum()), rel=1e-10)


def test_stored_averages_make_one_of_any_width():
    """A random walk of 64 weights, 1,000 steps, two averages stored every 50: widths in between, beyond and earlier."""
    walk = (0.05 * seeded([3]).initial((1, 1000, 64), D)[0]).cumsum(0)
    net = s.Preconditioned(nn.Linear(64, 1, bias=False), VP()).double()
    tracked = {std: PowerEMA(net, std) for std in (0.05, 0.07, 0.1, 0.15)}
    stored, truth = [], {}
    for n, value in enumerate(walk, 1):
        net.net.weight.data[0] = value
        for std, ema in tracked.items():
            ema.update(net)
            if n % 50 == 0 and std in (0.05, 0.1):
                stored.append((n, std, {"w": ema.module.net.weight.detach().clone()}))
            truth[n, std] = ema.module.net.weight.detach().clone()
    for std, step in ((0.05, 1000), (0.07, 1000), (0.15, 1000), (0.1, 800)):
        usable = [entry for entry in stored if entry[0] <= step]
        made = posthoc(usable, std, step)["w"]
        error, size = (made - truth[step, std]).norm(), (walk[step - 1] - truth[step, std]).norm()
        assert error < 0.02 * size, (std, step, float(error / size))
        assert sum(posthoc_coefficients([e[:2] for e in usable], step, std)) == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match=r"averages of steps \[1000\], after step 975"):
        posthoc_coefficients([(950, 0.05), (1000, 0.05)], 975, 0.1)


def test_integer_tensors_of_a_stored_average_are_the_latests():
    made = posthoc([(1, 0.05, {"n": torch.tensor(1)}), (2, 0.05, {"n": torch.tensor(2)})], 0.05)
    assert int(made["n"]) == 2


def test_loss_by_level_is_the_loss_and_does_not_depend_on_the_batch():
    law = mixture(VP())
    x0 = law.sample(500, seeds=range(500)).float()
    exact = s.train.loss_by_level(law, x0, 5, weight=loss.simple)
    assert torch.equal(
        exact[0], torch.linspace(*(float(law.sde.logsnr(torch.tensor(t, dtype=D))) for t in (1e-3, 1.0)), 5, dtype=D)
    )
    assert torch.allclose(exact[1], s.train.loss_by_level(law, x0, 5, weight=loss.simple, batch=7)[1], rtol=1e-5)
    worse = s.train.loss_by_level(model().eval(), x0, 5, weight=loss.simple)
    assert (worse[1][1:] > exact[1][1:]).all()  # at the first level there is nothing to know but the noise
    assert not torch.equal(exact[1], s.train.loss_by_level(law, x0, 5, weight=loss.simple, seed=1)[1])


# --- what would go wrong in silence --------------------------------------------------------------------------------------
def test_an_objective_returns_a_loss_a_row():
    with pytest.raises(ValueError, match=r"objective returned \[\] float32; wanted a loss a row, \[16\]"):
        next(s.fit(model(), repeat(X), objective=lambda *a: s.dsm_loss(*a).mean(), seed=0))
    with pytest.raises(ValueError, match="objective returned float"):
        next(s.fit(model(), repeat(X), objective=lambda *a: 1.0, seed=0))


def test_a_skipped_step_leaves_no_trace_in_buffers():
    class Sick(Buffered):
        def forward(self, x, c_noise):
            out = super().forward(x, c_noise)
            if int(self.count) == 2:
                self.mean = self.mean * math.nan
            return out * self.mean.sum().nan_to_num(math.nan)

    net = s.Preconditioned(Sick(), VP())
    ema = EMA(net)
    before = []
    for step in s.fit(net, repeat(X, 2), ema=ema, seed=0):
        before.append((step.skipped, net.net.mean.clone(), int(net.net.count)))
    assert [skipped for skipped, _, _ in before] == [False, True]
    assert torch.equal(before[0][1], before[1][1])
    assert before[1][2] == 1
    assert ema.module.net.mean.isfinite().all()


def test_a_bad_update_is_found_at_the_next_step():
    net = model()
    rates = iter([1.0, 1.0])
    adam = torch.optim.SGD(net.parameters(), lr=3e38)
    with pytest.raises(NonFiniteError, match="an earlier update has made the parameters so"):
        list(
            s.fit(
                net,
                repeat(1e3 * X, 20),
                weight=loss.simple,
                optimizer=adam,
                clip=math.inf,
                patience=20,
                rate=lambda n: next(rates, 1.0),
                seed=0,
            )
        )
    assert not s.Training(net).finite()
    with pytest.raises(ValueError, match=r"rate\(1\) is nan"):
        next(s.fit(model(), repeat(X), rate=lambda n: math.nan, seed=0))


def test_an_optimizer_or_an_average_of_another_module_is_refused():
    with pytest.raises(ValueError, match="moves no parameter of the denoiser"):
        s.Training(model(), torch.optim.Adam(model(seed=1).parameters()))
    frozen = model().requires_grad_(False)
    with pytest.raises(ValueError, match="has no parameters to train"):
        s.Training(frozen)
    with pytest.raises(TypeError, match=r"ema is 0.999; wanted EMA"):
        s.Training(model(), ema=0.999)
    with pytest.raises(ValueError, match=r"\['ema_0.999'\] are averages of another module"):
        s.Training(model(), ema=EMA(model(classes=2)))
    with pytest.raises(TypeError, match="labels of batch 1 are list"):
        next(s.fit(model(classes=2), [(X, [0] * 16)], label_dropout=0.5, seed=0))


def test_restoring_changes_nothing_when_it_fails():
    one, other = fresh(), fresh(torch.optim.SGD)
    list(s.fit(one, images_of, steps=2, seed=0))
    kept = weights(other.denoiser)
    with pytest.raises(ValueError, match="its optimizer is AdamW, this one SGD"):
        other.restore(one.tensors(), one.state(), one.optimizer.state_dict())
    assert equal(weights(other.denoiser), kept)
    moments = copy.deepcopy(one.optimizer.state_dict())
    moments["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is \[3\] float32"):
        fresh().restore(one.tensors(), one.state(), moments)
    half = {name: {k: v.half() if v.is_floating_point() else v for k, v in part.items()} for name, part in one.tensors().items()}
    with pytest.raises(ValueError, match="model of the checkpoint differs in"):
        fresh().restore(half, one.state(), None)


def test_threads_train_as_one_does():
    nets = [s.Preconditioned(s.UNet((1, 8, 8), channels=8, dropout=0.5, classes=3), VP()) for _ in range(4)]
    found = {}

    def work(i):
        list(s.fit(nets[i], images_of, steps=3, seed=7))
        found[i] = weights(nets[i])

    work(3)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(equal(found[3], values) for values in found.values())


def test_batches_that_end_early_say_so():
    with pytest.warns(UserWarning, match="ended after step 3 of 9"):
        assert len(list(s.fit(model(), repeat(X, 3), steps=9, seed=0))) == 3
    with pytest.raises(ValueError, match="batch 1 has no labels"):
        next(s.fit(model(classes=2), repeat(X), label_dropout=0.1, seed=0))
