"""The design's import direction and the source's limits, read from the syntax trees."""

import ast
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fused_kopt
from fused_kopt import optimizers

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES, PARAMETERS = 250, 40, 6
# The kernel's text is one function by necessity (a jitted helper of its own loses alignment hints in Triton 3.6), and
# what it calls for a full and for a masked block takes a block's five values, where its sums go, its lanes and its mask.
LONG_FUNCTIONS = {"update_bucket": 67}
MANY_PARAMETERS = {"update_block": 8}
# `**options` of the constructors are Keras's; the other two take values by the names that configs and messages show.
KEYWORDS = {"__init__", "_config", "check_not_negative"}

OPTIMIZERS = ("adadelta", "adagrad", "adam", "adamax", "ftrl", "lion", "nadam", "registry", "rmsprop", "sgd")
KERAS = ("adadelta", "adagrad", "adam", "adamax", "ftrl", "lamb", "lion", "nadam", "rmsprop", "sgd")
# From the bottom: a module imports from layers below its own, never upward, never sideways.
LAYERS = (
    ("errors", "layout", "op", "optimizers.schedules", "recording", "slots", "tape", "tensors"),
    ("buffers", "collectives", "loss_scale", "prepare"),
    ("agreement", "reference", "state"),
    ("execute",),
    ("gradients", "hyperparameters", "norms"),
    ("flat", "options", "verification"),
    ("clipping", "codecs"),
    ("precision",),
    ("planes", "stages"),
    ("aggregate", "description", "updates"),
    ("repeat",),
    ("repeats", "replays"),
    ("borrowed", "contract"),
    ("accumulation", "stored"),
    ("declared",),
    ("planned",),
    ("engine",),
    ("optimizer",),
    tuple(f"optimizers.{name}" for name in OPTIMIZERS),
    ("optimizers",),
    ("memory",),
    ("keras.declaration", "keras.host", "keras.plan"),
    ("keras.state", "keras.stepper"),
    ("keras.fused",),
    ("keras.loss_scale", *(f"keras.{name}" for name in KERAS)),
    ("keras.fusing", "keras.logger"),
    ("keras",),
    ("mixed_precision",),
    ("distributed.partition", "distributed.squares"),
    ("distributed.incoming", "distributed.tree"),
    ("distributed.backward",),
    ("distributed.shards",),
    ("distributed.sharded", "distributed.transfers"),
    ("distributed.homes",),
    ("distributed.loads",),
    ("distributed.hosting",),
    ("distributed.offloaded",),
    ("",),
    ("torch_optim.arguments", "torch_optim.shards"),
    ("torch_optim.members",),
    ("torch_optim.stored",),
    ("torch_optim.loading", "torch_optim.rows"),
    ("torch_optim.contract",),
    ("torch_optim.optimizer",),
    tuple(f"torch_optim.{name}" for name in OPTIMIZERS if name != "registry"),
    ("torch_optim",),
    ("hf", "lightning"),
    ("checkpoint.neutral", "checkpoint.tables"),
    ("checkpoint.live", "checkpoint.meaning", "checkpoint.scaling", "checkpoint.storage", "checkpoint.torch_words"),
    ("checkpoint.snapshot",),
    ("checkpoint.lists", "checkpoint.torch_read", "checkpoint.torch_write"),
    ("checkpoint.keras_files",),
    ("checkpoint.keras_writing",),
    ("checkpoint.formats",),
    ("checkpoint",),
    ("distributed.elastic.pieces", "distributed.elastic.ranks", "distributed.elastic.schema"),
    ("distributed.elastic.files", "distributed.elastic.loading", "distributed.elastic.saving", "distributed.elastic.versions"),
    ("distributed.elastic.commit",),
    ("distributed.elastic",),
    ("distributed",),
    ("commands",),
    ("commands.architectures", "commands.common", "commands.packages", "commands.variants"),
    ("commands.demo", "commands.machines", "commands.models"),
    ("commands.division", "commands.tasks"),
    ("commands.experiment", "commands.scale"),
    (
        "commands.convert",
        "commands.doctor",
        "commands.explain",
        "commands.inspect",
        "commands.plan",
        "commands.precision",
        "commands.tune",
        "commands.verify",
    ),
    ("cli",),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
KERNEL_LAYERS = (
    ("cpp_build", "cpp_op", "cpp_text", "machine_code", "op", "rebind", "tuning"),
    ("cpp", "update"),
    ("norms", "rules"),
    ("cpp_launch", "launch"),
    ("offline",),
    ("scratch",),
)
KERNEL_LEVEL = {f"kernels.{name}": level for level, layer in enumerate(KERNEL_LAYERS) for name in layer}

# Imports inside functions, each for its reason: here, machines without Triton say so.
NEED_TRITON = {
    "commands.explain": ("fused_kopt.kernels.machine_code", "fused_kopt.kernels.offline"),
    "commands.doctor": ("fused_kopt.kernels.launch", "fused_kopt.kernels.tuning"),
    "commands.tune": (*(f"fused_kopt.kernels.{name}" for name in ("offline", "scratch", "tuning")), "triton.testing.do_bench"),
}
LAZY = {(module, name): "Triton" for module, names in NEED_TRITON.items() for name in names} | {
    ("execute", "fused_kopt.kernels.launch"): "machines without Triton run the reference",
    ("execute", "fused_kopt.kernels.cpp_build"): "only steps on CPU build C++",
    ("execute", "fused_kopt.kernels.cpp_launch"): "only steps on CPU build C++",
    ("commands.doctor", "fused_kopt.kernels.cpp_build"): "beside its Triton modules",
    ("contract", "fused_kopt.optimizers.schedules"): "its package imports the optimizers, hence this module",
    ("hyperparameters", "fused_kopt.optimizers.schedules"): "its package imports the optimizers, hence this module",
    ("checkpoint.storage", "safetensors.torch.save_file"): "the extra `checkpoint`",
    ("checkpoint.storage", "safetensors.SafetensorError"): "the extra `checkpoint`",
    ("checkpoint.storage", "safetensors.safe_open"): "the extra `checkpoint`",
    ("checkpoint.formats", "fused_kopt.checkpoint.keras_files"): "the extra `checkpoint`: h5py",
    ("checkpoint.formats", "fused_kopt.checkpoint.keras_writing"): "the extra `checkpoint`: h5py",
    ("distributed.elastic", "fused_kopt.distributed.elastic.commit"): "torch.distributed.checkpoint takes 1.5 s",
    ("distributed.elastic", "fused_kopt.distributed.elastic.files"): "torch.distributed.checkpoint takes 1.5 s",
    ("commands.demo", "sklearn.datasets.load_digits"): "the extra `demo`",
    ("commands.demo", "sklearn.model_selection.train_test_split"): "the extra `demo`",
    ("commands.demo", "matplotlib.figure.Figure"): "the extra `demo`",
    ("commands.tune", "matplotlib.figure.Figure"): "the extra `demo`",
    ("commands.precision", "matplotlib"): "the extra `demo`",
    ("commands.precision", "matplotlib.figure.Figure"): "the extra `demo`",
    ("commands.tasks", "pydoc_data.topics"): "half a megabyte of text",
    ("memory", "fused_kopt.kernels.cpp"): "only where C++ runs",
    ("memory", "fused_kopt.kernels.launch"): "machines without Triton have none",
}
FORBIDDEN = {
    "environment variables": r"\bos\.(?:environ|getenv|putenv)",
    "import attempts": r"except[^:]*(?:ImportError|ModuleNotFoundError)",
    "autotuning of in-place kernels": r"\bautotune\b",
    "execution of data": r"(?<![\w.])(?:eval|exec|compile|__import__)\(|\bpickle\b|\bimport_module\b"
    # weights_only: a loader of tensors and plain containers that constructs nothing else
    r"|\btorch\.load\b(?!.*weights_only=True)",
}


class Import(NamedTuple):
    """One imported name. `where`: top, lazy or typing."""

    name: str
    where: str


@functools.cache
def sources() -> dict[str, Path]:
    """Module name (without the package's) to file; the link is followed once, as kernels."""
    packages = ("optimizers", "keras", "checkpoint", "commands", "distributed", "distributed/elastic", "torch_optim")
    folders = ("fused_kopt", *(f"fused_kopt/{name}" for name in packages), "kernels")
    files = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
    return {re.sub(r"^fused_kopt\.|\.?__init__$", "", ".".join(f.relative_to(ROOT).with_suffix("").parts)): f for f in files}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text())


