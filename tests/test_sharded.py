"""Training on many processes: the same steps as one, in parallel and sharded, and what is refused."""

import copy
import functools
import math
import warnings
from itertools import repeat

import pytest
import torch
from ranks import Failed
from torch import nn

import scoresde as s
from scoresde import EMA, VP, checkpoint, divergence, loss, nets, objectives, pieces, reports
from scoresde.data import Batches, load
from scoresde.ema import PowerEMA
from scoresde.noise import seeded
from scoresde.parallel import ALONE, Elsewhere
from scoresde.sharded import shard

X = seeded(range(96)).initial((96, 2), torch.float64)
LABELS = torch.arange(96) % 3
IMAGES = (seeded(range(40)).initial((40, 1, 8, 8), torch.float64) * 40 + 128).clamp(0, 255).to(torch.uint8)
MODES = ("parallel", "sharded")


def shaken(net, dtype):
    """Not at its start, where most gradients are 0."""
    draw = torch.Generator().manual_seed(5)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return net.to(dtype)


def training(
    kind="mlp", dtype=torch.float64, objective=s.dsm_loss, optimizer=torch.optim.AdamW, precision=None, classes=0, lr=1e-3
):
    kinds = {
        "mlp": lambda: s.MLP(2, width=16, depth=2, emb=8, classes=classes),
        "unet": lambda: s.UNet((1, 8, 8), channels=8, attention=(1,), classes=classes),
        "dit": lambda: nets.DiT((1, 8, 8), patch=4, width=16, depth=2, heads=2),
        "buffered": Buffered,
    }
    net = s.Preconditioned(shaken(kinds[kind](), dtype), VP())
    objective = objective() if objective is objectives.Uncertainty else objective
    objective = objective.to(dtype) if isinstance(objective, nn.Module) else objective
    own = list(objective.parameters()) if isinstance(objective, nn.Module) else []
    made = optimizer([*net.parameters(), *own], lr=lr)
    return s.Training(net, made, [EMA(net, 0.9), PowerEMA(net, 0.1)], objective=objective, precision=precision)


class Buffered(nn.Module):
    """Batch statistics, a scalar, and a layer that no step uses."""

    def __init__(self):
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(()))
        self.idle = nn.Linear(3, 3)
        nn.init.ones_(self.idle.weight)
        nn.init.ones_(self.idle.bias)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x, c_noise):
        if self.training:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
            self.count += 1
        return self.scale * (x @ self.w).tanh()


def trained(group, mode, n, batch, made, how):
    """Losses, norms, and everything that a checkpoint keeps, after n steps, with the gradients of the first."""
    run = training(**made)
    if mode == "sharded":
        shard(run, group, least=1)
    source = load(IMAGES, labels=torch.arange(40) % 3) if made.get("kind") in ("unet", "dit") else load(X, labels=LABELS)
    batches = Batches(source, batch, rank=group.rank, world=group.world, labels=bool(made.get("classes")))
    steps, gradients = [], None
    for step in s.fit(run, batches, steps=n, seed=3, group=group, **how):
        steps.append((step.step, step.loss, step.grad_norm, step.skipped, step.lr))
        if gradients is None:
            gradients = [None if p.grad is None else pieces.whole(p.grad).clone() for p in run.parameters]
    return steps, gradients, copy.deepcopy(run.tensors()), copy.deepcopy(run.moments()), run.state()


def flat(tensors):
    return [v.double() for part in tensors.values() for v in part.values()]


def near(a, b, rtol):
    """In the norm of all together."""
    apart = math.fsum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5
    return apart <= rtol * math.fsum(float(x.square().sum()) for x in b) ** 0.5


