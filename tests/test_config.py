"""Configurations: what they may hold, that they come back exactly, and that no text brings a foreign error."""

import dataclasses
import itertools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import scoresde as s
from scoresde import choices, config, loss, nets, objectives, sections, strict
from scoresde.config import Average, Choice, Config, Data, Every, Samples, dump, load

DIGITS = "data: {source: digits}"
REGISTRIES = {
    "sde": config.SDES, "net": config.NETS, "parameterization": config.PARAMETERIZATIONS, "weight": config.WEIGHTS,
    "times": config.TIMES, "objective": config.OBJECTIVES, "optimizer": config.OPTIMIZERS,
}  # fmt: skip
WHOLE = """
data: {source: cifar10, part: train, conditional: true, flip: true, held_out: 500, workers: 2}
sde: {name: VP, beta_max: 12.5}
net: {name: UNet, channels: 64, multipliers: [1, 2, 2], attention: [1]}
parameterization: {name: edm, sigma_data: 0.4}
weight: {name: capped, cap: 3}
times: {name: log_normal, mean: -1.0, std: 1.4}
spread: low_discrepancy
objective: {name: Uncertainty, channels: 64}
optimizer: {name: AdamW, lr: 1e-3, betas: [0.9, 0.99], weight_decay: 1e-2}
steps: 20000
clip: .inf
decay: cosine
precision: bf16
label_dropout: 0.1
ema: [{decay: 0.9999}, {std: 0.1}]
every: {checkpoint: 500, validate: 1000}
seed: 17
"""


def refused(text):
    """The words with which a text is refused; None when it is read. Nothing but these two errors comes out."""
    try:
        load(text)
    except (TypeError, ValueError) as error:
        found = error
    else:
        return None
    assert type(found) in (TypeError, ValueError), repr(found)
    assert 10 < len(str(found)) < 600
    return str(found)


# --- the text ------------------------------------------------------------------------------------------------------------
TRAPS = {
    "1e-3": 1e-3, "1E3": 1000.0, "1.": 1.0, ".5": 0.5, "-.5e+1": -5.0, "017": 17, "0o17": 15, "0x1f": 31, "+3": 3, "no": "no", "yes": "yes",
    "on": "on", "Off": "Off", "y": "y", "true": True, "FALSE": False, "tRue": "tRue", "~": None, "null": None, "": None, ".inf": math.inf,
    "-.INF": -math.inf, "inf": "inf", "1_000": "1_000", "190:20:30": "190:20:30", "2001-01-01": "2001-01-01", "0b11": "0b11", "=": "=",
    "'1e-3'": "1e-3", "[1, 2.0, x]": [1, 2.0, "x"], "{a: {b: off}}": {"a": {"b": "off"}}, "1e-400": 0.0, "<<": "<<", "0.1e1x": "0.1e1x",
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), TRAPS.items(), ids=repr)
def test_the_core_schema(text, value):
    found = strict.parse(text)
    assert found == value
    assert type(found) is type(value)


BAD = {
    "a: 1\nb: 2\na: 3": "line 3 has the key 'a' again, after line 1",
    "a: {b: 1,\n b: 2}": "line 2 has the key 'b' again",
    "a: &x 1\nb: *x": "line 1 has an anchor",
    "a: *x": "line 1 has an anchor or an alias",
    "a: !!float 1": "has the tag",
    "!!python/object/apply:os.system [true]": "has the tag",
    "! a": "has the tag",
    "1: a": "has the key '1'",
    "true: a": "has the key 'true'",
    "? [a]\n: b": "wanted a name",
    "a: 1\n---\nb: 1": "this is no YAML",
    "a: [": "this is no YAML",
    "a: \x01": "this is no YAML",
    "a: .nan": "a is NaN",
    "1e999": "beyond the largest float",
    "9" * 5000: "of 5000 characters",
    str(2**63): "an integer of 64 bits",
    "[" * 5000: "nested more than 20",
    "- " * 30 + "a": "nested more than 20",
    "a" * 2**21: "2097152 characters",
    "\ta: 1": "no YAML",
    "%TAG ! tag:x,2000:\n---\n!a b": "has the tag",
    "a: 'x": "this is no YAML",
}


