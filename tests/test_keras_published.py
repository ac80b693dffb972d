"""Keras's own published tests of its optimizers pass on ours. They are run from Keras's source distribution, never kept here."""

import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("keras") is None, reason="Keras is not installed")

ROOT = Path(__file__).parent.parent
CLASSES = ("sgd", "rmsprop", "adam", "adamw", "adadelta", "adagrad", "adamax", "nadam", "ftrl", "lamb", "lion", "loss_scale_optimizer")
FILES = [f"{name}_test.py" for name in (*CLASSES, "optimizer", "multi_optimizer")]
LEAST, LEAST_PER_FILE = 130, 4  # on Keras 3.15.1 its own classes pass 161, and at least 6 of each file
INTENDED: dict[str, str] = {}  # test: why ours differs on purpose


@pytest.fixture(scope="module")
def published() -> Path:
    """The folder with the test files of the installed Keras, fetched once per clone."""
    keras = version("keras")
    folder = ROOT / "build" / f"keras-{keras}-tests"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        part.mkdir(parents=True, exist_ok=True)
        ask = ["download", "--no-deps", "--no-binary", "keras", "--retries", "1", "--quiet", "--dest", str(part), f"keras=={keras}"]
        done = subprocess.run([sys.executable, "-m", "pip", *ask], capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"Keras's source distribution is not to be had: {done.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(next(part.glob("*.tar.gz"))) as archive:
            for member in archive:
                if re.fullmatch(r"keras-[\w.]+/keras/src/optimizers/\w+_test\.py", member.name):
                    content = archive.extractfile(member)
                    assert content is not None
                    (part / Path(member.name).name).write_bytes(content.read())
        part.rename(folder)
    return folder


def start(classes: str, folder: Path, out: Path) -> "subprocess.Popen[str]":
    """All files in one process, on Keras's classes (stock) or ours."""
    # the folder is outside of any package, so that `keras` is the installed one
    options = ["-c", os.devnull, "--rootdir", ".", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [*options, "-p", "keras_published", "--classes", classes, "--outcomes", str(out), *FILES]
    alone = {"KERAS_BACKEND": "torch", "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "pytest", *command], cwd=folder, env={**os.environ, **alone}, **pipes)  # type: ignore[call-overload, no-any-return]


def test_keras_tests_pass_on_our_classes(published: Path, tmp_path: Path) -> None:
    started = {classes: start(classes, published, tmp_path / classes) for classes in ("stock", "ours")}
    printed = [process.communicate(timeout=300)[0] for process in started.values()]
    print(*printed)
    assert {process.returncode for process in started.values()} <= {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
    stock, ours = (json.loads((tmp_path / classes).read_text()) for classes in started)
    # what Keras's own classes fail too, on torch or without TensorFlow, says nothing about ours
    passed = {test for test, (outcome, _) in stock.items() if outcome == "passed"}
    counts = Counter(test.partition("::")[0] for test in passed)
    assert counts.total() >= LEAST
    assert min(counts[file] for file in FILES) >= LEAST_PER_FILE
    assert {test: ours[test][0] for test in passed if ours[test][0] != "passed"} == dict.fromkeys(INTENDED, "failed")
    fused = {test.partition("::")[0] for test in passed if ours[test][1]}
    assert fused == set(FILES), "a file whose tests never reach our kernels tests Keras"
    assert not any(launches for _, launches in stock.values())