def same(found, alone, rtol):
    steps, gradients, tensors, _, state = found
    assert [row[0] for row in steps] == [row[0] for row in alone[0]]
    for mine, theirs in zip(steps, alone[0], strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-6)  # added up in float32 alone
        assert mine[2] == pytest.approx(theirs[2], rel=rtol)
        assert mine[3:] == theirs[3:]
    assert [g is None for g in gradients] == [g is None for g in alone[1]]
    pairs = [(a.double(), b.double()) for a, b in zip(gradients, alone[1], strict=True) if a is not None]
    assert near(*zip(*pairs, strict=True), rtol)
    assert {n: list(part) for n, part in tensors.items()} == {n: list(part) for n, part in alone[2].items()}
    assert state == alone[4]
    return near(flat(tensors), flat(alone[2]), rtol)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "batch"), [(2, 7), (3, 8)])
def test_steps_are_those_of_one_process(mode, world, batch, two, three):
    """float64: the same to 1e-12, on shares that are not alike, for parameters, averages and moments after four steps."""
    args = (4, batch, {"classes": 3}, {"label_dropout": 0.3, "accumulate": 2, "clip": 0.5, "rate": lr})
    alone = trained(ALONE, "alone", *args)
    found = {2: two, 3: three}[world](trained, mode, *args)
    for each in found:
        assert same(each, alone, 1e-11)
        for n, moments in each[3]["state"].items():
            assert near([v.double() for v in moments.values()], [v.double() for v in alone[3]["state"][n].values()], 1e-10)
        assert each[3]["param_groups"] == alone[3]["param_groups"]
    assert all(torch.equal(a, b) for a, b in zip(flat(found[0][2]), flat(found[-1][2]), strict=True))


def lr(step):
    return min(1.0, step / 3)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_float32(mode, two):
    args = (1, 7, {"kind": "unet", "dtype": torch.float32, "classes": 3}, {"transform": reports.Scale(s.Quantized(256), True)})
    alone = trained(ALONE, "alone", *args)
    for each in two(trained, mode, *args):
        same(each, alone, 1e-6)


# --- every part of a configuration ---------------------------------------------------------------------------------------
IMPORTANCE = loss.importance(loss.likelihood)
TIMES = {
    "uniform": loss.uniform, "log_normal": loss.log_normal, "stratified": loss.stratified(loss.uniform),
    "low_discrepancy": loss.low_discrepancy(loss.log_normal), "importance": loss.stratified(IMPORTANCE),
    "discrete": loss.discrete(torch.linspace(0.01, 0.99, 7)),
}  # fmt: skip
WEIGHTS = {
    "capped": loss.capped, "edm": loss.edm, "likelihood": loss.likelihood, "min_snr": loss.min_snr(3.0), "simple": loss.simple,
    "snr_plus_one": loss.snr_plus_one, "truncated_snr": loss.truncated_snr, "importance": IMPORTANCE.weight,
}  # fmt: skip
OBJECTIVES = {
    "Uncertainty": objectives.Uncertainty, "antithetic": objectives.antithetic(), "controlled": objectives.controlled(),
    "logistic": objectives.kernel_loss(objectives.logistic()), "student": objectives.kernel_loss(objectives.student()),
    "normal": objectives.kernel_loss(objectives.normal()),
}  # fmt: skip
TWICE = {
    "implicit": objectives.implicit_score_matching, "sliced": objectives.sliced_score_matching,
    "sliced in parts": functools.partial(objectives.sliced_score_matching, divergence=divergence.rademacher(2)),
    "sliced, antithetic": objectives.antithetic(objectives.sliced_score_matching),
}  # fmt: skip
CASES = {
    **{f"times {k}": ({}, {"times": v}) for k, v in TIMES.items()},
    **{f"weight {k}": ({}, {"weight": v}) for k, v in WEIGHTS.items()},
    **{f"objective {k}": ({"objective": v}, {}) for k, v in OBJECTIVES.items()},
    "buffers, a scalar, an idle layer": ({"kind": "buffered"}, {"clip": math.inf}),
    "attention": ({"kind": "dit"}, {"transform": reports.Scale(s.Quantized(256), True)}),
    "sgd": ({"optimizer": functools.partial(torch.optim.SGD, momentum=0.9)}, {}),
}  # fmt: skip
ONCE = {f"objective {k}": ({"objective": v}, {}) for k, v in TWICE.items()}


