"""Checkpoints: what is written comes back to the bit, and nothing else is taken for it."""

import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import pickletools
import random
import stat
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from laws import D, every_sde
from torch import nn

import scoresde as s
from scoresde import VP, checkpoint, codec, parameterizations, store
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
def test_a_folder_holds_plain_files(tmp_path):
    """JSON to read and safetensors: no pickle, which runs what is in it."""
    folder = checkpoint.save(tmp_path / "deep" / "er", mlp())
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert folder == tmp_path / "deep" / "er"
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 2
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


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    folder = checkpoint.save(tmp_path / "model", mlp())
    (folder / ".model.safetensors.123").write_bytes(b"half")
    checkpoint.save(folder, mlp(), overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]


def test_a_failed_save_says_what_is_left(tmp_path, monkeypatch):
    folder = checkpoint.save(tmp_path / "model", mlp())
    write = os.write
    full = lambda file, data: (
        write(file, data) if len(data) < 400 else (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left"))
    )
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(store.SaveError, match=r"the model was not saved .*No space left.*what is there is whole\. Free some space"):
        checkpoint.save(folder, mlp(seed=6), overwrite=True)
    monkeypatch.undo()
    assert same(checkpoint.load(folder).net, mlp().net)


# --- format 1 ------------------------------------------------------------------------------------------------------------
def first_format(folder, model):
    """What earlier versions wrote: no manifest."""
    checkpoint.save(folder, model)
    (folder / "manifest.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}, indent=1))
    return folder


def test_folders_of_the_first_format_are_read_and_verified(tmp_path):
    folder = first_format(tmp_path / "model", mlp())
    assert same(checkpoint.load(folder).net, mlp().net)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match="damaged or was swapped"):
        checkpoint.load(folder)
    checkpoint.save(folder, mlp(), overwrite=True)
    assert (folder / "manifest.json").exists()
    assert same(checkpoint.load(folder).net, mlp().net)


def test_the_weights_of_the_benchmarks_are_read():
    folder = Path(__file__).parents[1] / "benchmarks" / "weights" / "fashion"
    if not folder.is_dir():
        pytest.skip("an installed package without the benchmarks")
    model = checkpoint.load(folder)
    assert model.net.shape == (1, 28, 28)
    assert all(p.dtype == torch.float32 for p in model.net.parameters())


def test_a_folder_that_lost_its_manifest_is_refused(tmp_path):
    folder = checkpoint.save(tmp_path / "model", mlp())
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json is missing; .* of format 2"):
        checkpoint.load(folder)


# --- names are not taken for others --------------------------------------------------------------------------------------
def test_ones_own_of_the_same_name_is_not_the_librarys(tmp_path):
    class MLP(s.MLP):
        pass

    @dataclasses.dataclass(frozen=True)
    class VP(s.VP):
        pass

    def edm(sde, t):
        return parameterizations.v(sde, t)

    for model, what in (
        (s.Preconditioned(MLP(2, width=8), s.VP()), "net"),
        (s.Preconditioned(s.MLP(2, width=8), VP()), "sde"),
        (s.Preconditioned(s.MLP(2, width=8), s.VP(), edm), "parameterization"),
        (s.Preconditioned(s.MLP(2, width=8), s.VP(), lambda sde, t: edm(sde, t)), "parameterization"),
    ):
        folder = checkpoint.save(tmp_path / "model", model, overwrite=True)
        with pytest.raises(ValueError, match=rf"names the {what} 'test_checkpoint\..*pass {what}= to load your own"):
            checkpoint.load(folder)
        given = {"net": MLP(2, width=8)} if what == "net" else {"sde": VP()} if what == "sde" else {"parameterization": edm}
        assert same(checkpoint.load(folder, **given).net, model.net)


def test_settings_by_place_are_refused(tmp_path):
    fn = functools.partial(parameterizations.edm, VP())
    with pytest.raises(ValueError, match="1 settings by place; give them by name"):
        checkpoint.describe(mlp(fn=fn))


def test_a_partial_of_a_partial_comes_back(tmp_path):
    fn = functools.partial(functools.partial(parameterizations.edm, sigma_data=3.0), sigma_data=0.25)
    back = checkpoint.load(checkpoint.save(tmp_path / "model", mlp(fn=fn)))
    assert back.parameterization.keywords == {"sigma_data": 0.25}


# --- tensors -------------------------------------------------------------------------------------------------------------
class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x, c_noise):
        return x