def imports(node: ast.AST, where: str = "top") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inner = where
        if isinstance(child, (ast.FunctionDef, ast.Lambda)):
            inner = "lazy"
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            inner = "typing"
        if isinstance(child, ast.ImportFrom):
            assert not child.level, "relative import"
            yield from (Import(f"{child.module}.{alias.name}", where) for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (Import(alias.name, where) for alias in child.names)
        else:
            yield from imports(child, inner)


def ours(name: str) -> str | None:
    """The module of this package that an imported name belongs to, or None."""
    parts = name.split(".")
    if parts[0] != "fused_kopt":
        return None
    known = LEVEL | KERNEL_LEVEL
    return next(candidate for n in range(len(parts), 0, -1) if (candidate := ".".join(parts[1:n])) in known)


def functions(module: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef))


def test_every_module_has_a_layer() -> None:
    assert set(sources()) == set(LEVEL) | set(KERNEL_LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_imports_go_down(module: str) -> None:
    for name, where in imports(tree(module)):
        target = ours(name)
        if where == "top":
            assert target is None or LEVEL[target] < LEVEL[module], name
            assert name.split(".")[0] not in ("triton", "kernels", "sklearn", "matplotlib"), name
        elif where == "lazy":
            assert (module, name) in LAZY, name


def test_every_lazy_import_is_needed() -> None:
    assert set(LAZY) == {(module, name) for module in LEVEL for name, where in imports(tree(module)) if where == "lazy"}


@pytest.mark.parametrize("module", sorted(KERNEL_LEVEL))
def test_kernels_import_kernels(module: str) -> None:
    for name, where in imports(tree(module)):
        assert where == "top"
        target = ours(name)
        assert target is None or KERNEL_LEVEL[target] < KERNEL_LEVEL[module], name


MEASURED = sorted([*sources().values(), *(ROOT / "perf").glob("*.py")])


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_limits(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for function in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        assert length <= LONG_FUNCTIONS.get(function.name, FUNCTION_LINES), function.name
        assert function.args.kwarg is None or function.name in KEYWORDS, function.name
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        taken = [a for a in arguments if a.arg not in ("self", "cls") and "constexpr" not in ast.dump(a)]
        if function.name != "__init__":  # constructors have Keras's signatures
            assert len(taken) <= MANY_PARAMETERS.get(function.name, PARAMETERS), function.name


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden(what: str) -> None:
    for module, file in sources().items():
        code = "\n".join(ast.unparse(node) for node in tree(module).body if not isinstance(node, ast.Expr))
        assert not re.findall(FORBIDDEN[what], code), f"{file}: {what}"


ALLOWED_IN_RULES = (
    *(ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Expr, ast.Tuple, ast.Name, ast.Load, ast.Store),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Call, ast.Attribute, ast.Compare, ast.Gt, ast.Constant, ast.Subscript),
)


@pytest.mark.parametrize("module", sorted(m for m in LEVEL if m.startswith(("optimizers.", "keras."))))
def test_rules_are_branch_free(module: str) -> None:
    """A rule, and the functions that rules call, use + - *, tuples, > and `op`; the one literal besides slots[i] is 0.0."""
    for function in tree(module).body:
        if not isinstance(function, ast.FunctionDef) or ast.unparse(function.args).split(", ")[-1] != "s":
            continue
        indices = [node.slice for node in ast.walk(function) if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "slots"]
        for node in ast.walk(function):
            assert isinstance(node, ALLOWED_IN_RULES), (function.name, ast.unparse(node))
            if isinstance(node, ast.Constant) and node not in indices:
                assert isinstance(node.value, str) or node.value == 0.0
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node.value) in ("op", "s"), ast.unparse(node)