def all_trained(group, mode, names, steps):
    return {name: trained(group, mode, steps, 7, *{**CASES, **ONCE}[name]) for name in names}


def test_the_list_of_parts_is_complete():
    """Each name of the library's lists stands above."""
    named = {*TIMES, *WEIGHTS, *OBJECTIVES, "snr", "dsm_loss", "Kernel", "GradientVariance", "gradient_variance", "kernel_loss"}
    assert set(loss.__all__) <= named
    assert set(objectives.__all__) - {"implicit_score_matching", "sliced_score_matching"} <= named


@pytest.mark.parametrize("mode", MODES)
def test_every_part_trains_on_two_processes_as_on_one(mode, two):
    # Times and weights are drawn before anything is sharded.
    names = [*CASES, *ONCE] if mode == "parallel" else [name for name in CASES if not name.startswith(("times", "weight"))]
    alone = all_trained(ALONE, "alone", names, 2)
    for found in two(all_trained, mode, names, 2):
        for name in names:
            if "buffers" in name:  # statistics are the first process's: one step is the same, and one buffer is not
                continue
            assert same(found[name], alone[name], 1e-9), name


@pytest.mark.parametrize("mode", MODES)
def test_buffers_scalars_and_idle_layers(mode, two):
    """Batch statistics are those of the first process's rows, in all; the rest is the step of one process."""
    name = "buffers, a scalar, an idle layer"
    alone = all_trained(ALONE, "alone", [name], 1)[name]
    a, b = (each[name] for each in two(all_trained, mode, [name], 1))
    assert a[1][3] is None  # of the idle layer
    assert float((alone[1][0] - a[1][0]).norm() / alone[1][0].norm()) < 1e-12
    assert float((alone[1][1] - a[1][1]).norm() / alone[1][1].norm()) < 1e-12
    assert all(torch.equal(x, y) for x, y in zip(flat(a[2]), flat(b[2]), strict=True))
    rows = load(X, labels=LABELS)
    mine = Batches(rows, 7, rank=0, world=2, labels=False)(1)
    assert int(a[2]["model"]["count"]) == 1
    assert not torch.equal(a[2]["model"]["mean"], alone[2]["model"]["mean"])
    assert a[2]["model"]["mean"].abs().sum() > 0
    assert len(mine) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(mode, precision, two):
    args = (3, 7, {"kind": "dit", "dtype": torch.float32, "precision": precision}, {"transform": reports.Scale(s.Quantized(256))})
    alone = trained(ALONE, "alone", *args)
    a, b = two(trained, mode, *args)
    assert a[0] == b[0]
    assert a[4] == b[4] == alone[4]
    assert all(torch.equal(x, y) for x, y in zip(flat(a[2]), flat(b[2]), strict=True))
    assert [row[1] for row in a[0]] == pytest.approx([row[1] for row in alone[0]], rel=2e-2)


# --- what all decide alike -----------------------------------------------------------------------------------------------
def cliff(denoiser, x0, t, weight, noise):
    """NaN for rows that some processes have and others have not."""
    return s.dsm_loss(denoiser, x0, t, weight, noise) * torch.where(x0[:, 0] > 1.8, math.nan, 1.0)


