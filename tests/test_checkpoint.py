"""Checkpoints: what is written comes back to the bit, and nothing else is taken for it."""

import functools
import hashlib
import json
import os
import pickletools
import random
import stat
from pathlib import Path

import pytest
import torch
from laws import D, every_sde
from torch import nn

import scoresde as s
from scoresde import VP, checkpoint, parameterizations
from scoresde.noise import seeded

SDES = every_sde()
T = torch.tensor(0.4, dtype=D)


def away(net, dtype=torch.float32):
    """Every weight moved, so that none is at its start."""
    net = net.to(dtype)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.1 * seeded([i]).initial((1, *p.shape), torch.float32)[0].to(dtype))
    return net


def mlp(sde=None, dtype=torch.float32, fn=parameterizations.edm, **kwargs):
    net = s.MLP(**{"shape": 2, "width": 8, "depth": 1, "seed": 5, **kwargs})
    return s.Preconditioned(away(net, dtype), VP() if sde is None else sde, fn)


def same(a, b):
    """The same names, dtypes and bits."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# --- there and back ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(set(SDES) - {"Tabulated"}))
def test_every_sde_comes_back(name, tmp_path):
    model = mlp(SDES[name])
    back = checkpoint.load(checkpoint.save(tmp_path / "model", model))
    assert back.sde == model.sde
    assert type(back.sde) is type(model.sde)
    assert same(back.net, model.net)
    x = torch.linspace(-1, 1, 8).reshape(4, 2)
    assert torch.equal(back(x, T), model.eval()(x, T))
    a, b = (s.sample(m, (4, 2), nfe=7, seeds=range(4)).x for m in (back, model))
    assert torch.equal(a, b)


CONSTANTS = [
    VP(0.3, 11, 1e-5, 0.9), s.SubVP(beta_max=7.5), s.VE(0.02, 1 / 3), s.EDM(t_max=3), s.Cosine(0.01, 0.9), s.Rectified(0.1, 0.7),
]  # fmt: skip


@pytest.mark.parametrize("sde", CONSTANTS, ids=repr)
def test_the_constants_of_an_sde_come_back_to_the_bit(sde, tmp_path):
    back = checkpoint.load(checkpoint.save(tmp_path, mlp(sde), overwrite=True))
    assert repr(back.sde) == repr(sde)
    assert back.sde == sde


NETS = {
    "MLP": lambda: s.MLP((2, 3), width=8, depth=2, emb=6, seed=None),
    "MLP of labels": lambda: s.MLP(2, width=8, classes=3),
    "UNet": lambda: s.UNet((1, 4, 4), channels=8, multipliers=(1, 2), attention=(1,), dropout=0.1),
    "UNet of labels": lambda: s.UNet((2, 5, 3), channels=4, multipliers=(1,), blocks=2, classes=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, D, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_every_net_and_dtype_comes_back(net, dtype, tmp_path):
    """float64 weights stay float64: a net built in the default dtype would round them."""
    model = s.Preconditioned(away(NETS[net](), dtype), VP()).eval()
    back = checkpoint.load(checkpoint.save(tmp_path / "model", model))
    assert type(back.net) is type(model.net)
    assert same(back.net, model.net)
    assert not back.training
    assert back.net.config == model.net.config
    assert all(p.requires_grad and p.is_contiguous() for p in back.net.parameters())
    x = seeded(range(3)).initial((3, *model.net.shape), torch.float32)
    assert torch.equal(back(x, T), model(x, T))
    if model.net.config["classes"]:
        labels = torch.tensor([0, 1, -1])
        assert torch.equal(back.condition(labels)(x, T), model.condition(labels)(x, T))


def test_a_loaded_net_can_be_trained_and_saved_again(tmp_path):
    folder = checkpoint.save(tmp_path / "a", mlp())
    back = checkpoint.load(folder)
    list(s.fit(back, [torch.ones(4, 2)], generator=torch.Generator()))
    assert not same(back.net, mlp().net)
    assert same(checkpoint.load(folder).net, mlp().net)  # the file has not changed with it
    assert same(checkpoint.load(checkpoint.save(tmp_path / "b", back)).net, back.net)


FUNCTIONS = [getattr(parameterizations, n) for n in parameterizations.__all__ if n != "Prediction"]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_parameterization_comes_back(fn, tmp_path):
    assert checkpoint.load(checkpoint.save(tmp_path / "model", mlp(fn=fn))).parameterization is fn


def test_a_partial_parameterization_comes_back(tmp_path):
    fn = functools.partial(parameterizations.edm, sigma_data=0.1 + 0.2)
    model = mlp(fn=fn)
    back = checkpoint.load(checkpoint.save(tmp_path / "model", model))
    assert back.parameterization.func is parameterizations.edm
    assert back.parameterization.keywords == {"sigma_data": 0.1 + 0.2}
    x = torch.ones(2, 2)
    assert torch.equal(back(x, T), model.eval()(x, T))


def test_labels_are_not_part_of_a_checkpoint(tmp_path):
    model = mlp(classes=3).condition(torch.tensor([1, 2]))
    assert checkpoint.load(checkpoint.save(tmp_path / "model", model)).cond is None


def test_an_average_is_saved_like_any_model(tmp_path):
    model = mlp()
    ema = s.EMA(model, 0.9)
    list(s.fit(model, [torch.ones(4, 2)] * 3, ema=ema, generator=torch.Generator()))
    back = checkpoint.load(checkpoint.save(tmp_path / "model", ema.module))
    assert same(back.net, ema.module.net)
    assert not same(back.net, model.net)


# --- one's own -----------------------------------------------------------------------------------------------------------
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("seen", torch.tensor(7))

    def forward(self, x, c_noise):
        return self.w * x


def own_parameterization(sde, t):
    return parameterizations.eps(sde, t)


def test_ones_own_net_sde_and_parameterization_are_passed_on_loading(tmp_path):
    sde = SDES["Tabulated"]
    model = s.Preconditioned(Own(), sde, own_parameterization)
    folder = checkpoint.save(tmp_path / "model", model)
    given = {"sde": sde, "net": Own(), "parameterization": own_parameterization}
    with torch.no_grad():
        given["net"].w.zero_()
        given["net"].seen.zero_()
    back = checkpoint.load(folder, **given)
    assert same(back.net, model.net)
    assert back.net is given["net"]
    assert back.sde is sde
    assert back.parameterization is own_parameterization
    for missing in given:
        with pytest.raises(ValueError, match=f"pass {missing}="):
            checkpoint.load(folder, **{k: v for k, v in given.items() if k != missing})


def test_another_sde_may_stand_in(tmp_path):
    back = checkpoint.load(checkpoint.save(tmp_path / "model", mlp()), sde=s.EDM())
    assert back.sde == s.EDM()


def test_settings_that_json_cannot_hold_are_refused_and_nothing_is_written(tmp_path):
    for value in (torch.ones(2), float("nan")):
        fn = functools.partial(parameterizations.edm, sigma_data=value)
        with pytest.raises(ValueError, match="not plain JSON"):
            checkpoint.save(tmp_path / "model", mlp(fn=fn))
    assert not (tmp_path / "model").exists()


# --- the files -----------------------------------------------------------------------------------------------------------
def test_a_folder_holds_two_plain_files(tmp_path):
    """JSON to read and safetensors: no pickle, which runs what is in it."""
    folder = checkpoint.save(tmp_path / "deep" / "er", mlp())
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert folder == tmp_path / "deep" / "er"
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 1
    assert config["sde"] == {"name": "VP", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-3, "t_max": 1.0}
    assert config["parameterization"] == {"name": "edm"}
    assert config["net"]["name"] == "MLP"
    data = (folder / "model.safetensors").read_bytes()
    assert config["sha256"] == hashlib.sha256(data).hexdigest()
    header = int.from_bytes(data[:8], "little")
    assert set(json.loads(data[8 : 8 + header])) - {"__metadata__"} == set(mlp().net.state_dict())
    with pytest.raises(ValueError, match=r"opcode|pickle"):
        list(pickletools.genops(data))


def test_save_returns_a_path_and_takes_a_word(tmp_path):
    folder = checkpoint.save(str(tmp_path / "word"), mlp())
    assert isinstance(folder, Path)
    assert same(checkpoint.load(str(folder)).net, mlp().net)


def test_files_have_the_modes_that_the_umask_gives(tmp_path):
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            folder = checkpoint.save(tmp_path / f"{mask:o}", mlp())
        finally:
            os.umask(before)
        for path in folder.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask


def test_nothing_is_overwritten_unasked(tmp_path):
    folder = checkpoint.save(tmp_path / "model", mlp())
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = mlp(s.EDM(), width=16)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save(folder, other)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    checkpoint.save(folder, other, overwrite=True)
    back = checkpoint.load(folder)
    assert same(back.net, other.net)
    assert back.sde == s.EDM()
    (folder / "notes.txt").write_text("kept")
    checkpoint.save(folder, mlp(), overwrite=True)
    assert (folder / "notes.txt").read_text() == "kept"


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch):
    folder = checkpoint.save(tmp_path / "model", mlp())
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(folder, mlp(s.EDM()), overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert same(checkpoint.load(folder).net, mlp().net)


def test_weights_of_one_save_and_config_of_another_are_refused(tmp_path):
    """What a crash between the two files of an overwrite leaves behind."""
    one, two = checkpoint.save(tmp_path / "one", mlp()), checkpoint.save(tmp_path / "two", mlp(seed=6))
    (one / "model.safetensors").write_bytes((two / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="damaged or was swapped"):
        checkpoint.load(one)


def test_any_flipped_bit_of_the_weights_is_caught(tmp_path):
    folder = checkpoint.save(tmp_path / "model", mlp())
    path = folder / "model.safetensors"
    good = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(good)), 50):  # noqa: S311
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(ValueError, match="damaged or was swapped"):
            checkpoint.load(folder)
    for bad in (good[:-1], good + b"\0", b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged or was swapped"):
            checkpoint.load(folder)
    path.write_bytes(good)
    assert same(checkpoint.load(folder).net, mlp().net)