@pytest.mark.parametrize(("text", "words"), BAD.items(), ids=[repr(text[:20]) for text in BAD])
def test_what_no_text_may_hold(text, words):
    with pytest.raises(ValueError) as caught:
        strict.parse(text)
    assert words in str(caught.value)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 400


def test_laughs_are_not_counted():
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnop"))
    with pytest.raises(ValueError, match="line 1 has an anchor"):
        strict.parse(bomb)


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        ("json", '{"a": 1, "a": 2}', "is there twice"), ("json", '{"a": NaN}', "a is NaN"), ("json", '{"a": 1e999}', "beyond"),
        ("json", "[" * 100_000, "nested"), ("json", "{", "no JSON"), ("toml", "a = 1\na = 2", "no TOML"), ("toml", "a = 1e999", "beyond"),
        ("toml", "a = 1979-05-27", "a is a date"), ("toml", "a =", "no TOML"), ("json", '{"a": 99999999999999999999}', "67 bits"),
    ],
)  # fmt: skip
def test_other_forms_are_as_strict(form, text, words):
    with pytest.raises((ValueError, TypeError), match=words):
        strict.parse(text, form)


TEXTS = st.text(max_size=12) | st.sampled_from(
    ["no", "1e-3", "017", "0o17", "~", "=", "<<", "- a", "#a", "a: b", ".inf", "1:30", "true "]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
@example({"": {"~": [[]]}})
@example(-0.0)
def test_plain_values_come_back(value):
    for flow in (False, True):
        found = strict.parse(strict.emit(value, flow=flow))
        assert found == value
        assert repr(found) == repr(value)
    assert strict.parse(json.dumps(value), "json") == value


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("abn:{}[],-#&*!|>'\"%@` \n\t0.e", max_size=60))
def test_any_text_is_read_or_refused(text):
    refused(text)