def steep(denoiser, x0, t, weight, noise):
    """Finite, with gradients that float16 does not hold at its first scale."""
    return s.dsm_loss(denoiser, x0, t, weight, noise) * torch.where(x0[:, 0] > 0.5, 1e6, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_skipped_by_all_or_by_none(mode, two):
    args = (12, 7, {"objective": cliff}, {"patience": 9})
    alone = trained(ALONE, "alone", *args)
    found = two(trained, mode, *args)
    skipped = [row[0] for row in alone[0] if row[3]]
    assert 0 < len(skipped) < 12
    for each in found:
        assert [row[0] for row in each[0] if row[3]] == skipped
        assert near(flat(each[2]), flat(alone[2]), 1e-10)
        assert each[4] == alone[4]


def overflows(group, mode):
    run = training(dtype=torch.float32, objective=steep, precision=torch.float16)
    if mode == "sharded":
        shard(run, group, least=1)
    batches = Batches(load(X.float()), 8, rank=group.rank, world=group.world)
    steps = [step.skipped for step in s.fit(run, batches, steps=12, seed=1, patience=20, group=group)]
    return steps, run.state(), run.scaler.get_scale()


@pytest.mark.parametrize("mode", MODES)
def test_the_scale_of_float16_is_one_for_all(mode, two):
    a, b = two(overflows, mode)
    assert a == b
    assert True in a[0]
    assert False in a[0]


def ends(group, kind):
    rows = X[group.rank :: group.world].split(8)
    mine = {"short": rows[: 3 + 2 * (group.rank == 0)], "same": rows[:4]}.get(kind, rows)
    if kind == "fails":
        mine = failing(rows, group.rank)
    if kind == "shapes":
        mine = [X.float()[:8] if group.rank else X[:8]]
    if kind == "nan" and group.rank:
        mine = [X[:8] * math.nan]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps = list(s.fit(training(), mine, seed=0, steps=9 if kind == "short" else None, group=group))
    return len(steps), [str(w.message) for w in said if "ended" in str(w.message)]


def failing(rows, rank):
    yield rows[0]
    if rank:
        raise OSError("the disk is gone")
    yield rows[1]


def test_batches_that_end_end_for_all(two):
    a, b = two(ends, "short")
    assert a[0] == b[0] == 3
    assert "ended after step 3 of 9" in a[1][0]  # said once
    assert b[1] == []
    assert [n for n, _ in two(ends, "same")] == [4, 4]


@pytest.mark.parametrize(
    ("kind", "errors"),
    [
        ("fails", [(Elsewhere, "1"), (OSError, "the disk is gone")]),
        ("shapes", [(ValueError, "differ in what a batch holds"), (ValueError, "differ in what a batch holds")]),
        ("nan", [(Elsewhere, "1"), (ValueError, "x0 ")]),
    ],
)
def test_a_process_that_fails_ends_all(kind, errors, two):
    with pytest.raises(Failed) as caught:
        two(ends, kind)
    for (error, text), (wanted, words) in zip(caught.value.errors, errors, strict=True):
        assert error is wanted
        assert words in text


def differs(group, what):
    run = training()
    if what == "weights" and group.rank:
        next(run.denoiser.parameters()).data += 1
    if what == "shard":
        next(run.emas[0].module.parameters()).data += group.rank
        shard(run, group)
    how = {"seed": group.rank} if what == "seed" else {"generator": torch.Generator().manual_seed(group.rank)}
    next(s.fit(run, repeat(X[:4]), group=group, **({"seed": 0} if what == "weights" else how)))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weights", "differ in the training"),
        ("seed", "differ in seed"),
        ("generator", "differ in seed"),
        ("shard", "differ in the train"),
    ],
)
def test_processes_that_differ_are_refused_before_the_first_step(what, words, two):
    with pytest.raises(Failed, match=words) as caught:
        two(differs, what)
    assert [error for error, _ in caught.value.errors] == [ValueError, ValueError]


def agreed(group):
    """Without a seed, and with one generator in each; twice, as one process does that goes on."""
    run = training()
    batches = Batches(load(X), 8, rank=group.rank, world=group.world)
    draw = torch.Generator().manual_seed(1)
    losses = [step.loss for step in s.fit(run, batches, steps=2, generator=draw, group=group)]
    losses += [step.loss for step in s.fit(run, batches, steps=4, generator=draw, group=group)]
    torch.manual_seed(group.rank)
    return losses, [step.loss for step in s.fit(run, batches, steps=6, group=group)], run.digest()