def test_tensors_of_all_kinds_come_back(tmp_path):
    kinds = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        D,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.int8,
        torch.uint16,
    ]
    tensors = {str(kind).replace(".", "_"): (seeded([3]).initial((1, 4, 5), torch.float32)[0] * 9).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.ones(0, 3), "nan": torch.tensor([math.nan, -math.inf, -0.0])}
    tensors |= {
        "transposed": tensors["torch_float32"].clone().T,
        "strided": torch.arange(20.0)[::3],
        "spread": torch.ones(1, 3).expand(2, 3),
    }
    tensors["channels_last"] = seeded([4, 5]).initial((2, 3, 4, 5), torch.float32).to(memory_format=torch.channels_last)
    back = codec.from_tensors(codec.to_tensors(tensors, "x"), "x")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(
            back[name].nan_to_num(7.0) if name == "nan" else back[name], value.nan_to_num(7.0) if name == "nan" else value
        )
        assert back[name].is_contiguous()
    assert math.copysign(1, float(back["nan"][2])) == -1
    assert codec.from_tensors(codec.to_tensors({}, "x"), "x") == {}


def test_parts_of_one_memory_that_do_not_meet_come_back():
    flat = torch.arange(10.0)
    back = codec.from_tensors(codec.to_tensors({"a": flat[:4], "b": flat[4:]}, "x"), "x")
    assert torch.equal(back["b"], flat[4:])


