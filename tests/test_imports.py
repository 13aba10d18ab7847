"""Who may import whom, read from the source; and what no module of the library may hold."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import scoresde

ROOT = Path(scoresde.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A module (or package) and the modules it may import; itself is understood. What is not here is no module of the library.
ARROWS = {
    "checks": set(),
    "parallel": {"checks"},
    "pieces": set(),
    "images": set(),
    "packages": set(),
    "strict": set(),
    "hub": set(),
    "seeds": set(),
    "choices": {"strict"},
    "sections": {"choices", "strict"},
    "store": {"checks"},
    "codec": {"checks"},
    "ema": {"checks", "pieces"},
    "logs": {"store"},
    "sources": {"images", "checks"},
    "datasets": {"sources", "packages"},
    "data": {"datasets", "sources", "philox", "checks"},
    "philox": set(),
    "nets": {"checks"},
    "metrics": {"checks", "pieces"},
    "linear": {"checks"},
    "noise": {"checks", "philox"},
    "sde": {"linear", "checks"},
    "parameterizations": {"linear"},
    "denoiser": {"linear", "checks", "parameterizations"},
    "exact": {"denoiser", "linear", "noise", "checks"},
    "grid": {"linear", "checks"},
    "variables": {"linear", "parameterizations", "checks"},
    "guidance": {"denoiser", "checks"},
    "oracle": {"denoiser", "linear", "noise", "parameterizations", "checks"},
    "solvers": {"oracle", "variables", "grid", "denoiser", "linear", "noise", "checks"},
    "divergence": {"noise", "checks"},
    "solve": {"solvers", "oracle", "grid", "denoiser", "linear", "noise", "checks"},
    "likelihood": {"solve", "divergence", "solvers", "oracle", "grid", "denoiser", "linear", "noise", "checks"},
    "sample": {"solve", "likelihood", "divergence", "solvers", "oracle", "grid", "variables", "denoiser", "checks"},
    "bits": {"likelihood", "solve", "divergence", "solvers", "grid", "denoiser", "noise", "checks"},
    "bounds": {"loss", "bits", "solve", "oracle", "grid", "denoiser", "linear", "noise", "checks"},
    "pilot": {"sample", "solve", "solvers", "oracle", "denoiser", "grid", "linear", "variables", "checks"},
    "orders": {"solve", "solvers", "denoiser", "noise", "grid", "checks"},
    "loss": {"denoiser", "linear", "noise", "checks"},
    "objectives": {"loss", "nets", "divergence", "denoiser", "linear", "noise", "checks"},
    "training": {"loss", "ema", "denoiser", "pieces", "checks"},
    "alike": {"parallel", "pieces"},
    "sharded": {"training", "alike", "objectives", "loss", "denoiser", "parallel", "pieces", "checks"},
    "train": {"training", "sharded", "alike", "loss", "ema", "denoiser", "noise", "parallel", "pieces", "checks"},
    "checkpoint": {"store", "codec", "hub", "nets", "parameterizations", "sde", "linear", "denoiser", "pieces", "checks"},
    "config": {
        "choices",
        "datasets",
        "ema",
        "linear",
        "loss",
        "nets",
        "objectives",
        "parameterizations",
        "sde",
        "sections",
        "strict",
    },
}
# These may import anything below and, going up, each the ones before it.
ORDER = (
    "parallel",
    "figures",
    "command",
    "compare",
    "resume",
    "pages",
    "filling",
    "samples",
    "densities",
    "generate",
    "reports",
    "sets",
    "sums",
    "verdicts",
    "evaluate",
    "job",
    "watch",
    "run",
    "demo",
    "cli",
)
TOP = set(ORDER)
OUTSIDE = {"torch", "numpy", "scipy", "torchdiffeq", "torchsde", "safetensors", "tqdm", "tyro", "yaml"}
NARROW = {"nets": {"torch", "numpy"}, "metrics": {"torch", "numpy", "scipy"}}
LAZY = {"matplotlib", "sklearn", "PIL", "huggingface_hub"}  # extras: in these modules alone, and inside functions
LAZY_IN = {"figures", "demo", "images", "datasets", "hub"}


def module_of(path):
    """The first name below scoresde: nets/mlp.py is of `nets`, __init__.py of ``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@cache
def tree(path):
    return ast.parse(path.read_text(), str(path))