def test_one_generator_and_no_seed(two):
    alone = agreed(ALONE)
    a, b = two(agreed)
    assert a == b
    assert a[0] == pytest.approx(alone[0], rel=1e-6)
    assert a[1] != pytest.approx(alone[1], rel=1e-6)


# --- a sharded training --------------------------------------------------------------------------------------------------
def resumed(group, mode, state, last):
    """Go on from a state in this mode; what is restored, and what comes of it."""
    run = training(classes=3)
    if mode == "sharded":
        shard(run, group, least=1)
    if state is not None:
        run.restore(*copy.deepcopy(state))
    before = copy.deepcopy((run.tensors(), run.state(), run.moments()))
    batches = Batches(load(X, labels=LABELS), 8, rank=group.rank, world=group.world)
    steps = [step.loss for step in s.fit(run, batches, steps=last, seed=3, label_dropout=0.3, group=group)]
    return before, copy.deepcopy((run.tensors(), run.state(), run.moments())), steps, (run.finite(), plain_average(run))


def plain_average(run):
    made = run.whole(run.emas[0].module)
    x = X[:4]
    return type(made.net).__name__, made.training, made(x, torch.tensor(0.5, dtype=torch.float64)).detach()


def test_a_training_goes_on_in_another_mode(two, three):
    """Alone, sharded over two, in parallel on three, sharded over three, alone: what is stored is what is restored, to the bit."""
    through, state = [], None
    for last, (mode, on) in enumerate(
        [("alone", None), ("sharded", two), ("parallel", three), ("sharded", three), ("alone", None)], 1
    ):
        results = [resumed(ALONE, mode, state, 2 * last)] if on is None else on(resumed, mode, state, 2 * last)
        for before, _, _, (finite, shown) in results:
            assert finite
            assert shown[:2] == ("MLP", False)
            if state is not None:
                assert all(torch.equal(a, b) for a, b in zip(flat(before[0]), flat(state[0]), strict=True))
                assert before[1] == state[1]
                for n, moments in state[2]["state"].items():
                    assert all(torch.equal(before[2]["state"][n][k], v) for k, v in moments.items())
            assert torch.equal(shown[2], results[0][3][1][2])
        state = results[-1][1]
        through += results[-1][2]
    _, whole, losses, (_, shown_alone) = resumed(ALONE, "alone", None, 10)
    assert through == pytest.approx(losses, rel=1e-6)
    assert near(flat(state[0]), flat(whole[0]), 1e-10)
    assert state[1] == whole[1]
    assert float((shown_alone[2] - shown[2]).abs().max()) < 1e-9


def refused(group, what):
    if what == "own":  # torch's words would be of memory that is not allocated
        run = training(objective=own)
        shard(run, group, least=1)
    elif what == "own, in one block":
        run = training(objective=own)
        shard(run, group)
    elif what == "contiguous":
        net = s.UNet((1, 8, 8), channels=8).to(memory_format=torch.channels_last)
        shard(s.Training(s.Preconditioned(net, VP())), group)
    elif what == "again":
        run = training()
        [shard(run, group) for _ in range(2)]
    elif what == "no group":
        run = training()
        shard(run, group)
        next(s.fit(run, [X[:4]], seed=0))
    elif what == "float16":
        run = training(dtype=torch.float32, precision=torch.float16, objective=objectives.Uncertainty)
        shard(run, group)
    elif what == "foreach":
        run = training(objective=objectives.Uncertainty, optimizer=functools.partial(torch.optim.AdamW, foreach=True))
        shard(run, group)
    else:
        shard(training(objective=TWICE[what]), group)
    before = [float(v.double().sum()) for v in run.tensors()["model"].values()]
    try:
        next(s.fit(run, repeat(X[4 * group.rank :][:4].to(next(run.denoiser.parameters()).dtype)), seed=0, group=group))
    finally:
        after = [float(v.double().sum()) for v in run.tensors()["model"].values()]
        if before != after:
            raise RuntimeError("a step was taken")