def public() -> Iterator[tuple[str, Any]]:
    """Every public class and function, and the public methods and properties of the classes."""
    schedules = optimizers.schedules
    named = {name: getattr(package, name) for package in (fused_kopt, optimizers) for name in package.__all__}
    named |= {name: value for name, value in vars(schedules).items() if getattr(value, "__module__", "") == schedules.__name__}
    for name, value in named.items():
        if not name.startswith("_"):
            yield name, value
            if inspect.isclass(value):
                yield from ((f"{name}.{member}", getattr(value, member)) for member in dir(value) if not member.startswith("_"))


def test_public_names_have_docstrings() -> None:
    found = [(n, v) for n, v in public() if isinstance(v, (property, type)) or inspect.isroutine(v) or inspect.ismodule(v)]
    assert len(found) > 200
    assert [name for name, value in found if not inspect.getdoc(value)] == []


def test_op_twins_agree() -> None:
    first, second = ([f.name for f in tree(module).body if isinstance(f, ast.FunctionDef)] for module in ("op", "kernels.op"))
    assert first == second


def test_the_link_is_committed_as_a_link() -> None:
    assert os.readlink(ROOT / "fused_kopt/kernels") == "../kernels"
    assert not (ROOT / "kernels/__init__.py").exists()
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-s", "fused_kopt/kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert listed.stdout.startswith("120000 ")


def test_one_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version == fused_kopt.__version__


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, fused_kopt
from fused_kopt import cli
variable = torch.ones(3)
fused_kopt.SGD(learning_rate=0.5).apply_gradients([(torch.ones(3), variable)])
assert variable.tolist() == [0.5] * 3
assert fused_kopt.stats() == (0, 0)
try:
    fused_kopt.SGD(executor="triton").apply_gradients([(torch.ones(3), variable)])
except RuntimeError as error:
    print(error)
"""


def test_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not available: Triton is not installed; pip install 'fused-kopt[triton]'" in done.stdout
    importlib.import_module("fused_kopt.kernels.launch")  # the same import that is withheld above works here
