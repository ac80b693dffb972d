"""Wheel, sdist and editable install: what is inside, and that all of them import beside the published package `kernels`."""

import email
import email.message
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_kopt

ROOT = Path(__file__).parent.parent
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "build", "dist", "site", "demo-out")
INFO = f"fused_kopt-{fused_kopt.__version__}.dist-info"
EXTRAS = {"checkpoint", "keras", "triton", "demo", "test", "bench", "docs", "hosts"}
# A step in Triton's interpreter through the installed package; the top-level `kernels` stays another package.
CLIENT = """
import sys, torch, fused_kopt, kernels
from fused_kopt.kernels import launch
variable = torch.ones(5)
fused_kopt.SGD(learning_rate=0.5, executor="triton").apply_gradients([(torch.ones(5), variable)])
assert variable.tolist() == [0.5] * 5
print(fused_kopt.__file__, launch.__file__, kernels.__file__, kernels.marker, sep="\\n")
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a command prints; fails with its errors."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PIP_INDEX_URL")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree without what git ignores; the link stays a link."""
    folder = tmp_path_factory.mktemp("tree") / "source"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    assert (folder / "fused_kopt/kernels").is_symlink()
    return folder


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the tree itself."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, tree, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another project's folder, in whose site-packages lies Hugging Face's `kernels` (a stub)."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "site/kernels").mkdir(parents=True)
    (folder / "site/kernels/__init__.py").write_text("marker = 'the published package'\n")
    return folder


@functools.cache
def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        # the upper half of external_attr is st_mode: a link would be 0o12....
        assert all(info.external_attr >> 28 in (0, 0o10) for info in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> email.message.Message:
    return email.message_from_bytes(contents(wheel)[f"{INFO}/METADATA"])


def test_top_level_names(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in contents(wheel)} == {"fused_kopt", INFO}


def test_every_module_is_a_real_file(wheel: Path) -> None:
    packed = {name: text for name, text in contents(wheel).items() if name.startswith("fused_kopt/") and name.endswith(".py")}
    source = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "fused_kopt").rglob("*.py")}
    linked = {f"fused_kopt/kernels/{path.name}": path.read_bytes() for path in (ROOT / "kernels").glob("*.py")}
    assert linked
    assert packed == source | linked


def test_typed_and_licensed(wheel: Path) -> None:
    assert "fused_kopt/py.typed" in contents(wheel)
    assert contents(wheel)[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_metadata(wheel: Path) -> None:
    message = metadata(wheel)
    assert message["Name"] == "fused-kopt"
    assert message["Version"] == fused_kopt.__version__
    assert message["License-Expression"] == "Apache-2.0"
    assert message["Requires-Python"] == ">=3.10"
    assert set(message.get_all("Provides-Extra", [])) == EXTRAS
    needs = message.get_all("Requires-Dist", [])
    required = {need.partition(">")[0] for need in needs if "extra ==" not in need}
    assert required == {"torch", "numpy", "packaging", "rich", "typing_extensions"}
    assert any(need.startswith("triton") and "sys_platform" in need and 'extra == "triton"' in need for need in needs)
    assert b"fused-kopt = fused_kopt.cli:main" in contents(wheel)[f"{INFO}/entry_points.txt"]


def test_the_sdist_holds_files_and_builds_the_same_wheel(built: Path, wheel: Path) -> None:
    (sdist,), (second,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert not [member for member in members.values() if member.issym() or member.islnk()]
    assert {"fused_kopt/kernels/update.py", "pyproject.toml", "README.md", "LICENSE"} <= set(members)
    code = {name: text for name, text in contents(wheel).items() if not name.endswith(("RECORD", "WHEEL"))}
    assert code == {name: text for name, text in contents(second).items() if not name.endswith(("RECORD", "WHEEL"))}


def test_the_wheel_beside_another_kernels(wheel: Path, elsewhere: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=elsewhere)
    for order in ((target, elsewhere / "site"), (elsewhere / "site", target)):
        package, module, other, marker = run(
            sys.executable, "-c", CLIENT, cwd=elsewhere, PYTHONPATH=os.pathsep.join(map(str, order))
        ).splitlines()
        assert Path(package).parent == target / "fused_kopt"
        assert Path(module) == target / "fused_kopt/kernels/launch.py"
        assert (Path(other).parent, marker) == (elsewhere / "site/kernels", "the published package")
    script = run(target / "bin/fused-kopt", "--help", cwd=elsewhere, PYTHONPATH=str(target))
    assert "usage" in script.lower()


def test_an_editable_install_elsewhere(tree: Path, elsewhere: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows the dependencies of this one through a .pth file."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "--editable", tree, cwd=elsewhere)
    package, module, other, _ = run(python, "-c", CLIENT, cwd=elsewhere, PYTHONPATH=str(elsewhere / "site")).splitlines()
    assert Path(package).parent == tree / "fused_kopt"
    assert Path(module).resolve() == tree / "kernels/launch.py"
    assert Path(other).parent == elsewhere / "site/kernels"