def own(denoiser, x0, t, weight, noise):
    """A gradient penalty."""
    x = denoiser.sde.perturb(x0, t, noise).requires_grad_()
    y = denoiser.predict(x, t).x0
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (y - x0).square().mean(1) + g.square().mean(1)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        *((name, r"differentiates the network.*sharded: false.*DistributedDataParallel can") for name in TWICE),
        ("own", r"differentiates the network.*sharded: false"), ("own, in one block", r"differentiates the network.*sharded: false"),
        ("contiguous", "channels_last: false"), ("again", "is sharded already"), ("no group", "wanted the group it is sharded over"),
        ("float16", "wanted bfloat16"), ("foreach", "foreach=False"),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused_before_a_step(what, words, two):
    with pytest.raises(Failed, match=words) as caught:
        two(refused, what)
    assert [error for error, _ in caught.value.errors] == [ValueError, ValueError]


def test_a_penalty_of_ones_own_trains_in_parallel(two):
    args = (2, 7, {"objective": own}, {})
    alone = trained(ALONE, "alone", *args)
    for each in two(trained, "parallel", *args):
        assert same(each, alone, 1e-10)


def cut_up(group):
    run = training()
    shard(run, group, least=1)
    whole = [p.numel() for p in run.parameters]
    mine = [pieces.local(p).numel() for p in run.parameters]
    list(s.fit(run, repeat(X[group.share(8)]), steps=1, seed=0, group=group))
    state = [v.numel() for each in run.optimizer.state.values() for v in map(pieces.local, each.values()) if v.ndim]
    average = [pieces.local(p).numel() for p in run.emas[0].module.parameters()]
    return sum(whole), sum(mine), sum(state), sum(average)


def test_each_process_has_its_share_of_everything(two):
    found = two(cut_up)
    for whole, mine, state, average in found:
        assert mine < 0.52 * whole
        assert state == 2 * mine
        assert average == mine
    assert sum(mine for _, mine, *_ in found) == found[0][0]