W = torch.ones(3)
BAD_TENSORS = {
    "tied": ({"a": W, "b": W}, ValueError, r"x\['b'\] and x\['a'\] share memory .* a clone"),
    "tied views": ({"a": W, "b": W[:2]}, ValueError, "share memory"),
    "overlapping": ({"a": W[:2], "b": W[1:]}, ValueError, "share"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, ValueError, "wanted a dense tensor"),
    "meta": ({"a": torch.empty(3, device="meta")}, ValueError, "wanted a dense tensor"),
    "complex128": ({"a": torch.ones(3, dtype=torch.complex128)}, ValueError, "cannot be written as safetensors"),
    "a number": ({"a": 3.0}, TypeError, r"x\['a'\] is float; wanted a tensor"),
    "a list": ([W], TypeError, "x is list; wanted a dictionary of tensors"),
    "a numbered one": ({0: W}, TypeError, r"x\[0\] is .*wanted a tensor by a name"),
    "a word of the format": ({"__metadata__": W}, ValueError, "a word of the file format"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_would_not_come_back_are_refused(name):
    tensors, error, words = BAD_TENSORS[name]
    with pytest.raises(error, match=words):
        codec.to_tensors(tensors, "x")


def test_tied_weights_are_refused_and_nothing_is_written(tmp_path):
    net = Own()
    net.also = net.w
    with pytest.raises(ValueError, match=r"the network's state\['(w|also)'\] and .* share memory"):
        checkpoint.save(tmp_path / "model", s.Preconditioned(net, VP()))
    assert not (tmp_path / "model").exists()


def test_a_channels_last_network_comes_back(tmp_path):
    net = s.UNet((1, 4, 4), channels=8, multipliers=(1,)).to(memory_format=torch.channels_last)
    model = s.Preconditioned(away(net), VP())
    assert same(checkpoint.load(checkpoint.save(tmp_path / "model", model)).net, model.net)


def safetensors(header, data=b"\0" * 16, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


F = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE = {
    "empty": b"", "short": b"\x08", "a header of 2^63 bytes": safetensors(b"{}", size=2**63),
    "of 2^64 - 1": safetensors(b"{}", size=2**64 - 1),
    "of 1 TB": safetensors(b"{}", size=2**40), "not JSON": safetensors(b"{", b""), "not UTF-8": safetensors(b"\xff" * 8, b""),
    "deep": safetensors(b'{"a":' * 50_000), "a list": safetensors(b"[]", b""), "pickle": b"\x80\x04c__builtin__\neval\n.",
    "huge shape": safetensors({"a": {**F, "shape": [2**62, 4]}}), "overflowing shape": safetensors({"a": {**F, "shape": [2**33, 2**33]}}),
    "huge and empty": safetensors({"a": {**F, "shape": [0, 2**63], "data_offsets": [0, 0]}}, b""),
    "negative shape": safetensors({"a": {**F, "shape": [-4]}}), "float shape": safetensors({"a": {**F, "shape": [4.0]}}),
    "offsets past the end": safetensors({"a": {**F, "data_offsets": [0, 2**40]}}),
    "backwards": safetensors({"a": {**F, "data_offsets": [16, 0]}}),
    "overlapping": safetensors({"a": F, "b": {**F, "data_offsets": [8, 24]}}, b"\0" * 24), "the same twice": safetensors({"a": F, "b": F}),
    "a hole": safetensors({"a": F, "b": {**F, "data_offsets": [20, 36]}}, b"\0" * 36), "more data": safetensors({"a": F}, b"\0" * 17),
    "unknown dtype": safetensors({"a": {**F, "dtype": "OBJECT"}}), "no dtype": safetensors({"a": {"shape": [4]}}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_are_refused_by_name(name, tmp_path):
    """In a folder that vouches for them: whoever can write a manifest can make any."""
    folder = checkpoint.save(tmp_path / "model", mlp())
    config = {**json.loads((folder / "config.json").read_text()), "sha256": hashlib.sha256(HOSTILE[name]).hexdigest()}
    (folder / "model.safetensors").write_bytes(HOSTILE[name])
    (folder / "config.json").write_text(json.dumps(config))
    store.seal(folder)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        checkpoint.load(folder)


CONFIGS = {
    "deep": b"[" * 100_000, "deep objects": b'{"a":' * 100_000, "a long number": b'{"format": ' + b"9" * 5000 + b"}", "a list": b"[]",
    "null": b"null", "sde of null": b'{"sde": null, "parameterization": {}, "net": {}, "format": 2, "sha256": ""}',
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_are_refused_by_name(name, tmp_path):
    folder = checkpoint.save(tmp_path / "model", mlp())
    (folder / "config.json").write_bytes(CONFIGS[name])
    store.seal(folder)
    with pytest.raises(ValueError, match=r"config\.json"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": [2]}, {"format": 99}, {"emas": 3}, {"emas": ["../model"]}, {"emas": [["x"]]}, {"dtype": "os"}, {"dtype": []},
        {"sha256": 0},
        {"net": {"name": "preset"}}, {"net": {"name": ["MLP"]}}, {"net": {"name": "__doc__"}}, {"net": {"name": "MLP", "shape": {}}},
        {"net": {"name": "MLP", "shape": [[2]]}}, {"net": {"name": "MLP", "shape": 2, "width": 2**62}}, {"sde": {"name": "VP", "self": 1}},
        {"sde": {"name": "VP", "beta_min": "x"}}, {"sde": {"name": "DiscreteVP", "betas": [[1]]}}, {"parameterization": {"name": "eval"}},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_settings_are_refused(changes, tmp_path):
    folder = checkpoint.save(tmp_path / "model", mlp())
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))
    store.seal(folder)
    with pytest.raises(ValueError):
        checkpoint.load(folder)


# --- half the size -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_the_size_come_back_in_their_own_dtype(dtype, tmp_path):
    for own in (torch.float32, D):
        model = mlp(dtype=own)
        model.net.register_buffer("seen", torch.tensor(7))
        folder = checkpoint.save(tmp_path / "half", model, dtype=dtype, overwrite=True)
        back = checkpoint.load(folder, net=with_seen(own))
        for name, value in model.net.state_dict().items():
            wanted = value.to(dtype).to(own) if value.is_floating_point() else value
            assert torch.equal(back.net.state_dict()[name], wanted)
            assert back.net.state_dict()[name].dtype == value.dtype
    plain = mlp()
    back = checkpoint.load(checkpoint.save(tmp_path / "named", plain, dtype=dtype))
    assert {v.dtype for v in back.net.state_dict().values()} == {torch.float32}
    assert back(torch.ones(2, 2), T).dtype == torch.float32
    full = checkpoint.save(tmp_path / "full", plain) / "model.safetensors"
    data = [sum(4 * v.numel() for v in plain.net.state_dict().values()) // k for k in (1, 2)]
    assert full.stat().st_size - (tmp_path / "named" / "model.safetensors").stat().st_size == pytest.approx(
        data[0] - data[1], abs=99
    )


def with_seen(own):
    net = mlp(dtype=own).net
    net.register_buffer("seen", torch.tensor(0))
    return net


def test_weights_beyond_half_are_refused(tmp_path):
    model = mlp()
    with torch.no_grad():
        next(model.net.parameters()).fill_(1e5)
    with pytest.raises(ValueError, match=r"has weights too large for torch.float16; save them in bfloat16"):
        checkpoint.save(tmp_path / "model", model, dtype=torch.float16)
    checkpoint.save(tmp_path / "model", model, dtype=torch.bfloat16)
    for dtype in (torch.int8, torch.complex64):
        with pytest.raises(ValueError, match=f"dtype is {dtype} for weights of .'float32'.; wanted one of"):
            checkpoint.save(tmp_path / "other", model, dtype=dtype)
    next(model.net.children()).double()
    with pytest.raises(ValueError, match=r"weights of \['float32', 'float64'\]"):
        checkpoint.save(tmp_path / "other", model, dtype=torch.float16)
    assert not (tmp_path / "other").exists()


# --- a training run ------------------------------------------------------------------------------------------------------
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3 / 3, betas=(0.9, 0.95)),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "two groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 1 / 3, "name": "a"}, {"params": p[1:], "lr": 0.1 + 0.2}]),
}


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def stepped(make, steps, net=None, state=None):
    net = linear() if net is None else net
    optimizer = make(list(net.parameters()))
    if state is not None:
        optimizer.load_state_dict(state)
    x = seeded(range(4)).initial((4, 3), torch.float32)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return net, optimizer


def linear():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(seeded([i]).initial((1, *p.shape), torch.float32)[0])
    return net


def written(folder, step=7, **changes):
    model = mlp()
    given = {
        "tensors": {"model": model.net.state_dict()}, "optimizer": None, "config": checkpoint.describe(model), "state": {}, **changes,
    }  # fmt: skip
    return checkpoint.write(folder, step, **given)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_to_the_bit(name, tmp_path):
    make = OPTIMIZERS[name]
    net, optimizer = stepped(make, 3, linear())
    state = optimizer.state_dict()
    path = written(tmp_path / "checkpoints", optimizer=state)
    back = checkpoint.read(path).optimizer
    assert identical(back, state)
    other = linear()
    other.load_state_dict(net.state_dict())
    _, again = stepped(make, 0, other, back)
    assert identical(again.state_dict(), state)
    a, b = stepped(make, 3, net, optimizer.state_dict())[0], stepped(make, 3, other, back)[0]
    assert all(torch.equal(p, q) and p.isfinite().all() for p, q in zip(a.parameters(), b.parameters(), strict=True))
    names = {"optimizer.json"} | (set() if name == "SGD" else {"optimizer.safetensors"})
    assert {p.name for p in path.iterdir() if p.name.startswith("optimizer")} == names


VALUES = {
    "numbers": [0, -1, 2**70, 0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, True, False, None],
    "texts": ["", "ä\u2028\ud800", "$tensor", '"'], "nested": {"a": [(), [], {}, ((1, 2.0), [None])]}, "dollars": {"$tensor": "x", "b": 1},
    "numbered": {1: "a", -2: {"1": "b"}, "1": "c"}, "tensors": {"a.b": torch.ones(2), "c": [torch.tensor(3), (torch.zeros(0),)]},
    "kinds": {"$tuple": {"$items": [{"$float": "nan"}]}}, "two dollars": {"$a": 1, "$b": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_state_comes_back_in_its_types(name, tmp_path):
    found = checkpoint.read(written(tmp_path / "checkpoints", state={"x": VALUES[name]})).state
    assert identical(found["x"], VALUES[name])
    assert found["step"] == 7
    for a, b in zip(found["x"], VALUES[name], strict=True) if name == "numbers" else ():
        assert b is None or math.copysign(1, a) == math.copysign(1, b)


def test_a_generator_goes_on(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    path = written(tmp_path / "checkpoints", state={"rng": {"cpu": generator.get_state()}})
    other = torch.Generator()
    other.set_state(checkpoint.read(path).state["rng"]["cpu"])
    assert torch.equal(torch.randn(9, generator=other), torch.randn(9, generator=generator))


def test_a_snapshot_is_what_was_written(tmp_path):
    model = mlp(dtype=D)
    tensors = {
        "model": model.net.state_dict(),
        "ema_0.9": away(mlp(seed=6).net).state_dict(),
        "objective": {"log_var": torch.ones(2)},
    }
    config = {**checkpoint.describe(model), "emas": ["ema_0.9"], "train": {"lr": 1e-3, "betas": (0.9, 0.999)}}
    path = written(tmp_path / "checkpoints", tensors=tensors, config=config, step=123)
    assert path == tmp_path / "checkpoints" / "step-00000123"
    for folder in (path, tmp_path, tmp_path / "checkpoints", str(tmp_path)):
        found = checkpoint.read(folder)
        assert (found.step, found.path, found.optimizer, found.state) == (123, path, None, {"step": 123})
        assert identical({k: dict(sorted(v.items())) for k, v in sorted(found.tensors.items())},
                         {k: dict(sorted(v.items())) for k, v in sorted(tensors.items())})  # fmt: skip
        assert found.config["train"] == {"lr": 1e-3, "betas": [0.9, 0.999]}
        assert found.config["sha256"] == hashlib.sha256((path / "ema_0.9.safetensors").read_bytes()).hexdigest()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.step = 3


def test_load_takes_a_step_or_a_run(tmp_path):
    """The first average by default, others and the model by name; of a run the newest step."""
    nets = {name: mlp(seed=i).net for i, name in enumerate(("model", "ema_0.9", "ema_0.99"))}
    folder = tmp_path / "checkpoints"
    config = checkpoint.describe(mlp())
    old = written(folder, 9)
    new = written(
        folder, 10, tensors={n: net.state_dict() for n, net in nets.items()}, config={**config, "emas": ["ema_0.99", "ema_0.9"]}
    )
    for given in (tmp_path, folder, new):
        assert checkpoint.find(given) == new
        assert same(checkpoint.load(given).net, nets["ema_0.99"])
        for name, net in nets.items():
            assert same(checkpoint.load(given, weights=name).net, net)
    assert same(checkpoint.load(old).net, mlp().net)
    assert checkpoint.load(new, sde=s.EDM()).sde == s.EDM()
    for name in ("ema_0.5", "../model", "optimizer"):
        with pytest.raises(ValueError, match=r"weights is .*has \['ema_0.9', 'ema_0.99', 'model'\]"):
            checkpoint.load(new, weights=name)
    model = checkpoint.save(tmp_path / "model", mlp())
    with pytest.raises(ValueError, match=r"weights is 'ema_0.9'; .* has \['model'\]"):
        checkpoint.load(model, weights="ema_0.9")
    with pytest.raises(ValueError, match=r"is no step of training; .*load reads a model"):
        checkpoint.read(model)
    (new / "config.json").unlink()
    with pytest.raises(ValueError, match=r"00010/config.json is missing; .*whole checkpoint is .*00009"):
        checkpoint.load(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
            checkpoint.read(folder)
        with pytest.raises(FileNotFoundError, match="is no checkpoint"):
            checkpoint.load(folder)


def test_the_newest_are_kept(tmp_path):
    for step in (0, 5, 10, 100):
        written(tmp_path / "checkpoints", step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000100"]


def test_a_step_is_above_the_newest(tmp_path):
    written(tmp_path / "checkpoints", 10)
    for step in (9, 10):
        with pytest.raises(ValueError, match=rf"step is {step} and .* holds step 10; delete what is newer"):
            written(tmp_path / "checkpoints", step)


M = {"w": torch.ones(2)}
REFUSED = [
    ({"step": -1}, ValueError, "step is -1"), ({"step": 1.0}, TypeError, "step is 1.0"), ({"keep": 0}, ValueError, "keep is 0"),
    ({"tensors": {}}, ValueError, r"not \['model'\]"), ({"tensors": [M]}, TypeError, "tensors is list; wanted a dictionary"),
    ({"tensors": {"model": M, "../x": M}}, ValueError, r"tensors has '../x'; wanted a name of letters"),
    ({"tensors": {"model": M, "a/b": M}}, ValueError, "wanted a name"), ({"tensors": {"model": M, "": M}}, ValueError, "wanted a name"),
    ({"tensors": {"model": M, "optimizer": M}}, ValueError, "other than optimizer"), ({"tensors": {"model": M, 3: M}}, ValueError, "has 3"),
    ({"tensors": {"model": M, "x\0": M}}, ValueError, "wanted a name"),
    ({"tensors": {"model": [1]}}, TypeError, r"tensors\['model'\] is list"),
    ({"tensors": {"model": {"a": W, "b": W}}}, ValueError, r"tensors\['model'\]\['b'\] and .* share memory"),
    ({"optimizer": torch.optim.SGD([W.clone()], lr=1)}, TypeError, r"optimizer is SGD; wanted a dictionary, such as optimizer.state_dict"),
    ({"optimizer": {"state": {0: {"f": print}}}}, TypeError, r"state.0.f is <built-in function print>"),
    ({"optimizer": {"state": {(1, 2): 3}}}, TypeError, r"state has the key \(1, 2\); wanted strings and integers"),
    ({"optimizer": {"a.b": W, "a": {"b": W}}}, ValueError, "two tensors are at a.b"),
    ({"state": {"rng": b"bytes"}}, TypeError, "rng is b'bytes'"), ({"state": {"x": {1, 2}}}, TypeError, "x is {1, 2}"),
    ({"state": {"step": 3}}, ValueError, r"step is 7 and state\['step'\] is 3"), ({"state": None}, TypeError, "state is NoneType"),
    ({"config": {}}, ValueError, r"config has no \['sde', 'parameterization', 'net'\]; wanted .*describe"),
    ({"config": {**checkpoint.describe(mlp()), "lr": math.nan}}, ValueError, "the config is not plain JSON"),
    ({"config": {**checkpoint.describe(mlp()), "emas": ["ema_0.9"]}}, ValueError, r"not \['ema_0.9'\]; wanted the model and the averages"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=[c[2] for c in REFUSED])
def test_what_cannot_be_held_is_refused_before_anything_is_written(changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        written(tmp_path / "checkpoints", **changes)
    assert list(tmp_path.iterdir()) == []


TREES = {
    "an unknown kind": {"x": {"$call": "os.system"}}, "no such tensor": {"x": {"$tensor": "y"}},
    "two kinds": {"x": {"$tensor": "y", "$tuple": []}},
    "a list": [], "a number": 3, "an odd float": {"x": {"$float": "1"}}, "items of nothing": {"x": {"$items": 3}},
    "a tuple of none": {"x": {"$tuple": None}},
    "a list as a key": {"x": {"$items": [[[1], 2]]}}, "no step": {}, "deep": {"x": functools.reduce(lambda a, _: [a], range(900), 1)},
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_hostile_states_are_refused(name, tmp_path):
    path = written(tmp_path / "checkpoints")
    (path / "state.json").write_text(json.dumps(TREES[name]))
    store.seal(path, step=7)
    with pytest.raises(ValueError, match=r"state\.json"):
        checkpoint.read(path)


# --- the hub -------------------------------------------------------------------------------------------------------------
class Hub(types.ModuleType):
    """A hub in a folder: what is uploaded lies in a cache of links, as huggingface_hub keeps it."""

    def __init__(self, root):
        super().__init__("huggingface_hub")
        self.root, self.calls = root, []
        self.HfApi = lambda: self

    def create_repo(self, repo_id, exist_ok):
        self.calls.append(("create", repo_id, exist_ok))

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        self.calls.append(("upload", repo_id, allow_patterns))
        snapshot, blobs = self.root / repo_id / "snapshot", self.root / repo_id / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for name in allow_patterns:
            (blobs / name).write_bytes((Path(folder_path) / name).read_bytes())
            (snapshot / name).symlink_to(blobs / name)

    def snapshot_download(self, repo_id, revision, allow_patterns):
        self.calls.append(("download", repo_id, revision, allow_patterns))
        return str(self.root / repo_id / "snapshot")


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "secret.json").write_text("{}")
    assert checkpoint.save_pretrained(mlp(), folder, push_to_hub="me/small-model.v1", dtype=torch.bfloat16) == folder
    back = checkpoint.from_pretrained("me/small-model.v1", revision="main")
    assert same(back.net, checkpoint.load(folder).net)
    assert hub.calls == [
        ("create", "me/small-model.v1", True),
        ("upload", "me/small-model.v1", ["config.json", "manifest.json", "model.safetensors"]),
        ("download", "me/small-model.v1", "main", ["*.safetensors", "*.json"]),
    ]
    assert checkpoint.from_pretrained("me/small-model.v1", sde=s.EDM()).sde == s.EDM()
    blob = tmp_path / "hub" / "me" / "small-model.v1" / "blobs" / "model.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model.safetensors is not the file manifest.json was written with"):
        checkpoint.from_pretrained("me/small-model.v1")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save_pretrained(mlp(), folder)


def test_a_folder_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    folder = checkpoint.save_pretrained(mlp(), tmp_path / "model")
    for name in (folder, str(folder)):
        assert same(checkpoint.from_pretrained(name).net, mlp().net)
    with pytest.raises(ValueError, match="only a hub id has revisions"):
        checkpoint.from_pretrained(folder, revision="main")
    with pytest.raises(ModuleNotFoundError, match=r"owner/name is no folder here, .* pip install 'scoresde\[hub\]'"):
        checkpoint.from_pretrained("owner/name")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        checkpoint.save_pretrained(mlp(), tmp_path / "other", push_to_hub="owner/name")
    assert not (tmp_path / "other").exists()
    for name in ("./owner/name", "/owner/name", "a/b/c", "", "owner/../name", "-x/y", "https://x.y/z"):
        with pytest.raises((FileNotFoundError, ValueError)):
            checkpoint.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        checkpoint.from_pretrained(tmp_path / "nothing")