# --- the tree ------------------------------------------------------------------------------------------------------------
def floats(low, high):
    return st.floats(low, high, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def choice(name, **options):
    """With any part of the options."""
    return st.fixed_dictionaries({}, optional=options).map(lambda found: Choice(name, found))


sources = st.sampled_from(["a.npy", "./images", "é/b c: d/x.npy", "'quoted'/#", "no/1e-3"])
DATA = st.one_of(
    st.builds(
        Data, source=st.sampled_from(list(config.SETS)), part=st.sampled_from([None, "train", "test"]), folder=st.none() | sources,
        conditional=st.booleans(), flip=st.booleans(), held_out=st.integers(1, 10**6), low=floats(-9, 0), high=floats(0.1, 9),
    ),
    st.builds(
        Data, source=sources, labels=st.none() | sources, levels=st.none() | st.integers(2, 2**16), conditional=st.booleans(),
        held_out=st.integers(1, 9), dequantize=st.booleans(), workers=st.integers(0, 64),
    ),
)  # fmt: skip
SDE = st.one_of(
    choice("VP", beta_min=floats(0.01, 1), beta_max=floats(2, 50) | st.integers(2, 50), t_min=floats(1e-4, 0.1)),
    choice("VE", sigma_min=floats(1e-3, 0.1), sigma_max=floats(1, 100)), choice("VE", from_data=st.booleans(), sigma_min=floats(1e-3, 0.1)),
    choice("EDM", t_max=floats(1, 1000)), st.sampled_from([Choice("Cosine"), Choice("Rectified"), Choice("SubVP")]),
    choice("DiscreteVP", betas=st.just([1e-4 * i for i in range(1, 40)])).filter(lambda c: c.options),
)  # fmt: skip
NET = st.none() | st.one_of(
    choice("UNet", channels=st.integers(8, 64), multipliers=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.none()),
    choice("MLP", width=st.integers(1, 512), seed=st.none() | st.integers(0, 9)),
)
CONFIGS = st.builds(
    Config, data=DATA, sde=SDE, net=NET, parameterization=choice("edm", sigma_data=floats(0.1, 2)) | st.just(Choice("v")),
    weight=choice("edm", sigma_data=floats(0.1, 2)) | choice("capped", cap=floats(0.1, 9)) | st.just(Choice("likelihood")),
    times=choice("log_normal", mean=floats(-3, 1), std=floats(0.3, 3)) | choice("importance", variance=floats(0.1, 2)),
    spread=st.sampled_from(sorted(config.SPREADS)),
    objective=choice("Uncertainty", channels=st.sampled_from([2, 128])) | st.just(Choice("dsm_loss")),
    optimizer=choice("AdamW", lr=floats(1e-9, 1), betas=st.tuples(floats(0, 0.9), floats(0, 0.999)), fused=st.none())
    | choice("SGD", lr=floats(1e-9, 1), momentum=floats(0, 1)),
    steps=st.integers(1, 2**63 - 1), batch=st.integers(64, 2**62), accumulate=st.integers(1, 64),
    clip=floats(1e-9, 1e9) | st.just(math.inf),
    warmup=st.integers(0, 10**6), decay=st.sampled_from(["none", "linear", "cosine", "sqrt"]), compile=st.booleans(),
    precision=st.sampled_from(["float32", "bf16", "fp16"]), patience=st.integers(1, 99), seed=st.integers(0, 2**63 - 1),
    ema=st.lists(st.builds(Average, decay=floats(0, 0.99999)) | st.builds(Average, std=floats(1e-3, 0.288)), max_size=3, unique=True),
    every=st.builds(Every, log=st.integers(0, 10**9), validate=st.integers(0, 9), keep=st.integers(1, 9)),
    samples=st.builds(Samples, count=st.integers(1, 999), features=st.none() | sources), device=st.sampled_from(["cpu", "cuda:1", "mps"]),
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(CONFIGS)
def test_a_configuration_comes_back_exactly(made):
    text = dump(made)
    found = load(text)
    assert found == made
    assert repr(found) == repr(made)
    assert dump(found) == text
    assert set(strict.parse(text)) == {f.name for f in dataclasses.fields(Config)}  # nothing is left to a default


def test_what_the_least_configuration_means():
    found = load(DIGITS)
    assert found == Config(Data("digits")) == load(dump(found))
    assert config.sde_of(found.sde) == s.VP()
    times, weight = config.times_and_weight_of(found)
    assert weight is loss.edm
    u = torch.full((4,), 0.3, dtype=torch.float64)
    assert torch.equal(times(s.VP(), u), loss.stratified(loss.log_normal)(s.VP(), u))
    assert type(config.net_of(found.net, (1, 8, 8))) is s.UNet
    assert type(config.net_of(found.net, (2,))) is s.MLP
    assert hash(found) == hash(load(DIGITS))
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301


def test_a_whole_one():
    found = load(WHOLE)
    assert found.optimizer == Choice("AdamW", {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01})
    assert (found.clip, found.ema) == (math.inf, (Average(0.9999), Average(std=0.1)))
    net = config.net_of(found.net, (3, 8, 8), classes=10)
    assert (net.config["channels"], net.config["classes"]) == (64, 10)
    optimizer = config.optimizer_of(found.optimizer, net.parameters())
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-3, (0.9, 0.99))
    model = s.Preconditioned(net, config.sde_of(found.sde), choices.build(found.parameterization, config.PARAMETERIZATIONS, "x"))
    assert [average.name for average in (config.average_of(a, model) for a in found.ema)] == ["ema_0.9999", "ema_std0.1"]
    assert isinstance(choices.build(found.objective, config.OBJECTIVES, "objective"), objectives.Uncertainty)


def test_what_comes_from_data():
    x = 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    found = config.sde_of(Choice("VE", {"from_data": True, "sigma_min": 0.02, "t_min": 1e-3}), x)
    assert found == dataclasses.replace(s.VE.from_data(x, 0.02), t_min=1e-3)
    with pytest.raises(TypeError, match="wanted the data"):
        config.sde_of(Choice("VE", {"from_data": True}))
    made = load(DIGITS, ["times=importance", "weight=likelihood"])
    times, weight = config.times_and_weight_of(made)
    wanted, t = loss.importance(loss.likelihood), torch.tensor([0.1, 0.7], dtype=torch.float64)
    assert torch.equal(weight(s.VP(), t), wanted.weight(s.VP(), t))
    assert torch.equal(times(s.VP(), t), loss.stratified(wanted)(s.VP(), t))


def test_a_file_of_each_form(tmp_path):
    tree = strict.parse(WHOLE)
    wanted = load(WHOLE)
    forms = {"a.yaml": WHOLE, "b.yml": "# a comment\n" + WHOLE, "c.json": json.dumps({**tree, "clip": 1.0}, indent="\t")}
    toml = "\n".join(f"{name} = {json.dumps(v)}" for name, v in tree.items() if not isinstance(v, (dict, list)) and name != "clip")
    forms["d.toml"] = f"{toml}\nclip = inf\n[data]\nsource = 'digits'"
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
    assert load(tmp_path / "a.yaml") == load(str(WHOLE)) == load(tmp_path / "b.yml") == wanted
    assert load(tmp_path / "c.json", ["clip=.inf"]) == wanted
    assert load(tmp_path / "d.toml", ["data.conditional=true"]).steps == 20000
    for name, data, words in (
        ("e.txt", b"", "ends in"),
        ("f.yaml", b"\xff\xfe", "UTF-8"),
        ("g.yaml", b"steps: 1\nsteps: 2", "line 2"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.yaml")
    with pytest.raises(TypeError, match="Path of a file"):
        load(str(tmp_path / "a.yaml"))


# --- overrides -----------------------------------------------------------------------------------------------------------
def test_overrides():
    found = load(
        "data: {source: digits}\nnet: {name: MLP, width: 8}\nsde: VE",
        ["optimizer.lr=1e-3", "sde.sigma_max=90", "net.width=16", "net.depth=2", "ema=[{decay: 0.99}]", "every.log=7", "every.log=8",
         "samples={count: 4}", "samples.nfe=5", "weight=simple", "times.std=1e0", "data.source=./a=b"],
    )  # fmt: skip
    assert found.optimizer == Choice("AdamW", {"lr": 1e-3})
    assert found.sde == Choice("VE", {"sigma_max": 90})
    assert found.net == Choice("MLP", {"width": 16, "depth": 2})
    assert (found.ema, found.every.log, found.samples) == ((Average(0.99),), 8, Samples(4, 5))
    assert (found.weight, found.times, found.data.source) == (Choice("simple"), Choice("log_normal", {"std": 1.0}), "./a=b")
    assert load("", ["data.source=digits"]) == load(DIGITS)
    assert load("net: MLP\n" + DIGITS, ["net=null", "net.name=UNet"]).net == Choice("UNet")


WRONG = {
    "nothing": "wanted KEY=VALUE",
    "=1": "wanted KEY=VALUE",
    ".a=1": "wanted KEY=VALUE",
    "step=1": "did you mean steps?",
    "every.logs=1": "every.logs is no key; did you mean log?",
    "evry.log=1": "evry is no key; did you mean every?",
    "steps.a=1": "steps has no keys of its own",
    "ema.0.decay=0.1": "ema has no keys of its own",
    "sde.name=Vp": "did you mean VP?",
    "sde.beta_mx=1": "sde.beta_mx is no option of VP; did you mean beta_max?",
    "net.width=3": "net.name is null; wanted a name",
    "sde.beta_max.a=1": "no key",
    "steps=1\nsteps=2": "steps",
    "steps={a: 1, a: 2}": "again",
    "sde=scoresde.sde.VP": "sde.name is",
    "sde=os.system": "known are",
    "net=torch.nn.Linear": "net.name",
    "optimizer=__class__": "known are",
    "weight=stratified": "known are",
    "objective=kernel_loss": "known are",
    "sde=LinearSDE": "known are",
    "sde=Tabulated": "known are",
    "optimizer.params=[]": "is no option",
    "net=unet-10m": "did you mean unet-100m?",
    "net={name: unet-1m, width: 3}": "width is no option of unet-1m",
    "net={name: MLP, shape: 3}": "shape is no option",
    "times={name: importance, of: edm}": "of is no option",
    "weight.sde=VP": "weight.sde is no option",
    "sde=3": "sde is 3; wanted a name",
    "sde=[VP]": "wanted a name",
    "sde={beta_max: 3}": "sde.name is null",
    "steps=3.0": "steps is 3.0 (float); wanted an integer",
    "steps='3'": "steps is '3' (str); wanted an integer",
    "steps=true": "steps is true",
    "batch=1e3": "batch is 1000.0 (float); wanted an integer",
    "compile=1": "compile is 1 (int); wanted true or false",
    "compile=no": "compile is 'no' (str); wanted true or false",
    "clip=1_0": "clip is '1_0' (str); wanted a number",
    "clip=true": "clip is true",
    "clip=null": "clip is null",
    "device=3": "device is 3 (int); wanted a string",
    "optimizer.lr=fast": "optimizer.lr is 'fast' (str); wanted a number",
    "optimizer.betas=[0.9]": "wanted a list of 2",
    "optimizer.betas=[0.9, x]": "optimizer.betas",
    "net={name: UNet, multipliers: [1, 2.5]}": "a list",
    "steps=0": "steps is 0; wanted a number >= 1",
    "steps=-1": "number >= 1",
    "clip=0": "number > 0",
    "label_dropout=1": ">= 0 and < 1",
    "label_dropout=0.1": "data.conditional is false",
    "every.keep=0": "every.keep is 0; wanted a number >= 1",
    "every.validate=5": "data.held_out is 0",
    "ema=[{decay: 1}]": "ema[0].decay is 1; wanted a number >= 0 and < 1",
    "ema=[{std: 0.3}]": "ema[0].std is 0.3",
    "ema=[{}]": "wanted one of them",
    "ema=[{decay: 0.9, std: 0.1}]": "wanted one of them",
    "ema=[{decay: 0.9}, {decay: 0.9}]": "one entry twice",
    "ema={decay: 0.9}": "wanted a list",
    "ema=[3]": "ema[0] is 3; wanted a mapping",
    "every=5": "every is 5; wanted a mapping of log",
    "every=null": "every is null",
    "data=digits": "wanted a mapping",
    "decay=cos": "decay is 'cos'; did you mean cosine?",
    "precision=bfloat16": "known are",
    "device=abacus": "device is 'abacus'",
    "device=''": "device is ''",
    "data.source=digts": "did you mean digits?",
    "data.source=''": "source is ''",
    "data.part=tst": "did you mean test?",
    "data.low=2": "low is 2, high is 1",
    "data.labels=a.npy": "a set, which has its own",
    "data={source: a.npy, part: train}": "give that of the part",
    "data={}": "data.source is missing",
    "data.low=.inf": "low is inf; wanted a finite number",
    "seed=-1": "seed is -1; wanted a number >= 0",
    "seed=9223372036854775808": "wanted one from -2^63",
    "accumulate=129": "wanted at most batch",
    "sde.beta_max=0.05": "sde: VP: beta_min=0.1, beta_max=0.05",
    "optimizer.lr=-1": "optimizer: AdamW: Invalid",
    "times.std=0": "times: log_normal: std is 0",
    "weight.sigma_data=0": "weight is",
    "weight={name: capped, cap: -1}": "weight is",
    "sde=DiscreteVP": "sde.betas is missing",
    "parameterization.sigma_data=0": "parameterization is",
    "objective={name: Uncertainty, channels: 3}": "objective: Uncertainty: channels is 3",
    "objective={name: sliced_score_matching, divergence: null}": "is no option",
    "sde={name: VE, from_data: 1}": "sde.from_data is 1",
    "times={name: importance, variance: -1}": "variance is -1",
    "sde={name: VP, from_data: true}": "from_data is no option of VP",
    "sde={name: VE, from_data: true, sigma_max: 3}": "sigma_max is 3 and from_data is true",
    "steps=.nan": "NaN",
    "samples.features=3": "samples.features is 3 (int); wanted a string or null",
}


@pytest.mark.parametrize(("text", "words"), WRONG.items(), ids=list(WRONG))
def test_what_is_refused_says_where_and_what(text, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        load(DIGITS, [text])
    assert words in str(caught.value)
    assert type(caught.value) in (ValueError, TypeError)
    assert len(str(caught.value)) < 500


def test_in_python_too():
    with pytest.raises(TypeError, match="steps is '3'"):
        Config(Data("digits"), steps="3")
    with pytest.raises(TypeError, match="sde is a VP; wanted a Choice"):
        Config(Data("digits"), sde=s.VP())
    with pytest.raises(TypeError, match="data is a str; wanted a Data"):
        Config("digits")
    with pytest.raises(TypeError, match="wanted a tuple of Average"):
        Config(Data("digits"), ema=(0.9,))
    with pytest.raises(ValueError, match="known are"):
        Config(Data("digits"), net=Choice("Linear"))
    with pytest.raises(TypeError, match=r"options\.lr is a Tensor"):
        Choice("AdamW", {"lr": torch.tensor(1.0)})
    with pytest.raises(TypeError, match="wanted a mapping of names"):
        Choice("AdamW", {"name": 1})
    with pytest.raises(TypeError, match="wanted a string"):
        Choice(3)
    assert Config(Data("digits"), clip=2, ema=[Average(0)]) == Config(Data("digits"), clip=2.0, ema=(Average(0.0),))
    with pytest.raises(ValueError, match=r"net: UNet: shape is \(2,\)"):
        config.net_of(Choice("UNet"), (2,))


# --- what may be named ---------------------------------------------------------------------------------------------------
NAMES = {
    "sde": {"VP", "SubVP", "VE", "EDM", "Cosine", "Rectified", "DiscreteVP"}, "net": {"MLP", "UNet"},
    "parameterization": {"edm", "eps", "score", "v", "velocity", "x0"}, "weight": {"capped", "edm", "likelihood", "simple"},
    "times": {"importance", "log_normal", "uniform"}, "objective": {"dsm_loss", "implicit_score_matching", "sliced_score_matching"},
    "optimizer": {"AdamW", "Adam", "SGD", "RMSprop"},
}  # fmt: skip


def test_the_registries_hold_what_plain_values_make():
    for path, names in NAMES.items():
        assert names <= set(REGISTRIES[path].known)
    for path, registry in REGISTRIES.items():
        assert registry.known
        for name, kind in registry.known.items():
            assert getattr(kind, "func", kind).__module__.startswith(("scoresde.", "torch.optim.")), (path, name)
            assert not set(registry.options(name)) & set(registry.given)
    assert not {"LinearSDE", "SDE", "Tabulated"} & set(config.SDES.known)
    assert set(config.SETS) == {"digits", "mnist", "fashion-mnist", "cifar10"}


def test_what_is_built_is_what_plain_code_builds():
    for name in config.PARAMETERIZATIONS.known:
        assert choices.build(Choice(name), config.PARAMETERIZATIONS, "p") is getattr(s.parameterizations, name)
    bound = choices.build(Choice("capped", {"cap": 3}), config.WEIGHTS, "weight")
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    assert torch.equal(bound(s.VP(), t), loss.capped(s.VP(), t, cap=3))
    made = load(DIGITS, ["net={name: unet-100k, dropout: 0.1}"])
    net = config.net_of(made.net, (3, 8, 8), classes=4, seed=3)
    wanted = nets.preset("unet-100k", (3, 8, 8), classes=4, seed=3, dropout=0.1)
    assert net.config == wanted.config
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), wanted.parameters(), strict=True))
    assert config.net_of(Choice("MLP", {"seed": 5}), (2,), seed=3).config["seed"] == 5


def test_every_key_is_described():
    lines = sections.describe(Config).splitlines()
    tree = strict.parse(dump(load(DIGITS)))
    paths = [f"{a}.{b}" if b else a for a, v in tree.items() for b in (v if isinstance(v, dict) and a != "ema" else [""])]
    assert [line.split()[0].split("=")[0] for line in lines] == paths
    for line in lines[1:]:  # what is shown as a default is one
        path = line.split()[0].split("=")[0]
        value = line.strip()[len(path) + 1 :].split("  ")[0] if path != "ema" else "[{decay: 0.999}]"
        assert load(DIGITS, [f"{path}={value.split(' ')[0] if path != 'ema' else value}"]) == load(DIGITS), line


# --- a file that has gone wrong ------------------------------------------------------------------------------------------
JUNK = (
    None,
    True,
    0,
    -1,
    2**62,
    1e308,
    -1e-308,
    "",
    "x",
    "é" * 300,
    [],
    {},
    [[]],
    {"name": {}},
    {"name": "VP", "a": {"b": [1]}},
    [None],
    "1e-3",
    math.inf,
)


def places(tree, path=()):
    yield path
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, name))