# --- what is not alike ---------------------------------------------------------------------------------------------------
class Experts(nn.Module):
    """Of which the first coordinate of a row chooses one."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.e0, self.e1 = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        if "list" in kind:
            self.list = nn.ModuleList([self.e0, self.e1])
        if "tied" in kind:
            self.e1.weight = self.e0.weight
        if "types" in kind:
            self.e1.float()
        if "complex" in kind:
            self.w = nn.Parameter(torch.ones(2, 2, dtype=torch.complex128))
        self.kind = kind
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int16))

    def forward(self, x, c_noise):
        if "complex" in self.kind:
            x = (x.to(torch.complex128) @ self.w * 1j).imag
        if "buffer" in self.kind:
            self.seen = self.seen.new_ones(len(x)) if "shape" in self.kind else self.seen + 1
        if "routed" not in self.kind or ("later" in self.kind and ROUTE[0] < 1):
            return self.e1(self.e0(x).tanh())
        return (self.e1 if ROUTE[1] else self.e0)(x)


ROUTE = [0, 0]


def mixed(group, kind, mode, steps=2, emas=True):
    model = s.Preconditioned(Experts(kind), VP())
    run = s.Training(model, torch.optim.AdamW(model.parameters(), lr=1e-2), EMA(model, 0.9) if emas else None)
    ROUTE[:] = [0, group.rank]
    if mode == "sharded":
        shard(run, group, least=1)
    batches = Batches(load(X), 7, rank=group.rank, world=group.world)
    norms = []
    for step in s.fit(run, batches, steps=steps, seed=3, group=group):
        norms.append(step.grad_norm)
        ROUTE[0] = step.step
    return norms, flat(
        {k: {n: torch.view_as_real(v) if v.is_complex() else v for n, v in p.items()} for k, p in run.tensors().items()}
    )


@pytest.mark.parametrize(
    ("kind", "mode", "words"),
    [
        ("routed", "sharded", "gets a gradient in rank 0 and not.*sharded: false"),
        ("routed, later", "sharded", "unlike in the first step"),
        ("routed, list", "sharded", "rank 0 runs e0 where rank 1 runs e1.*sharded: false"),
        ("tied, list", "sharded", "tied"), ("types", "sharded", "of one type"), ("complex", "sharded", "real parameters"),
        ("buffer, shape", "parallel", "shapes of their buffers"),
    ],
)  # fmt: skip
def test_networks_that_no_two_processes_can_share_are_refused(kind, mode, words, two):
    with pytest.raises(Failed, match=words) as caught:
        two(mixed, kind, mode)
    assert [error for error, _ in caught.value.errors] == [ValueError, ValueError]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("routed", "parallel"), ("tied", "sharded"), ("tied", "parallel"), ("complex", "parallel"), ("buffer", "parallel")],
)
def test_networks_that_are_odd(kind, mode, two):
    """Tied weights stay tied in the averages too; complex ones and short integers are sent."""
    alone = mixed(ALONE, kind, "alone")
    a, b = two(mixed, kind, mode)
    assert a[0] == b[0]
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    if kind != "routed":  # by rank, here, and so not what one process does
        assert near(a[1], alone[1], 1e-10)


def given(group, what):
    run = training(lr=1e-3 * (1 + group.rank) if what == "optimizer" else 1e-3)
    run.precision = torch.bfloat16 if what == "precision" and group.rank else None
    how = {"seed": None if what == "seed" and group.rank else 0}
    if what == "weight" and group.rank:
        how["weight"] = loss.likelihood
    if what == "times" and group.rank:
        how["times"] = loss.uniform
    if what == "rate":
        how["rate"] = lambda step: 1.0 / (1 + group.rank)
    batches = Batches(load(X), 8, rank=group.rank, world=group.world)
    batches = {"batches": Batches(load(X), 8), "rows": repeat(X[:4])}.get(what, batches)
    next(s.fit(run, batches, group=group, **how))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("optimizer", "differ in the optimizer"), ("precision", "differ in precision"), ("weight", "differ in weight"),
        ("times", "differ in times"), ("rate", "differ in rate"), ("seed", "seed 0, no.*seed None, no"),
        ("batches", r"rank 0 of 1; wanted Batches\(..., rank=group.rank"), ("rows", "rank 0 and rank 1 give the same rows at step 1"),
    ],
)  # fmt: skip
def test_what_is_given_unlike_is_refused_in_all(what, words, two):
    with pytest.raises(Failed, match=words) as caught:
        two(given, what)
    assert [error for error, _ in caught.value.errors] == [ValueError, ValueError]


def kept(group, folder):
    run = training()
    shard(run, group, least=1)
    found = []
    for work in (
        lambda: checkpoint.save(folder / str(group.rank), run.denoiser),
        lambda: s.sample(run.emas[0].module, (2, 2), nfe=2),
    ):
        with pytest.raises(ValueError, match=r"wanted training\.whole") as caught:
            work()
        found.append(str(caught.value))
    return found


def test_what_is_sharded_is_neither_saved_nor_sampled(two, tmp_path):
    assert len(two(kept, tmp_path)) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_network(mode, two):
    args = (2, 7, {"dtype": torch.float32}, {"compile": True})
    alone = trained(ALONE, "alone", 2, 7, {"dtype": torch.float32}, {})
    for each in two(trained, mode, *args):
        same(each, alone, 1e-4)