def absolute(path, node):
    """The dotted modules that an import statement names, with relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = ["scoresde", *path.relative_to(ROOT).parts[:-1]]
    base = package[: len(package) - node.level + 1] if node.level else []
    base += node.module.split(".") if node.module else []
    # `from . import nets` names a module in its list, `from .nets import MLP` before it
    return [".".join([*base, alias.name]) for alias in node.names] if base == ["scoresde"] else [".".join(base)]


def imports(path):
    """(dotted name, inside a function?) of every import of a file, those under TYPE_CHECKING included."""
    found = []

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                found.extend((name, inside) for name in absolute(path, child))
            walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    walk(tree(path), False)
    return found


def ours(path):
    """The modules of the library that a file imports."""
    names = {name.split(".")[1] for name, _ in imports(path) if name.startswith("scoresde.")}
    return {name for name in names if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()} - {module_of(path)}


def allowed(module):
    if module in TOP:
        return set(ARROWS) | set(ORDER[: ORDER.index(module)])
    if module == "":
        return set(ARROWS) | {"compare"}
    return {"cli"} if module == "__main__" else ARROWS[module]


MODULES = sorted({module_of(path) for path in FILES})


def test_every_module_has_its_arrows():
    assert set(MODULES) <= {"", "__main__", *ARROWS, *TOP}
    assert set(ARROWS) <= set(MODULES)
    assert set(ORDER) == TOP


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    """Against an arrow is a review stop."""
    module = module_of(path)
    assert ours(path) <= allowed(module), f"{path.name} imports {sorted(ours(path) - allowed(module))}"


def test_nothing_imports_the_top():
    for path in FILES:
        if module_of(path) not in {"cli", "__main__"}:
            assert not {"cli", "demo"} & ours(path) - {module_of(path)}, path


def test_there_are_no_circles():
    edges = {}
    for path in FILES:
        edges.setdefault(module_of(path), set()).update(ours(path))
    done = set()
    while edges.keys() - done:
        free = {m for m in edges.keys() - done if not edges[m] - done}
        assert free, f"a circle among {sorted(edges.keys() - done)}"
        done |= free
    inside = {}  # and within each package, file by file
    for path in FILES:
        names = {name for name, _ in imports(path)}
        dotted = ".".join(["scoresde", *path.relative_to(ROOT).with_suffix("").parts])
        inside[dotted] = {n for n in names if n.count(".") > 1}
    done = {n for targets in inside.values() for n in targets} - inside.keys()
    while inside.keys() - done:
        free = {m for m in inside.keys() - done if not inside[m] - done}
        assert free, f"a circle among {sorted(inside.keys() - done)}"
        done |= free


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_stated_libraries_are_imported(path):
    module = module_of(path)
    for name, inside in imports(path):
        library = name.split(".")[0]
        if library in sys.stdlib_module_names or library == "scoresde":
            continue
        if library in LAZY:
            assert module in LAZY_IN, f"{path.name} imports {name}; that is for {sorted(LAZY_IN)}"
            assert inside, f"{path.name} imports {name} at the top; wanted inside the function that needs it"
        else:
            assert library in NARROW.get(module, OUTSIDE), f"{path.name} imports {name}"


def test_the_reader_of_imports_reads_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "nets").mkdir()
    for name in ("checks", "linear", "cli"):
        (tmp_path / f"{name}.py").write_text("")
    path = tmp_path / "nets" / "a.py"
    path.write_text(
        "import os, scoresde.cli\nfrom . import b\nfrom .. import checks\nfrom ..linear import cast as c\nfrom .b import d\n"
        "from scoresde.linear import e\ndef f():\n    import matplotlib.pyplot\n"
    )
    names = ["os", "scoresde.cli", "scoresde.nets", "scoresde.checks", "scoresde.linear", "scoresde.nets.b", "scoresde.linear"]
    assert [name for name, _ in imports(path)] == [*names, "matplotlib.pyplot"]
    assert ours(path) == {"cli", "checks", "linear"}
    assert [inside for _, inside in imports(path)] == [False] * 7 + [True]


# --- what is exported ----------------------------------------------------------------------------------------------------
def test_import_star_brings_every_name():
    names = {}
    exec("from scoresde import *", names)  # noqa: S102
    assert set(scoresde.__all__) <= set(names)
    assert len(set(scoresde.__all__)) == len(scoresde.__all__)
    assert scoresde.__version__


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "__main__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_of_all_exists_and_is_documented(path):
    dotted = ".".join(["scoresde", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    module = importlib.import_module(dotted)
    assert module.__doc__
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        assert not callable(value) or value.__doc__, f"{dotted}.{name} has no docstring"


def test_importing_the_library_is_light():
    """A fresh interpreter: no plotting, no scikit-learn, no command line, and nothing printed."""
    code = (
        "import sys, scoresde; from scoresde import *; "
        "print([m for m in ('matplotlib', 'sklearn', 'scoresde.cli', 'scoresde.demo') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
    assert run.returncode == 0


# --- what the source may not hold ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_assert_no_pickle_no_torch_load(path):
    """`python -O` drops asserts; unpickling runs what a file says."""
    assert not [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    pickles = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not pickles & {name.split(".")[0] for name, _ in imports(path)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert not getattr(node.value, "value", True), f"{path.name}:{node.value.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400