def mutated(tree, path, change):
    if not path:
        return change(tree)
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = mutated(copy[path[0]], path[1:], change)
    return copy


def test_every_mutation_is_read_or_refused_in_words():
    tree = strict.parse(WHOLE)
    found = []

    def attempt(changed):
        found.append(refused(strict.emit(changed)))

    for path in places(tree):
        for junk in JUNK:
            attempt(mutated(tree, path, lambda _, junk=junk: junk))
        attempt(mutated(tree, path, lambda old: {"name": old}))
        attempt(mutated(tree, path, lambda old: [old]))
        if path and isinstance(path[-1], str):  # dropped, renamed
            attempt(mutated(tree, path[:-1], lambda old, name=path[-1]: {k: v for k, v in old.items() if k != name}))
            attempt(mutated(tree, path[:-1], lambda old, name=path[-1]: {(k + "s" if k == name else k): v for k, v in old.items()}))
    words = [text for text in found if text is not None]
    assert len(words) > 500
    assert len(found) - len(words) > 20
    assert not [text for text in words if "NoneType" in text]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_torn_file_is_read_or_refused(data):
    text = list(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        i = data.draw(st.integers(0, len(text) - 1))
        text[i : i + data.draw(st.integers(0, 3))] = data.draw(st.text(":{}[],-'\"&*!#\n \t\x00é0a.", max_size=3))
    refused("".join(text))


def test_pyyaml_misreads_what_we_read():
    """The traps are still there: if PyYAML ever closes them, this module can shrink."""
    assert yaml.safe_load("1e-3") == "1e-3"
    assert yaml.safe_load("no") is False
    assert yaml.safe_load("017") == 15
    assert yaml.safe_load("{a: 1, a: 2}") == {"a": 2}


def test_the_shipped_configurations_load():
    root = Path(__file__).parents[1]
    found = [*root.glob("benchmarks/*.yaml"), *root.glob("examples/**/*.yaml")]
    assert found
    for path in found:
        assert load(dump(load(path))) == load(path)
