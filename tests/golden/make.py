"""Record what tf.keras.optimizers.legacy computes: `cd tests; python -m golden.make [--check]` where tensorflow-cpu 2.15.1 is installed.

`--check` writes nothing and fails if a recorded file differs from what this machine computes.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import tensorflow as tf
from golden.cases import CASES
from golden.draw import FOLDER, Case, Slices, checksum, initial, path, steps

tf.config.threading.set_inter_op_parallelism_threads(1)  # the order of a sum, hence a norm, depends on the threads
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.get_logger().setLevel("ERROR")  # one warning per call with an absent gradient

BETAS = (0.9, 0.95, 0.99, 0.999)
SMALLEST = 1e-12  # TensorFlow flushes subnormal results to zero; squares of gradients must stay far from them


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    names = sorted({case.optimizer for case in CASES})
    files = {path(name): (record, name) for name in names} | {FOLDER / "powers.npz": (powers, None)}
    differing = [file.name for file, (make, name) in files.items() if not save(file, make(name) if name else make(), check)]
    if differing:
        sys.exit(f"differs from the recorded file: {', '.join(differing)}")


def record(optimizer: str) -> dict[str, np.ndarray]:
    mine = [case for case in CASES if case.optimizer == optimizer]
    return pack({f"{case.name}/{key}": np.asarray(value) for case in mine for key, value in run(case).items()})


def powers() -> dict[str, np.ndarray]:
    """TensorFlow's scalar beta ** t, for t as long as a short training."""
    found = {}
    for beta in BETAS:
        for dtype in (np.float32, np.float64):
            base = tf.constant(np.float32(beta), dtype)
            found[f"{beta}/{dtype.__name__}"] = np.array([tf.pow(base, tf.constant(t, dtype)).numpy() for t in range(1, 2001)])
    return found


def save(file: Path, arrays: dict[str, np.ndarray], check: bool) -> bool:
    if not check:
        np.savez_compressed(file, **arrays)
        print(f"{file.name}: {file.stat().st_size} bytes")
    with np.load(file) as stored:
        return set(stored.files) == set(arrays) and all(np.array_equal(stored[name], arrays[name]) for name in arrays)


def run(case: Case) -> dict[str, np.ndarray]:
    variables = [tf.Variable(value) for value in initial(case)]
    optimizer = build(case)
    recorded = {"inputs": np.int64(checksum(case))}
    for step, pairs in enumerate(steps(case), start=1):
        optimizer.apply_gradients([(gradient_tensor(case, gradient), variables[index]) for gradient, index in pairs])
        if step in case.snapshots:
            recorded |= {f"variable/{step}/{index}": variable.numpy() for index, variable in enumerate(variables)}
    recorded |= {f"weight/{position}": value for position, value in enumerate(optimizer.get_weights())}
    for key, value in recorded.items():
        assert_ordinary(f"{case.name}/{key}", value)
    return recorded


def build(case: Case) -> tf.keras.optimizers.legacy.Optimizer:
    config = dict(case.config)
    if isinstance(config.get("learning_rate"), dict):
        config["learning_rate"] = tf.keras.optimizers.schedules.deserialize(config["learning_rate"])
    return getattr(tf.keras.optimizers.legacy, case.optimizer)(**config)


def gradient_tensor(case: Case, gradient) -> tf.Tensor | tf.IndexedSlices | None:
    if gradient is None:
        return None
    values = gradient.values if isinstance(gradient, Slices) else gradient
    assert np.all((values == 0) | (np.abs(values) > SMALLEST)), f"{case.name}: a gradient close to the subnormals"
    if isinstance(gradient, Slices):
        return tf.IndexedSlices(tf.constant(values), tf.constant(gradient.indices), tf.constant(gradient.shape, tf.int64))
    return tf.constant(gradient)


def assert_ordinary(key: str, value: np.ndarray) -> None:
    assert np.all(np.isfinite(value)), f"{key}: not finite"
    if value.dtype.kind == "f":
        assert np.all((value == 0) | (np.abs(value) >= np.finfo(value.dtype).tiny)), f"{key}: subnormal"


def pack(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One pool per dtype and the table of contents that `cases.load` reads."""
    pools, contents = {}, []
    for key, value in arrays.items():
        pool = pools.setdefault(value.dtype.name, [])
        contents.append((key, value.dtype.name, sum(part.size for part in pool), value.shape))
        pool.append(value.ravel())
    packed = {name: np.concatenate(pool) for name, pool in pools.items()}
    return packed | {"contents": np.array(json.dumps(contents)), "tensorflow": np.array(tf.__version__)}


if __name__ == "__main__":
    main()
